"""A network whose twin cannot be had is exported all the same, says what is lost, and refuses what was named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from torch import Tensor

from resq_deploy.bundle import Bundle
from resq_deploy.console import BAD_INPUT, OK, run
from resq_deploy.errors import AttackError
from resq_deploy.export import gradients, pipeline, twin_plan
from resq_deploy.export.adjust import Adjusted
from resq_deploy.export.cli import export
from resq_deploy.export.pipeline import export_model
from resq_deploy.export.twin_ops import Inputs, Node
from resq_deploy.manifest import Adjustment
from resq_deploy.runtime import attacks
from resq_deploy.runtime.runner import open_runner
from tests.export.twins import model_of
from tests.helpers import SHAPE, checkpoint, save_npz

SMALL: dict[str, Any] = {
    "calib_samples": 32,
    "eval_samples": 24,
    "attack_samples": 8,
}
QUICK: dict[str, Any] = {"effort": 0.0}  # of stage III, where there is one
FLAGS = ("--calib-samples", "32", "--eval-samples", "24", "--attack-samples", "8")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    data = save_npz(tmp_path / "data.npz")
    checkpoint(trained={"data": data}).save(tmp_path / "model.pt")
    return tmp_path / "model.pt"


@pytest.fixture
def without_relu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin as if nobody had written Relu."""
    monkeypatch.delitem(twin_plan.OPS, "Relu")


def never(*_: Any, **__: Any) -> Any:
    raise AssertionError("work began")


@pytest.mark.usefixtures("without_relu")
def test_a_bundle_without_stage_three_that_says_why(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(export, [str(model), *FLAGS, "--effort", "0", "--json"]) == OK
    said = capsys.readouterr()
    warnings = [line for line in said.err.splitlines() if line.startswith("warning: ")]
    (warning,) = (line for line in warnings if "stage III is left out" in line)
    for part in ("does not support Relu (node 'relu')", "adversarial"):
        assert part in warning
    told = json.loads(said.out)["adjustment"]
    assert not told["applied"]
    assert told["reason"].startswith("the differentiable copy does not support Relu")
    made = Bundle.open(model.with_suffix(".resq"))
    assert made.manifest.attacks == {}
    assert made.manifest.metrics.agreement > 0.5


@pytest.mark.usefixtures("without_relu")
def test_black_boxes_attack_it_still(model: Path) -> None:
    bundle = export_model(model, **SMALL, **QUICK)
    with open_runner(bundle) as runner:
        (found,) = attacks.evaluate(runner, bundle, ["square"], queries=5)
    assert found.name.startswith("square")


@pytest.mark.usefixtures("without_relu")
@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--attack", "apgd,fgsm"], "--attack apgd"),
        (["--attack", "fgsm,pgd", "--no-adjust"], "--attack fgsm"),
        (["--attack-faulty", "1e-3"], "--attack-faulty"),
    ],
)
def test_attacks_that_were_named_are_refused_before_calibration(
    flags: list[str],
    named: str,
    model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(pipeline, "calibrate", never)
    before = sorted(model.parent.iterdir())
    assert run(export, [str(model), *FLAGS, *flags]) == BAD_INPUT
    said = capsys.readouterr().err
    assert f"error: {named} needs gradients: the differentiable copy does not support Relu" in said
    assert "square" in said
    assert sorted(model.parent.iterdir()) == before


@pytest.mark.usefixtures("without_relu")
def test_in_python_the_default_is_what_nobody_named(model: Path) -> None:
    with pytest.raises(AttackError, match="--attack pgd needs gradients"):
        export_model(model, **SMALL, **QUICK, attacks=("pgd",))
    assert export_model(model, **SMALL, adjust=False).manifest.adjustment.reason is None


@pytest.mark.usefixtures("without_relu")
def test_who_wants_neither_is_not_warned(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(export, [str(model), *FLAGS, "--attack", "none", "--no-adjust"]) == OK
    assert "differentiable" not in capsys.readouterr().err


def test_where_the_twin_runs_nothing_is_left_out(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def stage3(int8: onnx.ModelProto, fp32: onnx.ModelProto, x: Any, **options: Any) -> Adjusted:
        seen.append(x)
        record = Adjustment(applied=False)
        return Adjusted(int8, fp32, options["ranges"], record)

    monkeypatch.setattr(pipeline, "stage3", stage3)
    made = export_model(model, **SMALL, **QUICK)
    assert len(seen) == 1
    assert list(made.manifest.attacks) == list(pipeline.ATTACKS)
    assert made.manifest.adjustment.reason is None


def classifier(op: str, **attributes: Any) -> onnx.ModelProto:
    """op, mean over pixels, three logits."""
    weight = np.random.default_rng(0).normal(size=(1, 3)).astype(np.float32)
    nodes = [
        helper.make_node(op, ["input"], ["a"], name="n", **attributes),
        helper.make_node("GlobalAveragePool", ["a"], ["b"]),
        helper.make_node("Flatten", ["b"], ["c"]),
        helper.make_node("MatMul", ["c", "w"], ["logits"]),
    ]
    return model_of(nodes, [numpy_helper.from_array(weight, "w")], {"input": ("batch", *SHAPE)})


def wrong(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs[0] * 1.5,)


def failing(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    raise RuntimeError("shapes do not fit\nand more")


def stuck(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs[0].detach(),)


def test_no_obstacle_to_what_the_twin_knows() -> None:
    assert gradients.obstacle(classifier("Sigmoid"), SHAPE) is None


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (classifier("Det"), "does not support Det (node 'n')"),
        (
            classifier("AveragePool", kernel_shape=[2, 2], dilations=[2, 2]),
            "does not support AveragePool with dilations (node 'n')",
        ),
    ],
)
def test_what_the_twin_lacks_is_named(model: onnx.ModelProto, message: str) -> None:
    found = gradients.obstacle(model, SHAPE)
    assert found is not None
    assert message in found


@pytest.mark.parametrize(
    ("operator", "message"),
    [
        (wrong, "differs from ONNX Runtime by"),
        (failing, "fails: shapes do not fit"),
        (stuck, "fails: "),
    ],
)
def test_a_twin_that_is_wrong_or_fails_counts_as_none(
    operator: Callable[..., Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(twin_plan.OPS, "Sigmoid", operator)
    found = gradients.obstacle(classifier("Sigmoid"), SHAPE)
    assert found is not None
    assert message in found
    assert "and more" not in found
