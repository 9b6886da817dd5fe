"""harden_model(): from an architecture's name and data to a checkpoint, readable top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from resq_deploy import data as datasets
from resq_deploy import networks
from resq_deploy.checkpoint import Checkpoint, load_safely, save_atomic
from resq_deploy.console import Reporter
from resq_deploy.data import Dataset
from resq_deploy.errors import DataError, ModelError
from resq_deploy.hardening import evaluate
from resq_deploy.hardening.checks import check_fits, check_writable, chosen_device
from resq_deploy.hardening.distributed import World, world
from resq_deploy.hardening.initial import PLAIN, STAGE_1, STAGE_2, Start, start_from
from resq_deploy.hardening.kernels import sound_kernels
from resq_deploy.hardening.logs import Log, scalars
from resq_deploy.hardening.model import Pixels
from resq_deploy.hardening.objectives import AttackObjective, FaultObjective, Objective, Plain
from resq_deploy.hardening.recipe import STAGES, Phase, Recipe, Stages
from resq_deploy.hardening.sampling import augmentation
from resq_deploy.hardening.trainer import Job, Trainer, channel_statistics

Shape = tuple[int, int, int]

_JUDGED = 1000  # examples of the holdout that an epoch is judged by
_PGD_STEPS, _TRIALS = 5, 4
_STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked for; see harden_model."""

    arch: str
    arch_args: Mapping[str, Any]
    data: str
    input_shape: Shape | None
    stages: Stages
    recipe: Recipe
    init: str | None
    seed: int

    def identity(self) -> dict[str, Any]:
        """What a saved state must agree with to be resumed."""
        return {
            "arch": self.arch,
            "arch_args": dict(self.arch_args),
            "data": self.data,
            "input_shape": None if self.input_shape is None else list(self.input_shape),
            "stages": self.stages,
            "recipe": self.recipe.as_dict(),
            "init": self.init,
            "seed": self.seed,
        }


def harden_model(
    arch: str,
    data: str | tuple[Dataset, Dataset],
    *,
    output: str | os.PathLike[str] | None = None,
    stages: Stages = "1+2",
    recipe: Recipe | None = None,
    arch_args: Mapping[str, Any] | None = None,
    input_shape: Shape | None = None,
    init: str | None = None,
    seed: int = 0,
    device: str = "auto",
    resume: bool = False,
    log_dir: str | os.PathLike[str] | None = None,
    reporter: Reporter | None = None,
) -> Checkpoint:
    """Train a network so that it bears attacks (stage I) and bit flips (stage II).

    `data`: a name that resq_deploy.data.load knows, or (train, test). `input_shape` (C, H, W): what
    images of an imagefolder are brought to, and others must have. `stages`: none (plain training),
    1, 2, 1+2; without `init` plain training comes first. `init`: a checkpoint of the same network
    to start from, or `imagenet` for torchvision's weights. `output`: where the checkpoint goes
    after every stage (its folder is made); beside it lies OUTPUT.state until the end, from which
    `resume` goes on exactly. `log_dir`: event files for TensorBoard. Started by torchrun, the
    processes share the work. Returns the checkpoint with its metrics on the test split (fractions;
    simulated, not deployed).

    Raises DataError, ModelError (also when the loss is no longer finite: what was saved is kept),
    MissingExtra. Method: RESQ (arXiv 2603.15413); the losses are in docs/hardening.md.
    """
    if stages not in STAGES:
        raise ModelError(f"unknown stages {stages!r}", f"one of: {', '.join(STAGES)}")
    name = data if isinstance(data, str) else data[0].name
    args = dict(arch_args or {})
    asked = Request(arch, args, name, input_shape, stages, recipe or Recipe(), init, seed)
    chosen, quiet = chosen_device(device, asked.recipe), reporter or Reporter()
    train, test = _datasets(data, input_shape, quiet)
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng())
        here = stack.enter_context(world(chosen))
        for sentence in asked.recipe.idle(stages) if here.leads else ():
            quiet.warn(sentence)
        log = stack.enter_context(scalars(log_dir if here.leads else None))
        run = _Hardening(asked, train, test, here, quiet if here.leads else Reporter(), log)
        stack.enter_context(sound_kernels(run.model))
        return run.run(None if output is None else Path(output), resume)


