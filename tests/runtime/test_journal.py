"""The journal: nothing finished is lost, a resumed campaign is the same, and nothing foreign is taken up."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resq_deploy.errors import CampaignError
from resq_deploy.fault_models import parse
from resq_deploy.runtime import journal as j
from resq_deploy.runtime.campaign import Inline, Rule, run_campaign
from resq_deploy.runtime.double import NumpyRunner
from resq_deploy.runtime.journal import Journal, replay
from resq_deploy.runtime.trials import Job, PlainEngine, Row

RUNNER = NumpyRunner()
SAMPLE = RUNNER.sample(16)
IDENTITY = {"bundle": "a" * 64, "seed": 0, "images": 16}
ROW = Row(3, "ok", 1, 0, "ab", "fc1", 7, 14, 2, 1, 0, 1, 0, "cd", 0.5)


class Stops(Inline):
    """Is interrupted after so many trials."""

    def __init__(self, after: int) -> None:
        super().__init__(PlainEngine(RUNNER, SAMPLE.images), seconds=0.0)
        self.after = after

    def run(self, job: Job, trials: Iterator[int]) -> Iterator[list[Row]]:
        for n, rows in enumerate(super().run(job, trials)):
            if n == self.after:
                raise KeyboardInterrupt
            yield rows


def job(text: str = "ber:0.02") -> Job:
    return Job(parse(text), RUNNER.space, 0, SAMPLE.labels)


@pytest.mark.parametrize("rule", [Rule(trials=40), Rule(margin=0.1)])
def test_a_resumed_campaign_equals_an_uninterrupted_one(tmp_path: Path, rule: Rule) -> None:
    whole = run_campaign(Stops(10**6), job(), rule=rule)
    for after in (0, 1, 9, 10**6, 10**6):
        with Journal.open(tmp_path / "j", IDENTITY, resume=True) as journal:
            log = journal.campaign("ber")
            if after < 10**6:
                with pytest.raises(KeyboardInterrupt):
                    run_campaign(Stops(after), job(), rule=rule, log=log)
            else:
                result = run_campaign(Stops(after), job(), rule=rule, log=log)
                assert result.figures() == whole.figures()
    assert result.execution["trials_run_now"] == 0


def test_gaps_are_filled(tmp_path: Path) -> None:
    whole = run_campaign(Stops(99), job(), rule=Rule(trials=30))
    with Journal.open(tmp_path / "j", IDENTITY) as journal:
        log = journal.campaign("ber")
        run_campaign(Stops(99), job(), rule=Rule(trials=30), log=log)
        journal._db.execute("DELETE FROM trial WHERE trial IN (0, 7, 8, 9, 20)")
        assert log.ranges() == [range(1, 7), range(10, 20), range(21, 30)]
        again = run_campaign(Stops(99), job(), rule=Rule(trials=30), log=log)
    assert again.execution["trials_run_now"] == 5
    assert again.figures() == whole.figures()


def test_more_trials_are_added_and_fewer_are_taken(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j", IDENTITY) as journal:
        log = journal.campaign("ber")
        for trials, fresh in ((10, 10), (25, 15), (5, 0)):
            found = run_campaign(Stops(99), job(), rule=Rule(trials=trials), log=log)
            plain = run_campaign(Stops(99), job(), rule=Rule(trials=trials))
            assert found.figures() == plain.figures()
            assert found.execution["trials_run_now"] == fresh


def test_campaigns_of_one_journal_are_apart(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j", IDENTITY) as journal:
        journal.campaign("a", {"where": ["weights"]}).append([ROW])
        assert journal.campaign("b").ranges() == []
        assert journal.campaign("a", {"where": ("weights",)}).row(3) == ROW
        assert journal.campaigns() == {"a": {"where": ["weights"]}, "b": {}}
        with pytest.raises(CampaignError, match=r'where was \["weights"\] and is now \["bias"\]'):
            journal.campaign("a", {"where": ["bias"]})


def test_a_trial_is_kept_once(tmp_path: Path) -> None:
    with Journal.open(tmp_path / "j", IDENTITY) as journal:
        log = journal.campaign("a")
        log.append([ROW, replace(ROW, trial=5, layer=None, bit=None)])
        log.append([replace(ROW, correct=0)])
        assert list(log.rows()) == [ROW, replace(ROW, trial=5, layer=None, bit=None)]
        with pytest.raises(CampaignError, match="no trial 4 of a"):
            log.row(4)


def test_an_earlier_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    Journal.open(tmp_path / "j", IDENTITY).close()
    with pytest.raises(CampaignError, match="--resume"):
        Journal.open(tmp_path / "j", IDENTITY)
    Journal.remove(tmp_path / "j")
    Journal.open(tmp_path / "j", IDENTITY).close()


@pytest.mark.parametrize("other", [{"bundle": "b" * 64}, {"seed": 1}, {"layers": ["x"]}])
def test_a_journal_of_something_else_is_refused(tmp_path: Path, other: dict[str, Any]) -> None:
    Journal.open(tmp_path / "j", IDENTITY).close()
    with pytest.raises(CampaignError, match=f"another validation: {next(iter(other))} was"):
        Journal.open(tmp_path / "j", {**IDENTITY, **other}, resume=True)
    Journal.open(tmp_path / "j", IDENTITY, resume=True).close()


@pytest.mark.parametrize(
    "content", [b"not a data base, and long enough to see it" * 9, b"\0" * 4096]
)
def test_what_is_no_journal(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(CampaignError, match="not a journal"):
        Journal.open(tmp_path / "j", IDENTITY, resume=True)
    with pytest.raises(CampaignError, match="not a journal"):
        Journal.read(tmp_path / "j")
    with pytest.raises(CampaignError, match="there is no journal"):
        Journal.read(tmp_path / "nothing")


def test_some_other_data_base(tmp_path: Path) -> None:
    db = sqlite3.connect(tmp_path / "j")
    db.execute("CREATE TABLE meta (key TEXT, value TEXT)")
    db.close()
    with pytest.raises(CampaignError, match="not a journal"):
        Journal.open(tmp_path / "j", IDENTITY, resume=True)


def test_a_version_of_the_future(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(j, "VERSION", 99)
        Journal.open(tmp_path / "j", IDENTITY).close()
    with pytest.raises(CampaignError, match="version 99"):
        Journal.open(tmp_path / "j", IDENTITY, resume=True)


def test_a_journal_from_before_rows_kept_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(j, "VERSION", 1)
        Journal.open(tmp_path / "j", IDENTITY).close()
    for opens in (lambda p: Journal.open(p, IDENTITY, resume=True), Journal.read):
        with pytest.raises(CampaignError, match=r"of version 1, .* \(.*begin anew with --force\)"):
            opens(tmp_path / "j")


def test_the_images_that_a_fault_changed_are_kept(tmp_path: Path) -> None:
    rows = [replace(ROW, trial=i, changed=bytes(range(i))) for i in range(5)]
    with Journal.open(tmp_path / "j", IDENTITY) as journal:
        log = journal.campaign("a")
        log.append(rows)
        assert list(log.rows()) == rows


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (b"\0\0\1", "trial 1 of the journal is of other images"),
        ("text", "trial 1 of the journal is of other images"),
        (b"\xff\xff", "do not agree on which images were right"),
    ],
)
def test_a_row_that_something_else_changed(tmp_path: Path, changed: bytes | str, says: str) -> None:
    with Journal.open(tmp_path / "j", IDENTITY) as journal:
        log = journal.campaign("ber")
        run_campaign(Stops(99), job(), rule=Rule(trials=3), log=log)
        assert log.row(1).changed != changed
        journal._db.execute("UPDATE trial SET changed = ? WHERE trial = 1", (changed,))
        with pytest.raises(CampaignError, match=says):
            run_campaign(Stops(99), job(), rule=Rule(trials=3), log=log)


def test_a_trial_that_changes_no_image_takes_no_room(tmp_path: Path) -> None:
    """SEU campaigns are made of them: a row costs a byte more, its type, than it did without."""
    sizes = {}
    for changed in (b"", b"\x80" * 32):
        path = tmp_path / f"j{len(changed)}"
        with Journal.open(path, IDENTITY) as journal:
            rows = [replace(ROW, trial=i, changed=changed) for i in range(4000)]
            journal.campaign("a").append(rows)
        sizes[len(changed)] = path.stat().st_size / 4000
    assert 28 < sizes[32] - sizes[0] < 40
    assert sizes[0] < 60


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CampaignError, match="cannot be opened"):
        Journal.open(tmp_path / "no" / "j", IDENTITY)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    whole = run_campaign(Stops(10**6), job(), rule=Rule(trials=200))
    with Journal.open(tmp_path / "j", IDENTITY) as journal:
        pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
        journal._db.execute(f"PRAGMA max_page_count = {pages + 2}")
        with pytest.raises(CampaignError, match=r"disk is full .*--resume") as caught:
            run_campaign(Stops(10**6), job(), rule=Rule(trials=200), log=journal.campaign("ber"))
        assert "\n" not in str(caught.value)
    with Journal.open(tmp_path / "j", IDENTITY, resume=True) as journal:
        log = journal.campaign("ber")
        (kept,) = log.ranges()
        assert 0 < len(kept) < 200
        result = run_campaign(Stops(10**6), job(), rule=Rule(trials=200), log=log)
        assert result.execution["trials_run_now"] == 200 - len(kept)
    assert result.figures() == whole.figures()


def test_a_trial_replays_bit_for_bit(tmp_path: Path) -> None:
    engine = PlainEngine(RUNNER, SAMPLE.images)
    with Journal.open(tmp_path / "j", IDENTITY, context={"path": "x"}) as journal:
        run_campaign(Inline(engine), job(), rule=Rule(trials=5), log=journal.campaign("ber"))
    with Journal.read(tmp_path / "j") as journal:
        assert journal.context == {"path": "x"}
        assert journal.identity == IDENTITY
        log = journal.campaign("ber")
        found = replay(log, engine, job(), 3)
        assert found.same
        assert replace(found.now, seconds=0) == replace(found.before, seconds=0)
        assert found.faults[0].startswith("fc1.bias[")
        other = PlainEngine(RUNNER, RUNNER.sample(16, seed=1).images)
        assert not replay(log, other, job(), 3).same
