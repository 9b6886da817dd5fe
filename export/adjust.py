"""RESQ stage III after training: an INT8 graph that keeps FP32's answers, also when bits of its weights flip.

    1 equalize      channels are rescaled and centred: a flip moves less (equalize.py, center.py); then new ranges
    2 split         the layers whose flips hurt most read copies of their input, and a flip moves less (split.py)
    3 reconstruct   scales get smaller where that costs less than flips do; codes make up for it (reconstruct.py)
    4 distill       codes and biases learn FP32's logits, golden and flipped, on clean and attacked images (distill.py)
    5 guard         each step is measured on held-out images (guard.py); what loses is not kept (verdict.py)

Needed are some hundred unlabelled images and no training loop over a training set. docs/stage-3.md
has the equations, and what was tried and dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError
from resq_deploy.export import center, qdq, rules
from resq_deploy.export.calibrate import Probe, Range, calibrate
from resq_deploy.export.craft import craft
from resq_deploy.export.design import LEAST, Design
from resq_deploy.export.distill import Recipe, between, distill
from resq_deploy.export.equalize import Moments, equalize, groups, tensors
from resq_deploy.export.fisher import flip_divergence
from resq_deploy.export.guard import Guard, Scores
from resq_deploy.export.heap import give_back
from resq_deploy.export.mixtures import Doubt, Mixtures
from resq_deploy.export.reconstruct import reconstruct
from resq_deploy.export.split import split
from resq_deploy.export.twin import Twin
from resq_deploy.export.verdict import gains, objections, worthwhile
from resq_deploy.export.work import work_per_image
from resq_deploy.manifest import Adjustment
from resq_deploy.metrics import top1

Images = NDArray[np.float32]

EPS = 8 / 255
_HELD_OUT = 0.5  # of the images, to measure on; more to learn from brought nothing
_MOST_HELD_OUT = 512
_LOOKED_AT = 256  # images that the statistics of layers' inputs come from
_TRIALS = 30  # of flips that a graph is measured in, shared among the bit error rates
_PRICED_ON = 64  # images that say which layers' flips hurt
_WORK = 1.5e13  # multiply-accumulates that distillation may take: minutes on two cores
_STEPS = (100, 480)  # the fewest of use, and the most
_TAUGHT_BER = (
    1e-2  # the least that the flipped pass is taught at: rarer flips teach next to nothing
)
_CLEAN_POWER = 1.0  # weight of the golden pass: (taught BER / design BER) ** 0.6
_SHARES = (0.75, 0.5, 0.25)  # of the learned change, tried in turn where all of it loses something
_HEAVY = 2.5e7  # multiply-accumulates per image: above, attacks are made for fewer images, and
_PART = 16  # ... so many images go through a network with gradients at once
_PASSES = 7  # of a forward's cost in one step: the teacher's, and forward and backward twice


@dataclass(frozen=True, slots=True, eq=False)
class Candidate:
    """One graph that may be deployed: what was done to it, and how it scored."""

    name: str
    model: onnx.ModelProto
    fp32: onnx.ModelProto
    ranges: Mapping[str, Range]
    scores: Scores


@dataclass(frozen=True, slots=True, eq=False)
class Adjusted:
    """What stage III made of a graph, and the record for the manifest.

    `fp32`: the graph whose weights `model` quantizes: the same function as the one given, its
    channels perhaps rescaled. `ranges`: of `model`'s activations.
    """

    model: onnx.ModelProto
    fp32: onnx.ModelProto
    ranges: Mapping[str, Range]
    record: Adjustment


def adjust(
    int8: onnx.ModelProto,
    fp32: onnx.ModelProto,
    images: Images,
    *,
    ranges: Mapping[str, Range],
    design: Design | None = None,
    eps: float = EPS,
    half_scales: bool = False,
    seed: int = 0,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Adjusted:
    """Adjust a plain INT8 graph to bit flips as in `design` and attacks of `eps` (L-inf, pixels in [0, 1]).

    `images`: unlabelled calibration images, float32 [N, C, H, W] in [0, 1]; half of them (512 at most) are
    held out to measure on. `ranges`: the activation ranges that `int8` was made with; `half_scales`: as in
    quantize_graph. The result has the same nodes and names, but for the copies of inputs that split layers read, and
    what centres activations; other codes, scales and biases.
    Deterministic for a seed, the versions of torch and ONNX Runtime, and torch's thread count.
    Raises DataError for fewer than 16 images, ModelError for a network without a twin (see gradients.obstacle).
    """
    if len(images) < LEAST:
        raise DataError(f"{len(images)} calibration images", f"stage III needs at least {LEAST}")
    stage = _Stage(
        int8,
        fp32,
        images,
        ranges,
        design or Design(),
        eps,
        half_scales,
        seed,
        threads,
        reporter,
    )
    return stage.run()


class _Stage:
    def __init__(
        self,
        int8: onnx.ModelProto,
        fp32: onnx.ModelProto,
        images: Images,
        ranges: Mapping[str, Range],
        design: Design,
        eps: float,
        half_scales: bool,
        seed: int,
        threads: int | None,
        reporter: Reporter | None,
    ) -> None:
        self.int8, self.fp32, self.ranges = int8, fp32, ranges
        self.design, self.ber = design, design.ber
        self.seed, self.threads = seed, threads
        self.say = reporter or Reporter()
        self.teacher = Twin(fp32)
        order = np.random.default_rng(seed).permutation(len(images))
        kept = min(round(len(images) * _HELD_OUT), _MOST_HELD_OUT)
        self.learn, held_out = images[order[kept:]], images[order[:kept]]
        self.work = work_per_image(fp32)
        self.heavy = self.work > _HEAVY
        bers = tuple(
            sorted({self.ber, *(max(self.ber, min(k * self.ber, _TAUGHT_BER)) for k in (3, 10))})
        )
        self.guard = Guard(
            held_out,
            logits_of(fp32, [held_out], threads),
            Doubt.find(held_out, self._fp32, seed),
            bers,
            eps,
            trials=_TRIALS // len(bers),
            attacked=min(len(held_out), 64 if self.heavy else 128),
            seed=seed,
            threads=threads,
            part=_PART if self.heavy else 128,
            say=self.say,
        )
        self.eps, self.half_scales = eps, half_scales
        self._adversarial: Images | None = None

    def run(self) -> Adjusted:
        plain = self._scored("plain", self.int8, self.fp32, self.ranges)
        self._tell(plain)
        kept, steps = [plain], []
        for name, step in (
            ("equalize", self._equalized),
            ("split", self._split),
            ("reconstruct", self._reconstructed),
            ("distill", self._distilled),
        ):
            base = kept[-1]
            give_back()
            candidate, told = step(base)
            steps.append({"step": name, **told} | self._judge(candidate, kept))
        for share in _SHARES if kept[-1] is not candidate else ():
            model = between(base.model, candidate.model, share)
            name = f"{candidate.name} x {share}"
            part = self._scored(name, model, base.fp32, base.ranges)
            steps.append({"step": "back off", "share": share} | self._judge(part, kept))
            if kept[-1] is part:
                break
        return self._chosen(kept, steps)

    def _chosen(self, kept: list[Candidate], steps: list[dict[str, Any]]) -> Adjusted:
        """The last of those kept that clearly gained on the ones before; plain where it gains too little."""
        plain = best = kept[0]
        for candidate in kept:
            best = candidate if gains(candidate.scores, best.scores) else best
        best = best if worthwhile(best.scores, plain.scores) else plain
        self.say.log(f"stage III keeps: {best.name}")
        record = Adjustment(
            applied=best is not plain,
            design_ber=self.ber,
            steps=tuple(steps),
            measured={
                "kept": best.name,
                "held_out": len(self.guard.images),
                "trials": self.guard.trials * len(self.guard.bers),
                "bers": list(self.guard.bers),
                "attack": f"pgd-{self.guard.steps}, eps={self.eps:.5g}, {self.guard.attacked} images",
                "plain": plain.scores.summary(),
                "adjusted": best.scores.summary(),
            },
        )
        return Adjusted(best.model, best.fp32, best.ranges, record)

    def _equalized(self, base: Candidate) -> tuple[Candidate, dict[str, Any]]:
        found = dict.fromkeys(tensors(groups(base.fp32)), 1) | center.tensors(base.fp32)
        moments = {name: Moments() for name in found}
        for _, values in Probe(base.fp32, [*found], self.threads).run(self.learn[:_LOOKED_AT]):
            for name, axis in found.items():
                moments[name].add(np.moveaxis(values[name], axis, 1))
        same, gains = equalize(base.fp32, moments, self.ber)
        same, centered = center.center(same, moments, self.ber)
        where = qdq.activation_tensors(same)
        ranges = calibrate(
            same, where, (self.learn,), adversarial=(self._attacked(),), threads=self.threads
        )
        model = qdq.quantize_graph(same, ranges, half_scales=self.half_scales)
        told = {"groups": gains, "centered": centered}
        return self._scored(_after(base, "equalized"), model, same, ranges), told

    def _split(self, base: Candidate) -> tuple[Candidate, dict[str, Any]]:
        cost = flip_divergence(base.model, self.learn[:_PRICED_ON], self.ber, seed=self.seed)
        done = split(base.fp32, cost, self.design.redundancy)
        nats = {name: float(f"{value:.3g}") for name, value in cost.items()}
        told = {"copies": dict(done.copies), "work": round(done.work, 4), "divergence": nats}
        if not done.copies:
            return base, told
        where = rules.plan(done.model, half=self.half_scales).activations
        ranges = {name: base.ranges[done.sources.get(name, name)] for name in where}
        model = qdq.quantize_graph(done.model, ranges, half_scales=self.half_scales)
        return self._scored(_after(base, "split"), model, done.model, ranges), told

    def _reconstructed(self, base: Candidate) -> tuple[Candidate, dict[str, Any]]:
        model, factors = reconstruct(
            base.fp32,
            base.ranges,
            self.learn[:_LOOKED_AT],
            self.ber,
            half_scales=self.half_scales,
            seed=self.seed,
            threads=self.threads,
            reporter=self.say,
        )
        name = _after(base, "reconstructed")
        return self._scored(name, model, base.fp32, base.ranges), {"scales": factors}

    def _distilled(self, base: Candidate) -> tuple[Candidate, dict[str, Any]]:
        fewest, most = _STEPS
        taught = max(self.ber, _TAUGHT_BER)
        recipe = Recipe(
            ber=taught, clean=(taught / self.ber) ** _CLEAN_POWER, part=_PART if self.heavy else 64
        )
        each = self.work * recipe.batch * _PASSES / _WORK
        recipe = replace(recipe, steps=min(int(self.design.effort / each), most))
        if recipe.steps < fewest:
            why = f"{recipe.steps} steps fit into its budget, {fewest} are the fewest that teach"
            self.say.log(f"distillation is left out: {why} (effort {fewest * each:.2g})")
            return base, {"steps": 0}
        images = np.concatenate([self.learn, self._attacked()])
        model, recipe = distill(
            base.model, self.teacher, images, recipe, seed=self.seed, reporter=self.say
        )
        told = {name: getattr(recipe, name) for name in Recipe.__dataclass_fields__}
        return self._scored(_after(base, "distilled"), model, base.fp32, base.ranges), told

    def _scored(
        self, name: str, model: onnx.ModelProto, fp32: onnx.ModelProto, ranges: Mapping[str, Range]
    ) -> Candidate:
        give_back()
        return Candidate(name, model, fp32, ranges, self.guard.measure(model, name))

    def _fp32(self, batches: Mixtures) -> NDArray[np.float32]:
        """FP32's logits, with progress."""
        with self.say.task("looking where FP32 hesitates", len(batches), "mixtures") as task:

            def seen() -> Iterator[Images]:
                for images in batches:
                    yield images
                    task.advance(len(images))

            return logits_of(self.fp32, seen(), self.threads)

    def _judge(self, candidate: Candidate, kept: list[Candidate]) -> dict[str, Any]:
        """What the manifest says of a step; joins what is kept, unless it loses something or is nothing new."""
        summary = candidate.scores.summary()
        if candidate is kept[-1]:
            return {"kept": True, "loses": [], "measured": summary}
        against = objections(candidate.scores, [other.scores for other in kept])
        self._tell(candidate, against)
        if not against:
            kept.append(candidate)
        return {"kept": not against, "loses": against, "measured": summary}

    def _tell(self, candidate: Candidate, against: Sequence[str] = ()) -> None:
        found = candidate.scores.summary()
        self.say.log(
            f"{candidate.name}: agreement {found['agreement']:.4f}, on mixtures {found['agreement_mixtures']:.4f}, "
            f"under flips {found['faulty_agreement']:.4f}"
            f"{', loses ' + '; '.join(against) if against else ''}"
        )

    def _attacked(self) -> Images:
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
                batch=_PART if self.heavy else 128,
                seed=self.seed,
                reporter=self.say,
            )
        return self._adversarial


def _after(base: Candidate, step: str) -> str:
    """What a graph is called that comes of `base` by one more step."""
    return step if base.name == "plain" else f"{base.name}, {step}"


def logits_of(
    fp32: onnx.ModelProto, batches: Iterable[Images], threads: int | None
) -> NDArray[np.float32]:
    """FP32 logits by ONNX Runtime: float32 [N, classes]."""
    output = fp32.graph.output[0].name
    probe = Probe(fp32, [output], threads)
    parts = [values[output] for images in batches for _, values in probe.run(images)]
    logits: NDArray[np.float32] = np.concatenate(parts)
    return logits
