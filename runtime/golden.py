"""The golden run of one set of images: its layers, and the tensors kept between them."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.runtime.forms import Lowered
from resq_deploy.runtime.ort import CHUNK, OrtRunner
from resq_deploy.runtime.runner import Images
from resq_deploy.runtime.segments import Tensors
from resq_deploy.runtime.stages import in_parts, part_sizes

WIDE_CHUNK = 32  # images at once, where the number does not matter for the result

Rows = NDArray[np.int64]
Span = tuple[int, int]


class GoldenRun:
    """Segments of a lowered graph, and the tensors that cross their cuts in a run without faults.

    Cut k lies in front of segment k. `kept`: the cuts whose tensors are all at hand, the first and the
    last always; `memory` bytes bound what the others take, the largest are dropped first. `spans`:
    (begin, end) of the images that are run together; `whole`: images of a span must stay together,
    or bits could change. `cost`: seconds that each segment took.
    """

    def __init__(self, runner: OrtRunner, lowered: Lowered, images: Images, memory: int) -> None:
        self.runner, self.images = runner, images
        self.segments, self.sessions = runner.segments, runner.sessions
        self.input, self.output = runner.graph.inputs[0].name, runner.graph.outputs[0].name
        self.cost = [0.0] * len(self.segments)
        self.whole = any(s.row_sensitive for s in self.segments)
        step, count = (CHUNK if self.whole else WIDE_CHUNK), len(images)
        self.spans: list[Span] = [(i, min(i + step, count)) for i in range(0, count, step)]
        self.parts = part_sizes(lowered, self.segments)
        self._last = {n: k for k, s in enumerate(self.segments) for n in s.inputs}
        self._last[self.output] = len(self.segments)
        self.kept: set[int] = set()
        self.tensors: Tensors = {}
        self.row_bytes = 0
        self._store(memory)

    @property
    def stored(self) -> int:
        """Bytes of the tensors kept, the images not counted."""
        return sum(v.nbytes for n, v in self.tensors.items() if n != self.input)

    def at(self, name: str, rows: Rows) -> NDArray[Any]:
        """A kept tensor's rows of these images (ascending, or with repetitions); may be a view."""
        tensor = self.tensors[name]
        if len(rows) and (rows[1:] - rows[:-1] == 1).all():
            return tensor[rows[0] : rows[-1] + 1]
        return tensor[rows]

    def compares(self, k: int) -> bool:
        """Whether what comes out of segment k can be compared with golden tensors."""
        return k + 1 in self.kept

    def start(self, k: int) -> int:
        """Where to begin so that segment k gets its inputs."""
        return max(j for j in self.kept if j <= k)

    def crossing(self, live: Tensors, k: int) -> Tensors:
        """Those of the tensors that segments behind k still read."""
        return {n: v for n, v in live.items() if self._last.get(n, -1) > k}

    def inputs(self, k: int, live: Tensors, rows: Rows) -> Tensors:
        """What segment k reads: live tensors, golden ones where there is none."""
        names = self.segments[k].inputs
        return {n: live[n] if n in live else self.at(n, rows) for n in names}

    def _crossing(self, k: int) -> list[str]:
        """Tensors made before segment k and read in it or later."""
        made = [n for s in self.segments[:k] for n in s.outputs]
        return [n for n in (self.input, *made) if self._last.get(n, -1) >= k]

    def _store(self, memory: int) -> None:
        """Run golden and keep tensors, all of a cut or none, the largest cuts dropped first."""
        sizes = {n: v[:1].nbytes for n, v in self._chain(0, 1).items()}
        cuts = {k: self._crossing(k) for k in range(1, len(self.segments))}
        wanted = sorted(cuts, key=lambda k: sum(sizes[n] for n in cuts[k]))
        self.row_bytes = max((sum(sizes[n] for n in cuts[k]) for k in cuts), default=0)
        free = {self.input, self.output}
        for k in wanted:
            tensors = {n for j in (*self.kept, k) for n in cuts[j]} - free
            if sum(sizes[n] for n in tensors) * len(self.images) <= memory:
                self.kept.add(k)
        kept = {n for k in self.kept for n in cuts[k]} | {self.output}
        parts = self.runner.each(lambda s: self._chain(*s, kept), self.spans)
        self.tensors = {n: np.concatenate([p[n] for p in parts]) for n in kept - {self.input}}
        self.tensors[self.input] = self.images
        self.kept |= {0, len(self.segments)}

    def _chain(self, begin: int, end: int, kept: set[str] | None = None) -> Tensors:
        """All tensors of a golden run of some images, or those to be kept."""
        live: Tensors = {self.input: self.images[begin:end]}
        found: Tensors = {}
        for k, segment in enumerate(self.segments):
            began = time.perf_counter()
            live.update(in_parts(segment, self.sessions[k], live, self.parts[k]))
            self.cost[k] += time.perf_counter() - began
            if kept is not None:
                found.update({n: live[n] for n in segment.outputs if n in kept})
                live = self.crossing(live, k)
        return live if kept is None else found


def rows_differ(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows of two arrays of one shape differ in any bit."""
    x, y = (np.ascontiguousarray(v).reshape(len(v), -1).view(np.uint8) for v in (a, b))
    if x.shape[1] % 8 == 0:
        x, y = x.view(np.uint64), y.view(np.uint64)
    return np.asarray((x != y).any(axis=1))
