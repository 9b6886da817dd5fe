"""What flips of weights and rounding of activations cost the network's answers, by one gradient an image.

To second order, small independent changes dq of the codes q move the network's answers by

    KL(g(x; q) || g(x; q + dq))  ~  1/2 sum_i F_i E[dq_i^2],     F_i = E_x E_{y ~ g(x)} [(d log g_y(x) / dq_i)^2]

(the diagonal of the Fisher information; Amari, Neural Computation 1998). A flip of bit b moves a code by 2^b, so that
at a bit error rate p  E[dq_i^2] = 21,845 p. One gradient per image prices every layer at once. Flips of high bits are
not small: of what they do the order of the layers is right, not the last figure (docs/stage-3.md).

An activation's rounding error e is known, image by image, and so is what it does to first order:

    KL(f(x) || g(x))  ~  1/2 E_y [(e . d log f_y(x) / da)^2]
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from resq_deploy.console import Reporter
from resq_deploy.export.equalize import FLIP_POWER
from resq_deploy.export.footprint import gradient_batch
from resq_deploy.export.gradients import obstacle
from resq_deploy.export.grid import Grid
from resq_deploy.export.ranges import even
from resq_deploy.export.twin import Twin
from resq_deploy.memory import fault_space

Images = NDArray[np.float32]

_AT_ONCE = 16  # images of which all activations are held at most
_HELD = 6  # times what a backward pass needs: values, their gradients, and errors of them


def flip_divergence(
    int8: onnx.ModelProto, images: Images, ber: float, *, seed: int = 0
) -> dict[str, float]:
    """INT8 weight -> the divergence in nats that flips of its codes at this BER are expected to cost.

    `images`: float32 [N, C, H, W] in [0, 1], no labels: they are drawn from the network's own answers.
    """
    twin = Twin(int8).eval()
    weights = fault_space(int8).select(kinds=("weights",)).memories
    names = [memory.name for memory in weights if twin.can_learn(memory.name)]
    codes = twin.learnable(names)
    sums = dict.fromkeys(names, 0.0)
    generator = torch.Generator().manual_seed(seed)
    for start in range(len(images)):
        log_p = twin(torch.from_numpy(images[start : start + 1])).log_softmax(1)
        label = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        found = torch.autograd.grad(log_p[0, label[0, 0]], list(codes.values()), allow_unused=True)
        for name, gradient in zip(codes, found, strict=True):
            sums[name] += 0.0 if gradient is None else float(gradient.square().sum())
    price = 0.5 * FLIP_POWER * ber / max(len(images), 1)
    return {name: price * total for name, total in sums.items()}


def rounding_divergence(
    fp32: onnx.ModelProto,
    candidates: Mapping[str, Mapping[str, Grid]],
    images: Images,
    weights: NDArray[np.float64] | None = None,
    *,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> dict[str, dict[str, float]]:
    """Tensor -> method -> the divergence in nats that rounding it to that grid, and nothing else, is expected to cost.

    `candidates`: tensor -> method -> grid, tensors of a classifier's FP32 graph; `images`: float32 [N, C, H, W] in
    [0, 1]; `weights`: what each stands for, [N], 1 in sum
    (all alike by default). Empty for a graph that the twin cannot run.
    """
    if obstacle(fp32, images.shape[1:]) is not None:
        return {}
    twin = Twin(fp32).eval()
    output, names = fp32.graph.output[0].name, list(candidates)
    weights = even(images) if weights is None else weights
    sums = {name: dict.fromkeys(candidates[name], 0.0) for name in names}
    generator = torch.Generator().manual_seed(seed)
    size = min(max(gradient_batch(fp32) // _HELD, 1), _AT_ONCE)
    with (reporter or Reporter()).task("pricing ranges", len(images), "images") as task:
        for start in range(0, len(images), size):
            part = slice(start, start + size)
            x = torch.from_numpy(images[part]).requires_grad_(True)
            share = torch.from_numpy(weights[part])
            values = twin.tensors(x, [*names, output])
            log_p = values[output].log_softmax(1)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            inputs = {name: values[name] for name in names if values[name].requires_grad}
            answers = log_p.gather(1, labels).sum()
            found = torch.autograd.grad(answers, list(inputs.values()), materialize_grads=True)
            for name, gradient in zip(inputs, found, strict=True):
                value = values[name].detach()
                for method, grid in candidates[name].items():
                    error = grid.rounded(value) - value
                    moved = (gradient * error).flatten(1).sum(1).double()
                    sums[name][method] += 0.5 * float(share @ moved.square())
            task.advance(len(x))
    return sums