class _Hardening:
    """One run of harden_model."""

    def __init__(
        self,
        asked: Request,
        train: Dataset,
        test: Dataset,
        here: World,
        reporter: Reporter,
        log: Log,
    ) -> None:
        self.asked, self.test, self.world = asked, test, here
        self.reporter, self.log = reporter, log
        self.train, self.holdout = _split(train, asked.recipe.holdout, asked.seed)
        torch.manual_seed(asked.seed)
        network = networks.build(
            asked.arch,
            input_shape=train.shape,
            classes=len(train.classes),
            args=asked.arch_args,
        )
        check_fits(network, asked.arch, train.shape, len(train.classes))
        statistics = channel_statistics(self.train, asked.seed)
        start = Start(statistics)
        if asked.init is not None:
            start = start_from(asked.init, asked.arch, network, statistics)
        self.before = start.phases
        self.mean, self.std = start.statistics
        self.model = Pixels(network, self.mean, self.std).to(here.device)
        self.model.to(memory_format=torch.channels_last)
        self.digest = train.digest()

    def run(self, output: Path | None, resume: bool) -> Checkpoint:
        """Every phase in turn; the checkpoint is written after each."""
        if output is not None:
            check_writable(output)
        state = self._saved(output) if resume else None
        first = int(state["phase"]) if state else 0
        phases = self._phases()
        for index in range(first, len(phases)):
            label, phase, make = phases[index]
            objective = make()
            job = self._job(label, index, phase, objective)
            self._trainer(self._saver(output, index)).train(
                job, state["run"] if state and index == first else None
            )
            objective.close()
            checkpoint = self._checkpoint([p[0] for p in phases[: index + 1]])
            self._write(checkpoint, output)
        if output is not None and self.world.leads:
            state_path(output).unlink(missing_ok=True)
        return checkpoint

    def _trainer(self, save: Callable[[dict[str, Any]], None]) -> Trainer:
        return Trainer(self.model, self.asked.recipe, self.world, self.reporter, self.log, save)

    def _phases(self) -> list[tuple[str, Phase, Callable[[], Objective]]]:
        recipe, stages = self.asked.recipe, self.asked.stages
        found: list[tuple[str, Phase, Callable[[], Objective]]] = []
        if not self.before or stages == "none":
            found.append((PLAIN, recipe.plain, lambda: Plain(self.model)))
        if stages in ("1", "1+2"):
            attack = recipe.attack
            found.append((STAGE_1, attack.phase, lambda: AttackObjective(self.model, attack)))
        if stages in ("2", "1+2"):
            keep = stages == "1+2" or STAGE_1 in self.before
            found.append(
                (
                    STAGE_2,
                    recipe.fault.phase,
                    lambda: FaultObjective(self.model, recipe.fault, recipe.attack, keep),
                )
            )
        return found

    def _job(self, label: str, number: int, phase: Phase, objective: Objective) -> Job:
        reliability = self.asked.recipe.fault.reliability if label == STAGE_2 else 0.0
        return Job(
            name=label,
            number=number,
            phase=phase,
            objective=objective,
            data=self.train,
            augment=augmentation(self.asked.data, self.asked.recipe.augment),
            reliability=reliability,
            seed=self.asked.seed,
            score=lambda model: self._score(model, self.holdout, label),
        )

    def _score(self, model: Pixels, data: Dataset, label: str) -> dict[str, float]:
        sample = data.take(_JUDGED, 0)
        images, labels = self._tensors(sample)
        figures = {"clean": evaluate.accuracy(model, images, labels)}
        attack, fault, seed = self.asked.recipe.attack, self.asked.recipe.fault, self.asked.seed
        if STAGE_1 in self.before or (label != PLAIN and "1" in self.asked.stages):
            figures["robust"] = evaluate.robust_accuracy(
                model, images, labels, attack.eps, _PGD_STEPS, seed
            )
        if label == STAGE_2:
            figures["faulty"] = evaluate.faulty_accuracy(
                model, images, labels, fault.ber, _TRIALS, seed
            )
        return {**figures, "joint": sum(figures.values()) / len(figures)}

    def _tensors(self, data: Dataset) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = data.batch(np.arange(len(data)))
        device = self.world.device
        return torch.from_numpy(images).to(device), torch.from_numpy(labels).to(device)

    def _checkpoint(self, phases: list[str]) -> Checkpoint:
        metrics = self._score(self.model, self.test, phases[-1])
        metrics.pop("joint")
        sample = self.test
        right = [
            evaluate.accuracy(
                self.model,
                torch.from_numpy(x).to(self.world.device),
                torch.from_numpy(y).to(self.world.device),
            )
            * len(y)
            for x, y in sample.batches(1024)
        ]
        metrics["clean"] = sum(right) / len(sample)
        trained = {
            **self.asked.identity(),
            "phases": [*self.before, *phases],
            "data_digest": self.digest,
            "examples": len(self.train),
        }
        return Checkpoint(
            arch=self.asked.arch,
            arch_args=self.asked.arch_args,
            input_shape=self.test.shape,
            classes=self.test.classes,
            mean=self.mean,
            std=self.std,
            state_dict=_plain_tensors(self.model.network.state_dict()),
            trained=trained,
            seed=self.asked.seed,
            metrics=metrics,
        )

    def _write(self, checkpoint: Checkpoint, output: Path | None) -> None:
        said = ", ".join(f"{k} {v:.2%}" for k, v in checkpoint.metrics.items())
        phases = checkpoint.trained["phases"]
        self.reporter.log(f"after {phases[-1]}: {said}")
        if output is not None and self.world.leads:
            checkpoint.save(output)

    def _saver(self, output: Path | None, index: int) -> Callable[[dict[str, Any]], None]:
        def save(run: dict[str, Any]) -> None:
            if output is not None:
                body = {
                    "resq_training_state": _STATE_VERSION,
                    "identity": self.asked.identity(),
                    "digest": self.digest,
                    "phase": index,
                    "run": run,
                }
                save_atomic(body, state_path(output))

        return save

    def _saved(self, output: Path | None) -> Mapping[str, Any] | None:
        if output is None:
            raise ModelError("nothing to resume", "name the output of the run")
        path = state_path(output)
        if not path.exists():
            return None
        body = load_safely(path)
        if not isinstance(body, Mapping) or body.get("resq_training_state") != _STATE_VERSION:
            raise ModelError(f"{path} is not a training state", "remove it and start again")
        identity = self.asked.identity()
        changed = [k for k, v in identity.items() if body["identity"].get(k) != v]
        if body["digest"] != self.digest:
            changed.append("the data's content")
        if changed:
            raise ModelError(
                f"{path} belongs to another run: {', '.join(changed)} differ",
                "resume with the same command line, or start again without --resume",
            )
        return body


