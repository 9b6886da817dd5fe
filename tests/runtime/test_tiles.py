"""Convolutions as matrix products in AMX tiles: the same bits, and only where they gain."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.runtime import cpu
from resq_deploy.runtime.lower import lower
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.segments import open_session, session_options
from tests.runtime import graphs

WIDE = (64, 64, 3, 1)  # channels out and in, kernel, groups


def conv(
    layer: tuple[int, int, int, int], zero: int = 0, *, given: bool = False
) -> onnx.ModelProto:
    """A QLinearConv of codes, -128 among them, that no CPU saturates; `given`: its weights come with each run."""
    filters, channels, kernel, groups = layer
    rng = np.random.default_rng(filters + channels)
    weights = rng.integers(-64, 65, (filters, channels // groups, kernel, kernel), np.int8)
    weights[0], weights[0, 0] = 0, -128
    held = {
        "w": weights,
        "ws": rng.uniform(1e-4, 1e-3, filters).astype(np.float32),
        "wz": np.full(filters, zero, np.int8),
        "xs": np.float32(0.5),
        "xz": np.uint8(128),
        "ys": np.float32(0.7),
        "yz": np.uint8(100),
        "b": rng.integers(-9999, 9999, filters, np.int32),
    }
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, None)]
    if given:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.INT8, weights.shape))
        del held["w"]
    node = helper.make_node(
        "QLinearConv", ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], ["y"],
        domain="com.microsoft", channels_last=1, group=groups, pads=[kernel // 2] * 4,
    )  # fmt: skip
    output = helper.make_tensor_value_info("y", TensorProto.UINT8, None)
    constants = [numpy_helper.from_array(np.asarray(v), n) for n, v in held.items()]
    graph = helper.make_graph([node], "conv", inputs, [output], constants)
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=9)


def answers(model: onnx.ModelProto) -> NDArray[np.uint8]:
    session = open_session(model.SerializeToString(), session_options(1))
    assert [i.name for i in session.get_inputs()] == ["x"]  # nobody has to give the zero point
    channels = model.graph.initializer[0].dims[1]
    codes = np.random.default_rng(1).integers(0, 256, (2, 7, 7, channels), np.uint8)
    made: NDArray[np.uint8] = session.run(None, {"x": codes})[0]
    return made


def test_the_same_codes() -> None:
    plain, tiled = conv(WIDE), conv(WIDE)
    cpu.in_tiles(tiled.graph)
    assert [i.name for i in tiled.graph.input] == ["x", "wz"]
    expected = answers(plain)
    assert 0 < expected.mean() < 255
    assert np.array_equal(answers(tiled), expected)
    cpu.in_tiles(tiled.graph)
    assert len(tiled.graph.input) == 2


@pytest.mark.parametrize(
    "layer", [(32, 256, 3, 1), (64, 128, 1, 1), (64, 256, 1, 1), (256, 256, 3, 4), (64, 64, 3, 64)]
)
def test_layers_that_would_lose_stay(layer: tuple[int, int, int, int]) -> None:
    model = conv(layer)
    if layer == (256, 256, 3, 4):
        assert int(np.prod(model.graph.initializer[0].dims[1:])) >= 256
    cpu.in_tiles(model.graph)
    assert len(model.graph.input) == 1


def test_weights_that_come_with_a_run_stay() -> None:
    """Nothing is packed of them, in tiles or not."""
    model = conv(WIDE, given=True)
    cpu.in_tiles(model.graph)
    assert [i.name for i in model.graph.input] == ["x", "w"]


@pytest.mark.parametrize("name", ["resnet", "vgg"])
def test_a_network_answers_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = graphs.quantized(name)
    shown = graphs.images(model)
    for limit, low in (("_SUMMED", 16), ("_FILTERS", 4), ("_WEIGHTS", 64)):
        monkeypatch.setattr(cpu, limit, low)
    told, changed = [], []
    for tiles in (False, True):
        monkeypatch.setattr(cpu, "has_tiles", lambda tiles=tiles: tiles)
        with OrtRunner(model, threads=1) as runner:
            told.append(runner(shown))
            assert not runner.unnoticed(shown)
            assert runner.lowered is not None
            made = [s.model(runner.lowered.arrays) for s in runner.segments]
            changed.append(sum(len(m.graph.input) > 1 for m in made))
    assert np.array_equal(told[0], told[1])
    assert changed[1] > changed[0]


def test_a_lowered_file_keeps_its_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_tiles", lambda: True)
    monkeypatch.setattr(cpu, "_WEIGHTS", 1)
    model = graphs.quantized("resnet")
    assert [i.name for i in lower(model).graph.input] == [i.name for i in model.graph.input]


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="not Linux")
def test_only_where_the_processor_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu.has_tiles.cache_clear()
    monkeypatch.setattr(Path, "read_text", lambda _: "flags : avx2 avx512_vnni")
    assert not cpu.has_tiles()
    cpu.has_tiles.cache_clear()
    monkeypatch.undo()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert not cpu.has_tiles()
    cpu.has_tiles.cache_clear()
