"""validate_bundle and resq-validate on a small bundle that runs, end to end."""

from __future__ import annotations

import json
import re
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resq_deploy import console
from resq_deploy.bundle import Bundle
from resq_deploy.errors import AttackError, CampaignError, FaultError, RequirementError
from resq_deploy.fault_models import parse
from resq_deploy.memory import fault_space
from resq_deploy.report import read_report
from resq_deploy.report.model import Report
from resq_deploy.runtime import evidence
from resq_deploy.runtime.cli import command
from resq_deploy.runtime.places import JOURNAL
from resq_deploy.runtime.replay import replay_trial
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import Validation, validate_bundle
from resq_deploy.signing import generate_key
from tests.bundles import write_bundle

FEW = Settings(ber=(1e-3,), faults=("seu",), trials=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "net.resq", count=24)


def _figures(report: Report) -> bytes:
    """Everything but time and way of execution."""
    kept = report.model_dump(mode="json")
    for campaign in kept["campaigns"]:
        for name in ("seconds", "images_per_second", "execution"):
            del campaign[name]
    found = [kept[name] for name in ("figures", "campaigns", "attacks", "by_image")]
    return json.dumps(found).encode()


def test_a_report_holds_every_figure_that_was_announced(bundle: Bundle, tmp_path: Path) -> None:
    report = validate_bundle(bundle, replace(FEW, joint=True), output=tmp_path / "r", workers=1)
    names = evidence.figure_names([parse(m) for m in FEW.models], ["noise,eps=255/255"], joint=True)
    assert tuple(report.figures) == names
    assert set(report.by_image) == {
        n for n in names if n.startswith(("accuracy", "robust")) and "corruption" not in n
    }
    assert all(each.count == 24 for each in report.by_image.values())
    assert len({each.images for each in report.by_image.values()}) == 1  # before any attack
    assert report.by_image["accuracy@ber=1e-3"].trials == 4
    assert report.accuracy.mean == 1.0  # labels are what the network said
    assert report.subject.weight_bits == 8 * report.subject.weights
    assert (tmp_path / "r" / "report.html").exists()
    assert Report.model_validate_json((tmp_path / "r" / "report.json").read_text()) == report


def test_equal_settings_give_equal_figures_in_any_folder(bundle: Bundle, tmp_path: Path) -> None:
    one = validate_bundle(bundle, FEW, output=tmp_path / "a", workers=1)
    two = validate_bundle(bundle.path, FEW, output=tmp_path / "b" / "c", workers=2)
    assert _figures(one) == _figures(two)


def test_resuming_changes_no_figure_and_runs_nothing_twice(bundle: Bundle, tmp_path: Path) -> None:
    whole = validate_bundle(bundle, FEW, output=tmp_path / "whole", workers=1)
    validate_bundle(bundle, replace(FEW, trials=2), output=tmp_path / "part", workers=1)
    resumed = validate_bundle(bundle, FEW, output=tmp_path / "part", workers=1, resume=True)
    assert _figures(resumed) == _figures(whole)
    assert [c.execution["trials_run_now"] for c in resumed.campaigns] == [2, 2]


def test_a_journal_of_another_seed_is_refused_before_anything_runs(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_bundle(bundle, FEW, output=tmp_path / "r", workers=1)
    monkeypatch.setattr(Validation, "golden", lambda _: pytest.fail("it ran"))
    with pytest.raises(CampaignError, match="seed"):
        validate_bundle(bundle, replace(FEW, seed=1), output=tmp_path / "r", workers=1, resume=True)


def test_a_trial_can_be_replayed(bundle: Bundle, tmp_path: Path) -> None:
    validate_bundle(bundle, FEW, output=tmp_path / "r", workers=1)
    found = replay_trial(tmp_path / "r", 3, campaign="ber=1e-3")
    assert found.same
    assert found.faults
    with pytest.raises(CampaignError, match="which campaign"):
        replay_trial(tmp_path / "r", 3)
    with pytest.raises(CampaignError):
        replay_trial(tmp_path / "r" / JOURNAL, 99, campaign="seu")


@pytest.mark.parametrize("settings", [{"colour": "red"}, {"options": 7}, {"where": 3}, 7])
def test_settings_of_another_version_are_not_replayed(
    bundle: Bundle, tmp_path: Path, settings: object
) -> None:
    validate_bundle(bundle, FEW, output=tmp_path / "r", workers=1)
    with closing(sqlite3.connect(tmp_path / "r" / JOURNAL)) as db, db:
        context = json.dumps({"bundle": str(bundle.path), "settings": settings})
        db.execute("UPDATE meta SET value = ? WHERE key = 'context'", (context,))
    with pytest.raises(CampaignError, match="not those of this version"):
        replay_trial(tmp_path / "r", 0, campaign="seu")


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"faults": ("rust",)}, FaultError),
        ({"layers": ("nothing*",)}, FaultError),
        ({"attacks": ("pgd",)}, AttackError),
        ({"margin": 1e-9, "trials": None}, CampaignError),
    ],
)
def test_bad_settings_leave_no_report(
    bundle: Bundle, tmp_path: Path, wrong: dict[str, object], error: type[Exception]
) -> None:
    with pytest.raises(error):
        validate_bundle(bundle, replace(FEW, **wrong), output=tmp_path / "r", workers=1)  # type: ignore[arg-type]
    assert not (tmp_path / "r" / "report.json").exists()


