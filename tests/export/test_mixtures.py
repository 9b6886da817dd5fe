"""Disagreement where FP32 hesitates."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.export.mixtures import DRAWN, KEPT, Doubt, Mixtures, smoothed


@pytest.mark.parametrize("count", [1, 2, 8, 3000])
def test_mixtures_are_of_two_images(count: int) -> None:
    images = np.eye(count, dtype=np.float32).reshape(count, 1, 1, count)
    drawn = Mixtures.draw(images, seed=3)
    parts = list(drawn)
    made = np.concatenate(parts).reshape(-1, count)
    assert max(map(len, parts)) <= 64
    assert made.shape == (DRAWN, count)
    assert made.dtype == np.float32
    np.testing.assert_allclose(made.sum(axis=1), 1, rtol=1e-6)
    assert np.ptp(np.bincount(drawn.first, minlength=count)) <= 1
    if count > 1:
        second = np.sort(made, axis=1)[:, -2]
        assert 0.3 <= second.min() < 0.31
        assert 0.49 < second.max() <= 0.5
    again, other = (Mixtures.draw(images, seed=seed) for seed in (3, 4))
    assert np.array_equal(made, np.concatenate(list(again)).reshape(-1, count))
    assert count == 1 or not np.array_equal(drawn.second, other.second)


def logits(margins: NDArray[np.float64]) -> NDArray[np.float32]:
    """Two classes, the first ahead by each margin: float32 [N, 2]."""
    return np.stack([margins, np.zeros_like(margins)], axis=1).astype(np.float32)


def test_it_is_what_a_count_expects_and_scatters_less() -> None:
    rng = np.random.default_rng(0)
    counted, found = [], []
    for _ in range(200):
        margins = rng.uniform(0, 10, 1024)
        changed = margins + 0.5 * rng.standard_normal(1024)
        counted.append((changed < 0).mean())
        found.append(smoothed(logits(margins), logits(changed)))
    expected = 0.5 / np.sqrt(2 * np.pi) / 10  # E[max(noise, 0)] times the density of margins
    assert np.mean(counted) == pytest.approx(expected, rel=0.05)
    assert np.mean(found) == pytest.approx(expected, rel=0.05)
    assert np.std(found) < 0.8 * np.std(counted)


def test_a_margin_is_held_against_changes_of_like_margins_only() -> None:
    rng = np.random.default_rng(1)
    margins = rng.uniform(0, 10, 1024)
    wide = np.where(margins > 4, 2.0, 0.0)
    assert smoothed(logits(margins), logits(margins + wide * rng.choice([-1, 1], 1024))) == 0


def test_ends() -> None:
    margins = np.linspace(0.1, 5, 50)
    same = logits(margins)
    assert smoothed(same, same) == 0
    assert smoothed(same, np.full_like(same, np.nan)) == 1
    assert smoothed(same, same[:, ::-1]) > 0.9
    assert smoothed(same[:1], same[:1]) == 0


def test_those_are_kept_that_fp32_hesitates_at() -> None:
    rng = np.random.default_rng(2)
    images = rng.random((20, 1, 2, 2), dtype=np.float32)

    def fp32(batches: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
        return np.concatenate([run(batch) for batch in batches])

    def run(batch: NDArray[np.float32], shift: float = 0.0) -> NDArray[np.float32]:
        return logits(batch[:, 0, 0, 0].astype(np.float64) - 0.5 + shift)

    drawn = Mixtures.draw(images, 5)
    doubt = Doubt.find(images, fp32, 5)
    everything, kept = fp32(drawn)[:, 0], doubt.reference[:, 0]
    assert len(doubt.mixtures) == KEPT
    assert np.abs(kept).max() <= np.sort(np.abs(everything))[KEPT]
    np.testing.assert_array_equal(fp32(doubt.mixtures)[:, 0], kept)
    assert doubt.disagreement(run) == 0
    crossed = (everything > 0) != (everything + 0.01 > 0)
    assert 0 < crossed.mean() < 0.1
    found = doubt.disagreement(lambda batch: run(batch, 0.01))
    assert found == pytest.approx(crossed.mean(), rel=0.35)
