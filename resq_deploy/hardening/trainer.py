"""The training loop: schedules, mixed precision, EMA, several processes, exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from resq_deploy.console import Reporter, Task
from resq_deploy.data import Dataset
from resq_deploy.errors import ModelError
from resq_deploy.hardening.distributed import World
from resq_deploy.hardening.losses import one_hot
from resq_deploy.hardening.model import Pixels, has_batchnorm
from resq_deploy.hardening.objectives import Objective, Outcome, Step
from resq_deploy.hardening.recipe import Phase, Recipe
from resq_deploy.hardening.sampling import Sampler, augmented, derive

Log = Callable[[str, float, int], None]
Score = Callable[[Pixels], Mapping[str, float]]
Save = Callable[[dict[str, Any]], None]

_SAVE_SECONDS = 60.0
_WARMUP = 0.15
_BASE_BATCH = 128
_MAX_NORM = 5.0
_WINDOWS = 20  # an average reaches back over a twentieth of a short phase, not over all of it
_ADAM_DECAY = 0.05


@dataclass(frozen=True, slots=True)
class Job:
    """One phase to train: `name` for people, `number` for seeds; `score` returns figures with the
    key `joint`.
    """

    name: str
    number: int
    phase: Phase
    objective: Objective
    data: Dataset
    augment: str
    reliability: float
    seed: int
    score: Score


class Trainer:
    """Trains a model for one phase after another; `train` leaves the averaged weights in the
    model.
    """

    def __init__(
        self, model: Pixels, recipe: Recipe, world: World, reporter: Reporter, log: Log, save: Save
    ) -> None:
        self.model, self.recipe, self.world = model, recipe, world
        self.reporter, self.log, self.save = reporter, log, save

    def train(self, job: Job, state: Mapping[str, Any] | None = None) -> dict[str, float]:
        """Run a phase, from `state` (as `save` got it) if given. Returns the last scores.

        Raises ModelError if the loss is no longer finite; what was saved before stays.
        """
        run = _Run(self, job)
        if state is not None:
            run.load(state)
        with self.reporter.task(job.name, run.total, "steps") as task:
            task.advance(run.done)
            scores = run.loop(task)
        self.model.load_state_dict(run.kept)
        self.model.eval()
        return scores


class _Run:
    """The state of one phase in training."""

    def __init__(self, owner: Trainer, job: Job) -> None:
        self.owner, self.job = owner, job
        self.model, self.world, recipe = owner.model, owner.world, owner.recipe
        batch = min(recipe.batch, len(job.data))
        self.sampler = Sampler(len(job.data), batch, derive(job.seed, job.number), job.reliability)
        self.total = max(math.ceil(job.phase.epochs * self.sampler.steps), job.phase.min_steps)
        self.optimizer = optimizer(self.model, job.phase, recipe)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, partial(factor, kind=job.phase.schedule, total=self.total)
        )
        self.scaler = torch.amp.GradScaler(self.world.device.type, enabled=recipe.amp == "fp16")
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.kept = self.average
        self.done = 0
        self.order: Tensor | None = None
        self.best, self.waited = -1.0, 0
        self.saved_at = time.monotonic()
        self.scores: dict[str, float] = {}

    def loop(self, task: Task) -> dict[str, float]:
        """Train until the end, or until patience is over."""
        while self.done < self.total:
            epoch, start = divmod(self.done, self.sampler.steps)
            if start == 0 or self.order is None:
                self.order = self.sampler.epoch(epoch)
            for indices in self.order[start : start + self.total - self.done]:
                self._step(indices, task)
            if self._end_of_epoch(task):
                break
        return self.scores

    def _step(self, indices: Tensor, task: Task) -> None:
        self.model.train()
        torch.manual_seed(derive(self.job.seed, self.job.number, self.done, self.world.rank))
        mine = indices[self.world.rank :: self.world.size]
        self.optimizer.zero_grad(set_to_none=True)
        outcome = self.job.objective.run(self._given(mine))
        self._check(outcome)
        self.scaler.unscale_(self.optimizer)
        self.world.average_gradients(self.model.parameters())
        nn.utils.clip_grad_norm_(self.model.parameters(), _MAX_NORM)
        self.job.objective.before_update()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        self.job.objective.after()
        self._average()
        self._learn(indices, mine, outcome)
        self.done += 1
        self._report(outcome, task)
        self._save_sometimes()

    def _given(self, indices: Tensor) -> Step:
        job, world = self.job, self.world
        pixels, labels = job.data.batch(indices.numpy())
        mine = torch.Generator().manual_seed(derive(job.seed, job.number, self.done, 2, world.rank))
        shared = torch.Generator().manual_seed(derive(job.seed, job.number, self.done, 3))
        images = augmented(torch.from_numpy(pixels).to(world.device), job.augment, mine)
        images = images.contiguous(memory_format=torch.channels_last)
        wanted = torch.from_numpy(labels).to(world.device)
        targets = one_hot(wanted, len(job.data.classes), self.owner.recipe.label_smoothing)
        return Step(
            images=images,
            targets=targets,
            progress=self.done / self.total,
            generator=mine,
            shared=shared,
            backward=self._backward,
            autocast=self._autocast,
        )

    def _backward(self, loss: Tensor) -> None:
        torch.autograd.backward(self.scaler.scale(loss))

    def _autocast(self) -> AbstractContextManager[object]:
        amp = self.owner.recipe.amp
        dtype = torch.float16 if amp == "fp16" else torch.bfloat16
        return torch.autocast(self.world.device.type, dtype=dtype, enabled=amp != "off")

    def _check(self, outcome: Outcome) -> None:
        bad = [name for name, value in outcome.losses.items() if not math.isfinite(value)]
        if self.world.total(torch.tensor(float(len(bad)), device=self.world.device)) > 0:
            raise ModelError(
                f"the {bad[0] if bad else 'loss'} is not finite at step {self.done} of {self.job.name}",
                "train with a lower learning rate; the last good checkpoint was kept",
            )

    @torch.no_grad()
    def _average(self) -> None:
        decay = min(self.owner.recipe.ema, 1 - _WINDOWS / (self.total + _WINDOWS))
        for name, value in self.model.state_dict().items():
            held = self.average[name]
            if held.is_floating_point():
                held.lerp_(value, 1 - decay)
            else:
                held.copy_(value)

    def _learn(self, indices: Tensor, mine: Tensor, outcome: Outcome) -> None:
        if outcome.survived is None or self.sampler.strength <= 0:
            return
        everyone = torch.zeros(len(indices), device=self.world.device)
        everyone[self.world.rank :: self.world.size] = outcome.survived.float()
        self.sampler.learn(indices, self.world.total(everyone).cpu() > 0.5)

    def _report(self, outcome: Outcome, task: Task) -> None:
        task.advance(1)
        if self.done % 10 == 0 or self.done == self.total:
            text = " ".join(f"{k} {v:.3f}" for k, v in outcome.losses.items())
            task.note(f"{text} {self._scored()}".rstrip())
            for name, value in outcome.losses.items():
                self.owner.log(f"{self.job.name}/{name}", value, self.done)
            rate = float(self.schedule.get_last_lr()[0])
            self.owner.log(f"{self.job.name}/learning rate", rate, self.done)

    def _scored(self) -> str:
        return " ".join(f"{k} {v:.3f}" for k, v in self.scores.items())

    def _end_of_epoch(self, task: Task) -> bool:
        """Judge the averaged weights, save; whether to stop early."""
        self.world.share(v for v in self.model.buffers() if v.is_floating_point())
        self._judge()
        task.note(self._scored())
        for name, figure in self.scores.items():
            self.owner.log(f"{self.job.name}/{name}", figure, self.done)
        patience, joint = self.owner.recipe.patience, self.scores["joint"]
        self.waited = 0 if joint > self.best else self.waited + 1
        if joint > self.best or patience == 0:
            self.kept = {k: v.clone() for k, v in self.average.items()}
        self.best = max(joint, self.best)
        self._save()
        return 0 < patience <= self.waited

    def _judge(self) -> None:
        now = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        found = self.job.score(self.model) if self.world.leads else {"joint": 0.0}
        self.scores = {**found, "joint": self.world.agreed(found["joint"])}
        self.model.load_state_dict(now)

    def _save_sometimes(self) -> None:
        if time.monotonic() - self.saved_at > _SAVE_SECONDS:
            self._save()

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if self.world.leads:
            self.owner.save(self.state())

    def state(self) -> dict[str, Any]:
        """Everything that the rest of this phase depends on: tensors and plain values."""
        return {
            "done": self.done,
            "total": self.total,
            "model": self.model.state_dict(),
            "average": self.average,
            "kept": self.kept,
            "order": self.order,
            "optimizer": self.optimizer.state_dict(),
            "schedule": {"last_epoch": self.schedule.last_epoch},
            "scaler": self.scaler.state_dict(),
            "sampler": self.sampler.scores,
            "objective": self.job.objective.state_dict(),
            "best": self.best,
            "waited": self.waited,
            "scores": dict(self.scores),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state. Raises ModelError if it is that of another run."""
        if state["total"] != self.total or len(state["sampler"]) != len(self.sampler.scores):
            raise ModelError(
                f"the saved state is of {state['total']} steps, this run has {self.total}",
                "resume with the settings it was started with",
            )
        self.done = int(state["done"])
        self.model.load_state_dict(state["model"])
        self.average = {k: v.to(self.world.device).clone() for k, v in state["average"].items()}
        self.kept = {k: v.to(self.world.device).clone() for k, v in state["kept"].items()}
        self.order = state["order"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.last_epoch = int(state["schedule"]["last_epoch"])
        rate = factor(self.done, self.job.phase.schedule, self.total)
        for group, base in zip(self.optimizer.param_groups, self.schedule.base_lrs, strict=True):
            group["lr"] = base * rate
        self.scaler.load_state_dict(state["scaler"])
        self.sampler.scores = state["sampler"].clone()
        self.job.objective.load_state_dict(state["objective"])
        self.best, self.waited = float(state["best"]), int(state["waited"])
        self.scores = {k: float(v) for k, v in state["scores"].items()}


def optimizer(model: nn.Module, phase: Phase, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum for networks with BatchNorm, AdamW for others; no decay of biases
    and norms.
    """
    tall = [p for p in model.parameters() if p.ndim > 1 and p.requires_grad]
    flat = [p for p in model.parameters() if p.ndim <= 1 and p.requires_grad]
    scale = recipe.batch / _BASE_BATCH
    convolutional = has_batchnorm(model)
    decay = recipe.weight_decay if convolutional else _ADAM_DECAY
    groups: list[dict[str, Any]] = [
        {"params": tall, "weight_decay": decay},
        {"params": flat, "weight_decay": 0.0},
    ]
    if convolutional:
        return torch.optim.SGD(groups, lr=phase.lr * scale, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=phase.adam_lr * math.sqrt(scale))


def factor(step: int, kind: str, total: int) -> float:
    """The learning rate at a step, relative to its peak: one-cycle warms up first, both fall along
    a cosine to 0.
    """
    warm = max(1, round(_WARMUP * total)) if kind == "one-cycle" else 0
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))


def channel_statistics(data: Dataset, seed: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels of each channel, over at most 2,048 examples."""
    sample = data.take(2048, seed)
    images, _ = sample.batch(np.arange(len(sample)))
    mean, std = images.mean((0, 2, 3), dtype=np.float64), images.std((0, 2, 3), dtype=np.float64)
    rounded = [
        tuple(round(float(v), 4) for v in values) for values in (mean, np.maximum(std, 0.05))
    ]
    return rounded[0], rounded[1]
