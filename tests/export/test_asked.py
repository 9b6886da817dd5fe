"""What cannot be had is refused before anything is read; what an engine alone lacks costs no bundle."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resq_deploy.bundle import Bundle
from resq_deploy.console import BAD_INPUT, run
from resq_deploy.data import Dataset
from resq_deploy.errors import AttackError, BackendError, DataError, ModelError, ResqError
from resq_deploy.export import graph, on_device
from resq_deploy.export.cli import export
from resq_deploy.export.engine_options import EngineOptions
from resq_deploy.export.pipeline import export_model
from tests.helpers import SHAPE, checkpoint, dataset, images, save_npz

FAST: dict[str, Any] = {"attacks": (), "adjust": False, "calib_samples": 32, "eval_samples": 24}
RTX: dict[str, Any] = {"targets": ("tensorrt-rtx",)}


@pytest.mark.parametrize(
    ("options", "error", "message", "cure"),
    [
        ({"high_precision": "fp16", "opset": 17}, ModelError, "cannot hold float16", "--opset 19"),
        ({"opset": 22}, ModelError, "opset 22", "17 to 21"),
        ({"calib_samples": 8}, DataError, "8 calibration images", "--calib-samples, or --no-adj"),
        ({"adjust": False, "design_ber": 1e-2}, DataError, "--design-ber is for stage III", "out"),
        ({"adjust": False, "redundancy": 0.0}, DataError, "--redundancy is for stage III", "out"),
        ({"adjust": False, "effort": 2.0}, DataError, "--effort is for stage III", "leave out"),
        ({"faulty_trials": 3}, AttackError, "is for --attack-faulty", "--attack-faulty 1e-3"),
        ({"batch": (3, 4, 5)}, BackendError, "--batch is for engines", "--target"),
        ({**RTX, "engine": EngineOptions(2**63)}, BackendError, "a workspace of 9223372", "2G"),
        ({**RTX, "batch": (3, 2, 5)}, BackendError, "a batch of 3:2:5", "smallest"),
    ],
)
def test_refused_before_anything_is_read(
    options: dict[str, Any], error: type[ResqError], message: str, cure: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message) as caught:
        export_model(tmp_path / "missing.pt", **options)
    assert cure in caught.value.hint


def test_flags_that_are_at_odds_are_refused_by_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(tmp_path / "missing.pt")
    for flags, said in (
        ("--no-adjust --effort 3", "--effort is for stage III"),
        ("--target tensorrt-rtx --workspace 999999999999G", "a workspace of"),
        ("--batch 3:4:5", "--batch is for engines"),
        ("--no-adjust --effort 1", "missing.pt does not exist"),
    ):
        assert run(export, [model, *flags.split()]) == BAD_INPUT
        assert said in capsys.readouterr().err


def test_too_few_images_for_stage_three_are_seen_before_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "to_onnx", pytest.fail)
    checkpoint().save(tmp_path / "m.pt")
    with pytest.raises(DataError, match="12 calibration images") as caught:
        export_model(tmp_path / "m.pt", calib=dataset(12), eval=dataset(30, 1))
    assert "--no-adjust" in caught.value.hint


def test_a_bundle_whose_engine_cannot_be_built_is_there_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: Any) -> None:
        raise BackendError("TensorRT-RTX refuses node a", "see docs/gpu.md")

    monkeypatch.setattr(on_device, "add_requested", refused)
    checkpoint(trained={"data": save_npz(tmp_path / "data.npz")}).save(tmp_path / "m.pt")
    with pytest.raises(BackendError, match=r"m\.resq is finished, but .*refuses node a") as caught:
        export_model(tmp_path / "m.pt", **FAST, **RTX)
    assert f"then resq-export {tmp_path / 'm.resq'} --target tensorrt-rtx" in caught.value.hint
    made = Bundle.open(tmp_path / "m.resq")
    assert made.manifest.engines == {}
    assert not (made.path / "engines").exists()
    line = f"{tmp_path / 'm.pt'} --target tensorrt-rtx --no-adjust --attack none --force"
    assert (
        run(export, [*line.split(), "--calib-samples", "32", "--eval-samples", "24"]) == BAD_INPUT
    )
    assert "is finished, but for its engines" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.npz", "m.pt", "m.resq"]


def test_what_has_one_class_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "to_onnx", lambda *_, **__: pytest.fail("it was begun"))
    x, y = images(96, 0)
    data = Dataset.from_arrays("all", x, np.zeros_like(y), ("all",))
    network = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(SHAPE)), 1)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        script: Any = torch.jit.script
        torch.jit.save(script(network), tmp_path / "m.pt")
    with pytest.raises(DataError, match="one class only: all") as caught:
        export_model(tmp_path / "m.pt", calib=data, eval=data, input_shape=SHAPE, **FAST)
    assert "two" in caught.value.hint


def test_rules_that_no_engine_follows_are_told_before_what_is_missing(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "m.pt")
    with pytest.raises(ModelError, match="which no engine takes"):
        export_model(tmp_path / "m.pt", **FAST, rules="onnxruntime", targets=("tensorrt",))
