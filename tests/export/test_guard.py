"""What stage III measures by: what a prediction is worth, and large networks in less time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from resq_deploy.export import stage
from resq_deploy.export.design import Design
from resq_deploy.export.guard import Scores, value
from resq_deploy.export.mixtures import DRAWN, FEWEST
from tests.export import nets
from tests.export.test_adjust import guard, plain


def test_a_prediction_is_worth_what_fp32_gives_it() -> None:
    reference = np.log(np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], np.float32))
    found = value(np.array([[0, 9, 1], [9, 0, 1]], np.float32), reference)
    np.testing.assert_allclose(found, [0.5, 1.0], rtol=1e-6)
    assert value(np.full((2, 3), np.nan, np.float32), reference).tolist() == [0.0, 0.0]


def measured(shown: int | None) -> Scores:
    _, int8, _ = plain()
    return replace(guard(trials=24, attacked=0), shown=shown).measure(int8)


def test_trials_may_share_the_images_among_them() -> None:
    """16 of 64 images a trial: each is seen in 6 of 24, and what comes out is the same but for chance."""
    whole, part = measured(None), measured(16)
    assert part.faulty.shape == whole.faulty.shape == (1, 64)
    assert part.worth.shape == whole.worth.shape == (1, 24)
    assert np.isfinite(part.faulty).all()
    assert np.isfinite(part.worth).all()
    np.testing.assert_array_equal(part.clean, whole.clean)
    assert part.agreement == whole.agreement
    error = whole.worth.std() / 24**0.5 + (part.faulty - whole.faulty).std() / 8
    assert abs(part.faulty.mean() - whole.faulty.mean()) < 3 * error
    # clean worth is taken off image by image, so that which images a trial shows hardly adds to its scatter
    assert part.worth.mean() == pytest.approx(part.faulty.mean(), abs=0.02)
    assert part.worth.std() < 2 * whole.worth.std()


def test_all_at_once_is_the_mean_of_every_trial() -> None:
    whole, same = measured(None), measured(64)
    np.testing.assert_array_equal(whole.faulty, same.faulty)
    np.testing.assert_allclose(whole.worth.mean(), whole.faulty.mean())
    assert measured(99).divergence == whole.divergence


def test_no_image_stays_unseen() -> None:
    with pytest.raises(ValueError, match="24 trials of 2 images are not all of them"):
        measured(2)


def test_large_networks_are_measured_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32, _, _ = plain()
    images = nets.images(96)

    def sized(work: float) -> stage.Stage[None]:
        monkeypatch.setattr(stage, "work_per_image", lambda _: work)
        return stage.Stage(fp32, images, Design(), 8 / 255, 0, 1, None)

    usual, large, vast = (sized(work).guard for work in (0.7e9, 5e9, 1e14))
    assert (usual.trials, usual.shown, usual.attacked) == (10, 476, 48)
    assert (large.trials, large.shown, large.attacked) == (10, 66, 48)
    assert (vast.trials, vast.shown, vast.attacked) == (10, 64, stage._LEAST_ATTACKED)
    drawn = [len(made.doubt.mixtures) / made.doubt.share for made in (usual, large, vast)]
    assert drawn == [DRAWN, 2000, FEWEST]
