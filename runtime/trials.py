"""One trial: draw the fault, run the network with it, compare with the golden run. Everything else is book-keeping.

`run_trial` is the one function that every way of running trials comes down to: in this process, in a
worker, on a cluster, in a replay. `run_trials` is the same for several that an engine may run together.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import EngineLost, ExecutionError, ResqError
from resq_deploy.fault_models import Drawn, FaultModel
from resq_deploy.faults import FaultSpace, Flips, TensorFlips
from resq_deploy.metrics import Logits, Outcome, classify, right
from resq_deploy.runtime.runner import Images, Runner

Status = Literal["ok", "unreachable", "error", "crash", "hang"]

_RESUME = "the trial is kept as a failure; --resume opens the engine anew and goes on behind it"


class TrialEngine(Protocol):
    """A deployed network with a fixed set of images: what a trial needs of a backend.

    An engine that cannot change every bit of the fault space also has `unreachable(flips) -> int`, how
    many of these bits it cannot change; one that has something to say to the report has `info`, JSON types;
    one to which several trials together are less work than each alone has `run_many(list of Flips)`, a
    list of Logits with the bits that `run` gives for each.
    """

    def golden(self) -> Logits:
        """Logits without faults, float32 [images, classes]; the same bits at every call."""

    def run(self, flips: Flips) -> Logits:
        """Logits of the same images with these bits flipped; memory is golden again afterwards."""


EngineFactory = Callable[[int], TrialEngine]  # threads -> engine; picklable, called in each worker


class PlainEngine:
    """Every trial is a full run of all images: for any Runner."""

    def __init__(self, runner: Runner, images: Images) -> None:
        self.runner = runner
        self.images = images

    def golden(self) -> Logits:
        """A run without faults."""
        return self.runner(self.images)

    def run(self, flips: Flips) -> Logits:
        """A run with them."""
        with self.runner.faults(flips):
            return self.runner(self.images)

    def unreachable(self, flips: Flips) -> int:
        """As the runner says."""
        return self.runner.unreachable(flips)

    @property
    def info(self) -> dict[str, object]:
        """The runner's."""
        return {"engine": "full runs", **self.runner.info}


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One campaign's trials: trial i is `model`'s draw i of `seed` in `space`; `labels` int64 [versions * images].

    `versions`: of each image, one block of the batch after the other, as metrics.classify has it.
    """

    model: FaultModel
    space: FaultSpace
    seed: int
    labels: NDArray[np.int64]
    versions: int = 1

    @property
    def images(self) -> int:
        return int(self.labels.size) // self.versions

    def right(self, logits: Logits) -> NDArray[np.bool_]:
        """Which images a run is right about, bool [images]."""
        return right(logits, self.labels, self.versions)

    def compare(self, golden: Logits, faulty: Logits) -> Outcome:
        """What a run with faults did to the images."""
        return classify(golden, faulty, self.labels, self.versions)


@dataclass(frozen=True, slots=True)
class Row:
    """What is kept of one trial: what a journal stores, and all that figures are made of.

    `flips`: bits that were flipped; `unreachable`: bits that the backend could not flip. `flips_sha`,
    `logits_sha`: 16 hex digits of sha256 of what was drawn and of the faulty logits ("" where none).
    `layer`, `bit`: where all drawn locations lie, if in one. `seconds`: not a figure. `changed`: the images that
    are right and were wrong without faults, or the other way round, as metrics.packed has them (most trials: b"").

    `status`: `ok`; `unreachable` (no bit could be flipped: nothing was run, the trial counts for
    nothing but coverage); `error`, `crash`, `hang`: the run failed, died or took too long (all images DUE).
    """

    trial: int
    status: Status
    flips: int
    unreachable: int
    flips_sha: str
    layer: str | None
    bit: int | None
    correct: int = 0
    masked: int = 0
    sdc1: int = 0
    sdc5: int = 0
    critical: int = 0
    due: int = 0
    logits_sha: str = ""
    seconds: float = 0.0
    changed: bytes = b""


def digest(array: NDArray[np.float32]) -> str:
    """16 hex digits of the sha256 of an array's bytes."""
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def run_trial(engine: TrialEngine, golden: Logits, job: Job, trial: int) -> Row:
    """Run trial number `trial` of a job.

    An exception of the backend while faults are in memory is an outcome (`error`), an ExecutionError too;
    every other ResqError, and Python's own errors, are not, and go on to the caller.
    """
    start = time.perf_counter()
    drawn = job.model.trial(job.space, job.seed, trial)
    flips, lost = reach(engine, drawn.flips)
    try:
        logits = engine.run(flips) if flips else golden
    except Exception as error:
        if not is_outcome(error):
            raise
        row = _row(trial, "error", drawn, flips, lost, failure(golden, job), "")
    else:
        row = _Score(golden, job).row(trial, drawn, flips, lost, logits)
    return replace(row, seconds=time.perf_counter() - start)


def run_trials(
    engine: TrialEngine, golden: Logits, job: Job, trials: Sequence[int]
) -> Iterator[list[Row]]:
    """The rows of these trials, those that `run_trial` gives and in this order, as they are finished.

    Where the engine has `run_many` they come all at once; `seconds` is then an equal share. If that raises
    what may be an outcome, each is run alone. Raises EngineLost, after the row of the trial that did it,
    where the golden run is not the same after a run that failed.
    """
    many: Callable[[list[Flips]], list[Logits]] | None = getattr(engine, "run_many", None)
    if many is not None and len(trials) > 1:
        try:
            rows = _together(engine, many, golden, job, trials)
        except Exception as error:
            if not is_outcome(error):
                raise
        else:
            yield rows
            return
    for trial in trials:
        row = run_trial(engine, golden, job, trial)
        yield [row]
        if row.status == "error":
            check_golden(engine, golden, trial)


