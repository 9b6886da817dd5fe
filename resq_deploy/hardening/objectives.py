"""The three things that training can aim at: accuracy alone, stage I (attacks), stage II
(faults).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from resq_deploy.hardening import codes, perturb
from resq_deploy.hardening.losses import (
    feature_distance,
    lipschitz_penalty,
    mixed,
    statistics_drift,
)
from resq_deploy.hardening.model import NormInputs, Pixels, Probe, frozen_statistics
from resq_deploy.hardening.recipe import Attack, Fault, Perturbation

_WARMUP = 1 / 3  # of stage II: the share of training in which the BER rises


@dataclass(frozen=True, slots=True)
class Step:
    """One batch and what a step may use.

    `images` float32 [B, C, H, W] in [0, 1]; `targets` class probabilities [B, classes]; `progress`
    0 to 1 through the phase; `backward` adds the gradient of a loss; `autocast` makes the context
    of mixed precision; `generator` is of the CPU and belongs to this step and this process,
    `shared` is the same in every process.
    """

    images: Tensor
    targets: Tensor
    progress: float
    generator: torch.Generator
    shared: torch.Generator
    backward: Callable[[Tensor], None]
    autocast: Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, slots=True)
class Outcome:
    """Losses by name, and which examples of the batch were right under faults or attack (bool [B];
    None: not looked).
    """

    losses: Mapping[str, float]
    survived: Tensor | None = None


class Objective(Protocol):
    """What one phase trains for."""

    def run(self, step: Step) -> Outcome:
        """Add the gradients of one batch to the parameters."""

    def after(self) -> None:
        """Called once the optimizer has moved the weights."""

    def before_update(self) -> None:
        """Called when the gradients are complete."""

    def state_dict(self) -> dict[str, Tensor]:
        """What resuming needs."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over saved state."""

    def close(self) -> None:
        """Take hooks off the model."""


