"""Intervals and sample sizes for fault campaigns.

Two kinds of figure have intervals here.

* A share of independent yes/no trials: `wilson`, or `clopper_pearson` where the coverage must hold
  for every sample size.
* The mean of trials that each give a share (the images of a trial that were right): `Tally`. Images
  of one trial see the same fault and are not independent, so counting (trial, image) pairs would
  overstate what is known. `Tally.estimate` assumes only that trials are independent and lie in [0, 1]:
  it bets against every candidate mean, and keeps those against which the bets did not get rich
  (Waudby-Smith & Ramdas, Estimating means of bounded random variables by betting, JRSS-B 2024,
  sections 4 and B). By Ville's inequality the interval holds at all times at once: one may look after
  every trial and stop when it is narrow enough. The price is a wider interval than the normal one,
  and a normal interval that saw no catastrophe in 100 trials does not know how rare catastrophes are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from resq_deploy.errors import CampaignError

# Fractions of the largest stake that cannot go broke, and their weights: small stakes are best against
# noisy trials, large ones against trials that hardly vary. Halving steps, so that no best stake is far; more
# weight on large ones, because most trials of a campaign agree.
_STAKES = 0.5 ** np.arange(0.0, 14.0)
_STAKES[0] = 0.99
_RANKS = np.arange(_STAKES.size) + 1.0
_WEIGHTS = 1.0 / (_RANKS * (_RANKS + 1.0))
_LOG_WEIGHTS = np.log(_WEIGHTS / _WEIGHTS.sum())
_STEPS = 52  # of bisection, so that the ends of an interval are those of a double


@dataclass(frozen=True, slots=True)
class Estimate:
    """A share in [0, 1] with its interval: `low <= mean <= high` at this confidence; `n` independent trials.

    `method` names how the interval is made.
    """

    mean: float
    low: float
    high: float
    confidence: float
    method: str
    n: int

    @property
    def margin(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def sample_size(locations: int, margin: float, confidence: float = 0.95, share: float = 0.5) -> int:
    """Trials for a share of a finite fault space to be within `margin`, by the normal approximation.

    n = N / (1 + e^2 (N - 1) / (t^2 p (1 - p)))  (Leveugle et al., Statistical fault injection, DATE 2009, eq. 4)
    """
    _check(confidence)
    if locations < 1 or not 0 < margin < 1 or not 0 < share < 1:
        raise CampaignError(
            f"no sample size for N={locations}, margin {margin:g}, share {share:g}",
            "N >= 1, and both others between 0 and 1",
        )
    t = float(stats.norm.ppf(0.5 + confidence / 2))
    return math.ceil(locations / (1 + margin**2 * (locations - 1) / (t**2 * share * (1 - share))))


def wilson(successes: float, trials: int, confidence: float = 0.95) -> Estimate:
    """Wilson's score interval of a share of independent trials (1927); `successes` may be a mean of counts.

    Its coverage is the confidence on average over shares, and a little below it for some.
    """
    _check_counts(successes, trials, confidence)
    z = float(stats.norm.ppf(0.5 + confidence / 2))
    share = successes / trials
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    centre = share + z * z / (2 * trials)
    low = 0.0 if successes == 0 else max((centre - spread) / scale, 0.0)
    high = 1.0 if successes == trials else min((centre + spread) / scale, 1.0)
    return Estimate(share, low, high, confidence, "Wilson", trials)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> Estimate:
    """The exact interval of a share of independent trials: never covers less than the confidence (1934)."""
    _check_counts(successes, trials, confidence)
    tail, failures = (1 - confidence) / 2, trials - successes
    low = float(stats.beta.ppf(tail, successes, failures + 1)) if successes else 0.0
    high = float(stats.beta.isf(tail, successes + 1, failures)) if failures else 1.0
    return Estimate(successes / trials, low, high, confidence, "Clopper-Pearson", trials)


class Tally:
    """How often each share came up among the trials: counts[k] trials with k of `images` images.

    Its size does not grow with the trials, and its figures do not depend on their order.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.counts = np.zeros(images + 1, dtype=np.int64)

    def add(self, hits: int) -> None:
        """One more trial, in which `hits` of the images were counted."""
        self.counts[hits] += 1

    @property
    def trials(self) -> int:
        return int(self.counts.sum())

    @property
    def hits(self) -> int:
        """Counted images over all trials."""
        return int(self.counts @ np.arange(self.images + 1))

    @property
    def mean(self) -> float:
        return self.hits / max(self.trials * self.images, 1)

    def estimate(self, confidence: float = 0.95) -> Estimate:
        """Mean of the trials' shares, with an interval that holds at any time, whatever their distribution."""
        seen = np.flatnonzero(self.counts)
        return betting(seen / self.images, self.counts[seen], confidence)

    def quantiles(self, at: Sequence[float]) -> dict[str, float]:
        """Shares below which these parts of the trials lie (the inverse of the distribution), by name."""
        if not self.trials:
            return {}
        reached = np.cumsum(self.counts)
        ranks = [max(math.ceil(q * self.trials), 1) for q in at]
        places = np.searchsorted(reached, ranks)
        return {f"{q:g}": int(k) / self.images for q, k in zip(at, places, strict=True)}


