"""ONNX Runtime's rules: where Q/DQ go by them, and that an ordinary session then runs in integers what it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from torch import nn

from resq_deploy.errors import BackendError, ModelError
from resq_deploy.export import biases, graph, qdq, session_rules
from resq_deploy.export.adjust import adjust
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.design import Design
from resq_deploy.export.dialect import ONNXRUNTIME, TENSORRT
from resq_deploy.export.grid import Grid
from resq_deploy.export.on_device import add_engines
from resq_deploy.export.pipeline import export_model
from resq_deploy.memory import fault_space
from resq_deploy.metrics import agreement, sqnr_db
from resq_deploy.runtime import stock
from resq_deploy.runtime.runner import open_runner
from tests.export import nets
from tests.export.sessions import KINDS, Capped, Gates, arrays, pixels, quantized, session
from tests.export.short import few_steps
from tests.helpers import (
    ZOO,
    Attention,
    Branches,
    Residual,
    checkpoint,
    dataset,
    exported,
)

FAST: dict[str, Any] = {"attacks": (), "calib": dataset(64, 0), "eval": dataset(40, 1)}


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
    sums = {n.name for n in exported(Attention)[1].graph.node if n.op_type == "Add"}
    assert not sums & {name for name, _ in where.reads}


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


@pytest.mark.parametrize("kind", ZOO)  # of the other one TensorRT's rules leave half in float
def test_it_is_nearer_to_fp32_than_signed_codes_or_hardly_farther(kind: type[nn.Module]) -> None:
    x, fp32 = pixels(64), exported(kind)[1]
    exact = graph.run(fp32, x)
    signed, unsigned = (
        sqnr_db(exact, graph.run(quantized(kind, d), x)) for d in (TENSORRT, ONNXRUNTIME)
    )
    assert unsigned > signed - 2.5


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


# Stage III, bundles, requests


def test_stage_three_learns_by_these_rules_too() -> None:
    fp32, images = nets.residual(), nets.images(96)
    where = ONNXRUNTIME.plan(fp32)
    ranges = calibrate(fp32, where.activations, [images], unsigned=True, threads=1)
    plain = qdq.quantize_graph(fp32, ranges, dialect=ONNXRUNTIME)
    with few_steps(trials=True):
        found = adjust(
            plain, fp32, images, ranges=ranges, design=Design(1e-2), dialect=ONNXRUNTIME, threads=1
        )
    assert [step["step"] for step in found.record.steps][:4] == [
        *("equalize", "split", "reconstruct", "distill"),
    ]
    made = qdq.finish(found.model, ONNXRUNTIME)
    graph.check(made)
    values = arrays(made)
    points = [
        v for name, v in values.items() if name.endswith(".zero_point") and v.dtype == np.uint8
    ]
    assert len(points) >= len(where.activations)
    if found.record.applied:
        measured = found.record.measured
        assert measured["adjusted"]["faulty_agreement"] > measured["plain"]["faulty_agreement"]


def test_a_bundle_is_validated_as_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint().save(tmp_path / "m.pt")
    made = export_model(tmp_path / "m.pt", **FAST, adjust=False, rules="onnxruntime")
    told = made.manifest.quantization
    assert (told.scheme, told.rules) == ("int8-qdq", "onnxruntime")
    assert {a.zero_point for a in told.activations.values()} - {0}
    assert made.manifest.metrics.agreement >= 0.9
    sample = made.eval_sample()
    plain, found = session(onnx.load(made.int8), tmp_path / "o.onnx")
    assert not found["Conv"] + found["FusedConv"]
    with open_runner(made) as runner:
        answers = runner(sample.images)
    assert agreement(plain.run(None, {"input": sample.images})[0], answers) >= 0.97
    monkeypatch.setattr(stock, "saturates", lambda: False)
    assert "can saturate in" in stock.elsewhere(made)[0]
    usual = export_model(tmp_path / "m.pt", tmp_path / "u.resq", **FAST, adjust=False)
    told = usual.manifest.quantization
    assert (told.scheme, told.rules) == ("int8-symmetric-qdq", "tensorrt")
    with pytest.raises(BackendError, match="unsigned codes"):
        add_engines(made.path, targets=("tensorrt-rtx",), sm=("86",))


@pytest.mark.parametrize(
    ("options", "message", "cure"),
    [
        ({"targets": ("onnx", "tensorrt-rtx")}, "no engine takes", "--target tensorrt-rtx"),
        ({"high_precision": "fp16"}, "float32 scales only", "--high-precision"),
        ({"rules": "openvino"}, "--rules openvino", "tensorrt, onnxruntime"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_read(
    options: dict[str, Any], message: str, cure: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        export_model(tmp_path / "missing.pt", **{"rules": "onnxruntime", **options})
    assert cure in caught.value.hint


def test_a_file_that_is_quantized_has_its_own_rules(tmp_path: Path) -> None:
    onnx.save(quantized(Residual), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="quantized already") as caught:
        export_model(tmp_path / "m.onnx", **FAST, rules="onnxruntime")
    assert "leave it out" in caught.value.hint
    made = export_model(tmp_path / "m.onnx", **FAST)
    told, values = made.manifest.quantization, arrays(quantized(Residual))
    assert told.rules is None
    for name in session_rules.plan(exported(Residual)[1]).activations:
        assert told.activations[name].zero_point == values[f"{name}.zero_point"]


def test_a_network_without_a_layer_to_fuse_is_left_alone() -> None:
    model = nets.chain()
    pool = helper.make_node("Identity", ["input"], ["again"], name="again")
    model.graph.node.insert(0, pool)
    assert session_rules.plan(model).weights == TENSORRT.plan(model).weights
