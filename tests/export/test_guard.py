"""What a prediction is worth to the guard of stage III."""

from __future__ import annotations

import numpy as np

from resq_deploy.export.guard import value


def test_a_prediction_is_worth_what_fp32_gives_it() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], np.float32))
    found = value(np.array([[0, 9, 1], [9, 0, 1]], np.float32), reference)
    np.testing.assert_allclose(found, [0.5, 1.0], rtol=1e-6)
    assert value(np.full((2, 3), np.nan, np.float32), reference).tolist() == [0.0, 0.0]
