"""ONNX Runtime's rules: where Q/DQ go by them, and that an ordinary session then runs in integers what it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from resq_deploy.export import biases, graph, qdq, ranges, session_rules
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.dialect import ONNXRUNTIME, TENSORRT
from resq_deploy.export.grid import Grid
from resq_deploy.memory import fault_space
from resq_deploy.metrics import agreement, sqnr_db
from tests.export import nets
from tests.export.sessions import KINDS, Capped, Gates, arrays, pixels, quantized, session
from tests.helpers import (
    Attention,
    Branches,
    Gated,
    Residual,
    exported,
)

# Where


def test_a_residual_network() -> None:
    """What convolutions and sums make is INT8 for all that read it; of a sum both sides."""
    assert set(session_rules.plan(exported(Residual)[1]).reads) == {
        *(
            (name, 0)
            for name in ("stem", "a", "b", "skip", "c", "fc", "pool", "average", "reshape")
        ),
        *(("add", 0), ("add", 1), ("add_1", 0), ("add_1", 1)),
    }


def test_the_sum_of_a_convolution_and_a_float_tensor_stays_float() -> None:
    where = session_rules.plan(exported(Attention)[1])
    sums = {n.output[0] for n in exported(Attention)[1].graph.node if n.op_type == "Add"}
    assert not sums & set(where.activations)


def test_no_layer_is_too_thin() -> None:
    reasons = {op.reason for op in session_rules.plan(exported(Capped)[1]).float_ops}
    assert not any("thin" in reason for reason in reasons)
    thin = {op.node for op in TENSORRT.plan(exported(Capped)[1]).float_ops if "thin" in op.reason}
    weights = {w.node for w in session_rules.plan(exported(Capped)[1]).weights}
    assert thin
    assert thin <= weights


# What a session makes of it


@pytest.mark.parametrize("kind", KINDS)
def test_every_convolution_runs_in_integers(kind: type[nn.Module], tmp_path: Path) -> None:
    model = quantized(kind)
    graph.check(model)
    made, found = session(model, tmp_path / "o.onnx")
    convolutions = [n for n in model.graph.node if n.op_type == "Conv"]
    assert found["QLinearConv"] == len(convolutions)
    assert not found["Conv"] + found["FusedConv"]
    layers = sum(n.op_type in ("Gemm", "MatMul") for n in model.graph.node)
    products = sum(found[op] for op in ("MatMul", "FusedMatMul", "Gemm"))  # attention has two
    assert products == (2 if kind is Attention else 0) < layers
    x = pixels(64)
    (answer,) = made.run(None, {"input": x})
    assert sqnr_db(graph.run(model, x, optimize=False), answer) > 25
    assert agreement(graph.run(exported(kind)[1], x), answer) >= 0.9


@pytest.mark.parametrize("kind", [Residual, Capped])
def test_nothing_is_dequantized_in_between(kind: type[nn.Module], tmp_path: Path) -> None:
    """Relu and Clip are gone, sums and pools are of bytes: one Q at the beginning, one float output."""
    _, found = session(quantized(kind), tmp_path / "o.onnx")
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 0)
    assert not found["Relu"] + found["Clip"] + found["Add"]
    assert found["QLinearAdd"] == (2 if kind is Residual else 1)


def test_gates_run_in_integers(tmp_path: Path) -> None:
    _, found = session(quantized(Gates), tmp_path / "o.onnx")
    assert (found["QLinearSigmoid"], found["QLinearMul"], found["QLinearLeakyRelu"]) == (2, 3, 1)
    assert not found["Mul"] + found["Sigmoid"] + found["HardSwish"]
    assert found["HardSigmoid"] == 1  # has no byte kernel
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (2, 1)


def test_a_hard_swish_is_its_product() -> None:
    plain = exported(Gates)[1]
    made = ONNXRUNTIME.prepared(plain)
    graph.check(made)
    assert {n.op_type for n in plain.graph.node} - {n.op_type for n in made.graph.node} == {
        "HardSwish"
    }
    x = pixels()
    np.testing.assert_allclose(graph.run(made, x), graph.run(plain, x), rtol=1e-4, atol=1e-6)
    assert TENSORRT.prepared(plain) is plain


@pytest.mark.parametrize(
    ("kind", "least"),
    [(Residual, 1.5), (Gated, 2.0), (Attention, -0.5), (Branches, 2.0)],
)
def test_finer_steps_pay_for_more_rounding(kind: type[nn.Module], least: float) -> None:
    """In dB above TensorRT's rules; a transformer has one convolution, and hardly any difference."""
    x, fp32 = pixels(64), exported(kind)[1]
    exact = graph.run(fp32, x)
    signed, unsigned = (
        sqnr_db(exact, graph.run(quantized(kind, d), x)) for d in (TENSORRT, ONNXRUNTIME)
    )
    assert unsigned > signed + least


