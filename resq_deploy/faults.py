"""The fault space of a deployed network, and bit flips in it.

A fault is an address: (tensor, element, bit). `tensor` is the name of an initializer of the INT8
ONNX graph, `element` the flat C-order index in it, bit 0 the least significant bit. Every backend
maps this one address onto its own memory.

A FaultSpace enumerates the addresses of some tensors, so that a fault can also be one integer in
[0, N): tensors in graph order, then elements, then bits. A fault model (fault_models.py) draws such
integers; Flips is what one trial changes.
"""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import FaultError

Kind = Literal["weights", "bias", "scales", "zero-points", "float"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One fault location: initializer name, flat C-order element index, bit (0 = LSB)."""

    tensor: str
    element: int
    bit: int


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """One tensor of the deployed weight memory.

    `value` is its golden content (read-only; int8, float32, ...), `layer` the name of the node it belongs to. `kind`:
    INT8 `weights`, `bias`, `scales` and `zero-points` of Q/DQ, and `float` for parameters left in high precision.
    """

    name: str
    layer: str
    kind: Kind
    value: NDArray[Any]

    @property
    def width(self) -> int:
        """Bits in one element."""
        return self.value.dtype.itemsize * 8


class FaultSpace:
    """The addresses that faults are drawn from: some tensors, and some bit positions of their elements.

    `bits`: the bit positions that take part (None: all that an element has).
    """

    def __init__(self, memories: Iterable[Memory], bits: Sequence[int] | None = None) -> None:
        self.memories = tuple(memories)
        self.by_name = {memory.name: memory for memory in self.memories}
        if len(self.by_name) != len(self.memories):
            raise FaultError("two tensors of the fault space have one name")
        self._bits = [_positions(memory, bits) for memory in self.memories]
        sizes = [m.value.size * len(b) for m, b in zip(self.memories, self._bits, strict=True)]
        self._starts = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        self._counts = np.array([len(b) for b in self._bits], dtype=np.int64)
        self._table = np.zeros(
            (len(self._bits), max(map(len, self._bits), default=1)), dtype=np.int64
        )
        for row, positions in zip(self._table, self._bits, strict=True):
            row[: len(positions)] = positions

    @property
    def size(self) -> int:
        """N, the number of fault locations."""
        return int(self._starts[-1])

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the layers, in graph order, each once."""
        return tuple(dict.fromkeys(memory.layer for memory in self.memories))

    def select(
        self,
        kinds: Iterable[str] | None = None,
        layers: Iterable[str] | None = None,
        bits: Sequence[int] | None = None,
    ) -> FaultSpace:
        """The part of this space of these kinds, of layers (or tensors) that match one of these globs, at these bits.

        Raises FaultError where nothing is left.
        """
        kept = self.memories
        if kinds is not None:
            wanted = set(kinds)
            if unknown := wanted - set(KINDS):
                raise FaultError(
                    f"unknown kind of memory {sorted(unknown)[0]!r}", f"one of: {', '.join(KINDS)}"
                )
            kept = tuple(m for m in kept if m.kind in wanted)
        if layers is not None:
            patterns = tuple(layers)
            kept = tuple(m for m in kept if _matches(m, patterns))
        space = FaultSpace(kept, bits)
        if space.size == 0 and kept:
            widest = max(m.width for m in kept)
            raise FaultError(
                f"no weight memory has the bits {', '.join(map(str, bits or ()))}",
                f"they go from 0 to {widest - 1} there",
            )
        if space.size == 0:
            some = ", ".join(self.layers[:6])
            raise FaultError(
                "no weight memory is left to inject faults into", f"the first layers are: {some}"
            )
        return space

    def locate(
        self, indices: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Integers in [0, N) to (index into `memories`, element, bit): three int64 arrays of the same length."""
        tensor = np.searchsorted(self._starts, indices, side="right") - 1
        element, position = np.divmod(indices - self._starts[tensor], self._counts[tensor])
        return tensor, element, self._table[tensor, position]

    def sizes(self) -> NDArray[np.int64]:
        """How many fault locations each of `memories` has, int64 [len(memories)]."""
        return np.diff(self._starts)

    def parts(self) -> Iterator[tuple[Memory, tuple[int, ...]]]:
        """Every tensor with the bit positions of it that take part."""
        return iter(zip(self.memories, self._bits, strict=True))

    def cells(self) -> dict[tuple[str, int], int]:
        """How many fault locations each (layer, bit position) has."""
        found: dict[tuple[str, int], int] = {}
        for memory, positions in self.parts():
            for bit in positions:
                cell = memory.layer, bit
                found[cell] = found.get(cell, 0) + memory.value.size
        return found

    def block(self, index: int, size: int) -> NDArray[np.int64]:
        """All locations in the aligned block of `size` bytes of the tensor's memory that holds location `index`.

        int64, ascending; the last block of a tensor may be shorter.
        """
        tensor, element, bit = (int(part[0]) for part in self.locate(np.array([index])))
        width = self.memories[tensor].value.dtype.itemsize
        start = (element * width + bit // 8) // size * size
        stop = min(start + size, self.memories[tensor].value.size * width)
        elements = np.arange(start // width, (stop - 1) // width + 1)
        positions = np.arange(self._counts[tensor])
        byte = elements[:, None] * width + self._table[tensor, positions] // 8
        where = self._starts[tensor] + elements[:, None] * self._counts[tensor] + positions
        found: NDArray[np.int64] = where[(byte >= start) & (byte < stop)]
        return found

    def values(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """The golden bit, 0 or 1, at each of these integers in [0, N)."""
        tensor, element, bit = self.locate(indices)
        found = np.zeros(indices.size, dtype=np.uint8)
        for name in np.unique(tensor):
            here = tensor == name
            value = self.memories[name].value.reshape(-1)
            codes = value[element[here]].view(f"u{value.dtype.itemsize}").astype(np.uint64)
            found[here] = (codes >> bit[here].astype(np.uint64)) & np.uint64(1)
        return found

    def check(self, fault: Fault) -> Memory:
        """The tensor that a fault address lies in. Raises FaultError where there is no such address."""
        memory = self.by_name.get(fault.tensor)
        if memory is None:
            some = ", ".join(list(self.by_name)[:4])
            raise FaultError(f"no tensor {fault.tensor!r} in this bundle", f"the first are: {some}")
        if not 0 <= fault.element < memory.value.size:
            raise FaultError(
                f"{fault.tensor} has no element {fault.element}",
                f"it has {memory.value.size}, counted from 0",
            )
        if not 0 <= fault.bit < memory.width:
            raise FaultError(
                f"{fault.tensor} has no bit {fault.bit}", f"bits 0 to {memory.width - 1}"
            )
        return memory

    def flips(self, indices: NDArray[np.int64]) -> Flips:
        """The flips at these integers in [0, N), each of them distinct."""
        ordered = np.asarray(indices, dtype=np.int64)
        if (ordered[1:] < ordered[:-1]).any():
            ordered = np.sort(ordered)
        tensor, element, bit = self.locate(ordered)
        cuts = [*_firsts(tensor).tolist(), tensor.size]
        parts = {}
        for start, stop in itertools.pairwise(cuts):
            memory = self.memories[tensor[start]]
            parts[memory.name] = _gather(memory, element[start:stop], bit[start:stop])
        return Flips(parts)

    def flips_of(self, faults: Iterable[Fault]) -> Flips:
        """The flips of a fault list. Raises FaultError for an unknown address or one that is named twice."""
        found: dict[str, list[Fault]] = {}
        for fault in faults:
            self.check(fault)
            found.setdefault(fault.tensor, []).append(fault)
        parts = {}
        for name, group in found.items():
            if len(set(group)) != len(group):
                raise FaultError(f"a fault location of {name} is named twice in one trial")
            group.sort()
            elements = np.array([f.element for f in group], dtype=np.int64)
            bits = np.array([f.bit for f in group], dtype=np.int64)
            parts[name] = _gather(self.by_name[name], elements, bits)
        return Flips(parts)


@dataclass(frozen=True, slots=True, eq=False)
class TensorFlips:
    """What one trial changes in one tensor.

    `elements` int64 [k], ascending and distinct, and the XOR `masks` [k] in the unsigned type of the
    element's width, none of them 0.
    """

    elements: NDArray[np.int64]
    masks: NDArray[np.unsignedinteger[Any]]


class Flips(Mapping[str, TensorFlips]):
    """The bits that one trial flips: tensor name -> TensorFlips; `faults()` gives single addresses."""

    def __init__(self, parts: Mapping[str, TensorFlips]) -> None:
        self._parts = {name: part for name, part in sorted(parts.items()) if part.elements.size}

    def __getitem__(self, name: str) -> TensorFlips:
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    @property
    def count(self) -> int:
        """How many bits are flipped."""
        return sum(int(np.bitwise_count(part.masks).sum()) for part in self._parts.values())

    def faults(self) -> Iterator[Fault]:
        """Every flipped bit as an address, in order."""
        for name, part in self._parts.items():
            for element, mask in zip(part.elements.tolist(), part.masks.tolist(), strict=True):
                for bit in range(int(mask).bit_length()):
                    if mask >> bit & 1:
                        yield Fault(name, element, bit)

    def digest(self) -> str:
        """sha256 (hex) of the addresses: equal for equal flips on every machine."""
        sha = hashlib.sha256()
        for name, part in self._parts.items():
            sha.update(f"{name}\0{part.elements.size}\0".encode())
            sha.update(part.elements.astype("<i8").tobytes())
            sha.update(part.masks.astype("<u8").tobytes())
        return sha.hexdigest()


def flip_bits(array: NDArray[Any], flips: TensorFlips) -> None:
    """XOR the masks into a C-contiguous, writable array, in place. Doing it twice restores the array."""
    flat = array.reshape(-1).view(flips.masks.dtype)
    if not np.shares_memory(flat, array):
        raise FaultError(
            "flips need a contiguous array", "pass the array itself, not a strided view"
        )
    flat[flips.elements] ^= flips.masks


def flipped(memory: Memory, flips: TensorFlips) -> NDArray[Any]:
    """A copy of a tensor's golden content with the flips in it."""
    copy = memory.value.copy()
    flip_bits(copy, flips)
    return copy


def _positions(memory: Memory, bits: Sequence[int] | None) -> tuple[int, ...]:
    if bits is None:
        return tuple(range(memory.width))
    return tuple(bit for bit in sorted(set(bits)) if 0 <= bit < memory.width)


def _matches(memory: Memory, patterns: Sequence[str]) -> bool:
    return any(
        fnmatch.fnmatchcase(text, p) for p in patterns for text in (memory.layer, memory.name)
    )


def _gather(memory: Memory, elements: NDArray[np.int64], bits: NDArray[np.int64]) -> TensorFlips:
    """One mask per element; `elements` ascend."""
    dtype = np.dtype(f"u{memory.value.dtype.itemsize}")
    single = np.left_shift(np.uint64(1), bits.astype(np.uint64)).astype(dtype)
    firsts = _firsts(elements)
    masks = np.bitwise_or.reduceat(single, firsts) if firsts.size else single
    return TensorFlips(elements[firsts], masks)


def _firsts(ascending: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where each new value of an ascending array stands for the first time."""
    new = np.ones(ascending.size, dtype=np.bool_)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:])
    return np.flatnonzero(new)
