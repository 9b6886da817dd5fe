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
from resq_deploy.fault_lists import read_fault_list
from resq_deploy.fault_models import FaultModel, parse
from resq_deploy.faults import FaultSpace
from resq_deploy.metrics import top1
from resq_deploy.report import Report, write_report
from resq_deploy.report.by_image import ByImage
from resq_deploy.report.model import AttackResult, Campaign, Corruption, Figure, JointAttack
from resq_deploy.runtime import attacks, corruptions, evidence, faulty, places, sanity, stock
from resq_deploy.runtime.campaign import Rule, run_campaign
from resq_deploy.runtime.engines import OpenEngine
from resq_deploy.runtime.images import images_key, labelled, sample_digest
from resq_deploy.runtime.journal import Journal
from resq_deploy.runtime.places import JOURNAL
from resq_deploy.runtime.runner import Runner, check_options, open_runner
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.trials import Job, digest
from resq_deploy.runtime.workers import check_workers, open_pool
from resq_deploy.samples import stacked
from resq_deploy.statistics import wilson

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
    key: str | os.PathLike[str] | None = None,
) -> Report:
    """Flip bits in a deployed bundle and attack it; return the report, and write it to the folder `output`.

    Everything is checked before the first run, and before `force` removes what is in `output`: the bundle's hashes,
    the settings, the names in `require`, whether the fault space can hold the faults. Finished trials are kept in
    `output` as they come; `resume` goes on with them.
    `key`: a public key; the signature of a bundle given by its path is checked with it first. Raises a
    ResqError for bad input; a requirement that is not met is a result (`Report.met`), not an error.
    """
    asked = settings or Settings()
    wanted = requirements.parse_all(require)
    bundle = source if isinstance(source, Bundle) else Bundle.open(source, key=key)
    models = [parse(text) for text in asked.models]
    if asked.fault_list:
        models.append(read_fault_list(asked.fault_list))
    labels = attacks.labels(bundle, asked.attacks, asked.eps)
    say = reporter or Reporter()
    for idle in asked.idle(bundle.manifest.attacks):
        say.warn(idle)
    corruptions.check(asked.corruptions, asked.severities, bundle.manifest.input.shape)
    requirements.check(wanted, _all_names(bundle, asked, models, labels))
    check_options(bundle, asked.backend, asked.options)
    folder = places.prepared(output, resume=resume, force=force)
    sample = labelled(bundle, asked.data)

    with open_runner(bundle, asked.backend, **asked.options) as runner:
        run = Validation(bundle, asked, runner, sample, models, workers, folder, resume, say)
        run.check()
        if folder is not None and force and not resume:
            places.clear(folder)
        run.golden()
        run.attacks()
        if asked.joint:
            run.aware()
        run.faults(CLEAN, sample, (sample,))
        if asked.joint:
            for label, (clean, moved) in run.adversarial.items():
                run.faults(label, clean, moved)
        run.corruptions()
        report = run.report(wanted, command)
    if folder is not None:
        write_report(report, folder)
    return report


