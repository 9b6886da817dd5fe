"""Search of an engine plan, or a block of device memory, for the bytes of weight tensors.

One tensor is searched for in each layout it may have, by a window of its bytes that stands out; each
hit is then compared in full. A copy may also be strided: engines merge Gemms that share an input, and
then the rows of one weight lie between those of others. What is found for all tensors is resolved
together: equal bytes at several places, one copy for several equal tensors, copies that overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from resq_deploy.runtime.layouts import Layout, candidates

WINDOW = 4096  # bytes of a needle: longer ones are found no faster
_MAX_HITS = 256  # places with the same window, after which a tensor counts as not distinctive
_MAX_HOLES = 4096
_MIN_ROW = 8  # bytes of a row that is searched for by itself
_MIN_BYTES = 8
_MIN_DISTINCT = 3
_ORDERLY = 0.8  # mean direction from one tensor to the next, from which order tells tensors apart
_REACH = 64  # a row of a strided copy is looked for within so many row lengths of the one before


class Haystack(Protocol):
    """bytes, bytearray or mmap."""

    def find(self, needle: bytes, start: int, stop: int, /) -> int: ...

    def __len__(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Sighting:
    """A copy of one tensor: byte offset, bytes between rows (see Layout.rows), elements that differ in it."""

    layout: Layout
    offset: int
    pitch: int
    holes: tuple[tuple[int, int], ...] = ()

    @property
    def place(self) -> tuple[int, int]:
        return self.offset, self.pitch


@dataclass(frozen=True, slots=True)
class Resolved:
    """Where each tensor lies, why others were not located, and further places with a located tensor's bytes."""

    placed: Mapping[str, Sighting]
    missing: Mapping[str, str]
    copies: Mapping[str, tuple[int, ...]]


