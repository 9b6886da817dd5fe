"""The same trials on a Ray cluster: `--workers ray[:ADDRESS]`.

Each CPU of the cluster (each GPU, for a GPU backend) has an actor with the engine open; trials are sent
to actors by number and their rows come back, to be journalled here. The bundle is read from this
machine's disk once, travels to each node once through Ray's object store, and is verified there. What a
node had not finished when it died is run again elsewhere. See docs/scale.md.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from resq_deploy.errors import BackendError, MissingExtra
from resq_deploy.metrics import Logits
from resq_deploy.runtime.crew import Crew, raise_again, words_of
from resq_deploy.runtime.shipping import ship
from resq_deploy.runtime.trials import (
    EngineFactory,
    Job,
    Row,
    Status,
    TrialEngine,
    failed_trial,
    run_trials,
)

_BATCH_SECONDS = 1.0  # of work sent to an actor at once: a call costs about a millisecond
_MOST = 2000  # trials sent at once
_BLOCK = 256  # trials that an engine may run together
_DEEP = 2  # calls an actor has in hand, so that it never waits for this machine
_LEAST_SECONDS = 120.0  # a call is never given less than this
_ATTEMPTS = 2
_AHEAD = 200_000  # a trial is not begun while one so much older is unfinished: rows wait in memory for it
_LOOK_SECONDS = 5.0  # between two looks for nodes that have joined
_START_SECONDS = 600.0
_LOST_AT_START = 20


class _Engine:
    """What lives in an actor: one open engine. Errors travel as words, since exceptions may not unpickle."""

    def __init__(self, factory: EngineFactory, threads: int) -> None:
        self._factory, self._threads = factory, threads
        self._opened: tuple[TrialEngine, Logits] | None = None

    def open(self) -> tuple[Any, ...]:
        """("open", golden logits, info) or ("failed", kind, message, hint)."""
        try:
            engine = self._factory(self._threads)
            self._opened = engine, engine.golden()
            return "open", self._opened[1], dict(getattr(engine, "info", {}))
        except Exception as error:
            return "failed", type(error).__name__, *words_of(error)

    def run(self, job: Job, trials: list[int]) -> tuple[Any, ...]:
        """(rows,), or what was finished and why no more is: (rows, kind, message, hint)."""
        rows: list[Row] = []
        try:
            assert self._opened is not None
            engine, golden = self._opened
            for i in range(0, len(trials), _BLOCK):
                for done in run_trials(engine, golden, job, trials[i : i + _BLOCK]):
                    rows += done
        except Exception as error:
            return rows, type(error).__name__, *words_of(error)
        return (rows,)


@dataclass(slots=True, eq=False)
class _Actor:
    """An actor, and the calls it has in hand, oldest first."""

    handle: Any
    calls: list[_Call] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Call:
    """Trials under way in one actor; `alone`: one that failed before, with nothing else in the actor's hands."""

    actor: _Actor
    trials: list[int]
    alone: bool
    begun: float = field(default_factory=time.monotonic)


@dataclass(slots=True, eq=False)
class _Run:
    """The trials of one run: what is to be done, and what is to be done again."""

    job: Job
    shipped: Any
    trials: Iterator[int]
    ended: bool = False
    latest: int = 0
    again: deque[int] = field(default_factory=deque)
    attempts: dict[int, int] = field(default_factory=dict)
    failure: tuple[str, str, str] | None = None  # what ends it, once all rows are handed over

    def take(self, most: int) -> list[int]:
        """The next trials to begin."""
        batch = list(itertools.islice(self.trials, most))
        self.ended = len(batch) < most
        self.latest = batch[-1] if batch else self.latest
        return batch


