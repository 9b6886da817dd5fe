"""Where an engine plan keeps each weight: a map from fault addresses to the plan's bytes.

    found = locate(plan, initializers)          # search.py finds the bytes, layouts.py orders them
    found.offset("conv1.weight", elements)      # byte offsets in the plan, -1 where not located
    found.apply(plan, flips)                    # flips those bits in a bytearray

TensorRT's plan format is not documented. Nothing of it is parsed: a weight is located only where its
own bytes, every one of them, are found.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resq_deploy.errors import BackendError, FaultError, IntegrityError
from resq_deploy.faults import Flips, TensorFlips
from resq_deploy.runtime.layouts import MAX_NDIM, Indices, Layout
from resq_deploy.runtime.search import Resolved, copy_of, resolve, search

_MAP_LIMIT = 64 * 2**20  # bytes of a map file that are read
_MAX_ELEMENTS = 2**34

DType = Literal[
    "bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64",
    "float16", "float32", "float64",
]  # fmt: skip
Count = Annotated[int, Field(ge=0, lt=2**48)]
Length = Annotated[int, Field(ge=1, lt=2**34)]


def merged(offsets: Indices, masks: NDArray[np.uint8]) -> tuple[Indices, NDArray[np.uint8]]:
    """Byte offsets, ascending and distinct, and the XOR of all masks there; bytes that end as they were are left out.

    Equal tensors may share one copy in an engine: two faults at one bit of it cancel each other, as in memory.
    """
    distinct, inverse = np.unique(offsets, return_inverse=True)
    together = np.zeros(distinct.size, dtype=np.uint8)
    np.bitwise_xor.at(together, inverse, masks)
    return distinct[together != 0], together[together != 0]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Placement(_Strict):
    """One tensor's copy in a plan.

    `layout` is a tag (see layouts.py), `offset` the byte the copy starts at, `pitch` the bytes from one row to
    the next (None: rows touch), `holes` ranges [start, stop) of flat elements whose bytes are not there,
    `copies` offsets of further places with the same bytes, which the map does not use.
    """

    shape: Annotated[tuple[Length, ...], Field(min_length=1, max_length=MAX_NDIM)]
    dtype: DType
    layout: Annotated[str, Field(max_length=32)]
    offset: Count
    pitch: Length | None = None
    holes: tuple[tuple[Count, Count], ...] = ()
    copies: tuple[Count, ...] = ()

    @model_validator(mode="after")
    def _fits(self) -> Placement:
        if math.prod(self.shape) > _MAX_ELEMENTS:
            raise ValueError("a tensor that large is not credible")
        if self.pitch is not None and self.pitch < self._width:
            raise ValueError("rows overlap")
        edges = [edge for hole in self.holes for edge in hole]
        if edges and (edges != sorted(set(edges)) or edges[-1] > math.prod(self.shape)):
            raise ValueError("holes are not ascending ranges of elements")
        return self

    @property
    def order(self) -> Layout:
        """The layout of this shape. Raises ValueError for a tag that does not fit."""
        return _layout(self.layout, self.shape)

    @property
    def _width(self) -> int:
        return self.order.row * np.dtype(self.dtype).itemsize

    @property
    def stop(self) -> int:
        """One past the last byte of the copy."""
        return self.offset + (self.order.rows - 1) * (self.pitch or self._width) + self._width

    @property
    def located(self) -> int:
        """How many elements are located."""
        return math.prod(self.shape) - sum(stop - start for start, stop in self.holes)

    def offsets(self, elements: Indices) -> Indices:
        """Byte offset of each element's first (least significant) byte; -1 in a hole."""
        order, itemsize = self.order, np.dtype(self.dtype).itemsize
        positions = order.positions(elements)
        if self.pitch is None:
            where = self.offset + positions * itemsize
        else:
            row, column = np.divmod(positions, order.row)
            where = self.offset + row * self.pitch + column * itemsize
        return np.where(self.reached(elements), where, -1)

    def reached(self, elements: Indices) -> NDArray[np.bool_]:
        """Which elements are located."""
        edges = np.array([edge for hole in self.holes for edge in hole], dtype=np.int64)
        return np.asarray(np.searchsorted(edges, elements, side="right") % 2 == 0, dtype=np.bool_)

    def read(self, plan: Any) -> NDArray[Any]:
        """The whole copy as a tensor; what it holds in holes means nothing."""
        dtype = np.dtype(self.dtype)
        value = copy_of(plan, self.offset, self.pitch or self._width, self.order, dtype)
        return value.copy() if value.base is not None else value


