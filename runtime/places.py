"""Where a validation's report and journal lie, and what may be overwritten there."""

from __future__ import annotations

import os
from pathlib import Path

from resq_deploy.errors import CampaignError
from resq_deploy.report.files import JSON, remove_report
from resq_deploy.runtime.journal import Journal

JOURNAL = "journal.sqlite"


def report_folder(bundle: Path) -> Path:
    """Where a bundle's report goes by default: beside it, `model.resq` -> `model.report`.

    Only `.resq` is taken off: `net-0.1` and `net-0.2` are two bundles.
    """
    place = bundle if bundle.name not in ("", "..") else bundle.resolve()
    return place.with_name(f"{place.name.removesuffix('.resq')}.report")


def prepared(output: str | os.PathLike[str] | None, *, resume: bool, force: bool) -> Path | None:
    """The report's folder, made; not one that holds something else, nor an earlier report that nobody gave up."""
    if output is None:
        return None
    folder = Path(output)
    if folder.exists() and not folder.is_dir():
        raise CampaignError(f"{folder} is a file", "choose another -o")
    used = folder.is_dir() and any(folder.iterdir())
    ours = (folder / JOURNAL).exists() or (folder / JSON).exists()
    if used and not ours:
        raise CampaignError(f"{folder} holds something else", "choose another -o")
    if used and not (resume or force):
        raise CampaignError(
            f"{folder} holds an earlier report", "go on with --resume, replace it with --force"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CampaignError(
            f"cannot write to {folder}: {error.strerror}", "choose another -o"
        ) from error
    return folder


def clear(folder: Path) -> None:
    """Remove an earlier report and its journal: beside a new journal the old verdict would pass for the new one."""
    try:
        remove_report(folder)
        Journal.remove(folder / JOURNAL)
    except OSError as error:
        raise CampaignError(
            f"cannot replace the report in {folder}: {error.strerror}", "choose another -o"
        ) from error
