"""Trials in blocks give the rows of trials one by one, whatever happens to one of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resq_deploy.errors import BackendError
from resq_deploy.fault_models import parse
from resq_deploy.faults import Flips
from resq_deploy.metrics import Logits
from resq_deploy.runtime.campaign import Inline, Pool, Rule, run_campaign
from resq_deploy.runtime.journal import Journal
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.processes import ProcessPool
from resq_deploy.runtime.suffix import SuffixEngine
from resq_deploy.runtime.trials import Job, Row, TrialEngine, run_trial, run_trials
from tests.runtime import graphs
from tests.runtime.engines import Blocks, Misbehaves, Together, is_bad, job, plain

TRIALS = 120


def rows_of(pool: Pool, work: Job, trials: int = TRIALS) -> list[Row]:
    rows = [row for some in pool.run(work, iter(range(trials))) for row in some]
    return [replace(row, seconds=0.0) for row in sorted(rows, key=lambda row: row.trial)]


def one_by_one(engine: TrialEngine, work: Job, trials: int = TRIALS) -> list[Row]:
    golden = engine.golden()
    return [replace(run_trial(engine, golden, work, i), seconds=0.0) for i in range(trials)]


def bad_trials() -> list[int]:
    return [i for i in range(TRIALS) if is_bad(job().model.trial(job().space, 0, i).flips)]


@pytest.mark.parametrize("word", ["seu", "mbu:3", "stuck-at-1", "word", "bits:3", "ber:0.001"])
def test_rows_of_a_network_are_those_of_single_trials(word: str) -> None:
    model = graphs.quantized("resnet")
    with OrtRunner(model, threads=1) as runner:
        engine = SuffixEngine(runner, graphs.images(model, 12))
        labels = np.arange(12, dtype=np.int64) % 10
        work = Job(parse(word), runner.space.select(kinds=["weights"]), 3, labels)
        want = one_by_one(engine, work, 60)
        assert rows_of(Inline(engine), work, 60) == want
        for size in (2, 7, 60):
            blocks = [list(range(i, min(i + size, 60))) for i in range(0, 60, size)]
            found = [
                r for b in blocks for s in run_trials(engine, engine.golden(), work, b) for r in s
            ]
            assert [replace(row, seconds=0.0) for row in found] == want
            assert all(0 < row.seconds < 1 for row in found)


def test_the_pool_in_this_process_gives_blocks() -> None:
    engine = Blocks("")
    assert rows_of(Inline(engine), job("stuck-at-0")) == one_by_one(plain(), job("stuck-at-0"))
    assert max(engine.sizes) > 10


def test_short_rules_take_no_more_trials_than_they_say() -> None:
    engine = Blocks("")
    found = run_campaign(Inline(engine), job("ber:0.1"), rule=Rule(trials=17))
    assert (found.trials, sum(engine.sizes)) == (17, 16)  # the first one is alone


def test_a_run_that_fails_spoils_no_other_of_its_block() -> None:
    rows = rows_of(Inline(Blocks("error")), job())
    assert [row.trial for row in rows if row.status == "error"] == bad_trials()
    others = [row for row in one_by_one(plain(), job()) if row.trial not in bad_trials()]
    assert [row for row in rows if row.status == "ok"] == others


@pytest.mark.parametrize(("how", "error"), [("refuse", BackendError), ("bug", TypeError)])
def test_what_is_no_outcome_is_raised(how: str, error: type[Exception]) -> None:
    engine = Blocks(how)
    with pytest.raises(error):
        list(run_trials(engine, engine.golden(), job(), range(TRIALS)))


@pytest.mark.parametrize("how", ["crash", "exit", "hang", "error"])
def test_a_block_that_ends_its_worker_blames_the_trial_that_did(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resq_deploy.runtime.processes._SPARE", 0.0)
    pool = ProcessPool(Together(how), 2, 1, timeout=1.0 if how == "hang" else None)
    try:
        rows = rows_of(pool, job())
    finally:
        pool.close()
    status = {"exit": "crash"}.get(how, how)
    assert [(r.trial, r.status) for r in rows if r.status != "ok"] == [
        (trial, status) for trial in bad_trials()
    ]
    others = [row for row in one_by_one(plain(), job()) if row.trial not in bad_trials()]
    assert [row for row in rows if row.status == "ok"] == others


def test_crashes_give_the_same_journal_with_and_without_blocks(tmp_path: Path) -> None:
    kept = []
    for factory in (Together("crash"), Misbehaves("crash")):
        pool = ProcessPool(factory, 2, 1)
        try:
            with Journal.open(tmp_path / type(factory).__name__, {}) as journal:
                log = journal.campaign("seu")
                run_campaign(pool, job(), rule=Rule(trials=60), log=log)
                kept.append([replace(row, seconds=0.0) for row in log.rows()])
        finally:
            pool.close()
    assert kept[0] == kept[1]
    assert len(kept[0]) == 60


def test_a_worker_killed_from_outside_changes_nothing(tmp_path: Path) -> None:
    pool = ProcessPool(Together("crash", str(tmp_path / "done")), 1, 1)
    try:
        assert rows_of(pool, job()) == one_by_one(plain(), job())
        assert pool.info["restarts"] == 1
    finally:
        pool.close()


class Half(Blocks):
    """Cannot reach odd elements."""

    def unreachable(self, flips: Flips) -> int:
        return sum(
            int(np.bitwise_count(p.masks[p.elements % 2 == 1]).sum()) for p in flips.values()
        )


@pytest.mark.parametrize("word", ["seu", "bits:3"])
def test_bits_out_of_reach(word: str) -> None:
    engine = Half("")
    rows = rows_of(Inline(engine), job(word))
    assert rows == one_by_one(engine, job(word))
    assert any(row.unreachable for row in rows)


def test_a_block_takes_the_engines_answers_in_order() -> None:
    """An engine that mixed its answers up would be seen: the rows hold digests of the logits."""

    class Mixed(Blocks):
        def run_many(self, trials: list[Flips]) -> list[Logits]:
            return super().run_many(trials)[::-1]

    assert rows_of(Inline(Mixed("")), job()) != one_by_one(plain(), job())
