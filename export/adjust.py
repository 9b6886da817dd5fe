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

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx

from resq_deploy.console import Reporter
from resq_deploy.export import center, qdq
from resq_deploy.export.calibrate import Probe, Range, calibrate
from resq_deploy.export.design import Design
from resq_deploy.export.dialect import TENSORRT, Dialect
from resq_deploy.export.equalize import Moments, equalize, groups, tensors
from resq_deploy.export.reconstruct import WEAKER, reconstruct
from resq_deploy.export.split import split
from resq_deploy.export.stage import (
    EPS,
    LOOKED_AT,
    Candidate,
    Images,
    Stage,
    after,
    split_told,
    weaker,
)
from resq_deploy.manifest import Adjustment


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """What an INT8 graph is made of: an FP32 graph and the ranges of its activations."""

    fp32: onnx.ModelProto
    ranges: Mapping[str, Range]


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
    dialect: Dialect = TENSORRT,
    seed: int = 0,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> Adjusted:
    """Adjust a plain INT8 graph to bit flips as in `design` and attacks of `eps` (L-inf, pixels in [0, 1]).

    `images`: unlabelled calibration images, float32 [N, C, H, W] in [0, 1]; half of them (512 at most) are
    held out to measure on. `ranges`: the activation ranges that `int8` was made with; `dialect`: as in
    quantize_graph. The result has the same nodes and names, but for the copies of inputs that split layers read, and
    what centres activations; other codes, scales and biases.
    Deterministic for a seed, the versions of torch and ONNX Runtime, and torch's thread count.
    Raises DataError for fewer than 16 images, ModelError for a network without a twin (see gradients.obstacle).
    """
    stage = Stage[Source](fp32, images, design or Design(), eps, seed, threads, reporter)
    steps = _Steps(stage, dialect)
    best, record = stage.run(
        int8,
        Source(fp32, ranges),
        (
            ("equalize", steps.equalize),
            ("split", steps.split),
            ("reconstruct", steps.reconstruct),
            ("reconstruct", partial(steps.reconstruct, strength=WEAKER)),
            ("distill", stage.distilled),
        ),
    )
    return Adjusted(best.model, best.made_of.fp32, best.made_of.ranges, record)


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps that need the FP32 graph; each returns a graph, and what the manifest says of it."""

    stage: Stage[Source]
    dialect: Dialect

    def equalize(self, base: Candidate[Source]) -> tuple[Candidate[Source], dict[str, Any]]:
        """Channels rescaled and centred, and ranges calibrated anew."""
        stage, fp32 = self.stage, base.made_of.fp32
        found = dict.fromkeys(tensors(groups(fp32)), 1) | center.tensors(fp32)
        moments = {name: Moments() for name in found}
        for _, values in Probe(fp32, [*found], stage.threads).run(stage.learn[:LOOKED_AT]):
            for name, axis in found.items():
                moments[name].add(np.moveaxis(values[name], axis, 1))
        same, gains = equalize(fp32, moments, stage.ber)
        # between byte kernels two more nodes in float would be slow
        same, centered = center.center(same, moments, stage.ber, nodes=not self.dialect.unsigned)
        same = self.dialect.paired(same)
        ranges = calibrate(
            same,
            self.dialect.plan(same).activations,
            (stage.learn,),
            adversarial=(stage.attacked(),),
            unsigned=self.dialect.unsigned,
            threads=stage.threads,
            reporter=stage.say,
        )
        return self._made(base, "equalized", Source(same, ranges)), {
            "groups": gains,
            "centered": centered,
        }

    def split(self, base: Candidate[Source]) -> tuple[Candidate[Source], dict[str, Any]]:
        """Copies of the inputs of layers whose flips hurt most; ranges stay."""
        cost = self.stage.prices(base)
        done = split(base.made_of.fp32, cost, self.stage.design.share(self.stage.work))
        told = split_told(done.copies, done.work, cost)
        if not done.copies:
            return base, told
        where = self.dialect.plan(done.model).activations
        before = base.made_of.ranges
        ranges = {name: before[done.sources.get(name, name)] for name in where}
        return self._made(base, "split", Source(done.model, ranges)), told

    def reconstruct(
        self, base: Candidate[Source], strength: float = 1.0
    ) -> tuple[Candidate[Source], dict[str, Any]]:
        """Smaller scales, and codes that make up for what is cut; ranges stay. `strength`: of the design BER."""
        stage, source = self.stage, base.made_of
        model, factors = reconstruct(
            source.fp32,
            source.ranges,
            stage.learn[:LOOKED_AT],
            strength * stage.ber,
            dialect=self.dialect,
            seed=stage.seed,
            threads=stage.threads,
            reporter=stage.say,
        )
        made = stage.scored(after(base, weaker("reconstructed", strength)), model, source)
        return made, {"strength": strength, "scales": factors}

    def _made(self, base: Candidate[Source], step: str, source: Source) -> Candidate[Source]:
        model = qdq.quantize_graph(source.fp32, source.ranges, dialect=self.dialect)
        return self.stage.scored(after(base, step), model, source)
