"""What a campaign costs beside its trials, and what that means for a very large one.

    python benchmarks/scale.py [--trials 1e9] [--rows 100000]

Measured: drawing a trial, scoring a row, keeping it in the journal, a row on its way from a worker.
The calculation takes these, a number of workers and their trials per second.
"""

from __future__ import annotations

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from resq_deploy.fault_models import parse
from resq_deploy.faults import FaultSpace, Memory
from resq_deploy.runtime.double import NumpyRunner
from resq_deploy.runtime.figures import Scores
from resq_deploy.runtime.journal import Journal
from resq_deploy.runtime.trials import Job, PlainEngine, run_trial
from resq_deploy.statistics import least_trials, sample_size

BATCH = 100


def seconds(work: Callable[[], Any], times: int = 3) -> float:
    """The fastest of some runs: what it costs where nothing else runs."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return min(found)


def draw_costs(count: int) -> dict[str, float]:
    """Microseconds to draw one trial in a ResNet18's 11.2 M INT8 weights."""
    weights = np.zeros(11_200_000, np.int8)
    space = FaultSpace([Memory("w", "w", "weights", weights)])
    found = {}
    for text, times in (("seu", count), ("mbu:4", count), ("ber:1e-4", 20), ("ber:1e-3", 10)):
        model = parse(text)

        def draw(model: Any = model, times: int = times) -> None:
            for i in range(times):
                model.trial(space, 0, i)

        found[text] = round(seconds(draw) / times * 1e6, 1)
    return found


def row_costs(count: int) -> dict[str, float]:
    """Microseconds of each step that a finished row takes on the machine that journals, and its bytes."""
    runner = NumpyRunner()
    sample = runner.sample(64)
    engine = PlainEngine(runner, sample.images)
    job = Job(parse("seu"), runner.space.select(kinds=["weights"]), 0, sample.labels)
    golden = engine.golden()
    few = [run_trial(engine, golden, job, i) for i in range(200)]
    rows = [replace(few[i % 200], trial=i) for i in range(count)]
    batches = [rows[i : i + BATCH] for i in range(0, count, BATCH)]

    def score() -> None:
        scores = Scores(job, 0.95)
        for row in rows:
            scores.add(row)

    def travel() -> None:
        for batch in batches:
            pickle.loads(pickle.dumps(batch))  # noqa: S301 - our own rows

    with tempfile.TemporaryDirectory() as folder:

        def keep() -> None:
            path = Path(folder) / "journal.sqlite"
            Journal.remove(path)
            with Journal.open(path, {}) as journal:
                log = journal.campaign("x")
                for batch in batches:
                    log.append(batch)

        costs = {"score": seconds(score), "keep": seconds(keep), "travel": seconds(travel)}
        size = (Path(folder) / "journal.sqlite").stat().st_size
    each = {name: round(value / count * 1e6, 2) for name, value in costs.items()}
    return {**each, "bytes": round(size / count, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--trials", type=float, default=1e9)
    parser.add_argument("--rows", type=int, default=100_000)
    asked = parser.parse_args()
    draws, rows = draw_costs(2000), row_costs(asked.rows)
    driver = rows["score"] + rows["keep"] + rows["travel"]
    print("microseconds to draw a trial among 89.6 M bits:", draws)
    print("microseconds for each row on the machine that journals:", rows)
    most = 1e6 / driver
    hours = asked.trials / most / 3600
    print(
        f"one driver takes {most:,.0f} rows a second: {asked.trials:.0e} trials in {hours:.1f} h or more,"
    )
    print(f"with a journal of {asked.trials * rows['bytes'] / 1e9:,.0f} GB")
    for rate in (25, 100, 400):
        workers = most / rate
        print(f"  at {rate} trials/s each, {workers:,.0f} workers keep it busy")
    for margin in (1e-2, 1e-3, 1e-4, 1e-5):
        least, classic = least_trials(margin), sample_size(89_600_000, margin)
        print(
            f"a margin of {margin:g}: {least:,} trials at best, {classic:,} by Leveugle at p = 0.5"
        )
    print(
        json.dumps(
            {
                "draw_us": draws,
                "row_us": rows,
                "rows_per_second": round(most),
                "hours": round(hours, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
