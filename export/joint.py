"""Both threats at once, at their worst: an attacker who knows which bits flipped, and attacks the faulty artifact.

Campaigns on adversarial inputs (runtime/campaign.py) flip bits under inputs that were crafted for the golden network.
Here the inputs are crafted anew for each trial's faulty network, through the twin with the same flips in it; the
artifact runs them with the same flips in its memory (runtime/faulty.py), here or on a device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy.budget import parse_eps
from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import FaultError
from resq_deploy.export.craft import craft, parameters_of, white_box
from resq_deploy.export.footprint import gradient_batch
from resq_deploy.export.twin import Twin
from resq_deploy.fault_models import parse
from resq_deploy.faults import Flips
from resq_deploy.manifest import FaultyMemory
from resq_deploy.runtime.evidence import fault_label
from resq_deploy.runtime.faulty import JointResult, JointTrial, draw, measure
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.runner import Runner

__all__ = [
    "FaultyAttack",
    "JointResult",
    "JointTrial",
    "attack_faulty",
    "craft_faulty",
    "sets",
    "stored",
]

SAMPLES = 128  # images, of those that attacks are crafted on
TRIALS = 8
WHERE = ("weights",)


@dataclass(frozen=True, slots=True)
class FaultyAttack:
    """What `--attack-faulty` asks for: a white-box attack against memory with this bit error rate."""

    attack: str
    ber: float

    @classmethod
    def parse(cls, text: str) -> FaultyAttack:
        """`1e-3` (by PGD) or `apgd@1e-3`. Raises AttackError, FaultError."""
        attack, _, rate = text.strip().rpartition("@")
        try:
            ber = float(rate.removeprefix("ber="))
        except ValueError:
            ber = 0.0
        if not 0 < ber < 1:
            raise FaultError(f"a bit error rate of {rate!r}", "such as 1e-3, or apgd@1e-3")
        return cls(white_box(attack or "pgd"), ber)

    @property
    def model(self) -> str:
        """The fault model, as campaigns name it."""
        return f"ber:{self.ber:g}"

    @property
    def name(self) -> str:
        """How the bundle names it: `pgd@ber=1e-3`."""
        return f"{self.attack}@{fault_label(self.model)}"


def craft_faulty(
    twin: Twin,
    sample: Sample,
    attack: str,
    eps: float | str,
    trials: Sequence[Flips],
    *,
    seed: int = 0,
    reporter: Reporter | None = None,
    **params: Any,
) -> Iterator[NDArray[np.float32]]:
    """Inputs for each trial's faulty network, float32 [N, C, H, W] a trial. Raises AttackError."""
    white_box(attack)
    with (reporter or Reporter()).task(f"{attack} on faulty networks", len(trials), "trials") as t:
        for flips in trials:
            with twin.flipped(flips):
                made = craft(twin, sample, attack, eps, seed=seed, **params)
            yield made
            t.advance(1)


def sets(
    int8: onnx.ModelProto,
    deployed: onnx.ModelProto,
    sample: Sample,
    asked: Sequence[FaultyAttack],
    eps: float | str,
    trials: int,
    seed: int,
    reporter: Reporter,
) -> Iterator[tuple[str, Sample, dict[str, Any]]]:
    """Name, inputs and account of everything asked for, on the first 128 images; see `stored`."""
    if not asked:
        return
    twin, part = Twin(int8).eval(), sample.take(SAMPLES)
    size = gradient_batch(int8)
    with OrtRunner(deployed) as runner:
        for one in asked:
            moved, account = stored(
                twin,
                runner,
                part,
                one,
                eps,
                trials=trials,
                batch=size,
                seed=seed,
                reporter=reporter,
            )
            yield one.name, moved, account


def stored(
    twin: Twin,
    runner: Runner,
    sample: Sample,
    asked: FaultyAttack,
    eps: float | str,
    *,
    trials: int = TRIALS,
    batch: int = 128,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> tuple[Sample, dict[str, Any]]:
    """A set as a bundle keeps it, the same images in each trial; and what its manifest says, without the model's hash.

    Trial i has the faults of trial i of a campaign with this fault model and seed. `batch`: images crafted at once.
    """
    model, part = parse(asked.model), runner.space.select(WHERE)
    model.check(part)
    flips = [model.trial(part, seed, number).flips for number in range(trials)]
    memory = FaultyMemory(
        model=asked.model,
        where=WHERE,
        seed=seed,
        trials=trials,
        flips=tuple(f.digest()[:16] for f in flips),
    )
    crafted = craft_faulty(
        twin, sample, asked.attack, eps, flips, batch=batch, seed=seed, reporter=reporter
    )
    made = list(crafted)
    found = measure(runner, sample, None, made, list(draw(memory, runner.space)))
    moved = Sample(np.concatenate(made), *(np.tile(v, trials) for v in _keys(sample)))
    return moved, {
        "attack": asked.attack,
        "norm": "linf",
        "eps": parse_eps(eps),
        "parameters": asdict(parameters_of(asked.attack, {})),
        "crafted_through": "twin",
        "samples": len(moved),
        "transfer": {"int8": 1 - found.aware.mean / max(found.clean.mean, 1e-9)},
        "faulty": memory.model_dump(),
    }


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
    unaware = craft(twin, sample, attack, eps, seed=seed, **params)
    aware = craft_faulty(twin, sample, attack, eps, trials, seed=seed, reporter=reporter, **params)
    return measure(runner, sample, unaware, aware, trials, confidence=confidence)


def _keys(sample: Sample) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    return sample.labels, sample.indices
