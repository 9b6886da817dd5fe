"""Worker processes: the same figures from any number of them, and from some that die, hang or are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from resq_deploy.errors import BackendError, CampaignError
from resq_deploy.metrics import unpacked
from resq_deploy.runtime.campaign import Inline, Rule, run_campaign
from resq_deploy.runtime.machine import cores, room_for
from resq_deploy.runtime.processes import ProcessPool
from resq_deploy.runtime.trials import Job, Row
from resq_deploy.runtime.workers import AutoPool, open_pool
from tests.runtime.engines import CannotOpen, Differs, Misbehaves, Opens, is_bad, job, plain

TRIALS = Rule(trials=60)
ROOT = Path(__file__).resolve().parent.parent.parent


def bad_trials(work: Job, trials: int = 60) -> list[int]:
    return [i for i in range(trials) if is_bad(work.model.trial(work.space, work.seed, i).flips)]


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPool]:
    opened = ProcessPool(Opens(), 2, 1)
    yield opened
    opened.close()


@pytest.mark.parametrize("text", ["seu", "ber:0.02", "stuck-at-1"])
@pytest.mark.parametrize("rule", [TRIALS, Rule(margin=0.1)])
def test_workers_change_no_figure(pool: ProcessPool, text: str, rule: Rule) -> None:
    alone = run_campaign(Inline(plain()), job(text), rule=rule)
    found = run_campaign(pool, job(text), rule=rule)
    assert found.figures() == alone.figures()
    assert found.execution["workers"] == 2


def test_a_pool_serves_one_campaign_after_the_other(pool: ProcessPool) -> None:
    stopped = pool.run(job(), iter(range(1000)))
    assert next(stopped)
    stopped.close()  # type: ignore[attr-defined]
    for seed in (1, 2):
        alone = run_campaign(Inline(plain()), job(seed=seed), rule=TRIALS)
        assert run_campaign(pool, job(seed=seed), rule=TRIALS).figures() == alone.figures()


def test_a_campaign_that_ends_does_not_wait_for_a_trial_that_hangs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pool = ProcessPool(Misbehaves("hang"), 2, 1)
    monkeypatch.setattr(pool, "_patience", lambda: 0.5)
    first, *_ = bad_trials(job())
    try:
        rows = pool.run(job(), iter([first, *range(first)]))
        assert next(rows)
        rows.close()  # type: ignore[attr-defined]
        assert not any(worker.sent for worker in pool._workers)
    finally:
        pool.close()


def test_every_trial_once(pool: ProcessPool) -> None:
    rows = [row for batch in pool.run(job(), iter(range(500))) for row in batch]
    assert sorted(row.trial for row in rows) == list(range(500))
    assert list(pool.run(job(), iter(()))) == []


@pytest.mark.parametrize("how", ["crash", "exit", "hang"])
def test_trials_that_end_their_worker_are_due(how: str) -> None:
    work = job()
    bad = bad_trials(work)
    assert bad
    pool = ProcessPool(Misbehaves(how), 2, 1, timeout=1.0 if how == "hang" else None)
    try:
        found = run_campaign(pool, work, rule=TRIALS)
    finally:
        pool.close()
    status = "hang" if how == "hang" else "crash"
    assert found.failed == {"error": 0, "crash": 0, "hang": 0, status: len(bad)}
    assert found.due.mean == pytest.approx(len(bad) / 60)
    assert found.trials == 60
    assert found.execution["restarts"] >= 2 * len(bad)


def test_a_worker_killed_from_outside_changes_nothing(tmp_path: Path) -> None:
    pool = ProcessPool(Misbehaves("crash", str(tmp_path / "done")), 1, 1)
    try:
        found = run_campaign(pool, job(), rule=TRIALS)
    finally:
        pool.close()
    assert found.figures() == run_campaign(Inline(plain()), job(), rule=TRIALS).figures()
    assert found.execution["restarts"] == 1


def test_idle_workers_that_die_are_replaced(pool: ProcessPool) -> None:
    os.kill(pool._workers[0].process.pid, signal.SIGKILL)
    found = run_campaign(pool, job(), rule=TRIALS)
    assert found.figures() == run_campaign(Inline(plain()), job(), rule=TRIALS).figures()


@pytest.mark.parametrize(
    ("how", "error", "words"),
    [
        ("refuse", BackendError, r"memory is not back \(restart it\)"),
        ("bug", RuntimeError, "a bug of ours"),
    ],
)
def test_what_is_no_outcome_ends_the_campaign(how: str, error: type[Exception], words: str) -> None:
    pool = ProcessPool(Misbehaves(how), 1, 1)
    try:
        with pytest.raises(error, match=words):
            run_campaign(pool, job(), rule=TRIALS)
    finally:
        pool.close()


@pytest.mark.parametrize(
    ("factory", "error", "words"),
    [
        (CannotOpen("refuse"), BackendError, "no such device"),
        (CannotOpen("die"), CampaignError, "died while it opened the engine .exit status 7"),
        (Differs(), CampaignError, "different golden logits"),
    ],
)
def test_engines_that_do_not_open(
    factory: CannotOpen | Differs, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        ProcessPool(factory, 2, 1)


def test_an_engine_that_never_opens() -> None:
    with pytest.raises(CampaignError, match="hung while it opened"):
        ProcessPool(Opens(), 1, 1, start_seconds=0.01)


@pytest.mark.parametrize("text", ["0", "-1", "many", "", "1.5", "99999"])
def test_workers_that_are_no_number(text: str) -> None:
    with pytest.raises(CampaignError, match="a number from 1 on, auto, ray"):
        open_pool(Opens(), text)


def test_a_number_of_workers_shares_the_cores() -> None:
    pool = open_pool(Opens(), 1)
    try:
        assert pool.info["workers"] == 1
        assert pool.info["threads_each"] == cores()
    finally:
        pool.close()


@pytest.mark.skipif(cores() == 1, reason="one core leaves nothing to choose")
@pytest.mark.parametrize(("gain", "best"), [(0.0, f"{cores()}x1"), (3.0, f"1x{cores()}")])
def test_auto_takes_what_is_faster_and_says_so(gain: float, best: str) -> None:
    pool = AutoPool(Opens(0.3, gain), seconds=0.4)
    try:
        found = run_campaign(pool, job(), rule=Rule(trials=24))
    finally:
        pool.close()
    rates = found.execution["trials_per_second"]
    assert set(rates) == {f"1x{cores()}", f"{cores()}x1"}
    assert f"{found.execution['workers']}x{found.execution['threads_each']}" == best
    assert found.figures() == run_campaign(Inline(plain()), job(), rule=Rule(trials=24)).figures()


def test_auto_stays_with_one_process_where_memory_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = AutoPool(Opens(0.02, 0.0), seconds=0.2)
    assert pool._pool.bytes > 20 * 2**20
    monkeypatch.setattr("resq_deploy.runtime.workers.room_for", lambda count, size: False)
    try:
        found = run_campaign(pool, job(), rule=Rule(trials=40))
    finally:
        pool.close()
    assert found.execution["workers"] == 1


@pytest.mark.parametrize(("free", "fits"), [(1000, False), (5000, True)])
def test_room_is_what_is_free(tmp_path: Path, free: int, fits: bool) -> None:
    (tmp_path / "m").write_text(f"MemTotal: 9999 kB\nMemAvailable: {free} kB\nHugePages: 0\n")
    assert room_for(3, 1_000_000, str(tmp_path / "m")) == fits
    assert room_for(3, 1_000_000, str(tmp_path / "nothing"))


def test_auto_starts_nothing_more_for_a_short_campaign() -> None:
    pool = open_pool(Opens(), "auto")
    try:
        found = run_campaign(pool, job(), rule=Rule(trials=5))
        assert found.execution["workers"] == 1
        assert found.execution["trials_per_second"] == {}
    finally:
        pool.close()


def test_a_script_needs_no_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        from resq_deploy.runtime.workers import open_pool
        from tests.runtime.engines import Opens, job
        from resq_deploy.runtime.campaign import Rule, run_campaign
        pool = open_pool(Opens(), 1)
        print(run_campaign(pool, job(), rule=Rule(trials=3)).trials)
        pool.close()
        """)
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("3\n", 0), done.stderr


def test_a_failed_row_is_a_row() -> None:
    from resq_deploy.runtime.trials import failed_trial

    golden = plain().golden()
    row = failed_trial(golden, job(), 4, "crash")
    assert isinstance(row, Row)
    assert (row.due, row.correct, row.sdc1, row.status) == (16, 0, 16, "crash")
    assert unpacked(row.changed, 16).tolist() == job().right(golden).tolist()  # none is right now
