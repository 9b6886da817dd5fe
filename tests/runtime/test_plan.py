"""The weight map: found in every layout, exact, and never sure where it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resq_deploy.errors import BackendError, FaultError, IntegrityError
from resq_deploy.faults import FaultSpace, Flips, Memory, TensorFlips
from resq_deploy.runtime.layouts import candidates
from resq_deploy.runtime.plan import PlanMap, locate
from tests.runtime.plans import Int8, fake_plan, noise, packed, weight

CONV, DEPTHWISE, GEMM = (
    weight(24, 6, 3, 3, seed=1),
    weight(40, 1, 5, 5, seed=2),
    weight(48, 33, seed=3),
)
CASES = [
    pytest.param(array, layout.tag, id=f"{layout.tag}-{'x'.join(map(str, array.shape))}")
    for array in (CONV, DEPTHWISE, GEMM, weight(7, 5, 9, seed=4))
    for layout in candidates(array.shape)
]
WEIGHTS: dict[str, Int8] = {
    "first": weight(16, 3, 3, 3, seed=10),
    "depthwise": weight(16, 1, 3, 3, seed=11),
    "conv": weight(32, 16, 3, 3, seed=12),
    "head": weight(10, 32, seed=13),
}
PLAN = fake_plan(
    [
        packed(WEIGHTS["first"], "acdB4b"),
        packed(WEIGHTS["depthwise"], "acdB4b"),
        packed(WEIGHTS["conv"], "aBcd32b"),
        packed(WEIGHTS["head"], "ba"),
    ]
)
SPACE = FaultSpace([Memory(name, name, "weights", value) for name, value in WEIGHTS.items()])
MAP = locate(PLAN, WEIGHTS)


def assert_exact(found: PlanMap, plan: bytes, tensors: dict[str, Any]) -> None:
    """What the map reads is what was put there, and offsets agree with it."""
    for name in found.tensors:
        value, located = found.read(plan, name)
        assert np.array_equal(value[located], tensors[name][located])
        offsets = found.offset(name, np.arange(value.size))
        assert np.array_equal(offsets >= 0, located.reshape(-1))
        there = np.frombuffer(plan, np.int8)[offsets[offsets >= 0]]
        assert np.array_equal(there, tensors[name][located])


@pytest.mark.parametrize(("array", "tag"), CASES)
def test_a_weight_is_found_in_every_layout(array: Int8, tag: str) -> None:
    plan = fake_plan([packed(array, tag)])
    found = locate(plan, {"w": array})
    assert found.coverage == 1.0
    assert_exact(found, plan, {"w": array})


@pytest.mark.parametrize("wrap", [bytes, bytearray, memoryview])
def test_a_plan_may_be_any_buffer(wrap: Any) -> None:
    assert locate(wrap(PLAN), WEIGHTS) == MAP


def test_a_map_of_several_weights() -> None:
    assert MAP.coverage == 1.0
    assert MAP.shared == ()
    layouts = {name: placement.layout for name, placement in MAP.tensors.items()}
    assert layouts == {"first": "acdB4b", "depthwise": "acdB4b", "conv": "acdB32b", "head": "ba"}
    assert_exact(MAP, PLAN, WEIGHTS)


def test_filling_need_not_be_zero() -> None:
    array = weight(12, 33, seed=5)
    rows = np.frombuffer(noise(12 * 48), np.int8).reshape(12, 48).copy()
    rows[:, :33] = array
    plan = fake_plan([rows.tobytes()])
    found = locate(plan, {"w": array})
    assert found.coverage == 1.0
    assert_exact(found, plan, {"w": array})


def test_gemms_merged_side_by_side_are_found_row_by_row() -> None:
    """What TensorRT-RTX does with Gemms that share an input: one matrix, each weight some of its columns."""
    tensors = {
        "q": weight(64, 32, seed=1),
        "k": weight(64, 16, seed=2),
        "v": weight(64, 40, seed=3),
    }
    plan = fake_plan([np.concatenate(list(tensors.values()), axis=1).tobytes()])
    found = locate(plan, tensors)
    assert found.coverage == 1.0
    assert found.tensors["k"].pitch == 88
    assert_exact(found, plan, tensors)


def test_elements_that_the_engine_changed_are_holes() -> None:
    array = weight(64, 32, 3, 3, seed=6)
    changed = array.copy()
    changed[20:24] = 0
    plan = fake_plan([packed(changed, "acdb")])
    found = locate(plan, {"w": array})
    _, located = found.read(plan, "w")
    assert 0.9 < found.coverage < 1.0
    assert located[:20].all()
    assert located[24:].all()
    assert located.mean() == pytest.approx(found.coverage)
    assert_exact(found, plan, {"w": array})


def test_equal_weights_that_the_engine_keeps_once_are_shared() -> None:
    array = weight(32, 32, seed=7)
    plan = fake_plan([packed(array, "ab")])
    found = locate(plan, {"a": array, "b": array.copy()})
    assert found.shared == (("a", "b"),)
    assert found.coverage == 1.0


@pytest.mark.parametrize("step", [1, -1])
def test_equal_weights_kept_twice_are_told_apart_by_their_neighbours(step: int) -> None:
    tensors = {n: weight(24, 24, seed=ord(n)) for n in "abcdef"}
    tensors["d"] = tensors["c"].copy()
    names = list(tensors)[::step]
    plan = fake_plan([packed(tensors[name], "ab") for name in names])
    found = locate(plan, tensors)
    assert found.coverage == 1.0
    offsets = [found.tensors[name].offset for name in names]
    assert offsets == sorted(offsets)


def test_a_second_copy_is_told_apart_by_neighbours_and_reported() -> None:
    tensors = {n: weight(24, 24, seed=ord(n)) for n in "abcde"}
    plan = fake_plan([packed(tensors[name], "ab") for name in "abcdeb"])
    found = locate(plan, tensors)
    assert found.tensors["a"].offset < found.tensors["b"].offset < found.tensors["c"].offset
    assert len(found.tensors["b"].copies) == 1


def test_equal_weights_without_an_order_to_go_by_are_not_located() -> None:
    tensors = {n: weight(24, 24, seed=ord(n)) for n in "abcdef"}
    tensors["d"] = tensors["c"].copy()
    plan = fake_plan([packed(tensors[name], "ab") for name in "eacbdf"])
    found = locate(plan, tensors)
    assert set(found.unlocated) == {"c", "d"}
    assert "2 places" in found.unlocated["c"].reason


def test_a_weight_inside_another_is_not_located() -> None:
    large = weight(64, 16, seed=8)
    found = locate(fake_plan([packed(large, "ab")]), {"part": large[8:40].copy(), "whole": large})
    assert list(found.tensors) == ["whole"]
    assert "inside another" in found.unlocated["part"].reason


@pytest.mark.parametrize(
    "array", [np.zeros((64, 64), np.int8), weight(2, 3), np.zeros((0, 4), np.int8)]
)
def test_weights_that_no_search_can_tell_apart_are_not_located(array: Int8) -> None:
    found = locate(fake_plan([array.tobytes()]), {"w": array})
    assert "too few" in found.unlocated["w"].reason
    assert found.coverage == (1.0 if array.size == 0 else 0.0)


def test_a_weight_that_is_not_there_is_not_located() -> None:
    found = locate(PLAN, WEIGHTS | {"other": weight(16, 16, seed=77)})
    assert list(found.unlocated) == ["other"]
    assert found.unreachable(flips_of("other", [3], [0b101], found)) == 2
    value, located = found.read(PLAN, "other")
    assert not value.any()
    assert not located.any()


def test_float_tensors_are_found_verbatim() -> None:
    bias = np.random.default_rng(0).normal(size=64).astype(np.float32)
    plan = bytearray(fake_plan([bias.tobytes()]))
    found = locate(plan, {"bias": bias})
    space = FaultSpace([Memory("bias", "layer", "bias", bias)])
    flips = space.flips(np.array([31, 64, 2047]))
    assert found.apply(plan, flips) == 3
    value, _ = found.read(plan, "bias")
    assert np.array_equal(value.view(np.uint32) ^ bias.view(np.uint32), masks_of(flips, 64))


def masks_of(flips: Flips, size: int) -> Any:
    masks = np.zeros(size, flips["bias"].masks.dtype)
    masks[flips["bias"].elements] = flips["bias"].masks
    return masks


def flips_of(name: str, elements: list[int], masks: list[int], found: PlanMap) -> Flips:
    assert name in found.tensors or name in found.unlocated
    return Flips({name: TensorFlips(np.array(elements), np.array(masks, dtype=np.uint8))})


@given(st.sets(st.integers(0, SPACE.size - 1), max_size=60))
@settings(deadline=None)
def test_a_plan_differs_in_exactly_the_flipped_bits(locations: set[int]) -> None:
    flips = SPACE.flips(np.array(sorted(locations), dtype=np.int64))
    plan = bytearray(PLAN)
    assert MAP.unreachable(flips) == 0
    assert MAP.apply(plan, flips) == len(locations)
    difference = np.frombuffer(plan, np.uint8) ^ np.frombuffer(PLAN, np.uint8)
    assert int(np.bitwise_count(difference).sum()) == len(locations)
    for name, golden in WEIGHTS.items():
        expected = golden.copy()
        if name in flips:
            expected.reshape(-1).view(np.uint8)[flips[name].elements] ^= flips[name].masks
        assert np.array_equal(MAP.read(plan, name)[0], expected)
    MAP.apply(plan, flips)
    assert plan == PLAN


def test_reading_does_not_hand_out_the_plan_itself() -> None:
    plan = bytearray(fake_plan([packed(GEMM, "ab")]))
    value, _ = locate(plan, {"w": GEMM}).read(plan, "w")
    value[...] = 0
    assert np.array_equal(locate(plan, {"w": GEMM}).read(plan, "w")[0], GEMM)


def test_unknown_addresses_and_other_plans_are_refused() -> None:
    with pytest.raises(FaultError, match="elements"):
        MAP.offset("head", np.array([320]))
    with pytest.raises(FaultError, match="elements"):
        MAP.offset("head", np.array([-1]))
    with pytest.raises(FaultError, match="no tensor 'tail'"):
        MAP.read(PLAN, "tail")
    flips = SPACE.flips(np.array([0]))
    with pytest.raises(FaultError, match="no tensor"):
        locate(PLAN, {"head": WEIGHTS["head"]}).apply(bytearray(PLAN), flips)
    with pytest.raises(BackendError, match="bytes"):
        MAP.apply(bytearray(PLAN[:-1]), flips)
    altered = bytearray(PLAN)
    altered[5] ^= 1
    MAP.check(PLAN)
    for other in (altered, PLAN[:-1]):
        with pytest.raises(IntegrityError, match="another plan"):
            MAP.check(other)


def test_json_round_trip(tmp_path: Path) -> None:
    tensors = {
        "q": weight(64, 32, seed=1),
        "k": weight(64, 16, seed=2),
        "none": weight(8, 8, seed=9),
    }
    plan = fake_plan([np.concatenate([tensors["q"], tensors["k"]], axis=1).tobytes()])
    found = locate(plan, tensors)
    found.save(tmp_path / "w.json")
    assert PlanMap.load(tmp_path / "w.json") == found


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("tensors", "conv", "offset"), len(PLAN)),
        (("tensors", "conv", "offset"), -1),
        (("tensors", "conv", "layout"), "ab"),
        (("tensors", "conv", "layout"), "acdB9999b9999b"),
        (("tensors", "conv", "layout"), "("),
        (("tensors", "conv", "shape"), [2**33, 2**33, 3, 3]),
        (("tensors", "conv", "shape"), []),
        (("tensors", "conv", "shape"), [0, 16, 3, 3]),
        (("tensors", "conv", "dtype"), "object"),
        (("tensors", "conv", "pitch"), 1),
        (("tensors", "conv", "pitch"), 2**33),
        (("tensors", "conv", "holes"), [[5, 3]]),
        (("tensors", "conv", "holes"), [[0, 10**6]]),
        (("size",), 100),
        (("sha256",), "x"),
        (("schema_version",), 2),
        (("extra",), 1),
    ],
)
def test_a_map_that_cannot_be_true_is_refused(
    tmp_path: Path, where: tuple[str, ...], value: Any
) -> None:
    document = json.loads(MAP.model_dump_json(exclude_defaults=True))
    inner = document
    for key in where[:-1]:
        inner = inner[key]
    inner[where[-1]] = value
    path = tmp_path / "w.json"
    path.write_text(json.dumps(document))
    with pytest.raises(IntegrityError, match=r"w\.json is no weight map"):
        PlanMap.load(path)


def test_a_file_that_is_no_map_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.json"
    with pytest.raises(IntegrityError, match="cannot read"):
        PlanMap.load(path)
    path.write_bytes(b"\xff\x00[")
    with pytest.raises(IntegrityError, match="no weight map"):
        PlanMap.load(path)


def test_faults_in_both_names_of_one_copy_meet_there() -> None:
    value = np.arange(64, dtype=np.int8).reshape(8, 8)
    plan = bytearray(b"\1" * 7 + value.tobytes() + b"\2" * 9)
    found = locate(bytes(plan), {"a": value, "b": value.copy()})
    space = FaultSpace([Memory(n, n, "weights", value) for n in "ab"])
    same = 8 * 64  # the bits of one tensor: location i of `a` and i + same of `b` are one bit

    def changed(*locations: int) -> int:
        memory = bytearray(plan)
        count = found.apply(memory, space.flips(np.array(locations)))
        assert count == sum((x ^ y).bit_count() for x, y in zip(memory, plan, strict=True))
        return count

    assert changed(3, 4) == changed(3, same + 4) == 2
    assert changed(3, same + 3) == 0
    assert changed(3, same + 3, 9) == 1
