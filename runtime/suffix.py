"""Run again only what a fault can reach.

The tensors between the layers of a golden run are kept. A fault in layer k leaves everything before
k as it was, so a trial starts there; where it lies in few weights, only the channels that they make
are computed anew. Behind k an image goes on only while its tensors differ from the golden ones;
bit-identical again means masked. All of it is computed by the kernels of a full run on the same
numbers, so the logits are those of a full run, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from resq_deploy.faults import Flips
from resq_deploy.runtime.alone import SingleRun, Trial
from resq_deploy.runtime.channels import ChannelKernel, Channels, channel_kernel
from resq_deploy.runtime.forms import Lowered
from resq_deploy.runtime.golden import GoldenRun
from resq_deploy.runtime.ort import Changed, OrtRunner, same_nodes
from resq_deploy.runtime.runner import Images, Logits
from resq_deploy.runtime.sharing import Share, SharedRun, groups
from resq_deploy.runtime.stages import same_bytes

MEMORY = 2**30  # default budget for golden tensors, bytes
_FULL = 0.8  # several faults in front of so much of the work: a full run is as fast
_FEW_CHANNELS = 8  # channels are recomputed alone up to one in so many


@dataclass(slots=True)
class Work:
    """What trials have cost: full runs among them, and images run through layers, of all there are."""

    trials: int = 0
    full: int = 0
    layer_images: int = 0
    possible: int = 0


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
        self._kernels: dict[int, ChannelKernel] = {}
        self._readers: dict[str, list[int]] = {}
        self._run: GoldenRun | None = None
        if runner.lowered is not None and runner.segments:
            self._prepare(runner.lowered, memory)

    @property
    def info(self) -> dict[str, Any]:
        """For the report: cuts and bytes kept, layers that are recomputed by channel, the runner's."""
        run = self._run
        return {
            "engine": "suffix",
            **self.runner.info,
            "layers": len(run.segments) if run else 0,
            "cuts": len(run.kept) if run else 0,
            "bytes": run.stored if run else 0,
            "by_channel": len(self._kernels),
        }

    def golden(self) -> Logits:
        """Logits without faults, float32 [N, classes]; the same bits at every call."""
        return self._logits.copy()

    def run(self, flips: Flips) -> Logits:
        """Logits of all images with these bits flipped, float32 [N, classes]."""
        return self._alone(flips, self._ready(flips))

    def run_many(self, trials: Sequence[Flips]) -> list[Logits]:
        """As `run` for each of these, bit for bit; trials that change few channels of one layer share work."""
        found, shares = [], list[Share]()
        for index, flips in enumerate(trials):
            ready = self._ready(flips)
            share = self._share(index, ready)
            if share is not None:
                shares.append(share)
            found.append(self._logits.copy() if share else self._alone(flips, ready))
        if shares:
            self._together(shares, found)
            self.runner.check_golden({name for s in shares for name in trials[s.trial]})
        return found

    # trials

    def _alone(self, flips: Flips, trial: Trial | None) -> Logits:
        golden = self._run
        self._count(1)
        if trial is None or golden is None:
            self.work.full += 1
            with self.runner.faults(flips):
                return self.runner(self.images)
        if not trial.faulty:
            return self._logits.copy()
        rebuilt = [k for k in trial.faulty if k not in trial.channels]
        built = self.runner.each(lambda k: golden.segments[k].build(trial.arrays), rebuilt)
        trial.sessions.update(zip(rebuilt, built, strict=True))
        runs = [SingleRun(golden, self._kernels, trial, span) for span in golden.spans]
        parts = self.runner.each(SingleRun.logits, runs)
        self.work.layer_images += sum(run.layer_images for run in runs)
        self.runner.check_golden(flips)
        return np.concatenate(parts)

    def _together(self, shares: list[Share], found: list[Logits]) -> None:
        """Put the logits that differ from the golden ones into `found`, trial by trial."""
        golden = self._run
        assert golden is not None
        self._count(len(shares))
        for some in groups(golden, shares):
            runs = [SharedRun(golden, self._kernels, some, span) for span in golden.spans]
            for trials, images, logits in self.runner.each(SharedRun.logits, runs):
                if logits is not None:
                    for trial in np.unique(trials):
                        found[trial][images[trials == trial]] = logits[trials == trial]
            self.work.layer_images += sum(run.layer_images for run in runs)

    def _count(self, trials: int) -> None:
        self.work.trials += trials
        layers = len(self._run.segments) if self._run else 1
        self.work.possible += trials * len(self.images) * layers

    # preparation

    def _prepare(self, lowered: Lowered, memory: int) -> None:
        golden = GoldenRun(self.runner, lowered, self.images, memory)
        if not same_bytes(golden.tensors[golden.output], self._logits):
            return  # a cut changed a bit: run in full
        self._run = golden
        for k, segment in enumerate(golden.segments):
            for name in segment.params:
                self._readers.setdefault(name, []).append(k)
            kernel = channel_kernel(segment, lowered.arrays) if golden.compares(k) else None
            if kernel is not None and self._agrees(golden, kernel, lowered):
                self._kernels[k] = kernel

    def _agrees(self, golden: GoldenRun, kernel: ChannelKernel, lowered: Lowered) -> bool:
        """Check a kernel by channels against the golden run, before it is trusted."""
        rows = np.arange(min(8, len(self.images)))
        inputs = kernel.segment.inputs
        if not all(name in golden.tensors for name in inputs):
            return False
        live = {name: golden.at(name, rows) for name in inputs}
        for some in ([0], [kernel.size - 1], [0, kernel.size // 2], range(min(kernel.size, 48))):
            channels = np.unique(np.array(some, dtype=np.int64))
            try:
                out = kernel.run(live, channels, kernel.params(lowered.arrays, channels))
            except Exception:
                return False
            want = {n: golden.at(n, rows)[..., channels] for n in out}
            if not all(same_bytes(v, np.ascontiguousarray(want[n])) for n, v in out.items()):
                return False
        return True

    def _ready(self, flips: Flips) -> Trial | None:
        """What a trial changes; None where it is best, or only, run in full."""
        before = self.runner.lowered
        golden = self._run
        if golden is None or before is None:
            return None
        changed = self.runner.changed(flips)
        if self.runner.is_odd(changed):
            return None
        after = self.runner.relowered(changed)
        if not same_nodes(before, after):
            return None
        faulty = self._faulty(changed, before, after)
        if len(faulty) > 1 and sum(golden.cost[faulty[0] :]) > _FULL * sum(golden.cost):
            return None
        few = self._channels(golden, faulty[0], before, after, flips) if faulty else None
        return Trial(after.arrays, faulty, {} if few is None else {faulty[0]: few})

    def _share(self, index: int, trial: Trial | None) -> Share | None:
        """A trial as one that shares work; None where it changes more than channels of one layer."""
        golden = self._run
        if trial is None or golden is None or golden.whole or len(trial.faulty) != 1:
            return None
        for k, channels in trial.channels.items():
            return Share(index, k, channels, self._kernels[k].params(trial.arrays, channels))
        return None

    def _faulty(self, changed: Changed, before: Lowered, after: Lowered) -> tuple[int, ...]:
        if self.runner.weights_only(changed):
            return tuple(sorted({k for n in changed for k in self._readers.get(n, ())}))
        pairs = [(n, before.arrays[n], after.arrays[n]) for n in self._readers]
        different = [n for n, a, b in pairs if not same_bytes(a, b)]
        return tuple(sorted({k for n in different for k in self._readers[n]}))

    def _channels(
        self, golden: GoldenRun, k: int, before: Lowered, after: Lowered, flips: Flips
    ) -> Channels | None:
        kernel = self._kernels.get(k)
        if kernel is None or k not in golden.kept:
            return None
        channels = kernel.touched(before.arrays, after.arrays, flips)
        few = channels is not None and 0 < len(channels) <= max(1, kernel.size // _FEW_CHANNELS)
        return channels if few else None
