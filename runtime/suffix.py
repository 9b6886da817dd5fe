"""Run again only what a fault can reach.

The tensors between the layers of a golden run are kept. A fault in layer k leaves everything before
k as it was, so a trial starts there; where it lies in few weights, only the channels that they make
are computed anew. Behind k an image goes on only while its tensors differ from the golden ones;
bit-identical again means masked. All of it is computed by the kernels of a full run on the same
numbers, so the logits are those of a full run, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from resq_deploy.faults import Flips
from resq_deploy.runtime.channels import ChannelKernel, Channels, channel_kernel
from resq_deploy.runtime.forms import Lowered
from resq_deploy.runtime.ort import CHUNK, Changed, OrtRunner, same_nodes
from resq_deploy.runtime.runner import Images, Logits
from resq_deploy.runtime.segments import Segment, Tensors
from resq_deploy.runtime.stages import in_parts, part_sizes, same_bytes

MEMORY = 2**30  # default budget for golden tensors, bytes
_WIDE_CHUNK = 32  # images at once, where the number does not matter for the result
_FULL = 0.8  # several faults in front of so much of the work: a full run is as fast
_FEW_CHANNELS = 8  # channels are recomputed alone up to one in so many

Rows = NDArray[np.int64]


@dataclass(slots=True)
class Work:
    """What trials have cost: full runs among them, and images run through layers, of all there are."""

    trials: int = 0
    full: int = 0
    layer_images: int = 0
    possible: int = 0


@dataclass(frozen=True, slots=True)
class _Trial:
    """A trial made ready: parameters, faulty segments, and for these the channels or a session."""

    arrays: dict[str, NDArray[Any]]
    faulty: tuple[int, ...]
    channels: dict[int, Channels] = field(default_factory=dict)
    sessions: dict[int, ort.InferenceSession] = field(default_factory=dict)

    def next(self, k: int) -> int | None:
        """The first faulty segment from k on."""
        return next((f for f in self.faulty if f >= k), None)


@dataclass(slots=True)
class _State:
    """Images under way: their rows, and those of their tensors that may not be the golden ones."""

    rows: Rows
    live: Tensors


class SuffixEngine:
    """Faulty logits of one fixed set of images, by way of the golden run's tensors.

        engine = SuffixEngine(runner, images, memory=2**30)
        engine.golden()                # float32 [N, classes]
        engine.run(flips)              # the same bits as: with runner.faults(flips): runner(images)

    `memory` bytes bound the golden tensors; the largest are dropped first, and trials then start at
    the last ones kept. Where a graph cannot be cut, trials are full runs. Not for several threads.
    """

    def __init__(self, runner: OrtRunner, images: Images, *, memory: int = MEMORY) -> None:
        self.runner = runner
        self.images = np.ascontiguousarray(images, dtype=np.float32)
        self._logits = runner(self.images)
        self.work = Work()
        self._input, self._output = runner.graph.inputs[0].name, runner.graph.outputs[0].name
        self._segments: tuple[Segment, ...] = ()
        self._kernels: dict[int, ChannelKernel] = {}
        self._tensors: Tensors = {}
        self._kept: set[int] = set()
        self._whole = False
        self._readers: dict[str, list[int]] = {}
        if runner.lowered is not None:
            self._prepare(runner.lowered, memory)

    @property
    def info(self) -> dict[str, Any]:
        """For the report: cuts and bytes kept, layers that are recomputed by channel, the runner's."""
        stored = sum(v.nbytes for n, v in self._tensors.items() if n != self._input)
        return {
            "engine": "suffix",
            **self.runner.info,
            "layers": len(self._segments),
            "cuts": len(self._kept),
            "bytes": stored,
            "by_channel": len(self._kernels),
        }

    def golden(self) -> Logits:
        """Logits without faults, float32 [N, classes]; the same bits at every call."""
        return self._logits.copy()

    def order(self, trials: Sequence[Flips]) -> list[int]:
        """Indices of trials, sorted so that those that start at the same layer follow each other."""
        starts = [min((k for n in t for k in self._readers.get(n, ())), default=0) for t in trials]
        return sorted(range(len(trials)), key=lambda i: (starts[i], i))

    def run(self, flips: Flips) -> Logits:
        """Logits of all images with these bits flipped, float32 [N, classes]."""
        self.work.trials += 1
        self.work.possible += len(self.images) * max(1, len(self._segments))
        trial = self._ready(flips)
        if trial is None:
            self.work.full += 1
            with self.runner.faults(flips):
                return self.runner(self.images)
        if not trial.faulty:
            return self._logits.copy()
        parts = self.runner.each(lambda span: self._run(trial, span), self._spans)
        self.runner.check_golden(flips)
        return np.concatenate(parts)

    # preparation

    def _prepare(self, lowered: Lowered, memory: int) -> None:
        self._segments, self._sessions = self.runner.segments, self.runner.sessions
        self._cost = [0.0] * len(self._segments)
        self._whole = any(s.row_sensitive for s in self._segments)
        step = CHUNK if self._whole else _WIDE_CHUNK
        count = len(self.images)
        self._spans = [(i, min(i + step, count)) for i in range(0, count, step)]
        self._parts = part_sizes(lowered, self._segments)
        self._last = {n: k for k, s in enumerate(self._segments) for n in s.inputs}
        self._last[self._output] = len(self._segments)
        for k, segment in enumerate(self._segments):
            for name in segment.params:
                self._readers.setdefault(name, []).append(k)
        self._store(memory)
        if not same_bytes(self._tensors[self._output], self._logits):
            self._segments, self._tensors = (), {}  # a cut changed a bit: run in full
            return
        for k, segment in enumerate(self._segments):
            kernel = channel_kernel(segment, lowered.arrays) if self._compares(k) else None
            if kernel is not None and self._agrees(kernel, lowered):
                self._kernels[k] = kernel

    def _crossing(self, k: int) -> list[str]:
        """Tensors made before segment k and read in it or later."""
        made = [n for s in self._segments[:k] for n in s.outputs]
        return [n for n in (self._input, *made) if self._last.get(n, -1) >= k]

    def _store(self, memory: int) -> None:
        """Run golden and keep tensors, all of a cut or none, the largest cuts dropped first."""
        sizes = {n: v[:1].nbytes for n, v in self._chain(0, 1).items()}
        cuts = {k: self._crossing(k) for k in range(1, len(self._segments))}
        wanted = sorted(cuts, key=lambda k: sum(sizes[n] for n in cuts[k]))
        free = {self._input, self._output}
        for k in wanted:
            tensors = {n for j in (*self._kept, k) for n in cuts[j]} - free
            if sum(sizes[n] for n in tensors) * len(self.images) <= memory:
                self._kept.add(k)
        kept = {n for k in self._kept for n in cuts[k]} | {self._output}
        parts = self.runner.each(lambda s: self._chain(*s, kept), self._spans)
        self._tensors = {n: np.concatenate([p[n] for p in parts]) for n in kept - {self._input}}
        self._tensors[self._input] = self.images
        self._kept |= {0, len(self._segments)}

    def _chain(self, begin: int, end: int, kept: set[str] | None = None) -> Tensors:
        """All tensors of a golden run of some images, or those to be kept."""
        live: Tensors = {self._input: self.images[begin:end]}
        found: Tensors = {}
        for k, segment in enumerate(self._segments):
            began = time.perf_counter()
            live.update(in_parts(segment, self._sessions[k], live, self._parts[k]))
            self._cost[k] += time.perf_counter() - began
            if kept is not None:
                found.update({n: live[n] for n in segment.outputs if n in kept})
                live = {n: v for n, v in live.items() if self._last.get(n, -1) > k}
        return live if kept is None else found

    def _compares(self, k: int) -> bool:
        """Whether what comes out of segment k can be compared with golden tensors."""
        return k + 1 in self._kept

    def _agrees(self, kernel: ChannelKernel, lowered: Lowered) -> bool:
        """Check a kernel by channels against the golden run, before it is trusted."""
        rows = np.arange(min(8, len(self.images)))
        live = {n: self._golden(n, rows) for n in kernel.segment.inputs if n in self._tensors}
        if len(live) != len(kernel.segment.inputs):
            return False
        for some in ([0], [kernel.size - 1], [0, kernel.size // 2]):
            channels = np.unique(np.array(some, dtype=np.int64))
            try:
                out = kernel.run(live, lowered.arrays, channels)
            except Exception:
                return False
            golden = {n: self._golden(n, rows)[..., channels] for n in out}
            if not all(same_bytes(v, np.ascontiguousarray(golden[n])) for n, v in out.items()):
                return False
        return True

    # one trial

    def _ready(self, flips: Flips) -> _Trial | None:
        """What a trial changes; None where it is best, or only, run in full."""
        before = self.runner.lowered
        if not self._segments or before is None:
            return None
        changed = self.runner.changed(flips)
        if self.runner.is_odd(changed):
            return None
        after = self.runner.relowered(changed)
        if not same_nodes(before, after):
            return None
        faulty = self._faulty(changed, before, after)
        if len(faulty) > 1 and sum(self._cost[faulty[0] :]) > _FULL * sum(self._cost):
            return None
        trial = _Trial(after.arrays, faulty)
        rebuilt = []
        for k in faulty:
            few = self._channels(k, before, after, flips) if k == faulty[0] else None
            if few is not None:
                trial.channels[k] = few
            else:
                rebuilt.append(k)
        built = self.runner.each(lambda k: self._segments[k].build(after.arrays), rebuilt)
        trial.sessions.update(zip(rebuilt, built, strict=True))
        return trial

    def _faulty(self, changed: Changed, before: Lowered, after: Lowered) -> tuple[int, ...]:
        if self.runner.weights_only(changed):
            return tuple(sorted({k for n in changed for k in self._readers.get(n, ())}))
        pairs = [(n, before.arrays[n], after.arrays[n]) for n in self._readers]
        different = [n for n, a, b in pairs if not same_bytes(a, b)]
        return tuple(sorted({k for n in different for k in self._readers[n]}))

    def _channels(self, k: int, before: Lowered, after: Lowered, flips: Flips) -> Channels | None:
        kernel = self._kernels.get(k)
        if kernel is None or k not in self._kept:
            return None
        channels = kernel.touched(before.arrays, after.arrays, flips)
        few = channels is not None and 0 < len(channels) <= max(1, kernel.size // _FEW_CHANNELS)
        return channels if few else None

    def _golden(self, name: str, rows: Rows) -> NDArray[Any]:
        tensor = self._tensors[name]
        if len(rows) and len(rows) == rows[-1] - rows[0] + 1:
            return tensor[rows[0] : rows[-1] + 1]
        return tensor[rows]

    def _start(self, k: int) -> int:
        return max(j for j in self._kept if j <= k)

    def _run(self, trial: _Trial, span: tuple[int, int]) -> Logits:
        """Logits of the images of one span."""
        everyone = np.arange(*span)
        state, k = _State(everyone, {}), self._start(trial.faulty[0])
        while k < len(self._segments):
            if not len(state.rows):
                following = trial.next(k)
                if following is None:
                    break
                state, k = _State(everyone, {}), self._start(following)
            if k in trial.faulty and len(state.rows) < len(everyone):
                self._rejoin(state, everyone)
            self._step(trial, k, state)
            k += 1
        logits = self._logits[slice(*span)].copy()
        if self._output in state.live:
            logits[state.rows - span[0]] = state.live[self._output]
        return logits

    def _rejoin(self, state: _State, everyone: Rows) -> None:
        """All images go on, those that were dropped with their golden tensors."""
        for name, value in state.live.items():
            full = self._golden(name, everyone).copy()
            full[state.rows - everyone[0]] = value
            state.live[name] = full
        state.rows = everyone

    def _step(self, trial: _Trial, k: int, state: _State) -> None:
        """Run segment k, then keep the images and tensors that differ from the golden ones."""
        segment = self._segments[k]
        self.work.layer_images += len(state.rows)
        inputs = {
            n: state.live[n] if n in state.live else self._golden(n, state.rows)
            for n in segment.inputs
        }
        following = trial.next(k + 1)
        drop = not self._whole and (following is None or following in self._kept)
        if k in trial.channels and not state.live:
            self._step_channels(trial, k, state, inputs, drop)
            return
        session = trial.sessions.get(k) or self._sessions[k]
        state.live.update(in_parts(segment, session, inputs, self._parts[k]))
        state.live = {n: v for n, v in state.live.items() if self._last.get(n, -1) > k}
        if self._compares(k):
            masks = {n: _rows_differ(v, self._golden(n, state.rows)) for n, v in state.live.items()}
            self._keep(state, masks, drop)

    def _step_channels(
        self, trial: _Trial, k: int, state: _State, inputs: Tensors, drop: bool
    ) -> None:
        channels = trial.channels[k]
        some = self._kernels[k].run(inputs, trial.arrays, channels)
        golden = {n: self._golden(n, state.rows) for n in some}
        masks = {n: _rows_differ(v, golden[n][..., channels]) for n, v in some.items()}
        state.live = dict(some)
        self._keep(state, masks, drop)
        for name, value in state.live.items():
            full = self._golden(name, state.rows).copy()
            full[..., channels] = value
            state.live[name] = full

    def _keep(self, state: _State, masks: dict[str, NDArray[np.bool_]], drop: bool) -> None:
        """Go on with the images that differ (all of them, unless `drop`) and the tensors that do."""
        mask = np.zeros(len(state.rows), bool)
        for different in masks.values():
            mask |= different
        if not mask.any() and (drop or self._whole):
            state.rows, state.live = state.rows[:0], {}
            return
        state.live = {n: v for n, v in state.live.items() if masks[n].any()}
        if drop and not mask.all():
            state.rows = state.rows[mask]
            state.live = {n: v[mask] for n, v in state.live.items()}


def _rows_differ(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """Which rows of two arrays of one shape differ in any bit."""
    x, y = (np.ascontiguousarray(v).reshape(len(v), -1).view(np.uint8) for v in (a, b))
    if x.shape[1] % 8 == 0:
        x, y = x.view(np.uint64), y.view(np.uint64)
    return np.asarray((x != y).any(axis=1))
