"""Stage III for a file that is quantized already: its codes and scales adapt to bit flips, its ranges stay.

    1 split         layers whose flips hurt most read copies of their codes (coded.py; the prices are fisher.py's)
    2 reconstruct   a scale for each output channel, as small as pays; codes that make up for what is cut
    3 distill       codes and float biases learn the reference's logits, golden and flipped
    4 guard         the file as it is stands where plain INT8 stands for a network of ours

Nothing is calibrated, and no float weight is needed: what a weight is to stand for is what its codes stand for now.
Layers of which no two codes saturate that meet in 16 bits stay so (saturation.kept).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy import quantization, saturation
from resq_deploy.console import Reporter
from resq_deploy.export import coded, fold, moments
from resq_deploy.export.biases import snap_biases
from resq_deploy.export.coded import Coded
from resq_deploy.export.design import Design
from resq_deploy.export.reconstruct import WEAKER, choose
from resq_deploy.export.split import Cost, allocate
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
from resq_deploy.export.work import ELEMENT, elements, multiplications
from resq_deploy.manifest import Adjustment
from resq_deploy.saturation import Pairs


def readjust(
    int8: onnx.ModelProto,
    fp32: onnx.ModelProto,
    images: Images,
    *,
    design: Design | None = None,
    eps: float = EPS,
    seed: int = 0,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> tuple[onnx.ModelProto, Adjustment]:
    """Adjust a canonical Q/DQ graph (qdq_file.py) to bit flips as in `design` and attacks of `eps`; and the record.

    `fp32`: the network it was made of, or its own weights in float arithmetic: the judge and the teacher. `images`:
    as in adjust. The result has the same nodes, ranges and types, but for copies of inputs, and for weights that had
    one scale and have one a channel. Deterministic as adjust is.
    Raises DataError for fewer than 16 images, ModelError for a graph without a twin.
    """
    stage = Stage[None](fp32, images, design or Design(), eps, seed, threads, reporter)
    steps = _Steps(stage)
    best, record = stage.run(
        int8,
        None,
        (
            ("split", steps.split),
            ("reconstruct", steps.reconstruct),
            ("reconstruct", partial(steps.reconstruct, strength=WEAKER)),
            ("distill", stage.distilled),
        ),
    )
    return snap_biases(best.model) if record.applied else int8, record


@dataclass(frozen=True, slots=True)
class _Steps:
    """The steps that work on the codes themselves; each returns a graph, and what the manifest says of it."""

    stage: Stage[None]

    def split(self, base: Candidate[None]) -> tuple[Candidate[None], dict[str, Any]]:
        """Copies of the inputs of layers whose flips hurt most."""
        cost = self.stage.prices(base)
        found, shapes = coded.layers(base.model), fold.shapes(base.model)
        arrays = fold.initializers(base.model.graph)
        costs = {
            name: Cost(
                multiplications(layer.node, arrays[name], shapes),
                ELEMENT * elements(shapes, layer.node.input[0]),
            )
            for name, layer in found.items()
        }
        can = {n: cost[n] for n, layer in found.items() if n in cost and coded.can_split(layer)}
        budget = self.stage.design.share(self.stage.work) * self.stage.work
        copies = allocate(can, costs, budget, sum(cost.values()))
        if not copies:
            return base, split_told({}, 0.0, cost)
        model = coded.split(base.model, copies)
        work = sum(costs[name].of(count) for name, count in copies.items()) / self.stage.work
        made = self.stage.scored(after(base, "split"), model, None)
        return made, split_told(copies, work, cost)

    def reconstruct(
        self, base: Candidate[None], strength: float = 1.0
    ) -> tuple[Candidate[None], dict[str, Any]]:
        """Smaller scales, one for each channel, and codes that make up for what is cut; `strength`: of the BER."""
        stage, found = self.stage, coded.layers(base.model)
        shapes, pairs = fold.shapes(base.model), saturation.kept(base.model)
        ready = []
        for name, layer in found.items():
            rank = len(shapes.get(layer.node.input[0], ()))
            row = moments.layer_of(layer.node, name, layer.axis, layer.codes.shape, rank)
            ready += [] if row is None else [row]
        if not ready:
            return base, {"strength": strength, "scales": {}}
        matrices = moments.second_moments(
            base.model, ready, {}, stage.learn[:LOOKED_AT], stage.seed, stage.threads
        )
        scales, codes, factors = choose(
            len(ready),
            matrices,
            lambda layer: found[layer.weight].values,
            strength * stage.ber,
            pairs=pairs,
            reporter=stage.say,
        )
        new = {n: _with_room(found[n], codes[n], scales[n], pairs.get(n)) for n in scales}
        model = coded.rewrite(base.model, new)
        made = stage.scored(after(base, weaker("reconstructed", strength)), model, None)
        return made, {"strength": strength, "scales": factors}


def _with_room(
    layer: Coded, codes: NDArray[np.int8], scale: NDArray[np.float32], pairs: Pairs | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes and scales, rounded anew where a bias needs a wider one."""
    raised = np.maximum(scale, layer.least)
    wide = quantization.channelwise(raised > scale, layer.codes.ndim, layer.axis)
    new = np.where(wide, quantization.quantize(layer.values, raised, layer.axis), codes)
    return (new if pairs is None else pairs.fit(new)), raised
