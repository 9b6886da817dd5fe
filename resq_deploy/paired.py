"""The difference of two networks on the same images, image by image.

Images that are hard for one network are hard for the other: what both get right, or both get wrong, says nothing of
their difference, and an interval that pairs them is narrower than one of two samples. With d_i the share of trials in
which image i is right after, less that before (0 or 1 each without faults), D the mean of d_i over N images, and T1,
T2 trials whose faults were drawn for each network by itself,

    var D = S^2(d) / N + S^2(q1) / T1 + S^2(q2) / T2

where q is the share of the images that are right in a trial. It is the variance of a mean over two crossed samples,
images and draws (Cameron, Gelbach & Miller, Robust inference with multiway clustering, JBES 2011), without the term to
be taken off for what both count: a little too large, to the safe side. Where seeds and spaces are the same, faults lie
at the same places; trials are taken as independent still: what they have in common only makes D vary less.

The interval is Student's, with Satterthwaite's degrees of freedom. What was not seen is not taken for impossible:

* one image more is counted for either network (Bonett & Price, Adjusted Wald confidence interval for a difference of
  binomial proportions based on paired data, JEBS 2012: one more in either discordant cell). So it has a width where
  no image differed, about 4 / N.
* one trial more of either kind, all images right and all wrong, is counted in a campaign's S^2(q) (Agresti & Caffo,
  Simple and effective confidence intervals, The American Statistician 2000): a fault that is rare and spoils
  everything may not have been drawn yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from resq_deploy.errors import CampaignError
from resq_deploy.statistics import Tally


@dataclass(frozen=True, slots=True)
class Spread:
    """Variance of a share, in [0, 1], by the draw of the faults, and its degrees of freedom; 0 of 0: no faults."""

    variance: float = 0.0
    freedom: int = 0


def rare(tally: Tally) -> Spread:
    """Of a campaign's mean share, with a trial of 0 and one of 1 counted more: great harm may be rare."""
    shares = np.arange(tally.images + 1) / tally.images
    counts = tally.counts.astype(np.float64)
    counts[[0, -1]] += 1
    total = float(counts.sum())
    mean = float(shares @ counts) / total
    variance = float((shares - mean) ** 2 @ counts) / (total - 1)
    return Spread(variance / total, int(total) - 1)


def drawn(shares: NDArray[np.float64]) -> Spread | None:
    """Of the mean of a few trials' shares, float64 [trials]; None for a single one, which says nothing of others."""
    if shares.size < 2:
        return None
    return Spread(float(shares.var(ddof=1)) / shares.size, shares.size - 1)


def interval(
    differences: NDArray[np.float64], faults: Iterable[Spread] = (), confidence: float = 0.95
) -> tuple[float, float]:
    """Ends of the interval of the mean of d_i, float64 [images] in [-1, 1]; `faults`: the spread of either network.

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
    parts = [over_images, *(part for part in faults if part.variance)]
    variance = sum(part.variance for part in parts)
    freedom = variance**2 / sum(part.variance**2 / part.freedom for part in parts)
    reach = float(stats.t.ppf(0.5 + confidence / 2, freedom)) * math.sqrt(variance)
    mean, centre = float(differences.mean()), float(more.mean())
    return max(min(centre - reach, mean), -1.0), min(max(centre + reach, mean), 1.0)
