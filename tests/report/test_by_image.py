"""Counts by image as a report keeps them: what is written is read, and what does not fit is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from resq_deploy.errors import ReportError
from resq_deploy.paired import Spread
from resq_deploy.report import read_report, write_report
from resq_deploy.report.by_image import ByImage
from tests.report import example

SAME = "0" * 64


@given(st.data(), st.sampled_from([1, 2, 255, 256, 70_000, 2**40]))
def test_counts_come_back(data: st.DataObject, trials: int) -> None:
    counts = np.array(data.draw(st.lists(st.integers(0, trials), min_size=1, max_size=40)))
    hits = data.draw(st.lists(st.integers(0, counts.size), max_size=min(trials, 30)))
    found = ByImage.of(SAME, counts, trials, Spread(0.25, 9), hits)
    again = ByImage.model_validate_json(found.model_dump_json())
    assert again.counts.tolist() == counts.tolist()
    assert again.mean == pytest.approx(counts.mean() / trials)
    assert again.shares.tolist() == (counts / trials).tolist()
    assert again.spread == Spread(0.25, 9)
    assert again.trial_shares.tolist() == [hit / counts.size for hit in hits]


def test_it_is_small() -> None:
    rng = np.random.default_rng(0)
    assert len(ByImage.of(SAME, rng.random(10_000) < 0.9).right) < 1_700
    assert len(ByImage.of(SAME, rng.integers(0, 151, 256), 150).right) < 350
    many = ByImage.of(SAME, np.zeros(10, int), 10**6, Spread(0.1, 5), [7] * 10**4)
    assert len(many.by_trial) < 5_500


def text(*numbers: int) -> str:
    return base64.b64encode(bytes(numbers)).decode()


@pytest.mark.parametrize(
    "change",
    [
        {"right": "no base64!"},
        {"right": text(1, 2)},  # an image is missing
        {"right": text(1, 2, 3, 4)},
        {"right": text(1, 2, 6)},  # more than there were trials
        {"right": text(1, 2, 3) + "\n"},
        {"trials": 1, "right": text(255)},  # bits of images that there are not
        {"trials": 300},
        {"trials": 2**40, "right": text(*[0] * 23, 128)},  # more than a signed number holds
        {"trials": 0},
        {"count": 0, "right": ""},
        {"count": 2**31, "right": ""},
        {"images": "x" * 64},
        {"variance": 0.1, "freedom": 0},
        {"variance": float("nan")},
        {"by_trial": "no base64!"},
        {"by_trial": text(1, 4)},  # more than there are images
        {"by_trial": text(1, 1, 1, 1, 1, 1)},  # of more trials than there were
        {"count": 300, "right": text(*[1] * 300), "by_trial": text(1, 1, 1)},
        {"colour": "red"},
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any]) -> None:
    good = {"images": SAME, "count": 3, "trials": 5, "right": text(1, 2, 3)}
    assert ByImage.model_validate(good).counts.tolist() == [1, 2, 3]
    with pytest.raises(ValidationError):
        ByImage.model_validate(good | change)


def test_a_report_keeps_them_wherever_it_lies(tmp_path: Path) -> None:
    report = example.report()
    assert report.by_image
    write_report(report, tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_report(tmp_path / "b").by_image == report.by_image


def test_a_report_of_an_earlier_version_has_none(tmp_path: Path) -> None:
    raw = json.loads(example.report().model_dump_json())
    del raw["by_image"]
    (tmp_path / "report.json").write_text(json.dumps(raw))
    assert read_report(tmp_path).by_image == {}


@pytest.mark.parametrize("name", ["accuracy", "accuracy@nothing"])
def test_counts_of_another_figure_are_refused(tmp_path: Path, name: str) -> None:
    raw = json.loads(example.report().model_dump_json())
    raw["by_image"][name] = ByImage.of(SAME, np.ones(10, bool)).model_dump()
    (tmp_path / "report.json").write_text(json.dumps(raw))
    with pytest.raises(ReportError, match=f"by_image of {name} is not of this figure") as error:
        read_report(tmp_path)
    assert "\n" not in str(error.value)
