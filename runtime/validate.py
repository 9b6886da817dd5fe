"""validate_bundle(): golden run, attacks, faults, both at once, requirements; readable top to bottom."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy import requirements
from resq_deploy.bundle import INT8, Bundle, Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import BundleError, CampaignError
from resq_deploy.fault_lists import read_fault_list
from resq_deploy.fault_models import FaultModel, parse
from resq_deploy.faults import FaultSpace
from resq_deploy.metrics import top1
from resq_deploy.report import Report, write_report
from resq_deploy.report.model import AttackResult, Campaign, Figure
from resq_deploy.runtime import evidence
from resq_deploy.runtime.campaign import Rule, run_campaign
from resq_deploy.runtime.engines import OpenEngine
from resq_deploy.runtime.images import labelled, sample_digest
from resq_deploy.runtime.journal import Journal
from resq_deploy.runtime.runner import Runner, open_runner
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.trials import Job
from resq_deploy.runtime.workers import open_pool
from resq_deploy.statistics import wilson

JOURNAL = "journal.sqlite"
TRIAL_IMAGES = 256  # images of each trial, unless more are asked for
CLEAN = "clean"


def validate_bundle(
    source: Bundle | str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    output: str | os.PathLike[str] | None = None,
    require: Iterable[str] = (),
    workers: int | str = "auto",
    resume: bool = False,
    force: bool = False,
    reporter: Reporter | None = None,
    command: Sequence[str] = (),
) -> Report:
    """Flip bits in a deployed bundle and attack it; return the report, and write it to the folder `output`.

    Everything is checked before the first run: the bundle's hashes, the settings, the names in
    `require`. Finished trials are kept in `output` as they come; `resume` goes on with them. Raises a
    ResqError for bad input; a requirement that is not met is a result (`Report.met`), not an error.
    """
    asked = settings or Settings()
    wanted = requirements.parse_all(require)
    bundle = source if isinstance(source, Bundle) else Bundle.open(source)
    models = [parse(text) for text in asked.models]
    if asked.fault_list:
        models.append(read_fault_list(asked.fault_list))
    attacks = _attacks(bundle, asked)
    requirements.check(wanted, figure_names(models, attacks, joint=asked.joint))
    folder = _folder(output, resume=resume, force=force)
    sample = labelled(bundle, asked.data)

    with open_runner(bundle, asked.backend) as runner:
        run = Validation(
            bundle, asked, runner, sample, models, workers, folder, resume, reporter or Reporter()
        )
        run.golden()
        for label, name in attacks.items():
            run.attack(label, name)
        run.faults(CLEAN, sample)
        if asked.joint:
            for label in attacks:
                run.faults(label, run.adversarial[label])
        report = run.report(wanted, command)
    if folder is not None:
        write_report(report, folder)
    return report


def figure_names(
    models: Iterable[FaultModel], attacks: Iterable[str], *, joint: bool = False
) -> tuple[str, ...]:
    """Names of all figures that a validation will have, in the order of the report."""
    names = [
        "accuracy",
        *(f"{share}@{label}" for label in attacks for share in ("robust", "success")),
    ]
    for on in (CLEAN, *(attacks if joint else ())):
        for model in models:
            names += evidence.campaign_names(model.name, on).values()
    return tuple(names)


@dataclass(slots=True, eq=False)
class Validation:
    """One validation under way: what it works on, and what it has found so far."""

    bundle: Bundle
    settings: Settings
    runner: Runner
    sample: Sample
    models: Sequence[FaultModel]
    workers: int | str
    folder: Path | None
    resume: bool
    reporter: Reporter
    figures: dict[str, Figure] = field(default_factory=dict)
    campaigns: list[Campaign] = field(default_factory=list)
    attacked: list[AttackResult] = field(default_factory=list)
    adversarial: dict[str, Sample] = field(default_factory=dict)
    right: Any = None  # which images of the sample are right without attack or fault

    @property
    def space(self) -> FaultSpace:
        """The part of weight memory that faults are drawn from."""
        return self.runner.space.select(
            self.settings.where, self.settings.layers, self.settings.bits
        )

    def golden(self) -> None:
        """Run the whole sample without faults."""
        found = self._run("golden run", self.sample)
        self.right = found == self.sample.labels
        self.figures["accuracy"] = self._share(self.right)

    def attack(self, label: str, name: str) -> None:
        """Replay a stored attack on the artifact."""
        moved, spec = self.bundle.attack_sample(name)
        wrong = self._run(f"attack {label}", moved) != moved.labels
        before = self._run("the same images unattacked", self._originals(moved)) == moved.labels
        robust, success = self._share(~wrong), self._share(wrong[before])
        self.adversarial[label] = moved
        self.figures |= {f"robust@{label}": robust, f"success@{label}": success}
        self.attacked.append(
            AttackResult(
                name=name,
                attack=spec.attack,
                norm=spec.norm,
                eps=spec.eps,
                crafted_through=spec.crafted_through,
                robust=robust,
                success=success,
                parameters=spec.parameters,
            )
        )

    def faults(self, on: str, images: Sample) -> None:
        """Run every fault model's campaign on these images."""
        few = images.take(self.settings.samples or TRIAL_IMAGES)
        factory = OpenEngine(str(self.bundle.path), self.settings.backend, few.images)
        rule = Rule(
            self.settings.trials,
            self.settings.margin,
            self.settings.confidence,
            self.settings.max_trials,
        )
        space = self.space
        for model in self.models:
            model.check(space)
            rule.limit(Job(model, space, self.settings.seed, few.labels))
        pool = open_pool(factory, self.workers, reporter=self.reporter)
        with closing(pool), self._journal() as journal:
            for model in self.models:
                job = Job(model, space, self.settings.seed, few.labels)
                key, identity = campaign_key(model.name, on), self._identity(few)
                log = journal.campaign(key, identity) if journal else None
                found = run_campaign(
                    pool, job, rule=rule, log=log, where=self._where(), reporter=self.reporter
                )
                self._keep(evidence.campaign(found, on), evidence.campaign_names(model.name, on))

    def report(self, wanted: Iterable[requirements.Expression], command: Sequence[str]) -> Report:
        """What was found, with the verdict on each requirement."""
        return Report(
            subject=evidence.subject(self.bundle, self.runner.space),
            runner=self.runner.info,
            data={
                "source": self.settings.data or "the bundle's own sample",
                "images": len(self.sample),
                "images_per_trial": min(len(self.sample), self.settings.samples or TRIAL_IMAGES),
                "sha256": sample_digest(self.sample),
            },
            accuracy=self.figures["accuracy"],
            campaigns=tuple(self.campaigns),
            attacks=tuple(self.attacked),
            figures=self.figures,
            requirements=requirements.judge(wanted, self.figures),
            not_covered=evidence.not_covered(self.bundle, self.runner.space, self.space),
            provenance=evidence.provenance(self.settings.as_json(), command, self.bundle),
        )

    def _keep(self, found: Campaign, names: dict[str, str]) -> None:
        self.campaigns.append(found)
        self.figures |= {name: getattr(found, share) for share, name in names.items()}

    def _run(self, title: str, sample: Sample, batch: int = 128) -> Any:
        parts = []
        with self.reporter.task(title, len(sample), "images") as task:
            for start in range(0, len(sample), batch):
                part = sample.images[start : start + batch]
                parts.append(top1(self.runner(part)))
                task.advance(len(part))
        return np.concatenate(parts)

    def _share(self, hits: Any) -> Figure:
        return evidence.figure(wilson(int(hits.sum()), int(hits.size), self.settings.confidence))

    def _originals(self, moved: Sample) -> Sample:
        own = self.bundle.eval_sample()
        place = {int(index): row for row, index in enumerate(own.indices)}
        rows = [place.get(int(index), -1) for index in moved.indices]
        if min(rows) < 0:
            raise BundleError("an attacked image is not of the bundle's sample", "export it again")
        return Sample(own.images[rows], own.labels[rows], own.indices[rows])

    def _where(self) -> dict[str, Any]:
        asked = self.settings.as_json()
        return {key: asked[key] for key in ("where", "layers", "bits")}

    def _identity(self, images: Sample) -> dict[str, Any]:
        return {**self._where(), "images": sample_digest(images)}

    @contextmanager
    def _journal(self) -> Iterator[Journal | None]:
        if self.folder is None:
            yield None
            return
        identity = {
            "int8": self.bundle.manifest.files[INT8].sha256,
            "backend": self.settings.backend,
            "seed": self.settings.seed,
        }
        context = {"bundle": str(self.bundle.path.resolve()), "settings": self.settings.as_json()}
        resume = self.resume or bool(self.campaigns)  # a second set of images goes on in this file
        with Journal.open(
            self.folder / JOURNAL, identity, resume=resume, context=context
        ) as journal:
            yield journal


