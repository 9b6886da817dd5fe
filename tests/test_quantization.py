from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from resq_deploy.quantization import QMAX, channelwise, dequantize, quantize, weight_scales

weights = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=2, max_dims=4, max_side=5),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


@given(weights, st.sampled_from([0, 1]))
def test_error_is_at_most_half_a_step(w: NDArray[np.float32], axis: int) -> None:
    scales = weight_scales(w, axis)
    codes = quantize(w, scales, axis)
    assert codes.dtype == np.int8
    assert codes.min() >= -QMAX
    error = np.abs(dequantize(codes, scales, axis).astype(np.float64) - w)
    assert (error <= channelwise(scales, w.ndim, axis) * 0.5001).all()


@given(weights)
def test_the_largest_weight_of_a_channel_is_a_full_code(w: NDArray[np.float32]) -> None:
    codes = quantize(w, weight_scales(w))
    for row, code in zip(w, codes, strict=True):
        if np.abs(row).max() > 1e-10:
            assert np.abs(code.astype(int)).max() == QMAX


def test_rounds_half_to_even() -> None:
    w = np.array([[0.5, 1.5, 2.5, -0.5, -1.5, 127.0]], dtype=np.float32)
    assert quantize(w, np.ones(1, np.float32)).tolist() == [[0, 2, 2, 0, -2, 127]]


def test_a_channel_of_zeros_has_a_positive_scale() -> None:
    scales = weight_scales(np.zeros((3, 4), np.float32))
    assert (scales > 0).all()
    assert not quantize(np.zeros((3, 4), np.float32), scales).any()
