"""Weights of other tools' files written anew: what is found, what stays, and that the function does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy import quantization, saturation
from resq_deploy.export import coded, fold, graph
from resq_deploy.export.split import MOST
from resq_deploy.memory import fault_space
from resq_deploy.runtime.ort import OrtRunner
from tests import qdq
from tests.export import nets, peer_files

IMAGES = nets.images(24)
WAYS = list(peer_files.WAYS)
NAMES = ["stem", "conv1", "conv2", "skip", "fc"]


def file(way: str, tmp_path: Path) -> onnx.ModelProto:
    return peer_files.static(nets.residual(), nets.images(48, 5), tmp_path, way)


@pytest.mark.parametrize("way", WAYS)
def test_every_layer_of_a_file_is_found(way: str, tmp_path: Path) -> None:
    model = file(way, tmp_path)
    before, found = nets.arrays(nets.residual()), coded.layers(model)
    assert sorted(layer.node.name for layer in found.values()) == sorted(NAMES)
    for name, layer in found.items():
        stem = layer.node.name
        assert (name, layer.axis) == (f"{stem}.weight_quantized", 0)
        assert layer.scale.shape == (len(layer.codes),)
        assert layer.typed
        wide = quantization.channelwise(layer.scale, layer.codes.ndim, 0)
        off = np.abs(layer.values - before[f"{stem}.weight"]) / wide
        assert off.max() <= 0.501
        assert layer.unit is not None
        units = layer.unit * layer.scale
        assert (np.abs(layer.bias - before[f"{stem}.bias"]) <= 0.51 * units).all()
        assert coded.can_split(layer)


@pytest.mark.parametrize("way", WAYS)
def test_only_channels_that_could_saturate_change(way: str, tmp_path: Path) -> None:
    model = file(way, tmp_path)
    before = coded.layers(model)
    made = coded.fitting(model)
    graph.check(made)
    assert saturation.could(model)
    assert not saturation.could(made)
    assert coded.fitting(made) is made
    seen = 0
    for name, layer in coded.layers(made).items():
        old = before[name]
        pairs = saturation.of_layer(old.node, old.codes.shape)
        assert pairs is not None
        same = ~pairs.unfit(old.codes)
        assert np.array_equal(layer.codes[same], old.codes[same])
        assert np.array_equal(layer.scale[same], old.scale[same])
        wide = quantization.channelwise(layer.scale, old.codes.ndim, 0)
        assert np.sqrt(np.mean(np.square((layer.values - old.values) / wide))) < 2
        assert layer.unit is not None
        assert (np.abs(layer.bias - old.bias) <= layer.unit * layer.scale).all()
        seen += int(same.sum())
    assert seen


def test_a_channel_of_zeros_keeps_its_bias(tmp_path: Path) -> None:
    model = file(WAYS[0], tmp_path)
    arrays = fold.initializers(model.graph)
    codes = numpy_helper.to_array(arrays["conv1.weight_quantized"]).copy()
    codes[3] = 0
    arrays["conv1.weight_quantized"].CopyFrom(
        numpy_helper.from_array(codes, "conv1.weight_quantized")
    )
    before = coded.layers(model)["conv1.weight_quantized"]
    after = coded.layers(coded.fitting(model))["conv1.weight_quantized"]
    assert after.bias[3] == pytest.approx(before.bias[3], abs=1e-6)
    assert abs(before.bias[3]) > 1e-4


@pytest.mark.parametrize("way", WAYS)
def test_other_scales_keep_the_function_and_biases_their_units(way: str, tmp_path: Path) -> None:
    """What a file rounds by one scale a tensor is rounded by one a channel; integer kernels agree with the file."""
    model = file(way, tmp_path)
    new = {}
    for name, layer in coded.layers(model).items():
        scale = quantization.weight_scales(layer.values, layer.axis)
        new[name] = (quantization.quantize(layer.values, scale, layer.axis), scale)
    made = coded.rewrite(model, new)
    graph.check(made)
    after = coded.layers(made)
    for name, (codes, scale) in new.items():
        np.testing.assert_array_equal(after[name].codes, codes)
        np.testing.assert_array_equal(after[name].scale, scale)
    arrays, readers = nets.arrays(made), {n.output[0]: n for n in made.graph.node}
    for layer in after.values():
        dq = readers.get(layer.node.input[2])
        if dq is not None and layer.unit is not None:
            np.testing.assert_allclose(arrays[dq.input[1]], layer.unit * layer.scale, rtol=1e-6)
            assert arrays[dq.input[0]].dtype == np.int32
    expected = graph.run(model, IMAGES, optimize=False)
    same(made)
    assert np.abs(graph.run(made, IMAGES, optimize=False) - expected).max() < 0.05 * spread(
        expected
    )
    assert [n.op_type for n in made.graph.node] == [n.op_type for n in model.graph.node]


@pytest.mark.parametrize("way", WAYS)
def test_split_layers_compute_the_same_from_copied_codes(way: str, tmp_path: Path) -> None:
    model = file(way, tmp_path)
    copies = {"stem.weight_quantized": 4, "skip.weight_quantized": 2, "conv1.weight_quantized": 2,
              "fc.weight_quantized": 8}  # fmt: skip
    made = coded.split(model, copies)
    graph.check(made)
    before, after = coded.layers(model), coded.layers(made)
    for name, count in copies.items():
        axis = coded.input_axis(before[name])
        parts = np.split(after[name].codes, count, axis=axis)
        assert all(np.array_equal(part, before[name].codes) for part in parts)
        np.testing.assert_array_equal(after[name].scale * np.float32(count), before[name].scale)
        np.testing.assert_array_equal(after[name].bias, before[name].bias)
    joined = [n for n in made.graph.node if n.op_type == "Concat"]
    assert len(joined) == 3  # conv1 and skip read the same two copies
    expected = graph.run(model, IMAGES, optimize=False)
    np.testing.assert_allclose(
        graph.run(made, IMAGES, optimize=False), expected, atol=1e-5 * spread(expected)
    )
    same(made)


def same(model: onnx.ModelProto) -> None:
    """The fast way of running a graph is the file node by node but for codes at a boundary, also under faults."""
    with OrtRunner(model, threads=1) as fast, OrtRunner(model, threads=1, exact=True) as exact:
        np.testing.assert_allclose(fast(IMAGES), exact(IMAGES), atol=0.02 * spread(exact(IMAGES)))
        for kind in ("weights", "bias"):
            qdq.same_under_faults(fast, exact, IMAGES, kind, 12, 0.05)


def spread(logits: NDArray[np.float32]) -> float:
    return float(np.abs(logits).max())


def test_what_others_read_too_is_not_written_over(tmp_path: Path) -> None:
    """One scale and one zero point for two weights, as tools share them that deduplicate constants."""
    model = file("per tensor", tmp_path)
    dqs = {n.input[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    first, second = dqs["conv1.weight_quantized"], dqs["conv2.weight_quantized"]
    for position in (1, 2):
        second.input[position] = first.input[position]
    layer = coded.layers(model)["conv1.weight_quantized"]
    made = coded.rewrite(model, {layer.weight: (layer.codes, layer.scale / np.float32(2))})
    after = coded.layers(made)
    np.testing.assert_array_equal(after["conv1.weight_quantized"].scale, layer.scale / 2)
    kept = coded.layers(model)["conv2.weight_quantized"]
    np.testing.assert_array_equal(after["conv2.weight_quantized"].scale, kept.scale)
    graph.check(made)


def unsigned(model: onnx.ModelProto) -> None:
    edit(model, "conv1.weight_quantized", lambda v: (v.astype(np.int16) + 128).astype(np.uint8))
    edit(model, "conv1.weight_zero_point", lambda v: np.full(v.shape, 128, np.uint8))


def shifted(model: onnx.ModelProto) -> None:
    edit(model, "conv1.weight_zero_point", lambda v: np.full(v.shape, 3, v.dtype))


def half_bias(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.name == "conv1")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(16, np.float16), "half"))
    node.input[2] = "half"


def read_twice(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.name == "conv1")
    model.graph.node.append(helper.make_node("Identity", [node.input[1]], ["also"], name="also"))


def along_inputs(model: onnx.ModelProto) -> None:
    dq = next(n for n in model.graph.node if n.input[0] == "conv1.weight_quantized")
    for attribute in dq.attribute:
        attribute.i = 1


def edit(model: onnx.ModelProto, name: str, change: Callable[[NDArray[Any]], NDArray[Any]]) -> None:
    tensor = next(t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)), name))


@pytest.mark.parametrize("change", [unsigned, shifted, half_bias, read_twice, along_inputs])
def test_what_cannot_be_written_anew_is_left_out(
    change: Callable[[onnx.ModelProto], None], tmp_path: Path
) -> None:
    model = file("per channel", tmp_path)
    change(model)
    assert "conv1.weight_quantized" not in coded.layers(model)
    assert len(coded.layers(model)) == len(NAMES) - 1


def test_what_cannot_be_split(tmp_path: Path) -> None:
    found = coded.layers(file("per channel", tmp_path))["conv1.weight_quantized"]
    group = onnx.NodeProto()
    group.CopyFrom(found.node)
    group.attribute.append(helper.make_attribute("group", 2))
    large = np.float32(found.unit or 0) * found.scale * np.float32(2**22)
    changes: list[dict[str, Any]] = [
        {"node": group},
        {"typed": False},
        {"bias": large * np.float32(1.01 / MOST)},
    ]
    for change in changes:
        fields: dict[str, Any] = {
            name: getattr(found, name) for name in coded.Coded.__dataclass_fields__
        }
        assert coded.can_split(coded.Coded(**{**fields, "bias": large * np.float32(0.9 / MOST)}))
        assert not coded.can_split(coded.Coded(**{**fields, **change}))


def test_a_float_input_and_no_bias() -> None:
    """Weight-only quantization: nothing is known of the input, and a layer may have no bias."""
    model = qdq.Network(shape=()).model()
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    conv.input[0] = "x"
    del conv.input[2]
    fold.drop_unused(model.graph)
    layer = coded.layers(model)["conv.w"]
    assert (layer.unit, layer.typed) == (None, False)
    assert layer.bias.tolist() == layer.least.tolist() == [0.0]
    made = coded.rewrite(model, {"conv.w": (layer.codes, layer.scale)})
    unchanged(made, model)
    assert {m.name for m in fault_space(made).select(kinds=("weights",)).memories} == {
        "conv.w",
        "fc.w",
    }


def test_files_without_zero_points_can_be_rescaled_but_not_split() -> None:
    model = qdq.Network(zero_points=False, told=True, shape=()).model()
    layers = coded.layers(model)
    assert set(layers) == {"conv.w", "fc.w"}
    assert not any(coded.can_split(layer) for layer in layers.values())
    new = {name: (layer.codes, layer.scale) for name, layer in layers.items()}
    unchanged(coded.rewrite(model, new), model)


def unchanged(made: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Both compute the same."""
    with OrtRunner(made, threads=1) as after, OrtRunner(model, threads=1) as before:
        np.testing.assert_array_equal(after(qdq.pixels()), before(qdq.pixels()))
