"""Differences image by image: published arithmetic, exact coverage of pairs, and coverage and power by simulation."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from resq_deploy.errors import CampaignError
from resq_deploy.paired import Spread, drawn, interval, rare
from resq_deploy.statistics import Tally
from tests.paired_networks import CASES, Case, Network, simulate

SHARES = st.lists(st.floats(-1, 1), min_size=1, max_size=40)
SPREADS = st.lists(st.builds(Spread, st.floats(0, 0.1), st.integers(1, 200)), max_size=2)


def pairs(gained: int, lost: int, images: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = np.zeros(images)
    found[:gained], found[gained : gained + lost] = 1, -1
    return found


@given(SHARES, SPREADS, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_the_mean_lies_in_its_interval(
    shares: list[float], faults: list[Spread], confidence: float
) -> None:
    each = np.array(shares)
    low, high = interval(each, faults, confidence)
    assert -1 <= low <= each.mean() + 1e-12
    assert each.mean() - 1e-12 <= high <= 1
    mirrored = interval(-each, faults, confidence)
    assert mirrored == pytest.approx((-high, -low))


@pytest.mark.parametrize(("gained", "lost"), [(0, 0), (7, 1), (300, 200), (0, 40)])
def test_pairs_have_bonett_and_prices_interval(gained: int, lost: int) -> None:
    """(b+1)/(n+2) less (c+1)/(n+2), with its normal interval: Student's of a thousand images."""
    images = 1000
    up, down = (gained + 1) / (images + 2), (lost + 1) / (images + 2)
    half = 1.959964 * math.sqrt((up + down - (up - down) ** 2) / (images + 2))
    found = interval(pairs(gained, lost, images))
    assert found == pytest.approx((up - down - half, up - down + half), abs=2e-4)


@pytest.mark.parametrize("images", [1, 10, 1000, 10_000])
def test_no_difference_seen_is_none_proved(images: int) -> None:
    low, high = interval(np.zeros(images))
    assert -low == high
    assert min(4.5 / (images + 2), 1.0) >= high > 2.5 / (images + 2)


@pytest.mark.parametrize("images", [30, 80])
def test_exact_coverage_of_pairs(images: int) -> None:
    """Over all that can come of images of which a share was gained and another lost."""
    ends = {
        (b, c): interval(pairs(b, c, images))
        for b in range(images + 1)
        for c in range(images + 1 - b)
    }
    held = []
    for gained, lost in (
        (0.0, 0.0),
        (0.01, 0.01),
        (0.1, 0.1),
        (0.2, 0.05),
        (0.4, 0.1),
        (0.02, 0.0),
    ):
        chances = stats.multinomial.pmf(
            [(b, c, images - b - c) for b, c in ends], images, [gained, lost, 1 - gained - lost]
        )
        inside = [low <= gained - lost <= high for low, high in ends.values()]
        held.append(float(chances @ np.array(inside)))
    assert min(held) > 0.94
    assert np.mean(held) < 0.99


def test_faults_widen_and_few_draws_widen_more() -> None:
    each = pairs(20, 10, 200)
    widths = [
        np.ptp(interval(each, faults))
        for faults in ((), (Spread(1e-4, 149),), (Spread(1e-4, 149), Spread(1e-3, 149)))
    ]
    assert widths == sorted(widths)
    assert np.ptp(interval(each, [Spread(1e-3, 7)])) > np.ptp(interval(each, [Spread(1e-3, 149)]))


@given(st.lists(st.integers(0, 16), min_size=1, max_size=60))
def test_a_campaigns_spread_counts_a_trial_of_either_kind_more(hits: list[int]) -> None:
    tally = Tally(16)
    for k in hits:
        tally.add(k)
    more = np.array([*hits, 0, 16]) / 16
    found = rare(tally)
    assert found.variance == pytest.approx(more.var(ddof=1) / more.size)
    assert found.freedom == len(hits) + 1


def test_few_draws_are_taken_as_they_are() -> None:
    found = drawn(np.array([0.5, 0.7, 0.6]))
    assert found is not None
    assert found.variance == pytest.approx(0.01 / 3)
    assert found.freedom == 2
    assert drawn(np.array([0.5])) is None


@pytest.mark.parametrize(("images", "confidence"), [(0, 0.95), (5, 0.0), (5, 1.0)])
def test_no_interval_of_nothing(images: int, confidence: float) -> None:
    with pytest.raises(CampaignError, match="no interval"):
        interval(np.zeros(images), (), confidence)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.what)
def test_the_truth_is_held_and_intervals_are_narrower(case: Case) -> None:
    """2,000 times of each are in docs/explanation/statistics.md."""
    found, unpaired = simulate(case, 150)
    assert found.held >= 0.91  # 0.95 less 2.3 standard errors
    assert found.half < 0.85 * unpaired.half
    assert found.power >= unpaired.power - 0.02
    if case.before == case.after:
        assert found.power <= 0.09


def test_a_difference_that_two_samples_do_not_show() -> None:
    shown = {case.what: [f.power for f in simulate(case, 60)] for case in (CASES[1], CASES[4])}
    for now, then in shown.values():
        assert now > 0.7
        assert then < 0.6


def test_harm_that_was_not_drawn_is_not_taken_for_impossible() -> None:
    """With the trials as they are the truth is missed often: in one of three campaigns none breaks the network."""
    case = replace(CASES[6], before=Network(collapse=0.01), after=Network(), trials=100)
    counted, _ = simulate(case, 100)
    as_they_are, _ = simulate(replace(case, known=True), 100)
    assert counted.held >= 0.95
    assert as_they_are.held < 0.87
