"""Sample sizes and intervals: published figures, exact distributions, and coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from resq_deploy import statistics as s
from resq_deploy.errors import CampaignError

Floats = NDArray[np.float64]


@pytest.mark.parametrize(
    ("margin", "confidence", "want"),
    [
        (0.05, 0.95, 385),
        (0.05, 0.99, 664),
        (0.01, 0.95, 9_603),
        (0.01, 0.99, 16_585),  # published tables round t to 2.576 and print 16,587
        (0.001, 0.95, 950_158),  # ... and to 1.96: 950,192
    ],
)
def test_leveugles_sample_size(margin: float, confidence: float, want: int) -> None:
    assert s.sample_size(89_400_000, margin, confidence) == want


def test_a_small_space_needs_no_more_trials_than_it_has() -> None:
    assert s.sample_size(10, 0.001) == 10
    assert s.sample_size(1, 0.5) == 1


@pytest.mark.parametrize(
    ("interval", "hits", "trials", "low", "high"),
    [
        (s.wilson, 0, 10, 0.0, 0.2775),
        (s.wilson, 1, 10, 0.0179, 0.4042),
        (s.wilson, 10, 10, 0.7225, 1.0),
        (s.clopper_pearson, 0, 10, 0.0, 0.3085),
        (s.clopper_pearson, 1, 10, 0.0025, 0.4450),
        (s.clopper_pearson, 10, 10, 0.6915, 1.0),
    ],
)
def test_intervals_of_a_share_are_the_published_ones(
    interval: object, hits: int, trials: int, low: float, high: float
) -> None:
    found = interval(hits, trials)  # type: ignore[operator]
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("n", [5, 30, 200])
def test_exact_coverage_of_a_share(n: int) -> None:
    exact = [s.clopper_pearson(k, n) for k in range(n + 1)]
    score = [s.wilson(k, n) for k in range(n + 1)]
    shares = np.linspace(0.005, 0.995, 199)
    chances = stats.binom.pmf(np.arange(n + 1)[:, None], n, shares)
    cover_exact, cover_score = (
        (chances * [[e.low <= p <= e.high for p in shares] for e in each]).sum(axis=0)
        for each in (exact, score)
    )
    assert cover_exact.min() >= 0.95
    assert abs(cover_score.mean() - 0.95) < 0.015


SHARES = st.lists(st.integers(0, 16), min_size=1, max_size=60)


def _tally(hits: list[int], images: int = 16) -> s.Tally:
    tally = s.Tally(images)
    for k in hits:
        tally.add(k)
    return tally


@settings(deadline=None)
@given(SHARES, st.sampled_from([0.5, 0.9, 0.95, 0.999]))
def test_an_interval_is_what_the_bets_leave(hits: list[int], confidence: float) -> None:
    found = _tally(hits).estimate(confidence)
    x, ones = np.array(hits) / 16, np.ones(len(hits), np.int64)
    limit = math.log(2 / (1 - confidence))
    assert 0 <= found.low <= found.mean <= found.high <= 1
    assert found.mean == pytest.approx(np.mean(x))
    for mean in np.linspace(0.01, 0.99, 33):
        if abs(mean - found.low) > 1e-9 and abs(mean - found.high) > 1e-9:
            above = s.log_capital(x, ones, mean) >= limit
            below = s.log_capital(1 - x, ones, 1 - mean) >= limit
            assert (found.low <= mean <= found.high) == (not above and not below)


@settings(deadline=None)
@given(SHARES)
def test_an_interval_mirrors_and_widens_with_confidence(hits: list[int]) -> None:
    found, mirrored = _tally(hits).estimate(), _tally([16 - k for k in hits]).estimate()
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((found.low, found.high))
    wider = _tally(hits).estimate(0.99)
    assert wider.low <= found.low
    assert wider.high >= found.high


@settings(deadline=None)
@given(SHARES, st.randoms())
def test_order_is_nothing(hits: list[int], random: object) -> None:
    other = list(hits)
    random.shuffle(other)  # type: ignore[attr-defined]
    assert _tally(hits).estimate() == _tally(other).estimate()


DISTRIBUTIONS = {
    "a coin": lambda rng, shape: (rng.random(shape) < 0.5) * 1.0,
    "a rare event": lambda rng, shape: (rng.random(shape) < 0.01) * 1.0,
    "a rare collapse": lambda rng, shape: np.where(rng.random(shape) < 0.03, 0.1, 0.91),
    "steady": lambda rng, shape: np.clip(np.rint(rng.normal(0.9, 0.02, shape) * 64) / 64, 0, 1),
    "scattered": lambda rng, shape: np.rint(rng.beta(2, 1, shape) * 64) / 64,
}
MEANS = {"a coin": 0.5, "a rare event": 0.01, "a rare collapse": 0.03 * 0.1 + 0.97 * 0.91}
SEQUENCES, LENGTH = 1000, 1000


def _paths(name: str) -> tuple[Floats, float]:
    rng = np.random.default_rng(len(name))
    x = DISTRIBUTIONS[name](rng, (SEQUENCES, LENGTH)).astype(np.float64)  # type: ignore[no-untyped-call]
    if name in MEANS:
        return x, MEANS[name]
    return x, float(DISTRIBUTIONS[name](np.random.default_rng(0), 4_000_000).mean())  # type: ignore[no-untyped-call]


def _log_capitals(x: Floats, mean: float) -> Floats:
    """The capital after each trial of each sequence, [SEQUENCES, LENGTH]: the same bets, one after the other."""
    total = np.full(x.shape, -np.inf)
    for stake, weight in zip(s._STAKES, s._LOG_WEIGHTS, strict=True):
        gains = np.cumsum(np.log1p(stake * (x / mean - 1)), axis=1)
        total = np.logaddexp(total, gains + weight)
    return total


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_nominal_95_percent_covers_95_looked_at_after_every_trial(name: str) -> None:
    x, mean = _paths(name)
    limit = math.log(2 / 0.05)
    missed = (_log_capitals(x, mean) >= limit) | (_log_capitals(1 - x, 1 - mean) >= limit)
    assert missed.any(axis=1).mean() <= 0.05
    # the simulation is of what the library computes
    for row, stop in ((0, 10), (1, 137), (2, LENGTH)):
        found = s.betting(x[row, :stop], np.ones(stop, np.int64))
        assert (found.low <= mean <= found.high) != missed[row, stop - 1]


def test_normal_intervals_do_not_survive_looking() -> None:
    x, mean = _paths("a coin")
    n = np.arange(1, LENGTH + 1)
    means = np.cumsum(x, axis=1) / n
    reach = 1.96 * np.sqrt(np.maximum(means * (1 - means), 1e-9) / n)
    missed = (np.abs(means - mean) > reach)[:, 30:].any(axis=1).mean()
    assert missed > 0.2, "otherwise betting would be a needless expense"


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_it_narrows_nearly_as_the_normal_one_does(name: str) -> None:
    x, _ = _paths(name)
    pooled = x.reshape(-1)[:20_000]
    found = s.betting(pooled, np.ones(pooled.size, np.int64))
    assert found.margin < 2.2 * 1.96 * pooled.std() / math.sqrt(pooled.size)


def test_least_trials_is_where_the_best_case_arrives() -> None:
    for margin in (0.1, 0.01):
        least = s.least_trials(margin)
        assert _tally([0] * least).estimate().margin <= margin
        assert _tally([0] * (least - 1)).estimate().margin > margin


def test_no_trials_say_nothing() -> None:
    found = s.Tally(4).estimate()
    assert (found.low, found.high, found.n) == (0.0, 1.0, 0)
    assert s.Tally(4).quantiles([0.5]) == {}
    assert s.stratified([]).n == 0


def test_quantiles_are_those_of_the_trials() -> None:
    tally = _tally([0, 4, 4, 8, 16])
    assert tally.quantiles([0, 0.2, 0.21, 0.5, 0.8, 1]) == {
        "0": 0.0,
        "0.2": 0.0,
        "0.21": 0.25,
        "0.5": 0.25,
        "0.8": 0.5,
        "1": 1.0,
    }


def _layers(
    rng: np.random.Generator, trials: int, rates: Floats, weights: Floats
) -> list[s.Stratum]:
    tallies = [s.Tally(1) for _ in rates]
    for layer in rng.choice(rates.size, trials, p=weights):
        tallies[layer].add(int(rng.random() < rates[layer]))
    return [s.Stratum(w, t) for w, t in zip(weights, tallies, strict=True)]


@pytest.mark.parametrize("trials", [40, 400])
def test_stratified_estimates_cover(trials: int) -> None:
    rates, weights = np.array([0.0, 0.5, 0.02, 0.9]), np.array([0.55, 0.25, 0.15, 0.05])
    truth, rng = float(rates @ weights), np.random.default_rng(1)
    found = [s.stratified(_layers(rng, trials, rates, weights)) for _ in range(1000)]
    assert np.mean([e.low <= truth <= e.high for e in found]) >= 0.95
    assert np.mean([e.mean for e in found]) == pytest.approx(truth, abs=0.01)


def test_stratification_pays_where_parts_differ() -> None:
    rates, weights = np.array([0.0, 1.0]), np.array([0.5, 0.5])
    strata = _layers(np.random.default_rng(0), 400, rates, weights)
    hits = sum(x.tally.hits for x in strata)
    assert s.stratified(strata).margin < 0.5 * s.wilson(hits, 400).margin


def test_a_part_without_trials_is_unknown() -> None:
    strata = [s.Stratum(0.8, _tally([16] * 50)), s.Stratum(0.2, s.Tally(16))]
    found = s.stratified(strata)
    assert found.low < 0.8
    assert found.high == pytest.approx(1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: s.wilson(3, 2),
        lambda: s.wilson(0, 0),
        lambda: s.wilson(1, 2, 1.0),
        lambda: s.clopper_pearson(-1, 2),
        lambda: s.sample_size(0, 0.1),
        lambda: s.sample_size(5, 0.0),
        lambda: s.Tally(3).estimate(0.0),
        lambda: s.least_trials(0.1, 2.0),
    ],
)
def test_what_is_no_question(wrong: object) -> None:
    with pytest.raises(CampaignError):
        wrong()  # type: ignore[operator]
