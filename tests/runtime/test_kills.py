"""`kill -9` at random moments; benchmarks/kills.py does it a hundred times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_kills_lose_no_finished_trial_and_change_no_figure(workers: int) -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/kills.py", "--kills", "3", "--workers", str(workers)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] == 3
    assert found["trials_kept_through_kills"] > 0
    assert (found["finished_trials_lost"], found["rows_changed"]) == (0, 0)
    assert found["same_figures"]
