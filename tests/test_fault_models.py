"""Fault models: what they draw, that it is drawn with the right chances, and that it never changes."""

from __future__ import annotations

import contextlib
import math
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from resq_deploy import _draws
from resq_deploy.errors import FaultError
from resq_deploy.fault_models import (
    MODELS,
    FaultModel,
    Locations,
    parse,
    register,
    trial_rng,
    usage,
)
from resq_deploy.faults import FaultSpace
from tests.test_faults import memory, spaces

SPACE = FaultSpace(
    [memory("a.w", "int8", 50), memory("b.w", "int8", 31), memory("b.s", "float32", 7, 3)]
)
# The first 12 hex digits of the flips of trials 0, 1 and 10**12 of seed 7. These must never change: a
# fault list, a journal and a replay all rest on them.
GOLDEN = {
    "seu": ("b0db786a67e8", "71876e6f1fc3", "cb43418117b2"),
    "bits:5": ("277fcc38bfcf", "89c851f74c86", "08e80d761d23"),
    "ber:0.01": ("fdbeb1537b99", "ea0e1892407d", "288c8c9b16e1"),
    "mbu:3": ("0c4d0e93de66", "df66a1097fe8", "01f25cc61212"),
    "stuck-at-0": ("b0db786a67e8", "e3b0c44298fc", "cb43418117b2"),
    "stuck-at-1:4": ("9bc2f02e7a7a", "289778aea437", "71876e6f1fc3"),
    "stuck-at-1:0.2": ("650be16b11d6", "9725dc3ab599", "9b638cecc601"),
    "byte": ("3fb28b7b1db0", "0ee0e5b5b1a9", "7bd42ec8d70f"),
    "word": ("c19115836a87", "0bb6d3fcb001", "5a47ab6fb775"),
}
EVERY = list(GOLDEN)


@pytest.mark.parametrize("text", EVERY)
def test_trials_never_change(text: str) -> None:
    found = tuple(parse(text).trial(SPACE, 7, i).flips.digest()[:12] for i in (0, 1, 10**12))
    assert found == GOLDEN[text]


@pytest.mark.parametrize("text", EVERY)
@settings(deadline=None)
@given(space=spaces(), seed=st.integers(0, 2**63), trial=st.integers(0, 2**40))
def test_a_draw_is_distinct_inside_and_repeatable(
    text: str, space: FaultSpace, seed: int, trial: int
) -> None:
    model = parse(text)
    try:
        model.check(space)
    except FaultError:
        return
    drawn = model.draw(space, trial_rng(seed, trial))
    assert drawn.dtype == np.int64
    assert len(set(drawn.tolist())) == drawn.size
    assert ((drawn >= 0) & (drawn < space.size)).all()
    again = model.trial(space, seed, trial)
    assert again.locations == drawn.size
    assert again.flips.digest() == model.sample(space, trial_rng(seed, trial)).digest()
    assert again.flips.count == model.effective(space, drawn).size


@pytest.mark.parametrize("text", [*EVERY, "ber:1.2345678901e-07"])
def test_a_name_reads_back(text: str) -> None:
    assert parse(parse(text).name) == parse(text)
    assert parse(text) != parse("bits:77")
    assert len({parse(text), parse(text)}) == 1


def test_every_model_is_in_the_table_and_explained() -> None:
    assert {parse(text).word for text in EVERY} == set(MODELS)
    assert len(usage()) == len(MODELS)
    for form, about in usage():
        assert about
        assert parse(form.replace("[", "").replace("]", ""))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ber:0", "between 0 and 1"),
        ("ber:1", "between 0 and 1"),
        ("ber:-0.1", "between 0 and 1"),
        ("ber:1.5", "between 0 and 1"),
        ("ber:nan", "between 0 and 1"),
        ("ber:", "between 0 and 1"),
        ("ber", "needs a rate"),
        ("mbu:0", "whole number"),
        ("mbu:2.5", "whole number"),
        ("bits:inf", "whole number"),
        ("bits:1e300", "whole number"),
        ("bits:" + "9" * 5000, "whole number"),
        ("stuck-at-1:0", "whole number from 1 on or between"),
        ("seu:3", "takes no argument"),
        ("sue", "did you mean 'seu'"),
        ("", "unknown fault model"),
    ],
)
def test_what_cannot_be_parsed(text: str, words: str) -> None:
    with pytest.raises(FaultError, match=words):
        parse(text)