def _all_names(
    bundle: Bundle, asked: Settings, models: Iterable[FaultModel], labels: Sequence[str]
) -> tuple[str, ...]:
    """Those, and what a bundle's inputs against faulty memory and common corruptions add."""
    sets = faulty.sets(bundle, asked.attacks) if asked.joint else ()
    return (
        *evidence.figure_names(models, labels, joint=asked.joint, backend=asked.backend),
        *(faulty.figure_name(bundle.manifest.attacks[name]) for name in sets),
        *corruptions.figure_names(asked.corruptions, asked.severities),
    )


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
    known: list[JointAttack] = field(default_factory=list)
    corrupted: tuple[Corruption, ...] = ()
    adversarial: dict[str, tuple[Sample, tuple[Sample, ...]]] = field(default_factory=dict)
    by_image: dict[str, ByImage] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def space(self) -> FaultSpace:
        """The part of weight memory that faults are drawn from."""
        return self.runner.space.select(
            self.settings.where, self.settings.layers, self.settings.bits
        )

    def _space(self, model: FaultModel) -> FaultSpace:
        """A fault list names its addresses; other models draw from the part that was asked for."""
        return self.runner.space if model.length is not None else self.space

    def check(self) -> None:
        """Raise where a campaign could not be run: no such layer or bit, a margin out of reach, no such workers.

        And where it cannot be resumed: the journal is of another artifact, seed or way to run it.
        """
        check_workers(self.workers)
        if self.resume and self.folder is not None and (self.folder / JOURNAL).is_file():
            with self._journal():
                pass
        for job in self._jobs([self._few(self.sample)]):
            job.model.check(job.space)
            self._rule.limit(job)

    @property
    def _rule(self) -> Rule:
        asked = self.settings
        return Rule(asked.trials, asked.margin, asked.confidence, asked.max_trials)

    def _few(self, images: Sample) -> Sample:
        return images.take(self.settings.samples or TRIAL_IMAGES)

    def _jobs(self, versions: Sequence[Sample]) -> list[Job]:
        labels, count = stacked(versions).labels, len(versions)
        return [Job(m, self._space(m), self.settings.seed, labels, count) for m in self.models]

    def golden(self) -> None:
        """Run the whole sample without faults."""
        answers = self._run("golden run", self.sample)
        right = answers == self.sample.labels
        share = wilson(int(right.sum()), len(self.sample), self.settings.confidence)
        self.figures["accuracy"] = evidence.figure(share)
        self.by_image["accuracy"] = ByImage.of(images_key(self.sample), right)
        if self.settings.backend == "ort":
            level, say = self.settings.confidence, self.reporter
            found, warned = stock.beside(self.bundle, self.sample, answers, level, say)
            self.figures |= found
            self.warnings += warned

    def attacks(self) -> None:
        """Replay stored attacks on the artifact, run black boxes, and take the worst case of all."""
        asked = self.settings
        done = attacks.evaluate(
            self.runner,
            self.bundle,
            asked.attacks,
            eps=asked.eps,
            seed=asked.seed,
            reporter=self.reporter,
        )
        done = sanity.check(self.runner, self.bundle, done)
        over: dict[str, tuple[Sample, ...]] = {a.label: (a.sample,) for a in done}
        if attacks.has_worst(a.spec.norm for a in done):
            worst = attacks.worst_case(done)
            over[worst.label] = tuple(
                a.sample for a in done
            )  # whichever is worst under these faults
            done.append(worst)
        for attacked in done:
            found, label = attacks.result(attacked, asked.confidence), attacked.label
            self.figures |= {f"robust@{label}": found.robust, f"success@{label}": found.success}
            self.by_image[f"robust@{label}"] = ByImage.of(
                images_key(attacked.clean), attacked.robust
            )
            self.attacked.append(found)
            self.adversarial[label] = attacked.clean, over[label]

    def aware(self) -> None:
        """Replay inputs that were crafted against faulty memory, with the same faults in it."""
        for name in faulty.sets(self.bundle, self.settings.attacks):
            found, each = faulty.replay(
                self.runner,
                self.bundle,
                name,
                confidence=self.settings.confidence,
                reporter=self.reporter,
            )
            figure = faulty.figure_name(self.bundle.manifest.attacks[name])
            self.known.append(found)
            self.figures[figure] = found.aware
            if each is not None:
                self.by_image[figure] = each

    def faults(self, on: str, clean: Sample, versions: Sequence[Sample]) -> None:
        """Run every fault model's campaign on versions of these images, which stand where all of theirs do."""
        if not self.models:
            return
        asked, few = self.settings, [self._few(images) for images in versions]
        whole, key_of_images = stacked(few), images_key(self._few(clean))
        factory = OpenEngine(str(self.bundle.path), asked.backend, whole.images, asked.options)
        # one process holds a GPU; on the CPU it is measured which number is fastest
        workers = self.workers if asked.backend == "ort" else 1
        pool = open_pool(factory, workers, reporter=self.reporter)
        with closing(pool), self._journal() as journal:
            identity = {**self._identity(whole), "golden": digest(pool.golden())}
            for job in self._jobs(few):
                key = campaign_key(job.model.name, on)
                log = journal.campaign(key, identity) if journal else None
                found = run_campaign(
                    pool, job, rule=self._rule, log=log, where=self._where(), reporter=self.reporter
                )
                names = evidence.campaign_names(job.model.name, on)
                self._keep(evidence.campaign(found, on), names)
                if each := evidence.by_image(found, key_of_images):
                    self.by_image[names["accuracy"]] = each

    def corruptions(self) -> None:
        """Run the common corruptions that were asked for."""
        asked = self.settings
        if not asked.corruptions:
            return
        found = corruptions.evaluate(
            self.runner,
            self.sample.take(asked.corruption_samples),
            asked.corruptions,
            asked.severities,
            confidence=asked.confidence,
            seed=asked.seed,
            reporter=self.reporter,
        )
        self.corrupted = found.cells
        self.figures |= found.figures

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
            joint=tuple(self.known),
            corruptions=self.corrupted,
            figures=self.figures,
            by_image=self.by_image,
            requirements=requirements.judge(wanted, self.figures),
            not_covered=(
                *evidence.not_covered(self.bundle, self.runner.space, self.space, self.runner.info),
                *evidence.not_attacked(self.bundle, joint=self.settings.joint),
                *(stock.unseen(self.bundle) if self.settings.backend == "ort" else ()),
            ),
            warnings=tuple(self.warnings),
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
            **self.runner.identity,
        }
        settings = self.settings.with_whole_paths().as_json()
        context = {"bundle": str(self.bundle.path.resolve()), "settings": settings}
        resume = self.resume or bool(self.campaigns)  # a second set of images goes on in this file
        with Journal.open(
            self.folder / JOURNAL, identity, resume=resume, context=context
        ) as journal:
            try:
                yield journal
            except KeyboardInterrupt:
                self.reporter.log(
                    "finished trials are kept: the same command with --resume goes on"
                )
                raise


def campaign_key(model: str, on: str) -> str:
    """Name of a campaign in the journal: the fault model, and the attack whose images it ran on."""
    return model if on == CLEAN else f"{model} on {on}"
