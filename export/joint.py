"""Both threats at once, at their worst: an attacker who knows which bits flipped, and attacks the faulty artifact.

Campaigns on adversarial inputs (runtime/campaign.py) flip bits under inputs that were crafted for the golden network.
Here the inputs are crafted anew for each trial's faulty network, through the twin with the same flips in it, and run
on the artifact with the same flips in its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter
from resq_deploy.export.craft import craft
from resq_deploy.export.twin import Twin
from resq_deploy.faults import Flips
from resq_deploy.metrics import top1
from resq_deploy.runtime.runner import Runner
from resq_deploy.statistics import Estimate, Tally


@dataclass(frozen=True, slots=True)
class JointTrial:
    """Images of one trial that are right on the faulty artifact, out of `images`.

    `clean`: unattacked; `unaware`: under inputs crafted for the golden network; `aware`: crafted for this faulty one.
    An attacked image counts as right only where the same image is right unattacked.
    """

    images: int
    clean: int
    unaware: int
    aware: int


@dataclass(frozen=True, slots=True)
class JointResult:
    """All trials, and the mean shares with intervals that hold at any number of trials."""

    trials: tuple[JointTrial, ...]
    clean: Estimate
    unaware: Estimate
    aware: Estimate


def attack_faulty(
    twin: Twin,
    runner: Runner,
    sample: Sample,
    attack: str,
    eps: float | str,
    trials: Sequence[Flips],
    *,
    confidence: float = 0.95,
    seed: int = 0,
    reporter: Reporter | None = None,
    **params: Any,
) -> JointResult:
    """Attack the artifact with each trial's flips in it. `params` as for craft. Raises AttackError, FaultError."""
    say = reporter or Reporter()
    unaware = craft(twin, sample, attack, eps, seed=seed, **params)
    done = []
    with say.task(f"{attack} on faulty networks", len(trials), "trials") as task:
        for flips in trials:
            with twin.flipped(flips):
                aware = craft(twin, sample, attack, eps, seed=seed, **params)
            with runner.faults(flips):
                clean, both, known = (
                    _right(runner, images, sample) for images in (sample.images, unaware, aware)
                )
            done.append(_trial(clean, both, known))
            task.advance(1)
    return JointResult(
        tuple(done),
        *(_mean(len(sample), [getattr(t, name) for t in done], confidence) for name in _SHARES),
    )


_SHARES = ("clean", "unaware", "aware")


def _right(runner: Runner, images: NDArray[np.float32], sample: Sample) -> NDArray[np.bool_]:
    right: NDArray[np.bool_] = top1(runner(images)) == sample.labels
    return right


def _trial(
    clean: NDArray[np.bool_], unaware: NDArray[np.bool_], aware: NDArray[np.bool_]
) -> JointTrial:
    return JointTrial(
        clean.size, int(clean.sum()), int((clean & unaware).sum()), int((clean & aware).sum())
    )


def _mean(images: int, hits: Sequence[int], confidence: float) -> Estimate:
    tally = Tally(images)
    for count in hits:
        tally.add(count)
    return tally.estimate(confidence)
