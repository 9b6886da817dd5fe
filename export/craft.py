"""White-box attacks through any torch module of pixels -> logits: the twin, a faulty twin, or the FP32 model.

    fgsm     one signed step (Goodfellow 2015, 1412.6572)
    pgd      projected gradient descent from random starts (Madry 2018, 1706.06083)
    apgd     Auto-PGD on cross-entropy (Croce & Hein 2020, 2003.01690, algorithm 1)
    apgd-t   Auto-PGD on the targeted difference of logits ratio (same, eq. 6), one run per target class

All are bounded in pixel space, in L-inf or L2, and keep of every image the iterate with the largest margin
(largest other logit - true logit): a point just past the boundary on the twin need not be past it on a device that
rounds once less. Restarts and targets work on the images that still stand. Black-box attacks: runtime/blackbox.py.
Written here because the toolbox draws from global state, keeps the last iterate, and its Auto-PGD goes through numpy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from resq_deploy.budget import WHITE_BOX, Budget, Norm, check_budget, parse_attack, parse_eps
from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import AttackError

Loss = Callable[[Tensor, Tensor], Tensor]  # logits [B, classes], labels [B] -> [B], to be raised

_MOMENTUM = 0.75  # APGD's alpha: how much of a step is the new gradient
_RISING = 0.75  # APGD's rho: below this share of rising steps the step is halved
_DLR_LOGITS = 4


@dataclass(frozen=True, slots=True)
class Parameters:
    """How an attack runs.

    `steps`: gradients per run; `restarts`: runs from other starts; `step_size`: in pixels (L2: length), None:
    eps / 4 for L-inf PGD, 2.5 eps / steps for L2; `random_start`: PGD's; `targets`: classes APGD-T tries, the
    runners-up first.
    """

    steps: int
    restarts: int = 1
    step_size: float | None = None
    random_start: bool = True
    targets: int = 9

    def __post_init__(self) -> None:
        if min(self.steps, self.restarts, self.targets) < 1:
            raise AttackError("an attack needs at least one step, restart and target")
        if self.step_size is not None and not self.step_size > 0:
            raise AttackError(f"a step size of {self.step_size:g}", "above 0, in pixels of [0, 1]")


DEFAULTS = {
    "fgsm": Parameters(steps=1, random_start=False),
    "pgd": Parameters(steps=20),
    "apgd": Parameters(steps=100),
    "apgd-t": Parameters(steps=100),
}


def craft(
    network: nn.Module,
    sample: Sample,
    attack: str,
    eps: float | str,
    *,
    norm: Norm = "linf",
    batch: int = 128,
    seed: int = 0,
    reporter: Reporter | None = None,
    **params: Any,
) -> NDArray[np.float32]:
    """Adversarial images, float32 [N, C, H, W] in [0, 1], each within eps of its original in this norm.

    `network`: pixels float32 [B, C, H, W] -> logits, in eval mode; its device is used. `params`: fields of
    Parameters. Deterministic for a seed, a batch size and a thread count. Raises AttackError for an unknown
    attack, parameter or budget.
    """
    name = white_box(attack)
    budget = Budget(norm, parse_eps(eps, norm))
    parameters = parameters_of(name, params)
    say = reporter or Reporter()
    device = _device(network)
    made = np.empty_like(sample.images)
    generator = torch.Generator(device=device).manual_seed(seed)
    with say.task(f"crafting {name} {budget}", len(sample), "images") as task:
        for start in range(0, len(sample), batch):
            part = slice(start, start + batch)
            x = torch.from_numpy(sample.images[part]).to(device)
            y = torch.from_numpy(sample.labels[part]).to(device)
            run = _Run(network, x, y, budget, parameters, generator)
            made[part] = _ATTACKS[name](run).cpu().numpy()
            task.advance(len(y))
    check_budget(sample.images, made, budget.eps, norm)
    return made


def white_box(attack: str) -> str:
    """The white-box attack of this name. Raises AttackError."""
    name = parse_attack(attack)
    if name not in WHITE_BOX:
        raise AttackError(
            f"{name} needs no gradients and is run on the artifact",
            f"crafted are: {', '.join(WHITE_BOX)}",
        )
    return name


def parameters_of(name: str, given: dict[str, Any]) -> Parameters:
    """An attack's parameters, the default where none is given. Raises AttackError for an unknown one."""
    try:
        return replace(DEFAULTS[name], **given)
    except TypeError as error:
        known = ", ".join(Parameters.__dataclass_fields__)
        raise AttackError(f"{name} has no such parameter: {error}", f"known: {known}") from error


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """Largest other logit minus the true one, [B]; above 0: misclassified. Infinite where a logit is not a number."""
    true = logits.gather(1, labels[:, None])[:, 0]
    other = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    return (other - true).nan_to_num(nan=torch.inf)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, [B]."""
    return F.cross_entropy(logits, labels, reduction="none")


def targeted_dlr(target: Tensor) -> Loss:
    """The targeted difference of logits ratio (2003.01690, eq. 6): -(z_y - z_t) / (z_1 - (z_3 + z_4) / 2).

    z_k is the k-th largest logit. Invariant to shift and scale of the logits, so that large logits do not
    round the gradient to zero. With fewer than 4 classes the plain difference z_t - z_y.
    """

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        gap = logits.gather(1, target[:, None])[:, 0] - logits.gather(1, labels[:, None])[:, 0]
        if logits.shape[1] < _DLR_LOGITS:
            return gap
        top = logits.topk(_DLR_LOGITS, dim=1).values
        return gap / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)

    return loss


def zero_gradients(network: nn.Module, sample: Sample, batch: int = 128) -> float:
    """Share of the images at which the cross-entropy has no gradient at all: what a white box cannot start from.

    AutoAttack warns of it (flag_docs.md of its code); runtime/sanity.py does where a bundle's record of an attack
    has it among `transfer` as `zero_gradients`.
    """
    budget, device, none = Budget("linf", 1.0), _device(network), 0
    for start in range(0, len(sample), batch):
        part = slice(start, start + batch)
        x, y = (torch.from_numpy(v[part]).to(device) for v in (sample.images, sample.labels))
        run = _Run(network, x, y, budget, DEFAULTS["fgsm"], torch.Generator(device=device))
        gradient, _ = run.gradient(x, _all(run), cross_entropy)
        none += int((gradient.flatten(1).abs().amax(1) == 0).sum())
    return none / max(len(sample), 1)


class _Run:
    """One batch under attack: what stays the same, and the best iterate of each image so far."""

    def __init__(
        self,
        network: nn.Module,
        x: Tensor,
        y: Tensor,
        budget: Budget,
        parameters: Parameters,
        generator: torch.Generator,
    ) -> None:
        self.network, self.x, self.y = network, x, y
        self.eps, self.linf = budget.eps, budget.norm == "linf"
        self.parameters = parameters
        self.generator = generator
        self.best = x.clone()
        self.margin = torch.full((len(y),), -torch.inf, device=x.device)

    @property
    def standing(self) -> Tensor:
        """Indices of the images that no iterate has fooled yet."""
        return (self.margin <= 0).nonzero()[:, 0]

    def project(self, moved: Tensor, rows: Tensor) -> Tensor:
        """Into the eps ball around the originals and into [0, 1]."""
        x = self.x[rows]
        if self.linf:
            return torch.clamp(moved, x - self.eps, x + self.eps).clamp_(0, 1)
        delta = moved - x
        return (x + delta * (self.eps / _length(delta).clamp_min(self.eps))).clamp_(0, 1)

    def step(self, gradient: Tensor, size: Tensor | float) -> Tensor:
        """The steepest step of this size: signs, or the gradient at length 1."""
        gradient = gradient.nan_to_num(0.0, 0.0, 0.0)
        if self.linf:
            return gradient.sign_().mul_(size)
        return gradient * (size / _length(gradient).clamp_min(1e-12))

    def start(self, rows: Tensor) -> Tensor:
        """A random point of the ball: uniform in the box, or uniform in the L2 ball."""
        x = self.x[rows]
        if self.linf:
            noise = torch.rand(x.shape, generator=self.generator, device=x.device) * 2 - 1
            return self.project(x + self.eps * noise, rows)
        noise = torch.randn(x.shape, generator=self.generator, device=x.device)
        radius = torch.rand(len(x), generator=self.generator, device=x.device)
        radius = (radius ** (1 / x[0].numel())).reshape(-1, *[1] * (x.ndim - 1))
        return self.project(x + noise * (self.eps * radius / _length(noise)), rows)

    def gradient(self, moved: Tensor, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
        """Gradient of the loss at these points, and the loss [B]; the iterates are kept where they are best."""
        moved = moved.detach().requires_grad_()
        with torch.enable_grad():
            logits = self.network(moved)
            value = loss(logits, self.y[rows])
            (gradient,) = torch.autograd.grad(value.sum(), moved)
        self.keep(moved.detach(), logits.detach(), rows)
        return gradient, value.detach()

    def look(self, moved: Tensor, rows: Tensor) -> None:
        """Run points forward only, and keep them where they are best."""
        with torch.no_grad():
            self.keep(moved, self.network(moved), rows)

    def keep(self, moved: Tensor, logits: Tensor, rows: Tensor) -> None:
        """Remember the iterates with the largest margin so far."""
        here = margin(logits, self.y[rows])
        better = here > self.margin[rows]
        self.margin[rows[better]] = here[better]
        self.best[rows[better]] = moved[better]


def _fgsm(run: _Run) -> Tensor:
    rows = _all(run)
    size = run.parameters.step_size or run.eps
    gradient, _ = run.gradient(run.x, rows, cross_entropy)
    run.look(run.project(run.x + run.step(gradient, size), rows), rows)
    return run.best


def _pgd(run: _Run) -> Tensor:
    given = run.parameters
    size = given.step_size or (run.eps / 4 if run.linf else 2.5 * run.eps / given.steps)
    for restart in range(given.restarts):
        rows = _all(run) if restart == 0 else run.standing
        if not len(rows):
            break
        moved = run.start(rows) if given.random_start or restart else run.x[rows]
        for _ in range(given.steps):
            gradient, _ = run.gradient(moved, rows, cross_entropy)
            moved = run.project(moved + run.step(gradient, size), rows)
        run.look(moved, rows)
    return run.best


def _apgd(run: _Run) -> Tensor:
    for restart in range(run.parameters.restarts):
        rows = _all(run) if restart == 0 else run.standing
        if len(rows):
            _auto(run, rows, cross_entropy)
    return run.best


def _apgd_targeted(run: _Run) -> Tensor:
    with torch.no_grad():
        logits = run.network(run.x)
    run.keep(run.x, logits, _all(run))
    order = logits.scatter(1, run.y[:, None], -torch.inf).argsort(1, descending=True)
    for _ in range(run.parameters.restarts):
        for nth in range(min(run.parameters.targets, logits.shape[1] - 1)):
            rows = run.standing
            if not len(rows):
                return run.best
            _auto(run, rows, targeted_dlr(order[rows, nth]))
    return run.best


def _auto(run: _Run, rows: Tensor, loss: Loss) -> None:
    """One run of Auto-PGD (2003.01690, algorithm 1): momentum, and a step that halves when progress stalls."""
    shape = (-1, *[1] * (run.x.ndim - 1))
    size = torch.full((len(rows),), 2 * run.eps, device=run.x.device)
    moved = previous = run.start(rows)
    gradient, value = run.gradient(moved, rows, loss)
    best, best_gradient, best_value = moved.clone(), gradient.clone(), value.clone()
    rising = torch.zeros_like(size)
    reduced = torch.ones_like(size, dtype=torch.bool)
    checked, checked_value = 0, best_value.clone()
    checkpoints = _checkpoints(run.parameters.steps)
    for step in range(run.parameters.steps):
        z = run.project(moved + run.step(gradient.clone(), size.reshape(shape)), rows)
        turn = _MOMENTUM if step else 1.0
        after = run.project(moved + turn * (z - moved) + (1 - turn) * (moved - previous), rows)
        previous, moved = moved, after
        gradient, after_value = run.gradient(moved, rows, loss)
        rising += after_value > value
        value = after_value
        better = value > best_value
        best[better], best_gradient[better] = moved[better], gradient[better]
        best_value = torch.where(better, value, best_value)
        if step + 1 in checkpoints:
            few = rising < _RISING * (step + 1 - checked)
            halve = few | (~reduced & (best_value <= checked_value))
            size = torch.where(halve, size / 2, size)
            moved = torch.where(halve.reshape(shape), best, moved)
            previous = torch.where(halve.reshape(shape), best, previous)
            gradient = torch.where(halve.reshape(shape), best_gradient, gradient)
            value = torch.where(halve, best_value, value)
            reduced, checked, checked_value = halve, step + 1, best_value.clone()
            rising.zero_()


def _checkpoints(steps: int) -> frozenset[int]:
    """After which steps the step size is looked at (2003.01690, section 3.1)."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return frozenset(int(np.ceil(round(share * steps, 6))) for share in shares[1:])


def _length(delta: Tensor) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(delta.flatten(1), dim=1)
    return length.reshape(-1, *[1] * (delta.ndim - 1))


def _all(run: _Run) -> Tensor:
    return torch.arange(len(run.y), device=run.x.device)


def _device(network: nn.Module) -> torch.device:
    for tensor in (*network.parameters(), *network.buffers()):
        return tensor.device
    return torch.device("cpu")


_ATTACKS: dict[str, Callable[[_Run], Tensor]] = {
    "fgsm": _fgsm,
    "pgd": _pgd,
    "apgd": _apgd,
    "apgd-t": _apgd_targeted,
}
