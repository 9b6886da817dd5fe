"""What a campaign found: tallies that grow with the layers and never with the trials, and the result made of them.

Trials are added in the order of their number, whoever ran them, so that figures are the same bytes
for any number of workers and after any number of interruptions.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import metrics
from resq_deploy.errors import CampaignError
from resq_deploy.faults import FaultSpace
from resq_deploy.paired import KEPT, Spread, rare
from resq_deploy.runtime.trials import Job, Row
from resq_deploy.statistics import Estimate, Stratum, Tally, stratified

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
_OUTCOMES = ("correct", "masked", "sdc1", "sdc5", "critical", "due")


@dataclass(frozen=True, slots=True)
class Vulnerability:
    """One layer, or one bit position: its fault locations, the trials that hit it alone, its share of SDC-1."""

    name: str
    locations: int
    trials: int
    sdc1: Estimate


@dataclass(frozen=True, slots=True)
class Cell:
    """One bit position of one layer: trials that hit it alone, and their mean share of SDC-1."""

    layer: str
    bit: int
    trials: int
    sdc1: float


@dataclass(frozen=True, slots=True)
class CampaignResult:
    """What one campaign found. Shares are means over trials of the share of images, on this sample of images.

    `accuracy`: top-1 under faults; `masked`, `sdc1`, `sdc5`, `critical`, `due` as in metrics.Outcome.
    `golden_accuracy`: the same images without faults. `accuracy_quantiles`: over trials.
    `layers`, `bits`, `cells`: trials of one event whose every location lies in one layer, at one bit position; empty
    for models whose trials are several, as those of a bit error rate. `stratified`: SDC-1 weighted by the size of
    layers and of bit positions.
    `flips`, `unreachable`: bits over all trials; `missed`: trials of which nothing could be reached;
    `failed`: trials that ended in an `error`, a `crash` or a `hang`. `digest`: of every trial's flips.
    `right`: trials in which each image was right; `by_trial`: images that were right in each of the first trials, empty
    where some are `missed`; `spread`: of the accuracy by the draw of faults, None for fewer than two trials.
    `seconds` is the time of this call, `images_per_second` its throughput; both are no figures.
    """

    fault: str
    where: dict[str, Any]
    seed: int
    locations: int
    trials: int
    images: int
    flips: int
    unreachable: int
    missed: int
    failed: dict[str, int]
    golden_accuracy: float
    accuracy: Estimate
    accuracy_quantiles: dict[str, float]
    masked: Estimate
    sdc1: Estimate
    sdc5: Estimate
    critical: Estimate
    due: Estimate
    layers: tuple[Vulnerability, ...]
    bits: tuple[Vulnerability, ...]
    cells: tuple[Cell, ...]
    stratified: dict[str, Estimate]
    stopped: str
    digest: str
    right: tuple[int, ...]
    by_trial: tuple[int, ...]
    spread: Spread | None
    seconds: float = 0.0
    images_per_second: float = 0.0
    execution: dict[str, Any] = field(default_factory=dict)

    @property
    def coverage(self) -> float:
        """Share of the drawn bits that the backend could flip."""
        return self.flips / max(self.flips + self.unreachable, 1)

    def figures(self) -> bytes:
        """Everything but time and way of execution, as JSON: equal bytes for equal campaigns."""
        found = asdict(self)
        for name in ("seconds", "images_per_second", "execution"):
            del found[name]
        return json.dumps(found, sort_keys=True).encode()


class Scores:
    """The tallies of one campaign."""

    def __init__(self, job: Job, confidence: float) -> None:
        self.images, self.confidence = job.images, confidence
        self.all = {name: Tally(self.images) for name in _OUTCOMES}
        self.cells: dict[tuple[str | None, int | None], Tally] = {}
        self.rows = self.flips = self.unreachable = self.missed = 0
        self.failed = {"error": 0, "crash": 0, "hang": 0}
        self._sha = hashlib.sha256()
        self._first = np.zeros(KEPT, dtype=np.int32)  # images right in each trial
        self._changed = np.zeros(self.images, dtype=np.int64)  # trials in which each image did

    def add(self, row: Row) -> None:
        """One more trial; trials come in the order of their number."""
        self.rows += 1
        self.flips += row.flips
        self.unreachable += row.unreachable
        self._sha.update(f"{row.trial} {row.flips_sha}\n".encode())
        if row.status == "unreachable":
            self.missed += 1
            return
        if row.status != "ok":
            self.failed[row.status] += 1
        for name, tally in self.all.items():
            tally.add(getattr(row, name))
        if self.rows <= KEPT:
            self._first[self.rows - 1] = row.correct
        if row.changed:
            self._changed += _flags(row, self.images)
        if row.layer is not None or row.bit is not None:
            self.cells.setdefault((row.layer, row.bit), Tally(self.images)).add(row.sdc1)

    @property
    def trials(self) -> int:
        """Trials that count."""
        return self.rows - self.missed

    @property
    def margin(self) -> float:
        """The wider half width of the two intervals that a campaign is stopped by: accuracy and SDC-1."""
        return max(self.estimate(name).margin for name in ("correct", "sdc1"))

    def estimate(self, name: str) -> Estimate:
        """One outcome's mean share and interval."""
        return self.all[name].estimate(self.confidence)

    def result(
        self, job: Job, where: Mapping[str, Any], golden: NDArray[np.bool_], stopped: str
    ) -> CampaignResult:
        """The figures so far; `golden`: which images are right without faults, bool [images]."""
        layers = self._along(job.space, 0)
        bits = self._along(job.space, 1)
        return CampaignResult(
            fault=job.model.name,
            where=dict(where),
            seed=job.seed,
            locations=job.space.size,
            trials=self.trials,
            images=self.images,
            flips=self.flips,
            unreachable=self.unreachable,
            missed=self.missed,
            failed=dict(self.failed),
            golden_accuracy=int(golden.sum()) / self.images,
            accuracy=self.estimate("correct"),
            accuracy_quantiles=self.all["correct"].quantiles(QUANTILES),
            masked=self.estimate("masked"),
            sdc1=self.estimate("sdc1"),
            sdc5=self.estimate("sdc5"),
            critical=self.estimate("critical"),
            due=self.estimate("due"),
            layers=self._table(layers),
            bits=self._table(bits),
            cells=self._cells(),
            stratified=self._stratified({"layer": layers, "bit": bits}),
            stopped=stopped,
            digest=self._sha.hexdigest(),
            right=self._right(golden),
            by_trial=() if self.missed else tuple(self._first[: self.rows].tolist()),
            spread=rare(self.all["correct"]),
        )

    def _right(self, golden: NDArray[np.bool_]) -> tuple[int, ...]:
        """Trials in which each image was right. Raises CampaignError where rows from outside contradict themselves."""
        found = np.where(golden, self.trials - self._changed, self._changed)
        if int(found.sum()) != self.all["correct"].hits:
            raise CampaignError(
                "the journal's trials do not agree on which images were right",
                "it was changed by something else: begin anew with --force",
            )
        return tuple(found.tolist())

    def _along(self, space: FaultSpace, axis: int) -> dict[str, tuple[int, Tally]]:
        """Locations and trials of each layer (axis 0) or bit position (axis 1); empty where no trial has one."""
        if all(cell[axis] is None for cell in self.cells):
            return {}
        found: dict[str, tuple[int, Tally]] = {}
        keys = (
            sorted(space.cells().items(), key=lambda kv: kv[0][1])
            if axis
            else space.cells().items()
        )
        for cell, locations in keys:
            before, tally = found.get(str(cell[axis]), (0, Tally(self.images)))
            found[str(cell[axis])] = before + locations, tally
        for place, tally in self.cells.items():
            if place[axis] is not None and str(place[axis]) in found:
                found[str(place[axis])][1].counts += tally.counts
        return found

    def _table(self, parts: Mapping[str, tuple[int, Tally]]) -> tuple[Vulnerability, ...]:
        return tuple(
            Vulnerability(name, locations, tally.trials, tally.estimate(self.confidence))
            for name, (locations, tally) in parts.items()
        )

    def _cells(self) -> tuple[Cell, ...]:
        return tuple(
            Cell(layer, bit, tally.trials, tally.mean)
            for (layer, bit), tally in sorted(self.cells.items(), key=lambda kv: str(kv[0]))
            if layer is not None and bit is not None
        )

    def _stratified(
        self, axes: Mapping[str, Mapping[str, tuple[int, Tally]]]
    ) -> dict[str, Estimate]:
        """SDC-1 by layer and by bit, where every trial that counts belongs to one stratum."""
        found = {}
        for axis, parts in axes.items():
            strata = [Stratum(float(locations), tally) for locations, tally in parts.values()]
            if strata and sum(s.tally.trials for s in strata) == self.trials:
                found[axis] = stratified(strata, self.confidence)
        return found


def _flags(row: Row, images: int) -> NDArray[np.bool_]:
    try:
        return metrics.unpacked(row.changed, images)
    except (ValueError, TypeError) as error:
        raise CampaignError(
            f"trial {row.trial} of the journal is of other images",
            "it was changed by something else: begin anew with --force",
        ) from error
