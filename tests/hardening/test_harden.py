"""harden_model end to end on small data: what comes out, exact resume, refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from resq_deploy.checkpoint import Checkpoint
from resq_deploy.data import Dataset
from resq_deploy.errors import DataError, ModelError
from resq_deploy.hardening import Phase, Recipe, harden_model, objectives, pipeline, trainer
from resq_deploy.hardening.pipeline import state_path
from resq_deploy.hardening.recipe import Attack, Fault

SHORT = Phase(epochs=1, min_steps=1, lr=0.05, adam_lr=1e-3)
RECIPE = Recipe(
    plain=SHORT,
    attack=Attack(phase=SHORT),
    fault=Fault(phase=SHORT),
    batch=16,
    holdout=0.1,
    ema=0.8,
)


def blobs(count: int = 96, classes: int = 3) -> Dataset:
    """Noise whose class is its brightness."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % classes
    noise = rng.integers(0, 60, (count, 1, 16, 16))
    images = (noise + 90 * labels[:, None, None, None]).astype(np.uint8)
    return Dataset.from_arrays("blobs", images, labels)


PAIR = (blobs(), blobs(48))
PER_EPOCH = 86 // 16


def harden(tmp_path: Path, name: str = "m.pt", **options: Any) -> Checkpoint:
    asked: dict[str, Any] = {"recipe": RECIPE, "arch_args": {"width": 4}, "device": "cpu"}
    return harden_model("resnet8", PAIR, output=tmp_path / name, **{**asked, **options})


def same(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("stages", ["none", "1", "2", "1+2"])
def test_every_choice_of_stages_learns(tmp_path: Path, stages: Any) -> None:
    plain = replace(SHORT, epochs=6)
    made = harden(tmp_path, stages=stages, recipe=replace(RECIPE, plain=plain))
    assert made.metrics["clean"] > 0.6
    back = Checkpoint.load(tmp_path / "m.pt")
    assert same(back.state_dict, made.state_dict)
    assert back.trained["stages"] == stages
    assert back.trained["data_digest"] == PAIR[0].digest()
    want = {"none": {"clean"}, "1": {"clean", "robust"}, "2": {"clean", "faulty"}}
    assert set(back.metrics) == want.get(stages, {"clean", "robust", "faulty"})
    assert not state_path(tmp_path / "m.pt").exists()


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    first, second = (harden(tmp_path, f"{i}.pt", seed=3) for i in range(2))
    other = harden(tmp_path, "o.pt", seed=4)
    assert same(first.state_dict, second.state_dict)
    assert not same(first.state_dict, other.state_dict)


def test_training_leaves_the_global_generator_alone(tmp_path: Path) -> None:
    torch.manual_seed(11)
    want = torch.rand(3)
    torch.manual_seed(11)
    harden(tmp_path, stages="none")
    assert torch.equal(torch.rand(3), want)


class Stop(Exception):
    """The machine is switched off."""


@pytest.mark.parametrize("stop", [3, 5, 8, 12])
def test_a_resumed_run_equals_an_uninterrupted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    whole = harden(tmp_path, "whole.pt")
    monkeypatch.setattr(trainer, "_SAVE_SECONDS", -1.0)
    steps = 0
    original = trainer._Run._step

    def counted(self: Any, *args: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > stop:
            raise Stop
        original(self, *args)

    monkeypatch.setattr(trainer._Run, "_step", counted)
    with pytest.raises(Stop):
        harden(tmp_path)
    monkeypatch.setattr(trainer._Run, "_step", original)
    resumed = harden(tmp_path, resume=True)
    assert same(resumed.state_dict, whole.state_dict)
    assert resumed.metrics == whole.metrics


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Any, *_args: Any) -> None:
        raise Stop

    monkeypatch.setattr(objectives.AttackObjective, "run", stop)
    with pytest.raises(Stop):
        harden(tmp_path)


def test_resuming_another_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path, monkeypatch)
    with pytest.raises(ModelError, match="belongs to another run: seed differ"):
        harden(tmp_path, resume=True, seed=9)
    with pytest.raises(ModelError, match="arch_args"):
        harden(tmp_path, resume=True, arch_args={"width": 5})
    state_path(tmp_path / "m.pt").write_bytes(b"damaged")
    with pytest.raises(ModelError, match="not a checkpoint of tensors"):
        harden(tmp_path, resume=True)
    torch.save({"a": 1}, state_path(tmp_path / "m.pt"))
    with pytest.raises(ModelError, match="not a training state"):
        harden(tmp_path, resume=True)


