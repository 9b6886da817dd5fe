"""Biases on the accumulator's grid: how far they move, what stays, and who agrees then."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy.export import graph, qdq, rules
from resq_deploy.export.biases import snap_biases
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.reconstruct import reconstruct
from resq_deploy.export.twin import Twin
from resq_deploy.runtime.ort import OrtRunner
from tests.export import nets
from tests.runtime.graphs import NETS, images, quantize


def arrays(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}


def units(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Bias name -> s_x * s_w, of layers whose inputs are both dequantized."""
    values = arrays(model)
    makers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm") and len(node.input) == 3:
            made = [makers.get(name) for name in node.input[:2]]
            if all(n is not None and n.op_type == "DequantizeLinear" for n in made):
                x, w = (values[n.input[1]] for n in made if n is not None)
                found[node.input[2]] = (x * w).reshape(-1)
    return found


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    plain = NETS["resnet"](0)
    return quantize(plain, images(plain, 12))


def test_biases_move_by_half_a_unit_at_most_and_nothing_else_moves(model: onnx.ModelProto) -> None:
    before, after, unit = arrays(model), arrays(snap_biases(model)), units(model)
    assert len(unit) >= 5
    for name, value in after.items():
        if name in unit:
            moved = np.abs(value.astype(np.float64) - before[name])
            assert (moved <= 0.5001 * unit[name]).all()
            assert moved.max() > 0
            count = value / unit[name]
            np.testing.assert_allclose(count, np.rint(count), atol=1e-2)
        else:
            assert np.array_equal(value, before[name])
    assert snap_biases(snap_biases(model)) == snap_biases(model)


def test_the_integer_kernels_and_the_twin_agree_then(model: onnx.ModelProto) -> None:
    """Before, the runner rounds biases that the file does not round; afterwards there is nothing left to round."""
    x = np.random.default_rng(0).random((256, *images(NETS["resnet"](0), 1).shape[1:]), np.float32)
    gaps = []
    for made in (model, snap_biases(model)):
        with torch.no_grad():
            ours = Twin(made)(torch.from_numpy(x)).numpy()
        runner = OrtRunner(made, threads=1)
        gaps.append(int((np.abs(ours - runner(x)).max(axis=1) > 1e-4).sum()))
        runner.close()
    assert gaps[1] < 0.2 * gaps[0]


def test_shared_huge_and_float_biases_stay(model: onnx.ModelProto) -> None:
    name = next(iter(units(model)))
    huge = onnx.ModelProto()
    huge.CopyFrom(model)
    for tensor in huge.graph.initializer:
        if tensor.name == name:
            value = np.full_like(numpy_helper.to_array(tensor), 1e6 + 0.3)
            tensor.CopyFrom(numpy_helper.from_array(value, name))
    assert np.array_equal(arrays(snap_biases(huge))[name], arrays(huge)[name])
    shared = onnx.ModelProto()
    shared.CopyFrom(model)
    shared.graph.node.append(onnx.helper.make_node("Identity", [name], ["copy"]))
    assert np.array_equal(arrays(snap_biases(shared))[name], arrays(shared)[name])
    plain = NETS["resnet"](0)
    assert snap_biases(plain) == plain


@pytest.mark.parametrize("reconstructed", [False, True])
def test_a_channel_whose_weights_vanished_keeps_its_bias_in_every_runtime(
    reconstructed: bool,
) -> None:
    """A bias in units of a step near 0 is beyond INT32: ONNX Runtime's own fusion lost it, 0.6 of a range of 0.7."""
    fp32 = nets.residual()
    for tensor in fp32.graph.initializer:
        if tensor.name in ("conv1.weight", "conv1.bias"):
            value = numpy_helper.to_array(tensor).copy()
            value[:8] = 1e-7 * value[:8] if tensor.name.endswith("weight") else 1.0
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    pixels = nets.images(64)
    ranges = calibrate(fp32, rules.plan(fp32).activations, [pixels], "minmax")
    if reconstructed:
        int8, _ = reconstruct(fp32, ranges, pixels, 1e-3)
    else:
        int8 = qdq.quantize_graph(fp32, ranges)
    int8 = snap_biases(int8)

    exact, stock = graph.run(fp32, pixels), graph.run(int8, pixels)
    with OrtRunner(int8) as runner:
        ours = runner(pixels)

    spread = float(np.ptp(exact))
    assert np.abs(stock - exact).max() < 0.1 * spread
    assert np.abs(stock - ours).max() < 0.02 * spread
    codes = arrays(int8)["conv1.weight"]
    assert not codes[:8].any()
    assert codes[8:].any()
