"""Explicit fault lists: one JSON object a line, `{"tensor": ..., "element": ..., "bit": ...[, "trial": ...]}`.

Lines with the same `trial` are one trial; without the key each line is a trial of its own. Trials run
in ascending order of their number.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy.errors import FaultError
from resq_deploy.fault_models import Drawn, FaultModel, Locations
from resq_deploy.faults import Fault, FaultSpace

_EXAMPLE = '{"tensor": "conv1.weight", "element": 0, "bit": 7}'
_KEYS = {"tensor", "element", "bit", "trial"}


class FaultList(FaultModel):
    """Trials that somebody wrote down: trial i flips `trials[i]`, whatever the seed."""

    word, about = "list", "an explicit fault list"

    def __init__(self, trials: Sequence[Sequence[Fault]]) -> None:
        super().__init__()
        if not trials or not all(trials):
            raise FaultError("the fault list is empty", f"lines such as {_EXAMPLE}")
        self.trials = tuple(tuple(trial) for trial in trials)
        text = repr([[(f.tensor, f.element, f.bit) for f in trial] for trial in self.trials])
        self.digest = hashlib.sha256(text.encode()).hexdigest()

    @property
    def name(self) -> str:
        return f"list:{self.digest[:12]}"

    @property
    def length(self) -> int:
        return len(self.trials)

    def check(self, space: FaultSpace) -> None:
        """Raise FaultError for the first address that the space does not have, or a trial that names one twice."""
        for trial in self.trials:
            space.flips_of(trial)

    def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
        raise FaultError(
            "a fault list is not drawn from", "a fault list has trials: use trial(space, 0, i)"
        )

    def trial(self, space: FaultSpace, seed: int, trial: int) -> Drawn:
        """Trial `trial` of the list, from 0; the seed plays no part."""
        faults = self.trials[trial]
        layers = [space.check(fault).layer for fault in faults]
        place = (layers[0], faults[0].bit) if len(faults) == 1 else (None, None)
        return Drawn(space.flips_of(faults), len(faults), *place)


def read_fault_list(path: str | os.PathLike[str]) -> FaultList:
    """Read a file of JSON lines; empty lines count for nothing.

    Raises FaultError with the number of the first line that cannot be read.
    """
    source = Path(path)
    try:
        with source.open(encoding="utf-8") as lines:
            return _group(_read(source, n, line) for n, line in enumerate(lines, 1) if line.strip())
    except OSError as error:
        raise FaultError(f"cannot read the fault list {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise FaultError(f"the fault list {source} is not text", f"{_EXAMPLE} a line") from error


def write_fault_list(path: str | os.PathLike[str], trials: Iterable[Iterable[Fault]]) -> None:
    """Write trials as `read_fault_list` reads them."""
    with Path(path).open("w", encoding="utf-8") as file:
        for number, trial in enumerate(trials):
            for f in trial:
                row = {"trial": number, "tensor": f.tensor, "element": f.element, "bit": f.bit}
                file.write(json.dumps(row) + "\n")


def _read(source: Path, number: int, line: str) -> tuple[Fault, int | None, int]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FaultError(f"{source} line {number} is not JSON", f"such as {_EXAMPLE}") from error
    if not isinstance(row, dict) or not _well_formed(row):
        raise FaultError(f"{source} line {number} is not a fault", f"such as {_EXAMPLE}")
    return Fault(row["tensor"], row["element"], row["bit"]), row.get("trial"), number


def _well_formed(row: Mapping[str, Any]) -> bool:
    whole = all(_is_whole(row.get(key)) for key in ("element", "bit"))
    trial = "trial" not in row or _is_whole(row["trial"])
    return whole and trial and isinstance(row.get("tensor"), str) and set(row) <= _KEYS


def _is_whole(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**62


def _group(rows: Iterable[tuple[Fault, int | None, int]]) -> FaultList:
    numbered: dict[int, list[Fault]] = {}
    single: list[list[Fault]] = []
    for fault, trial, line in rows:
        if trial is None:
            single.append([fault])
        else:
            numbered.setdefault(trial, []).append(fault)
        if single and numbered:
            raise FaultError(f"line {line} of the fault list: either all have a trial, or none")
    return FaultList(single or [numbered[trial] for trial in sorted(numbered)])
