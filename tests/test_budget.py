"""Budgets: how they are read, named and checked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from resq_deploy.budget import (
    ATTACKS,
    Budget,
    Norm,
    check_budget,
    format_eps,
    parse_attack,
    parse_eps,
)
from resq_deploy.errors import AttackError


@pytest.mark.parametrize(
    ("text", "eps"), [("8/255", 8 / 255), (" 0.03 ", 0.03), ("1e-2", 0.01), ("1", 1.0), (0.5, 0.5)]
)
def test_eps_is_read(text: str | float, eps: float) -> None:
    assert parse_eps(text) == eps


@pytest.mark.parametrize(
    "text", ["0", "1.01", "2/1", "-0.1", "8/0", "", "8//255", "nan", "inf", 0.0]
)
def test_a_bad_eps_is_refused(text: str | float) -> None:
    with pytest.raises(AttackError) as found:
        parse_eps(text)
    assert "8/255" in found.value.hint


def test_l2_may_exceed_one() -> None:
    assert parse_eps("1.5", "l2") == 1.5
    with pytest.raises(AttackError, match="unknown norm"):
        Budget("l3", 0.1)  # type: ignore[arg-type]


@given(st.integers(1, 255))
def test_whole_steps_keep_their_name(steps: int) -> None:
    text = f"{steps}/255"
    assert format_eps(parse_eps(text)) == text


def test_other_budgets_are_decimals() -> None:
    assert format_eps(0.3) == "0.3"
    assert format_eps(0.5 / 255) == "0.00196078"


@pytest.mark.parametrize(
    ("name", "known"),
    [("PGD", "pgd"), ("apgd-ce", "apgd"), ("apgd_t", "apgd-t"), (" square ", "square")],
)
def test_attacks_have_other_names(name: str, known: str) -> None:
    assert parse_attack(name) == known


def test_an_unknown_attack_lists_the_known_ones() -> None:
    with pytest.raises(AttackError, match="unknown attack 'pgdd'") as found:
        parse_attack("pgdd")
    assert all(name in found.value.hint for name in ATTACKS)


@given(
    eps=st.floats(0.001, 1),
    norm=st.sampled_from(["linf", "l2"]),
    seed=st.integers(0, 1000),
)
def test_what_lies_on_the_sphere_passes_and_what_is_beyond_does_not(
    eps: float, norm: Norm, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = rng.uniform(0.3, 0.7, (3, 1, 4, 4)).astype(np.float32)
    direction = rng.normal(size=x.shape)
    direction = np.sign(direction) if norm == "linf" else direction / _lengths(direction)
    step = min(eps, 0.29) * direction
    on, beyond = (x + step).astype(np.float32), (x + 1.01 * step).astype(np.float32)
    check_budget(x, on, min(eps, 0.29), norm)
    with pytest.raises(AttackError, match="3 of 3 adversarial inputs exceed"):
        check_budget(x, beyond, min(eps, 0.29), norm)


def _lengths(x: NDArray[np.float64]) -> NDArray[np.float64]:
    lengths: NDArray[np.float64] = np.sqrt(np.square(x).sum(axis=(1, 2, 3), keepdims=True))
    return lengths


@pytest.mark.parametrize("value", [-1e-3, 1.001, np.nan, np.inf])
def test_pixels_outside_the_range_are_refused(value: float) -> None:
    x = np.full((2, 1, 2, 2), 0.5, np.float32)
    moved = x.copy()
    moved[1, 0, 1, 1] = value
    with pytest.raises(AttackError, match=r"outside \[0, 1\]"):
        check_budget(x, moved, 1.0)


def test_shapes_must_agree_and_nothing_is_within_budget() -> None:
    x = np.zeros((2, 1, 2, 2), np.float32)
    with pytest.raises(AttackError, match="shape"):
        check_budget(x, x[:1], 0.1)
    check_budget(x[:0], x[:0], 0.1)
