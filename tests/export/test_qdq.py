"""Q/DQ sit where TensorRT wants them, say what they mean, and cost no more than half a step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from resq_deploy import quantization
from resq_deploy.errors import ModelError
from resq_deploy.export import fold, graph, halves, qdq, rules
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.dialect import TENSORRT, Dialect
from resq_deploy.export.grid import Grid
from resq_deploy.memory import fault_space
from resq_deploy.metrics import agreement, sqnr_db
from tests.export.nets import Fixed
from tests.helpers import SHAPE, ZOO, Attention, Branches, Gated, Residual, exported


def pixels(count: int = 16) -> Any:
    return np.random.default_rng(3).random((count, *SHAPE), dtype=np.float32)


def quantized(kind: type[nn.Module], **options: Any) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    fp32 = exported(kind)[1]
    where = options.get("dialect", TENSORRT).plan(fp32)
    ranges = calibrate(fp32, where.activations, [pixels()], "minmax")
    return fp32, qdq.quantize_graph(fp32, ranges, where=where, **options)


def reads_int8(kind: type[nn.Module]) -> set[tuple[str, int]]:
    return set(rules.plan(exported(kind)[1]).reads)


# Where


def test_a_residual_network() -> None:
    """Rules 1 to 4: inputs of weighted layers, the skip of a sum, both sides of pools; nothing else."""
    assert reads_int8(Residual) == {
        *((name, 0) for name in ("stem", "a", "b", "skip", "c", "fc", "pool", "average")),
        ("add", 1),  # b(...) is summed in the convolution's epilogue, skip(x) is read as INT8
        ("add_1", 1),
    }


def test_the_skip_is_the_shorter_branch_whichever_side_it_is_on() -> None:
    for sides in (("b", "skip"), ("skip", "b")):
        model = conv_graph(
            helper.make_node("Conv", ["x", "w1"], ["a"], name="a"),
            helper.make_node("Conv", ["a", "w2"], ["b"], name="b"),
            helper.make_node("Conv", ["x", "w3"], ["skip"], name="skip"),
            helper.make_node("Add", sides, ["y"], name="add"),
        )
        assert ("add", sides.index("skip")) in rules.plan(model).reads
        assert ("add", sides.index("b")) not in rules.plan(model).reads


def test_a_pool_shares_its_scale_with_what_it_pools() -> None:
    where = rules.plan(exported(Residual)[1])
    assert where.groups == (("relu.out", "pool.out"),)


def test_concatenated_inputs_share_a_scale_through_moves_and_pools() -> None:
    where = rules.plan(exported(Branches)[1])
    assert {("concat", 0), ("concat", 1), ("mix", 0)} <= where.reads
    (group,) = where.groups
    assert len(group) == 4  # two branches, the pool's input and its output
    scales = {
        name: grid.scale
        for name, grid in qdq.shared_grids(
            where, {n: Fixed(Grid(i + 1.0)) for i, n in enumerate(where.activations)}
        ).items()
    }
    assert len({scales[name] for name in group}) == 1
    assert scales[group[0]] == max(i + 1.0 for i, n in enumerate(where.activations) if n in group)


def test_a_concatenation_that_is_read_as_float_stays_float() -> None:
    where = rules.plan(exported(Branches)[1])
    assert not {("concat_1", 0), ("concat_1", 1)} & where.reads
    assert reason(Branches, "norm") == "no convolution before it to fold it into"


def test_attention_quantizes_its_linear_layers_only() -> None:
    weighted = ("patch", "qkv", "proj", "mlp.0", "mlp.2", "head")
    assert reads_int8(Attention) == {(name, 0) for name in weighted}
    assert rules.plan(exported(Attention)[1]).activations[0] == "preprocess.div.out"
    float_ops = {op.op for op in rules.plan(exported(Attention)[1]).float_ops}
    assert {"MatMul", "Softmax", "LayerNormalization", "Gelu", "Add"} <= float_ops


def test_thin_layers_inside_stay_float_and_the_ends_do_not() -> None:
    where = rules.plan(exported(Gated)[1])
    assert reason(Gated, "squeeze") == "thin: 32 -> 8 channels, below 16"
    assert reason(Gated, "excite") == "thin: 8 -> 32 channels, below 16"
    assert {w.node for w in where.weights} == {"stem.0", "depthwise", "project", "fc"}
    assert {op.op for op in where.float_ops} >= {"Sigmoid", "HardSwish", "Mul"}


def reason(kind: type[nn.Module], node: str) -> str:
    return next(op.reason for op in rules.plan(exported(kind)[1]).float_ops if op.node == node)


@pytest.mark.parametrize("kind", ZOO)
def test_every_node_is_int8_or_in_an_epilogue_or_moves_data_or_has_a_reason(
    kind: type[nn.Module],
) -> None:
    model = exported(kind)[1]
    where = rules.plan(model)
    told = {op.node for op in where.float_ops} | {name for name, _ in where.reads}
    silent = {n.op_type for n in model.graph.node if n.name not in told}
    moves = {"Reshape", "Flatten", "Transpose", "Concat", "Split", "Slice", "Gather", "Shape"}
    assert silent <= {"Relu", "Add", *moves}
    assert all(op.reason for op in where.float_ops)


@pytest.mark.parametrize(
    ("node", "shape", "axis"),
    [
        (helper.make_node("Conv", ["x", "w"], ["y"], group=2), (8, 3, 3, 3), 0),
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"]), (8, 3, 3, 3), 1),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transB=1), (8, 3), 0),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), (8, 3), 1),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (8, 3), 1),
        (helper.make_node("MatMul", ["x", "w"], ["y"]), (2, 8, 3), 2),
    ],
)
def test_output_channel_axis(node: onnx.NodeProto, shape: tuple[int, ...], axis: int) -> None:
    assert rules.output_axis(node, len(shape)) == axis


# What


@pytest.mark.parametrize("kind", ZOO)
def test_the_graph_is_legal_for_tensorrt_and_valid_and_close(kind: type[nn.Module]) -> None:
    fp32, int8 = quantized(kind)
    onnx.checker.check_model(int8, full_check=True)
    assert list(violations(int8)) == []
    exact, coded = graph.run(fp32, pixels()), graph.run(int8, pixels())
    assert sqnr_db(exact, coded) > 20
    assert agreement(exact, coded) >= 0.9


def violations(model: onnx.ModelProto) -> Iterator[str]:
    """What TensorRT's explicit quantization would refuse or not fuse."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    producers = fold.producers(model.graph)
    for node in model.graph.node:
        kinds = [producers[n].op_type for n in node.input if n in producers]
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale, zero = arrays[node.input[1]], arrays[node.input[2]]
            if not (scale > 0).all() or zero.any() or zero.dtype != np.int8:
                yield f"{node.name}: scale or zero point"
            if zero.shape != scale.shape:
                yield f"{node.name}: shapes"
        if node.op_type == "QuantizeLinear" and arrays[node.input[1]].ndim:
            yield f"{node.name}: an activation is quantized per channel"
        if node.op_type == "Relu" and "DequantizeLinear" in kinds:
            yield f"{node.name}: Q/DQ between a layer and its activation function"
        weighted = node.op_type in ("Conv", "Gemm")
        if weighted and len(node.input) > 2 and arrays[node.input[2]].dtype != np.float32:
            yield f"{node.name}: bias"
        if weighted and "DequantizeLinear" in kinds and len(kinds) != 2:
            yield f"{node.name}: half quantized"


