"""Opening a trial engine in a worker: a value that can be sent there, and the choice of the fastest exact engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resq_deploy.bundle import Bundle
from resq_deploy.runtime.machine import cores
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.runner import Images, Runner, open_runner
from resq_deploy.runtime.suffix import MEMORY, SuffixEngine
from resq_deploy.runtime.trials import PlainEngine, TrialEngine


@dataclass(frozen=True, slots=True, eq=False)
class OpenEngine:
    """Opens `bundle` (a path; verified before) on `backend` with a fixed set of images: `factory(threads)`."""

    bundle: str
    backend: str
    images: Images
    options: dict[str, Any] = field(default_factory=dict)

    def __call__(self, threads: int) -> TrialEngine:
        """The engine, on this many threads where the backend has threads."""
        options = {**self.options, "threads": threads} if self.backend == "ort" else self.options
        bundle = Bundle.open(self.bundle, verify=False)
        share = MEMORY * threads // cores()  # workers share what golden tensors may take
        return engine_of(open_runner(bundle, self.backend, **options), self.images, max(share, 1))


def engine_of(runner: Runner, images: Images, memory: int = MEMORY) -> TrialEngine:
    """The fastest engine of this runner whose logits are those of full runs, bit for bit.

    `memory`: bytes that it may keep golden tensors in.
    """
    if isinstance(runner, OrtRunner):
        return SuffixEngine(runner, images, memory=memory)
    return PlainEngine(runner, images)