def test_a_checkpoint_remains_after_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    assert Checkpoint.load(tmp_path / "m.pt").trained["phases"] == ["plain"]


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_args: object) -> torch.Tensor:
        return torch.tensor(math.nan, requires_grad=True)

    monkeypatch.setattr(objectives, "feature_distance", explode)
    with pytest.raises(ModelError, match=r"consistency is not finite at step 0 of stage I .*lower"):
        harden(tmp_path)
    assert Checkpoint.load(tmp_path / "m.pt").trained["phases"] == ["plain"]


def test_no_space_for_checkpoints_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(ModelError, match="No space left"):
        harden(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_weights_are_clipped_and_average_kept(tmp_path: Path) -> None:
    fault = replace(RECIPE.fault, clip=1.5)
    made = harden(tmp_path, stages="2", recipe=replace(RECIPE, fault=fault, ema=0.0))
    for name, weight in made.state_dict.items():
        if weight.ndim == 4:
            peak = weight.abs().amax((1, 2, 3))
            ratio = peak / weight.square().mean((1, 2, 3)).sqrt()
            assert float(ratio.max()) < 1.8, name


def test_stage_two_trains_the_network_that_is_deployed(tmp_path: Path) -> None:
    plain = harden(tmp_path, "plain.pt", stages="none")
    one, two = (
        harden(tmp_path, f"{s}.pt", init=str(tmp_path / "plain.pt"), stages=s) for s in ("1", "2")
    )
    statistics = [n for n in plain.state_dict if "running" in n]
    assert all(torch.equal(plain.state_dict[n], two.state_dict[n]) for n in statistics)
    assert not any(torch.equal(plain.state_dict[n], one.state_dict[n]) for n in statistics)
    assert not torch.equal(plain.state_dict["conv1.weight"], two.state_dict["conv1.weight"])
    assert not torch.equal(plain.state_dict["bn1.weight"], two.state_dict["bn1.weight"])


def test_patience_ends_a_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    original = trainer._Run._step

    def counted(self: Any, *args: Any) -> None:
        seen.append(self.done)
        original(self, *args)

    def bad(*_args: Any) -> dict[str, float]:
        return {"clean": 0.5, "joint": 0.5}

    monkeypatch.setattr(trainer._Run, "_step", counted)
    monkeypatch.setattr(pipeline._Hardening, "_score", bad)
    recipe = replace(RECIPE, plain=replace(SHORT, epochs=9), patience=2)
    harden(tmp_path, stages="none", recipe=recipe)
    assert len(seen) == 3 * PER_EPOCH


def test_it_starts_from_a_checkpoint_and_skips_plain_training(tmp_path: Path) -> None:
    plain = harden(tmp_path, "plain.pt", stages="none")
    hard = harden(tmp_path, init=str(tmp_path / "plain.pt"), stages="1")
    assert hard.trained["phases"] == ["plain", "stage I"]
    hard.save(tmp_path / "I.pt")
    both = harden(tmp_path, init=str(tmp_path / "I.pt"), stages="2")
    assert both.trained["phases"] == ["plain", "stage I", "stage II"]
    assert set(both.metrics) == {"clean", "robust", "faulty"}
    assert hard.mean == plain.mean
    torch.save(dict(plain.state_dict), tmp_path / "weights.pt")
    bare = harden(tmp_path, init=str(tmp_path / "weights.pt"), stages="2")
    assert bare.trained["phases"] == ["plain", "stage II"]


def one_class() -> Dataset:
    return Dataset.from_arrays("one", blobs().batch(np.arange(96))[0], np.zeros(96, np.int64))


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ((one_class(), one_class()), DataError, "one class only"),
        ((blobs(), Dataset.from_arrays("s", np.zeros((4, 1, 8, 8), np.uint8), np.arange(4))),
         DataError, "differ in shape"),
        ((blobs(3), blobs(3)), DataError, "too few"),
        ((blobs(), blobs(), (3, 16, 16)), DataError, r"\(1, 16, 16\), not \(3, 16, 16\)"),
        ("nothing", DataError, "unknown data set"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_trained_on_is_refused(data: Any, error: Any, message: str) -> None:
    shape = data[2] if len(data) == 3 else None
    with pytest.raises(error, match=message):
        harden_model(
            "resnet8", data if shape is None else data[:2], recipe=RECIPE, input_shape=shape
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": "3"}, "unknown stages"),
        ({"device": "cuda"}, "no CUDA device"),
        ({"recipe": replace(RECIPE, amp="fp16")}, "fp16 needs a CUDA device"),
        ({"recipe": replace(RECIPE, attack=replace(RECIPE.attack, layers=("l9",)))}, "no layer 'l9'"),
        ({"arch_args": {"height": 3}}, "height=3"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    if torch.cuda.is_available() and "CUDA" in message:
        options = {"device": "cuda:99"}
        message = ""
    with pytest.raises(ModelError, match=message):
        harden(tmp_path, **options)


@pytest.mark.parametrize("layers", [("layer2", "layer3"), ("auto",)])
@pytest.mark.parametrize("kind", ["fgsm", "pgd", "bitplane", "uniform"])
def test_every_part_of_stage_one_can_be_chosen(
    tmp_path: Path, kind: Any, layers: tuple[str, ...]
) -> None:
    once = replace(SHORT, epochs=0.2)
    attack = Attack(
        phase=once, perturbations=(kind,), layers=layers, lipschitz=1e-3, mixup=0.2, steps=2
    )
    fault = replace(RECIPE.fault, phase=once)
    recipe = replace(RECIPE, plain=once, attack=attack, fault=fault)
    made = harden(tmp_path, recipe=recipe)
    assert made.trained["phases"] == ["plain", "stage I", "stage II"]
    assert made.trained["recipe"]["attack"]["perturbations"] == [kind]


def test_bf16_trains(tmp_path: Path) -> None:
    recipe = replace(RECIPE, amp="bf16", plain=replace(SHORT, epochs=6))
    made = harden(tmp_path, recipe=recipe)
    assert made.metrics["clean"] > 0.6
    assert all(v.dtype in (torch.float32, torch.int64) for v in made.state_dict.values())


def test_networks_without_batchnorm_use_adamw(tmp_path: Path) -> None:
    from torch import nn

    recipe = Recipe()
    found = trainer.optimizer(nn.Linear(3, 2), recipe.plain, recipe)
    assert isinstance(found, torch.optim.AdamW)
    with_norm = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    sgd = trainer.optimizer(with_norm, recipe.plain, recipe)
    assert isinstance(sgd, torch.optim.SGD)
    assert [g["weight_decay"] for g in sgd.param_groups] == [recipe.weight_decay, 0.0]


@pytest.mark.parametrize("kind", ["one-cycle", "cosine"])
def test_schedules_fall_to_zero(kind: str) -> None:
    rates = [trainer.factor(step, kind, 100) for step in range(100)]
    assert max(rates) == pytest.approx(1.0, abs=0.1)
    assert rates[-1] < 0.01
    assert (rates[0] < 0.1) == (kind == "one-cycle")
    top = rates.index(max(rates))
    assert all(a >= b for a, b in zip(rates[top:], rates[top + 1 :], strict=False))


def test_scalars_can_be_read_by_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import (  # type: ignore[import-untyped]
        event_accumulator,
    )

    harden(tmp_path, log_dir=tmp_path / "logs", stages="1")
    events = event_accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert {"plain/loss", "stage I/consistency", "stage I/robust"} <= set(events.Tags()["scalars"])


def test_a_log_folder_that_cannot_be_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ModelError, match="is not a directory"):
        harden(tmp_path, log_dir=tmp_path / "taken", stages="1")
    assert not (tmp_path / "model.pt").exists()
