"""Suffix runs give the bits of full runs, for every network and every fault model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from resq_deploy.fault_models import parse, trial_rng
from resq_deploy.faults import Flips
from resq_deploy.runtime import sharing
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.suffix import SuffixEngine
from tests.runtime import graphs

IMAGES = 37
MODELS = ["seu", "bits:3", "bits:40", "ber:1e-4", "ber:1e-2", "mbu:4", "stuck-at-0:5"]
MODELS += ["stuck-at-1:5", "byte", "word"]


@pytest.fixture(scope="module", params=list(graphs.NETS))
def engine(request: pytest.FixtureRequest) -> Iterator[SuffixEngine]:
    model = graphs.quantized(request.param)
    with OrtRunner(model, threads=2) as runner:
        yield SuffixEngine(runner, graphs.images(model, IMAGES))


def same_as_full_run(engine: SuffixEngine, flips: Flips) -> bool:
    with engine.runner.faults(flips):
        want = engine.runner(engine.images)
    return engine.run(flips).tobytes() == want.tobytes()


@pytest.mark.parametrize("word", MODELS)
@settings(max_examples=5, deadline=None)
@example(seed=965909)  # a signalling NaN among the scales
@given(seed=st.integers(0, 2**31))
def test_bits_of_a_full_run(engine: SuffixEngine, word: str, seed: int) -> None:
    flips = parse(word).sample(engine.runner.space, trial_rng(seed, 0))
    assert same_as_full_run(engine, flips)


@pytest.mark.parametrize("kind", ["weights", "bias", "scales", "zero-points"])
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**31), count=st.integers(1, 3))
def test_every_kind_of_memory(engine: SuffixEngine, kind: str, seed: int, count: int) -> None:
    space = engine.runner.space.select(kinds=[kind])
    chosen = np.random.default_rng(seed).choice(space.size, count, replace=False)
    assert same_as_full_run(engine, space.flips(chosen))


def test_golden_again_afterwards(engine: SuffixEngine) -> None:
    golden = engine.golden()
    engine.run(engine.runner.space.flips(np.arange(64)))
    assert engine.golden().tobytes() == golden.tobytes()
    assert engine.runner(engine.images).tobytes() == golden.tobytes()
    assert engine.run(Flips({})).tobytes() == golden.tobytes()


def test_work_is_saved(engine: SuffixEngine) -> None:
    """Else the engine could be exact by always running in full."""
    rng = np.random.default_rng(0)
    before, possible = engine.work.layer_images, engine.work.possible
    space = engine.runner.space.select(kinds=["weights"])
    full = engine.work.full
    for index in rng.choice(space.size, 40, replace=False):
        engine.run(space.flips(np.array([index])))
    assert engine.work.full == full
    assert engine.work.layer_images - before < 0.6 * (engine.work.possible - possible)
    assert engine.info["by_channel"] > 0


@pytest.mark.parametrize("memory", [0, 20_000, 60_000])
def test_any_memory_budget(memory: int) -> None:
    model = graphs.quantized("resnet")
    with OrtRunner(model, threads=1) as runner:
        engine = SuffixEngine(runner, graphs.images(model, IMAGES), memory=memory)
        assert engine.info["bytes"] <= memory + engine.golden().nbytes
        rng = np.random.default_rng(memory)
        for count in (1, 1, 1, 2, 5):
            chosen = rng.choice(runner.space.size, count, replace=False)
            assert same_as_full_run(engine, runner.space.flips(chosen))


def test_a_masked_fault_costs_one_layer() -> None:
    """The last weight of a dead input: no image differs behind the layer, so none goes on."""
    model = graphs.quantized("resnet")
    with OrtRunner(model, threads=1) as runner:
        engine = SuffixEngine(runner, np.zeros((8, 3, 8, 8), np.float32))
        first = next(m for m in runner.space.memories if m.kind == "weights")
        flips = runner.space.select(layers=[first.layer], kinds=["weights"]).flips(np.array([7]))
        before = engine.work.layer_images
        assert engine.run(flips).tobytes() == engine.golden().tobytes()
        assert engine.work.layer_images - before == 8


@pytest.mark.parametrize("word", MODELS)
@settings(max_examples=3, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_a_block_gives_the_bits_of_single_runs(engine: SuffixEngine, word: str, seed: int) -> None:
    """Any mixture of trials: those that can share work, those that cannot, empty ones, equal ones."""
    space = engine.runner.space
    some = [parse(word).sample(space, trial_rng(seed, i)) for i in range(4)]
    some += [parse("seu").sample(space, trial_rng(seed, i)) for i in range(12)]
    block = [*some, Flips({}), some[-1]]
    assert [v.tobytes() for v in engine.run_many(block)] == [engine.run(f).tobytes() for f in block]
    assert engine.run_many([]) == []


@pytest.mark.parametrize("kind", ["weights", "bias", "scales", "zero-points"])
@pytest.mark.parametrize("memory", [2**10, 2**24])
def test_blocks_of_every_kind_of_memory(
    engine: SuffixEngine, kind: str, memory: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "ROWS_BYTES", memory)
    space = engine.runner.space.select(kinds=[kind])
    chosen = np.random.default_rng(memory).choice(space.size, 24, replace=False)
    block = [space.flips(chosen[i : i + 1]) for i in range(24)]
    assert [v.tobytes() for v in engine.run_many(block)] == [engine.run(f).tobytes() for f in block]


@pytest.mark.parametrize("memory", [0, 20_000, 60_000])
def test_blocks_with_any_memory_budget(memory: int) -> None:
    model = graphs.quantized("resnet")
    with OrtRunner(model, threads=1) as runner:
        engine = SuffixEngine(runner, graphs.images(model, IMAGES), memory=memory)
        space = runner.space.select(kinds=["weights"])
        block = [space.flips(np.array([i])) for i in range(0, space.size, space.size // 40)]
        for flips, logits in zip(block, engine.run_many(block), strict=True):
            with runner.faults(flips):
                assert logits.tobytes() == runner(engine.images).tobytes()


def test_a_block_shares_its_work() -> None:
    """Sixteen faults of one layer: its input is prepared once, and layers behind it see all rows at once."""
    model = graphs.quantized("resnet")
    with OrtRunner(model, threads=1) as runner:
        engine = SuffixEngine(runner, graphs.images(model, 4))
        first = next(m for m in runner.space.memories if m.kind == "weights")
        space = runner.space.select(layers=[first.layer], kinds=["weights"], bits=[6])
        block = [space.flips(np.array([i])) for i in range(16)]
        runs = [_sessions_run(lambda: [engine.run(f) for f in block])]
        runs += [_sessions_run(lambda: engine.run_many(block))]
        assert runs[1] * 3 < runs[0]
        assert (engine.work.full, engine.work.trials) == (0, 32)


def _sessions_run(work: Callable[[], object]) -> int:
    with pytest.MonkeyPatch.context() as patch:
        calls: list[int] = []
        run = ort.InferenceSession.run

        def counted(self: ort.InferenceSession, *args: Any) -> Any:
            calls.append(1)
            return run(self, *args)

        patch.setattr(ort.InferenceSession, "run", counted)
        work()
        return len(calls)


def test_a_thin_stem_is_recomputed_by_channel() -> None:
    """Its weights run with channels of zeros beside them, which are no part of the fault space."""
    model = graphs.quantized("vgg")
    with OrtRunner(model, threads=1) as runner:
        engine = SuffixEngine(runner, graphs.images(model, 4))
        first = next(m for m in runner.space.memories if m.kind == "weights")
        assert first.value.shape[1] == 3
        space = runner.space.select(layers=[first.layer], kinds=["weights"])
        for index in range(80):
            assert same_as_full_run(engine, space.flips(np.array([index])))
        assert engine.work.full == 0
        assert engine.work.layer_images < 0.8 * engine.work.possible


def test_exact_mode_runs_in_full() -> None:
    model = graphs.quantized("vgg")
    with OrtRunner(model, exact=True, threads=1) as runner:
        engine = SuffixEngine(runner, graphs.images(model, 4))
        assert same_as_full_run(engine, runner.space.flips(np.array([12, 345])))
        assert engine.work.full == engine.work.trials == 1