def test_weights_are_int8_initializers_under_the_parameters_names() -> None:
    fp32, int8 = quantized(Residual)
    arrays = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in fp32.graph.initializer}
    for name in ("stem.weight", "a.weight", "skip.weight", "fc.weight"):
        assert arrays[name].dtype == np.int8
        assert arrays[f"{name}.scale"].shape == (len(arrays[name]),)
        back = quantization.dequantize(arrays[name], arrays[f"{name}.scale"])
        step = quantization.channelwise(arrays[f"{name}.scale"], back.ndim, 0)
        assert (np.abs(back - before[name]) <= step / 2 + 1e-9).all()
    assert arrays["stem.bias"].dtype == np.float32
    space = fault_space(int8)
    assert {m.name for m in space.memories if m.kind == "weights"} == {
        w.name for w in rules.plan(fp32).weights
    }
    layers = {m.layer for m in space.memories if m.kind == "weights"}
    assert layers == {"stem", "a", "b", "skip", "c", "fc"}


def test_a_tensor_is_quantized_once_however_many_read_it() -> None:
    names = [node.name for node in quantized(Residual)[1].graph.node]
    assert len(set(names)) == len(names)
    assert names.count("pool.out.quantize") == 1  # read by the layers a and skip


def test_the_original_graph_is_not_touched() -> None:
    before = exported(Residual)[1].SerializeToString(deterministic=True)
    quantized(Residual)
    assert exported(Residual)[1].SerializeToString(deterministic=True) == before


