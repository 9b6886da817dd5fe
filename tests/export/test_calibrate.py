"""Histograms that do not depend on batching, methods with known answers, and ranges of a real graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from numpy.typing import NDArray
from onnx import TensorProto, helper

from resq_deploy.errors import DataError, ModelError
from resq_deploy.export import histogram as methods
from resq_deploy.export.calibrate import METHODS, Method, Probe, Range, calibrate, choose
from resq_deploy.export.histogram import BINS, Histogram

FLOATS = st.floats(-(2.0**20), 2.0**20, width=32)
ARRAYS = npst.arrays(np.float32, st.integers(1, 60), elements=FLOATS)


def of(*parts: NDArray[np.float32]) -> Histogram:
    made = Histogram()
    for part in parts:
        made.add(part)
    return made


def same(a: Histogram, b: Histogram) -> bool:
    exact = (a.width, a.zeros, a.total, a.low, a.high) == (b.width, b.zeros, b.total, b.low, b.high)
    return exact and np.array_equal(a.counts, b.counts)


def bell(size: int = 20000, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(size).astype(np.float32)


@given(st.lists(ARRAYS, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_a_histogram_does_not_depend_on_order_or_batching(
    parts: list[NDArray[np.float32]], random: object
) -> None:
    whole = of(np.concatenate(parts))
    assert same(of(*parts), whole)
    assert same(of(*parts[::-1]), whole)


@given(ARRAYS, ARRAYS)
def test_merging_equals_seeing_both(a: NDArray[np.float32], b: NDArray[np.float32]) -> None:
    assert same(of(a).merged(of(b)), of(np.concatenate([a, b])))


@given(ARRAYS)
def test_every_value_is_counted_in_its_bin(values: NDArray[np.float32]) -> None:
    seen = of(values)
    assert seen.counts.sum() + seen.zeros == seen.total == values.size
    assert seen.peak == float(np.abs(values).max())
    assert seen.peak <= BINS * seen.width
    assert seen.peak == 0 or seen.peak > (BINS / 2 - 1) * seen.width


def test_memory_does_not_grow_with_the_samples() -> None:
    seen = Histogram()
    for scale in (1e-3, 1.0, 1e4):
        seen.add(bell() * np.float32(scale))
    assert seen.counts.shape == (BINS,)
    assert seen.total == 60000


@pytest.mark.parametrize("threshold", [0.7, 2.0, 3.5])
def test_noise_is_what_quantizing_costs(threshold: float) -> None:
    values = bell()
    scale = threshold / 127
    exact = np.square(values - np.clip(np.rint(values / scale), -127, 127) * scale).mean()
    assert methods.noise(of(values), threshold) == pytest.approx(float(exact), rel=0.02)


def test_thresholds_of_a_bell_curve_with_an_outlier() -> None:
    seen = of(bell(200000), np.array([9.0], np.float32))
    assert methods.minmax(seen) == 9.0
    assert methods.percentile(seen, 99.0) == pytest.approx(2.576, abs=0.1)
    assert 3 < methods.mse(seen) < 8
    assert 2 < methods.entropy(seen) < 8


def test_entropy_keeps_all_of_a_flat_distribution() -> None:
    flat = np.linspace(-1, 1, 50001, dtype=np.float32)
    assert methods.entropy(of(flat)) > 0.97


def test_mse_is_the_best_of_a_fine_grid() -> None:
    seen = of(bell(), bell(50) * 8)
    least = min(methods.noise(seen, t) for t in np.linspace(1, seen.peak, 400))
    assert methods.noise(seen, methods.mse(seen)) <= least * 1.03


@pytest.mark.parametrize("method", METHODS)
def test_zeros_get_a_positive_scale(method: Method) -> None:
    made = choose(of(np.zeros(9, np.float32)), Histogram(), method)
    assert made.scale > 0
    assert made.low == made.high == 0.0
    assert made.sqnr_db == 200.0


def test_auto_is_the_method_with_the_least_error() -> None:
    seen = of(bell(200000), np.array([9.0], np.float32))
    every = {name: choose(seen, Histogram(), name) for name in METHODS if name != "auto"}
    made = choose(seen, Histogram(), "auto")
    assert made.sqnr_db == max(r.sqnr_db for r in every.values())
    assert made == every[made.method]  # type: ignore[index]


def test_attacked_values_widen_a_range_that_clean_ones_would_clip() -> None:
    clean, attacked = of(bell()), of(bell(seed=1) * 4)
    alone, both = choose(clean, Histogram()), choose(clean, attacked)
    assert both.scale > 1.5 * alone.scale
    assert both.sqnr_db < alone.sqnr_db


def test_a_range_is_symmetric_and_its_scale_covers_it() -> None:
    made = choose(of(np.abs(bell())), Histogram(), "percentile")
    assert made.low >= 0
    assert made.scale == pytest.approx(max(-made.low, made.high) / 127)


def network(weight: float = 2.0, batch: int | str = "batch") -> onnx.ModelProto:
    """images * weight -> relu -> reshape."""
    nodes = [
        helper.make_node("Mul", ["input", "w"], ["scaled"]),
        helper.make_node("Relu", ["scaled"], ["relu"]),
        helper.make_node("Flatten", ["relu"], ["logits"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 16])],
        [helper.make_tensor("w", TensorProto.FLOAT, [1], [weight])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def images(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).random((count, 1, 4, 4), dtype=np.float32)


@pytest.mark.parametrize("method", METHODS)
def test_ranges_of_a_graph(method: Method) -> None:
    found = calibrate(network(), ["input", "scaled", "relu", "scaled"], [images(50)], method)
    assert list(found) == ["input", "scaled", "relu"]
    assert found["scaled"].high == pytest.approx(2 * found["input"].high, rel=1e-3)
    assert all(isinstance(r, Range) and r.sqnr_db > 30 for r in found.values())


@settings(deadline=None, max_examples=10)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_the_same_images_in_other_batches_give_the_same_ranges(sizes: Sequence[int]) -> None:
    whole = images(sum(sizes))
    parts = np.split(whole, np.cumsum(sizes)[:-1])
    one = calibrate(network(), ["relu"], [whole])["relu"]
    many = calibrate(network(), ["relu"], parts)["relu"]
    assert (one.low, one.high, one.scale, one.method) == (
        many.low,
        many.high,
        many.scale,
        many.method,
    )


def test_adversarial_images_are_seen_too() -> None:
    clean = images(20) * np.float32(0.1)
    alone = calibrate(network(), ["relu"], [clean], "minmax")["relu"]
    both = calibrate(network(), ["relu"], [clean], "minmax", adversarial=[images(20)])["relu"]
    assert both.scale > 5 * alone.scale


@pytest.mark.parametrize("count", [3, 4, 7])
def test_a_graph_with_a_fixed_batch_counts_each_image_once(count: int) -> None:
    seen = [size for size, _ in Probe(network(batch=4), ["relu"], 1).run(images(count))]
    assert sum(seen) == count
    rows = [v["relu"].shape[0] for _, v in Probe(network(batch=4), ["relu"], 1).run(images(count))]
    assert rows == seen


def test_large_activations_are_computed_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resq_deploy.export.calibrate._CHUNK_BYTES", 16 * 4 * 5)
    sizes = [size for size, _ in Probe(network(), ["relu"], 1).run(images(17))]
    assert sizes == [1, 5, 5, 5, 1]


def test_no_images_is_refused() -> None:
    with pytest.raises(DataError, match="no images"):
        calibrate(network(), ["relu"], [])


def test_an_unknown_tensor_is_refused() -> None:
    with pytest.raises(ModelError, match="no tensor 'nowhere'"):
        calibrate(network(), ["nowhere"], [images(1)])


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(DataError, match="unknown calibration method"):
        calibrate(network(), ["relu"], [images(1)], "median")  # type: ignore[arg-type]


def test_images_of_another_rank_are_refused() -> None:
    with pytest.raises(DataError, match="expected"):
        calibrate(network(), ["relu"], [np.zeros((3, 4), np.float32)])


def test_values_that_are_not_finite_name_the_tensor() -> None:
    broken = images(2)
    broken[1, 0, 0, 0] = np.inf
    with pytest.raises(DataError, match="'scaled' is not finite"):
        calibrate(network(), ["scaled"], [broken])
