"""The difference of two networks on the same images, image by image.

Images that are hard for one network are hard for the other: what both get right, or both get wrong, says nothing of
their difference, and an interval that pairs them is narrower than one of two samples. With d_i the share of trials in
which image i is right after, less that before (0 or 1 each without faults), D the mean of d_i over N images, q_t the
share of images that are right in trial t of T1 before and T2 after,

    var D = S^2(d) / N + S^2(q1) / T1 + S^2(q2) / T2 - 2 S(q1, q2) / max(T1, T2)

It is the variance of a mean over two crossed samples, images and draws of faults (Cameron, Gelbach & Miller, Robust
inference with multiway clustering, JBES 2011), without the term to be taken off for what both count: a little too
large, to the safe side. Trials of one number go together: with one seed they hit the same weights, or about the same,
which may spoil both networks, or help one and spoil the other (inputs crafted without faults miss where faults are).

The interval is Student's, with Satterthwaite's degrees of freedom. What was not seen is not taken for impossible:

* one image more is counted for either network (Bonett & Price, Adjusted Wald confidence interval for a difference of
  binomial proportions based on paired data, JEBS 2012: one more in either discordant cell). So it has a width where
  no image differed, about 3 / N to either side.
* one trial more of either kind, all images right and all wrong, is counted in the S^2(q) of a campaign, as Agresti &
  Caffo do for a share (Simple and effective confidence intervals, The American Statistician 2000): a fault that is rare
  and spoils everything may not have been drawn yet.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from resq_deploy.errors import CampaignError
from resq_deploy.statistics import Tally

KEPT = 4096  # trials that are kept one by one: enough to know what those of two networks have in common
Shares: TypeAlias = NDArray[np.float64]
_T = TypeVar("_T")
Pair: TypeAlias = tuple[_T, _T]


@dataclass(frozen=True, slots=True)
class Spread:
    """Variance of a share, in [0, 1], by the draw of the faults, and its degrees of freedom; 0 of 0: no faults."""

    variance: float = 0.0
    freedom: int = 0


def rare(tally: Tally) -> Spread | None:
    """Of a campaign's mean share, a trial of 0 and one of 1 counted more; None for fewer than two trials."""
    trials = tally.trials
    if trials < 2:
        return None
    shares, mean = np.arange(tally.images + 1) / tally.images, tally.mean
    squares = float((shares - mean) ** 2 @ tally.counts) + mean**2 + (1 - mean) ** 2
    return Spread(squares / (trials * (trials - 1)), trials - 1)


def drawn(shares: Shares) -> Spread | None:
    """Of the mean of a few trials' shares, float64 [trials], as they are; None for fewer than two."""
    if shares.size < 2:
        return None
    return Spread(float(shares.var(ddof=1)) / shares.size, shares.size - 1)


def together(spreads: Pair[Spread], shares: Pair[Shares], trials: Pair[int]) -> Spread:
    """What faults add to the variance of the difference of two networks' means over `trials` each.

    `shares`: of the first trials of either, float64, in the order of their number; where there are none the worst is
    assumed, that what is good for the one is bad for the other.
    """
    one, two = spreads
    common = min(part.size for part in shares)
    if common < 2:
        covariance = -math.sqrt(one.variance * two.variance)
    else:
        first, second = (part[:common] - part[:common].mean() for part in shares)
        covariance = float(first @ second) / (common - 1) / max(trials)
    both = one.variance + two.variance - 2 * covariance
    return Spread(max(both, 0.0), max(min(one.freedom, two.freedom), 1))


def interval(
    differences: Shares, faults: Spread | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """Ends of the interval of the mean of d_i, float64 [images] in [-1, 1]; `faults`: what they add, None for none.

    Both ends are in [-1, 1], and the mean lies between them. Raises CampaignError for no image, and for a
    confidence that is not between 0 and 1.
    """
    if not differences.size or not 0 < confidence < 1:
        raise CampaignError(
            f"no interval of {differences.size} images at confidence {confidence:g}",
            "at least one image, and a confidence such as 0.95",
        )
    more = np.concatenate([differences, [1.0, -1.0]])
    over_images = Spread(float(more.var(ddof=1)) / more.size, more.size - 1)
    parts = [over_images, *([faults] if faults and faults.variance else [])]
    variance = sum(part.variance for part in parts)
    freedom = variance**2 / sum(part.variance**2 / part.freedom for part in parts)
    reach = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(variance)
    mean, centre = float(differences.mean()), float(more.mean())
    return max(min(centre - reach, mean), -1.0), min(max(centre + reach, mean), 1.0)
