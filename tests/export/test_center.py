"""Centring and scaling: the same function, less noise where equalization cannot reach; layers that cannot take it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.export import center, graph, qdq, ranges, rules
from resq_deploy.export.calibrate import Probe, calibrate
from resq_deploy.export.equalize import Moments
from resq_deploy.export.stage import logits_of
from resq_deploy.export.twin import Twin
from resq_deploy.runtime.ort import OrtRunner
from tests.export import nets

IMAGES = nets.images(48)


def gated(*, kernel: int = 1, group: int = 1) -> onnx.ModelProto:
    """conv - x sigmoid(x), whose channels differ tenfold and more - conv `second` - relu - mean - fc."""
    b = nets.Builder(2)
    x = b.conv("stem", "input", (16, 1, 3, 3))
    y = b.op("Mul", "silu", x, b.op("Sigmoid", "sigmoid", x))
    y = b.conv("second", y, (16, 16 // group, kernel, kernel), group=group)
    y = b.op("GlobalAveragePool", "mean", b.op("Relu", "relu", y))
    b.gemm("fc", b.op("Flatten", "flatten", y), 16, nets.CLASSES)
    for tensor in b.tensors:
        if tensor.name == "stem.weight":
            values = numpy_helper.to_array(tensor) * np.geomspace(1, 60, 16)[:, None, None, None]
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), tensor.name))
    return b.model()


def transformed(*, norms_readers: int = 1) -> onnx.ModelProto:
    """conv - tokens - LayerNorm - `up` - x sigmoid(x) - `down` - mean - fc; matrix products with an Add behind them."""
    b = nets.Builder(3)

    def parameter(name: str, value: NDArray[np.float64]) -> str:
        b.tensors.append(numpy_helper.from_array(value.astype(np.float32), name))
        return name

    def linear(name: str, source: str, inputs: int, outputs: int) -> str:
        weight = parameter(f"{name}.weight", b.rng.standard_normal((inputs, outputs)) / inputs**0.5)
        product = b.op("MatMul", name, source, weight)
        return b.op("Add", f"{name}.add", product, parameter(f"{name}.bias", b.rng.random(outputs)))

    shape = helper.make_tensor("shape", onnx.TensorProto.INT64, [3], [0, 16, -1])
    b.tensors.append(shape)
    x = b.op("Reshape", "flat", b.conv("stem", "input", (16, 1, 3, 3)), "shape")
    x = b.op("Transpose", "tokens", x, perm=[0, 2, 1])
    scale = parameter("norm.weight", np.geomspace(0.1, 6, 16))
    x = b.op("LayerNormalization", "norm", x, scale, parameter("norm.bias", b.rng.random(16) * 4))
    y = linear("up", x, 16, 32)
    for extra in range(1, norms_readers):
        y = b.op("Add", f"more{extra}", y, b.op("ReduceMean", f"m{extra}", x, axes=[2]))
    y = b.op("Mul", "silu", y, b.op("Sigmoid", "sigmoid", y))
    y = b.op("ReduceMean", "mean", linear("down", y, 32, 16), axes=[1], keepdims=0)
    b.gemm("fc", y, 16, nets.CLASSES)
    return b.model()


def moments(model: onnx.ModelProto) -> dict[str, Moments]:
    axes = center.tensors(model)
    found = {name: Moments() for name in axes}
    for _, values in Probe(model, [*axes], 1).run(IMAGES):
        for name, axis in axes.items():
            found[name].add(np.moveaxis(values[name], axis, 1))
    return found


def centered(model: onnx.ModelProto, ber: float = 0.0) -> tuple[onnx.ModelProto, list[Any]]:
    return center.center(model, moments(model), ber)


def error(model: onnx.ModelProto, tensor: str) -> float:
    """Mean squared error of the logits where only this tensor is rounded, by its extremes."""
    grid = calibrate(model, [tensor], [IMAGES], "minmax", threads=1)[tensor].grid
    rounded = ranges.rounded_graph(model, {tensor: False}).SerializeToString()
    session = ort.InferenceSession(rounded, providers=["CPUExecutionProvider"])
    given = {"input": IMAGES, **ranges.grid_inputs({tensor: grid})}
    return float(
        np.square(session.run(["logits"], given)[0] - logits_of(model, [IMAGES], 1)).mean()
    )


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("group", [1, 16])
def test_the_function_stays(kernel: int, group: int) -> None:
    model = gated(kernel=kernel, group=group)
    before = model.SerializeToString(deterministic=True)
    made, record = centered(model)
    assert model.SerializeToString(deterministic=True) == before
    graph.check(made)
    assert [r["tensor"] for r in record] == ["silu.out"]
    old, new = (logits_of(m, [IMAGES], 1) for m in (model, made))
    np.testing.assert_allclose(new, old, atol=1e-4 * np.abs(old).max())


@pytest.mark.parametrize("readers", [1, 2])
def test_a_norm_carries_it_for_nothing_where_it_is_the_layers_own(
    readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(center, "LEAST", 0.1)
    model = transformed(norms_readers=readers)
    made, record = centered(model)
    graph.check(made)
    assert {r["tensor"] for r in record} >= {"norm.out", "silu.out"}
    old, new = (logits_of(m, [IMAGES], 1) for m in (model, made))
    np.testing.assert_allclose(new, old, atol=1e-4 * np.abs(old).max())
    nodes = {n.name for n in made.graph.node}
    assert {"silu.out.scaled", "silu.out.centered"} <= nodes
    assert ("norm.out.scaled" in nodes) is (readers > 1)
    changed = not np.array_equal(
        nets.arrays(made)["norm.weight"], nets.arrays(model)["norm.weight"]
    )
    assert changed is (readers == 1)
    tensor = "norm.out" if readers == 1 else "norm.out.centered"
    assert error(made, tensor) < 0.8 * error(model, "norm.out")


@pytest.mark.parametrize("readers", [1, 2])
def test_without_nodes_of_its_own_only_a_norm_carries_it(
    readers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(center, "LEAST", 0.1)
    model = transformed(norms_readers=readers)
    made, record = center.center(model, moments(model), 0.0, nodes=False)
    assert [r["tensor"] for r in record] == ["norm.out"] * (readers == 1)
    assert [n.name for n in made.graph.node] == [n.name for n in model.graph.node]
    old, new = (logits_of(m, [IMAGES], 1) for m in (model, made))
    np.testing.assert_allclose(new, old, atol=1e-4 * np.abs(old).max())


def test_a_norm_over_columns_does_not_carry_the_channels_of_a_convolution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As many columns as channels: the shapes alone would let it pass."""
    monkeypatch.setattr(center, "LEAST", -1.0)
    b = nets.Builder(4)
    x = b.conv("stem", "input", (nets.SIDE, 1, 3, 3))
    for name in ("norm.weight", "norm.bias"):
        values = np.geomspace(0.1, 3, nets.SIDE).astype(np.float32)
        b.tensors.append(numpy_helper.from_array(values, name))
    x = b.op("LayerNormalization", "norm", x, "norm.weight", "norm.bias", axis=-1)
    y = b.conv("second", x, (nets.CLASSES, nets.SIDE, 1, 1))
    b.op("Flatten", "flatten", b.op("GlobalAveragePool", "mean", y))
    b.nodes[-1].output[0] = "logits"
    model = b.model()
    assert center.tensors(model)["norm.out"] == 1
    made, _ = centered(model)
    old, new = (logits_of(m, [IMAGES], 1) for m in (model, made))
    np.testing.assert_allclose(new, old, atol=1e-4 * np.abs(old).max())


