"""Stage III on a small graph: what it may change, that it gains, that it backs off, that it repeats."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np
import onnx
import pytest
import torch

from resq_deploy.console import Reporter
from resq_deploy.errors import DataError
from resq_deploy.export import graph, qdq, rules, stage, verdict
from resq_deploy.export.adjust import Adjusted, adjust
from resq_deploy.export.calibrate import Range, calibrate
from resq_deploy.export.design import Design
from resq_deploy.export.dialect import Dialect
from resq_deploy.export.distill import Recipe, between, distill, draw
from resq_deploy.export.guard import Guard, Scores
from resq_deploy.export.mixtures import Doubt
from resq_deploy.export.reconstruct import WEAKER
from resq_deploy.export.stage import logits_of
from resq_deploy.export.twin import Twin
from resq_deploy.export.work import work_per_image
from resq_deploy.manifest import Adjustment
from resq_deploy.memory import fault_space
from tests.export import nets
from tests.export.short import few_steps

BER = 1e-2
STEPS = ["equalize", "split", "reconstruct", "distill"]
IMAGES = nets.images(96)


@lru_cache
def plain() -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Range]]:
    fp32 = nets.residual()
    ranges = calibrate(fp32, rules.plan(fp32).activations, [IMAGES], threads=1)
    return fp32, qdq.quantize_graph(fp32, ranges), ranges


def guard(trials: int = 6, attacked: int = 16) -> Guard:
    fp32, _, _ = plain()
    held_out = nets.images(64, seed=9)
    return Guard(
        held_out,
        logits_of(fp32, [held_out], 1),
        Doubt.find(held_out, lambda batches: logits_of(fp32, batches, 1), 0),
        (BER,),
        8 / 255,
        trials=trials,
        attacked=attacked,
        steps=3,
        threads=1,
    )


def run(seed: int = 0, reporter: Reporter | None = None) -> Adjusted:
    fp32, int8, ranges = plain()
    return adjust(
        int8,
        fp32,
        IMAGES,
        ranges=ranges,
        design=Design(BER),
        seed=seed,
        threads=1,
        reporter=reporter,
    )


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    with few_steps(trials=True):
        yield


@pytest.fixture(scope="module")
def adjusted() -> Adjusted:
    return run()


def test_without_redundancy_only_numbers_change_never_the_graph() -> None:
    fp32, int8, ranges = plain()
    adjusted = adjust(int8, fp32, IMAGES, ranges=ranges, design=Design(BER, 0), threads=1)
    assert adjusted.record.applied
    before, after = onnx.ModelProto(), onnx.ModelProto()
    before.CopyFrom(int8)
    after.CopyFrom(adjusted.model)
    shapes = [
        [(t.name, t.data_type, *t.dims) for t in m.graph.initializer] for m in (before, after)
    ]
    assert shapes[0] == shapes[1]
    for model in (before, after):
        del model.graph.initializer[:]
    assert before == after
    graph.check(adjusted.model)


def test_codes_stay_where_the_quantizer_puts_them(adjusted: Adjusted) -> None:
    for memory in fault_space(adjusted.model).memories:
        if memory.kind == "weights":
            assert memory.value.min() >= -127
        if memory.kind == "scales":
            assert (memory.value > 0).all()


def test_it_gains_under_flips_and_the_record_says_so(adjusted: Adjusted) -> None:
    record = adjusted.record
    assert Adjustment.model_validate_json(record.model_dump_json()) == record
    assert record.applied
    assert record.design_ber == BER
    assert [s["step"] for s in record.steps][:4] == STEPS
    assert record.measured["adjusted"]["faulty"] > record.measured["plain"]["faulty"]
    ours, theirs = guard().measure(adjusted.model), guard().measure(plain()[1])
    assert ours.divergence < theirs.divergence


def test_the_fp32_graph_that_comes_back_is_the_same_function(adjusted: Adjusted) -> None:
    before = logits_of(plain()[0], [IMAGES], 1)
    after = logits_of(adjusted.fp32, [IMAGES], 1)
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())


def test_the_ranges_that_come_back_are_those_in_the_graph(adjusted: Adjusted) -> None:
    values = nets.arrays(adjusted.model)
    for name, found in adjusted.ranges.items():
        assert float(values[f"{name}.scale"]) == pytest.approx(found.scale, rel=1e-6)


def test_the_same_seed_gives_the_same_bytes_and_progress_changes_none(adjusted: Adjusted) -> None:
    stream = io.StringIO()
    again = run(reporter=Reporter(quiet=False, stream=stream))
    said = stream.getvalue()
    assert "distilling: 30/30 steps" in said
    assert "stage III keeps:" in said
    assert "measuring a graph takes" not in said
    assert again.model.SerializeToString(deterministic=True) == adjusted.model.SerializeToString(
        deterministic=True
    )
    assert again.record == adjusted.record


def test_another_seed_gives_other_codes(adjusted: Adjusted) -> None:
    other, first = nets.arrays(run(seed=1).model), nets.arrays(adjusted.model)
    assert not np.array_equal(other["conv1.weight"], first["conv1.weight"])


def test_half_scales_are_held_by_float16() -> None:
    fp32, _, ranges = plain()
    int8 = qdq.quantize_graph(fp32, ranges, dialect=Dialect(half=True))
    made = adjust(
        int8, fp32, IMAGES, ranges=ranges, design=Design(BER), dialect=Dialect(half=True), threads=1
    ).model
    for name, array in nets.arrays(made).items():
        if name.endswith(".scale"):
            np.testing.assert_array_equal(array.astype(np.float16).astype(np.float32), array)


def test_what_loses_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32, int8, ranges = plain()
    monkeypatch.setattr(stage, "distill", ruined)
    made = adjust(int8, fp32, IMAGES, ranges=ranges, design=Design(BER), threads=1)
    steps = [s["step"] for s in made.record.steps]
    assert steps[:4] == STEPS
    assert set(steps[4:]) == {"back off"}
    assert made.record.steps[3]["loses"]
    assert not made.record.measured["kept"].endswith("distilled")


def ruined(
    int8: onnx.ModelProto, teacher: Twin, images: object, recipe: Recipe, **_: object
) -> tuple[onnx.ModelProto, Recipe]:
    twin = Twin(int8)
    rng = np.random.default_rng(0)
    for memory in fault_space(int8).memories:
        if memory.kind == "weights":
            codes = rng.integers(-127, 128, memory.value.shape, dtype=np.int8)
            twin.parameters_by_initializer[memory.name].copy_(torch.from_numpy(codes))
    return twin.to_model(), recipe


def test_a_rate_that_strays_is_halved() -> None:
    fp32, int8, _ = plain()
    wild = Recipe(ber=BER, steps=20, batch=32, rate=40.0, bias_rate=0.2)
    stream = io.StringIO()
    made, used = distill(
        int8, Twin(fp32), IMAGES, wild, reporter=Reporter(quiet=False, stream=stream)
    )
    assert used.rate < wild.rate
    assert used.bias_rate / used.rate == wild.bias_rate / wild.rate
    assert "strays" in stream.getvalue()
    assert guard().measure(made).clean.mean() > 0.95


def test_what_strayed_at_every_rate_is_not_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        stage, "distill", lambda int8, _teacher, _images, recipe, **_: (int8, recipe)
    )
    stream = io.StringIO()
    made = run(reporter=Reporter(quiet=False, stream=stream))
    last = made.record.steps[-1]
    assert (last["step"], last["kept"], last["loses"]) == ("distill", True, [])
    assert "distilled" not in stream.getvalue()


def test_too_few_images_are_refused() -> None:
    fp32, int8, ranges = plain()
    with pytest.raises(DataError, match="15 calibration images"):
        adjust(int8, fp32, nets.images(15), ranges=ranges)


def test_learning_is_left_out_where_too_few_steps_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_LONG", 0.0)
    fp32, int8, ranges = plain()
    stream = io.StringIO()
    design = Design(BER, effort=1e-6)
    made = adjust(
        int8,
        fp32,
        IMAGES,
        ranges=ranges,
        design=design,
        threads=1,
        reporter=Reporter(quiet=False, stream=stream),
    )
    assert made.record.steps[3]["step"] == "distill"
    assert made.record.steps[3]["steps"] == 0
    assert "distillation is left out: " in stream.getvalue()
    assert "distilling" not in stream.getvalue()
    assert stream.getvalue().count("measuring a graph takes 0 min here; up to 7 more") == 1
    said = [line for line in stream.getvalue().splitlines() if ": agreement " in line]
    assert len(said) == len(set(said))


def test_half_the_way_is_between() -> None:
    fp32, int8, _ = plain()
    learned, _ = distill(int8, Twin(fp32), IMAGES, Recipe(ber=BER, steps=10, batch=16))
    first, last = nets.arrays(int8), nets.arrays(learned)
    middle = nets.arrays(between(int8, learned, 0.5))
    moved = last["conv1.weight"].astype(int) - first["conv1.weight"]
    assert np.abs(moved).max() >= 2
    step = middle["conv1.weight"].astype(int) - first["conv1.weight"]
    assert (np.abs(2 * step - moved) <= 1).all()
    np.testing.assert_allclose(
        middle["fc.bias"], (first["fc.bias"] + last["fc.bias"]) / 2, rtol=1e-5, atol=1e-7
    )
    assert between(int8, learned, 0.0).SerializeToString() == int8.SerializeToString()


def test_distilling_lowers_the_divergence_under_fresh_flips() -> None:
    fp32, int8, _ = plain()
    learned, _ = distill(int8, Twin(fp32), IMAGES, Recipe(ber=BER, steps=60, batch=32))
    assert guard().measure(learned).divergence < 0.9 * guard().measure(int8).divergence
    changed = {
        n for n, v in nets.arrays(learned).items() if not np.array_equal(v, nets.arrays(int8)[n])
    }
    assert changed
    assert all(name.endswith((".weight", ".bias")) for name in changed)


def test_flips_are_drawn_at_the_rate() -> None:
    space = fault_space(plain()[1]).select(kinds=("weights",))
    rng = np.random.default_rng(0)
    counts = [draw(space, BER, rng).count for _ in range(50)]
    assert np.mean(counts) == pytest.approx(space.size * BER, rel=0.05)
    assert len(draw(space, 1e-12, rng)) == 0


def test_work_counts_multiplications_and_elements() -> None:
    side = nets.SIDE**2
    convs = side * (16 * 9 + 16 * 16 * 9 + 32 * 16 * 9 + 32 * 16)
    elements = side * (16 + 16 + 16 + 16 + 32 + 32 + 32 + 32) + 32 + 32 + nets.CLASSES
    assert work_per_image(nets.residual()) == convs + 32 * nets.CLASSES + 100 * elements


def test_parts_of_a_batch_learn_what_the_whole_batch_does() -> None:
    fp32, int8, _ = plain()
    recipe = Recipe(ber=BER, steps=3, batch=24)
    whole = nets.arrays(distill(int8, Twin(fp32), IMAGES, recipe)[0])
    parts = nets.arrays(distill(int8, Twin(fp32), IMAGES, replace(recipe, part=7))[0])
    for name in ("conv1.bias", "fc.bias"):
        np.testing.assert_allclose(parts[name], whole[name], atol=2e-4)


def test_a_guard_repeats_itself_and_restores_the_memory() -> None:
    _, int8, _ = plain()
    first, again = guard().measure(int8), guard().measure(int8)
    assert first.summary() == again.summary()
    assert first.clean.shape == (64,)
    assert first.attacked.shape == (16,)
    assert 0.9 < first.agreement <= 1
    spoiled, _ = ruined(int8, Twin(plain()[0]), None, Recipe(ber=BER))
    assert first.disagreement < 0.1 < guard().measure(spoiled).disagreement


def test_weights_are_reconstructed_less_where_that_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32, int8, ranges = plain()
    judged = verdict.objections

    def not_the_first(candidate: Scores, kept: Sequence[Scores]) -> list[str]:
        asked.append(candidate)
        return ["too much"] if len(asked) == 3 else judged(candidate, kept)

    asked: list[Scores] = []
    monkeypatch.setattr(stage, "objections", not_the_first)
    made = adjust(int8, fp32, IMAGES, ranges=ranges, design=Design(BER), threads=1)
    whole, part = (s for s in made.record.steps if s["step"] == "reconstruct")
    assert (whole["strength"], whole["kept"]) == (1.0, False)
    assert part["strength"] == WEAKER
    assert part["kept"]
    means = [np.mean(list(step["scales"].values())) for step in (whole, part)]
    assert means[0] < means[1]
    assert [s["step"] for s in made.record.steps][:5] == [*STEPS[:3], "reconstruct", "distill"]


@pytest.mark.parametrize(
    ("balances", "refused", "shares", "kept"),
    [
        ({1.0: 0.9, 0.5: 0.8, 0.75: 0.7}, (), (0.5, 0.75), 1.0),
        ({1.0: 0.8, 0.5: 0.9, 0.25: 0.7}, (), (0.5, 0.25), 0.5),
        ({1.0: 0.8, 0.5: 0.7, 0.75: 0.9}, (), (0.5, 0.75), 0.75),
        ({1.0: 0.9, 0.5: 0.8, 0.75: 0.7}, (1.0,), (0.5, 0.75), 0.5),
        ({1.0: 0.9, 0.5: 0.8, 0.25: 0.7}, (1.0, 0.5), (0.5, 0.25), 0.25),
        ({1.0: 0.9, 0.5: 0.8, 0.25: 0.7}, (1.0, 0.5, 0.25), (0.5, 0.25), None),
    ],
)
def test_of_what_was_learned_the_share_of_the_best_balance_is_kept(
    balances: Mapping[float, float],
    refused: tuple[float, ...],
    shares: tuple[float, float],
    kept: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fp32, int8, ranges = plain()
    order = [1.0, *shares]
    found: dict[int, float] = {}  # share of the learned change by its scores

    def some_lose(candidate: Scores, before: Sequence[Scores]) -> list[str]:
        asked.append(candidate)
        if len(asked) <= 3:  # the steps before
            return []
        found[id(candidate)] = order[len(asked) - 4]
        return ["too much"] if found[id(candidate)] in refused else []

    asked: list[Scores] = []
    monkeypatch.setattr(stage, "objections", some_lose)
    monkeypatch.setattr(stage, "balance", lambda scores: balances[found[id(scores)]])
    with few_steps():
        made = adjust(int8, fp32, IMAGES, ranges=ranges, design=Design(BER), threads=1)
    whole, *backed = (s for s in made.record.steps if s["step"] in ("distill", "back off"))
    assert tuple(s["share"] for s in backed) == shares
    assert {s.get("share", 1.0): s["balance"] for s in (whole, *backed)} == balances
    assert [s.get("share", 1.0) for s in (whole, *backed) if s["kept"]] == [kept][
        : kept is not None
    ]
    assert all(s["loses"] for s in (whole, *backed) if not s["kept"])
