"""What a validation leaves behind: every trial of it replays, from anywhere, and nothing of it goes by mistake."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resq_deploy.bundle import Bundle
from resq_deploy.errors import CampaignError, FaultError
from resq_deploy.report import read_report
from resq_deploy.report.evidence import replay_commands
from resq_deploy.runtime.contents import byte_of
from resq_deploy.runtime.journal import Journal
from resq_deploy.runtime.places import JOURNAL
from resq_deploy.runtime.replay import replay_trial
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import validate_bundle
from tests.bundles import write_bundle

FEW = Settings(ber=(1e-2,), faults=("seu",), trials=4, samples=8)
BOTH = replace(FEW, attacks=("noise", "square"), eps=1.0, joint=True)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("kept") / "net.resq", count=12)


@pytest.fixture(scope="module")
def joint(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joint") / "r"
    validate_bundle(bundle, BOTH, output=folder, workers=1)
    return folder


def test_every_campaign_of_a_joint_report_replays(joint: Path) -> None:
    with Journal.read(joint / JOURNAL) as book:
        names = list(book.campaigns())
    on = ("", " on noise,eps=255/255", " on square,eps=255/255", " on worst,eps=255/255")
    assert names == [f"{model}{images}" for images in on for model in ("seu", "ber:0.01")]
    for name in names:
        assert replay_trial(joint, 2, campaign=name).same
    assert replay_trial(joint, 2, campaign="ber=1e-2 on noise,eps=255/255").same


def test_the_worst_case_under_faults_is_no_better_than_any_attack(joint: Path) -> None:
    """An image stands under a fault where it stands against every attack with this very fault in memory."""
    figures = read_report(joint).figures
    for fault in ("seu", "ber=1e-2"):
        worst, *others = (
            figures[f"robust@{name},eps=255/255@{fault}"] for name in ("worst", "noise", "square")
        )
        assert worst.mean <= min(f.mean for f in others)
        critical = [figures[f"critical@{n},eps=255/255@{fault}"] for n in ("worst", "noise")]
        assert all(0 <= f.mean <= 1 for f in critical)
    with Journal.read(joint / JOURNAL) as book:
        for model in ("seu", "ber:0.01"):
            rows = [
                [r.correct for r in book.campaign(name, book.campaigns()[name]).rows()]
                for name in (f"{model} on {a},eps=255/255" for a in ("worst", "noise", "square"))
            ]
            assert all(w <= min(a, b) for w, a, b in zip(*rows, strict=True))


def test_a_report_replays_from_another_folder(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = bundle.eval_sample()
    monkeypatch.chdir(tmp_path)
    np.savez(
        "d.npz",
        x_test=sample.images,
        y_test=sample.labels,
        x_train=sample.images,
        y_train=sample.labels,
    )
    Path("list.jsonl").write_text(
        json.dumps({"tensor": _first(bundle), "element": 0, "bit": 7}) + "\n"
    )
    asked = replace(FEW, data="d.npz", fault_list="list.jsonl")
    validate_bundle(bundle, asked, output="r", workers=1)
    monkeypatch.chdir(tmp_path / "r")
    with Journal.read(JOURNAL) as book:
        names = list(book.campaigns())
    assert len(names) == 3
    for name in names:
        assert replay_trial(".", 0, campaign=name).same

    (tmp_path / "d.npz").rename(tmp_path / "moved.npz")
    assert replay_trial(".", 0, campaign="seu", data=str(tmp_path / "moved.npz")).same
    other = tmp_path / "other.npz"
    np.savez(
        other,
        x_test=1 - sample.images,
        y_test=sample.labels,
        x_train=sample.images,
        y_train=sample.labels,
    )
    with pytest.raises(CampaignError, match="not those of then"):
        replay_trial(".", 0, campaign="seu", data=str(other))


def _first(bundle: Bundle) -> str:
    from resq_deploy.memory import fault_space

    return next(m.name for m in fault_space(bundle.int8).memories if m.kind == "weights")


@pytest.mark.parametrize(
    "wrong",
    [{"layers": ("typo",)}, {"bits": (31,)}, {"trials": None, "margin": 1e-5}],
)
def test_a_mistake_with_force_leaves_the_earlier_report(
    bundle: Bundle, tmp_path: Path, wrong: dict[str, object]
) -> None:
    validate_bundle(bundle, FEW, output=tmp_path / "r", workers=1)
    before = {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()}
    with pytest.raises((CampaignError, FaultError)):
        validate_bundle(bundle, replace(FEW, **wrong), output=tmp_path / "r", force=True)  # type: ignore[arg-type]
    assert {p.name: p.read_bytes() for p in (tmp_path / "r").iterdir()} == before
    with pytest.raises(CampaignError, match="workers"):
        validate_bundle(bundle, FEW, output=tmp_path / "r", force=True, workers="two")
    assert replay_trial(tmp_path / "r", 0, campaign="seu").same


def test_an_interrupted_run_leaves_no_earlier_verdict(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    validate_bundle(bundle, FEW, output=tmp_path / "r", workers=1)

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("resq_deploy.runtime.validate.run_campaign", stop)
    with pytest.raises(KeyboardInterrupt):
        validate_bundle(bundle, FEW, output=tmp_path / "r", workers=1, force=True)
    assert {p.name for p in (tmp_path / "r").iterdir()} <= {
        JOURNAL,
        *(JOURNAL + s for s in ("-wal", "-shm")),
    }


def test_what_to_run_for_the_same_figures_asks_before_it_overwrites(joint: Path) -> None:
    report = read_report(joint)
    run = {**report.provenance, "command": ["resq-validate", "x", "--force", "--resume", "-o", "r"]}
    first, _ = replay_commands(report.model_copy(update={"provenance": run}))
    assert first == "resq-validate x -o r"


def test_only_attacks_that_know_the_faults_need_no_fault_model(tmp_path: Path) -> None:
    made = write_bundle(tmp_path / "net.resq", faulty=True)
    asked = Settings(ber=(), faults=(), joint=True)
    report = validate_bundle(made, asked, output=tmp_path / "r", workers=1)
    assert len(report.joint) == 1
    assert not report.campaigns


def test_the_byte_of_a_weight(bundle: Bundle) -> None:
    name = _first(bundle)
    assert byte_of(bundle, name, 0) >= 0
    with pytest.raises(FaultError, match="no tensor 'typo'"):
        byte_of(bundle, "typo", 0)
