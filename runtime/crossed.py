"""Intervals of shares over pairs: every image under every one of a few draws of faults, or of corruptions.

The pairs are not independent, so that Wilson's interval of their number would be too narrow; a campaign's interval
(statistics.betting), which holds at any time and for any distribution, says nothing about eight trials. The number of
draws is fixed beforehand here, so the survey statisticians' way will do: the number of independent pairs that would
have the variance that was seen.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from resq_deploy.statistics import Estimate

METHOD = "Korn-Graubard"


def share(hits: NDArray[np.bool_], confidence: float = 0.95, *, sampled_rows: bool) -> Estimate:
    """The share of hits, bool [rows, images], with Korn and Graubard's interval (1998, Survey Methodology 24).

    Images are a sample. `sampled_rows`: so are the rows (draws of faults; their variance is added to that of the
    images, which counts what both have in common twice, to the safe side); else they are all there are
    (corruptions). One sampled row says nothing of others: its interval is [0, 1].
    """
    rows, images = hits.shape
    mean, count = float(hits.mean()), int(hits.size)
    parts = [_of_mean(hits.mean(axis=0))] + ([_of_mean(hits.mean(axis=1))] if sampled_rows else [])
    if images < 2 or (sampled_rows and rows < 2):
        return Estimate(mean, 0.0, 1.0, confidence, METHOD, count)
    pairs = _effective(mean, parts, hits.shape, confidence)
    low, high = _interval(mean, pairs, confidence)
    return Estimate(mean, min(low, mean), max(high, mean), confidence, METHOD, count)


def _of_mean(values: NDArray[np.floating[Any]]) -> tuple[float, int]:
    """Variance of the mean of these values, and its degrees of freedom."""
    if values.size < 2:
        return 0.0, 1
    return float(values.var(ddof=1)) / values.size, values.size - 1


def _effective(
    mean: float, parts: list[tuple[float, int]], shape: tuple[int, ...], confidence: float
) -> float:
    """So many independent pairs would vary as much; fewer, where the variance itself is known badly (Satterthwaite)."""
    total = sum(variance for variance, _ in parts)
    if total == 0 or mean in (0.0, 1.0):
        return float(shape[-1])  # all the same: no more than one look at each image
    freedom = total**2 / sum(variance**2 / degrees for variance, degrees in parts)
    tail = 0.5 + confidence / 2
    shrink = (stats.norm.ppf(tail) / stats.t.ppf(tail, freedom)) ** 2
    pairs = min(mean * (1 - mean) / total, float(np.prod(shape)))
    return max(pairs * float(shrink), 1.0)


def _interval(mean: float, pairs: float, confidence: float) -> tuple[float, float]:
    """Clopper and Pearson's, of a number of pairs that need not be whole."""
    tail, hits = (1 - confidence) / 2, mean * pairs
    low = float(stats.beta.ppf(tail, hits, pairs - hits + 1)) if mean > 0 else 0.0
    high = float(stats.beta.isf(tail, hits + 1, pairs - hits)) if mean < 1 else 1.0
    return low, high
