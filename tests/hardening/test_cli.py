"""resq-harden as a person meets it: one line for each refusal, exit statuses, several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from resq_deploy.checkpoint import Checkpoint
from resq_deploy.console import BAD_INPUT, OK, run
from resq_deploy.hardening import checks
from resq_deploy.hardening.cli import harden
from tests.hardening.test_harden import blobs

QUICK = ["--epochs", "1", "--epochs-1", "0.5", "--epochs-2", "0.5", "--batch", "16"]
TINY = ["--arch-arg", "width=4", "--device", "cpu", "--set", "holdout=0.1", *QUICK]


@pytest.fixture
def data(tmp_path: Path) -> str:
    x, y = blobs().batch(np.arange(96))
    np.savez(tmp_path / "d.npz", x=x, y=y)
    return str(tmp_path / "d.npz")


def call(*args: str) -> int:
    return run(harden, list(args), prog_name="resq-harden")


def test_it_trains_and_says_what_it_made(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "m.pt"
    assert call("resnet8", "--data", data, "-o", str(out), "--json", *TINY) == OK
    said = capfd.readouterr()
    summary = json.loads(said.out)
    assert summary["output"] == str(out)
    assert {"clean", "robust", "faulty"} <= summary.keys()
    assert "after stage II: clean" in said.err
    assert Checkpoint.load(out).arch_args == {"width": 4}


def test_quiet_says_nothing(tmp_path: Path, data: str, capfd: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "m.pt")
    args = ["resnet8", "--data", data, "-o", out, "--quiet"]
    assert call(*args, *TINY) == OK
    assert capfd.readouterr() == ("", "")
    assert call(*args, "--stages", "1", "--force", *TINY) == OK
    said = capfd.readouterr()
    assert said == ("", "warning: settings of stage II are not used: stages 1\n")


def bad_labels(folder: Path) -> list[str]:
    x, y = blobs().batch(np.arange(96))
    np.savez(folder / "bad.npz", x=x, y=y, classes=["a", "b"])
    return ["resnet8", "--data", str(folder / "bad.npz")]


def one_class(folder: Path) -> list[str]:
    x, _ = blobs().batch(np.arange(96))
    np.savez(folder / "one.npz", x=x, y=np.zeros(96, np.int64))
    return ["resnet8", "--data", str(folder / "one.npz")]


def taken(folder: Path) -> list[str]:
    (folder / "m.pt").write_bytes(b"mine")
    return ["resnet8", "--data", "digits"]


def under_a_file(folder: Path) -> list[str]:
    (folder / "file").write_bytes(b"")
    return ["resnet8", "--data", "digits", "-o", str(folder / "file" / "m.pt")]


def other_arch(folder: Path) -> list[str]:
    x, y = blobs().batch(np.arange(96))
    np.savez(folder / "d.npz", x=x, y=y)
    args = ["--data", str(folder / "d.npz"), "-o", str(folder / "o.pt"), "--quiet", *TINY]
    assert call("resnet8", *args, "--stages", "none") == OK
    return ["resnet18", "--data", "digits", "--init", str(folder / "o.pt")]


def two() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(1024, 2))


def flat() -> nn.Module:
    return nn.Linear(7, 10)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (bad_labels, "labels in 0..2, expected 0..1 (renumber the classes)"),
        (one_class, "examples of one class only (at least two are needed)"),
        (taken, "exists (choose another name, or give --force)"),
        (under_a_file, "file is not a directory (choose another place)"),
        (other_arch, "is a checkpoint of resnet8, not of resnet18"),
        (lambda _: ["resnet88", "--data", "digits"], "unknown network 'resnet88' (close names: "),
        (lambda _: ["resnet8", "--data", "digit"], "did you mean digits?"),
        (lambda _: ["resnet8", "--data", "digits", "--set", "speed=9"], "no setting 'speed'"),
        (lambda _: ["resnet8", "--data", "digits", "--arch-arg", "width"], "'width' is not K=V"),
        (lambda _: ["resnet8", "--data", "digits", "--device", "cuda:77"], "CUDA"),
        (
            lambda _: ["resnet8", "--data", "digits", "--device", "banana"],
            "unknown device 'banana' (",
        ),
        (lambda _: ["resnet8", "--data", "digits", "--device", "mps"], "does not run on mps ("),
        (lambda _: ["resnet8", "--data", "digits", "--device", "meta"], "does not run on meta ("),
        (lambda _: ["resnet8", "--data", "digits", "--input-shape", "3x8x8"], "1x32x32, not 3x8x8"),
        (
            lambda _: ["resnet8", "--data", "digits", "--arch-arg", "num_classes=9"],
            "num_classes=9, wh",
        ),
        (lambda _: [f"{__name__}:two", "--data", "digits"], "makes (2, 2) of two images of 10 cl"),
        (lambda _: [f"{__name__}:flat", "--data", "digits"], "not run on images of 1x32x32: mat1"),
    ],
)
def test_refusals_are_one_line(
    tmp_path: Path,
    given: Callable[[Path], list[str]],
    message: str,
    capfd: pytest.CaptureFixture[str],
) -> None:
    args = given(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    output = [] if "-o" in args else ["-o", str(tmp_path / "m.pt")]
    capfd.readouterr()
    assert call(*args, *output, "--quiet") == BAD_INPUT
    said = capfd.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_read_only_place_is_refused_before_training(
    tmp_path: Path, data: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checks, "TemporaryFile", refuse)
    args = ["resnet8", "--data", data, "-o", str(tmp_path / "m.pt"), *TINY]
    assert call(*args) == BAD_INPUT
    said = capfd.readouterr().err
    assert "m.pt: Read-only file system (" in said
    assert said.count("\n") == 1


def test_the_folder_of_the_output_is_made(tmp_path: Path, data: str) -> None:
    out = tmp_path / "a" / "b" / "m.pt"
    args = ["resnet8", "--data", data, "-o", str(out), "--stages", "none", "--quiet", *TINY]
    assert call(*args) == OK
    assert Checkpoint.load(out).input_shape == (1, 16, 16)


def test_an_image_folder_takes_the_shape_it_is_given(tmp_path: Path) -> None:
    x, y = blobs(48).batch(np.arange(48))
    for index, (pixels, label) in enumerate(zip(x, y, strict=True)):
        folder = tmp_path / "photos" / ("train" if index < 30 else "test") / f"c{label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.uint8(pixels[0] * 255)).save(folder / f"{index}.png")
    out = tmp_path / "m.pt"
    given = ["--data", f"imagefolder:{tmp_path / 'photos'}", "--input-shape", "3x12x8"]
    args = ["resnet8", *given, "-o", str(out), "--stages", "none", "--quiet", *TINY]
    assert call(*args) == OK
    made = Checkpoint.load(out)
    assert (made.input_shape, made.classes) == ((3, 12, 8), ("c0", "c1", "c2"))
    assert made.trained["input_shape"] == [3, 12, 8]


@pytest.mark.parametrize("text", ["3x32", "3x32x0", "axbxc"])
def test_a_shape_that_is_none_is_bad_usage(text: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert call("resnet8", "--data", "d", "-o", "m.pt", "--input-shape", text) == BAD_INPUT
    assert repr(text) in capfd.readouterr().err


def test_a_loss_that_explodes_is_one_line(
    tmp_path: Path, data: str, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "m.pt")
    blow = ["--set", "attack.phase.lr=1e30", "--set", "attack.phase.min_steps=30"]
    assert call("resnet8", "--data", data, "-o", out, "--quiet", *TINY, *blow) == BAD_INPUT
    said = capfd.readouterr().err
    assert "not finite" in said
    assert "lower learning rate" in said
    assert said.count("\n") == 1
    assert Checkpoint.load(out).trained["phases"] == ["plain"]


def test_two_processes_share_the_work(tmp_path: Path, data: str) -> None:
    out = tmp_path / "m.pt"
    args = ["resnet8", "--data", data, "-o", str(out), "--seed", "3", *TINY]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launcher, "-m", "resq_deploy.hardening.cli", *args],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == OK, done.stderr
    assert done.stderr.count("after stage II") == 1
    made = Checkpoint.load(out)
    assert made.trained["phases"] == ["plain", "stage I", "stage II"]
    assert all(bool(v.isfinite().all()) for v in made.state_dict.values())


def test_processes_stay_in_step(tmp_path: Path) -> None:
    script = tmp_path / "ranks.py"
    script.write_text(RANKS)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            script,
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    names = [n for n in first if "running" not in n and "num_batches" not in n]
    assert names
    assert all(torch.equal(first[n], second[n]) for n in names)


RANKS = """
import os, sys
from pathlib import Path
import torch
from resq_deploy.hardening import harden_model
from tests.hardening.test_harden import PAIR, RECIPE
made = harden_model("resnet8", PAIR, recipe=RECIPE, arch_args={"width": 4}, device="cpu")
torch.save(dict(made.state_dict), Path(__file__).parent / (os.environ["RANK"] + ".pt"))
"""
