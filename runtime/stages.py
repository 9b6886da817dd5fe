"""Which segments run after each other, and on how many images at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from resq_deploy.runtime.forms import Lowered
from resq_deploy.runtime.graph import Arrays
from resq_deploy.runtime.segments import Segment, Tensors, run_segment

_WIDE = 2**15  # from so many values of one layer on, the patches of few images fill a core's cache
_SMALL = 2**12  # up to so many, starting a run costs more than the cache gives
_BUILDS = 4  # sessions that share the weights about evenly
_FEW, _SOME, _MANY = 2, 8, 32  # images at once in wide layers, between, and in small ones


@dataclass(frozen=True)
class Stages:
    """Segments with their sessions, and how many images each is given at once."""

    segments: tuple[Segment, ...] = ()
    sessions: tuple[ort.InferenceSession, ...] = ()
    parts: tuple[int, ...] = ()

    def run(self, live: Tensors) -> Tensors:
        """All tensors that leave a segment, for one chunk of images."""
        live = dict(live)
        for segment, session, part in zip(self.segments, self.sessions, self.parts, strict=True):
            live |= in_parts(segment, session, live, part)
        return live


def in_parts(segment: Segment, session: ort.InferenceSession, live: Tensors, part: int) -> Tensors:
    """A segment's outputs, computed for `part` images at a time."""
    first = live[segment.inputs[0]]
    count = len(first) if first.ndim else 0
    if count <= part:
        return run_segment(segment, session, live)
    inputs = {n: live[n] for n in segment.inputs}
    parts = [run_segment(segment, session, some) for some in parts_of(inputs, part)]
    return {name: np.concatenate([p[name] for p in parts]) for name in segment.outputs}


def parts_of(live: Tensors, part: int) -> Iterator[Tensors]:
    """`part` rows of each tensor at a time."""
    count = len(next(iter(live.values())))
    for i in range(0, count, part):
        yield {name: value[i : i + part] for name, value in live.items()}


def part_sizes(lowered: Lowered, segments: Sequence[Segment]) -> tuple[int, ...]:
    """Images at once: few where maps are large, so that a layer's patches stay in the cache."""
    ends = [*(s.begin for s in segments[1:]), len(lowered.nodes)]
    layers = list(zip(lowered.starts, lowered.sizes, strict=True))
    widest = [
        max((size for at, size in layers if s.begin <= at < end), default=0)
        for s, end in zip(segments, ends, strict=True)
    ]
    return tuple(_images_at_once(size) for size in widest)


def _images_at_once(size: int) -> int:
    if size > _WIDE:
        return _FEW
    return _MANY if 0 < size <= _SMALL else _SOME


def merged(lowered: Lowered, segments: Sequence[Segment]) -> list[int] | None:
    """Where to cut for full runs: behind wide layers, and where a quarter of the weights is full.

    The second because faulty sessions are built in parallel. Fewer cuts than layers change no bit where
    all that crosses is bytes: ONNX Runtime can fuse no float operators there. None where it is not so.
    """
    crossing = {n for s in segments[1:] for n in s.inputs}
    types = segments[0].types
    if any(types[n] != onnx.TensorProto.UINT8 for n in crossing):
        return None
    if any(s.row_sensitive for s in segments):
        return None
    sizes = part_sizes(lowered, segments)
    wide = max((k for k, size in enumerate(sizes) if size == _FEW), default=-1)
    bytes_of = [sum(lowered.arrays[n].nbytes for n in s.params) for s in segments]
    starts, held = [], 0
    for k, segment in enumerate(segments):
        if k and (k == wide + 1 or held + bytes_of[k] > sum(bytes_of) / _BUILDS):
            starts.append(segment.begin)
            held = 0
        held += bytes_of[k]
    return starts


def image_major(segments: Sequence[Segment], probe: Sequence[Tensors]) -> list[int]:
    """The starts of segments at which all that crosses holds one row for each image, in order.

    `probe`: all tensors of a run of two images, and of a run of the second of them.
    """
    both, second = probe
    bad = {n for n in both if not _is_row_of(both[n], second[n])}
    last = {n: k for k, s in enumerate(segments) for n in s.inputs}
    made = {n: k for k, s in enumerate(segments) for n in s.outputs}
    return [
        s.begin
        for k, s in enumerate(segments)
        if s.begin and not any(made.get(n, 0) < k <= last.get(n, -1) for n in bad)
    ]


def _is_row_of(both: NDArray[Any], second: NDArray[Any]) -> bool:
    if both.ndim == 0 or len(both) != 2 or both[1:].shape != second.shape:
        return False
    near = np.isclose(both[1:].astype(np.float32), second, rtol=0.02, atol=1e-3, equal_nan=True)
    return bool(near.mean() > 0.9)


def same_segment(old: Segment, new: Segment, before: Arrays, after: Arrays) -> bool:
    """Whether two segments compute the same: equal nodes and equal bytes of parameters."""
    same = len(old.nodes) == len(new.nodes) and all(
        a is b or a == b for a, b in zip(old.nodes, new.nodes, strict=True)
    )
    return same and all(same_bytes(before[n], after[n]) for n in old.params)


def same_bytes(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays hold the same bytes (NaNs too)."""
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())
