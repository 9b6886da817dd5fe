"""As many workers as is fastest here: what `--workers` names.

What a trial gives depends on its number alone, and rows are scored in that order: the number of workers
changes no figure.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

from resq_deploy.console import Reporter
from resq_deploy.errors import CampaignError
from resq_deploy.metrics import Logits
from resq_deploy.runtime.campaign import Pool
from resq_deploy.runtime.machine import cores, room_for
from resq_deploy.runtime.processes import ProcessPool
from resq_deploy.runtime.trials import EngineFactory, Job, Row, digest


def open_pool(
    factory: EngineFactory,
    workers: int | str = "auto",
    *,
    timeout: float | None = None,
    reporter: Reporter | None = None,
) -> Pool:
    """A pool of workers that each open the engine with `factory(threads)`.

    `workers`: a number (that many processes, cores shared among them), `auto` (many processes of one
    thread or one of many, whichever is measured to be faster), or `ray[:ADDRESS]`. `timeout`: seconds
    one trial may take (None: 50 times the slowest so far, and at least a minute). `factory` is called
    in other processes: a function of a module or a frozen dataclass, not a lambda. Raises
    CampaignError for anything else, and whatever opening the engine raises.
    """
    text = check_workers(workers)
    if text == "ray" or text.startswith("ray:"):
        from resq_deploy.runtime.cluster import RayPool

        return RayPool(factory, text[4:] or None, timeout=timeout)
    if text == "auto":
        return AutoPool(factory, timeout=timeout, reporter=reporter)
    count = int(text)
    return ProcessPool(factory, count, max(1, cores() // count), timeout=timeout)


def check_workers(workers: int | str) -> str:
    """What names workers, as text. Raises CampaignError for anything else."""
    text = str(workers)
    named = text in ("auto", "ray") or text.startswith("ray:")
    if not named and not (text.isdecimal() and 1 <= int(text) <= 4096):
        raise CampaignError(f"{text!r} workers", "a number from 1 on, auto, ray, or ray:ADDRESS")
    return text


class AutoPool:
    """One process of many threads, or many of one: the first trials are run in both ways, the rest in the faster."""

    def __init__(
        self,
        factory: EngineFactory,
        *,
        timeout: float | None = None,
        reporter: Reporter | None = None,
        seconds: float = 2.0,
    ) -> None:
        self._factory, self._timeout, self._seconds = factory, timeout, seconds
        self._reporter = reporter or Reporter()
        self._pool = ProcessPool(factory, 1, cores(), timeout=timeout)
        self._rates: dict[str, float] = {}
        self._chosen = cores() == 1

    def golden(self) -> Logits:
        """Logits without faults."""
        return self._pool.golden()

    @property
    def info(self) -> dict[str, Any]:
        """What was chosen, and the trials per second that it was chosen by."""
        return {**self._pool.info, "trials_per_second": dict(self._rates)}

    def run(self, job: Job, trials: Iterator[int]) -> Iterator[list[Row]]:
        """Rows of these trials; the first ones tell which way is faster."""
        if not self._chosen:
            yield from self._measure(job, trials)
        yield from self._pool.run(job, trials)

    def close(self) -> None:
        """End every worker."""
        self._pool.close()

    def _measure(self, job: Job, trials: Iterator[int]) -> Iterator[list[Row]]:
        rate = yield from self._timed(self._pool, job, trials)
        if rate is None:
            return
        if not room_for(cores(), self._pool.bytes):
            self._reporter.log("workers: one process, memory is too small for more")
            self._chosen = True
            return
        other = ProcessPool(self._factory, cores(), 1, timeout=self._timeout)
        try:
            if digest(other.golden()) != digest(self.golden()):
                other.close()  # threads change its arithmetic: stay with what began
                self._chosen = True
                return
            rate_of_other = yield from self._timed(other, job, trials)
        except BaseException:
            other.close()
            raise
        faster = other if (rate_of_other or 0.0) > rate else self._pool
        (self._pool if faster is other else other).close()
        self._pool, self._chosen = faster, True
        shown = ", ".join(f"{way}: {rate:g}" for way, rate in self._rates.items())
        self._reporter.log(
            f"workers: {faster.count} x {faster.threads} threads (trials per second of {shown})"
        )

    def _timed(
        self, pool: ProcessPool, job: Job, trials: Iterator[int]
    ) -> Generator[list[Row], None, float | None]:
        """Run trials for some seconds; returns trials per second, None where they ran out first."""
        begun, ran_out = time.monotonic(), True
        seconds: list[float] = []

        def some() -> Iterator[int]:
            nonlocal ran_out
            for trial in trials:
                yield trial
                if time.monotonic() - begun > self._seconds:
                    ran_out = False
                    return

        for rows in pool.run(job, some()):
            seconds += [row.seconds for row in rows]
            yield rows
        warm = seconds[pool.count :] or seconds  # the first of each worker sets things up
        if ran_out or not warm:
            return None
        rate = pool.count * len(warm) / max(sum(warm), 1e-9)
        self._rates[f"{pool.count}x{pool.threads}"] = round(rate, 2)
        return rate
