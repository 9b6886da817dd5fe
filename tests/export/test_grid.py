"""Codes of activations: they reach both ends, 0 has one, and what they hold is what QuantizeLinear makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from resq_deploy.export.grid import Grid, covering, over

ENDS = st.floats(-1e3, 1e3, width=32)


@given(ENDS, ENDS, st.booleans())
def test_a_grid_reaches_both_ends_and_has_a_code_for_0(a: float, b: float, unsigned: bool) -> None:
    low, high = min(a, b), max(a, b)
    made = over(low, high, unsigned=unsigned)
    least, most = made.codes
    assert least <= made.zero_point <= most
    assert made.ends[0] <= min(low, 0) + 0.5001 * made.scale
    assert made.ends[1] >= max(high, 0) - 0.5001 * made.scale
    assert made.scale > 0
    if not unsigned:
        assert made.zero_point == 0


def test_what_a_relu_makes_has_all_codes_above_0() -> None:
    made = over(0.0, 5.1, unsigned=True)
    assert made.zero_point == 0
    assert made.scale == pytest.approx(0.02)
    assert over(0.25, 5.1, unsigned=True) == made
    assert over(0.0, 5.1, unsigned=False).scale == pytest.approx(5.1 / 127)


@given(st.lists(st.tuples(ENDS, ENDS), min_size=1, max_size=4), st.booleans())
def test_one_grid_covers_all_that_share_it(
    spans: list[tuple[float, float]], unsigned: bool
) -> None:
    grids = [over(min(s), max(s), unsigned=unsigned) for s in spans]
    shared = covering(grids)
    for grid in grids:
        assert shared.ends[0] <= grid.ends[0] + shared.scale
        assert shared.ends[1] >= grid.ends[1] - shared.scale
    assert shared.scale >= max(grid.scale for grid in grids) * 0.999


@pytest.mark.parametrize(
    "grid", [over(-0.3, 4.0, unsigned=True), over(-2, 1, unsigned=False), Grid(0.1)]
)
def test_rounding_is_that_of_onnx(grid: Grid) -> None:
    x = np.linspace(-6, 6, 4001, dtype=np.float32)
    constants: list[NDArray[Any]] = [
        np.asarray(grid.scale, np.float32),
        np.asarray(grid.zero_point, grid.dtype),
    ]
    made = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [None])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None])],
        [numpy_helper.from_array(v, n) for v, n in zip(constants, "sz", strict=True)],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)])
    evaluated: Any = ReferenceEvaluator(model).run(None, {"x": x})
    (expected,) = evaluated
    np.testing.assert_allclose(grid.rounded(torch.from_numpy(x)).numpy(), expected, atol=1e-6)


def test_half_a_grid_has_a_scale_that_float16_holds() -> None:
    made = Grid(0.1, 3, unsigned=True).half()
    assert made.scale == float(np.float16(made.scale)) != 0.1
    assert (made.zero_point, made.unsigned) == (3, True)
