"""The one INT8 quantizer of the project, in numpy: symmetric, per output channel for weights, zero point 0.

    q = clip(round_half_even(w / s), -127, 127),   w' = q * s,   s = max|w| / 127 per channel

-128 is never written by the quantizer (a bit flip can make it), so that negation stays exact and the range is the one
TensorRT's own quantizer uses.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

QMAX = 127
MIN_SCALE = np.float32(
    2.0**-60
)  # for a channel of zeros: positive, as TensorRT demands, and far from subnormal


def channelwise(values: NDArray[Scalar], ndim: int, axis: int) -> NDArray[Scalar]:
    """Reshape one value per channel so that it broadcasts along `axis` of an array of `ndim` dimensions."""
    shape = [1] * ndim
    shape[axis] = -1
    return values.reshape(shape)


def weight_scales(weights: NDArray[np.float32], axis: int = 0) -> NDArray[np.float32]:
    """Scale of each channel, max|w| / 127: float32 [channels], > 0."""
    others = tuple(i for i in range(weights.ndim) if i != axis % weights.ndim)
    peak = np.abs(weights).max(axis=others, initial=0.0)
    scales: NDArray[np.float32] = np.maximum(peak.astype(np.float32) / np.float32(QMAX), MIN_SCALE)
    return scales


def quantize(
    weights: NDArray[np.float32], scales: NDArray[np.float32], axis: int = 0
) -> NDArray[np.int8]:
    """Float weights to INT8 codes in [-127, 127], rounding half to even; same shape as `weights`."""
    codes = np.rint(weights / channelwise(scales, weights.ndim, axis))
    clipped: NDArray[np.int8] = np.clip(codes, -QMAX, QMAX).astype(np.int8)
    return clipped


def dequantize(
    codes: NDArray[np.int8], scales: NDArray[np.float32], axis: int = 0
) -> NDArray[np.float32]:
    """INT8 codes to float32 weights; same shape as `codes`."""
    return codes.astype(np.float32) * channelwise(scales, codes.ndim, axis)
