"""What stage III may be asked for."""

from __future__ import annotations

import pytest

from resq_deploy.errors import DataError
from resq_deploy.export.design import Design


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("ber", value) for value in (0.0, 1.0, float("nan"))),
        *((n, v) for n in ("redundancy", "effort") for v in (-0.1, float("inf"), float("nan"))),
    ],
)
def test_an_impossible_design_is_refused(name: str, value: float) -> None:
    with pytest.raises(DataError, match=name if name != "ber" else "design BER"):
        Design(**{name: value})


def test_a_small_network_may_be_split_more_unless_a_share_is_given() -> None:
    assert Design().share(1e7) == 2 * Design().share(1e8) == 0.2
    assert Design(redundancy=0.0).share(1e7) == Design(redundancy=0.0).share(1e8) == 0.0