def test_a_product_without_a_bias_is_scaled_but_not_shifted() -> None:
    model = transformed()
    up = next(n for n in model.graph.node if n.name == "up.add")
    up.op_type = "Sub"  # x - b is no bias that this could add to
    _, record = centered(model)
    assert {r["tensor"]: r["shifted"] for r in record}["norm.out"] is False


def test_rounding_costs_less() -> None:
    model = gated()
    made, record = centered(model)
    assert record[0]["gain_db"] > 6
    assert error(made, "silu.out.centered") < 0.25 * error(model, "silu.out")


def test_a_layer_that_pads_gets_no_shift() -> None:
    for kernel, shifted in ((1, True), (3, False)):
        made, record = centered(gated(kernel=kernel))
        assert [r["shifted"] for r in record] == [shifted]
        assert ("silu.out.centered" in {n.name for n in made.graph.node}) is shifted


def test_the_listing_says_what_a_constant_factor_is() -> None:
    made, _ = centered(gated())
    why = {op.node: op.reason for op in rules.plan(made).float_ops}
    for name in ("silu.out.scaled", "silu.out.centered"):
        assert why[name].startswith("a constant factor or addend")
    assert why["silu"].startswith("a product of activations")


def test_what_equalization_reaches_is_left_to_it() -> None:
    for model in (nets.residual(), nets.chain()):
        assert "relu.out" not in center.tensors(model)
        assert not {"relu1.out", "relu2.out"} & set(center.tensors(model))


def test_weights_and_biases_that_others_read_too_stay_as_they_are() -> None:
    model = gated()
    copy = helper.make_node("Identity", ["second.bias"], ["other"], name="other")
    model.graph.node.append(copy)
    assert "silu.out" not in center.tensors(model)
    model = gated()
    second = next(n for n in model.graph.node if n.name == "second")
    second.input.pop()
    made, record = centered(model)
    graph.check(made)
    assert [r["shifted"] for r in record if r["tensor"] == "silu.out"] == [False]


def test_nothing_is_written_for_less_than_it_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(center, "LEAST", 1000.0)
    made, record = centered(gated())
    assert record == []
    assert [n.name for n in made.graph.node] == [n.name for n in gated().graph.node]


def test_the_twin_and_the_runner_agree_on_a_centered_graph() -> None:
    made, _ = centered(gated(), 1e-3)
    names = rules.plan(made).activations
    int8 = qdq.quantize_graph(made, calibrate(made, names, [IMAGES], threads=1))
    import torch

    with OrtRunner(int8, threads=1) as runner, torch.no_grad():
        twin: NDArray[np.float32] = Twin(int8)(torch.from_numpy(IMAGES)).numpy()
        np.testing.assert_allclose(twin, runner(IMAGES), atol=0.05 * np.abs(twin).max())
