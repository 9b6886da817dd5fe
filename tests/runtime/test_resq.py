"""The `resq` command: every subcommand as a user calls it, its tables, its JSON and its refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest

from resq_deploy import console
from resq_deploy.bundle import Bundle
from resq_deploy.report import write_report
from resq_deploy.runtime import contents
from resq_deploy.runtime.plan import PlanMap
from resq_deploy.runtime.resq import group
from resq_deploy.runtime.schemas import schema_of
from tests.bundles import write_bundle
from tests.report import example


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundles") / "net.resq").path


class Ran:
    """Status and output of one call."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def resq(capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: str | Path) -> Ran:
        status = console.run(group, [str(a) for a in args], prog_name="resq")
        said = capsys.readouterr()
        return Ran(status, said.out, said.err)

    return call


def commands() -> list[list[str]]:
    plan = group.commands["plan"]
    return [[], *([name] for name in group.commands), *(["plan", n] for n in plan.commands)]  # type: ignore[attr-defined]


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_help_teaches_by_example_in_80_columns(resq: Any, path: list[str]) -> None:
    ran = resq(*path, "--help")
    assert ran.status == 0
    assert "Example" in ran.out
    assert "..." not in ran.out.partition("Commands:")[2]
    assert max(map(len, ran.out.splitlines())) <= 80


def test_inspect(resq: Any, bundle: Path) -> None:
    ran = resq("inspect", bundle)
    assert ran.status == 0
    assert "resnet: test:resnet, input 3x8x8" in ran.out
    assert "codes: int8-symmetric-qdq\n" in ran.out
    assert "stage III: 1 steps for a bit error rate of 1e-3" in ran.out
    assert "sign flip" in ran.out
    assert "in floating point: softmax (Softmax), for the test" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 80


def test_inspect_scales_and_json(resq: Any, bundle: Path) -> None:
    assert "method" in resq("inspect", bundle, "--scales").out
    found = json.loads(resq("inspect", bundle, "--json").out)
    assert found["layers"]
    assert found["codes"] == {
        "scheme": "int8-symmetric-qdq",
        "rules": None,
        "saturates": None,
    }
    assert found["report"] is None
    guesses = [layer["sign_flip"] for layer in found["layers"]]
    assert guesses == sorted(guesses, reverse=True)


def test_inspect_orders_by_what_was_measured(resq: Any, tmp_path: Path) -> None:
    opened = write_bundle(tmp_path / "net.resq")
    layers = contents.layers(opened)
    report = example.report()
    sha = opened.manifest.files["model.int8.onnx"].sha256
    last = layers[-1].layer
    rows = tuple(
        v.model_copy(update={"name": last if i == 0 else f"other{i}"})
        for i, v in enumerate(report.campaigns[0].layers)
    )
    changed = report.model_copy(
        update={
            "subject": report.subject.model_copy(update={"int8_sha256": sha}),
            "campaigns": (report.campaigns[0].model_copy(update={"layers": rows}),),
        }
    )
    write_report(changed, tmp_path / "net.report")
    ran = resq("inspect", tmp_path / "net.resq")
    assert "SDC-1" in ran.out
    table = ran.out.partition("SDC-1\n")[2]
    assert table.split()[0] == last
    write_report(report, tmp_path / "net.report")  # of another artifact: not used
    assert "SDC-1" not in resq("inspect", tmp_path / "net.resq").out
    (tmp_path / "net.report" / "report.json").write_text("{")
    assert resq("inspect", tmp_path / "net.resq").status == 0


