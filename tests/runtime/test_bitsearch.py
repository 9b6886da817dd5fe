"""The search for the most damaging bits, against gradients and losses worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.errors import AttackError
from resq_deploy.fault_models import parse
from resq_deploy.faults import Fault, FaultSpace, Flips, Memory, flipped
from resq_deploy.runtime.bitsearch import cross_entropy, rank, search_bits
from resq_deploy.runtime.campaign import Inline, Rule, run_campaign
from resq_deploy.runtime.double import NumpyRunner
from resq_deploy.runtime.trials import Job, PlainEngine

RUNNER = NumpyRunner(hidden=24)
SAMPLE = RUNNER.sample(64, right=1.0)
WEIGHTS = RUNNER.space.select(kinds=["weights"])
Arrays = Mapping[str, NDArray[np.floating]]


def engine() -> PlainEngine:
    return PlainEngine(RUNNER, SAMPLE.images)


def gradients(flips: Flips) -> Arrays:
    """Of the mean cross-entropy by the codes of both layers, by the chain rule through straight-through rounding."""
    now: dict[str, NDArray[Any]] = {
        m.name: flipped(m, flips[m.name]) if m.name in flips else m.value
        for m in RUNNER.space.memories
    }
    x = SAMPLE.images.reshape(64, -1) - 0.5
    w1, w2 = (now[f"fc{i}.weight"] * now[f"fc{i}.weight.scale"][:, None] for i in (1, 2))
    hidden = x @ w1.T + now["fc1.bias"]
    relu = np.maximum(hidden, 0)
    logits = np.clip(relu, 0, 1) @ w2.T + now["fc2.bias"]
    share = np.exp(logits - logits.max(axis=1, keepdims=True))
    share /= share.sum(axis=1, keepdims=True)
    share[np.arange(64), SAMPLE.labels] -= 1
    back = (share / 64) @ w2 * ((hidden > 0) & (hidden < 1))
    return {
        "fc1.weight": (back.T @ x) * now["fc1.weight.scale"][:, None],
        "fc2.weight": ((share / 64).T @ np.clip(relu, 0, 1)) * now["fc2.weight.scale"][:, None],
    }


def test_few_chosen_bits_do_what_many_random_ones_do_not() -> None:
    found = search_bits(engine(), WEIGHTS, SAMPLE.labels, bits=6, gradients=gradients)
    assert found.golden_accuracy == 1.0
    random = run_campaign(
        Inline(engine()), Job(parse("bits:6"), WEIGHTS, 0, SAMPLE.labels), rule=Rule(trials=40)
    )
    assert found.accuracy < 0.5
    assert found.accuracy < random.accuracy_quantiles["0"]
    losses = [found.golden_loss, *(s.loss for s in found.steps)]
    assert losses == sorted(losses)
    assert found.measured == 6 * 16
    assert found.way == "gradients"


def test_gradients_find_more_than_as_many_measurements_at_random() -> None:
    told = search_bits(engine(), WEIGHTS, SAMPLE.labels, bits=4, gradients=gradients)
    blind = search_bits(engine(), WEIGHTS, SAMPLE.labels, bits=4, samples=16)
    assert blind.way == "sampling"
    assert told.steps[-1].loss > blind.steps[-1].loss
    assert blind.steps[-1].loss > blind.golden_loss


def test_what_was_found_replays_as_a_fault_list() -> None:
    found = search_bits(engine(), WEIGHTS, SAMPLE.labels, bits=3, gradients=gradients)
    job = Job(found.fault_list(), RUNNER.space, 0, SAMPLE.labels)
    again = run_campaign(Inline(engine()), job, rule=Rule(trials=1))
    assert again.flips == 3
    assert again.accuracy.mean == found.accuracy


def test_it_stops_where_it_is_told() -> None:
    found = search_bits(engine(), WEIGHTS, SAMPLE.labels, bits=50, gradients=gradients, until=0.6)
    assert found.accuracy <= 0.6 < found.steps[-2].accuracy
    assert search_bits(engine(), WEIGHTS, SAMPLE.labels, until=1.0).steps == ()


def test_bits_are_flipped_once_and_inside_the_space() -> None:
    small = WEIGHTS.select(layers=["fc2"], bits=[6])
    found = search_bits(engine(), small, SAMPLE.labels, bits=12, gradients=gradients)
    faults = [s.fault for s in found.steps]
    assert len(set(faults)) == 12
    assert {(f.tensor, f.bit) for f in faults} == {("fc2.weight", 6)}


def test_the_same_seed_finds_the_same() -> None:
    first, second, other = (
        search_bits(engine(), WEIGHTS, SAMPLE.labels, bits=2, samples=20, seed=s) for s in (1, 1, 2)
    )
    assert first == second
    assert first.steps != other.steps


def test_rank_is_first_order_by_hand() -> None:
    codes = np.array([1, -128, 0, 100], np.int8)
    space = FaultSpace([Memory("w", "w", "weights", codes)])
    slopes = np.array([1.0, 0.5, -2.0, 0.1])
    every = {
        Fault("w", e, b): slopes[e]
        * (
            int(
                np.int8(
                    (int(codes[e]) & 255 ^ 1 << b) - 256 * ((int(codes[e]) & 255 ^ 1 << b) > 127)
                )
            )
            - int(codes[e])
        )
        for e in range(4)
        for b in range(8)
    }
    best = sorted(every, key=lambda f: (-every[f], f))[:6]
    assert rank(space, {"w": slopes}, 6) == best
    assert best[0] == Fault("w", 2, 7), "clear to set: 0 -> -128, against a falling slope"
    after = rank(space, {"w": slopes}, 6, flipped=[best[0]])
    assert best[0] not in after
    assert after[:5] == best[1:]


def test_every_tensor_proposes_one() -> None:
    slopes = {
        m.name: np.full(m.value.shape, 1e-6 if "fc1" in m.name else 1.0) for m in WEIGHTS.memories
    }
    found = rank(WEIGHTS, slopes, 5)
    assert len(found) == 5
    assert {f.tensor for f in found} == {"fc1.weight", "fc2.weight"}
    assert {f.tensor for f in rank(WEIGHTS, {"fc1.weight": slopes["fc1.weight"]}, 5)} == {
        "fc1.weight"
    }


def test_floats_that_overflow_come_first() -> None:
    space = FaultSpace([Memory("b", "b", "bias", np.array([1.0, 2.0], np.float32))])
    assert rank(space, {"b": np.array([1.0, 0.0])}, 1) == [Fault("b", 0, 30)]


def test_cross_entropy() -> None:
    logits = np.array([[0, 0], [1000, -1000]], np.float32)
    assert cross_entropy(logits, np.array([0, 0])) == pytest.approx(np.log(2) / 2)
    assert cross_entropy(np.array([[np.nan, 0]], np.float32), np.array([0])) == float("inf")


@pytest.mark.parametrize("wrong", [{"bits": 0}, {"bits": 10**9}, {"candidates": 0}, {"samples": 0}])
def test_searches_for_nothing(wrong: dict[str, int]) -> None:
    with pytest.raises(AttackError, match="each from 1 on"):
        search_bits(engine(), WEIGHTS, SAMPLE.labels, **wrong)  # type: ignore[arg-type]
