"""Ranges chosen by the logits: what the search tries, and that it finds what a local error hides."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from resq_deploy.console import Reporter
from resq_deploy.export import qdq, ranges, rules
from resq_deploy.export.calibrate import Probe, calibrate
from resq_deploy.export.fisher import rounding_divergence
from resq_deploy.export.grid import Grid
from tests.export import nets

IMAGES = nets.images(32)


def common_mode() -> onnx.ModelProto:
    """A residual network whose logits share one huge, useless term of one channel."""
    model = nets.residual()
    for tensor in model.graph.initializer:
        value = onnx.numpy_helper.to_array(tensor).copy()
        if tensor.name in ("conv2.bias", "conv2.weight"):
            value[0] *= 150
        if tensor.name == "fc.weight":
            value[:, 0] = 0.5
        tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return model


def divergence(model: onnx.ModelProto, method: str) -> float:
    """Mean KL of FP32 from the INT8 graph with these ranges, on other images."""
    found = calibrate(model, rules.plan(model).activations, [IMAGES], method, threads=1)  # type: ignore[arg-type]
    int8 = qdq.quantize_graph(model, found)
    fresh = nets.images(64, seed=3)
    p, q = (
        ranges.log_softmax(
            np.concatenate([v["logits"] for _, v in Probe(m, ["logits"], 1).run(fresh)])
        )
        for m in (model, int8)
    )
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def test_the_logits_decide_where_a_local_error_misleads() -> None:
    model = common_mode()
    alone = {m: divergence(model, m) for m in ("minmax", "mse", "percentile", "entropy")}
    assert divergence(model, "auto") <= 1.3 * min(alone.values())


def test_a_search_that_could_not_gain_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.residual()
    tried: list[object] = []
    monkeypatch.setattr(ranges, "GOOD_ENOUGH", np.inf)
    original = ranges._Trial.divergence

    def counted(self: ranges._Trial, grids: dict[str, Grid]) -> float:
        tried.append(grids)
        return original(self, grids)

    monkeypatch.setattr(ranges._Trial, "divergence", counted)
    found = ranges.search(
        model, {"relu.out": {"a": Grid(0.01), "b": Grid(0.02)}}, IMAGES, threads=1
    )
    assert len(tried) == 2
    assert found["relu.out"] in ("a", "b")


def test_the_better_scale_of_each_tensor_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "GOOD_ENOUGH", 0.0)
    model = nets.residual()
    good = calibrate(model, ["relu.out", "relu2.out"], [IMAGES], "mse", threads=1)
    candidates = {
        "relu.out": {"x": Grid(good["relu.out"].scale * 9), "y": good["relu.out"].grid},
        "relu2.out": {"x": good["relu2.out"].grid, "y": Grid(good["relu2.out"].scale / 9)},
    }
    found = ranges.search(model, candidates, IMAGES, threads=1, chunk=5)
    assert found == {"relu.out": "y", "relu2.out": "x"}


def test_nothing_to_choose_is_nothing() -> None:
    assert ranges.search(nets.residual(), {}, IMAGES) == {}


@pytest.mark.parametrize("unsigned", [False, True])
def test_the_trial_graph_rounds_as_the_int8_graph_does(unsigned: bool) -> None:
    model = nets.chain()
    tensor = "relu.out"
    grid = calibrate(model, [tensor], [IMAGES], "minmax", unsigned=unsigned, threads=1)[tensor].grid
    made = ranges.rounded_graph(model, {tensor: unsigned})
    onnx.checker.check_model(made, full_check=True)
    session = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {"input": IMAGES, **ranges.grid_inputs({tensor: grid})}
    found = session.run(["logits"], given)[0]
    exact = next(v for _, v in Probe(model, [tensor, "logits"], 1).run(IMAGES[:1]))
    assert not np.array_equal(found[:1], exact["logits"])
    np.testing.assert_allclose(found[:1], exact["logits"], atol=0.1 * np.abs(exact["logits"]).max())
    small = ranges.grid_inputs({tensor: replace(grid, scale=1e-6)})
    tiny = session.run(["logits"], given | small)[0]
    assert np.abs(tiny - found).max() > 0.1 * np.abs(found).max()


def test_candidates_that_are_alike_are_tried_once() -> None:
    steps = {"a": 1.0, "b": 1.01, "c": 2.0, "d": 1.99, "e": 0.5}
    grids = {name: Grid(step) for name, step in steps.items()}
    assert ranges._others(grids, "a") == ["c", "e"]
    assert ranges._others(grids, "e") == ["a", "c"]


def test_gradients_price_each_scale_of_each_tensor_by_what_it_costs_alone() -> None:
    model = nets.residual()
    names = ["relu.out", "relu1.out", "relu2.out"]
    good = calibrate(model, names, [IMAGES], "minmax", threads=1)
    candidates = {
        n: {"fine": Grid(s), "coarse": Grid(12 * s), "clipped": Grid(s / 3)}
        for n, s in ((name, good[name].scale) for name in names)
    }
    priced = rounding_divergence(model, candidates, nets.images(400, seed=5))
    for name in names:
        trial = ranges._Trial(model, {name: False}, nets.images(400, seed=5), 64, 1)
        measured = {m: trial.divergence({name: s}) for m, s in candidates[name].items()}
        assert min(priced[name], key=lambda m: priced[name][m]) == "fine"
        assert priced[name]["coarse"] == pytest.approx(measured["coarse"], rel=0.7)


def test_prices_are_asked_for_only_where_the_start_is_not_good_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ranges, "TRIES", 0)
    model = nets.residual()
    good = calibrate(model, ["relu.out", "relu2.out"], [IMAGES], "minmax", threads=1)
    candidates = {n: {"x": Grid(r.scale / 40), "y": Grid(r.scale / 40)} for n, r in good.items()}
    candidates["relu.out"]["y"] = good["relu.out"].grid
    candidates["relu2.out"]["x"] = good["relu2.out"].grid

    def price() -> dict[str, dict[str, float]]:
        return rounding_divergence(model, candidates, IMAGES)

    found = ranges.search(model, candidates, IMAGES, price=price, threads=1)
    assert found == {"relu.out": "y", "relu2.out": "x"}  # no uniform choice has both

    def never() -> dict[str, dict[str, float]]:
        raise AssertionError

    monkeypatch.setattr(ranges, "GOOD_ENOUGH", np.inf)
    ranges.search(model, candidates, IMAGES, price=never, threads=1)


@pytest.mark.parametrize("most", [0, 3])
def test_the_search_ends_after_so_many_tries(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    model, methods = nets.residual(), 3
    good = calibrate(model, ["relu.out", "relu2.out"], [IMAGES], "minmax", threads=1)
    candidates = {n: {str(k): Grid(r.scale * k) for k in (20, 30, 40)} for n, r in good.items()}
    runs = []
    once = ranges._Trial.divergence

    def counted(self: ranges._Trial, grids: dict[str, Grid]) -> float:
        runs.append(grids)
        return once(self, grids)

    monkeypatch.setattr(ranges._Trial, "divergence", counted)
    monkeypatch.setattr(ranges, "TRIES", most)
    monkeypatch.setattr(ranges, "GOOD_ENOUGH", -1.0)
    said = StringIO()
    reporter = Reporter(quiet=False, stream=said)
    ranges.search(model, candidates, IMAGES, threads=1, reporter=reporter)
    assert len(runs) == methods + most
    assert f"one method for all ranges: {methods}/{methods} methods" in said.getvalue()
    assert ("choosing ranges: 3/3 tries" in said.getvalue()) == bool(most)


def test_a_graph_that_the_twin_cannot_run_has_no_prices() -> None:
    model = nets.residual()
    model.graph.node[1].op_type = "Hardmax"
    assert rounding_divergence(model, {"relu.out": {"a": Grid(0.1)}}, IMAGES) == {}


def test_judges_are_the_first_images_and_the_extreme_ones_each_for_what_it_stands_for() -> None:
    judges = ranges.Judges(3)
    images = np.arange(10, dtype=np.float32).reshape(10, 1, 1, 1)
    peaks = {"a": [0, 9, 1, 1, 1, 1, 1, 1, 1, 1], "b": [0, 0, 0, 0, 0, 0, 0, -5, 0, 4]}
    values = {name: np.array(v, np.float32).reshape(10, 1) for name, v in peaks.items()}
    for part in (slice(0, 2), slice(2, 8), slice(8, 10)):
        judges.see(images[part], {name: v[part] for name, v in values.items()})
    found, weights = ranges.drawn([judges, ranges.Judges(3)])
    shares = dict(zip(found[:, 0, 0, 0].tolist(), weights.tolist(), strict=True))
    assert shares == pytest.approx({0: 0.4, 2: 0.4, 1: 0.1, 7: 0.1})  # 0 and 2 stand for eight


def test_a_range_serves_the_rare_image_that_needs_it() -> None:
    """One image of 300, beyond the first ones, in which the network's activations are 40 times as large."""
    model = nets.residual()
    images = nets.images(300, seed=3)
    images[np.arange(300) != 200] *= np.float32(1 / 40)
    found = calibrate(model, ["relu.out"], [images[:150], images[150:]], threads=1)["relu.out"]
    tight = calibrate(model, ["relu.out"], [images[:200]], threads=1)["relu.out"]
    assert found.high > 10 * tight.high
