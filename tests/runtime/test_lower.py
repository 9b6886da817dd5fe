"""Lowering keeps the arithmetic, the weights and the interface of every graph."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.runtime import products
from resq_deploy.runtime.lower import lower
from resq_deploy.runtime.segments import open_session, session_options
from tests.runtime import graphs

Floats = NDArray[np.float32]


def run(model: onnx.ModelProto, images: NDArray[np.float32], plain: bool) -> Floats:
    import onnxruntime as ort

    options = session_options(1)
    if plain:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = open_session(model.SerializeToString(), options)
    return np.asarray(session.run(None, {"input": images})[0])


def ops(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", graphs.NETS)
@pytest.mark.parametrize("seed", [0, 1])
def test_agrees_with_the_unfused_file(name: str, seed: int) -> None:
    model = graphs.quantized(name, seed)
    images = graphs.images(model, 16, seed=5)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=False)
    # One code of one layer may differ at a rounding boundary; one code is about 1% of a range.
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()
    assert (got.argmax(1) == want.argmax(1)).mean() >= 0.9


@pytest.mark.parametrize("name", graphs.NETS)
def test_weights_keep_names_and_bytes(name: str) -> None:
    model = graphs.quantized(name)
    after = {t.name: numpy_helper.to_array(t) for t in lower(model).graph.initializer}
    weights = [t for t in model.graph.initializer if t.data_type == TensorProto.INT8]
    codes = [t for t in weights if np.prod(t.dims) > 1 and not t.name.endswith("zero_point")]
    assert codes
    for tensor in codes:
        assert after[tensor.name].tobytes() == numpy_helper.to_array(tensor).tobytes()


def test_every_resnet_layer_is_integer() -> None:
    found = ops(lower(graphs.quantized("resnet")))
    assert found["Conv"] == found["Gemm"] == found["MatMul"] == found["Relu"] == 0
    assert found["QLinearConv"] + found["MatMulIntegerToFloat"] == 7


def test_no_activation_is_signed() -> None:
    model = lower(graphs.quantized("resnet"))
    zeros = {t.name: t for t in model.graph.initializer}
    made = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    assert made
    assert all(zeros[n.input[2]].data_type == TensorProto.UINT8 for n in made)


def test_a_relu_costs_one_clamp_of_bytes() -> None:
    """127 is the largest code: U8 could hold more, so what saturates in the file must saturate here."""
    model = graphs.quantize(graphs.vgg(), graphs.images(graphs.vgg(), 16), shrink=0.3)
    images = graphs.images(model, 16)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=False)
    assert ops(lower(model))["Min"] >= 3
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()


def layer(
    kernel: int, stride: int, pad: int, channels: int, size: int, seed: int
) -> onnx.ModelProto:
    """One conv with a float result, all values small integers: its exact result is known."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(-128, 128, (8, channels, kernel, kernel)).astype(np.int8)
    bias = rng.integers(-50, 50, 8).astype(np.float32)
    arrays = {
        "s": np.float32(1), "z": np.int8(0), "w": weights, "b": bias,
        "ws": np.ones(8, np.float32), "wz": np.zeros(8, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["x"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wf"], axis=0),
        helper.make_node(
            "Conv", ["x", "wf", "b"], ["y"], kernel_shape=[kernel] * 2,
            strides=[stride] * 2, pads=[pad, pad, pad // 2, pad],
        ),
        helper.make_node("Flatten", ["y"], ["out"]),
    ]  # fmt: skip
    image: list[str | int | None] = ["n", channels, size, size]
    infos = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, image),
        helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", None]),
    ]
    inits = [numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()]
    graph = helper.make_graph(nodes, "layer", infos[:1], infos[1:], inits)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@settings(max_examples=25, deadline=None)
@given(
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    pad=st.integers(0, 2),
    channels=st.sampled_from([1, 3, 16, 128]),
    size=st.integers(5, 7),
    seed=st.integers(0, 100),
)
def test_im2col_is_exact(
    kernel: int, stride: int, pad: int, channels: int, size: int, seed: int
) -> None:
    model = layer(kernel, stride, pad, channels, size, seed)
    images = np.random.default_rng(seed).integers(-128, 128, (2, channels, size, size))
    lowered = lower(model)
    assert ops(lowered)["MatMulIntegerToFloat"] == 1
    want = run(model, images.astype(np.float32), plain=True)
    assert np.array_equal(run(lowered, images.astype(np.float32), plain=False), want)


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_channels_of_zeros_change_no_bit(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.quantized(name)
    images = graphs.images(model, 16, seed=5)
    wide = lower(model)
    monkeypatch.setattr(products, "_LANES", 0)
    narrow = lower(model)
    assert ops(wide)["Concat"] == ops(narrow)["Concat"] + 1
    assert np.array_equal(run(wide, images, plain=False), run(narrow, images, plain=False))


@pytest.mark.parametrize("known", [True, False])
def test_patches_are_exact_with_and_without_known_sizes(known: bool) -> None:
    model = layer(3, 2, 1, 16, 7, 0)
    images = np.random.default_rng(0).integers(-128, 128, (2, 16, 7, 7)).astype(np.float32)
    want = run(model, images, plain=True)
    if not known:
        dims = model.graph.input[0].type.tensor_type.shape.dim
        dims[2].ClearField("dim_value")
        dims[3].ClearField("dim_value")
    lowered = lower(model)
    assert ops(lowered)["Gather"] == int(known)
    assert np.array_equal(run(lowered, images, plain=False), want)


def edited(name: str, value: NDArray[np.generic]) -> onnx.ModelProto:
    model = graphs.quantized("resnet")
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(value, name))
    return model


@pytest.mark.parametrize("scale", [-0.01, 1e-42, 1e30])
def test_odd_scales_are_computed_as_the_file_says(scale: float) -> None:
    """Not those that make NaNs: what Q makes of a NaN is not defined."""
    model = edited("relu_1_scale", np.asarray(scale, np.float32))
    images = graphs.images(model, 4)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=False)
    np.testing.assert_allclose(got, want, atol=0.03 * np.nanmax(np.abs(want)))
    assert ops(lower(model))["Conv"] > 0


