"""The files of a report: JSON against its schema, CSV, JUnit, and what happens where they cannot be written or read."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from xml.etree import ElementTree

import jsonschema  # type: ignore[import-untyped]
import pytest

from resq_deploy.report import Report, ReportError, files, read_report, write_report
from tests.report import example

NAMES = {
    "report.json",
    "report.html",
    "junit.xml",
    "figures.csv",
    "campaigns.csv",
    "layers.csv",
    "bits.csv",
    "cells.csv",
    "attacks.csv",
    "joint.csv",
    "corruptions.csv",
    "requirements.csv",
}


def test_writes_every_face_and_reads_it_back(tmp_path: Path) -> None:
    report = example.report()
    assert write_report(report, tmp_path / "a" / "b") == tmp_path / "a" / "b" / "report.html"
    assert {p.name for p in (tmp_path / "a" / "b").iterdir()} == NAMES
    assert read_report(tmp_path / "a" / "b") == report
    assert read_report(tmp_path / "a" / "b" / "report.json") == report


def test_the_same_report_gives_the_same_bytes() -> None:
    report = example.report()
    again = Report.model_validate_json(report.model_dump_json())
    assert files.faces(report) == files.faces(again)


def test_json_follows_its_schema() -> None:
    raw = json.loads(files.faces(example.report())["report.json"])
    jsonschema.Draft202012Validator(Report.model_json_schema()).validate(raw)


@pytest.mark.parametrize("mean", [-0.1, 1.1, 1e308])
def test_a_share_outside_0_and_1_is_no_report(tmp_path: Path, mean: float) -> None:
    raw = json.loads(files.faces(example.report())["report.json"])
    raw["figures"]["accuracy"]["mean"] = mean
    (tmp_path / "report.json").write_text(json.dumps(raw))
    with pytest.raises(ReportError, match=r"figures\.accuracy\.mean"):
        read_report(tmp_path)


def test_rounding_is_no_reason_to_lose_a_report() -> None:
    figure = example.figure(0.5).model_copy(update={"mean": 1 + 2**-52, "high": 1 + 2**-52})
    raw = example.report((), accuracy=figure).model_dump_json()
    assert "100.0%" in files.faces(Report.model_validate_json(raw))["report.html"]


def test_tables_hold_every_row() -> None:
    report = example.report()
    faces = files.faces(report)
    rows = {n: list(csv.reader(io.StringIO(faces[n]))) for n in NAMES if n.endswith(".csv")}
    assert len(rows["figures.csv"]) == 1 + len(report.figures)
    assert len(rows["campaigns.csv"]) == 1 + len(report.campaigns)
    assert len(rows["layers.csv"]) == 1 + sum(len(c.layers) for c in report.campaigns)
    assert len(rows["cells.csv"]) == 1 + sum(len(c.cells) for c in report.campaigns)
    assert rows["requirements.csv"][1][-2:] == ["True", "True"]
    for table in rows.values():
        assert {len(row) for row in table} == {len(table[0])}


@pytest.mark.parametrize("settings", ["text", 7, [], None, {"seed": 3}])
def test_settings_of_any_json_type_do_not_stop_a_face(settings: object) -> None:
    report = example.report()
    changed = report.model_copy(update={"provenance": {**report.provenance, "settings": settings}})
    faces = files.faces(changed)
    assert ElementTree.fromstring(faces["junit.xml"]).tag == "testsuites"  # our own output


@pytest.mark.parametrize(
    ("demands", "failures"),
    [
        ((), 0),
        (("accuracy >= 0.9", "high(sdc1@seu) < 1%"), 0),
        (("accuracy >= 0.95", "accuracy >= 0.9", "low(accuracy) >= 0.92"), 2),
    ],
)
def test_junit_agrees_with_the_verdict(demands: tuple[str, ...], failures: int) -> None:
    report = example.report(demands)
    root = ElementTree.fromstring(files.junit(report))  # our own output
    suite = root.find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == (str(len(demands)), str(failures))
    assert len(root.findall(".//failure")) == failures
    assert [c.get("name") for c in root.iter("testcase")] == list(demands)
    assert report.met == (failures == 0)


def test_names_with_markup_and_control_characters_stay_text() -> None:
    subject = example.subject().model_copy(update={"name": "<script>\x00\x1b[31m & \"'"})
    report = example.report(subject=subject)
    faces = files.faces(report)
    assert "<script" not in faces["report.html"]
    assert "\x00" not in faces["report.html"]
    ElementTree.fromstring(faces["junit.xml"])  # our own output


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ReportError, match="choose another -o"):
        write_report(example.report(), tmp_path / "file" / "report")


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read"),
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "not a report"),
        (b"[]", "not a report"),
        (b'{"report_version": 2}', "not a report"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ReportError, match=says):
        read_report(tmp_path)
