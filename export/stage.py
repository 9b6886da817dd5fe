"""Stage III as a sequence of steps: each makes a graph of the one before, is measured, and is kept unless it loses.

What the steps are is up to adjust.py (FP32 graphs) and readjust.py (files that are quantized already). Learning, the
guard's measurements and the verdict are the same for both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError
from resq_deploy.export.calibrate import Probe
from resq_deploy.export.craft import craft
from resq_deploy.export.design import LEAST, SMALL, Design
from resq_deploy.export.distill import Recipe, between, distill
from resq_deploy.export.fisher import flip_divergence
from resq_deploy.export.footprint import gradient_batch
from resq_deploy.export.guard import Guard, Scores
from resq_deploy.export.heap import give_back
from resq_deploy.export.mixtures import DRAWN, FEWEST, Doubt, Mixtures
from resq_deploy.export.twin import Twin
from resq_deploy.export.verdict import balance, gains, objections, worthwhile
from resq_deploy.export.work import work_per_image
from resq_deploy.manifest import Adjustment
from resq_deploy.metrics import top1

Images = NDArray[np.float32]
T = TypeVar("T")

EPS = 8 / 255
LOOKED_AT = 256  # images that the statistics of layers' inputs come from
_HELD_OUT = 0.5  # of the images, to measure on; more to learn from brought nothing
_MOST_HELD_OUT = 512
_TRIALS = 30  # of flips that a graph is measured in, shared among the bit error rates; in small
_MORE = 5  # ... networks, where one flip of few does most of the harm, times as many
_PRICED_ON = 64  # images that say which layers' flips hurt
_WORK = 1.5e13  # multiply-accumulates that distillation may take: minutes on two cores
_STEPS = (100, 480)  # the fewest of use, and the most
_TAUGHT_BER = (
    1e-2  # the least that the flipped pass is taught at: rarer flips teach next to nothing
)
_CLEAN_POWER = 1.0  # weight of the golden pass: (taught BER / design BER) ** this
_HALF = 0.5  # of the learned change, tried beside all of it; then
_LESS, _MOST = 0.25, 0.75  # ... less than that or more, by which of the two is better
_JUDGED = 1e13  # ... and that each of a guard's three measures may take of one graph
_LEAST_SHOWN = 64  # images of a trial, however large the network
_ATTACK = 30  # passes that attacking one image is worth: ten gradients
_LEAST_ATTACKED = 16  # images, however large the network
_PART = 16  # images that go through a large network with gradients at once, at most
_LONG = 120.0  # seconds of one graph's measurements, above which it is said what all may take
_PASSES = 7  # of a forward's cost in one step: the teacher's, and forward and backward twice


@dataclass(frozen=True, slots=True, eq=False)
class Candidate(Generic[T]):
    """One graph that may be deployed, what it was made of, and how it scored; `name`: the steps behind it."""

    name: str
    model: onnx.ModelProto
    made_of: T
    scores: Scores


Step = Callable[[Candidate[T]], tuple[Candidate[T], dict[str, Any]]]


class Stage(Generic[T]):
    """Images to learn from and to judge by, and what every step needs.

    `fp32`: the judge and the teacher; `images`: unlabelled calibration images, float32 [N, C, H, W] in [0, 1], half of
    them (512 at most) held out to measure on; `eps`: L-inf budget of attacks, pixels of [0, 1].
    Raises DataError for fewer than 16 images, ModelError for a network without a twin (see gradients.obstacle).
    """

    def __init__(
        self,
        fp32: onnx.ModelProto,
        images: Images,
        design: Design,
        eps: float,
        seed: int,
        threads: int | None,
        reporter: Reporter | None,
    ) -> None:
        if len(images) < LEAST:
            raise DataError(
                f"{len(images)} calibration images", f"stage III needs at least {LEAST}"
            )
        self.fp32, self.design, self.ber = fp32, design, design.ber
        self.eps, self.seed, self.threads = eps, seed, threads
        self.say = reporter or Reporter()
        self.teacher = Twin(fp32)
        order = np.random.default_rng(seed).permutation(len(images))
        kept = min(round(len(images) * _HELD_OUT), _MOST_HELD_OUT)
        self.learn, held_out = images[order[kept:]], images[order[:kept]]
        self.work = work_per_image(fp32)
        self.heavy = self.work > SMALL
        bers = tuple(
            sorted({self.ber, *(max(self.ber, min(k * self.ber, _TAUGHT_BER)) for k in (3, 10))})
        )
        trials = _TRIALS * (1 if self.heavy else _MORE) // len(bers)
        passes = int(_JUDGED / self.work)
        attacked = max(min(passes // _ATTACK, 64 if self.heavy else 128), _LEAST_ATTACKED)
        self.guard = Guard(
            held_out,
            logits_of(fp32, [held_out], threads),
            Doubt.find(held_out, self._logits, seed, min(max(passes, FEWEST), DRAWN)),
            bers,
            eps,
            trials=trials,
            shown=max(passes // (trials * len(bers)), _LEAST_SHOWN),
            attacked=min(len(held_out), attacked),
            seed=seed,
            threads=threads,
            part=_PART if self.heavy else 128,
            say=self.say,
        )
        self._adversarial: Images | None = None

    def run(
        self, int8: onnx.ModelProto, made_of: T, steps: Sequence[tuple[str, Step[T]]]
    ) -> tuple[Candidate[T], Adjustment]:
        """All steps, of which the last learns; the best graph of `int8` and what came of it, and the record.

        A step of the name of the one before is a weaker one, for where that is refused. Of what was learned as large
        a share is kept as is worth most.
        """
        *others, (last, learn) = steps
        start = time.monotonic()
        plain = self.scored("plain", int8, made_of)
        self._tell(plain)
        self._foretell(time.monotonic() - start, len(steps) + 2)
        candidate, kept, told = plain, [plain], list[dict[str, Any]]()
        for name, step in others:
            if told and told[-1]["step"] == name and told[-1]["kept"]:
                continue
            base = kept[-1]
            give_back()
            candidate, found = step(base)
            told.append({"step": name, **found} | self._judge(candidate, kept))
            if told[-1]["kept"] and candidate is not base:
                kept.append(candidate)
        give_back()
        whole, found = learn(kept[-1])
        told.append({"step": last, **found} | self._judge(whole, kept))
        if whole is not kept[-1]:
            self._back_off(whole, kept, told)
        return self._chosen(kept, told)

    def _back_off(
        self, whole: Candidate[T], kept: list[Candidate[T]], told: list[dict[str, Any]]
    ) -> None:
        """Shares of what the last step changed; of those that lose nothing, the one of the best balance is kept."""
        base, tried = kept[-1], [(whole, told[-1])]

        def part(share: float) -> None:
            model = between(base.model, whole.model, share)
            made = self.scored(weaker(whole.name, share), model, base.made_of)
            told.append({"step": "back off", "share": share} | self._judge(made, kept))
            tried.append((made, told[-1]))

        part(_HALF)
        half, said = tried[-1]
        less = not said["kept"] or balance(half.scores) > balance(whole.scores)
        part(_LESS if less else _MOST)
        fine = [candidate for candidate, said in tried if said["kept"]]
        best = max(fine, key=lambda candidate: balance(candidate.scores), default=base)
        for candidate, said in tried:
            said["balance"] = round(balance(candidate.scores), 5)
            if said["kept"] and candidate is not best:
                found = f"balance {balance(best.scores):.4f} -> {balance(candidate.scores):.4f}"
                said |= {"kept": False, "loses": [found]}
        if best is not base:
            kept.append(best)

    def _foretell(self, seconds: float, most: int) -> None:
        """How long the rest may take, where that is long."""
        if seconds >= _LONG:
            self.say.log(
                f"measuring a graph takes {seconds / 60:.0f} min here; up to {most} more are measured, "
                f"{most * seconds / 3600:.1f} h (more cores are quicker; --no-adjust leaves stage III out)"
            )

    def scored(self, name: str, model: onnx.ModelProto, made_of: T) -> Candidate[T]:
        """A graph with its scores."""
        give_back()
        return Candidate(name, model, made_of, self.guard.measure(model, name))

    def prices(self, base: Candidate[T]) -> dict[str, float]:
        """Weight -> nats that its flips at the design BER are expected to cost (fisher.py)."""
        return flip_divergence(base.model, self.learn[:_PRICED_ON], self.ber, seed=self.seed)

    def distilled(self, base: Candidate[T]) -> tuple[Candidate[T], dict[str, Any]]:
        """The step that learns (distill.py), in as many steps as its budget allows."""
        fewest, most = _STEPS
        taught = max(self.ber, _TAUGHT_BER)
        recipe = Recipe(
            ber=taught, clean=(taught / self.ber) ** _CLEAN_POWER, part=self._part(base.model, 64)
        )
        each = self.work * recipe.batch * _PASSES / _WORK
        recipe = replace(recipe, steps=min(int(self.design.effort / each), most))
        if recipe.steps < fewest:
            why = f"{recipe.steps} steps fit into its budget, {fewest} are the fewest that teach"
            self.say.log(f"distillation is left out: {why} (effort {fewest * each:.2g})")
            return base, {"steps": 0}
        images = np.concatenate([self.learn, self.attacked()])
        model, recipe = distill(
            base.model, self.teacher, images, recipe, seed=self.seed, reporter=self.say
        )
        told = {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}
        if model is base.model:  # it strayed at every rate
            return base, told
        return self.scored(after(base, "distilled"), model, base.made_of), told

    def attacked(self) -> Images:
        """Adversarial versions of some of the images to learn from, made once, through FP32."""
        if self._adversarial is None:
            count = min(len(self.learn), 64 if self.heavy else 512)
            images = self.learn[:count]
            labels = top1(logits_of(self.fp32, [images], self.threads))
            sample = Sample(images, labels, np.arange(count))
            self._adversarial = craft(
                self.teacher,
                sample,
                "pgd",
                self.eps,
                steps=5,
                batch=self._part(self.fp32, 128),
                seed=self.seed,
                reporter=self.say,
            )
        return self._adversarial

    def _part(self, model: onnx.ModelProto, most: int) -> int:
        """Images that go through this network with gradients at once."""
        return min(_PART if self.heavy else most, gradient_batch(model))

    def _chosen(
        self, kept: list[Candidate[T]], steps: list[dict[str, Any]]
    ) -> tuple[Candidate[T], Adjustment]:
        """The last of those kept that clearly gained on the ones before; plain where it gains too little."""
        plain = best = kept[0]
        for candidate in kept:
            best = candidate if gains(candidate.scores, best.scores) else best
        best = best if worthwhile(best.scores, plain.scores) else plain
        self.say.log(f"stage III keeps: {best.name}")
        held_out = len(self.guard.images)
        record = Adjustment(
            applied=best is not plain,
            design_ber=self.ber,
            steps=tuple(steps),
            measured={
                "kept": best.name,
                "held_out": held_out,
                "trials": self.guard.trials * len(self.guard.bers),
                "images_per_trial": min(self.guard.shown or held_out, held_out),
                "bers": list(self.guard.bers),
                "attack": f"pgd-{self.guard.steps}, eps={self.eps:.5g}, {self.guard.attacked} images",
                "plain": plain.scores.summary(),
                "adjusted": best.scores.summary(),
            },
        )
        return best, record

    def _logits(self, batches: Mixtures) -> NDArray[np.float32]:
        """FP32's logits, with progress."""
        with self.say.task("looking where FP32 hesitates", len(batches), "mixtures") as task:

            def seen() -> Iterator[Images]:
                for images in batches:
                    yield images
                    task.advance(len(images))

            return logits_of(self.fp32, seen(), self.threads)

    def _judge(self, candidate: Candidate[T], kept: list[Candidate[T]]) -> dict[str, Any]:
        """What the manifest says of a step, which may be kept unless it loses something."""
        summary = candidate.scores.summary()
        if candidate is kept[-1]:
            return {"kept": True, "loses": [], "measured": summary}
        against = objections(candidate.scores, [other.scores for other in kept])
        self._tell(candidate, against)
        return {"kept": not against, "loses": against, "measured": summary}

    def _tell(self, candidate: Candidate[T], against: Sequence[str] = ()) -> None:
        found = candidate.scores.summary()
        self.say.log(
            f"{candidate.name}: agreement {found['agreement']:.4f}, on mixtures {found['agreement_mixtures']:.4f}, "
            f"under flips {found['faulty_agreement']:.4f}"
            f"{', loses ' + '; '.join(against) if against else ''}"
        )


def after(base: Candidate[Any], step: str) -> str:
    """What a graph is called that comes of `base` by one more step."""
    return step if base.name == "plain" else f"{base.name}, {step}"


def weaker(step: str, share: float) -> str:
    """What a step is called that does only a share of what it could."""
    return step if share == 1 else f"{step} x {share}"


def logits_of(
    fp32: onnx.ModelProto, batches: Iterable[Images], threads: int | None
) -> NDArray[np.float32]:
    """FP32 logits by ONNX Runtime: float32 [N, classes]."""
    output = fp32.graph.output[0].name
    probe = Probe(fp32, [output], threads)
    parts = [values[output] for images in batches for _, values in probe.run(images)]
    logits: NDArray[np.float32] = np.concatenate(parts)
    return logits


def split_told(copies: Mapping[str, int], work: float, cost: Mapping[str, float]) -> dict[str, Any]:
    """What the manifest says of split layers: copies by weight, the share of work added, what flips were priced at."""
    nats = {name: float(f"{value:.3g}") for name, value in cost.items()}
    return {"copies": dict(copies), "work": round(work, 4), "divergence": nats}