def betting(
    values: NDArray[np.floating], counts: NDArray[np.int64], confidence: float = 0.95
) -> Estimate:
    """Anytime-valid interval for the mean of independent trials in [0, 1]: `counts[i]` of them gave `values[i]`.

    Stakes are a fixed mixture of constant ones, so that the order of the trials does not matter
    (Waudby-Smith & Ramdas 2024, section B.4, "grid Kelly").
    """
    _check(confidence)
    trials = int(counts.sum())
    if trials == 0:
        return Estimate(0.0, 0.0, 1.0, confidence, "betting", 0)
    x = np.asarray(values, dtype=np.float64)
    mean = math.fsum((x * counts).tolist()) / trials
    limit = math.log(2 / (1 - confidence))
    low = _solve(lambda m: log_capital(x, counts, m) < limit, 0.0, mean)
    high = 1.0 - _solve(lambda m: log_capital(1.0 - x, counts, m) < limit, 0.0, 1.0 - mean)
    return Estimate(mean, min(low, mean), max(high, mean), confidence, "betting", trials)


def log_capital(values: NDArray[np.float64], counts: NDArray[np.int64], mean: float) -> float:
    """Log of what 1 has become by betting that trials lie above `mean`: large where they do; 0 at the start.

    Each stake is a part c of 1/mean, so a trial x multiplies it by 1 + c (x/mean - 1); falls as `mean` rises.
    """
    if mean <= 0.0:
        return math.inf if float(values @ counts) > 0 else 0.0
    gains = np.log1p(np.outer(_STAKES, values / mean - 1.0)) @ counts
    return float(np.logaddexp.reduce(gains + _LOG_WEIGHTS))


def least_trials(margin: float, confidence: float = 0.95) -> int:
    """Trials below which `betting` cannot be within `margin`, however well they agree."""
    _check(confidence)
    few, many = 0, 1
    while _best_margin(many, confidence) > margin:
        few, many = many, many * 2
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if _best_margin(middle, confidence) > margin else (few, middle)
    return many


def _best_margin(trials: int, confidence: float) -> float:
    return betting(np.zeros(1), np.array([trials]), confidence).margin


@dataclass(frozen=True, slots=True)
class Stratum:
    """Trials of one part of the fault space: `weight` is its share of the space, `tally` what its trials gave."""

    weight: float
    tally: Tally


def stratified(strata: Sequence[Stratum], confidence: float = 0.95) -> Estimate:
    """Mean over the whole space of parts that were sampled apart, each weighted by its share of the space.

    Narrower than the plain mean where parts differ much. Post-stratification when trials were drawn
    over the whole space (Cochran, Sampling Techniques 1977, 5A.9). The interval is Student's with
    Satterthwaite's degrees of freedom, after adding half a trial of 0 and half of 1 to each part, so
    that a part whose few trials agree is not taken for certain: approximate, unlike `betting`. Parts
    without a trial count as unknown, anywhere in [0, 1].
    """
    _check(confidence)
    known = [s for s in strata if s.tally.trials]
    trials = sum(s.tally.trials for s in known)
    total = sum(s.weight for s in strata)
    if not known or total <= 0:
        return Estimate(0.0, 0.0, 1.0, confidence, "stratified", 0)
    unknown = sum(s.weight for s in strata if not s.tally.trials) / total
    weights = np.array([s.weight / total for s in known])
    means = np.array([s.tally.mean for s in known])
    n = np.array([s.tally.trials for s in known], dtype=np.float64)
    variances = np.array([_variance(s.tally) for s in known]) / n
    mean = float(weights @ means)
    spread = float(weights**2 @ variances)
    freedom = spread**2 / float(np.sum((weights**2 * variances) ** 2 / n))
    reach = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(spread)
    low, high = max(mean - reach, 0.0), min(mean + reach + unknown, 1.0)
    middle = mean / (1 - unknown) if unknown < 1 else mean
    return Estimate(min(max(middle, low), high), low, high, confidence, "stratified", trials)


def _variance(tally: Tally) -> float:
    """Of the shares of one part, with half a trial of 0 and half of 1 added."""
    shares = np.arange(tally.images + 1) / tally.images
    counts = tally.counts.astype(np.float64)
    counts[0] += 0.5
    counts[-1] += 0.5
    total = float(counts.sum())
    mean = float(shares @ counts) / total
    return float(((shares - mean) ** 2) @ counts) / float(total - 1)


def _solve(inside: Callable[[float], bool], low: float, high: float) -> float:
    """The largest value found in [low, high] that is outside, where `inside` is false below and true above."""
    if inside(low):
        return low
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if inside(middle) else (middle, high)
    return low


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise CampaignError(f"a confidence of {confidence:g}", "between 0 and 1, such as 0.95")


def _check_counts(successes: float, trials: int, confidence: float) -> None:
    _check(confidence)
    if not 0 <= successes <= trials or trials < 1:
        raise CampaignError(f"{successes} of {trials} trials is not a share")
