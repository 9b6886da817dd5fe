"""Fault lists: replayed as written, and every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest

from resq_deploy.errors import FaultError
from resq_deploy.fault_lists import FaultList, read_fault_list, write_fault_list
from resq_deploy.fault_models import (
    trial_rng,
)
from resq_deploy.faults import Fault
from tests.test_fault_models import SPACE

LINE = '{"tensor": "a.w", "element": 3, "bit": 7}'


def test_a_list_is_replayed_as_written(tmp_path: Path) -> None:
    trials = [[Fault("a.w", 1, 2)], [Fault("b.w", 3, 4), Fault("b.s", 0, 31)]]
    write_fault_list(tmp_path / "list.jsonl", trials)
    model = read_fault_list(tmp_path / "list.jsonl")
    model.check(SPACE)
    assert model.length == 2
    assert [list(model.trial(SPACE, 9, i).flips.faults()) for i in range(2)] == [
        trials[0],
        sorted(trials[1]),
    ]
    assert (model.trial(SPACE, 0, 0).layer, model.trial(SPACE, 0, 0).bit) == ("a", 2)
    assert model.trial(SPACE, 0, 1).layer is None  # two events
    assert model.name != FaultList(trials[:1]).name
    with pytest.raises(FaultError, match="not drawn from"):
        model.sample(SPACE, trial_rng(0, 0))


def test_lines_without_a_trial_are_trials(tmp_path: Path) -> None:
    (tmp_path / "l").write_text(LINE + "\n\n" + LINE + "\n")
    assert read_fault_list(tmp_path / "l").length == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "is empty"),
        ("{", "line 1 is not JSON"),
        ("[" * 100_000, "line 1 is not JSON"),
        (LINE + "\n[1]", "line 2 is not a fault"),
        ('{"tensor": "a.w", "element": 1.5, "bit": 0}', "line 1 is not a fault"),
        ('{"tensor": "a.w", "element": true, "bit": 0}', "line 1 is not a fault"),
        ('{"tensor": "a.w", "element": -1, "bit": 0}', "line 1 is not a fault"),
        ('{"tensor": "a.w", "element": 1, "bit": 0, "layer": 1}', "line 1 is not a fault"),
        (LINE + "\n" + LINE[:-1] + ', "trial": 1}', "either all have a trial"),
        (LINE[:-1] + ', "trial": 1}\n' + LINE, "either all have a trial"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "l").write_text(text)
    with pytest.raises(FaultError, match=words):
        read_fault_list(tmp_path / "l")


def test_lists_that_are_no_text_files(tmp_path: Path) -> None:
    (tmp_path / "l").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FaultError, match="not text"):
        read_fault_list(tmp_path / "l")
    with pytest.raises(FaultError, match="No such file"):
        read_fault_list(tmp_path / "nothing")


@pytest.mark.parametrize("name", ["nothing", "a.w"])
def test_a_list_of_what_does_not_exist(name: str) -> None:
    with pytest.raises(FaultError, match=f"no tensor '{name}'|has no element"):
        FaultList([[Fault("a.w", 0, 0)], [Fault(name, 50, 0)]]).check(SPACE)
