"""Recipes: overrides by dotted names, and what they refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from resq_deploy.errors import ModelError
from resq_deploy.hardening import Recipe


def test_settings_are_changed_by_dotted_names() -> None:
    recipe = Recipe().override(
        {"fault.ber": 0.02, "attack.phase.epochs": 3, "batch": 64, "attack.layers": "a,b"}
    )
    assert recipe.fault.ber == 0.02
    assert recipe.attack.phase.epochs == 3.0
    assert recipe.batch == 64
    assert recipe.attack.layers == ("a", "b")
    assert recipe.plain == Recipe().plain


def test_lengths_replace_the_least_number_of_steps() -> None:
    recipe = Recipe().with_epochs(1, None, 2.5)
    assert (recipe.plain.epochs, recipe.plain.min_steps) == (1, 1)
    assert recipe.attack == Recipe().attack
    assert recipe.fault.phase.epochs == 2.5


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({"attack.phase.epochs": 3}, {"none": "I", "1": "", "2": "I", "1+2": ""}),
        ({"attack.eps": 0.1}, {"none": "I", "1": "", "2": "", "1+2": ""}),
        ({"fault.ber": 0.02}, {"none": "II", "1": "II", "2": "", "1+2": ""}),
        ({"plain.epochs": 3}, {"none": "", "1": "", "2": "", "1+2": ""}),
    ],
)
def test_settings_of_stages_that_do_not_run_are_told(
    settings: dict[str, Any], idle: dict[str, str]
) -> None:
    recipe = Recipe().override(settings)
    for stages, stage in idle.items():
        told = [f"settings of stage {stage} are not used: stages {stages}"] if stage else []
        assert recipe.idle(stages) == told


def test_a_recipe_can_be_written_down() -> None:
    assert json.loads(json.dumps(Recipe().as_dict())) == Recipe().as_dict()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda r: r.override({"nothing": 1}), "no setting 'nothing'"),
        (lambda r: r.override({"fault.nothing": 1}), "no setting 'fault.nothing'"),
        (lambda r: r.override({"batch.size": 1}), "batch is a value"),
        (lambda r: r.override({"batch": "many"}), "cannot be 'many'"),
        (lambda r: r.override({"fault.ber": 0.9}), "training BER is 0.9"),
        (lambda r: r.override({"fault.attacked": 2}), "attacked is 2"),
        (lambda r: r.override({"attack.eps": 8}), "between 0 and 1"),
        (lambda r: r.override({"attack.perturbations": "rain"}), "perturbation"),
        (lambda r: r.override({"holdout": 0}), "holdout"),
        (lambda r: r.with_epochs(0, None, None), "above 0"),
    ],
)
def test_what_makes_no_sense_is_refused(act: Callable[[Recipe], Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        act(Recipe())
