"""Kill a campaign with SIGKILL at random moments, again and again, and compare with one that was left alone.

    python benchmarks/kills.py [--kills 100] [--workers 2]

After every kill: each trial that was reported as finished is in the journal, and no row has changed.
At the end: the figures of the campaign that was killed so often are the bytes of the other's.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resq_deploy.fault_models import parse
from resq_deploy.faults import Flips
from resq_deploy.metrics import Logits
from resq_deploy.runtime.campaign import Inline, Rule, run_campaign
from resq_deploy.runtime.double import NumpyRunner
from resq_deploy.runtime.figures import CampaignResult
from resq_deploy.runtime.journal import CampaignLog, Journal
from resq_deploy.runtime.trials import Job, PlainEngine, Row
from resq_deploy.runtime.workers import open_pool

IMAGES = 32
TRIAL_SECONDS = 0.004
RULE = Rule(margin=0.02, max_trials=3000)


class Slow(PlainEngine):
    """A trial takes a few milliseconds, so that a kill falls into one."""

    def run(self, flips: Flips) -> Logits:
        time.sleep(TRIAL_SECONDS)
        return super().run(flips)


@dataclass(frozen=True)
class Opens:
    slow: bool = True

    def __call__(self, threads: int) -> PlainEngine:
        runner = NumpyRunner()
        images = runner.sample(IMAGES).images
        return Slow(runner, images) if self.slow else PlainEngine(runner, images)


def job() -> Job:
    runner = NumpyRunner()
    return Job(parse("bits:20"), runner.space, 7, runner.sample(IMAGES).labels)


class Telling:
    """A log that says on stdout which trials are finished, once they are kept."""

    def __init__(self, log: CampaignLog) -> None:
        self.ranges, self.rows, self._log = log.ranges, log.rows, log

    def append(self, rows: Iterable[Row]) -> None:
        kept = list(rows)
        self._log.append(kept)
        sys.stdout.write("".join(f"{row.trial}\n" for row in kept))
        sys.stdout.flush()


def campaign(path: Path, workers: int) -> CampaignResult:
    """The campaign that is killed: what a child process runs."""
    pool = open_pool(Opens(), workers) if workers else Inline(Opens()(1))
    try:
        with Journal.open(path, {"bundle": "double"}, resume=True) as journal:
            return run_campaign(pool, job(), rule=RULE, log=Telling(journal.campaign("kills")))
    finally:
        pool.close()


def kept(path: Path) -> dict[int, Row]:
    if not path.exists():
        return {}
    with Journal.open(path, {"bundle": "double"}, resume=True) as journal:
        return {row.trial: row for row in journal.campaign("kills").rows()}


def kill_once(path: Path, workers: int, wait: float) -> tuple[set[int], bool]:
    """Run the campaign and kill it `wait` seconds after its first finished trial; what it said was finished."""
    command = [sys.executable, __file__, "--child", str(path), "--workers", str(workers)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        first = child.stdout.readline()
        time.sleep(wait)
        child.send_signal(signal.SIGKILL)
        said = [first, *child.stdout.read().split("\n")[:-1]]
    return {int(line) for line in said if line.strip().isdecimal()}, child.returncode == 0


def kill_often(kills: int, workers: int, seed: int = 0) -> dict[str, Any]:
    """Kill so many times, then let it end."""
    chance = random.Random(seed)
    alone = run_campaign(Inline(Opens(slow=False)(1)), job(), rule=RULE)
    # all waits together are shorter than the campaign, so that no kill comes after its end
    longest = 0.8 * alone.trials * TRIAL_SECONDS / max(workers, 1) / kills
    lost = changed = done = 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "journal.sqlite"
        before: dict[int, Row] = {}
        for _ in range(kills):
            said, ended = kill_once(path, workers, chance.uniform(0, longest))
            after = kept(path)
            done += ended
            lost += len((said | set(before)) - set(after))
            changed += sum(after.get(trial) != row for trial, row in before.items())
            before = after
        with Journal.open(path, {"bundle": "double"}, resume=True) as journal:
            last = run_campaign(
                Inline(Opens(slow=False)(1)), job(), rule=RULE, log=journal.campaign("kills")
            )
    return {
        "kills": kills - done,
        "workers": workers,
        "trials": last.trials,
        "trials_kept_through_kills": len(before),
        "finished_trials_lost": lost,
        "rows_changed": changed,
        "same_figures": last.figures() == alone.figures(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--workers", type=int, default=2, help="0: in one process")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        campaign(asked.child, asked.workers)
        return
    found = kill_often(asked.kills, asked.workers)
    for name, value in found.items():
        print(f"{name:28} {value}")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