def made(fp32: onnx.ModelProto, images: NDArray[np.float32]) -> onnx.ModelProto:
    """An FP32 graph by these rules, with ranges chosen as exports choose them."""
    fp32 = ONNXRUNTIME.prepared(fp32)
    where = ONNXRUNTIME.plan(fp32)
    ranges = calibrate(fp32, where.activations, [images], unsigned=True, threads=1)
    model = qdq.finish(qdq.quantize_graph(fp32, ranges, dialect=ONNXRUNTIME), ONNXRUNTIME)
    graph.check(model)
    return model


def chain(*nodes: Any, channels: int = 16, seed: int = 4) -> onnx.ModelProto:
    """input [N, 1, 12, 12] -> Conv, then (op, inputs, outputs, attributes) with weights for c2 and c3, -> logits."""
    b = nets.Builder(seed)
    b.conv("c1", "input", (channels, 1, 3, 3))
    for op, name, inputs, more in nodes:
        if op == "Conv":
            b.conv(name, inputs[0], more["shape"])
        else:
            b.op(op, name, *inputs, **more)
    y = b.conv("last", f"{nodes[-1][1]}.out", (nets.CLASSES, channels, 1, 1))
    b.op("Flatten", "flatten", b.op("GlobalAveragePool", "mean", y))
    b.nodes[-1].output[0] = "logits"
    return b.model()


def test_what_stays_float_is_told() -> None:
    model = chain(
        ("HardSwish", "swish", ["c1.out"], {}),
        ("Conv", "c2", ["swish.out"], {"shape": (16, 16, 1, 1)}),
        ("Tanh", "tanh", ["c2.out"], {}),
    )
    told = session_rules.plan(ONNXRUNTIME.prepared(model)).float_ops
    assert {(op.op, op.reason) for op in told} == {
        ("HardSigmoid", session_rules._NO_KERNEL),
        ("Tanh", session_rules._NO_KERNEL),
    }
    assert not [op for op in session_rules.plan(exported(Residual)[1]).float_ops if op.op == "Add"]


def test_a_concat_takes_each_input_with_its_own_codes(tmp_path: Path) -> None:
    """A Relu beside a linear branch, shuffled behind it: the Relu vanishes, and all moves are of bytes."""
    b = nets.Builder(4)
    x = b.op("Relu", "relu", b.conv("c1", "input", (16, 1, 3, 3)))
    y = b.conv("c2", x, (16, 16, 1, 1))
    joined = b.op("Concat", "joined", x, y, axis=1)
    turned = b.op("Transpose", "turned", joined, perm=[0, 1, 3, 2])
    z = b.op("Relu", "relu2", b.conv("c3", turned, (nets.CLASSES, 32, 1, 1)))
    b.op("Flatten", "flatten", b.op("GlobalAveragePool", "mean", z))
    b.nodes[-1].output[0] = "logits"
    model = made(b.model(), nets.images(48))
    values = arrays(model)
    assert values["relu.out.zero_point"] == 0
    assert values["c2.out.zero_point"] > 0
    for end in ("scale", "zero_point"):
        assert values[f"joined.out.{end}"] == values[f"turned.out.{end}"]
    _, found = session(model, tmp_path / "o.onnx")
    assert (found["QLinearConv"], found["QLinearConcat"]) == (3, 1)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 1)  # the logits


