"""Engine plans in a validation: which one, how faults get in, what a journal keeps to, runs that fail."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resq_deploy import console
from resq_deploy.bundle import Bundle
from resq_deploy.errors import BackendError, CampaignError, EngineLost, ExecutionError
from resq_deploy.fault_models import parse
from resq_deploy.report.model import Report
from resq_deploy.runtime import injection, resq, validate
from resq_deploy.runtime.cli import command
from resq_deploy.runtime.places import JOURNAL
from resq_deploy.runtime.replay import replay_trial
from resq_deploy.runtime.runner import BACKENDS, check_options, open_runner
from resq_deploy.runtime.settings import WAYS, Settings
from resq_deploy.runtime.trials import Job, PlainEngine, Row, run_trials
from resq_deploy.runtime.trtlib import refusal
from resq_deploy.runtime.validate import validate_bundle
from resq_deploy.runtime.workers import open_pool
from tests.runtime.fake_backend import NAME, OpenStandIn, StandIn
from tests.runtime.trt_bundles import IMAGES, library, runner, write_bundle

FEW = Settings(
    backend="tensorrt", ber=(), faults=("seu",), trials=6, attacks=(), options={"engine": "orin"}
)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS, "tensorrt", NAME)
    monkeypatch.setattr(validate, "OpenEngine", OpenStandIn)
    monkeypatch.setattr(StandIn, "stand_in", {})


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return write_bundle(tmp_path / "m.resq", library().plan(), names=("orin", "xavier"))


def wanted(**options: Any) -> Settings:
    return replace(FEW, options={**FEW.options, **options})


def test_the_plan_that_was_run_is_not_among_what_was_not(bundle: Bundle, tmp_path: Path) -> None:
    report = validate_bundle(bundle, FEW, output=tmp_path / "r")
    said = [line for line in report.not_covered if "engine" in line]
    assert said == ["The engine xavier (tensorrt, not mapped) was not run here."]
    assert report.runner["plan"] == "orin"
    assert report.runner["injection"] == "live"
    assert report.campaigns[0].execution["plan"] == "orin"
    other = validate_bundle(bundle, Settings(ber=(), trials=1, attacks=()), workers=1)
    assert sum("was not run here" in line for line in other.not_covered) == 2


def test_weights_that_no_fault_reaches_are_not_covered(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "m.resq", library().plan(), drop="conv2")
    report = validate_bundle(bundle, wanted(injection="plan"), output=tmp_path / "r")
    assert report.campaigns[0].unreachable > 0
    assert [line for line in report.not_covered if "orin" in line] == [
        "Out of reach of faults (plan): 55.17% of the weights of the engine orin."
    ]


def test_the_way_that_was_asked_for_is_the_one_of_every_trial(
    bundle: Bundle, tmp_path: Path
) -> None:
    report = validate_bundle(bundle, wanted(injection="plan"), output=tmp_path / "r")
    assert report.runner["injection"] == "plan"
    assert report.campaigns[0].execution["injection"] == "plan"
    assert report.provenance["settings"]["options"] == {"engine": "orin", "injection": "plan"}


def test_a_journal_goes_on_with_the_same_plan_and_way_only(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    validate_bundle(bundle, replace(FEW, trials=2), output=folder)
    with pytest.raises(CampaignError, match=r"injection was .live. and is now .plan."):
        validate_bundle(bundle, wanted(injection="plan"), output=folder, resume=True)
    named = validate_bundle(bundle, wanted(injection="live"), output=folder, resume=True)
    assert named.campaigns[0].execution["trials_run_now"] == 4  # `auto` had found it, too
    write_bundle(tmp_path / "n.resq", library().plan() + b"", names=("orin",))
    with pytest.raises(CampaignError, match="backend was"):
        validate_bundle(bundle, Settings(ber=(), trials=2, attacks=()), output=folder, resume=True)


def test_another_plan_of_the_same_graph_is_another_journal(tmp_path: Path) -> None:
    fake = library()
    one = write_bundle(tmp_path / "one.resq", fake.plan())
    fake.layouts = dict(reversed(fake.layouts.items()))
    two = write_bundle(tmp_path / "two.resq", fake.plan())
    assert one.manifest.files["model.int8.onnx"] == two.manifest.files["model.int8.onnx"]
    with open_runner(one, "tensorrt") as a:
        first = a.identity
    with open_runner(two, "tensorrt", injection="plan") as b:
        second = b.identity
    assert first["plan"] != second["plan"]
    assert (first["injection"], second["injection"]) == ("live", "plan")


def test_a_replay_runs_the_plan_and_the_way_of_the_journal(bundle: Bundle, tmp_path: Path) -> None:
    folder = tmp_path / "r"
    validate_bundle(bundle, wanted(injection="plan"), output=folder)
    assert replay_trial(folder, 3).same
    with closing(sqlite3.connect(folder / JOURNAL)) as db, db:
        known = json.loads(db.execute("SELECT value FROM meta WHERE key='identity'").fetchone()[0])
        known["plan"] = "0" * 64
        db.execute("UPDATE meta SET value = ? WHERE key = 'identity'", (json.dumps(known),))
    with pytest.raises(CampaignError, match="made with another plan"):
        replay_trial(folder, 3)


def test_host_code_is_allowed_by_who_replays_and_not_by_the_journal(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StandIn, "stand_in", {"version_compatible": True})
    folder = tmp_path / "r"
    with pytest.raises(BackendError, match="host code") as told:
        validate_bundle(bundle, FEW, output=folder)
    assert "--allow-host-code" in told.value.hint
    validate_bundle(bundle, wanted(allow_host_code=True), output=folder)
    with pytest.raises(BackendError, match="host code"):
        replay_trial(folder, 0)
    assert replay_trial(folder, 0, allow_host_code=True).same
    assert console.run(resq.group, ["replay", str(folder), "--trial", "0"]) == 2
    allowed = ["replay", str(folder), "--trial", "0", "--allow-host-code"]
    assert console.run(resq.group, allowed) == 0


def test_the_ways_by_name_are_those_there_are() -> None:
    assert set(WAYS) == {"auto", *injection.INJECTIONS}


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--backend", "tensorrt"], "several TensorRT plans: orin, xavier (name one: --engine"),
        (["--backend", "tensorrt", "--engine", "x"], "(one of: orin, xavier)"),
        (["--backend", "tensorrt-rtx"], "no TensorRT-RTX plan"),
        (["--engine", "orin"], "--engine is for engine plans; ort runs the graph itself"),
        (["--injection", "live"], "--injection is for engine plans"),
        (["--allow-host-code"], "--allow-host-code is for engine plans"),
        (["--injection", "laser"], "laser"),
    ],
)
def test_options_that_do_not_fit_are_one_line_before_anything_is_made(
    bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    says: str,
) -> None:
    given = [str(bundle.path), "-o", str(tmp_path / "r"), *options]
    assert console.run(command, given) == console.BAD_INPUT
    error = capsys.readouterr().err.splitlines()
    assert says in error[-1]
    assert len(error) == 1 or error[0].startswith("Usage")
    assert not (tmp_path / "r").exists()


def test_the_map_of_one_of_several_plans(
    bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(resq.group, ["plan", str(bundle.path)]) == 2
    error = capsys.readouterr().err
    assert "has several engines (name one with --engine: orin, xavier)" in error
    assert console.run(resq.group, ["plan", str(bundle.path), "--engine", "xavier"]) == 0
    assert "100.00% of the weights located" in capsys.readouterr().out


def test_the_command_hands_them_on(bundle: Bundle, tmp_path: Path) -> None:
    options = ["--backend", "tensorrt", "--engine", "xavier", "--injection", "refit", "--quiet"]
    few = ["--ber", "", "--trials", "2", "--attack", "", "-o", str(tmp_path / "r")]
    assert console.run(command, [str(bundle.path), *options, *few]) == 0
    report = Report.model_validate_json((tmp_path / "r" / "report.json").read_text())
    assert (report.runner["plan"], report.runner["injection"]) == ("xavier", "refit")


def test_other_options_of_a_backend(bundle: Bundle) -> None:
    check_options(bundle, "ort", {"threads": 2, "exact": True})
    with pytest.raises(BackendError, match="unknown backend"):
        check_options(bundle, "abacus", {})
    with pytest.raises(BackendError, match="no option 'threads'"):
        check_options(bundle, "tensorrt", {"threads": 2, "engine": "orin"})
    with open_runner(bundle, "ort", exact=True) as exact, open_runner(bundle) as usual:
        assert exact.identity != usual.identity


# runs that fail


def rows_of(engine: PlainEngine, images: int, count: int = 40) -> list[Row]:
    golden = engine.golden()
    job = Job(parse("seu"), engine.runner.space.select(layers=["head"]), 0, golden.argmax(1))
    assert job.images == images
    return [row for rows in run_trials(engine, golden, job, range(count)) for row in rows]


def test_a_run_that_fails_under_faults_is_an_outcome(tmp_path: Path) -> None:
    with runner(tmp_path, "live", library(fails=True)) as r:
        rows = rows_of(PlainEngine(r, IMAGES), len(IMAGES))
    failed = [row for row in rows if row.status == "error"]
    assert {row.bit for row in failed} == {7}
    assert {row.bit for row in rows if row.status == "ok"} == set(range(7))
    assert all((row.due, row.correct, row.logits_sha) == (len(IMAGES), 0, "") for row in failed)


def test_an_engine_that_is_lost_ends_after_the_row_that_did_it(tmp_path: Path) -> None:
    with runner(tmp_path, "live", library(fails=True, sticky=True)) as r:
        engine = PlainEngine(r, IMAGES)
        golden = engine.golden()
        job = Job(parse("seu"), r.space.select(layers=["head"], bits=[7]), 0, golden.argmax(1))
        done = run_trials(engine, golden, job, range(3))
        assert [row.status for row in next(done)] == ["error"]
        with pytest.raises(EngineLost, match="trial 0 failed"):
            next(done)


def test_a_failure_that_is_the_machines_ends_the_campaign(tmp_path: Path) -> None:
    short = library(fails=True, why="Error Code 2: OutOfMemory (no further information)")
    with (
        runner(tmp_path, "live", short) as r,
        pytest.raises(BackendError, match="out of GPU memory") as told,
    ):
        rows_of(PlainEngine(r, IMAGES), len(IMAGES))
    assert not isinstance(told.value, ExecutionError)


@pytest.mark.parametrize(
    ("line", "outcome"),
    [
        ("Something new", True),
        ("plan.header.size == blobSize failed", True),
        ("header.magicTag == kEXPECTED_MAGIC_TAG failed", True),
        ("Error Code 2: OutOfMemory", False),
        ("CUDA initialization failure with error: 35", False),
        ("OLD_CUDA_DRIVER", False),
    ],
)
def test_what_faults_can_bring_about_and_what_they_cannot(line: str, outcome: bool) -> None:
    error = refusal("tensorrt", "10.9.0", "load the plan", [line])
    assert isinstance(error, ExecutionError) == outcome


@pytest.mark.parametrize("sticky", [False, True])
def test_workers_whose_engine_is_lost_are_replaced(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, sticky: bool
) -> None:
    """Each failure costs a worker, and no figure: the rows are those of an engine that recovers."""
    monkeypatch.setattr(StandIn, "stand_in", {"fails": True, "sticky": sticky})
    factory = OpenStandIn(str(bundle.path), "tensorrt", IMAGES, {"engine": "orin"})
    pool = open_pool(factory, 1)
    with open_runner(bundle, "tensorrt", engine="orin") as r:
        space = r.space.select(layers=["head"], bits=[6, 7])
        job = Job(parse("seu"), space, 0, pool.golden().argmax(1))
    rows = sorted(
        (r for some in pool.run(job, iter(range(16))) for r in some), key=lambda r: r.trial
    )
    info = pool.info
    pool.close()
    assert [row.trial for row in rows] == list(range(16))
    assert [row.status for row in rows] == ["error" if row.bit == 7 else "ok" for row in rows]
    failures = sum(row.status == "error" for row in rows)
    assert failures > 3
    # the worker that ran the last of them may not be missed any more
    assert info["restarts"] in ({failures - 1, failures} if sticky else {0})


def test_golden_runs_that_fail_are_no_outcome(bundle: Bundle, tmp_path: Path) -> None:
    StandIn.stand_in = {"refuses": "execute_async_v3"}
    with pytest.raises(BackendError, match="could not run the plan"):
        validate_bundle(bundle, FEW, output=tmp_path / "r")
