"""resq-export: flags reach the API, and each refusal is one line, status 2 and nothing left."""

from __future__ import annotations

import inspect
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from resq_deploy import bundle
from resq_deploy.console import BAD_INPUT, OK, run
from resq_deploy.errors import BundleError
from resq_deploy.export import pipeline
from resq_deploy.export.cli import export, main, show
from resq_deploy.export.engine_options import EngineOptions
from resq_deploy.manifest import Adjustment
from resq_deploy.runtime.faulty import evaluate
from resq_deploy.runtime.runner import open_runner
from tests.helpers import Bomb, checkpoint, images, save_npz

FAST = ("--attack", "none", "--no-adjust", "--calib-samples", "32", "--eval-samples", "24")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli")
    data = save_npz(path / "data.npz")
    checkpoint(trained={"data": data}).save(path / "model.pt")
    return path / "model.pt"


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A model file alone in a folder."""
    copy = tmp_path / "model.pt"
    copy.write_bytes(trained.read_bytes())
    return copy


def test_one_argument_makes_a_bundle_and_a_table(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        main([str(model), *FAST])
    assert left.value.code == OK
    made = bundle.Bundle.open(model.with_suffix(".resq"))
    said = capsys.readouterr()
    for text in ("accuracy on 24 held-out images", "same top-1 as FP32", "SQNR of logits", " MB"):
        assert text in said.out
    assert "1 Sub, 1 Div: pixels are normalized in float" in said.out
    assert f"{made.manifest.metrics.int8_accuracy:.2%}" in said.out
    assert "checkpoint, resnet8, 3 classes" in said.err
    assert made.manifest.provenance.command == ("resq-export", str(model), *FAST)


def test_the_table_says_what_stage_three_is_worth_under_flips(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(export, [str(model), *FAST, "--quiet"]) == OK
    made = bundle.Bundle.open(model.with_suffix(".resq"))
    measured = {"plain": {"faulty": 0.951}, "adjusted": {"faulty": 0.976}, "bers": [1e-3, 1e-2]}
    for applied in (True, False):
        record = Adjustment(applied=applied, measured=measured)
        told = made.manifest.model_copy(update={"adjustment": record})
        show(bundle.Bundle(made.path, told))
        said = capsys.readouterr().out
        lines = [line for line in said.splitlines() if "worth" in line or "without" in line]
        assert len(lines) == 2 * applied
        if applied:
            assert "worth under flips, BER 0.001 to 0.01" in lines[0]
            assert "97.60%" in lines[0]
            assert "95.10%" in lines[1]


def test_json_is_one_object_and_quiet_is_quiet(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(export, [str(model), *FAST, "--json", "--quiet"]) == OK
    said = capsys.readouterr()
    few, untrained = said.err.splitlines()  # no progress; what figures are worth is still told
    assert few.startswith("warning: 24 held-out images say little of accuracy")
    assert untrained.startswith("warning: the network is right on 33.3%")
    told = json.loads(said.out)
    assert told["samples"] == 24
    assert told["int8_tensors"] == 11
    assert told["int8_bytes"] == model.with_suffix(".resq").joinpath(bundle.INT8).stat().st_size
    assert run(export, [str(model), *FAST, "--quiet", "--force"]) == OK
    said = capsys.readouterr()
    assert (said.out, said.err.splitlines()) == ("", [few, untrained])


def test_attacks_that_know_the_faults_travel_with_the_bundle(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--attack", "fgsm", "--attack-faulty", "1e-2", "--faulty-trials", "2"]
    assert run(export, [str(model), *FAST, *asked, "--attack-samples", "6"]) == OK
    assert "pgd@ber=1e-2 succeeds" in capsys.readouterr().out
    made = bundle.Bundle.open(model.with_suffix(".resq"))
    assert list(made.manifest.attacks) == ["fgsm", "pgd", "pgd@ber=1e-2"]
    with open_runner(made) as runner:
        found = evaluate(runner, made, "pgd@ber=1e-2")
    assert (found.trials, found.images) == (2, 6)
    assert found.unaware is not None
    rate = made.manifest.attacks["pgd@ber=1e-2"].transfer["int8"]
    assert rate == pytest.approx(1 - found.aware.mean / max(found.clean.mean, 1e-9))


def test_every_flag_reaches_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def export_model(model: Path, **options: Any) -> None:
        seen.update(options, model=model)
        raise BundleError("stop here")

    monkeypatch.setattr(pipeline, "export_model", export_model)
    line = (
        "m.pt -o o.resq --reference r.pt --arch resnet8 --arch-arg width=8 --arch-arg norm=group"
        " --input-shape 3x32x48 --mean 0.1,0.2,0.3 --std 1,2,3 --calib a.npz --calib-samples 7"
        " --eval b.npz --eval-samples 8 --batch 1:2:3 --target onnx --target tensorrt-rtx"
        " --sm 86,89 --rules onnxruntime --overflow-fix --high-precision fp16 --design-ber 1e-2 --no-adjust"
        " --redundancy 0.2 --effort 2 --opset 21 --trust-pickle"
        " --attack fgsm,apgd --eps 4/255 --attack-samples 9 --attack-faulty 1e-3,apgd@1e-2"
        " --faulty-trials 3 --seed 5 --force"
        " --workspace 1G --optimization-level 3 --timing-cache t.cache --version-compatible"
        " --hardware-compatible --refit"
    )
    assert run(export, line.split()) == BAD_INPUT
    reporter, command = seen.pop("reporter"), seen.pop("command")
    assert not reporter.quiet
    assert command[1:] == tuple(line.split())
    assert seen == {
        "model": Path("m.pt"),
        "output": Path("o.resq"),
        "reference": Path("r.pt"),
        "arch": "resnet8",
        "arch_args": {"width": 8, "norm": "group"},
        "input_shape": (3, 32, 48),
        "mean": (0.1, 0.2, 0.3),
        "std": (1.0, 2.0, 3.0),
        "calib": "a.npz",
        "calib_samples": 7,
        "eval": "b.npz",
        "eval_samples": 8,
        "batch": (1, 2, 3),
        "targets": ("onnx", "tensorrt-rtx"),
        "sm": ("86", "89"),
        "engine": EngineOptions(2**30, Path("t.cache"), True, True, True, 3),
        "rules": "onnxruntime",
        "overflow_fix": True,
        "high_precision": "fp16",
        "design_ber": 0.01,
        "redundancy": 0.2,
        "effort": 2.0,
        "adjust": False,
        "opset": 21,
        "trust_pickle": True,
        "attacks": ("fgsm", "apgd"),
        "eps": "4/255",
        "attack_samples": 9,
        "attack_faulty": ("1e-3", "apgd@1e-2"),
        "faulty_trials": 3,
        "seed": 5,
        "force": True,
    }


def test_the_defaults_of_the_command_are_those_of_the_api() -> None:
    given = {p.name: p.default for p in export.params}
    signature = inspect.signature(pipeline.export_model)
    defaults = {name: p.default for name, p in signature.parameters.items()}
    for name in (
        "calib_samples",
        "eval_samples",
        "attack_samples",
        "design_ber",
        "redundancy",
        "effort",
        "seed",
    ):
        assert given[name] == defaults[name], name
    assert given["attacks"] == ",".join(pipeline.ATTACKS)
    assert defaults["attacks"] is None
    assert given["eps"] == "8/255"
    assert defaults["eps"] == 8 / 255


Make = Callable[[Path], list[str]]


def missing(home: Path) -> list[str]:
    return [str(home / "none.pt")]


def truncated(home: Path) -> list[str]:
    data = (home / "model.pt").read_bytes()
    (home / "model.pt").write_bytes(data[: len(data) // 2])
    return [str(home / "model.pt")]


def text(home: Path) -> list[str]:
    (home / "model.pt").write_text("import os\n")
    return [str(home / "model.pt")]


def bomb(home: Path) -> list[str]:
    (home / "model.pt").write_bytes(pickle.dumps(Bomb(home / "ran")))
    return [str(home / "model.pt")]


def state_dict(*options: str) -> Make:
    def make(home: Path) -> list[str]:
        torch.save(checkpoint().state_dict, home / "model.pt")
        return [str(home / "model.pt"), *options]

    return make


def with_data(**arrays: Any) -> Make:
    def make(home: Path) -> list[str]:
        return [str(home / "model.pt"), "--calib", save_npz(home / "data.npz", **arrays)]

    return make


def options(*given: str) -> Make:
    return lambda home: [str(home / "model.pt"), *(g.format(home=home) for g in given)]


def existing(home: Path) -> list[str]:
    (home / "out").mkdir()
    return [str(home / "model.pt"), "-o", str(home / "out")]


def not_a_bundle(home: Path) -> list[str]:
    return [*existing(home), "--force"]


NAN = images(96)[0].astype(np.float32) * np.nan


@pytest.mark.parametrize(
    ("make", "message", "cure"),
    [
        (missing, "none.pt does not exist", "path"),
        (truncated, "truncated, or not a model file", "torch.save"),
        (text, "truncated, or not a model file", "torch.save"),
        (bomb, "would run its author's code", "--trust-pickle"),
        (state_dict("--input-shape", "1x16x16"), "holds weights only", "--arch"),
        (
            state_dict("--input-shape", "1x16x16", "--arch", "resnet18"),
            "missing conv1.weight|missing layer1.0.conv1.weight",
            "--arch",
        ),
        (state_dict("--arch", "resnet8"), "what images it takes", "--input-shape"),
        (options("--input-shape", "3x16x16"), "1 channels, not 3", "--input-shape"),
        (options("--calib", "imagenet"), "unknown data set", "known: digits"),
        (with_data(x_train=NAN), "NaN or infinite", "clean"),
        (with_data(x_train=images(96)[0][:, :, :4]), "1x4x16, not 1x16x16", "--input-shape"),
        (with_data(x_train=images(3)[0][:0], y_train=images(3)[1][:0]), "is empty", "at least one"),
        (existing, "exists already", "--force"),
        (not_a_bundle, "not a bundle", "-o"),
        (options("-o", "/proc/none/out.resq"), "cannot", "-o"),
        (options("--opset", "3"), "opset 3", "17 to 21"),
        (options("--attack", "magic"), "unknown attack", "fgsm"),
    ],
)
def test_refusals(
    make: Make,
    message: str,
    cure: str,
    model: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    arguments = make(model.parent)
    before = sorted(p.name for p in model.parent.iterdir())
    assert run(export, [*FAST, *arguments]) == BAD_INPUT
    said = capfd.readouterr().err
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert any(part in lines[0] for part in message.split("|")), lines[0]
    assert cure in lines[0]
    assert sorted(p.name for p in model.parent.iterdir()) == before


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--input-shape", "3x32"),
        ("--input-shape", "0x32x32"),
        ("--mean", "a,b"),
        ("--batch", "8:1:64"),
        ("--batch", "8"),
        ("--arch-arg", "width"),
        ("--calib-samples", "0"),
        ("--target", "onnxruntime"),
        ("--high-precision", "int4"),
    ],
)
def test_usage_errors(flag: str, value: str) -> None:
    done = CliRunner().invoke(export, ["m.pt", flag, value])
    assert done.exit_code == BAD_INPUT
    assert flag in done.output
    assert "Traceback" not in done.output
