"""Memory layouts of a weight tensor: which element lies at which place in an engine's copy of it.

A layout is named by a tag in oneDNN's notation (oneDNN developer guide, "Understanding Memory
Formats"). Letters are axes, `a` the first; from left to right they run from the slowest to the
fastest. A capital letter is an axis cut into blocks, and the blocks follow as size and letter, the
innermost last; an axis whose length is no multiple of its block is filled up:

    acdb      OIHW weights as KRSC, what TensorRT-RTX keeps
    acdB4b    KRSC with the input channels filled up to a multiple of 4 (first and depthwise convs)
    aBcd32b   NC/32HW32, a vectorized format of classic TensorRT
    Bcda32b   C/32 R S K 32c, the interleaved filter of CUTLASS's INT8 convolutions (TensorCxRSKx)
    ba        a Gemm weight, transposed
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

MAX_NDIM = 6
_TAG = re.compile(r"([A-Fa-f]+)((?:[1-9][0-9]{0,3}[a-f])*)")
_BLOCK = re.compile(r"([0-9]+)([a-f])")
_FILLS = (4, 8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class _Digit:
    """One digit of a position: `(coordinate on axis // step) % size`, worth `stride` elements."""

    axis: int
    step: int
    size: int
    stride: int


@dataclass(frozen=True)
class Layout:
    """A tensor of `shape` in the order that `tag` names. Positions count elements, from the start of the copy.

    Raises ValueError for a tag that does not fit the shape.
    """

    tag: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.shape or len(self.shape) > MAX_NDIM or min(self.shape) < 1:
            raise ValueError(f"no layout for shape {self.shape}")
        if sorted(self._outer.lower()) != list("abcdef"[: len(self.shape)]):
            raise ValueError(f"layout {self.tag!r} does not fit shape {self.shape}")
        blocked = {letter.upper() for _, letter in self._blocks}
        if blocked != {letter for letter in self._outer if letter.isupper()}:
            raise ValueError(f"capitals and blocks of layout {self.tag!r} differ")

    @cached_property
    def _parts(self) -> tuple[str, tuple[tuple[int, str], ...]]:
        match = _TAG.fullmatch(self.tag)
        if match is None:
            raise ValueError(f"{self.tag!r} is no layout")
        return match[1], tuple((int(n), letter) for n, letter in _BLOCK.findall(match[2]))

    @property
    def _outer(self) -> str:
        return self._parts[0]

    @property
    def _blocks(self) -> tuple[tuple[int, str], ...]:
        return self._parts[1]

    @cached_property
    def digits(self) -> tuple[_Digit, ...]:
        """The digits of a position, slowest first."""
        inner: list[tuple[int, int, int]] = []
        below = dict.fromkeys(range(len(self.shape)), 1)
        for size, letter in reversed(self._blocks):
            axis = "abcdef".index(letter)
            inner.append((axis, below[axis], size))
            below[axis] *= size
        axes = ["abcdef".index(letter) for letter in self._outer.lower()]
        outer = [(axis, below[axis], -(-self.shape[axis] // below[axis])) for axis in axes]
        digits, stride = [], 1
        for axis, step, size in [*inner, *reversed(outer)]:
            digits.append(_Digit(axis, step, size, stride))
            stride *= size
        return tuple(reversed(digits))

    @cached_property
    def size(self) -> int:
        """Elements of the copy, filling included."""
        return math.prod(digit.size for digit in self.digits)

    @cached_property
    def rows(self) -> int:
        """How many slices the slowest axis that is longer than 1 cuts the copy into."""
        return next((digit.size for digit in self.digits if digit.size > 1), 1)

    @property
    def row(self) -> int:
        """Elements of one such slice."""
        return self.size // self.rows

    @property
    def key(self) -> tuple[tuple[int, int, int], ...]:
        """Equal for layouts that order this shape in the same way."""
        merged: list[tuple[int, int, int]] = []
        for digit in self.digits:
            if digit.size == 1:
                continue
            if merged and merged[-1][:2] == (digit.axis, digit.step * digit.size):
                merged[-1] = (digit.axis, digit.step, digit.size * merged[-1][2])
            else:
                merged.append((digit.axis, digit.step, digit.size))
        return tuple(merged)

    def positions(self, elements: Indices) -> Indices:
        """Where flat C-order elements lie, int64."""
        coordinates = np.unravel_index(np.asarray(elements, dtype=np.int64), self.shape)
        total = np.zeros(np.shape(elements), dtype=np.int64)
        for digit in self.digits:
            total += coordinates[digit.axis] // digit.step % digit.size * digit.stride
        return total

    def elements(self, positions: Indices) -> Indices:
        """The inverse of `positions`: flat elements, -1 where the copy is filling."""
        coordinates = np.zeros((len(self.shape), *np.shape(positions)), dtype=np.int64)
        for digit in self.digits:
            coordinates[digit.axis] += positions // digit.stride % digit.size * digit.step
        limits = np.array(self.shape, dtype=np.int64).reshape(-1, *[1] * np.ndim(positions))
        inside = np.all(coordinates < limits, axis=0)
        flat = np.ravel_multi_index(tuple(np.minimum(coordinates, limits - 1)), self.shape)
        return np.where(inside, flat, -1)

    def pack(self, array: NDArray[Any]) -> NDArray[Any]:
        """The copy of `array`, one-dimensional, filled up with zeros."""
        wide = [(0, self._reach(axis) - n) for axis, n in enumerate(self.shape)]
        full = np.pad(array, wide) if any(after for _, after in wide) else array
        by_axis, order = self._split()
        return np.ascontiguousarray(full.reshape(by_axis).transpose(order)).reshape(-1)

    def unpack(self, copy: NDArray[Any]) -> NDArray[Any]:
        """The tensor in a copy of `size` elements; filling is dropped."""
        by_axis, order = self._split()
        shuffled = copy.reshape([by_axis[i] for i in order]).transpose(np.argsort(order))
        full = shuffled.reshape([self._reach(axis) for axis in range(len(self.shape))])
        return np.ascontiguousarray(full[tuple(slice(n) for n in self.shape)])

    def _reach(self, axis: int) -> int:
        return math.prod(digit.size for digit in self.digits if digit.axis == axis)

    def _split(self) -> tuple[list[int], list[int]]:
        """Digit sizes sorted by axis and significance, and the permutation of those that gives the copy's order."""
        ranked = sorted(
            range(len(self.digits)), key=lambda i: (self.digits[i].axis, -self.digits[i].step)
        )
        return [self.digits[i].size for i in ranked], [int(i) for i in np.argsort(ranked)]