def check_golden(engine: TrialEngine, golden: Logits, trial: int, hint: str = _RESUME) -> None:
    """A failed run may leave an engine, or a whole GPU context, that fails at whatever comes next: no outcome."""
    try:
        same = engine.golden().tobytes() == golden.tobytes()
    except Exception as error:
        if not is_outcome(error):
            raise
        same = False
    if not same:
        raise EngineLost(
            f"trial {trial} failed, and the engine does not answer as before now that it is over",
            hint,
        )


def _together(
    engine: TrialEngine,
    many: Callable[[list[Flips]], list[Logits]],
    golden: Logits,
    job: Job,
    trials: Sequence[int],
) -> list[Row]:
    start = time.perf_counter()
    drawn = [job.model.trial(job.space, job.seed, trial) for trial in trials]
    reached = [reach(engine, d.flips) for d in drawn]
    answers = iter(many([flips for flips, _ in reached if flips]))
    score, rows = _Score(golden, job), []
    for trial, what, (flips, lost) in zip(trials, drawn, reached, strict=True):
        rows.append(score.row(trial, what, flips, lost, next(answers) if flips else golden))
    each = (time.perf_counter() - start) / len(rows)
    return [replace(row, seconds=each) for row in rows]


class _Score:
    """Makes rows of logits; of those that are golden, what is known already."""

    def __init__(self, golden: Logits, job: Job) -> None:
        self._golden, self._job = golden, job
        self._bytes = golden.tobytes()
        self._masked: tuple[Outcome, str] | None = None

    def row(self, trial: int, drawn: Drawn, flips: Flips, lost: int, logits: Logits) -> Row:
        if lost and not flips:
            return _row(trial, "unreachable", drawn, flips, lost, None, "")
        if logits.tobytes() != self._bytes:
            return _row(trial, "ok", drawn, flips, lost, *self._scored(logits))
        if self._masked is None:
            self._masked = self._scored(logits)
        return _row(trial, "ok", drawn, flips, lost, *self._masked)

    def _scored(self, logits: Logits) -> tuple[Outcome, str]:
        return self._job.compare(self._golden, logits), digest(logits)


def failed_trial(golden: Logits, job: Job, trial: int, status: Status) -> Row:
    """The row of a trial whose worker died (`crash`) or did not answer (`hang`)."""
    drawn = job.model.trial(job.space, job.seed, trial)
    return _row(trial, status, drawn, drawn.flips, 0, failure(golden, job), "")


def failure(golden: Logits, job: Job) -> Outcome:
    """No image got an answer: as if every logit were a NaN."""
    return job.compare(golden, np.full_like(golden, np.nan))


def reach(engine: TrialEngine, flips: Flips) -> tuple[Flips, int]:
    """The flips that the engine can make, and how many it cannot."""
    unreachable: Callable[[Flips], int] | None = getattr(engine, "unreachable", None)
    if unreachable is None or not unreachable(flips):
        return flips, 0
    parts: dict[str, TensorFlips] = {}
    for name, part in flips.items():
        kept = _reachable(unreachable, name, part)
        parts[name] = TensorFlips(part.elements[kept], part.masks[kept])
    left = Flips(parts)
    return left, flips.count - left.count


def _reachable(
    unreachable: Callable[[Flips], int], name: str, part: TensorFlips
) -> NDArray[np.bool_]:
    """Which elements of one tensor can be reached, by halving: the backend only says how many cannot."""
    lost = unreachable(Flips({name: part}))
    if lost == 0 or part.elements.size == 1:
        return np.full(part.elements.size, lost == 0)
    if lost == int(np.bitwise_count(part.masks).sum()):
        return np.zeros(part.elements.size, dtype=np.bool_)
    middle = part.elements.size // 2
    halves = (slice(None, middle), slice(middle, None))
    found = [
        _reachable(unreachable, name, TensorFlips(part.elements[h], part.masks[h])) for h in halves
    ]
    return np.concatenate(found)


def is_outcome(error: Exception) -> bool:
    """Whether an exception comes from a runtime at work.

    A ResqError that is no ExecutionError is none: what is missing, or a check of ours that failed. Neither is
    Python's own, such as a TypeError: that would be a bug of ours.
    """
    if isinstance(error, ResqError):
        return isinstance(error, ExecutionError)
    return isinstance(error, RuntimeError) or type(error).__module__ != "builtins"


def _row(
    trial: int,
    status: Status,
    drawn: Drawn,
    flips: Flips,
    lost: int,
    outcome: Outcome | None,
    logits_sha: str,
) -> Row:
    o = outcome or Outcome(0, 0, 0, 0, 0, 0, 0)
    return Row(
        trial=trial,
        status=status,
        flips=flips.count,
        unreachable=lost,
        flips_sha=drawn.flips.digest()[:16],
        layer=drawn.layer,
        bit=drawn.bit,
        correct=o.correct,
        masked=o.masked,
        sdc1=o.sdc1,
        sdc5=o.sdc5,
        critical=o.critical,
        due=o.due,
        logits_sha=logits_sha,
        changed=o.changed,
    )