def campaign_key(model: str, on: str) -> str:
    """Name of a campaign in the journal: the fault model, and the attack whose images it ran on."""
    return model if on == CLEAN else f"{model} on {on}"


def _attacks(bundle: Bundle, settings: Settings) -> dict[str, str]:
    """Label -> stored name of the attacks to run."""
    stored = bundle.manifest.attacks
    chosen = stored if settings.attacks is None else settings.attacks
    if unknown := [name for name in chosen if name not in stored]:
        known = ", ".join(stored) or "none"
        raise BundleError(f"the bundle stores no attack {unknown[0]!r}", f"stored: {known}")
    return {evidence.attack_label(stored[name]): name for name in chosen}


def _folder(output: str | os.PathLike[str] | None, *, resume: bool, force: bool) -> Path | None:
    """The report's folder, made, empty of an earlier journal unless that is gone on with."""
    if output is None:
        return None
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise CampaignError(f"{folder} is a file", "choose another -o")
    used = folder.is_dir() and any(folder.iterdir())
    ours = (folder / JOURNAL).exists() or (folder / "report.json").exists()
    if used and not ours:
        raise CampaignError(f"{folder} holds something else", "choose another -o")
    if used and not (resume or force):
        raise CampaignError(
            f"{folder} holds an earlier report", "go on with --resume, replace it with --force"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if force and not resume:
            Journal.remove(folder / JOURNAL)
    except OSError as error:
        raise CampaignError(
            f"cannot write to {folder}: {error.strerror}", "choose another -o"
        ) from error
    return folder