def test_an_unknown_figure_is_said_before_anything_is_made(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(RequirementError, match="accuracy@ber=1e-3"):
        validate_bundle(bundle, FEW, output=tmp_path / "r", require=["acuracy@ber=1e-3 > 0.5"])
    assert not (tmp_path / "r").exists()


def test_a_fault_list_reaches_all_of_weight_memory(bundle: Bundle, tmp_path: Path) -> None:
    bias = next(m for m in fault_space(bundle.int8).memories if m.kind == "bias")
    line = {"tensor": bias.name, "element": 0, "bit": 30}
    (tmp_path / "list.jsonl").write_text(json.dumps(line) + "\n")
    only = Settings(ber=(), faults=(), fault_list=str(tmp_path / "list.jsonl"), attacks=())
    report = validate_bundle(bundle, only, output=tmp_path / "r", workers=1)
    assert [(c.trials, c.flips, c.unreachable) for c in report.campaigns] == [(1, 1, 0)]
    assert replay_trial(tmp_path / "r", 0).same


def test_rates_are_written_as_people_do() -> None:
    assert evidence.fault_label("ber:0.0001") == "ber=1e-4"
    assert evidence.fault_label("ber:0.0025") == "ber=2.5e-3"
    assert evidence.fault_label("mbu:4") == "mbu:4"


def _run(bundle: Bundle, folder: Path, *more: str) -> int:
    few = ["--ber", "1e-3", "--trials", "3", "--workers", "1", "--quiet", "-o", str(folder)]
    return console.run(command, [str(bundle.path), *few, *more])


def test_the_command_says_whether_requirements_are_met(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(bundle, tmp_path / "a", "--require", "accuracy >= 0.9") == 0
    assert "report:" in capsys.readouterr().out
    assert _run(bundle, tmp_path / "b", "--require", "accuracy < 50%") == 1


def test_json_is_the_report(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(bundle, tmp_path / "a", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "a" / "report.json").read_text())


def test_an_earlier_report_is_kept_unless_asked_for(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _run(bundle, tmp_path / "a") == 0
    assert _run(bundle, tmp_path / "a") == 2
    assert "--force" in capsys.readouterr().err
    assert _run(bundle, tmp_path / "a", "--force") == 0


def test_a_folder_with_something_else_is_never_written_to(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("dear")
    assert _run(bundle, tmp_path, "--force") == 2
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_corruptions_are_figures_to_require(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--corruptions", "fog,contrast", "--severities", "1,5", "--corruption-samples", "6"]
    wanted = ["--require", "accuracy@corruption=fog,severity=5 >= 0"]
    assert _run(bundle, tmp_path / "a", *few, *wanted) == 0
    assert "severity of corruption" in capsys.readouterr().out
    report = read_report(tmp_path / "a")
    assert [(c.corruption, c.severity, c.accuracy.n) for c in report.corruptions] == [
        (name, severity, 6) for name in ("fog", "contrast") for severity in (1, 5)
    ]
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Common corruptions" in page
    rows = (tmp_path / "a" / "corruptions.csv").read_text().splitlines()
    assert len(rows) == 5
    assert _run(bundle, tmp_path / "b", *wanted) == 2
    assert "no figure" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ber", "2"], "between 0 and 1"),
        (["--faults", "seu:3"], "takes no argument"),
        (["--bits", "x"], "cannot be read"),
        (["--eps", "0"], "8/255"),
        (["--fault-list", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data", "mystery"], "digits"),
        (["--where", "disk"], "weights"),
        (["--workers", "none"], "workers"),
        (["--corruptions", "rain"], "gaussian_noise"),
        (["--corruptions", "fog", "--severities", "9"], "1 to 5"),
        (["--corruptions", "fog", "--corruption-samples", "0"], "at least 1"),
    ],
)
def test_bad_input_is_one_line(
    bundle: Bundle,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert _run(bundle, tmp_path / "r", *arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert said in lines[0]
    assert not (tmp_path / "r" / "report.json").exists()


def test_a_changed_bundle_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = write_bundle(tmp_path / "net.resq")
    content = bytearray(broken.int8.read_bytes())
    content[-1] ^= 1
    broken.int8.write_bytes(content)
    assert _run(broken, tmp_path / "r") == 2
    assert "model.int8.onnx" in capsys.readouterr().err


def test_data_of_ones_own(bundle: Bundle, tmp_path: Path) -> None:
    sample = bundle.eval_sample()
    np.savez(tmp_path / "own.npz", x=sample.images[:8], y=sample.labels[:8])
    own = replace(FEW, data=str(tmp_path / "own.npz"), attacks=())
    report = validate_bundle(bundle, own, workers=1)
    assert report.data["images"] == 8
    assert report.accuracy.n == 8


def test_an_unsigned_bundle_is_refused_where_a_key_is_given(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, public = generate_key(tmp_path / "release")
    assert _run(bundle, tmp_path / "r", "--key", str(public)) == 2
    assert "sign" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_report_says_when(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1893456000")
    assert evidence.provenance({}, (), bundle)["time"] == "2030-01-01T00:00:00Z"
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "soon")
    with pytest.raises(CampaignError, match="SOURCE_DATE_EPOCH"):
        evidence.finished()
    monkeypatch.delenv("SOURCE_DATE_EPOCH")
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", evidence.finished())
