"""Run one trial of a journal again: the same bits, the same images, and whether the logits are the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from resq_deploy.bundle import INT8, Bundle, Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import CampaignError
from resq_deploy.fault_lists import read_fault_list
from resq_deploy.fault_models import FaultModel, parse
from resq_deploy.runtime import attacks, evidence, journal
from resq_deploy.runtime.engines import engine_of
from resq_deploy.runtime.images import labelled, sample_digest
from resq_deploy.runtime.places import JOURNAL
from resq_deploy.runtime.runner import Runner, open_runner
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.trials import Job
from resq_deploy.runtime.validate import CLEAN, TRIAL_IMAGES
from resq_deploy.samples import stacked


def replay_trial(
    path: str | os.PathLike[str],
    trial: int,
    *,
    campaign: str | None = None,
    bundle: str | os.PathLike[str] | None = None,
    data: str | None = None,
    fault_list: str | os.PathLike[str] | None = None,
    allow_host_code: bool = False,
    reporter: Reporter | None = None,
) -> journal.Replay:
    """Replay trial number `trial` of a journal, or of the report folder that holds it.

    `campaign`: its name in the journal (`seu`, `ber:0.0001`, `seu on pgd,eps=8/255`; default: the only one).
    `bundle`, `data`, `fault_list`: where they lie now (default: where they lay). The same plan is run, and faults
    get in the same way; inputs of black boxes, which no bundle stores, are found anew, by the same seed.
    `allow_host_code`: as `open_runner` has it, since a journal is not who may allow that. Raises CampaignError
    where there is no such trial, or bundle, images or faults are not those that the journal belongs to.
    """
    place = Path(path) / JOURNAL if Path(path).is_dir() else Path(path)
    with journal.Journal.read(place) as book:
        name = _chosen(book.campaigns(), campaign)
        settings = _settings(book)
        listed = os.fspath(fault_list) if fault_list else settings.fault_list
        settings = replace(settings, data=data or settings.data, fault_list=listed)
        opened = Bundle.open(bundle or book.context["bundle"])
        if opened.manifest.files[INT8].sha256 != book.identity["int8"]:
            raise CampaignError(f"{opened.path} is not the bundle that {place} belongs to")
        text, _, on = name.partition(" on ")
        model = _model(text, settings)
        options = _options(settings, book.identity, allow_host_code)
        with open_runner(opened, settings.backend, **options) as runner:
            _same_engine(runner, book)
            versions = _images(runner, opened, settings, on or CLEAN, reporter)
            images = stacked(versions)
            if sample_digest(images) != book.campaigns()[name]["images"]:
                raise CampaignError(f"the images of {name!r} are not those of then", "give --data")
            space = runner.space
            if model.length is None:
                space = space.select(settings.where, settings.layers, settings.bits)
            job = Job(model, space, settings.seed, images.labels, len(versions))
            log = book.campaign(name, book.campaigns()[name])
            return journal.replay(log, engine_of(runner, images.images), job, trial)


def _settings(book: journal.Journal) -> Settings:
    """What the journal was made with. Raises CampaignError where another version wrote them, or someone else."""
    try:
        return Settings(**_tuples(book.context["settings"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise CampaignError(
            f"the settings in {book.path} are not those of this version",
            "replay it with the version that wrote it; report.json names that",
        ) from error


def _options(settings: Settings, identity: Mapping[str, Any], host_code: bool) -> dict[str, Any]:
    """The backend's options: which plan, and the way that was used then, whatever `auto` would find now."""
    kept = {
        "engine": settings.options.get("engine"),
        "injection": identity.get("injection"),
        "exact": identity.get("exact"),
        "allow_host_code": host_code,
    }
    return {name: value for name, value in kept.items() if value}


def _same_engine(runner: Runner, book: journal.Journal) -> None:
    for key, now in runner.identity.items():
        if book.identity.get(key) != now:
            raise CampaignError(
                f"{book.path} was made with another {key}", "replay it on the bundle as it was then"
            )


def _chosen(found: Mapping[str, Any], wanted: str | None) -> str:
    """The campaign of this name; a bit error rate may be written as figures have it."""
    if wanted is None and len(found) == 1:
        return next(iter(found))
    names = {**{_as_figures_have_it(name): name for name in found}, **{n: n for n in found}}
    if wanted not in names:
        what = "which campaign?" if wanted is None else f"no campaign {wanted!r} in this journal"
        raise CampaignError(what, f"one of: {', '.join(found) or 'none was begun'}")
    return names[wanted]


def _as_figures_have_it(name: str) -> str:
    """`ber:0.001 on pgd,eps=8/255` -> `ber=1e-3 on pgd,eps=8/255`."""
    model, on, images = name.partition(" on ")
    return f"{evidence.fault_label(model)}{on}{images}"


def _model(text: str, settings: Settings) -> FaultModel:
    """The fault model of a campaign. Raises CampaignError where a fault list is another one now."""
    model = read_fault_list(settings.fault_list or "") if text.startswith("list:") else parse(text)
    if model.name != text:
        raise CampaignError(f"the fault list {settings.fault_list} was changed since")
    return model


def _images(
    runner: Runner, bundle: Bundle, settings: Settings, on: str, reporter: Reporter | None
) -> list[Sample]:
    """The images that a campaign ran on; several versions of them for the worst case over attacks."""
    whole: tuple[Sample, ...]
    if on == CLEAN:
        whole = (labelled(bundle, settings.data),)
    else:
        whole = attacks.inputs(
            runner,
            bundle,
            on,
            settings.attacks,
            eps=settings.eps,
            seed=settings.seed,
            reporter=reporter,
        )
    return [sample.take(settings.samples or TRIAL_IMAGES) for sample in whole]


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