@pytest.mark.parametrize("scale", [1e5, 1e-15])
def test_a_mean_that_the_kernel_refuses_is_computed_as_the_file_says(scale: float) -> None:
    """QLinearGlobalAveragePool raises where s_x / (s_y H W) is below 2^-32 or from 256 up; one flip does that."""
    model = graphs.quantized("resnet")
    made = {name: node for node in model.graph.node for name in node.output}
    pool = next(n for n in model.graph.node if n.op_type == "GlobalAveragePool")
    name = made[pool.input[0]].input[1]
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(np.asarray(scale, np.float32), name))
    images = graphs.images(model, 4)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=False)
    np.testing.assert_allclose(got, want, atol=0.03 * np.abs(want).max())
    assert ops(lower(graphs.quantized("resnet")))["QLinearGlobalAveragePool"] == 1


@pytest.mark.parametrize("bias", [np.inf, -np.inf, 3e38])
def test_odd_biases_are_kept_in_float(bias: float) -> None:
    values = np.zeros(16, np.float32)
    values[3] = bias
    model = edited("b_1", values)
    images = graphs.images(model, 4)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=False)
    np.testing.assert_allclose(got, want, atol=0.03 * np.nanmax(np.abs(want)))


def test_a_float_graph_is_left_as_it_is() -> None:
    model = graphs.resnet()
    images = graphs.images(model, 4)
    assert ops(lower(model)) == ops(model)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=True)
    assert np.array_equal(want, got)


