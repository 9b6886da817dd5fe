"""Checkpoints come back as they were, and nothing else passes for one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from resq_deploy import networks
from resq_deploy.checkpoint import Checkpoint
from resq_deploy.errors import ModelError


def made(**changes: Any) -> Checkpoint:
    torch.manual_seed(0)
    args = {"width": 4}
    network = networks.build("resnet8", input_shape=(1, 32, 32), classes=3, args=args)
    fields: dict[str, Any] = {
        "arch": "resnet8",
        "arch_args": args,
        "input_shape": (1, 32, 32),
        "classes": ("a", "b", "c"),
        "mean": (0.25,),
        "std": (0.5,),
        "state_dict": network.state_dict(),
        "trained": {"stages": "1+2", "recipe": {"lr": 0.1, "layers": ["auto"]}},
        "seed": 7,
        "metrics": {"clean": 0.5},
    }
    return Checkpoint(**{**fields, **changes})


def test_a_checkpoint_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    made().save(path)
    back = Checkpoint.load(path)
    assert back.arch_args == {"width": 4}
    assert (back.classes, back.mean, back.std) == (("a", "b", "c"), (0.25,), (0.5,))
    assert back.trained == made().trained
    assert (back.seed, back.metrics) == (7, {"clean": 0.5})
    network = back.network()
    assert not network.training
    want = made().network()
    x = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(network(x), want(x))
    assert os.listdir(tmp_path) == ["m.pt"]


def test_it_holds_tensors_and_plain_values_only(tmp_path: Path) -> None:
    made().save(tmp_path / "m.pt")
    body = torch.load(tmp_path / "m.pt", weights_only=True)
    assert body["resq_checkpoint"] == 1


class Bomb:
    """Unpickling it creates a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.path),))


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    torch.save({"resq_checkpoint": 1, "x": Bomb(tmp_path / "boom")}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match="not a checkpoint of tensors"):
        Checkpoint.load(tmp_path / "m.pt")
    assert not (tmp_path / "boom").exists()


def body_of(tmp_path: Path) -> dict[str, Any]:
    made().save(tmp_path / "good.pt")
    body: dict[str, Any] = torch.load(tmp_path / "good.pt", weights_only=True)
    return body


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resq_checkpoint": 99}, "version 99"),
        ({"input_shape": [1, 32]}, "damaged"),
        ({"mean": [0.1, 0.2]}, "damaged"),
        ({"std": [0.0]}, "damaged"),
        ({"state_dict": 3}, "damaged"),
        ({"metrics": None}, "damaged"),
    ],
)
def test_damaged_checkpoints_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    torch.save({**body_of(tmp_path), **change}, tmp_path / "m.pt")
    with pytest.raises(ModelError, match=message):
        Checkpoint.load(tmp_path / "m.pt")


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    with pytest.raises(ModelError, match="does not exist"):
        Checkpoint.load(path)
    torch.save({"conv.weight": torch.zeros(3)}, path)
    with pytest.raises(ModelError, match="not a resq-harden checkpoint"):
        Checkpoint.load(path)
    path.write_bytes(b"PK\x03\x04 no model")
    with pytest.raises(ModelError, match="not a checkpoint of tensors"):
        Checkpoint.load(path)
    made().save(path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ModelError, match="not a checkpoint of tensors"):
        Checkpoint.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch_args": {"width": 8}}, r"misshapen conv1.weight \(4, 1, 3, 3\) for \(8, 1, 3, 3\)"),
        ({"arch": "resnet18"}, "missing layer1.0.conv1.weight"),
        ({"classes": ("a", "b")}, "misshapen fc.weight"),
    ],
)
def test_weights_of_another_network_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        made(**changes).network()


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot write"):
        made().save(tmp_path / "none" / "m.pt")
    (tmp_path / "taken.pt").mkdir()
    with pytest.raises(ModelError, match="cannot write"):
        made().save(tmp_path / "taken.pt")
    assert os.listdir(tmp_path) == ["taken.pt"]


def test_a_place_that_cannot_be_cleaned_either_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match=r"cannot write .*Not a directory"):
        made().save(tmp_path / "file" / "m.pt")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pt"
    made().save(path)

    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ModelError, match="No space left"):
        made(seed=8).save(path)
    assert Checkpoint.load(path).seed == 7
    assert os.listdir(tmp_path) == ["m.pt"]