@pytest.mark.parametrize("seed", range(4))
def test_moved_tensors_keep_their_codes_whatever_ranges_are_best(seed: int, tmp_path: Path) -> None:
    b = nets.Builder(seed)
    x = b.op("Relu", "relu", b.conv("c1", "input", (16, 1, 3, 3)))
    x = b.op("Flatten", "flat", b.op("MaxPool", "pool", x, kernel_shape=[6, 6], strides=[6, 6]))
    for name, shape in (("w", (64, nets.CLASSES)), ("b", (nets.CLASSES,))):
        value = b.rng.standard_normal(shape).astype(np.float32)
        b.tensors.append(numpy_helper.from_array(value, name))
    b.op("Add", "plus", b.op("MatMul", "product", x, "w"), "b")
    b.nodes[-1].output[0] = "logits"
    model = made(b.model(), nets.images(48))
    assert [n.op_type for n in model.graph.node if n.name == "product"] == ["Gemm"]
    plain, found = session(model, tmp_path / "o.onnx")
    assert (found["QLinearConv"], found["QGemm"]) == (1, 1)
    assert (found["QuantizeLinear"], found["DequantizeLinear"]) == (1, 0)
    images = nets.images(64, seed=9)
    exact, (answer,) = graph.run(b.model(), images), plain.run(None, {"input": images})
    assert sqnr_db(exact, answer) > 25


def test_pixels_that_nothing_normalizes_have_a_price_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the graph's input, which the twin must know by name."""
    monkeypatch.setattr(ranges, "GOOD_ENOUGH", -1.0)
    where = ONNXRUNTIME.plan(nets.residual()).activations
    assert "input" in where
    found = calibrate(nets.residual(), where, [nets.images(48)], unsigned=True, threads=1)
    assert set(found) == set(where)


# Codes and biases


@pytest.mark.parametrize("kind", KINDS)
def test_activations_are_unsigned_and_biases_integers_that_mean_the_same(
    kind: type[nn.Module],
) -> None:
    fp32, model = ONNXRUNTIME.prepared(exported(kind)[1]), quantized(kind)
    where, values, before = session_rules.plan(fp32), arrays(model), arrays(fp32)
    for name in where.activations:
        assert values[f"{name}.zero_point"].dtype == np.uint8
    for weight in where.weights:
        assert values[weight.name].dtype == np.int8
    integers = [
        name for name, v in values.items() if v.dtype == np.int32 and f"{name}.scale" in values
    ]
    layers = {
        n.input[2] for n in fp32.graph.node if n.op_type in ("Conv", "Gemm") and len(n.input) > 2
    }
    assert set(integers) == layers
    for name in integers:
        step = values[f"{name}.scale"].astype(np.float64)
        assert (np.abs(values[name] * step - before[name].reshape(-1)) <= 0.51 * step).all()
    kinds = {m.name: m.kind for m in fault_space(model).memories}
    assert all(kinds[name] == "bias" for name in integers)


def test_integers_say_what_snapped_biases_said() -> None:
    fp32 = nets.residual()
    ranges = calibrate(fp32, ONNXRUNTIME.plan(fp32).activations, [nets.images(32)], unsigned=True)
    floating = biases.snap_biases(qdq.quantize_graph(fp32, ranges, dialect=ONNXRUNTIME))
    x = nets.images(64, seed=4)
    both = [graph.run(m, x, optimize=False) for m in (floating, biases.as_integers(floating))]
    np.testing.assert_allclose(both[0], both[1], atol=1e-5)
    assert biases.as_integers(biases.as_integers(floating)) == biases.as_integers(floating)


def test_a_bias_that_another_layer_reads_stays_float() -> None:
    fp32 = nets.residual()
    layers = [n for n in fp32.graph.node if n.op_type == "Conv" and len(n.input) > 2]
    sizes = arrays(fp32)
    first, other = next(
        (a, b) for a in layers for b in layers
        if a is not b and sizes[a.input[2]].shape == sizes[b.input[2]].shape
    )  # fmt: skip
    other.input[2] = first.input[2]
    where = ONNXRUNTIME.plan(fp32)
    ranges = dict.fromkeys(where.activations, nets.Fixed(Grid(0.05, 128, unsigned=True)))
    model = qdq.finish(qdq.quantize_graph(fp32, ranges, dialect=ONNXRUNTIME), ONNXRUNTIME)
    assert arrays(model)[first.input[2]].dtype == np.float32
    graph.check(model)


def test_tensors_that_share_codes_share_a_zero_point() -> None:
    fp32 = exported(Branches)[1]
    values, where = arrays(quantized(Branches)), session_rules.plan(fp32)
    assert where.groups
    for group in where.groups:
        for end in ("scale", "zero_point"):
            assert len({float(values[f"{name}.{end}"]) for name in group}) == 1
