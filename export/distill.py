"""Distillation of an INT8 graph into itself: codes and biases learn to say what FP32 says, bits flipped or not.

Each step sends one batch of mixed images through the twin twice, with golden codes and with codes that were freshly
flipped, and lowers

    L(q, b) = clean * KL(f(x) || g(x; q, b)) + KL(f(x) || g(x; q xor m, b)),     m ~ Bernoulli(BER) on every bit

by Adam on float shadows of the codes q and on the biases b; f is the FP32 network, g the INT8 twin.
The gradient passes rounding and flips straight through (RandBET, Stutz et al., MLSys 2021,
2104.08323; here without labels, after training, on a few hundred images). Scales stay as they are:
learning them as well brought nothing (docs/stage-3.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor, nn
from torch.nn import functional as F

from resq_deploy.console import Reporter
from resq_deploy.export import fold, rules
from resq_deploy.export.twin import Twin
from resq_deploy.faults import FaultSpace, Flips
from resq_deploy.memory import fault_space

Images = NDArray[np.float32]

_ASTRAY = 0.1  # nats: a golden pass this far from the teacher does not come back in the steps that are left
_STARTS = 8


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to distill: `ber` of the flipped pass, `rate` of Adam for weights, `bias_rate` for biases.

    `rate`: in units of a layer's RMS weight over the root of its inputs, so that a step, which has one sign for all
    that pull one way, moves a wide layer's output no further than a narrow one's (as in 2203.03466); `bias_rate`: as
    it is.
    `clean`: weight of the golden pass; `mixing`: the largest share of a second image mixed into each;
    `part`: images that go through the twin at once, which bounds memory and only orders sums.
    """

    ber: float
    steps: int = 200
    batch: int = 64
    rate: float = 0.2
    bias_rate: float = 1e-3
    clean: float = 1.0
    mixing: float = 0.5
    part: int = 64


