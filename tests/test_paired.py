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
from resq_deploy.paired import Spread, drawn, interval, rare, together
from resq_deploy.statistics import Tally, least_trials
from tests.paired_networks import CASES, Case, Network, simulate

MANY = next(case for case in CASES if case.images == 2000)
SHARES = st.lists(st.floats(-1, 1), min_size=1, max_size=40)
SPREADS = st.none() | st.builds(Spread, st.floats(0, 0.1), st.integers(1, 200))


def pairs(gained: int, lost: int, images: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    found = np.zeros(images)
    found[:gained], found[gained : gained + lost] = 1, -1
    return found


@given(SHARES, SPREADS, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_the_mean_lies_in_its_interval(
    shares: list[float], faults: Spread | None, confidence: float
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
        for faults in (None, Spread(0.0, 0), Spread(1e-4, 149), Spread(1e-3, 149))
    ]
    assert widths == sorted(widths)
    assert np.ptp(interval(each, Spread(1e-3, 7))) > np.ptp(interval(each, Spread(1e-3, 149)))


HITS = st.lists(st.integers(0, 16), min_size=2, max_size=60)


def tally(hits: list[int]) -> Tally:
    found = Tally(16)
    for k in hits:
        found.add(k)
    return found


@given(HITS)
def test_a_campaigns_spread_counts_a_trial_of_either_kind_more(hits: list[int]) -> None:
    shares = np.array(hits) / 16
    more = np.array([*shares, 0, 1])
    found = rare(tally(hits))
    assert found is not None
    squares = float(((more - shares.mean()) ** 2).sum())
    assert found.variance == pytest.approx(squares / (len(hits) * (len(hits) - 1)))
    assert found.variance >= 0.5 / len(hits) ** 2
    assert rare(tally(hits[:1])) is None


@given(HITS, HITS)
def test_trials_of_one_number_are_taken_together(one: list[int], two: list[int]) -> None:
    """As many trials of either: the variance is that of the mean of their differences, and what is counted more."""
    count = min(len(one), len(two))
    hits = one[:count], two[:count]
    first, second = (np.array(h) / 16 for h in hits)
    parts = drawn(first), drawn(second)
    assert parts[0] is not None
    assert parts[1] is not None
    found = together((parts[0], parts[1]), (first, second), (count, count))
    assert found.variance == pytest.approx((second - first).var(ddof=1) / count)
    assert found.freedom == count - 1
    rares = rare(tally(hits[0])), rare(tally(hits[1]))
    assert rares[0] is not None
    assert rares[1] is not None
    assert together((rares[0], rares[1]), (first, second), (count, count)).variance > found.variance


def test_trials_that_have_no_number_may_be_against_each_other() -> None:
    none, some = np.zeros(0), np.linspace(0, 1, 9)
    spreads = Spread(0.04, 9), Spread(0.01, 20)
    for shares in ((none, some), (some, none), (some[:1], some)):
        found = together(spreads, shares, (10, 21))
        assert found.variance == pytest.approx(0.09)
        assert found.freedom == 9


def test_no_faults_add_nothing() -> None:
    none = np.zeros(0)
    assert together((Spread(), Spread()), (none, none), (1, 1)).variance == 0


def test_few_draws_are_taken_as_they_are() -> None:
    found = drawn(np.array([0.5, 0.7, 0.6]))
    assert found is not None
    assert found.variance == pytest.approx(0.01 / 3)
    assert found.freedom == 2
    assert drawn(np.array([0.5])) is None


@pytest.mark.parametrize(("images", "confidence"), [(0, 0.95), (5, 0.0), (5, 1.0)])
def test_no_interval_of_nothing(images: int, confidence: float) -> None:
    with pytest.raises(CampaignError, match="no interval"):
        interval(np.zeros(images), None, confidence)


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
    shown = {
        case.what: [f.power for f in simulate(case, 60)] for case in (CASES[1], CASES[4], CASES[6])
    }
    for now, then in shown.values():
        assert now > 0.7
        assert then < 0.6


def test_harm_that_was_not_drawn_is_not_taken_for_impossible() -> None:
    """With the trials as they are the truth is missed often: in one of three campaigns none breaks the network."""
    case = replace(MANY, before=Network(collapse=0.01), after=Network(), trials=100)
    counted, _ = simulate(case, 100)
    as_they_are, _ = simulate(replace(case, known=True), 100)
    assert counted.held >= 0.95
    assert as_they_are.held < 0.87


def test_faults_that_help_one_and_harm_the_other_are_no_independent_draws(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def apart(spreads: tuple[Spread, Spread], _shares: object, _trials: object) -> Spread:
        return Spread(sum(s.variance for s in spreads), min(s.freedom for s in spreads))

    (case,) = (replace(c, images=2000, own=0.2) for c in CASES if "help one" in c.what)
    assert simulate(case, 120)[0].held >= 0.93
    monkeypatch.setattr("resq_deploy.runtime.differences.together", apart)
    assert simulate(case, 120)[0].held < 0.93


def stopped(rng: np.random.Generator, rate: float, images: int = 256) -> tuple[Tally, list[float]]:
    """A campaign that ends once its interval is within 0.01; a share `rate` of its faults break the network."""
    found, shares, look = Tally(images), list[float](), least_trials(0.01)
    while not shares or found.estimate().margin > 0.01:
        while len(shares) < look:
            hits = 26 if rng.random() < rate else int(rng.integers(231, 236))
            found.add(hits)
            shares.append(hits / images)
        look = math.ceil(look * 1.01)
    return found, shares


@pytest.mark.parametrize("rate", [0.002, 0.02])
def test_campaigns_that_stop_themselves_hold_the_truth(rate: float) -> None:
    """By the faults alone, as if there were no end of images."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(40):
        (one, before), (two, after) = stopped(rng, 0.0), stopped(rng, rate)
        parts = rare(one), rare(two)
        assert parts[0] is not None
        assert parts[1] is not None
        shares = np.array(before), np.array(after)
        faults = together((parts[0], parts[1]), shares, (len(before), len(after)))
        low, high = interval(np.full(10**6, two.mean - one.mean), faults)
        held += low <= -rate * (233 - 26) / 256 <= high
    assert held >= 36
