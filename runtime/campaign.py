"""A campaign: trials of one fault model on a fixed set of images, until there are enough of them.

    factory = lambda threads: PlainEngine(open_runner(bundle, threads=threads), sample.images)
    with open_pool(factory) as pool:
        result = run_campaign(pool, Job(parse("seu"), space, seed, sample.labels), trials=None, margin=0.01)

A pool runs trials, wherever (workers.py, cluster.py); a journal keeps them (journal.py); figures.py
makes the result. Here is the loop that ties them: rows are taken in the order of their number, and
after each the rule is asked whether to stop.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol

from resq_deploy.console import Reporter
from resq_deploy.errors import CampaignError
from resq_deploy.runtime.figures import CampaignResult, Scores
from resq_deploy.runtime.trials import Job, Row, TrialEngine, run_trials
from resq_deploy.statistics import least_trials

MAX_TRIALS = 10_000
_BLOCK = 256  # trials that an engine may run together


class Pool(Protocol):
    """Whatever runs trials: this process, worker processes, a cluster."""

    def golden(self) -> Any:
        """Logits without faults, float32 [images, classes]."""

    def run(self, job: Job, trials: Iterator[int]) -> Iterator[list[Row]]:
        """Rows of these trials as they are finished, in any order; stop early by closing the iterator."""

    @property
    def info(self) -> dict[str, Any]:
        """How trials are run, for the report."""

    def close(self) -> None:
        """Give everything back."""


class Log(Protocol):
    """Where finished trials are kept: a campaign of a journal."""

    def ranges(self) -> list[range]:
        """Numbers of the trials that are kept already, ascending."""

    def rows(self) -> Iterator[Row]:
        """Those trials, ascending."""

    def append(self, rows: Iterable[Row]) -> None:
        """Keep these: once this returns they survive whatever happens to the process."""


@dataclass(frozen=True, slots=True)
class Rule:
    """When to stop: after `trials`, or (None) once accuracy and SDC-1 are within `margin`, at most `max_trials`."""

    trials: int | None = None
    margin: float = 0.01
    confidence: float = 0.95
    max_trials: int = MAX_TRIALS

    def limit(self, job: Job) -> int:
        """How many trials there can be. Raises CampaignError where the margin cannot be reached."""
        length = job.model.length
        if self.trials is not None and self.trials < 1:
            raise CampaignError(f"{self.trials} trials", "at least 1, or auto")
        if self.trials is not None:
            return min(self.trials, length) if length is not None else self.trials
        if length is not None:
            return length  # a list is run to its end: it is all there is
        self._reachable(job)
        return self.max_trials

    def _reachable(self, job: Job) -> None:
        least = least_trials(self.margin, self.confidence)
        different = job.model.different(job.space)
        if different is not None and different < least:
            raise CampaignError(
                f"a margin of {self.margin:g} needs {least} trials or more, and {job.model.name} has only "
                f"{different} different ones in this fault space",
                f"--trials {different}, a larger --margin, or more layers and bits",
            )
        if self.max_trials < least:
            raise CampaignError(
                f"a margin of {self.margin:g} needs {least} trials or more, and at most {self.max_trials} are allowed",
                "a larger --margin, or --trials N",
            )

    def looks(self, job: Job) -> Iterator[int]:
        """After how many trials to look: each of the first, then every hundredth part more."""
        if self.trials is None and job.model.length is None:
            look = least_trials(self.margin, self.confidence)
            while True:
                yield look
                look = math.ceil(look * 1.01)

    def reason(self, scores: Scores, limit: int, job: Job) -> str:
        """Why a campaign ended, in words for the report."""
        if job.model.length == limit:
            return f"end of the fault list after {limit} trials"
        if self.trials is not None:
            return f"{limit} trials asked for"
        if scores.margin <= self.margin:
            return f"accuracy and SDC-1 within {self.margin:g} after {scores.rows} trials"
        return (
            f"{limit} trials, the most allowed, within {scores.margin:.2g} and not {self.margin:g}"
        )


class Inline:
    """The pool of one engine in this process: no isolation, no time-out, nothing to start.

    Rows are handed over every `seconds`, so that a journal does not commit each of many short trials, and
    trials that take less are given to the engine in blocks.
    """

    def __init__(self, engine: TrialEngine, seconds: float = 0.05) -> None:
        self.engine = engine
        self.seconds = seconds
        self._golden: Any = None

    def golden(self) -> Any:
        """The engine's, run once."""
        if self._golden is None:
            self._golden = self.engine.golden()
        return self._golden

    def run(self, job: Job, trials: Iterator[int]) -> Iterator[list[Row]]:
        """One after the other."""
        golden, held, since, most = self.golden(), list[Row](), time.monotonic(), 1
        while block := list(islice(trials, most)):
            for rows in run_trials(self.engine, golden, job, block):
                held += rows
                if time.monotonic() - since >= self.seconds:
                    yield held
                    held, since = [], time.monotonic()
            each = sum(row.seconds for row in rows) / len(rows)
            most = int(min(max(self.seconds / max(each, 1e-6), 1), 2 * most, _BLOCK))
        if held:
            yield held

    @property
    def info(self) -> dict[str, Any]:
        """In this process."""
        return {"workers": "in this process", **getattr(self.engine, "info", {})}

    def close(self) -> None:
        """Nothing to give back: the engine is the caller's."""


