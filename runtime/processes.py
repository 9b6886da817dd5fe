"""Worker processes that run trials: started, watched, and started again.

A fault in weight memory can end or hang the runtime that meets it. In a worker that is an outcome: the
trial is tried once more in a fresh worker, and when that fails too it counts as DUE (`crash`, `hang`).
So a worker that is killed from outside changes no figure. Where an engine runs many trials together, any of
them may be the one: each is tried alone before one is blamed.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from typing import Any

from resq_deploy.errors import CampaignError, EngineLost, ResqError
from resq_deploy.runtime.crew import Crew, raise_again, words_of
from resq_deploy.runtime.machine import resident, without_main
from resq_deploy.runtime.trials import (
    EngineFactory,
    Job,
    Row,
    Status,
    failed_trial,
    run_trials,
)

_START_SECONDS = 600.0  # until a worker has opened its engine and run golden
_LEAST_SECONDS = 60.0  # a trial is never given less than this, unless asked for
_SPARE = 10.0  # ... and for each other trial of its batch so many times what one takes
_BATCH_SECONDS = 0.1  # of work sent to a worker at once ...
_BLOCK_SECONDS = 0.5  # ... and where it runs trials together
_MOST = 256  # trials sent to a worker at once
_AHEAD = 20_000  # a trial is not begun while one so much older is unfinished
_ATTEMPTS = 2


@dataclass(slots=True, eq=False)
class _Worker:
    """One process, and the batches of trials it has been sent, oldest first; `shares`: as `run_many` does."""

    process: Any
    pipe: connection.Connection
    ready: bool = False
    shares: bool = False
    job: int = -1
    sent: deque[list[int]] = field(default_factory=deque)
    since: float = field(default_factory=time.monotonic)  # when it began what it is at

    @property
    def held(self) -> int:
        """How many trials it still has to run."""
        return sum(map(len, self.sent))

    def forget(self, count: int) -> None:
        """So many trials are finished."""
        del self.sent[0][:count]
        if not self.sent[0]:
            self.sent.popleft()

    def suspects(self) -> list[int]:
        """The trials one of which it was at."""
        first = self.sent[0] if self.sent else []
        return first if self.shares else first[:1]


class ProcessPool(Crew):
    """`count` worker processes of `threads` threads each, all with the same engine.

    Raises CampaignError where their golden runs differ, and what opening the engine raised.
    """

    def __init__(
        self,
        factory: EngineFactory,
        count: int,
        threads: int,
        *,
        timeout: float | None = None,
        start_seconds: float = _START_SECONDS,
    ) -> None:
        super().__init__(timeout, _LEAST_SECONDS)
        self.count, self.threads = count, threads
        self._factory, self._start_seconds = factory, start_seconds
        self._jobs = self._restarts = 0
        self._workers: list[_Worker] = []
        try:
            self._workers = [self._start() for _ in range(count)]
            self._wait_ready()
        except BaseException:
            self.close()
            raise

    @property
    def info(self) -> dict[str, Any]:
        """How many, of how many threads, and how often one had to be started again."""
        names = {"workers": self.count, "threads_each": self.threads, "restarts": self._restarts}
        return {**names, **self._engine}

    @property
    def bytes(self) -> int:
        """Resident memory of the largest worker, 0 where the system does not tell."""
        return max(resident(worker.process.pid) for worker in self._workers)

    def run(self, job: Job, trials: Iterator[int]) -> Iterator[list[Row]]:
        """Rows of these trials as they are finished, in any order."""
        self._jobs += 1
        number = self._jobs
        run = _Run(job, trials)
        try:
            while True:
                for worker in self._workers:
                    self._feed(worker, number, run)
                if run.done:
                    return
                rows = self._collect(number, run)
                if rows:
                    yield rows
        finally:
            self._settle()

    def close(self) -> None:
        """End every worker."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                worker.pipe.close()
        for worker in self._workers:
            worker.process.join(0.0 if worker.sent else 2.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.process.close()
        self._workers = []

    # one step

    def _feed(self, worker: _Worker, number: int, run: _Run) -> None:
        """Send more trials to a worker that will soon have none."""
        if not worker.ready:
            return
        most = self._batch(_BLOCK_SECONDS if worker.shares else _BATCH_SECONDS, _MOST)
        if worker.held > most // 2:
            return
        batch = run.take(most)
        if not batch:
            return
        if not worker.sent:
            worker.since = time.monotonic()
        with contextlib.suppress(OSError):  # that it is dead is seen where it is read from
            if worker.job != number:
                worker.pipe.send(("job", number, run.job))
                worker.job = number
            worker.pipe.send(("run", batch))
        worker.sent.append(batch)

    def _collect(self, number: int, run: _Run) -> list[Row]:
        """Wait for something to happen, and return the rows that have come in."""
        rows: list[Row] = []
        by_pipe = {w.pipe: w for w in self._workers}
        for pipe in connection.wait(list(by_pipe), timeout=self._nap()):
            worker = by_pipe[pipe]  # type: ignore[index]
            try:
                while worker.pipe.poll():
                    self._receive(worker, worker.pipe.recv(), number, run, rows)
            except (EOFError, OSError):
                self._failed(worker, "crash", run, rows)
        for worker in self._workers:
            if self._is_late(worker):
                self._failed(worker, "hang", run, rows)
        return rows

    def _receive(
        self, worker: _Worker, message: Any, number: int, run: _Run | None, rows: list[Row]
    ) -> None:
        match message:
            case ("ready", golden, info, shares):
                self._agree(golden)
                worker.ready, worker.shares, self._engine = True, shares, info
            case ("rows", of, done):
                now = time.monotonic()
                each = (now - worker.since) / len(done)
                self._took(each, each)
                worker.since = now
                worker.forget(len(done))
                if of == number and run is not None:
                    run.begun.difference_update(row.trial for row in done)
                    rows += done
            case ("failed", kind, text, hint):
                raise_again(kind, text, hint)

    def _failed(self, worker: _Worker, status: Status, run: _Run, rows: list[Row]) -> None:
        """A worker died or hangs: the trial it was at is tried once more, then counts as DUE."""
        if not worker.ready:
            self._end(worker)
            raise CampaignError(
                f"a worker {'died' if status == 'crash' else 'hung'} while it opened the engine "
                f"(exit status {worker.process.exitcode})",
                "fewer --workers need less memory",
            )
        suspects, lost = worker.suspects(), [trial for batch in worker.sent for trial in batch]
        if len(suspects) == 1:
            guilty = suspects[0]
            run.attempts[guilty] = run.attempts.get(guilty, 0) + 1
            if run.attempts[guilty] >= _ATTEMPTS:
                lost.remove(guilty)
                run.begun.discard(guilty)
                rows.append(failed_trial(self.golden(), run.job, guilty, status))
        run.again.extendleft(reversed(lost))
        self._replace(worker)

    def _settle(self) -> None:
        """Let the workers finish what was sent to them, and forget it; one that does not is replaced."""
        enough = min(self._patience(), 5.0 + 3 * self._slowest)
        for worker in list(self._workers):
            with contextlib.suppress(EOFError, OSError, ResqError, RuntimeError):
                while worker.sent and worker.pipe.poll(enough):
                    self._receive(worker, worker.pipe.recv(), -1, None, [])
            if worker.sent:
                self._replace(worker)

    # processes

    def _start(self) -> _Worker:
        context = get_context("spawn")
        here, there = context.Pipe()
        arguments = (there, self._factory, self.threads)
        process = context.Process(target=_serve, args=arguments, daemon=True)
        with without_main(self._factory):
            process.start()
        there.close()
        return _Worker(process, here)

    def _wait_ready(self) -> None:
        nothing = _Run(None, iter(()))
        while not all(worker.ready for worker in self._workers):
            self._collect(0, nothing)

    def _replace(self, worker: _Worker) -> None:
        self._end(worker)
        self._restarts += 1
        self._workers[self._workers.index(worker)] = self._start()

    @staticmethod
    def _end(worker: _Worker) -> None:
        worker.pipe.close()
        worker.process.kill()
        worker.process.join()

    def _is_late(self, worker: _Worker) -> bool:
        waited = time.monotonic() - worker.since
        if not worker.ready:
            return waited > self._start_seconds
        others = len(worker.suspects()) - 1
        return bool(worker.sent) and waited > self._patience() + _SPARE * others * self._typical

    def _nap(self) -> float:
        """How long to wait for a worker before looking whether one is late."""
        return min(1.0, self._patience() / 4, self._start_seconds / 4)


class _Run:
    """The trials of one run: what is to be done, what is begun, what is to be done again."""

    def __init__(self, job: Job | None, trials: Iterator[int]) -> None:
        self._job = job
        self._trials = trials
        self._ended = False
        self.begun: set[int] = set()
        self.again: deque[int] = deque()
        self.attempts: dict[int, int] = {}

    @property
    def job(self) -> Job:
        assert self._job is not None
        return self._job

    @property
    def done(self) -> bool:
        return self._ended and not self.begun

    def take(self, most: int) -> list[int]:
        """The next trials to begin, none while the oldest unfinished one is far behind."""
        if self.again:
            return [self.again.popleft()]
        if self.begun and max(self.begun) - min(self.begun) > _AHEAD:
            return []
        batch = list(itertools.islice(self._trials, most))
        self._ended = len(batch) < most
        self.begun.update(batch)
        return batch


def _serve(pipe: connection.Connection, factory: EngineFactory, threads: int) -> None:
    """What a worker does: open the engine, then run trials as they are sent, until the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one who journals
    try:
        engine = factory(threads)
        golden = engine.golden()
        info = dict(getattr(engine, "info", {}))
        pipe.send(("ready", golden, info, hasattr(engine, "run_many")))
        _, number, job = pipe.recv()
        while True:
            message = pipe.recv()
            if message[0] == "job":
                _, number, job = message
                continue
            for rows in run_trials(engine, golden, job, message[1]):
                pipe.send(("rows", number, rows))
    except (EOFError, BrokenPipeError, ConnectionResetError, EngineLost):
        return
    except Exception as error:
        with contextlib.suppress(OSError):
            pipe.send(("failed", type(error).__name__, *words_of(error)))