def _plain_tensors(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {k: v.detach().cpu().contiguous().clone() for k, v in state.items()}


def state_path(output: Path) -> Path:
    """Where an unfinished run keeps what it needs to go on."""
    return output.with_name(f"{output.name}.state")


def _datasets(
    data: str | tuple[Dataset, Dataset], shape: Shape | None, reporter: Reporter
) -> tuple[Dataset, Dataset]:
    if isinstance(data, str):
        train = datasets.load(data, "train", shape=shape, reporter=reporter)
        test = datasets.load(data, "test", shape=shape, reporter=reporter)
    else:
        train, test = data
        if shape is not None and train.shape != tuple(shape):
            raise DataError(f"images of shape {train.shape}, not {shape}", "give one of the two")
    if train.shape != test.shape or len(train.classes) != len(test.classes):
        names = train.classes if len(train.classes) > len(test.classes) else test.classes
        if train.shape != test.shape:
            raise DataError("training and test images differ in shape", "use one data set")
        train, test = (replace(d, classes=names) for d in (train, test))
    if len(np.unique(train.labels)) < 2:
        raise DataError(f"{train.name} has examples of one class only", "at least two are needed")
    return train, test


def _split(train: Dataset, share: float, seed: int) -> tuple[Dataset, Dataset]:
    count = max(len(train.classes), round(share * len(train)))
    if count >= len(train):
        raise DataError(f"{len(train)} training examples are too few", "at least a few per class")
    mixed = train.take(len(train), seed)
    order = np.arange(len(train))
    return mixed.subset(order[count:]), mixed.subset(order[:count])