@settings(deadline=None)
@given(st.text(max_size=30))
def test_parse_gives_a_model_or_a_fault_error(text: str) -> None:
    with contextlib.suppress(FaultError):
        assert isinstance(parse(text), FaultModel)


def test_arguments_given_in_code_are_checked_too() -> None:
    rng = trial_rng(0, 0)
    with pytest.raises(FaultError, match="rate between"):
        MODELS["ber"](2.0).draw(SPACE, rng)
    with pytest.raises(FaultError, match="whole number"):
        MODELS["bits"]().draw(SPACE, rng)


def test_a_space_too_small() -> None:
    with pytest.raises(FaultError, match="space of 872 bits"):
        parse("bits:873").sample(SPACE, trial_rng(0, 0))
    with pytest.raises(FaultError, match="no tensor has 401 adjacent"):
        parse("mbu:401").sample(SPACE, trial_rng(0, 0))
    assert parse("mbu:400").sample(SPACE, trial_rng(0, 0)).count == 400
    assert parse("bits:872").sample(SPACE, trial_rng(0, 0)).count == 872


def _uniform(counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    return float(stats.chisquare(counts).pvalue)


@pytest.mark.parametrize(("text", "each"), [("seu", 1), ("bits:5", 5), ("bits:500", 500)])
def test_locations_are_uniform(text: str, each: int) -> None:
    model, trials = parse(text), 6000 if each < 100 else 300
    drawn = np.concatenate([model.draw(SPACE, trial_rng(1, i)) for i in range(trials)])
    counts = np.bincount(drawn, minlength=SPACE.size)
    assert counts.sum() == trials * each
    # without replacement the counts vary less than Poisson's; the chi-square is scaled up for it
    spread = ((counts - counts.mean()) ** 2).sum() / (counts.mean() * (1 - each / SPACE.size))
    assert 1e-4 < stats.chi2.sf(spread, SPACE.size - 1) < 1 - 1e-4


def test_bit_error_rate_is_independent_per_bit() -> None:
    model, trials = parse("ber:0.05"), 4000
    hits = np.zeros((trials, SPACE.size), dtype=np.int64)
    for i in range(trials):
        hits[i, model.draw(SPACE, trial_rng(2, i))] = 1
    per_trial = hits.sum(axis=1)
    assert abs(per_trial.mean() / (0.05 * SPACE.size) - 1) < 0.01
    assert abs(per_trial.var() / (0.05 * 0.95 * SPACE.size) - 1) < 0.1
    expected = trials * 0.05
    spread = ((hits.sum(axis=0) - expected) ** 2).sum() / (expected * 0.95)
    assert 1e-4 < stats.chi2.sf(spread, SPACE.size) < 1 - 1e-4
    neighbours = (hits[:, 1:] * hits[:, :-1]).sum() / (trials * (SPACE.size - 1))
    assert abs(neighbours / 0.05**2 - 1) < 0.05


@pytest.mark.parametrize("rate", [1e-300, 1e-18, 1e-9, 0.3, 0.999, 1 - 2**-53])
def test_bit_error_rates_at_the_ends(rate: float) -> None:
    drawn = _draws.bernoulli(trial_rng(0, 1), 10_000, rate)
    assert abs(drawn.size - rate * 10_000) <= 6 * math.sqrt(10_000 * rate * (1 - rate)) + 1


def test_a_billion_bits_take_no_time_and_no_memory() -> None:
    drawn = _draws.bernoulli(trial_rng(0, 0), 10**9, 1e-4)
    assert abs(drawn.size - 100_000) < 2000
    assert drawn[-1] < 10**9
    assert (np.diff(drawn) > 0).all()


@settings(deadline=None)
@given(st.floats(2**-53, 1.0))
def test_the_logarithm_is_one(value: float) -> None:
    assert _draws._log(np.array([value]))[0] == pytest.approx(
        math.log(value), rel=1e-15, abs=1e-300
    )


@settings(deadline=None)
@given(st.floats(1e-300, 1 - 2**-53))
def test_the_logarithm_of_the_rest_is_one(rate: float) -> None:
    assert _draws._log1m(rate) == pytest.approx(math.log1p(-rate), rel=1e-15)


@settings(deadline=None)
@given(st.integers(1, 2**62), st.integers(1, 50))
def test_integers_stay_below(bound: int, count: int) -> None:
    drawn = _draws.below(trial_rng(3, bound % 1000), bound, count)
    assert drawn.size == count
    assert ((drawn >= 0) & (drawn < bound)).all()


@pytest.mark.parametrize("held", [0, 1])
def test_stuck_bits_change_only_what_differs(held: int) -> None:
    model, changed = parse(f"stuck-at-{held}"), 0
    for i in range(400):
        drawn = model.trial(SPACE, 5, i)
        location = model.draw(SPACE, trial_rng(5, i))
        assert drawn.locations == 1
        assert drawn.flips.count == int(SPACE.values(location)[0] != held)
        assert drawn.layer in SPACE.layers
        changed += drawn.flips.count
    ones = SPACE.values(np.arange(SPACE.size)).mean()
    assert abs(changed / 400 - (1 - ones if held else ones)) < 0.1


def test_stuck_at_one_everywhere_leaves_ones() -> None:
    flips = parse(f"stuck-at-1:{SPACE.size}").sample(SPACE, trial_rng(0, 0))
    for name, part in flips.items():
        value = SPACE.by_name[name].value.view(part.masks.dtype)
        assert (value[part.elements] | part.masks == value[part.elements] ^ part.masks).all()
        assert (value[part.elements] ^ part.masks == np.iinfo(part.masks.dtype).max).all()


def test_adjacent_bits_stay_in_one_tensor_and_start_anywhere() -> None:
    model, firsts = parse("mbu:4"), []
    for i in range(6000):
        drawn = model.draw(SPACE, trial_rng(4, i))
        assert (np.diff(drawn) == 1).all()
        assert len(set(SPACE.locate(drawn)[0].tolist())) == 1
        firsts.append(int(drawn[0]))
    possible = [i for i in range(SPACE.size) if _fits(i, 4)]
    counts = np.bincount(firsts, minlength=SPACE.size)
    assert counts[[i for i in range(SPACE.size) if i not in possible]].sum() == 0
    assert _uniform(counts[possible]) > 1e-4


def _fits(first: int, count: int) -> bool:
    ends = np.cumsum(SPACE.sizes())
    return any(
        start <= first <= end - count for start, end in zip([0, *ends[:-1]], ends, strict=True)
    )


@pytest.mark.parametrize(("text", "size"), [("byte", 1), ("word", 4)])
def test_blocks_change_to_any_other_value(text: str, size: int) -> None:
    seen: list[tuple[str, int, int]] = []
    model = parse(text)
    for i in range(3000):
        flips = model.trial(SPACE, 6, i).flips
        faults = list(flips.faults())
        width = SPACE.by_name[faults[0].tensor].value.dtype.itemsize
        places = {(f.tensor, (f.element * width + f.bit // 8) // size) for f in faults}
        assert len(places) == 1
        seen.append((*places.pop(), flips.count))
    where = {(name, address) for name, address, _ in seen}
    total = sum(-(-m.value.nbytes // size) for m in SPACE.memories)
    assert len(where) == total
    bits = np.array([count for *_, count in seen])
    assert bits.min() >= 1
    if text == "byte":
        assert abs(bits.mean() - 4 * 256 / 255) < 0.15


def test_a_bit_filter_holds_for_every_model() -> None:
    filtered = SPACE.select(bits=[7])
    for text in EVERY:
        flips = parse(text).sample(filtered, trial_rng(1, 1))
        assert {fault.bit for fault in flips.faults()} <= {7}


@pytest.mark.parametrize(
    ("text", "layer", "bit"),
    [("seu", True, True), ("byte", True, False), ("ber:0.5", False, False)],
)
def test_what_a_trial_is_put_down_to(text: str, layer: bool, bit: bool) -> None:
    drawn = [parse(text).trial(SPACE, 0, i) for i in range(20)]
    assert any(d.layer is not None for d in drawn) == layer
    assert all(d.bit is not None for d in drawn) == bit


def test_a_model_of_ones_own() -> None:
    class Corner(FaultModel):
        word: ClassVar[str] = "corner"
        about: ClassVar[str] = "the first bit"

        def draw(self, space: FaultSpace, rng: np.random.Generator) -> Locations:
            return np.zeros(1, dtype=np.int64)

    try:
        register(Corner)
        assert parse("corner").sample(SPACE, trial_rng(0, 0)).count == 1
        with pytest.raises(FaultError, match="two fault models"):
            register(type("Other", (Corner,), {}))
    finally:
        del MODELS["corner"]
