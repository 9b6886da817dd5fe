"""The weights in plans that TensorRT-RTX really builds: all are found, and flips land where they should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from resq_deploy.export.engine import build_engine, map_engine
from resq_deploy.fault_lists import read_fault_list, write_fault_list
from resq_deploy.fault_models import parse
from resq_deploy.faults import flipped
from resq_deploy.memory import fault_space
from tests.export.engines import SM, int8_network, located
from tests.runtime.plans import QdqGraph, conv_file, weight


@pytest.mark.parametrize(
    ("shape", "group", "layout"),
    [
        ((32, 16, 3, 3), 1, "acdb"),
        ((32, 3, 3, 3), 1, "acdB4b"),
        ((32, 3, 7, 7), 1, "acdB4b"),
        ((24, 6, 1, 1), 1, "acdB4b"),
        ((32, 1, 3, 3), 32, "acdB4b"),
        ((48, 1, 5, 5), 48, "acdB4b"),
        ((32, 4, 3, 3), 8, "acdb"),
        ((10, 20, 3, 3), 1, "acdb"),
    ],
)
def test_convolutions_are_krsc_with_channels_filled_up_to_4(
    tmp_path: Path, shape: tuple[int, ...], group: int, layout: str
) -> None:
    codes = weight(*shape)
    _, found = located(conv_file(tmp_path / "m.onnx", codes, group), {"w": codes})
    assert found.coverage == 1.0
    assert found.tensors["w"].layout == layout


def test_gemms_that_share_an_input_are_merged_and_still_found(tmp_path: Path) -> None:
    graph = QdqGraph(49, 96)
    source = graph.quantized("input")
    tensors = {f"w{i}": weight(96, n, seed=i) for i, n in enumerate((96, 96, 48))}
    outputs = [
        graph.node("MatMul", source, graph.weight(name, codes, axis=1))
        for name, codes in tensors.items()
    ]
    onnx.save(graph.model(*outputs), tmp_path / "m.onnx")
    _, found = located(tmp_path / "m.onnx", tensors)
    assert found.coverage == 1.0
    assert {p.pitch for p in found.tensors.values()} == {240}


def test_equal_weights_are_kept_once(tmp_path: Path) -> None:
    graph, codes = QdqGraph(32, 8, 8), weight(32, 32, 3, 3)
    first = graph.conv("input", "a", codes)
    onnx.save(graph.model(graph.conv(first, "b", codes.copy(), stride=2)), tmp_path / "m.onnx")
    _, found = located(tmp_path / "m.onnx", {"a": codes, "b": codes})
    assert found.shared == (("a", "b"),)


def test_a_fault_list_lands_in_the_plan(tmp_path: Path) -> None:
    path = conv_file(tmp_path / "m.onnx", weight(32, 3, 3, 3))
    space = fault_space(path)
    plan, found = located(path, {"w": weight(32, 3, 3, 3)})
    weights = space.select(kinds=["weights"])
    flips = weights.flips(np.arange(0, weights.size, 37))
    changed = bytearray(plan)
    assert found.apply(changed, flips) == flips.count
    value, _ = found.read(changed, "w")
    golden = weights.by_name["w"].value
    difference = (value ^ golden).view(np.uint8).reshape(-1)
    assert np.array_equal(np.flatnonzero(difference), flips["w"].elements)
    assert np.array_equal(difference[flips["w"].elements], flips["w"].masks)


def test_two_builds_with_a_fixed_batch_are_byte_identical(tmp_path: Path) -> None:
    """With a free batch, names of the compiler's temporaries and their order may differ; weights do not."""
    path = conv_file(tmp_path / "m.onnx", weight(32, 16, 3, 3))
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    onnx.save(model, path)
    infos = [build_engine(path, tmp_path / f"{i}.plan", sm=SM) for i in (0, 1)]
    assert infos[0].path.read_bytes() == infos[1].path.read_bytes()
    assert infos[0].built_for["batch"] == [4, 4, 4]


def test_what_differs_between_two_builds_with_a_free_batch_is_not_the_weights(
    tmp_path: Path,
) -> None:
    """Names of the compiler's temporaries may; the map says where the weights are in each."""
    path = int8_network("resnet8", tmp_path / "m.onnx")
    maps = []
    for i in (0, 1):
        plan = build_engine(path, tmp_path / f"{i}.plan", sm=SM, batch=(1, 2, 4)).path
        maps.append((plan.read_bytes(), map_engine(plan, path)))
    (first, there), (second, again) = maps
    assert there.coverage == again.coverage == 1.0
    for name, placement in there.tensors.items():
        assert again.tensors[name].layout == placement.layout
        assert np.array_equal(there.read(first, name)[0], again.read(second, name)[0])


def test_a_fault_list_made_on_onnx_runtime_replays_on_a_plan(tmp_path: Path) -> None:
    """The same addresses: the plan differs in exactly those bits, and holds what ONNX Runtime ran with."""
    path = int8_network("resnet8", tmp_path / "m.onnx")
    space = fault_space(path)
    weights = space.select(kinds=["weights"])
    drawn = [parse("ber:1e-4").trial(weights, 3, i).flips for i in range(3)]
    write_fault_list(tmp_path / "faults.jsonl", (flips.faults() for flips in drawn))
    replayed = read_fault_list(tmp_path / "faults.jsonl")
    out = build_engine(path, tmp_path / "m.plan", sm=SM).path
    plan, found = out.read_bytes(), map_engine(out, path)
    for i, flips in enumerate(drawn):
        again = replayed.trial(weights, 0, i).flips
        faulty = bytearray(plan)
        assert found.apply(faulty, again) == flips.count == bits_that_differ(plan, faulty)
        for name, part in flips.items():
            assert np.array_equal(
                found.read(faulty, name)[0], flipped(space.by_name[name], part)
            ), name


def bits_that_differ(one: bytes, other: bytes | bytearray) -> int:
    difference = np.frombuffer(one, np.uint8) ^ np.frombuffer(other, np.uint8)
    return int(np.bitwise_count(difference).sum())


@pytest.mark.parametrize(
    ("arch", "least"),
    [
        ("resnet8", 0.999),
        ("resnet18", 0.999),
        pytest.param("vgg16", 0.999, marks=pytest.mark.slow),
        pytest.param("efficientnet_b0", 0.99, marks=pytest.mark.slow),
        pytest.param("swin_t", 0.999, marks=pytest.mark.slow),
    ],
)
def test_the_weights_of_whole_networks_are_located(tmp_path: Path, arch: str, least: float) -> None:
    path = int8_network(arch, tmp_path / "m.onnx")
    space = fault_space(path).select(kinds=["weights"])
    plan, found = located(path, {m.name: np.asarray(m.value) for m in space.memories})
    assert found.coverage >= least
    draws = np.random.default_rng(0).choice(space.size, 2000, replace=False)
    flips = space.flips(np.sort(draws))
    changed = bytearray(plan)
    assert found.apply(changed, flips) == flips.count - found.unreachable(flips)
    assert bits_that_differ(plan, changed) == flips.count - found.unreachable(flips)
    found.apply(changed, flips)
    assert changed == plan
