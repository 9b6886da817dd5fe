"""Streaming histograms of activation magnitudes, and the range-choosing methods that read them.

Symmetric INT8 needs one number per tensor, the threshold T: scale = T / 127, values beyond T saturate; unsigned codes
need the extremes too, which T cuts. So a histogram of |x| is all that calibration has to remember. Its bin width is
always a power of two, and doubles (pairs of bins merge, exactly) when a larger value arrives: the counts do not depend
on the order of the samples or on how they were batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from resq_deploy.quantization import QMAX

BINS = 4096
Step = Callable[[float], float]
_LEVELS = QMAX + 1
_MIN_EXPONENT = -160  # of the bin width: 4,096 bins for the smallest float32


class Histogram:
    """Counts of |x| in BINS bins of equal width 2^k, with the exact extremes, zeros and energy beside them."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.zeros = 0
        self.total = 0
        self.low = math.inf
        self.high = -math.inf
        self.energy = 0.0
        self._exponent = _MIN_EXPONENT

    @property
    def width(self) -> float:
        """Width of a bin."""
        return math.ldexp(1.0, self._exponent)

    @property
    def peak(self) -> float:
        """max |x| seen so far; 0 before the first value."""
        return max(-self.low, self.high, 0.0) if self.total else 0.0

    @property
    def centers(self) -> NDArray[np.float64]:
        """Middle of each bin, float64 [BINS]."""
        return (np.arange(BINS, dtype=np.float64) + 0.5) * np.float64(self.width)

    def add(self, values: NDArray[np.float32]) -> None:
        """Count every element of `values` (any shape, finite)."""
        if values.size == 0:
            return
        flat = values.reshape(-1)
        self.low = min(self.low, float(flat.min()))
        self.high = max(self.high, float(flat.max()))
        self.total += flat.size
        self._widen(self.peak)
        magnitude = np.abs(flat)
        self.energy += float(np.square(magnitude, dtype=np.float64).sum())
        magnitude = magnitude[magnitude > 0]
        self.zeros += flat.size - magnitude.size
        # A power of two: the product is exact, so a value's bin does not depend on rounding.
        index = np.multiply(magnitude, 1.0 / self.width, dtype=np.float64).astype(np.int32)
        self.counts += np.bincount(index, minlength=BINS)

    def merged(self, other: Histogram) -> Histogram:
        """Both histograms' values in one; neither is changed."""
        both = Histogram()
        both._exponent = max(self._exponent, other._exponent)
        for part in (self, other):
            both.counts += _coarser(part.counts, both._exponent - part._exponent)
            both.zeros += part.zeros
            both.total += part.total
            both.energy += part.energy
        both.low, both.high = min(self.low, other.low), max(self.high, other.high)
        return both

    def _widen(self, peak: float) -> None:
        exponent = max(self._exponent, math.frexp(peak)[1] - int(math.log2(BINS)))
        if peak > 0 and exponent > self._exponent:
            self.counts = _coarser(self.counts, exponent - self._exponent)
            self._exponent = exponent


def _coarser(counts: NDArray[np.int64], doublings: int) -> NDArray[np.int64]:
    """The same counts in bins 2^doublings times as wide."""
    factor = 2 ** min(doublings, int(math.log2(BINS)))
    merged = np.zeros_like(counts)
    merged[: BINS // factor] = counts.reshape(-1, factor).sum(axis=1)
    return merged


def symmetric(threshold: float) -> float:
    """The step from code to code of symmetric INT8."""
    return threshold / QMAX


def noise(histogram: Histogram, threshold: float, step: Step = symmetric) -> float:
    """Mean squared error of quantizing the histogram's values with T = `threshold`, each value at its bin's centre.

    `step`: of a threshold.
    """
    if threshold <= 0 or histogram.total == 0:
        return 0.0
    scale = step(threshold)
    centers = histogram.centers
    codes = np.minimum(np.rint(centers / scale), np.rint(threshold / scale))
    error = np.square(centers - codes * scale)
    return float(error @ histogram.counts) / histogram.total


def minmax(histogram: Histogram) -> float:
    """T = max |x|: nothing saturates."""
    return histogram.peak


def percentile(histogram: Histogram, percent: float = 99.99) -> float:
    """T = the smallest bin edge that `percent` % of all values do not exceed."""
    below = histogram.zeros + np.cumsum(histogram.counts)
    edge = int(np.searchsorted(below, histogram.total * percent / 100.0))
    return min((min(edge, BINS - 1) + 1) * histogram.width, histogram.peak)


def mse(histogram: Histogram, candidates: int = 96, step: Step = symmetric) -> float:
    """T with the least mean squared error, of `candidates` from peak / 32 to peak in equal ratios."""
    if not histogram.peak:
        return 0.0
    thresholds = [histogram.peak * float(r) for r in np.geomspace(1.0, 1.0 / 32, candidates)]
    errors = [noise(histogram, t, step) for t in thresholds]
    return thresholds[int(np.argmin(errors))]


def entropy(histogram: Histogram, candidates: int = 96) -> float:
    """T whose quantized distribution is nearest to the original in KL divergence.

    Source: S. Migacz, 8-bit inference with TensorRT, GTC 2017. P is the histogram up to T with the
    saturated mass in its last bin; Q is the histogram up to T (without that mass) in 128 levels,
    for unsigned codes too, each spread evenly over its non-empty bins. Zeros take part in neither:
    every T keeps them.
    """
    if histogram.peak == 0:
        return 0.0
    last = min(math.ceil(histogram.peak / histogram.width), BINS)
    if last <= _LEVELS:
        return histogram.peak
    edges = np.unique(np.linspace(_LEVELS, last, candidates).astype(int))
    divergence = [_divergence(histogram.counts, int(edge)) for edge in edges]
    best = int(edges[::-1][int(np.argmin(divergence[::-1]))])
    return min(best * histogram.width, histogram.peak)


def _divergence(counts: NDArray[np.int64], edge: int) -> float:
    """KL(P || Q) of saturating at bin `edge`, in nats; infinite where Q lacks mass that P has."""
    inside = counts[:edge].astype(np.float64)
    reference = inside.copy()
    reference[-1] += counts[edge:].sum()
    starts = (np.arange(_LEVELS) * edge) // _LEVELS
    mass = np.add.reduceat(inside, starts)
    filled = np.add.reduceat((reference > 0).astype(np.float64), starts)
    level = np.repeat(mass / np.maximum(filled, 1), np.diff(np.append(starts, edge)))
    candidate = np.where(reference > 0, level, 0.0)
    p, q = reference / reference.sum(), candidate / max(candidate.sum(), 1e-300)
    used = p > 0
    if (q[used] <= 0).any():
        return math.inf
    return float(np.sum(p[used] * np.log(p[used] / q[used])))
