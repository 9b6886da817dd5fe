"""The twin's operators one by one against ONNX Runtime: rounding, saturation, every operator, shape arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.export.twin import Twin
from tests.export.twins import I64, artifact, logits_of, model_of, pair


def test_gradient_is_one_inside_the_range_and_zero_where_codes_saturate() -> None:
    twin = Twin(pair(scale=0.1, zero=0))
    x = torch.tensor([[-13.0, -12.84, -0.04, 3.02, 12.74, 13.0]], requires_grad=True)
    out = twin(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.tolist() == [[0, 1, 1, 1, 1, 0]]
    torch.testing.assert_close(out, torch.tensor([[-12.8, -12.8, 0.0, 3.0, 12.7, 12.7]]))


@pytest.mark.parametrize("zero", [0, 3, -5])
def test_ties_round_to_even_and_zero_points_shift(zero: int) -> None:
    model = pair(scale=0.5, zero=zero)
    x = np.arange(-80, 80, 0.25, dtype=np.float32)[None]
    assert np.array_equal(logits_of(Twin(model), x), artifact(model, x))


def grid(*shape: int) -> NDArray[np.float32]:
    """Numbers from -1 to 1.5, no two alike."""
    return np.linspace(-1, 1.5, int(np.prod(shape)), dtype=np.float32).reshape(shape)


OPERATORS: list[tuple[str, list[NDArray[Any]], dict[str, Any]]] = [
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("AveragePool", [], {"kernel_shape": [2, 2], "count_include_pad": 1, "pads": [1, 0, 0, 1]}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    ("GlobalAveragePool", [], {}),
    ("GlobalMaxPool", [], {}),
    ("ReduceMean", [np.array([2, 3], I64)], {"keepdims": 0}),
    ("ReduceSum", [np.array([1], I64)], {"keepdims": 1}),
    ("ReduceMax", [np.array([-1], I64)], {}),
    ("Clip", [np.float32(-0.2), np.float32(0.4)], {}),  # type: ignore[list-item]
    ("HardSigmoid", [], {"alpha": 0.3, "beta": 0.4}),
    ("HardSwish", [], {}),
    ("LeakyRelu", [], {"alpha": 0.2}),
    ("Gelu", [], {"approximate": "tanh"}),
    ("Softmax", [], {"axis": 1}),
    ("Erf", [], {}),
    ("LayerNormalization", [np.ones(6, np.float32), np.ones(6, np.float32)], {"epsilon": 1e-4}),
    ("LayerNormalization", [grid(1, 6), grid(1)], {}),
    ("LayerNormalization", [grid(4, 1, 1), grid(1, 1, 6, 1)], {"axis": 1}),
    ("MaxPool", [], {"kernel_shape": [3, 3], "pads": [2, 2, 2, 2], "strides": [2, 2]}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [2, 2, 2, 2]}),
    (
        "AveragePool",
        [],
        {"kernel_shape": [4, 3], "strides": [4, 3], "pads": [0, 0, 1, 1], "ceil_mode": 1},
    ),
    (
        "MaxPool",
        [],
        {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [0, 0, 1, 1], "ceil_mode": 1},
    ),
    ("Conv", [np.ones((4, 2, 3, 3), np.float32)], {"group": 2, "pads": [1, 0, 1, 2]}),
    ("Conv", [np.ones((4, 4, 3, 3), np.float32)], {"auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ("Conv", [np.ones((4, 4, 2, 2), np.float32)], {"dilations": [2, 2], "strides": [1, 2]}),
    (
        "Slice",
        [np.array([5], I64), np.array([-9], I64), np.array([3], I64), np.array([-2], I64)],
        {},
    ),
    ("Slice", [np.array([1, 0], I64), np.array([3, 9], I64), np.array([1, 2], I64)], {}),
    ("Gather", [np.array([[0, -1], [2, 1]], I64)], {"axis": 1}),
    ("Pad", [np.array([0, 0, 1, 2, 0, 0, 0, 3], I64), np.float32(0.5)], {}),  # type: ignore[list-item]
    ("Reshape", [np.array([0, -1, 3], I64)], {}),
    ("Transpose", [], {"perm": [0, 2, 3, 1]}),
    ("Flatten", [], {"axis": 2}),
    ("Unsqueeze", [np.array([1, -1], I64)], {}),
    ("Split", [np.array([1, 3], I64)], {"axis": 1}),
    ("Expand", [np.array([2, 1, 1, 1, 1], I64)], {}),
    ("Tile", [np.array([1, 2, 1, 1], I64)], {}),
    ("Pow", [np.float32(2)], {}),  # type: ignore[list-item]
    ("Mod", [np.float32(0.3)], {"fmod": 1}),  # type: ignore[list-item]
    ("Max", [np.float32(0.1), np.float32(0.2)], {}),  # type: ignore[list-item]
    ("Cast", [], {"to": TensorProto.INT32}),
    ("ScatterND", [np.array([[0, 1]], I64), np.ones((1, 6, 6), np.float32)], {}),
    *((op, [], {}) for op in ("Abs", "Atan", "Ceil", "Cos", "Exp", "Floor", "Mish", "Neg")),
    *((op, [], {}) for op in ("Relu", "Round", "Sigmoid", "Sign", "Sin", "Sinh", "Cosh", "Tanh")),
    *((op, [], {}) for op in ("Softplus", "Softsign", "Asinh", "Elu", "Celu", "Selu", "PRelu")),
    ("Elu", [], {"alpha": 0.7}),
    ("Celu", [], {"alpha": 0.7}),
    ("Selu", [], {"alpha": 1.5, "gamma": 0.9}),
    ("ThresholdedRelu", [], {"alpha": 0.4}),
    ("Shrink", [], {"lambd": 0.3, "bias": 0.1}),
    ("PRelu", [grid(4, 1, 1)], {}),
    ("PRelu", [grid(1)], {}),
    ("Sum", [grid(6), grid(6, 1)], {}),
    ("Mean", [grid(6), grid(6, 1)], {}),
    ("CastLike", [grid(1)], {}),
    ("LogSoftmax", [], {"axis": 1}),
    ("ReduceL1", [np.array([1], I64)], {"keepdims": 0}),
    ("ReduceL2", [np.array([1, -1], I64)], {}),
    ("ReduceL2", [], {}),
    ("ReduceLogSumExp", [np.array([1], I64)], {}),
    ("ReduceSumSquare", [np.array([2], I64)], {}),
    ("ReduceProd", [np.array([1, 3], I64)], {"keepdims": 0}),
    ("LpNormalization", [], {"axis": 1, "p": 2}),
    ("LpPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "p": 3}),
    ("LpPool", [], {"kernel_shape": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("LRN", [], {"size": 3, "alpha": 0.5, "beta": 0.7, "bias": 2.0}),
    ("InstanceNormalization", [grid(4), grid(4)], {"epsilon": 1e-3}),
    ("GroupNormalization", [grid(2), grid(2)], {"num_groups": 2}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "pads": [0, 1, 2, 0]}),
    ("AveragePool", [], {"kernel_shape": [3, 3], "auto_pad": "SAME_LOWER", "strides": [2, 2]}),
    ("ConvTranspose", [grid(4, 3, 3, 3), grid(3)], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    ("ConvTranspose", [grid(4, 2, 3, 2)], {"group": 2, "dilations": [2, 1], "pads": [0, 1, 2, 0]}),
    ("ConvTranspose", [grid(4, 1, 2, 2)], {"strides": [3, 2], "output_padding": [2, 1]}),
    ("ConvTranspose", [grid(4, 1, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_UPPER"}),
    ("ConvTranspose", [grid(4, 1, 3, 3)], {"strides": [2, 2], "auto_pad": "SAME_LOWER"}),
    ("ConvTranspose", [grid(4, 1, 3, 3)], {"strides": [2, 2], "output_shape": [12, 11]}),
    ("ConvTranspose", [grid(4, 1, 3, 3)], {"strides": [2, 2], "output_shape": [14, 13]}),
    ("Einsum", [grid(4, 3)], {"equation": "bchw,cd->bhwd"}),
    ("Einsum", [grid(6, 2)], {"equation": "... i, i j -> ... j"}),
    ("GatherND", [np.array([[1, -1], [0, 2]], I64)], {}),
    ("GatherND", [np.array([[[1], [-1]], [[0], [2]]], I64)], {"batch_dims": 1}),
    ("GatherElements", [np.array([[[[0, -1]]]], I64)], {"axis": 3}),
    ("ScatterElements", [np.array([[[[1, -1]]]], I64), grid(1, 1, 1, 2)], {"axis": 3}),
    ("Pad", [np.array([0, 0, 1, 2, 0, 0, 2, 3], I64)], {"mode": "reflect"}),
    ("Pad", [np.array([0, 0, 1, 2, 0, 0, -2, 3], I64)], {"mode": "edge"}),
    ("Pad", [np.array([0, 0, 1, 2, 0, 0, 0, 3], I64)], {"mode": "wrap"}),
    ("DepthToSpace", [], {"blocksize": 2, "mode": "DCR"}),
    ("DepthToSpace", [], {"blocksize": 2, "mode": "CRD"}),
    ("SpaceToDepth", [], {"blocksize": 2}),
    ("CumSum", [np.array(2, I64)], {}),
    ("CumSum", [np.array(-1, I64)], {"exclusive": 1, "reverse": 1}),
    ("ArgMax", [], {"axis": 1}),
    ("ArgMin", [], {"axis": 2, "keepdims": 0}),
    ("TopK", [np.array([3], I64)], {"axis": 2}),
    ("TopK", [np.array([2], I64)], {"largest": 0}),
    ("Trilu", [np.array(1, I64)], {}),
    ("Trilu", [], {"upper": 0}),
    ("Size", [], {}),
    *((op, [2 + grid(6, 6)], {}) for op in ("Add", "Div", "MatMul", "Min", "Mul", "Sub")),
    ("BatchNormalization", [grid(4), grid(4), grid(4), 2 + grid(4)], {"epsilon": 1e-3}),
    ("ReduceMin", [np.array([1], I64)], {}),
    ("Concat", [grid(2, 1, 6, 6)], {"axis": 1}),
    ("Identity", [], {}),
    ("Dropout", [], {}),
]
FLAT = {"ArgMax", "ArgMin", "Cast", "Ceil", "Floor", "Round", "Sign", "Size"}  # no slope anywhere


def operator(op: str, extra: list[NDArray[Any]], attributes: dict[str, Any]) -> onnx.ModelProto:
    """A graph of one node on x [2, 4, 6, 6] and constants."""
    constants = [numpy_helper.from_array(np.asarray(v), f"c{i}") for i, v in enumerate(extra)]
    if op == "PRelu" and not extra:
        constants = [numpy_helper.from_array(np.asarray(grid(4, 6, 6)), "c0")]
    outputs = ["y", "y2"] if op in ("Split", "TopK") else ["y"]
    node = helper.make_node(op, ["x", *(c.name for c in constants)], outputs, **attributes)
    model = model_of([node], constants, {"x": (2, 4, 6, 6)})
    model.graph.output[0].name = "y"
    return model


@pytest.mark.parametrize(("op", "extra", "attributes"), OPERATORS)
def test_operators_equal_onnx_runtime(
    op: str, extra: list[NDArray[Any]], attributes: dict[str, Any]
) -> None:
    model = operator(op, extra, attributes)
    x = np.random.default_rng(1).normal(size=(2, 4, 6, 6)).astype(np.float32)
    found, wanted = logits_of(Twin(model), x), artifact(model, x)
    assert found.shape == wanted.shape
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("op", "extra", "attributes"), [case for case in OPERATORS if case[0] not in FLAT]
)
def test_gradients_are_the_slopes_of_onnx_runtime(
    op: str, extra: list[NDArray[Any]], attributes: dict[str, Any]
) -> None:
    """Of a random weighted sum of the outputs, along a random direction: a central difference."""
    model, rng = operator(op, extra, attributes), np.random.default_rng(1)
    x, way = rng.normal(size=(2, 2, 4, 6, 6))
    small = 1e-4 * way
    above, below = (artifact(model, (x + h).astype(np.float32)) for h in (small, -small))
    weight = rng.normal(size=above.shape)
    slope = ((above.astype(np.float64) - below) * weight).sum() / 2e-4
    moving = torch.from_numpy(x.astype(np.float32)).requires_grad_()
    out = (Twin(model)(moving) * torch.from_numpy(weight)).sum()
    (gradient,) = torch.autograd.grad(out, moving)
    assert float((gradient * torch.from_numpy(way)).sum()) == pytest.approx(
        slope, rel=0.02, abs=0.2
    )


BOUNDED = ("Acos", "Asin", "Atanh", "Log", "Reciprocal", "ReduceLogSum", "Sqrt", "Tan")


@pytest.mark.parametrize("op", [*BOUNDED, "Acosh"])
def test_operators_of_numbers_from_0_to_1_or_above_1(op: str) -> None:
    nodes = [
        helper.make_node("Sigmoid", ["x"], ["inside"]),
        helper.make_node("Exp", ["inside"], ["above"]),
        helper.make_node(op, ["above" if op == "Acosh" else "inside"], ["y"]),
    ]
    model = model_of(nodes, [], {"x": (2, 9)})
    x = np.random.default_rng(1).normal(size=(2, 9)).astype(np.float32)
    np.testing.assert_allclose(logits_of(Twin(model), x), artifact(model, x), rtol=1e-5)


@pytest.mark.parametrize("op", ["And", "Or", "Xor"])
@pytest.mark.parametrize("compare", ["Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"])
def test_comparisons_and_logic_equal_onnx_runtime(compare: str, op: str) -> None:
    nodes = [
        helper.make_node(compare, ["x", "c"], ["first"]),
        helper.make_node("Greater", ["x", "zero"], ["second"]),
        helper.make_node("Not", ["second"], ["third"]),
        helper.make_node(op, ["first", "third"], ["fourth"]),
        helper.make_node("Where", ["fourth", "x", "c"], ["y"]),
    ]
    constants = [numpy_helper.from_array(v, n) for n, v in (("c", grid(6)), ("zero", 0 * grid(1)))]
    model = model_of(nodes, constants, {"x": (2, 6)})
    x = np.stack([grid(6), grid(6)[::-1]])
    assert np.array_equal(logits_of(Twin(model), x), artifact(model, x))


def test_sizes_make_tensors() -> None:
    value = numpy_helper.from_array(np.array([2.0], np.float32))
    nodes = [
        helper.make_node("Constant", [], ["start"], value_int=0),
        helper.make_node("Constant", [], ["step"], value_int=1),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Size", ["x"], ["size"]),
        helper.make_node("Range", ["start", "size", "step"], ["places"]),
        helper.make_node("Cast", ["places"], ["numbers"], to=TensorProto.FLOAT),
        helper.make_node("Reshape", ["numbers", "shape"], ["grid"]),
        helper.make_node("ConstantOfShape", ["shape"], ["twos"], value=value),
        helper.make_node("Mul", ["grid", "twos"], ["even"]),
        helper.make_node("Add", ["even", "x"], ["wide"]),
        helper.make_node("Squeeze", ["wide"], ["y"]),
    ]
    model = model_of(nodes, [], {"x": (2, 1, 6)})
    x = grid(2, 1, 6)
    assert np.array_equal(logits_of(Twin(model), x), artifact(model, x))


@pytest.mark.parametrize("attributes", [{}, {"transA": 1, "transB": 1, "alpha": 0.5, "beta": 2.0}])
def test_gemm_equals_onnx_runtime(attributes: dict[str, Any]) -> None:
    x = np.random.default_rng(2).normal(size=(5, 5)).astype(np.float32)
    constants = [
        numpy_helper.from_array(x[::-1].copy(), "b"),
        numpy_helper.from_array(x[0].copy(), "c"),
    ]
    node = helper.make_node("Gemm", ["x", "b", "c"], ["y"], **attributes)
    model = model_of([node], constants, {"x": (5, 5)})
    np.testing.assert_allclose(logits_of(Twin(model), x), artifact(model, x), atol=1e-5)


def test_shape_arithmetic_follows_the_batch() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"], end=1),
        helper.make_node("Div", ["shape", "two"], ["half"]),
        helper.make_node("Concat", ["half", "rest"], ["wanted"], axis=0),
        helper.make_node("Reshape", ["x", "wanted"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.array([2], I64), "two"),
        numpy_helper.from_array(np.array([-1], I64), "rest"),
    ]
    model = model_of(nodes, constants, {"x": ("N", 3)})
    for batch in (2, 6):
        x = np.arange(batch * 3, dtype=np.float32).reshape(batch, 3)
        assert np.array_equal(logits_of(Twin(model), x), artifact(model, x))


def test_an_unknown_operator_is_named() -> None:
    model = model_of([helper.make_node("Det", ["x"], ["y"], name="n")], [], {"x": (2, 2)})
    with pytest.raises(ModelError, match=r"does not support Det \(node 'n'\)"):
        Twin(model)