def test_sign_flip_is_larger_where_weights_are_smaller() -> None:
    import numpy as np

    codes = np.full((2, 4), 64, np.int8)
    assert contents.sign_flip(codes, 0) == pytest.approx(1.0)
    assert contents.sign_flip(codes // 2, 0) == pytest.approx(2.0)
    assert contents.sign_flip(codes.T.copy(), 1) == pytest.approx(1.0)
    assert contents.sign_flip(np.zeros((2, 4), np.int8), None) == 128


def test_plan_show_locate_and_offset(resq: Any, bundle: Path, tmp_path: Path) -> None:
    shown = resq("plan", "show", bundle)
    assert shown.status == 0
    assert "host: " in shown.out
    assert "100.00% of the weights located" in shown.out
    assert resq("plan", bundle).out == shown.out
    assert resq("plan", "--engine", "host", bundle).out == shown.out
    found = json.loads(resq("plan", bundle, "--json").out)
    name, tensor = next(iter(found["tensors"].items()))
    located = resq(
        "plan",
        "locate",
        bundle / "engines/host.plan",
        bundle / "model.int8.onnx",
        "-o",
        tmp_path / "m.json",
    )
    assert located.status == 0
    assert PlanMap.load(tmp_path / "m.json").tensors[name].offset == tensor["offset"]
    offset = resq("plan", "offset", bundle, name, "0")
    assert int(offset.out) == tensor["offset"]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("plan", "show", "{bundle}", "--engine", "x"), "one of: host"),
        (("plan", "nowhere"), "is not a bundle"),
        (("plan", "{bundle}", "--engine", "x"), "one of: host"),
        (("plan", "offset", "{bundle}", "w", "9"), "no tensor 'w'"),
        (("plan", "locate", "nowhere.plan", "{bundle}/model.int8.onnx"), "cannot read the plan"),
        (("plan", "locate", "{bundle}/engines/host.plan", "{bundle}/eval.npz"), "not an ONNX file"),
        (("inspect", "nowhere"), "is not a bundle"),
        (("report", "nowhere"), "cannot be read"),
        (("sign", "{bundle}", "--key", "nowhere"), "cannot read the key"),
        (("verify", "{bundle}", "--key", "nowhere"), "cannot read the key"),
        (("schema", "nothing"), "manifest"),
        (("inspct", "x"), "No such command"),
    ],
)
def test_refusals_are_one_line(resq: Any, bundle: Path, args: tuple[str, ...], says: str) -> None:
    ran = resq(*(a.format(bundle=bundle) for a in args))
    assert says in ran.out + ran.err
    assert "Traceback" not in ran.err
    assert ran.status == 2


def test_keygen_sign_and_verify(resq: Any, tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "net.resq").path
    assert "signature: none" in resq("verify", bundle).out
    made = resq("keygen", tmp_path / "release")
    assert made.status == 0
    assert resq("keygen", tmp_path / "release").status == 2
    assert resq("sign", bundle, "--key", tmp_path / "release").status == 0
    assert "signature: there, not checked" in resq("verify", bundle).out
    good = resq("verify", bundle, "--key", tmp_path / "release.pub")
    assert good.status == 0
    assert "signature: good" in good.out
    assert made.out.split()[-1] in good.out
    found = json.loads(resq("verify", bundle, "--key", tmp_path / "release.pub", "--json").out)
    assert (found["signature"], found["engines"], found["attacks"]) == (
        "good",
        {"host": 1.0},
        ["noise"],
    )
    (bundle / "stray.txt").write_text("x")
    assert "never read: stray.txt" in resq("verify", bundle).out
    with (bundle / "engines" / "host.plan").open("ab") as file:
        file.write(b"\0")
    bad = resq("verify", bundle, "--key", tmp_path / "release.pub")
    assert bad.status == 2
    assert "host.plan is not the file that the manifest names" in bad.err


def test_a_map_of_another_plan_is_refused(resq: Any, tmp_path: Path) -> None:
    opened = write_bundle(tmp_path / "net.resq")
    path = opened.path / "engines" / "host.weights.json"
    raw = json.loads(path.read_text())
    raw["sha256"] = "1" * 64
    path.write_text(json.dumps(raw))
    manifest = json.loads((opened.path / "manifest.json").read_text())
    from resq_deploy.bundle import sha256_of

    manifest["files"]["engines/host.weights.json"] = {
        "sha256": sha256_of(path),
        "size": path.stat().st_size,
    }
    (opened.path / "manifest.json").write_text(json.dumps(manifest))
    Bundle.open(opened.path)
    ran = resq("verify", opened.path)
    assert ran.status == 2
    assert "weight map is of another plan" in ran.err


@pytest.mark.parametrize(("demand", "status"), [("accuracy >= 0.9", 0), ("accuracy >= 0.99", 1)])
def test_report_renders_again(resq: Any, tmp_path: Path, demand: str, status: int) -> None:
    page = write_report(example.report((demand,)), tmp_path / "r")
    before = page.read_bytes()
    page.unlink()
    ran = resq("report", tmp_path / "r")
    assert ran.status == status
    assert page.read_bytes() == before
    moved = resq("report", tmp_path / "r" / "report.json", "-o", tmp_path / "other", "--json")
    assert json.loads(moved.out) == {
        "met": status == 0,
        "page": str(tmp_path / "other" / "report.html"),
    }


def report_beside(opened: Bundle, lift: float) -> None:
    """A synthetic report of this artifact, with `lift` added to the accuracy at the highest rate."""
    report = example.report()
    sha = opened.manifest.files["model.int8.onnx"].sha256
    figures = dict(report.figures)
    name = "accuracy@ber=1e-2"
    figures[name] = example.figure(figures[name].mean + lift, 25_600)
    subject = report.subject.model_copy(update={"int8_sha256": sha})
    changed = report.model_copy(update={"subject": subject, "figures": figures})
    write_report(changed, opened.path.with_suffix(".report"))