@given(
    hnp.arrays(np.float32, (4, 3), elements=st.floats(-8, 8, width=32)),
    st.sampled_from([0, 1]),
)
@settings(max_examples=60, deadline=None)
def test_any_weight_comes_back_within_half_a_step(values: Any, transposed: int) -> None:
    shape = values.shape if transposed else values.shape[::-1]
    weights = values.reshape(shape)
    node = helper.make_node("Gemm", ["x", "w"], ["y"], name="fc", transB=transposed)
    k, n = (shape[1], shape[0]) if transposed else shape
    made = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", n])],
        [numpy_helper.from_array(np.ascontiguousarray(weights), "w")],
    )
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    int8 = qdq.quantize_graph(model, {"x": Fixed(Grid(0.1))})
    arrays = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    axis = 0 if transposed else 1
    back = quantization.dequantize(arrays["w"], arrays["w.scale"], axis)
    step = quantization.channelwise(arrays["w.scale"], 2, axis)
    assert (np.abs(back - weights) <= step * 0.501).all()
    assert np.abs(arrays["w"].astype(int)).max() <= 127


def test_scales_and_codes_of_the_callers_choice() -> None:
    codes = np.full((3, 32), 5, np.int8)
    scales = np.array([1, 2, 3], np.float32)
    _, int8 = quantized(Residual, weight_scales={"fc.weight": scales}, codes={"fc.weight": codes})
    arrays = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    np.testing.assert_array_equal(arrays["fc.weight"], codes)
    np.testing.assert_array_equal(arrays["fc.weight.scale"], scales)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_scales": {"fc.weight": np.ones(4, np.float32)}}, "scales of fc.weight"),
        ({"weight_scales": {"fc.weight": np.zeros(3, np.float32)}}, "scales of fc.weight"),
        ({"codes": {"fc.weight": np.ones((32, 3), np.int8)}}, "codes of fc.weight"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        quantized(Residual, **options)


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf"), -1.0])
def test_a_scale_that_is_none_is_refused(scale: float) -> None:
    fp32 = exported(Residual)[1]
    ranges = dict.fromkeys(rules.plan(fp32).activations, Fixed(Grid(1.0)))
    with pytest.raises(ModelError, match="has no activation range"):
        qdq.quantize_graph(fp32, {})
    with pytest.raises(ModelError, match="has scale"):
        qdq.quantize_graph(fp32, {**ranges, "relu.out": Fixed(Grid(scale))})


# fp16


@pytest.mark.parametrize("kind", ZOO)
def test_float16_between_float32_ends(kind: type[nn.Module]) -> None:
    fp32, int8 = quantized(kind, dialect=Dialect(half=True))
    half = halves.to_fp16(int8)
    onnx.checker.check_model(half, full_check=True)
    kinds = {t.data_type for t in half.graph.initializer}
    assert TensorProto.FLOAT not in kinds
    ends = (*half.graph.input, *half.graph.output)
    assert {v.type.tensor_type.elem_type for v in ends} == {TensorProto.FLOAT}
    found = graph.run(half, pixels())
    assert sqnr_db(graph.run(int8, pixels()), found) > 20
    assert agreement(graph.run(fp32, pixels()), found) >= 0.9


@given(hnp.arrays(np.float32, 5, elements=st.floats(2.0**-40, 1e6, width=32)))
def test_half_scales_survive_float16(scales: Any) -> None:
    rounded = halves.as_half_scales(scales)
    assert (rounded > 0).all()
    np.testing.assert_array_equal(rounded.astype(np.float16).astype(np.float32), rounded)
    inside = (scales > 2.0**-14) & (scales < 65504)
    np.testing.assert_allclose(rounded[inside], scales[inside], rtol=2**-11)


def test_float16_needs_an_opset_that_has_it() -> None:
    model = onnx.ModelProto()
    model.CopyFrom(quantized(Residual)[1])
    model.opset_import[0].version = 18
    with pytest.raises(ModelError, match="--opset 19"):
        halves.to_fp16(model)


def conv_graph(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A graph of 1x1 convolutions of 16 channels with weights w1, w2, w3."""
    eye = np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1)
    shape: list[str | int | None] = ["n", 16, 4, 4]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(eye, name) for name in ("w1", "w2", "w3")],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
