"""The fault space: addresses, blocks, golden bits, flips, against plain Python that says the same."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from resq_deploy.errors import FaultError
from resq_deploy.faults import Fault, FaultSpace, Flips, Memory, flip_bits, flipped

DTYPES = ("int8", "int32", "float32", "float64")
KIND = {"int8": "weights", "int32": "bias", "float32": "scales", "float64": "float"}


def memory(name: str, dtype: str, size: int, seed: int = 0) -> Memory:
    raw = hashlib.shake_256(f"{seed} {size}".encode()).digest(size * np.dtype(dtype).itemsize)
    value: NDArray[Any] = np.frombuffer(raw, dtype=dtype)
    return Memory(name, name.split(".")[0], KIND[dtype], value)  # type: ignore[arg-type]


@st.composite
def spaces(draw: st.DrawFn) -> FaultSpace:
    kinds = draw(
        st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 9)), min_size=1, max_size=4)
    )
    bits = draw(st.none() | st.sets(st.integers(0, 7), min_size=1))
    memories = [memory(f"l{i}.w", dtype, size, i) for i, (dtype, size) in enumerate(kinds)]
    return FaultSpace(memories, None if bits is None else sorted(bits))


def addresses(space: FaultSpace) -> list[Fault]:
    """Every address of a space, the slow and obvious way."""
    found = []
    for m, positions in zip(space.memories, space._bits, strict=True):
        found += [Fault(m.name, e, b) for e in range(m.value.size) for b in positions]
    return found


@settings(deadline=None)
@given(spaces())
def test_integers_enumerate_the_addresses(space: FaultSpace) -> None:
    tensor, element, bit = space.locate(np.arange(space.size))
    names = [space.memories[t].name for t in tensor]
    found = [Fault(n, e, b) for n, e, b in zip(names, element.tolist(), bit.tolist(), strict=True)]
    assert found == addresses(space)
    assert space.sizes().sum() == space.size == len(found)


@settings(deadline=None)
@given(spaces(), st.data())
def test_flips_of_integers_and_of_addresses_agree(space: FaultSpace, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, space.size - 1), unique=True, max_size=30))
    every = addresses(space)
    by_index = space.flips(np.array(chosen, dtype=np.int64))
    by_address = space.flips_of(every[i] for i in chosen)
    assert by_index.digest() == by_address.digest()
    assert by_index.count == len(chosen)
    assert sorted(by_index.faults()) == sorted(every[i] for i in chosen)


@settings(deadline=None)
@given(spaces(), st.data())
def test_flipping_twice_restores_and_changes_exactly_those_bits(
    space: FaultSpace, data: st.DataObject
) -> None:
    chosen = data.draw(st.lists(st.integers(0, space.size - 1), unique=True, min_size=1))
    for name, part in space.flips(np.array(chosen)).items():
        golden = space.by_name[name]
        faulty = flipped(golden, part)
        differing = np.frombuffer(faulty.tobytes(), np.uint8) ^ np.frombuffer(
            golden.value.tobytes(), np.uint8
        )
        assert int(np.bitwise_count(differing).sum()) == int(np.bitwise_count(part.masks).sum()) > 0
        assert (np.diff(part.elements) > 0).all()
        flip_bits(faulty, part)
        assert faulty.tobytes() == golden.value.tobytes()


@settings(deadline=None)
@given(spaces(), st.data())
def test_golden_bits(space: FaultSpace, data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.integers(0, space.size - 1), unique=True))
    every = addresses(space)
    for index, value in zip(chosen, space.values(np.array(chosen, dtype=np.int64)), strict=True):
        f = every[index]
        raw = space.by_name[f.tensor].value.reshape(-1)[f.element].tobytes()
        assert int.from_bytes(raw, "little") >> f.bit & 1 == value


@settings(deadline=None)
@given(spaces(), st.sampled_from([1, 2, 4]), st.data())
def test_a_block_is_all_locations_of_the_same_aligned_bytes(
    space: FaultSpace, size: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, space.size - 1))
    every = addresses(space)

    def place(fault: Fault) -> tuple[str, int]:
        width = space.by_name[fault.tensor].value.dtype.itemsize
        return fault.tensor, (fault.element * width + fault.bit // 8) // size

    want = [i for i, f in enumerate(every) if place(f) == place(every[index])]
    assert space.block(index, size).tolist() == want


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault("nothing", 0, 0), "no tensor 'nothing'"),
        (Fault("l0.w", 5, 0), "no element 5"),
        (Fault("l0.w", -1, 0), "no element -1"),
        (Fault("l0.w", 0, 8), "no bit 8"),
    ],
)
def test_addresses_that_do_not_exist(fault: Fault, words: str) -> None:
    space = FaultSpace([memory("l0.w", "int8", 5)])
    with pytest.raises(FaultError, match=words):
        space.flips_of([fault])


def test_one_address_twice_in_a_trial() -> None:
    space = FaultSpace([memory("l0.w", "int8", 5)])
    with pytest.raises(FaultError, match="named twice"):
        space.flips_of([Fault("l0.w", 1, 2), Fault("l0.w", 1, 2)])


def test_select_by_kind_layer_and_bit() -> None:
    space = FaultSpace(
        [memory("a.w", "int8", 3), memory("b.w", "int8", 4), memory("b.s", "float32", 2)]
    )
    assert space.select(kinds=["weights"]).size == 56
    assert space.select(layers=["b"]).size == 32 + 64
    assert space.select(layers=["b.s"], bits=[31, 30]).size == 4
    assert space.select(bits=[7]).layers == ("a", "b")
    with pytest.raises(FaultError, match="no weight memory is left"):
        space.select(layers=["c*"])
    with pytest.raises(FaultError, match="unknown kind"):
        space.select(kinds=["bias", "weight"])


def test_two_tensors_of_one_name() -> None:
    with pytest.raises(FaultError, match="one name"):
        FaultSpace([memory("a.w", "int8", 3), memory("a.w", "int8", 4)])


def test_digest_is_of_what_is_flipped() -> None:
    space = FaultSpace([memory("a.w", "int8", 300), memory("b.w", "float32", 4)])
    assert space.flips(np.array([3, 2399])).digest() == space.flips(np.array([2399, 3])).digest()
    assert space.flips(np.array([3])).digest() != space.flips(np.array([11])).digest()
    assert space.flips(np.array([3])).digest() != space.flips(np.array([4])).digest()
    golden = "f158475b36ad35fd6782270b059a9f471ffc3b03a7e8e75b9c6dd413895501f3"
    assert space.flips(np.array([3, 2401])).digest() == golden


def test_no_flips() -> None:
    assert Flips({}).count == 0
    assert list(Flips({}).faults()) == []


def test_a_strided_array_is_refused() -> None:
    part = FaultSpace([memory("a.w", "int8", 4)]).flips(np.array([0]))["a.w"]
    with pytest.raises(FaultError, match="contiguous"):
        flip_bits(np.zeros((4, 4), np.int8).T[::2], part)
