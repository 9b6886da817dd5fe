"""Engines that worker processes can open by name, well-behaved and not."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import BackendError
from resq_deploy.fault_models import parse
from resq_deploy.faults import Flips
from resq_deploy.metrics import Logits
from resq_deploy.runtime.double import NumpyRunner
from resq_deploy.runtime.trials import Job, PlainEngine

IMAGES = 16
RUNNER = NumpyRunner()
SAMPLE = RUNNER.sample(IMAGES)


def job(text: str = "seu", seed: int = 0) -> Job:
    return Job(parse(text), RUNNER.space.select(kinds=["weights"]), seed, SAMPLE.labels)


def plain() -> PlainEngine:
    return PlainEngine(RUNNER, SAMPLE.images)


@dataclass(frozen=True)
class Opens:
    """Opens the double; each trial takes `seconds` longer, divided by threads ** `gain`."""

    seconds: float = 0.0
    gain: float = 1.0

    def __call__(self, threads: int) -> Slow:
        return Slow(self.seconds / threads**self.gain)


class Slow(PlainEngine):
    def __init__(self, seconds: float) -> None:
        runner = NumpyRunner()
        super().__init__(runner, runner.sample(IMAGES).images)
        self.seconds = seconds

    def run(self, flips: Flips) -> Logits:
        time.sleep(self.seconds)
        return super().run(flips)


@dataclass(frozen=True)
class Misbehaves:
    """Does `how` when bit 7 of a weight of fc2 is flipped, `once` (a file tells) or always."""

    how: str
    once: str = ""

    def __call__(self, threads: int) -> Bad:
        return Bad(self.how, self.once)


class Bad(Slow):
    def __init__(self, how: str, once: str) -> None:
        super().__init__(0.0)
        self.how, self.once = how, once

    def run(self, flips: Flips) -> Logits:
        if is_bad(flips) and not (self.once and Path(self.once).exists()):
            if self.once:
                Path(self.once).touch()
            self.misbehave()
        return super().run(flips)

    def misbehave(self) -> None:
        if self.how == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self.how == "exit":
            os._exit(3)
        elif self.how == "hang":
            time.sleep(600)
        elif self.how == "refuse":
            raise BackendError("memory is not back", "restart it")
        else:
            raise TypeError("a bug of ours")


@dataclass(frozen=True)
class Together:
    """As `Misbehaves`, with an engine that runs trials in blocks; "" behaves."""

    how: str
    once: str = ""

    def __call__(self, threads: int) -> Blocks:
        return Blocks(self.how, self.once)


class Blocks(Bad):
    def __init__(self, how: str, once: str = "") -> None:
        super().__init__(how, once)
        self.sizes: list[int] = []

    def run_many(self, trials: list[Flips]) -> list[Logits]:
        self.sizes.append(len(trials))
        return [self.run(flips) for flips in trials]

    def misbehave(self) -> None:
        if self.how == "error":
            raise RuntimeError("a kernel failed")
        if self.how:
            super().misbehave()


def is_bad(flips: Flips) -> bool:
    return any(f.tensor == "fc2.weight" and f.bit == 7 for f in flips.faults())


@dataclass(frozen=True)
class CannotOpen:
    how: str

    def __call__(self, threads: int) -> PlainEngine:
        if self.how == "refuse":
            raise BackendError("no such device", "plug one in")
        os._exit(7)


@dataclass(frozen=True)
class Differs:
    """A golden run that is not the same in any two processes."""

    def __call__(self, threads: int) -> PlainEngine:
        return Noisy()


class Noisy(Slow):
    def __init__(self) -> None:
        super().__init__(0.0)

    def golden(self) -> Logits:
        noise: NDArray[np.float32] = np.float32(os.getpid() % 1000) * np.ones(1, np.float32)
        return super().golden() + noise
