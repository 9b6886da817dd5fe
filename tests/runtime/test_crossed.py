"""Intervals over pairs of draws and images: how often they hold, and the corners."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resq_deploy.runtime.crossed import share
from resq_deploy.statistics import clopper_pearson


@pytest.mark.parametrize(
    ("rows", "images", "spread"), [(8, 128, 0.5), (8, 40, 2.0), (3, 60, 1.0), (20, 30, 0.0)]
)
def test_it_holds_as_often_as_it_says(rows: int, images: int, spread: float) -> None:
    """Draws and images differ in how hard they are; the truth is the mean over all of either."""
    rng = np.random.default_rng(0)
    hard = rng.normal(0.5, 1.5, 4000)[:, None] + rng.normal(0, spread, 500)
    truth = float((1 / (1 + np.exp(-hard))).mean())
    held = 0
    for _ in range(300):
        logits = rng.normal(0.5, 1.5, images)[None, :] + rng.normal(0, spread, rows)[:, None]
        hits = rng.random((rows, images)) < 1 / (1 + np.exp(-logits))
        found = share(hits, sampled_rows=True)
        held += found.low <= truth <= found.high
    assert held / 300 >= 0.92


def test_rows_that_are_all_there_are_cost_nothing() -> None:
    rng = np.random.default_rng(1)
    hits = rng.random((15, 100)) < np.linspace(0.2, 0.9, 15)[:, None]
    fixed, drawn = (share(hits, sampled_rows=sampled) for sampled in (False, True))
    assert fixed.margin < drawn.margin / 2
    assert fixed.mean == drawn.mean == hits.mean()


@pytest.mark.parametrize("value", [True, False])
def test_all_alike_is_as_one_look_at_each_image(value: bool) -> None:
    found = share(np.full((8, 50), value), sampled_rows=True)
    plain = clopper_pearson(50 * value, 50)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high))


def test_one_draw_says_nothing_of_others() -> None:
    found = share(np.ones((1, 20), dtype=bool), sampled_rows=True)
    assert (found.low, found.mean, found.high) == (0.0, 1.0, 1.0)


@given(st.integers(2, 6), st.integers(2, 30), st.integers(0, 2**32 - 1), st.booleans())
def test_the_mean_lies_in_its_interval(rows: int, images: int, seed: int, sampled: bool) -> None:
    rng = np.random.default_rng(seed)
    hits = rng.random((rows, images)) < rng.random()
    found = share(hits, sampled_rows=sampled)
    assert 0 <= found.low <= found.mean <= found.high <= 1