class Unlocated(_Strict):
    """A tensor that the map does not reach, and why."""

    shape: tuple[Annotated[int, Field(ge=0, lt=2**34)], ...]
    dtype: DType
    reason: str


class PlanMap(_Strict):
    """The weight map of one plan of `size` bytes with this `sha256`: engines/NAME.weights.json in a bundle."""

    schema_version: Literal[1] = 1
    size: Count
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    tensors: dict[str, Placement]
    unlocated: dict[str, Unlocated] = {}

    @model_validator(mode="after")
    def _inside(self) -> PlanMap:
        for name, placement in self.tensors.items():
            if placement.stop > self.size:
                raise ValueError(f"{name} reaches beyond the plan")
        return self

    @property
    def coverage(self) -> float:
        """Share of the mapped tensors' bytes that are located, in [0, 1]."""
        reached = sum(p.located * np.dtype(p.dtype).itemsize for p in self.tensors.values())
        entries: list[Placement | Unlocated] = [*self.tensors.values(), *self.unlocated.values()]
        total = sum(math.prod(e.shape) * np.dtype(e.dtype).itemsize for e in entries)
        return reached / total if total else 1.0

    @property
    def shared(self) -> tuple[tuple[str, ...], ...]:
        """Groups of tensors that one copy serves: a fault in one of them is a fault in all."""
        groups: dict[int, list[str]] = {}
        for name, placement in self.tensors.items():
            groups.setdefault(placement.offset, []).append(name)
        return tuple(tuple(names) for names in groups.values() if len(names) > 1)

    def offset(self, tensor: str, elements: Indices) -> Indices:
        """Byte offsets in the plan of flat elements, int64; -1 where they are not located."""
        elements = np.asarray(elements, dtype=np.int64)
        placement = self.tensors.get(tensor)
        if placement is None:
            return np.full(elements.shape, -1, dtype=np.int64)
        if elements.size and not 0 <= elements.min() <= elements.max() < math.prod(placement.shape):
            raise FaultError(f"{tensor} has only {math.prod(placement.shape)} elements")
        return placement.offsets(elements)

    def read(self, plan: Any, tensor: str) -> tuple[NDArray[Any], NDArray[np.bool_]]:
        """A tensor's content in the plan, and which of its elements are located (0 elsewhere)."""
        if tensor not in self.tensors:
            missing = self.unlocated.get(tensor)
            if missing is None:
                raise FaultError(f"no tensor {tensor!r} in this weight map")
            mask = np.zeros(missing.shape, dtype=np.bool_)
            return np.zeros(missing.shape, dtype=missing.dtype), mask
        value = self.tensors[tensor].read(plan)
        mask = np.ones(value.shape, dtype=np.bool_)
        for start, stop in self.tensors[tensor].holes:
            mask.reshape(-1)[start:stop] = False
            value.reshape(-1)[start:stop] = 0
        return value, mask

    def reaches(self, tensor: str) -> bool:
        """Whether any of a tensor is located."""
        return tensor in self.tensors

    def unreachable(self, flips: Flips) -> int:
        """How many of these bits lie in elements that are not located."""
        lost = 0
        for name, part in flips.items():
            away = self.offset(name, part.elements) < 0
            lost += int(np.bitwise_count(part.masks[away]).sum())
        return lost

    def scatter(self, flips: Flips) -> tuple[Indices, NDArray[np.uint8]]:
        """Flips as byte offsets, ascending and distinct, and XOR masks (uint8). What is not located is left out."""
        parts = [self._bytes_of(name, part) for name, part in flips.items()]
        if not parts:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.uint8)
        offsets = np.concatenate([where for where, _ in parts])
        masks = np.concatenate([mask for _, mask in parts])
        kept = (offsets >= 0) & (masks != 0)
        return merged(offsets[kept], masks[kept])

    def apply(self, plan: bytearray | NDArray[np.uint8], flips: Flips) -> int:
        """Flip bits in a plan, in place; twice restores it. Returns how many bits changed.

        Raises FaultError for a tensor or element the map does not know, BackendError for a plan of
        another size.
        """
        for name in flips:
            if name not in self.tensors and name not in self.unlocated:
                raise FaultError(f"no tensor {name!r} in this weight map")
        if len(plan) != self.size:
            raise BackendError(
                f"the plan has {len(plan)} bytes, its weight map is of one with {self.size}",
                "a plan and its map are written together; export the model again",
            )
        offsets, masks = self.scatter(flips)
        np.frombuffer(plan, dtype=np.uint8)[offsets] ^= masks
        return int(np.bitwise_count(masks).sum())

    def check(self, plan: Any) -> None:
        """Raise IntegrityError where `plan` is not the plan this map was made of."""
        if len(plan) != self.size or hashlib.sha256(plan).hexdigest() != self.sha256:
            raise IntegrityError(
                "the weight map is of another plan", "a plan and its map are written together"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map as JSON."""
        text = self.model_dump_json(exclude_defaults=True, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PlanMap:
        """Read a map. Raises IntegrityError where the file is none, or names bytes outside its plan."""
        try:
            with Path(path).open("rb") as file:
                text = file.read(_MAP_LIMIT + 1)
            if len(text) > _MAP_LIMIT:
                raise ValueError("too large")
            return cls.model_validate_json(text)
        except OSError as error:
            raise IntegrityError(f"cannot read {path}: {error.strerror}") from error
        except (ValidationError, ValueError) as error:
            raise IntegrityError(
                f"{path} is no weight map: {_first_line(error)}", "export the model again"
            ) from error

    def _bytes_of(self, name: str, part: TensorFlips) -> tuple[Indices, NDArray[np.uint8]]:
        masks = np.ascontiguousarray(part.masks, dtype=part.masks.dtype.newbyteorder("<"))
        width = masks.dtype.itemsize
        start = self.offset(name, part.elements)[:, None]
        offsets = np.where(start < 0, -1, start + np.arange(width))
        return offsets.reshape(-1), masks.view(np.uint8)


def locate(
    plan: Any, initializers: Mapping[str, NDArray[Any]], known: Mapping[str, str] | None = None
) -> PlanMap:
    """Find where a plan, or a block of device memory, keeps these tensors.

    `plan`: bytes, bytearray or memoryview. `initializers`: name -> array (INT8 weights; other dtypes
    are searched for verbatim), in the order the graph uses them: equal tensors are told apart by it.
    `known`: layouts of tensors that are looked for in no other. Every located byte has been compared.
    Tensors that were not found, or not told apart, are listed with the reason.
    """
    haystack = bytes(plan) if isinstance(plan, memoryview) else plan
    arrays = {name: np.ascontiguousarray(array) for name, array in initializers.items()}
    found, missing = search(haystack, arrays, known)
    widths = {name: array.itemsize for name, array in arrays.items()}
    resolved = resolve(len(haystack), list(arrays), found, widths)
    return PlanMap(
        size=len(haystack),
        sha256=hashlib.sha256(haystack).hexdigest(),
        tensors={n: _placement(n, resolved, arrays[n]) for n in arrays if n in resolved.placed},
        unlocated={
            name: _unlocated(arrays[name], reason)
            for name, reason in {**missing, **resolved.missing}.items()
        },
    )


def _placement(name: str, resolved: Resolved, array: NDArray[Any]) -> Placement:
    sighting = resolved.placed[name]
    touching = sighting.pitch == sighting.layout.row * array.itemsize
    return Placement.model_validate(
        {
            "shape": array.shape,
            "dtype": array.dtype.name,
            "layout": sighting.layout.tag,
            "offset": sighting.offset,
            "pitch": None if touching else sighting.pitch,
            "holes": sighting.holes,
            "copies": resolved.copies.get(name, ()),
        }
    )


def _unlocated(array: NDArray[Any], reason: str) -> Unlocated:
    return Unlocated.model_validate(
        {"shape": array.shape, "dtype": array.dtype.name, "reason": reason}
    )


@lru_cache(maxsize=4096)
def _layout(tag: str, shape: tuple[int, ...]) -> Layout:
    return Layout(tag, shape)


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
