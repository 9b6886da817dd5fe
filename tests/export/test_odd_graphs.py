"""Legal graphs that few exporters write: what is all zero, read twice, broadcast, or a factor of a Gemm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.export import center, fold, graph, halves, onnx_source, qdq, qdq_file
from resq_deploy.export.calibrate import Probe, calibrate
from resq_deploy.export.dialect import ONNXRUNTIME, Dialect
from resq_deploy.export.equalize import Moments, equalize, groups, tensors
from tests.export import nets
from tests.qdq import Network

IMAGES = nets.images(32)


class Odd(nets.Builder):
    """A convolution of 16 channels, their means, and whatever follows."""

    def __init__(self) -> None:
        super().__init__()
        self.op("Relu", "relu", self.conv("conv", "input", (16, 1, 3, 3)))
        self.op("GlobalAveragePool", "pool", "relu.out")
        self.op("Flatten", "flat", "pool.out")

    def held(self, name: str, *shape: int) -> str:
        value = self.rng.standard_normal(shape).astype(np.float32)
        self.tensors.append(numpy_helper.from_array(value, name))
        return name

    def named(self, op: str, inputs: list[str], output: str, **given: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [output], name=output, **given))
        return output


def read(model: onnx.ModelProto) -> onnx.ModelProto:
    """As an export begins."""
    found = onnx_source.read(Path("net.onnx"), model)
    made = onnx_source.to_fp32(found, name="net", opset=19)
    assert graph.apart(graph.run(model, IMAGES), graph.run(made, IMAGES)) <= graph.PARITY
    return made


def equalized(model: onnx.ModelProto) -> onnx.ModelProto:
    """After the first step of stage III: the same function."""
    found = dict.fromkeys(tensors(groups(model)), 1) | center.tensors(model)
    moments = {name: Moments() for name in found}
    for _, values in Probe(model, [*found], 1).run(IMAGES):
        for name, axis in found.items():
            moments[name].add(np.moveaxis(values[name], axis, 1))
    made, _ = equalize(model, moments, 1e-3)
    made, _ = center.center(made, moments, 1e-3, nodes=True)
    assert graph.apart(graph.run(model, IMAGES), graph.run(made, IMAGES)) <= graph.PARITY
    return made


def int8(model: onnx.ModelProto, dialect: Dialect = ONNXRUNTIME) -> onnx.ModelProto:
    """Quantized, in the form that is deployed: near the network."""
    ranges = calibrate(model, dialect.plan(model).activations, [IMAGES], threads=1)
    made = qdq.finish(qdq.quantize_graph(model, ranges, dialect=dialect), dialect)
    graph.check(made)
    assert graph.apart(graph.run(model, IMAGES), graph.run(made, IMAGES)) < 0.05
    return made


@pytest.mark.parametrize("between", ["Relu", "Sigmoid"])
@pytest.mark.parametrize("dead", [False, True])
def test_layers_that_are_zero_are_left_alone(between: str, dead: bool) -> None:
    net = nets.Builder()
    source = net.op("Relu", "first", net.conv("a", "input", (16, 1, 3, 3)))
    inner = net.op(between, "second", net.conv("b", source, (16, 16, 3, 3)))
    joined = net.op("Add", "add", net.conv("c", inner, (16, 16, 3, 3)), source)
    flat = net.op("Flatten", "flat", net.op("GlobalAveragePool", "pool", joined))
    net.gemm("fc", flat, 16, nets.CLASSES)
    model = net.model()
    held = fold.initializers(model.graph)
    change = ("b.bias", -100.0) if dead else ("c.weight", 0.0)
    value = np.full(tuple(held[change[0]].dims), change[1], np.float32)
    held[change[0]].CopyFrom(numpy_helper.from_array(value, change[0]))
    int8(equalized(read(model)))


@pytest.mark.parametrize("shape", [(1, 24), (1, 1), (1,), ()])
def test_biases_of_gemms_that_are_broadcast(shape: tuple[int, ...]) -> None:
    net = Odd()
    net.named("Gemm", ["flat.out", net.held("w", 24, 16), net.held("b", *shape)], "g", transB=1)
    net.gemm("fc", net.op("Relu", "last", "g"), 24, nets.CLASSES)
    made = read(net.model())
    gemm = next(n for n in made.graph.node if n.op_type == "Gemm")
    assert list(fold.initializers(made.graph)[gemm.input[2]].dims) == [24]
    int8(equalized(made))


@pytest.mark.parametrize("half", [False, True])
def test_factors_of_gemms(half: bool) -> None:
    """Weight and bias are read by a second Gemm, which has no factors."""
    net = Odd()
    w, b = net.held("w", 16, 16), net.held("b", 16)
    first = net.named("Gemm", ["flat.out", w, b], "g", transB=1, alpha=0.5, beta=2.0)
    second = net.named("Gemm", [net.op("Relu", "r", first), w, b], "h", transB=1)
    net.gemm("fc", net.op("Relu", "last", second), 16, nets.CLASSES)
    made = read(net.model())
    assert not any(a.name in ("alpha", "beta") for n in made.graph.node for a in n.attribute)
    dialect = Dialect(half=half)
    coded = int8(made, dialect)
    if half:
        coded = halves.to_fp16(coded)
        assert graph.apart(graph.run(made, IMAGES), graph.run(coded, IMAGES)) < 0.05


@pytest.mark.parametrize("half", [False, True])
def test_parameters_that_something_else_reads_too(half: bool) -> None:
    """A sum and a product read what a layer adds and multiplies with: theirs stays as it is."""
    net = Odd()
    w, b = net.held("w", 16, 16), net.held("b", 16)
    first = net.op("Relu", "r", net.named("Gemm", ["flat.out", w, b], "g", transB=1))
    tied = net.named("Einsum", [first, w], "e", equation="nk,ik->ni")
    added = net.named("Add", [net.named("Mul", [tied, b], "m"), b], "a")
    net.gemm("fc", net.op("Relu", "last", added), 16, nets.CLASSES)
    made = read(net.model())
    coded = int8(equalized(made), Dialect(half=half))
    if half:
        coded = halves.to_fp16(coded)
        assert graph.apart(graph.run(made, IMAGES), graph.run(coded, IMAGES)) < 0.05


def coded_pad(value: NDArray[np.uint8] | None, channels: int = 0) -> onnx.ModelProto:
    """Pixels quantized around 100, padded as codes, and 4 x 4 of them taken as logits."""
    scales = np.linspace(0.01, 0.02, channels or 1, dtype=np.float32)
    held = {
        "s": scales if channels else scales[0],
        "z": np.full(channels, 100, np.uint8) if channels else np.uint8(100),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }
    inputs = ["q", "pads"]
    if value is not None:
        held["v"] = value
        inputs.append("v")
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s", "z"], ["q"], name="q"),
        helper.make_node("Pad", inputs, ["p"], name="pad"),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["d"], name="d"),
        helper.make_node("Flatten", ["d"], ["logits"], name="flat"),
    ]
    shape: list[str | int | None] = ["n", channels or 1, 2, 2]
    made = helper.make_graph(
        nodes,
        "pad",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", None])],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("value", [None, 3, 100])
def test_codes_that_are_padded_with_codes(value: int | None) -> None:
    model = coded_pad(None if value is None else np.asarray(value, np.uint8))
    images = np.random.default_rng(0).random((3, 1, 2, 2), dtype=np.float32)
    wide = graph.run(qdq_file.without_rounding(model), images)
    np.testing.assert_allclose(wide, graph.run(model, images), atol=0.006)


def test_codes_between_channels_of_several_scales_are_refused() -> None:
    with pytest.raises(ModelError, match="Pad has codes of its own between channels"):
        qdq_file.without_rounding(coded_pad(None, channels=3))


def test_each_channel_is_clipped_where_its_codes_end() -> None:
    model = coded_pad(None, channels=3)
    pad, dq = model.graph.node[1], model.graph.node[2]
    dq.input[0] = "q"
    model.graph.node.remove(pad)
    images = np.random.default_rng(0).normal(0, 2, (5, 3, 2, 2)).astype(np.float32)
    wide, narrow = (graph.run(m, images) for m in (qdq_file.without_rounding(model), model))
    assert np.abs(narrow).max() < np.abs(images).max()  # some saturate
    np.testing.assert_allclose(wide, narrow, atol=0.011)


def test_every_scale_of_a_tensor_is_listed() -> None:
    model = qdq_file.canonical(Network(np.uint8).model())
    q = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
    scale = numpy_helper.to_array(fold.initializers(model.graph)[q.input[1]])
    model.graph.initializer.append(numpy_helper.from_array(2 * scale, "other"))
    again = helper.make_node("QuantizeLinear", [q.input[0], "other", *q.input[2:]], ["o"], name="o")
    model.graph.node.append(again)
    listed = qdq_file.listing(model)["activations"]
    first, second = (listed[name]["scale"] for name in (q.input[0], f"{q.input[0]}_1"))
    assert second == 2 * first
