"""The ONNX Runtime backend: faults are in what runs, gone afterwards, and exactly those of the file."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from resq_deploy.errors import BackendError, FaultError, ModelError
from resq_deploy.faults import Fault, Flips
from resq_deploy.runtime.ort import OrtRunner
from tests.runtime import graphs


@pytest.fixture(scope="module", params=list(graphs.NETS))
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return graphs.quantized(request.param)


@pytest.fixture(scope="module")
def runner(model: onnx.ModelProto) -> Iterator[OrtRunner]:
    with OrtRunner(model, threads=2) as opened:
        yield opened


def flipped_file(model: onnx.ModelProto, flips: Flips) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in copy.graph.initializer:
        if tensor.name in flips:
            value = numpy_helper.to_array(tensor).copy()
            part = flips[tensor.name]
            value.reshape(-1).view(part.masks.dtype)[part.elements] ^= part.masks
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return copy


def test_a_fault_is_the_fault_in_the_file(model: onnx.ModelProto, runner: OrtRunner) -> None:
    images = graphs.images(model, 19)
    rng = np.random.default_rng(0)
    golden = runner(images)
    for count in (1, 2, 200):
        flips = runner.space.flips(rng.choice(runner.space.size, count, replace=False))
        with runner.faults(flips):
            got = runner(images)
        odd = runner.is_odd(runner.changed(flips))
        with OrtRunner(flipped_file(model, flips), threads=1, exact=odd) as fresh:
            assert got.tobytes() == fresh(images).tobytes()
    assert runner(images).tobytes() == golden.tobytes()


def test_every_layer_notices(model: onnx.ModelProto, runner: OrtRunner) -> None:
    assert runner.unnoticed(graphs.images(model, 8)) == []


@pytest.mark.parametrize("kind", ["bias", "scales", "zero-points", "float"])
def test_faults_outside_the_weights(model: onnx.ModelProto, runner: OrtRunner, kind: str) -> None:
    """Against the file computed node by node: the same but for codes at a rounding boundary."""
    if all(memory.kind != kind for memory in runner.space.memories):
        assert kind == "float"  # only the graphs with LayerNorm and constants have such parameters
        return
    space = runner.space.select(kinds=[kind])
    images = graphs.images(model, 3)
    rng = np.random.default_rng(1)
    with OrtRunner(model, exact=True, threads=1) as exact:
        for index in rng.choice(space.size, 12, replace=False):
            flips = space.flips(np.array([index]))
            with runner.faults(flips), exact.faults(flips):
                got, want = runner(images), exact(images)
            scale = np.nanmax(np.abs(want), initial=0.0)
            np.testing.assert_allclose(got, want, atol=0.05 * scale, rtol=1e-3)


def test_threads_and_batches_do_not_matter(model: onnx.ModelProto, runner: OrtRunner) -> None:
    images = graphs.images(model, 40)
    with OrtRunner(model, threads=1) as alone:
        assert alone(images).tobytes() == runner(images).tobytes()
    assert runner(images[:16]).tobytes() == runner(images)[:16].tobytes()


def test_memory_is_golden_after_an_exception(model: onnx.ModelProto, runner: OrtRunner) -> None:
    images = graphs.images(model, 2)
    golden = runner(images)
    flips = runner.space.flips(np.arange(0, 4000, 8))

    def fail() -> None:
        with runner.faults(flips):
            assert runner(images).tobytes() != golden.tobytes()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert runner(images).tobytes() == golden.tobytes()


def test_changed_golden_bytes_are_caught() -> None:
    with OrtRunner(graphs.quantized("resnet"), threads=1) as runner:
        memory = next(m for m in runner.space.memories if m.kind == "weights")
        raw = np.frombuffer(memory.value.data, np.uint8)
        flips = runner.space.flips_of([Fault(memory.name, 0, 0)])
        assert raw.size == memory.value.size
        runner._sums[memory.name] += 1
        with pytest.raises(BackendError, match="golden bytes"), runner.faults(flips):
            pass


def test_exact_mode_runs_the_file_node_by_node() -> None:
    model = graphs.quantized("resnet")
    with OrtRunner(model, exact=True, threads=1) as runner:
        assert runner.info["execution"] == "plain"
        assert runner.unnoticed(graphs.images(model, 4)) == []


def test_addresses_are_checked() -> None:
    with OrtRunner(graphs.quantized("vgg"), threads=1) as runner:
        with pytest.raises(FaultError, match="no tensor"):
            runner.space.flips_of([Fault("nowhere", 0, 0)])
        with pytest.raises(FaultError, match="has no bit"):
            runner.space.flips_of([Fault(runner.space.memories[0].name, 0, 99)])


def test_a_graph_that_takes_no_images_is_refused() -> None:
    model = graphs.quantized("vgg")
    model.graph.input[0].type.tensor_type.shape.dim[2].dim_param = "height"
    with pytest.raises(ModelError, match="C, H and W"):
        OrtRunner(model)


def test_a_file_with_float16_in_it_runs_by_onnx_runtimes_own_fusions() -> None:
    model = graphs.quantized("resnet")
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float16), "half"))
    x = graphs.images(model)
    with OrtRunner(model) as runner:
        assert runner.info["execution"] in ("stock", "plain")
        golden = runner(x)
        assert runner.unnoticed(x) == []
        assert np.array_equal(runner(x), golden)