def distill(
    int8: onnx.ModelProto,
    teacher: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> tuple[onnx.ModelProto, Recipe]:
    """The graph with learned codes and biases, nothing else changed; and the recipe as it was followed in the end.

    `teacher`: pixels -> logits; `images`: float32 [N, C, H, W] in [0, 1], no labels. Where the golden pass strays
    from the teacher, as deep networks do at a rate that others need, all starts again at half the rates; a network
    that strays at every rate comes back as it is. Deterministic for a seed, a torch version and a thread count: sums
    run in another order on another number of threads.
    """
    say = reporter or Reporter()
    for _ in range(_STARTS):
        twin = Twin(int8)
        if _teach(twin, teacher, images, recipe, np.random.default_rng(seed), say):
            twin.freeze()
            return twin.to_model(), recipe
        say.log(f"distillation strays at a rate of {recipe.rate:g}; it starts again at half of it")
        recipe = replace(recipe, rate=recipe.rate / 2, bias_rate=recipe.bias_rate / 2)
    return int8, recipe


def _teach(
    twin: Twin,
    teacher: nn.Module,
    images: Images,
    recipe: Recipe,
    rng: np.random.Generator,
    say: Reporter,
) -> bool:
    """All steps; whether the golden pass stayed near the teacher."""
    model = twin.to_model()
    space = fault_space(model)
    weights = space.select(kinds=("weights",))
    optimizer = torch.optim.Adam(_groups(twin, space, _channels(model.graph), recipe))
    most = 0.0
    with say.task("distilling", recipe.steps, "steps") as task:
        for step, batch in enumerate(batches(images, recipe, rng)):
            _schedule(optimizer, step, recipe.steps)
            with torch.no_grad():
                target = teacher(batch)
            optimizer.zero_grad(set_to_none=True)
            golden = _learn(twin, batch, target, recipe.part, recipe.clean)
            most = most or max(_ASTRAY, 5 * golden / recipe.clean)
            if not golden / recipe.clean <= most:
                return False
            with twin.flipped(draw(weights, recipe.ber, rng)):
                faulty = _learn(twin, batch, target, recipe.part)
            optimizer.step()
            twin.settle()
            task.note(f"KL {golden / recipe.clean:.4f}, with flips {faulty:.4f}")
            task.advance(1)
    return True


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(target) || softmax(logits)), the mean over the batch, in nats."""
    return F.kl_div(
        F.log_softmax(logits, 1), F.log_softmax(target, 1), log_target=True, reduction="batchmean"
    )


def batches(images: Images, recipe: Recipe, rng: np.random.Generator) -> Iterator[Tensor]:
    """Random batches, mirrored half of the time, a second image mixed into each (mixup, 1710.09412)."""
    size = min(recipe.batch, len(images))
    for _ in range(recipe.steps):
        first, second = (rng.integers(0, len(images), size) for _ in range(2))
        share = rng.random((size, 1, 1, 1), dtype=np.float32) * np.float32(recipe.mixing)
        mixed = images[first] * (1 - share) + images[second] * share
        if rng.random() < 0.5:
            mixed = mixed[..., ::-1]
        yield torch.from_numpy(np.ascontiguousarray(mixed, dtype=np.float32))


def draw(space: FaultSpace, ber: float, rng: np.random.Generator) -> Flips:
    """Every bit of the space flipped with probability `ber`; a location drawn twice counts once."""
    count = rng.binomial(space.size, ber)
    return space.flips(np.unique(rng.integers(0, space.size, count)))


def _learn(twin: Twin, batch: Tensor, target: Tensor, part: int, weight: float = 1.0) -> float:
    """Add the gradient of the weighted divergence; returns the loss."""
    total = 0.0
    for start in range(0, len(batch), part):
        here = slice(start, start + part)
        share = weight * len(batch[here]) / len(batch)
        loss = share * divergence(twin(batch[here]), target[here])
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    return total


def _groups(
    twin: Twin, space: FaultSpace, channels: Mapping[str, int], recipe: Recipe
) -> list[dict[str, Any]]:
    """Parameter groups: a shadow is in code units, and so is its rate. `channels`: of the output, by weight."""
    found: list[dict[str, Any]] = []
    for memory in space.memories:
        if memory.kind not in ("weights", "bias") or not twin.can_learn(memory.name):
            continue
        (shadow,) = twin.learnable([memory.name]).values()
        rate = recipe.bias_rate
        if memory.kind == "weights":
            codes = shadow.detach()
            inputs = codes.numel() / channels[memory.name]
            rate = recipe.rate * float(codes.square().mean().sqrt()) / inputs**0.5
        found.append({"params": [shadow], "lr": rate, "start": rate})
    return found


def _channels(graph: onnx.GraphProto) -> dict[str, int]:
    """Weight codes -> output channels of the layer they are for; of another node, the number of its scales."""
    arrays, readers = fold.initializers(graph), fold.consumers(graph)
    found = {}
    for dq in graph.node:
        if dq.op_type == "DequantizeLinear" and dq.input[0] in arrays:
            dims = arrays[dq.input[0]].dims
            found[dq.input[0]] = max(int(np.prod(arrays[dq.input[1]].dims)), 1)
            for reader, place in readers.get(dq.output[0], ()):
                if reader.op_type in rules.WEIGHTED and place == 1:
                    found[dq.input[0]] = dims[rules.output_axis(reader, len(dims))]
    return found


def _schedule(optimizer: torch.optim.Optimizer, step: int, steps: int) -> None:
    """A tenth of the steps up to the full rate, half a cosine down to 0."""
    warm = max(1, steps // 10)
    factor = min(1.0, (step + 1) / warm) * 0.5 * (1 + np.cos(np.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = group["start"] * factor


def between(a: onnx.ModelProto, b: onnx.ModelProto, share: float) -> onnx.ModelProto:
    """The graph at `share` of the way from `a` to `b`, which differ in codes and biases only."""
    made = onnx.ModelProto()
    made.CopyFrom(a)
    other = fold.initializers(b.graph)
    for tensor in made.graph.initializer:
        first, second = (numpy_helper.to_array(t) for t in (tensor, other[tensor.name]))
        if np.array_equal(first, second):
            continue
        middle = first + np.float32(share) * (second.astype(np.float32) - first)
        middle = np.rint(middle) if first.dtype == np.int8 else middle
        tensor.CopyFrom(numpy_helper.from_array(middle.astype(first.dtype), tensor.name))
    return made
