"""The guard of stage III: it measures an adjusted graph against plain INT8 on held-out calibration images.

There are no labels, so FP32 is the judge. What a prediction is worth is the probability that FP32 itself gives to it:

    value(x) = f(x)[argmax g(x)] / f(x)[argmax f(x)]

is 1 where both agree, and little less where FP32 hesitates too: an estimate of accuracy kept, not of agreement alone.
Measured are golden codes, flipped codes (by the same seeds for every graph), and a white-box attack on the graph
itself. All differences are paired, image by image.

Agreement of golden codes is counted, and estimated from mixtures of images (mixtures.py), which is fine enough to
compare graphs by. What follows from all this is in verdict.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter, Task
from resq_deploy.export.craft import craft
from resq_deploy.export.distill import draw
from resq_deploy.export.footprint import gradient_batch
from resq_deploy.export.mixtures import Doubt
from resq_deploy.export.twin import Twin
from resq_deploy.faults import FaultSpace
from resq_deploy.memory import fault_space
from resq_deploy.metrics import top1
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.runner import Runner

Images = NDArray[np.float32]
Values = NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """What one graph is worth on the held-out images, per image float64 [N]; `divergence` in nats.

    `clean`, `attacked`: values in [0, 1] (attacked: fewer images); `faulty`: [bit error rates, N], the means over
    the trials that showed the image; `worth`: [bit error rates, trials], the means over images; `bits`: of the memory
    that flips fall on, which are the same flips for graphs that have as many; `agreement`: share of images whose
    top-1 is FP32's, without flips;
    `disagreement`: share of mixtures of two images for which it is not, smoothed;
    `divergence`: mean KL from FP32 under flips; `trials`: share of each trial's images that agree with FP32.
    """

    clean: Values
    agreement: float
    disagreement: float
    faulty: Values
    worth: Values
    bits: int
    trials: Values
    divergence: float
    attacked: Values

    def summary(self) -> dict[str, Any]:
        """The figures for the manifest."""
        return {
            "clean": round(float(self.clean.mean()), 5),
            "agreement": round(self.agreement, 5),
            "agreement_mixtures": round(1 - self.disagreement, 5),
            "faulty": round(float(self.faulty.mean()), 5),
            "faulty_agreement": round(float(self.trials.mean()), 5),
            "faulty_agreement_worst": round(float(self.trials.min()), 5),
            "faulty_kl": round(self.divergence, 5),
            "attacked": round(float(self.attacked.mean()), 5) if self.attacked.size else None,
        }


@dataclass(frozen=True, slots=True, eq=False)
class Guard:
    """Held-out images with FP32's logits for them, and how to measure: `trials` at each of the `bers`.

    `shown`: images of one trial, which go round (None: all); `doubt`: mixtures of the images at which FP32 hesitates;
    `part`: images that are attacked at once, at most. Raises ValueError where trials leave images unseen.
    """

    images: Images
    reference: NDArray[np.float32]
    doubt: Doubt
    bers: tuple[float, ...]
    eps: float
    trials: int = 10
    shown: int | None = None
    attacked: int = 128
    steps: int = 10
    seed: int = 0
    threads: int | None = None
    part: int = 128
    say: Reporter = field(default_factory=Reporter)

    def __post_init__(self) -> None:
        if self.trials * len(self._rows(0)) < len(self.images):
            raise ValueError(f"{self.trials} trials of {self.shown} images are not all of them")

    def measure(self, model: onnx.ModelProto, name: str = "INT8") -> Scores:
        """Scores of an INT8 graph, run as it is deployed; the attack goes through its twin. `name`: for progress."""
        golden_space = fault_space(model).select(kinds=("weights",))
        with OrtRunner(model, threads=self.threads) as runner:
            clean = runner(self.images)
            disagreement = self.doubt.disagreement(runner)
            with self.say.task(
                f"measuring: {name}", len(self.bers) * self.trials, "trials"
            ) as task:
                faulty = [
                    self._faulty(runner, golden_space, ber, trial, task)
                    for ber in self.bers
                    for trial in range(self.trials)
                ]
            attacked = runner(self._attack(model)) if self.attacked else clean[:0]
        best, sound = top1(self.reference), value(clean, self.reference)
        rows = [self._rows(trial) for _ in self.bers for trial in range(self.trials)]
        worth = np.full((len(rows), len(sound)), np.nan)
        for one, shown, logits in zip(worth, rows, faulty, strict=True):
            one[shown] = value(logits, self.reference[shown])
        by_ber = worth.reshape(len(self.bers), self.trials, -1)
        met = list(zip(rows, faulty, strict=True))
        return Scores(
            clean=sound,
            agreement=float((top1(clean) == best).mean()),
            disagreement=disagreement,
            faulty=np.nanmean(by_ber, axis=1),
            worth=sound.mean() + np.nanmean(by_ber - sound, axis=2),
            bits=golden_space.size,
            trials=np.array([(top1(logits) == best[shown]).mean() for shown, logits in met]),
            divergence=float(np.mean([_kl(self.reference[shown], v) for shown, v in met])),
            attacked=(top1(attacked) == best[: len(attacked)]).astype(np.float64),
        )

    def _faulty(
        self, runner: Runner, space: FaultSpace, ber: float, trial: int, task: Task
    ) -> NDArray[np.float32]:
        with runner.faults(draw(space, ber, np.random.default_rng([self.seed, trial]))):
            logits = runner(self.images[self._rows(trial)])
        task.advance(1)
        return logits

    def _rows(self, trial: int) -> NDArray[np.intp]:
        """The images that a trial shows."""
        count = len(self.images)
        shown = count if self.shown is None else min(self.shown, count)
        return (trial * shown + np.arange(shown)) % count

    def _attack(self, model: onnx.ModelProto) -> Images:
        count = min(self.attacked, len(self.images))
        sample = Sample(self.images[:count], top1(self.reference[:count]), np.arange(count))
        size = min(self.part, gradient_batch(model))
        return craft(
            Twin(model),
            sample,
            "pgd",
            self.eps,
            steps=self.steps,
            batch=size,
            seed=self.seed,
            reporter=self.say,
        )


def value(logits: NDArray[np.float32], reference: NDArray[np.float32]) -> Values:
    """What each prediction is worth by FP32's own probabilities: float64 [N] in [0, 1]; 0 for a NaN row."""
    chosen = top1(logits)
    rows = np.arange(len(reference))
    gap = reference[rows, np.maximum(chosen, 0)] - reference.max(axis=1)
    return np.where(chosen >= 0, np.exp(gap.astype(np.float64)), 0.0)


def _kl(reference: NDArray[np.float32], logits: NDArray[np.float32]) -> float:
    """Mean KL(FP32 || INT8) in nats, each row at most 20; 20 where a logit is not finite."""
    p, q = _log_softmax(reference), _log_softmax(logits)
    rows = (np.exp(p) * (p - q)).sum(axis=1)
    return float(np.clip(np.nan_to_num(rows, nan=20.0), 0, 20).mean())


def _log_softmax(logits: NDArray[np.float32]) -> Values:
    with np.errstate(invalid="ignore", over="ignore"):
        shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
        made: Values = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return made
