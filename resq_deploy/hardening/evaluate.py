"""Quick figures while training: clean, under attack, under simulated faults. The proof is
resq-validate's.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from resq_deploy.hardening import codes, perturb
from resq_deploy.hardening.model import Pixels

_BATCH = 256


@torch.no_grad()
def accuracy(
    model: Pixels, images: Tensor, labels: Tensor, weights: Mapping[str, Tensor] | None = None
) -> float:
    """Share of examples whose largest logit is the label, 0 to 1; `weights` stand in for the
    network's own.
    """
    named = {f"network.{name}": value for name, value in (weights or {}).items()}
    right = 0
    for part, wanted in zip(*(torch.split(t, _BATCH) for t in (images, labels)), strict=True):
        right += int((functional_call(model, named, (part,)).argmax(1) == wanted).sum())
    return right / len(labels)


def robust_accuracy(
    model: Pixels, images: Tensor, labels: Tensor, eps: float, steps: int, seed: int
) -> float:
    """Accuracy under PGD with `steps` steps in the L-inf ball of `eps`, one restart."""
    generator = torch.Generator().manual_seed(seed)
    right = 0
    for part, wanted in zip(*(torch.split(t, _BATCH) for t in (images, labels)), strict=True):
        moved = perturb.ascend(
            lambda x, y=wanted: functional.cross_entropy(model(x), y),  # type: ignore[misc]
            part,
            eps,
            steps,
            generator,
        )
        with torch.no_grad():
            right += int((model(moved).argmax(1) == wanted).sum())
    return right / len(labels)


def faulty_accuracy(
    model: Pixels, images: Tensor, labels: Tensor, ber: float, trials: int, seed: int
) -> float:
    """Mean accuracy over `trials` draws of flips in the INT8 codes of the weights (activations
    stay float).
    """
    generator = torch.Generator().manual_seed(seed)
    total = 0.0
    for _ in range(trials):
        with torch.no_grad():
            weights = codes.faulty_weights(model.network, ber, generator)
        total += accuracy(model, images, labels, weights)
    return total / trials