def view(plan: Any, offset: int, pitch: int, layout: Layout, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The bytes of one copy, rows apart: uint8 [layout.rows, bytes of a row], writable where `plan` is."""
    width = layout.row * dtype.itemsize
    flat = np.frombuffer(plan, dtype=np.uint8)
    if offset < 0 or pitch < width or offset + (layout.rows - 1) * pitch + width > flat.size:
        raise ValueError("a copy that reaches beyond the plan")
    return as_strided(flat[offset:], (layout.rows, width), (pitch, 1))


def copy_of(
    plan: Any, offset: int, pitch: int, layout: Layout, dtype: np.dtype[Any]
) -> NDArray[Any]:
    """The tensor that one copy holds."""
    rows = np.ascontiguousarray(view(plan, offset, pitch, layout, dtype))
    return layout.unpack(rows.reshape(-1).view(dtype))


def search(
    plan: Haystack, tensors: Mapping[str, NDArray[Any]], known: Mapping[str, str] | None = None
) -> tuple[dict[str, tuple[Sighting, ...]], dict[str, str]]:
    """Every place of every tensor, and for the others why they were not found. Layouts that fitted go first.

    `known`: tensors that are looked for in this one layout only.
    """
    found: dict[str, tuple[Sighting, ...]] = {}
    missing: dict[str, str] = {}
    liked: dict[str, int] = {}
    for name, array in tensors.items():
        if array.nbytes < _MIN_BYTES or np.unique(array).size < _MIN_DISTINCT:
            missing[name] = "too few different bytes to tell it from others"
            continue
        sightings: tuple[Sighting, ...] = ()
        if array.nbytes <= len(plan):
            layouts = sorted(candidates(array.shape), key=lambda layout: -liked.get(layout.tag, 0))
            if known and name in known:
                layouts = [Layout(known[name], array.shape)]
            sightings = _first(plan, array, layouts)
        if not sightings:
            missing[name] = "its bytes are not in the plan in any known layout"
        elif len(sightings) >= _MAX_HITS:
            missing[name] = "its bytes occur too often to tell which are its own"
        else:
            found[name] = sightings
            liked[sightings[0].layout.tag] = liked.get(sightings[0].layout.tag, 0) + 1
    return found, missing


def _first(plan: Haystack, array: NDArray[Any], layouts: Iterable[Layout]) -> tuple[Sighting, ...]:
    layouts = list(layouts)
    for layout in layouts:
        if whole := tuple(_whole(plan, array, layout)):
            return whole
    best: tuple[Sighting, ...] = ()
    for layout in layouts:
        strided = tuple(_strided(plan, array, layout))
        if any(not sighting.holes for sighting in strided):
            return tuple(sighting for sighting in strided if not sighting.holes)
        best = best or strided
    return best


def _whole(plan: Haystack, array: NDArray[Any], layout: Layout) -> Iterator[Sighting]:
    start, needle = _standout(layout, array)
    width = layout.row * array.itemsize
    for hit in _hits(plan, needle, 0, len(plan)):
        offset = hit - start * array.itemsize
        if _holes(plan, array, layout, offset, width) == ():
            yield Sighting(layout, offset, width)


def _strided(plan: Haystack, array: NDArray[Any], layout: Layout) -> Iterator[Sighting]:
    """Copies whose rows lie apart, or of which some rows differ; those with holes need half of the elements."""
    width = layout.row * array.itemsize
    if layout.rows < 2 or width < _MIN_ROW:
        return
    seen: set[tuple[int, int]] = set()
    for row in sorted({0, layout.rows // 2, layout.rows - 2}):
        needles = [_row(layout, array, row + i)[:WINDOW] for i in (0, 1)]
        for hit in _hits(plan, needles[0], 0, len(plan)):
            stop = hit + _REACH * width + WINDOW
            for following in _hits(plan, needles[1], hit + width, min(stop, len(plan))):
                pitch = following - hit
                place = (hit - row * pitch, pitch)
                if place in seen:
                    continue
                seen.add(place)
                holes = _holes(plan, array, layout, *place)
                if holes is not None:
                    yield Sighting(layout, *place, holes)


def _hits(plan: Haystack, needle: bytes, start: int, stop: int) -> Iterator[int]:
    hit = plan.find(needle, start, stop)
    for _ in range(_MAX_HITS):
        if hit < 0:
            return
        yield hit
        hit = plan.find(needle, hit + 1, stop)


def _holes(
    plan: Any, array: NDArray[Any], layout: Layout, offset: int, pitch: int
) -> tuple[tuple[int, int], ...] | None:
    """Ranges of flat elements that differ from the tensor; None where it is no copy of it at all."""
    try:
        there = copy_of(plan, offset, pitch, layout, array.dtype)
    except ValueError:
        return None
    kind = f"u{array.itemsize}"
    wrong = there.view(kind).reshape(-1) != np.ascontiguousarray(array).view(kind).reshape(-1)
    if wrong.sum() * 2 > wrong.size:
        return None
    edges = np.flatnonzero(np.diff(np.concatenate([[False], wrong, [False]]).astype(np.int8)))
    if edges.size > 2 * _MAX_HOLES:
        return None
    return tuple((int(a), int(b)) for a, b in edges.reshape(-1, 2))


def _standout(layout: Layout, array: NDArray[Any]) -> tuple[int, bytes]:
    """A window of the copy with many different values, and the position it starts at."""
    length = WINDOW // array.itemsize
    if layout.size <= length:
        copy = layout.pack(array)
        last = int(layout.positions(np.array([array.size - 1]))[0])
        return 0, copy[: last + 1].tobytes()
    starts = np.linspace(0, layout.size - length, 8).astype(np.int64)
    windows = [_window(layout, array, int(start), length) for start in starts]
    best = int(np.argmax([np.unique(window).size for window in windows]))
    return int(starts[best]), windows[best].tobytes()


def _row(layout: Layout, array: NDArray[Any], row: int) -> bytes:
    length = min(layout.row, WINDOW)
    return _window(layout, array, row * layout.row, length).tobytes()


def _window(layout: Layout, array: NDArray[Any], start: int, length: int) -> NDArray[Any]:
    elements = layout.elements(np.arange(start, start + length))
    return np.where(elements < 0, array.dtype.type(0), array.reshape(-1)[elements])


def resolve(
    plan_size: int,
    order: Iterable[str],
    found: Mapping[str, tuple[Sighting, ...]],
    widths: Mapping[str, int],
) -> Resolved:
    """One place for each tensor. `order`: the tensors as the graph uses them; `widths`: bytes of an element.

    A tensor with one place gets it, large ones first; equal tensors with one place share it. Places
    that overlap a placed tensor are out. What is still open is settled by order, where the plan is seen to
    keep weights in the order of the graph, or its reverse: then a tensor lies between its neighbours.
    """
    return _Resolver(plan_size, order, found, widths).run()


class _Resolver:
    def __init__(
        self,
        plan_size: int,
        order: Iterable[str],
        found: Mapping[str, tuple[Sighting, ...]],
        widths: Mapping[str, int],
    ) -> None:
        self.order = [name for name in order if name in found]
        self.widths = widths
        self.taken = np.zeros(plan_size, dtype=np.uint8)
        self.placed: dict[str, Sighting] = {}
        self.missing: dict[str, str] = {}
        self.found = found
        groups: dict[frozenset[tuple[int, int]], list[str]] = {}
        for name in self.order:
            groups.setdefault(frozenset(s.place for s in found[name]), []).append(name)
        self.groups = list(groups.values())

    def run(self) -> Resolved:
        by_size = sorted(self.groups, key=lambda names: -self.found[names[0]][0].layout.size)
        open_groups = [names for names in by_size if not self._settle_alone(names)]
        progress = True
        while progress:
            progress = False
            for settle in (self._settle_alone, self._settle_by_order):
                left = [names for names in open_groups if not settle(names)]
                progress |= len(left) < len(open_groups)
                open_groups = left
        for name in (name for names in open_groups for name in names):
            self.missing[name] = (
                f"its bytes lie at {len(self.found[name])} places, and its neighbours do not tell which"
            )
        copies = {
            name: tuple(s.offset for s in self.found[name] if s.place != sighting.place)
            for name, sighting in self.placed.items()
        }
        return Resolved(self.placed, self.missing, {n: c for n, c in copies.items() if c})

    def _free(self, name: str) -> list[Sighting]:
        return [s for s in self.found[name] if not self._bytes(name, s).any()]

    def _bytes(self, name: str, s: Sighting) -> NDArray[np.uint8]:
        return view(self.taken, s.offset, s.pitch, s.layout, np.dtype(f"V{self.widths[name]}"))

    def _place(self, name: str, sighting: Sighting) -> None:
        self.placed[name] = sighting
        self._bytes(name, sighting)[...] = 1

    def _settle_alone(self, names: list[str]) -> bool:
        """Place a group that has one free place; drop one that has none."""
        free = {s.place for s in self._free(names[0])}
        if len(free) > 1:
            return False
        for name in names:
            sighting = next((s for s in self.found[name] if s.place in free), None)
            if sighting is None:
                self.missing[name] = "its bytes are found only inside another tensor's"
            else:
                self._place(name, sighting)
        return True

    def _settle_by_order(self, names: list[str]) -> bool:
        """Place a group whose members each have one free place between their neighbours, in the plan's order."""
        direction = self._direction()
        free = sorted(self._free(names[0]), key=lambda s: s.offset)
        if not direction:
            return False
        if len(names) == 1:
            between = [s for s in free if self._fits(names[0], s.offset)]
            if len(between) == 1:
                self._place(names[0], between[0])
            return len(between) == 1
        if len(names) != len(free):
            return False
        offsets = [s.offset for s in free][::direction]
        if not all(self._fits(n, o, skip=names) for n, o in zip(names, offsets, strict=True)):
            return False
        for name, offset in zip(names, offsets, strict=True):
            self._place(name, next(s for s in self.found[name] if s.offset == offset))
        return True

    def _fits(self, name: str, offset: int, skip: Iterable[str] = ()) -> bool:
        """Whether an offset lies between those of the nearest placed tensors before and after `name`."""
        at = self.order.index(name)
        skipped = set(skip)
        sides = [
            next(
                (self.placed[n].offset for n in part if n in self.placed and n not in skipped), None
            )
            for part in (reversed(self.order[:at]), self.order[at + 1 :])
        ]
        if sides[0] is None and sides[1] is None:
            return False
        before, after = sides[:: self._direction()]
        return (before is None or before < offset) and (after is None or offset < after)

    def _direction(self) -> int:
        """1 where the plan keeps the graph's order, -1 for its reverse, 0 where it keeps neither."""
        offsets = np.array([self.placed[n].offset for n in self.order if n in self.placed])
        steps = np.sign(np.diff(offsets))
        steps = steps[steps != 0]
        if steps.size == 0 or abs(steps.mean()) < _ORDERLY:
            return 0
        return 1 if steps.mean() > 0 else -1