def one_scale(name: str) -> onnx.ModelProto:
    """A quantized network with one scale for each weight tensor, which names no axis."""
    model = graphs.quantized(name)
    arrays = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[0] not in arrays:
            continue
        scale = numpy_helper.to_array(arrays[node.input[1]])
        if scale.ndim:
            largest = np.asarray(scale.max(), np.float32)
            for part, value in ((1, largest), (2, np.asarray(0, np.int8))):
                tensor = arrays[node.input[part]]
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
            del node.attribute[:]
    onnx.checker.check_model(model, full_check=True)
    return model


def unsigned(name: str) -> onnx.ModelProto:
    """A quantized network whose activations are U8: the same steps, 128 further up; after a Relu of half the size."""
    model = graphs.quantized(name)
    arrays = {t.name: t for t in model.graph.initializer}
    relus = {node.output[0] for node in model.graph.node if node.op_type == "Relu"}
    pairs = [n for n in model.graph.node if n.op_type == "QuantizeLinear"]
    for node in pairs:
        low, shrink = (0, 2) if node.input[0] in relus else (128, 1)
        readers = [n for n in model.graph.node if n.input[0] == node.output[0]]
        scale = numpy_helper.to_array(arrays[node.input[1]]) / np.float32(shrink)
        for part, value in ((1, scale), (2, np.asarray(low, np.uint8))):
            fresh = f"{node.output[0]}.{part}"
            model.graph.initializer.append(numpy_helper.from_array(value, fresh))
            for reader in (node, *readers):
                reader.input[part] = fresh
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("name", graphs.NETS)
def test_unsigned_activations_of_other_tools(name: str) -> None:
    model = unsigned(name)
    images = graphs.images(model, 16, seed=5)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=False)
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()
    found, usual = ops(lower(model)), ops(lower(graphs.quantized(name)))
    for op in ("QLinearConv", "MatMulIntegerToFloat"):
        assert found[op] == usual[op] > 0 or usual[op] == 0
    assert found["Min"] <= usual["Min"]  # U8 saturates where the file does


@pytest.mark.parametrize(
    ("first", "second", "least", "largest"), [("u", "s", 0, 127), ("s", "u", 0, 127)]
)
def test_a_pool_between_signed_and_unsigned_codes(
    first: str, second: str, least: int, largest: int
) -> None:
    """The same scale and zero point, but what the one holds and the other does not saturates."""
    pairs = (("x", first, "q"), ("m", second, "r"))
    nodes = []
    for x, zero, name in pairs:
        nodes.append(helper.make_node("QuantizeLinear", [x, "scale", zero], [name]))
        nodes.append(helper.make_node("DequantizeLinear", [name, "scale", zero], [f"{name}d"]))
    nodes.insert(2, helper.make_node("MaxPool", ["qd"], ["m"], kernel_shape=[2, 2], strides=[2, 2]))
    nodes.append(helper.make_node("Flatten", ["rd"], ["y"]))
    values = {"scale": np.float32(1), "u": np.uint8(0), "s": np.int8(0)}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "pool",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 4, 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
            [numpy_helper.from_array(np.asarray(v), k) for k, v in values.items()],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )
    model.graph.input[0].name = nodes[0].input[0] = "input"
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    images = np.linspace(-240, 240, 2 * 16, dtype=np.float32).reshape(2, 1, 4, 4)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=False)
    assert (want.min(), want.max()) == (least, largest)
    assert np.array_equal(got, want)


@pytest.mark.parametrize("name", graphs.NETS)
def test_one_scale_for_a_whole_tensor(name: str) -> None:
    model = one_scale(name)
    images = graphs.images(model, 16, seed=5)
    want, got = run(model, images, plain=True), run(lower(model), images, plain=False)
    assert np.abs(got - want).max() <= 0.03 * np.abs(want).max()
    found, usual = ops(lower(model)), ops(lower(graphs.quantized(name)))
    for op in ("QLinearConv", "MatMulIntegerToFloat"):
        assert found[op] == usual[op]