class RayPool(Crew):
    """An actor for every CPU, or GPU, of a Ray cluster.

    `address`: as `ray.init` takes it (None: the cluster that RAY_ADDRESS names, else one on this machine).
    Raises MissingExtra without Ray, and BackendError where the cluster cannot be reached.
    """

    _cure = "use nodes of one kind of processor"

    def __init__(
        self, factory: EngineFactory, address: str | None = None, *, timeout: float | None = None
    ) -> None:
        super().__init__(timeout, _LEAST_SECONDS)
        self._ray, self._ours = _connect(address)
        self._unit = "GPU" if getattr(factory, "backend", "ort") != "ort" else "CPU"
        self._factory = self._ray.put(ship(factory))
        self._actors: list[_Actor] = []
        self._opening: dict[Any, Any] = {}  # answer of open() -> handle
        self._calls: dict[Any, _Call] = {}
        self._looked, self._lost = -math.inf, 0
        try:
            self._wait_for_one()
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> dict[str, Any]:
        """How many actors, on how many nodes, and how many were lost on the way."""
        nodes = sum(1 for node in self._ray.nodes() if node["Alive"])
        names = {"workers": len(self._actors), "on": f"{nodes} nodes of a Ray cluster"}
        return {**names, "workers_lost": self._lost, **self._engine}

    def run(self, job: Job, trials: Iterator[int]) -> Iterator[list[Row]]:
        """Rows of these trials as they are finished, in any order."""
        run = _Run(job, self._ray.put(job), trials)
        try:
            while not (run.ended and not run.again and not self._calls):
                self._grow()
                self._feed(run)
                if rows := self._collect(run):
                    yield rows
                if run.failure is not None:
                    raise_again(*run.failure)
        finally:
            for reference in self._calls:
                self._ray.cancel(reference)
            self._calls.clear()
            for actor in self._actors:
                actor.calls.clear()

    def close(self) -> None:
        """End the actors, and our connection to the cluster."""
        for handle in (*(actor.handle for actor in self._actors), *self._opening.values()):
            self._ray.kill(handle)
        self._actors, self._opening = [], {}
        if self._ours:
            self._ray.shutdown()

    # trials

    def _feed(self, run: _Run) -> None:
        """Give every actor enough to do; trials that are to be done again come first, each in an idle actor."""
        oldest = min((call.trials[0] for call in self._calls.values()), default=run.latest)
        held = run.ended or bool(run.again) or run.latest - oldest > _AHEAD
        for actor in self._actors:
            while len(actor.calls) < _DEEP and not any(call.alone for call in actor.calls):
                alone = bool(run.again) and not actor.calls
                if held and not alone:
                    break
                batch = (
                    [run.again.popleft()] if alone else run.take(self._batch(_BATCH_SECONDS, _MOST))
                )
                if not batch:
                    break
                call = _Call(actor, batch, alone)
                actor.calls.append(call)
                self._calls[actor.handle.run.remote(run.shipped, batch)] = call

    def _collect(self, run: _Run) -> list[Row]:
        """Rows of the calls that have come back; trials of actors that died are to be done again."""
        rows: list[Row] = []
        if not self._calls:
            time.sleep(0.05)  # no actor is left: wait for one to open
            return rows
        waiting = list(self._calls)
        self._ray.wait(waiting, num_returns=1, timeout=self._nap())
        done, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        for reference in done:
            answer = self._answer(reference)
            if answer is None:
                rows += self._failed(run, reference, "crash")
            else:
                self._pop(reference)
                rows += self._rows(run, *answer)
        for reference in self._late():
            rows += self._failed(run, reference, "hang")
        return rows

    def _answer(self, reference: Any) -> tuple[Any, ...] | None:
        """What an actor said, None where it died before it did."""
        try:
            answer: tuple[Any, ...] = self._ray.get(reference)
        except self._ray.exceptions.RayError:
            return None
        return answer

    def _pop(self, reference: Any) -> _Call:
        call = self._calls.pop(reference)
        call.actor.calls.remove(call)
        return call

    def _rows(self, run: _Run, rows: list[Row], *failure: Any) -> list[Row]:
        if failure:
            run.failure = failure
        elif rows:
            seconds = [row.seconds for row in rows]
            self._took(sum(seconds) / len(seconds), max(seconds))
        return rows

    def _failed(self, run: _Run, reference: Any, status: Status) -> list[Row]:
        """An actor died or hangs: what it had is sent again one by one, and counts as DUE if it fails alone too."""
        call = self._pop(reference)
        self._forget(call.actor)
        if call.alone:
            (trial,) = call.trials
            run.attempts[trial] = run.attempts.get(trial, 0) + 1
            if run.attempts[trial] >= _ATTEMPTS:
                return [failed_trial(self.golden(), run.job, trial, status)]
        run.again.extend(call.trials)
        return []

    def _late(self) -> list[Any]:
        now = time.monotonic()
        one = self._patience()

        def patience(call: _Call) -> float:  # what the actor has in hand before it comes first
            return _DEEP * (one + 10 * self._typical * len(call.trials))

        return [ref for ref, call in self._calls.items() if now - call.begun > patience(call)]

    def _nap(self) -> float:
        return min(1.0, (self._timeout or 4.0) / 4)

    # actors

    def _grow(self) -> None:
        """Start actors for CPUs (GPUs) that have none: at first, after a loss, and when nodes have joined."""
        self._admit(0.0)
        if time.monotonic() - self._looked < _LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        there = int(self._ray.cluster_resources().get(self._unit, 0))
        wants = {"num_cpus": 1} if self._unit == "CPU" else {"num_cpus": 0, "num_gpus": 1}
        remote = self._ray.remote(**wants)(_Engine)
        for _ in range(there - len(self._actors) - len(self._opening)):
            handle = remote.remote(self._factory, 1)
            self._opening[handle.open.remote()] = handle

    def _admit(self, seconds: float) -> None:
        """Take in the actors whose engine is open: they get trials from now on."""
        if not self._opening:
            return
        waiting = list(self._opening)
        done, _ = self._ray.wait(
            waiting, num_returns=1 if seconds else len(waiting), timeout=seconds
        )
        for reference in done:
            handle, answer = self._opening.pop(reference), self._answer(reference)
            if answer is None:
                self._lost += 1
                continue
            if answer[0] == "failed":
                raise_again(*answer[1:])
            self._agree(answer[1])
            self._engine = answer[2]
            self._actors.append(_Actor(handle))

    def _forget(self, actor: _Actor) -> None:
        if actor in self._actors:
            self._actors.remove(actor)
            self._lost += 1
            self._looked = -math.inf
            self._ray.kill(actor.handle)

    def _wait_for_one(self) -> None:
        end = time.monotonic() + _START_SECONDS
        while not self._actors:
            self._grow()
            if not self._opening:
                raise BackendError(
                    f"the Ray cluster has no {self._unit} for a worker", "ray status"
                )
            self._admit(min(_LOOK_SECONDS, end - time.monotonic()))
            if time.monotonic() > end or self._lost > _LOST_AT_START:
                raise BackendError(
                    "no worker of the Ray cluster could open the engine", "ray status"
                )


def _connect(address: str | None) -> tuple[Any, bool]:
    """Ray, connected, and whether it was us who connected it."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError as error:
        raise MissingExtra("ray", "ray") from error
    if ray.is_initialized():
        return ray, False
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackendError(
            f"no Ray cluster at {address or 'this machine'}: {first}",
            "ray start --head; ray status",
        ) from error
    return ray, True
