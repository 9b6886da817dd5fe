"""Campaigns on the numpy double: figures, stopping, coverage, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from resq_deploy.errors import BackendError, CampaignError, FaultError
from resq_deploy.fault_lists import FaultList
from resq_deploy.fault_models import MODELS, parse
from resq_deploy.faults import Fault, Flips
from resq_deploy.metrics import Logits, accuracy, top1
from resq_deploy.runtime.campaign import Inline, Rule, run_campaign
from resq_deploy.runtime.double import NumpyRunner
from resq_deploy.runtime.trials import Job, PlainEngine, Row

RUNNER = NumpyRunner()
SAMPLE = RUNNER.sample(32)
WEIGHTS = RUNNER.space.select(kinds=["weights"])


def job(text: str = "seu", seed: int = 0, **space: Any) -> Job:
    model = parse(text)
    return Job(model, WEIGHTS.select(**space) if space else WEIGHTS, seed, SAMPLE.labels)


def engine() -> PlainEngine:
    return PlainEngine(RUNNER, SAMPLE.images)


@pytest.mark.parametrize(
    "text", ["seu", "bits:9", "ber:0.01", "mbu:3", "stuck-at-0", "stuck-at-1:0.1", "byte", "word"]
)
def test_figures_are_those_of_the_trials(text: str) -> None:
    work = job(text)
    result = run_campaign(Inline(engine()), work, rule=Rule(trials=25))
    golden = RUNNER(SAMPLE.images)
    right, changed, same, flips = [], [], [], 0
    by_image = np.zeros(32, np.int64)
    for i in range(25):
        drawn = work.model.trial(WEIGHTS, 0, i).flips
        with RUNNER.faults(drawn):
            logits = RUNNER(SAMPLE.images)
        flips += drawn.count
        right.append(accuracy(logits, SAMPLE.labels))
        by_image += top1(logits) == SAMPLE.labels
        changed.append(np.mean(logits.argmax(axis=1) != golden.argmax(axis=1)))
        same.append(np.mean((logits == golden).all(axis=1)))
    assert result.trials == 25
    assert result.flips == flips
    assert result.accuracy.mean == pytest.approx(np.mean(right))
    assert result.sdc1.mean == pytest.approx(np.mean(changed))
    assert result.masked.mean == pytest.approx(np.mean(same))
    assert result.accuracy_quantiles["0"] == min(right)
    assert result.accuracy_quantiles["1"] == max(right)
    assert result.golden_accuracy == accuracy(golden, SAMPLE.labels)
    assert result.right == tuple(by_image)
    assert [hits / 32 for hits in result.by_trial] == right
    assert result.spread is not None
    assert result.spread.variance > 0
    assert result.coverage == 1
    assert result.images_per_second > 0


def test_every_model_of_the_table_runs() -> None:
    for word, model in MODELS.items():
        takes = model.takes
        text = word if takes == "nothing" else f"{word}:{'0.01' if takes == 'rate' else '2'}"
        assert run_campaign(Inline(engine()), job(text), rule=Rule(trials=3)).trials == 3


def test_weights_are_golden_after_a_campaign() -> None:
    before = RUNNER(SAMPLE.images)
    run_campaign(Inline(engine()), job("ber:0.1"), rule=Rule(trials=5))
    assert (RUNNER(SAMPLE.images) == before).all()


def test_tables_by_layer_and_bit() -> None:
    result = run_campaign(Inline(engine()), job(), rule=Rule(trials=200))
    assert [v.name for v in result.layers] == ["fc1", "fc2"]
    assert [v.name for v in result.bits] == [str(b) for b in range(8)]
    assert (
        sum(v.locations for v in result.layers)
        == sum(v.locations for v in result.bits)
        == WEIGHTS.size
    )
    assert sum(v.trials for v in result.layers) == sum(v.trials for v in result.bits) == 200
    assert sum(c.trials for c in result.cells) == 200
    mean = sum(v.sdc1.mean * v.trials for v in result.layers) / 200
    assert mean == pytest.approx(result.sdc1.mean)
    assert result.bits[7].sdc1.mean > result.bits[0].sdc1.mean
    assert set(result.stratified) == {"layer", "bit"}
    by_size = sum(v.sdc1.mean * v.locations / WEIGHTS.size for v in result.bits)
    assert result.stratified["bit"].mean == pytest.approx(by_size)


def test_spread_trials_have_no_tables() -> None:
    result = run_campaign(Inline(engine()), job("ber:0.05"), rule=Rule(trials=5))
    assert (result.layers, result.bits, result.cells, result.stratified) == ((), (), (), {})
    assert run_campaign(Inline(engine()), job("byte"), rule=Rule(trials=50)).layers


def test_layers_that_no_trial_hit_are_listed_as_unknown() -> None:
    result = run_campaign(Inline(engine()), job(), rule=Rule(trials=1))
    empty = [v for v in result.layers if v.trials == 0]
    assert [(v.sdc1.low, v.sdc1.high) for v in empty] == [(0.0, 1.0)]


def test_auto_stops_as_soon_as_both_intervals_are_narrow() -> None:
    rule = Rule(margin=0.05)
    result = run_campaign(Inline(engine()), job(), rule=rule)
    assert result.accuracy.margin <= 0.05
    assert result.sdc1.margin <= 0.05
    assert "within 0.05" in result.stopped
    shorter = run_campaign(Inline(engine()), job(), rule=Rule(trials=result.trials - 2))
    assert max(shorter.accuracy.margin, shorter.sdc1.margin) > 0.05


def test_auto_gives_up_at_the_most_trials_and_says_so() -> None:
    result = run_campaign(Inline(engine()), job("ber:0.1"), rule=Rule(margin=0.02, max_trials=150))
    assert result.trials == 150
    assert "the most allowed" in result.stopped


@pytest.mark.parametrize(
    ("text", "space", "different"),
    [
        ("seu", {"layers": ["fc2"], "bits": [7]}, 160),
        ("stuck-at-1", {"layers": ["fc2"], "bits": [7]}, 160),
        ("mbu:1280", {}, 769 + 1),
        ("seu", {}, WEIGHTS.size),
    ],
)
def test_margins_that_the_space_cannot_give(
    text: str, space: dict[str, Any], different: int
) -> None:
    rule = Rule(margin=0.0005, max_trials=10**9)
    with pytest.raises(CampaignError, match=f"only {different} different ones"):
        run_campaign(Inline(engine()), job(text, **space), rule=rule)


def test_a_margin_that_needs_more_trials_than_allowed() -> None:
    with pytest.raises(CampaignError, match="at most 1000 are allowed"):
        run_campaign(Inline(engine()), job("ber:0.1"), rule=Rule(margin=0.001, max_trials=1000))


def test_no_trials_are_no_campaign() -> None:
    with pytest.raises(CampaignError, match="at least 1"):
        run_campaign(Inline(engine()), job(), rule=Rule(trials=0))


def test_a_fault_list_is_run_to_its_end() -> None:
    trials = [[Fault("fc1.weight", 0, 7)], [Fault("fc2.weight", 3, 6), Fault("fc1.bias", 0, 30)]]
    model = FaultList(trials)
    work = Job(model, RUNNER.space, 0, SAMPLE.labels)
    result = run_campaign(Inline(engine()), work, rule=Rule(margin=1e-4))
    assert (result.trials, result.flips) == (2, 3)
    assert "end of the fault list" in result.stopped
    assert run_campaign(Inline(engine()), work, rule=Rule(trials=9)).trials == 2


def test_a_fault_that_the_space_does_not_have() -> None:
    work = Job(FaultList([[Fault("fc9.weight", 0, 7)]]), RUNNER.space, 0, SAMPLE.labels)
    with pytest.raises(FaultError, match=r"no tensor 'fc9\.weight'"):
        run_campaign(Inline(engine()), work, rule=Rule(trials=1))


class Half(NumpyRunner):
    """Reaches only the even elements of fc1, and nothing of fc2."""

    def unreachable(self, flips: Flips) -> int:
        lost = 0
        for name, part in flips.items():
            odd = part.elements % 2 == 1 if name.startswith("fc1") else part.elements >= 0
            lost += int(np.bitwise_count(part.masks[odd]).sum())
        return lost


@pytest.mark.parametrize("text", ["seu", "ber:0.05"])
def test_what_is_out_of_reach_is_counted_and_not_skipped_in_silence(text: str) -> None:
    half = Half()
    result = run_campaign(Inline(PlainEngine(half, SAMPLE.images)), job(text), rule=Rule(trials=60))
    drawn = [f for i in range(60) for f in parse(text).trial(WEIGHTS, 0, i).flips.faults()]
    reached = [f for f in drawn if f.tensor == "fc1.weight" and f.element % 2 == 0]
    assert (result.flips, result.unreachable) == (len(reached), len(drawn) - len(reached))
    assert result.coverage == len(reached) / len(drawn)
    assert result.trials + result.missed == 60
    assert (result.missed > 0) == (text == "seu")
    assert len(result.by_trial) == (0 if result.missed else 60)  # trials have lost their numbers
    assert result.accuracy.n == result.trials


class Broken(PlainEngine):
    """Fails in one way whenever the sign bit of a weight is flipped."""

    def __init__(self, error: Exception) -> None:
        super().__init__(RUNNER, SAMPLE.images)
        self.error = error

    def run(self, flips: Flips) -> Logits:
        if any(f.bit == 7 for f in flips.faults()):
            raise self.error
        return super().run(flips)


def test_a_run_that_fails_is_an_outcome() -> None:
    result = run_campaign(Inline(Broken(RuntimeError("kernel"))), job(), rule=Rule(trials=60))
    hits = result.bits[7].trials
    assert result.failed == {"error": hits, "crash": 0, "hang": 0}
    assert hits > 0
    assert result.due.mean == pytest.approx(hits / 60)
    assert result.bits[7].sdc1.mean == 1.0


@pytest.mark.parametrize("error", [BackendError("memory is not back"), TypeError("a bug")])
def test_a_mistake_of_ours_is_no_outcome(error: Exception) -> None:
    with pytest.raises(type(error)):
        run_campaign(Inline(Broken(error)), job(), rule=Rule(trials=60))


def test_figures_are_json_and_repeatable() -> None:
    found = [run_campaign(Inline(engine()), job(), rule=Rule(trials=20)) for _ in range(2)]
    assert found[0].figures() == found[1].figures()
    assert json.loads(found[0].figures())["sdc1"]["n"] == 20
    other = run_campaign(Inline(engine()), job(seed=1), rule=Rule(trials=20))
    assert other.digest != found[0].digest


class Shuffled(Inline):
    """Finishes trials out of order, as workers do."""

    def run(self, job: Job, trials: Iterator[int]) -> Iterator[list[Row]]:
        held: list[Row] = []
        for rows in super().run(job, trials):
            held += rows
            if len(held) >= 7:
                yield [held.pop(k) for k in (5, 1, 3)]
        if held:
            yield held[::-1]


@pytest.mark.parametrize("rule", [Rule(trials=40), Rule(margin=0.08)])
def test_the_order_in_which_trials_finish_is_nothing(rule: Rule) -> None:
    plain = run_campaign(Inline(engine()), job(), rule=rule)
    assert run_campaign(Shuffled(engine(), 0.0), job(), rule=rule).figures() == plain.figures()


def test_the_double_notices_memory_that_is_not_restored() -> None:
    runner = NumpyRunner()
    flips = parse("seu").trial(runner.space, 0, 0).flips
    (name,) = flips
    with pytest.raises(BackendError, match="not back"), runner.faults(flips):
        runner._live[name].reshape(-1)[0] += 1


def _peak(trials: int) -> int:
    tracemalloc.start()
    run_campaign(Inline(engine()), job(), rule=Rule(trials=trials))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_trials() -> None:
    _peak(10)
    few, many = _peak(100), _peak(1500)
    assert many < few + 20_000, "a kept row has about 500 bytes"