def test_compare(resq: Any, tmp_path: Path) -> None:
    paths = []
    for index in range(5):
        opened = write_bundle(tmp_path / f"a-rather-long-name-{index}.resq")
        report_beside(opened, index / 20)
        paths.append(opened.path)
    ran = resq("compare", *paths)
    assert ran.status == 0
    assert max(map(len, ran.out.splitlines())) <= 80
    assert "BER 1e-2                   +5.0 points" in ran.out
    assert "both    pgd 8/255, known BER 1e-2" in ran.out
    assert "pgd 8/255, known BER 1e-2" in " ".join(ran.out.split())
    said = "paired on 1,000 images (clean); not paired: faults, attacks, both (no counts by image)"
    assert said in " ".join(ran.out.split())
    found = json.loads(resq("compare", *paths, "--json").out)
    assert [b["name"] for b in found["bundles"]] == [p.stem for p in paths]
    assert len(found["steps"]) == 4
    assert [found["steps"][0][k]["paired_on"] for k in ("clean", "fault")] == [1000, None]
    assert found["steps"][0]["fault"]["unpaired"] == "no counts by image"
    lone = write_bundle(tmp_path / "lone.resq").path
    assert resq("compare", paths[0], lone).status == 2
    assert resq("compare", paths[0]).status == 2


def test_compare_reports_that_lie_elsewhere(resq: Any, tmp_path: Path) -> None:
    paths, reports = [], []
    for index, name in enumerate(("a", "b")):
        opened = write_bundle(tmp_path / f"{name}.resq", count=12 + index)
        report_beside(opened, index / 20)
        away = tmp_path / "evidence" / name
        away.parent.mkdir(exist_ok=True)
        opened.path.with_suffix(".report").rename(away)
        paths.append(opened.path)
        reports += ["--report", away]
    alone = resq("compare", *paths)
    assert alone.status == 2
    assert "a.report" in alone.err
    assert "--report" in alone.err
    assert resq("compare", *paths, *reports).status == 0
    assert resq("compare", *paths, *reports[:2]).status == 2
    assert resq("compare", *paths, "--report", tmp_path / "evidence").status == 2


def test_compare_replaces_nothing_unasked(resq: Any, tmp_path: Path) -> None:
    paths = []
    for name in ("a", "b"):
        opened = write_bundle(tmp_path / f"{name}.resq")
        report_beside(opened, 0.0)
        paths.append(opened.path)
    page = tmp_path / "model.pt"
    page.write_text("weights")
    refused = resq("compare", *paths, "-o", page)
    assert (refused.status, page.read_text()) == (2, "weights")
    assert "--force" in refused.err
    assert resq("compare", *paths, "-o", page, "--force").status == 0
    assert page.read_text().startswith("<!doctype html>")
    assert resq("compare", *paths, "-o", paths[0], "--force").status == 2


def test_replay(resq: Any, tmp_path: Path) -> None:
    from resq_deploy.runtime.settings import Settings
    from resq_deploy.runtime.validate import validate_bundle

    opened = write_bundle(tmp_path / "net.resq")
    settings = Settings(ber=(), faults=("seu",), trials=3, samples=4, attacks=())
    validate_bundle(opened, settings, output=tmp_path / "r", workers="1")
    ran = resq("replay", tmp_path / "r", "--trial", "2")
    assert ran.status == 0
    assert "the same bits and bit-identical logits" in ran.out
    assert " bit " in ran.out
    found = json.loads(resq("replay", tmp_path / "r", "--trial", "1", "--json").out)
    assert found["same"]
    assert found["before"]["changed"] == found["now"]["changed"]
    assert all(0 <= image < 4 for image in found["now"]["changed"])
    gone = resq("replay", tmp_path / "r", "--trial", "3", "--campaign", "seu")
    assert gone.status == 2
    assert "no trial 3" in gone.err
    assert "seu" in resq("replay", tmp_path / "r", "--trial", "0", "--campaign", "sue").err


@pytest.mark.parametrize("which", ["manifest", "report", "weights"])
def test_schemas_are_schemas_and_fit_our_files(resq: Any, bundle: Path, which: str) -> None:
    schema = json.loads(resq("schema", which).out)
    assert schema == schema_of(which)
    jsonschema.Draft202012Validator.check_schema(schema)
    ours = {
        "manifest": (bundle / "manifest.json").read_text(),
        "report": example.report().model_dump_json(),
        "weights": (bundle / "engines" / "host.weights.json").read_text(),
    }[which]
    jsonschema.Draft202012Validator(schema).validate(json.loads(ours))


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_complete(shell: str) -> None:
    code = "from resq_deploy.runtime.resq import main; main()"
    words = {"COMP_WORDS": "resq ins", "COMP_CWORD": "ins" if shell == "fish" else "1"}
    asked = {"_RESQ_COMPLETE": f"{shell}_complete", **words}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "inspect" in done.stdout