class Plain:
    """Cross entropy, with Mixup if asked for: ordinary training."""

    def __init__(self, model: Pixels, mixup: float = 0.0) -> None:
        self.model, self.mixup = model, mixup

    def run(self, step: Step) -> Outcome:
        """One forward and one backward pass."""
        images, targets = _mix(step, self.mixup)
        with step.autocast():
            loss = functional.cross_entropy(self.model(images), targets)
        step.backward(loss)
        return Outcome({"loss": float(loss.detach())})

    def before_update(self) -> None:
        """Nothing."""

    def after(self) -> None:
        """Nothing."""

    def state_dict(self) -> dict[str, Tensor]:
        """Nothing to keep."""
        return {}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Nothing to take over."""

    def close(self) -> None:
        """Nothing to take off."""


class AttackObjective(Plain):
    """Stage I: (1 - a) CE(f(x), y) + a CE(f(x'), y) + lambda D(f(x'), f(x)) + beta sum ||W^T W -
    I||^2.

    x' is a perturbed x (a kind drawn for each step), D the relative feature distance. The gradient
    for the single-step kind comes from the clean pass's own backward, so that a step costs two
    passes and not three.
    """

    def __init__(self, model: Pixels, settings: Attack) -> None:
        super().__init__(model, settings.mixup)
        self.settings = settings
        self.probe = Probe(model, settings.layers)

    def run(self, step: Step) -> Outcome:
        """A clean and a perturbed pass."""
        s = self.settings
        images, targets = _mix(step, s.mixup)
        kind = s.perturbations[_draw(len(s.perturbations), step.shared)]
        clean = images.detach().requires_grad_(kind == "fgsm")
        with step.autocast():
            logits, features = self.probe(clean)
            first = functional.cross_entropy(logits, targets)
        step.backward((1 - s.adversarial) * first + _penalty(self.model, s.lipschitz))
        moved = _perturbed(self.model, kind, clean, targets, s, step)
        with step.autocast():
            logits, after = self.probe(moved)
            second = functional.cross_entropy(logits, targets)
            gap = feature_distance(after, features)
        step.backward(s.adversarial * second + s.consistency * gap)
        survived = logits.detach().argmax(1) == targets.argmax(1)
        losses = {"loss": first, "perturbed": second, "consistency": gap}
        return Outcome({k: float(v.detach()) for k, v in losses.items()}, survived)

    def close(self) -> None:
        """Take the probe off the model."""
        self.probe.close()


class FaultObjective(AttackObjective):
    """Stage II: (1 - b) CE(f(x; w_q), y) + b CE(f(x'; w_f), y) + lambda D(f(x'; w_f), f(x; w_q)) + d KL.

    w_q are the weights as INT8 codes say them, w_f the same with fresh bit flips, both
    straight-through. x' is the perturbed image of stage I where that stage is kept (`attack`), else
    x: the network is asked to bear both at once. KL keeps BatchNorm's frozen statistics true to the
    weights, which nothing else does (losses.statistics_drift).
    """

    def __init__(self, model: Pixels, settings: Fault, attack: Attack, keep_attack: bool) -> None:
        super().__init__(model, attack)
        self.fault, self.keep_attack = settings, keep_attack
        self.sensitivity = codes.Sensitivity(model.network, settings.sensitivity)
        self.norms = NormInputs(model)

    def run(self, step: Step) -> Outcome:
        """A fault-free and a faulty pass."""
        s, f = self.settings, self.fault
        network = self.model.network
        kind = s.perturbations[_draw(len(s.perturbations), step.shared)]
        clean = step.images.detach().requires_grad_(self.keep_attack and kind == "fgsm")
        with step.autocast(), frozen_statistics(self.model), self.norms.caught() as read:
            logits, features = self.probe(clean, codes.faulty_weights(network, 0.0, step.shared))
            first = functional.cross_entropy(logits, step.targets)
        drift = statistics_drift(read) if f.drift > 0 else torch.zeros(())
        penalty = _penalty(self.model, s.lipschitz) + f.drift * drift
        step.backward((1 - f.faulty) * first + penalty)
        moved = step.images
        if self.keep_attack:
            moved = _perturbed(self.model, kind, clean, step.targets, s, step)
            exposed = round(f.attacked * len(moved))
            moved = torch.cat([moved[:exposed], step.images[exposed:]])
        with step.autocast(), frozen_statistics(self.model):
            weights = codes.faulty_weights(
                network, self._ber(step), step.generator, self.sensitivity.tilts(network)
            )
            logits, after = self.probe(moved, weights)
            second = functional.cross_entropy(logits, step.targets)
            gap = feature_distance(after, features)
        step.backward(f.faulty * second + s.consistency * gap)
        survived = logits.detach().argmax(1) == step.targets.argmax(1)
        losses = {"loss": first, "faulty": second, "consistency": gap, "drift": drift}
        return Outcome({k: float(v.detach()) for k, v in losses.items()}, survived)

    def _ber(self, step: Step) -> float:
        return self.fault.ber * min(1.0, step.progress / _WARMUP)

    def before_update(self) -> None:
        """Learn from the gradients which channels flips hurt most."""
        self.sensitivity.update(self.model.network)

    def after(self) -> None:
        """Clip the weights."""
        codes.clip_weights(self.model.network, self.fault.clip)

    def close(self) -> None:
        """Take all hooks off the model."""
        super().close()
        self.norms.close()

    def state_dict(self) -> dict[str, Tensor]:
        """The sensitivities."""
        return self.sensitivity.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over sensitivities."""
        self.sensitivity.load_state_dict(state)


def _mix(step: Step, alpha: float) -> tuple[Tensor, Tensor]:
    if alpha <= 0:
        return step.images, step.targets
    return mixed(step.images, step.targets, alpha, step.generator)


def _penalty(model: Pixels, weight: float) -> Tensor | float:
    return weight * lipschitz_penalty(model.network) if weight > 0 else 0.0


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))


def _perturbed(
    model: Pixels, kind: Perturbation, images: Tensor, targets: Tensor, s: Attack, step: Step
) -> Tensor:
    plain = images.detach()
    if kind == "uniform":
        return perturb.uniform(plain, s.eps, step.generator)
    if kind == "bitplane":
        return perturb.bit_planes(plain, step.generator)
    if kind == "fgsm":
        assert images.grad is not None
        return perturb.step_along(plain, images.grad, s.eps, step.generator)

    def loss(moved: Tensor) -> Tensor:
        with step.autocast():
            return functional.cross_entropy(model(moved), targets)

    with frozen_statistics(model):
        return perturb.ascend(loss, plain, s.eps, s.steps, step.generator)