def run_campaign(
    pool: Pool,
    job: Job,
    *,
    rule: Rule | None = None,
    log: Log | None = None,
    where: Mapping[str, Any] | None = None,
    reporter: Reporter | None = None,
) -> CampaignResult:
    """Run trials until the rule says stop, and return what they found.

    `log` keeps finished trials; those it has already are not run again, and the result is the same to
    the byte as if they had been. `where`: the filters that made `job.space`, for the report. Raises
    FaultError where the space cannot hold the fault, CampaignError where the margin is out of reach.
    """
    rule = rule or Rule()
    job.model.check(job.space)
    limit = rule.limit(job)
    start, golden = time.perf_counter(), pool.golden()
    scores = Scores(job, rule.confidence)
    fresh = _run(pool, job, rule, limit, log, scores, reporter or Reporter())
    stopped = rule.reason(scores, limit, job)
    result = scores.result(job, where or {}, job.right(golden), stopped)
    seconds = time.perf_counter() - start
    return replace(
        result,
        seconds=seconds,
        images_per_second=fresh * job.images / max(seconds, 1e-9),
        execution={**pool.info, "trials_run_now": fresh},
    )


def _run(
    pool: Pool,
    job: Job,
    rule: Rule,
    limit: int,
    log: Log | None,
    scores: Scores,
    reporter: Reporter,
) -> int:
    """Add rows to the scores until the rule is content; how many were run now and not before."""
    kept = log.ranges() if log else []
    finished = pool.run(job, _missing(kept, limit))
    source = _Ordered(log.rows() if log else iter(()), kept, finished, log)
    looks = rule.looks(job)
    look = next(looks, limit + 1)
    open_end = rule.trials is None and job.model.length is None
    total = None if open_end else limit
    with reporter.task(job.model.name, total, "trials") as task:
        try:
            for row in source.rows(limit):
                scores.add(row)
                task.advance(1)
                if scores.rows >= look:
                    task.note(f"within {scores.margin:.3f}")
                    if scores.margin <= rule.margin:
                        break
                    look = next(n for n in looks if n > scores.rows)
        finally:
            source.close()
    return source.fresh


class _Ordered:
    """Rows in the order of their number, from a log and from a pool that finishes them in any order."""

    def __init__(
        self,
        stored: Iterator[Row],
        kept: list[range],
        finished: Iterator[list[Row]],
        log: Log | None,
    ) -> None:
        self._stored, self._finished, self._log = stored, finished, log
        self._ends = {r.start: r.stop for r in kept}
        self._early: dict[int, Row] = {}
        self.fresh = 0

    def rows(self, limit: int) -> Iterator[Row]:
        stop = 0  # end of the stored run we are in
        for number in range(limit):
            stop = self._ends.get(number, stop)
            yield self._kept(number) if number < stop else self._wait(number)

    def _kept(self, number: int) -> Row:
        """A stored row; those before it were run again meanwhile."""
        return next(row for row in self._stored if row.trial == number)

    def _wait(self, number: int) -> Row:
        while number not in self._early:
            batch = next(self._finished)
            if self._log:
                self._log.append(batch)
            self.fresh += len(batch)
            self._early.update((row.trial, row) for row in batch)
        return self._early.pop(number)

    def close(self) -> None:
        """Stop the pool; what it has finished meanwhile is of no use."""
        close = getattr(self._finished, "close", None)
        if close:
            close()


def _missing(kept: list[range], limit: int) -> Iterator[int]:
    """The numbers below `limit` that are in none of the ranges, ascending."""
    start = 0
    for block in kept:
        yield from range(start, min(block.start, limit))
        start = block.stop
    yield from range(start, limit)