def candidates(shape: tuple[int, ...]) -> tuple[Layout, ...]:
    """Layouts a weight of this shape may have in a plan, the likely ones first, each order once.

    Plain permutations; then one axis filled up or cut into blocks of 4 to 64 (see the module's text).
    """
    found: dict[tuple[tuple[int, int, int], ...], Layout] = {}
    if 1 <= len(shape) <= MAX_NDIM and min(shape) > 0:
        for tag in _tags(len(shape)):
            layout = Layout(tag, shape)
            found.setdefault(layout.key, layout)
    return tuple(found.values())


def _tags(ndim: int) -> Iterator[str]:
    letters = "abcdef"[:ndim]
    if ndim >= 3:
        yield f"a{letters[2:]}b"
    yield letters
    yield from map("".join, itertools.permutations(letters)) if ndim <= 4 else ()
    for fill in _FILLS:
        for axis in (1, 0) if ndim > 1 else (0,):
            yield from _blocked(letters, letters[axis], fill)
    if ndim == 2:
        yield from (f"{outer}{m}b{n}a" for outer in ("AB", "BA") for m in _FILLS for n in (8, 16))


def _blocked(letters: str, axis: str, size: int) -> Iterator[str]:
    """One axis in blocks, its outer part at each place among the others; those in C order, or turned (R S before K)."""
    rest = letters.replace(axis, "")
    for others in dict.fromkeys((rest, rest[1:] + rest[:1])):
        for place in range(len(rest), -1, -1):
            yield f"{others[:place]}{axis.upper()}{others[place:]}{size}{axis}"
