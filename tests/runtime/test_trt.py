"""The TensorRT runner against a stand-in for library and GPU; refusals against the real TensorRT-RTX."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest

from resq_deploy.bundle import Bundle, BundleWriter
from resq_deploy.errors import BackendError, IntegrityError, MissingExtra
from resq_deploy.faults import FaultSpace, Flips
from resq_deploy.memory import fault_space
from resq_deploy.runtime.plan import locate
from resq_deploy.runtime.runner import BACKENDS, open_runner
from resq_deploy.runtime.session import Loader
from resq_deploy.runtime.trt import TrtRtxRunner, TrtRunner
from tests.runtime.fake_trt import VERSION, FakeTensorRT, HostDevice, device_of, reference
from tests.runtime.plans import QdqGraph, weight
from tests.test_bundle import manifest

LAYOUTS = {"head": "ba", "conv2": "aBcd32b", "conv1": "acdB4b"}
WAYS = ["live", "plan", "refit"]


def network() -> onnx.ModelProto:
    graph = QdqGraph(3, 3, 3)
    hidden = graph.conv("input", "conv1", weight(16, 3, 3, 3, seed=1))
    hidden = graph.conv(hidden, "conv2", weight(16, 16, 3, 3, seed=2))
    flat = graph.node("Flatten", graph.quantized(hidden))
    head = graph.weight("head", weight(10, 144, seed=3))
    return graph.model(graph.node("Gemm", flat, head, transB=1))


MODEL = network()
IMAGES = np.random.default_rng(5).random((7, 3, 3, 3), dtype=np.float32)


def library(**changed: Any) -> FakeTensorRT:
    fake = FakeTensorRT(MODEL, LAYOUTS)
    for name, value in changed.items():
        assert hasattr(fake, name)
        setattr(fake, name, value)
    return fake


def write_bundle(
    path: Path,
    plan: bytes,
    *,
    names: tuple[str, ...] = ("orin",),
    drop: str = "",
    version: str = VERSION,
) -> Bundle:
    """A bundle with the network and plans of it; `drop`: a weight that its map does not have."""
    weights = {m.name: m.value for m in fault_space(MODEL).memories if m.kind == "weights"}
    found = locate(plan, weights)
    assert found.coverage == 1.0
    if drop:
        found = found.model_copy(
            update={"tensors": {n: p for n, p in found.tensors.items() if n != drop}}
        )
    entry = {"backend": "tensorrt", "version": version, "built_for": {"gpu": "Orin"}}
    with BundleWriter(path) as writer:
        onnx.save(MODEL, writer.dir / "model.int8.onnx")
        (writer.dir / "model.fp32.onnx").write_bytes(b"fp32")
        writer.save_npz("eval.npz", x=IMAGES, y=np.zeros(7, np.int64))
        (writer.dir / "engines").mkdir()
        for name in names:
            (writer.dir / "engines" / f"{name}.plan").write_bytes(plan)
            found.save(writer.dir / "engines" / f"{name}.weights.json")
        shape = {"name": "input", "shape": (3, 3, 3), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        classes = tuple(map(str, range(10)))
        engines = dict.fromkeys(names, entry)
        attacks: dict[str, Any] = {"attacks": {}, "engines": engines}
        return writer.finish({**manifest(), "input": shape, "classes": classes, **attacks})


def runner(
    tmp_path: Path, injection: str = "auto", fake: FakeTensorRT | None = None, **kw: Any
) -> TrtRunner:
    fake = fake or library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan(), **kw)
    return TrtRunner.open(bundle, injection=injection, device=device_of, module=fake)


def some_flips(space: FaultSpace, count: int = 300, seed: int = 0) -> Flips:
    weights = space.select(kinds=["weights"])
    draws = np.random.default_rng(seed).choice(weights.size, count, replace=False)
    return weights.flips(np.sort(draws))


def with_flips(flips: Flips) -> onnx.ModelProto:
    """The graph with the flips in its initializers: what every backend must compute."""
    model = onnx.ModelProto()
    model.CopyFrom(MODEL)
    for tensor in model.graph.initializer:
        if tensor.name in flips:
            value = onnx.numpy_helper.to_array(tensor).copy()
            value.reshape(-1).view(np.uint8)[flips[tensor.name].elements] ^= flips[
                tensor.name
            ].masks
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return model


@pytest.mark.parametrize("count", [1, 2, 4, 5, 7])
def test_batches_of_any_size_fit_the_profile(tmp_path: Path, count: int) -> None:
    with runner(tmp_path) as r:
        logits = r(IMAGES[:count])
    assert logits.shape == (count, 10)
    np.testing.assert_allclose(logits, reference(MODEL, IMAGES[:count]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_faults_land_on_the_addresses_of_the_int8_graph(tmp_path: Path, way: str) -> None:
    with runner(tmp_path, way) as r:
        flips = some_flips(r.space)
        before = r(IMAGES)
        memory = r.loader.device.content()  # type: ignore[attr-defined]
        with r.faults(flips):
            faulty = r(IMAGES)
        assert np.array_equal(faulty, reference(with_flips(flips), IMAGES))
        assert not np.array_equal(faulty, before)
        assert np.array_equal(r(IMAGES), before)
        assert r.loader.device.content() == memory  # type: ignore[attr-defined]
        assert r.info["injection"] == way
        assert r.info["coverage"] == 1.0


@pytest.mark.parametrize("way", WAYS)
def test_memory_is_golden_again_when_the_block_fails(tmp_path: Path, way: str) -> None:
    with runner(tmp_path, way) as r:
        before = r(IMAGES)
        with pytest.raises(ZeroDivisionError), r.faults(some_flips(r.space)):
            raise ZeroDivisionError
        assert np.array_equal(r(IMAGES), before)


@pytest.mark.parametrize("way", WAYS)
def test_no_flips_change_nothing(tmp_path: Path, way: str) -> None:
    with runner(tmp_path, way) as r, r.faults(Flips({})):
        assert np.array_equal(r(IMAGES), reference(MODEL, IMAGES))


def test_auto_is_live_where_gpu_memory_holds_the_weights(tmp_path: Path) -> None:
    with runner(tmp_path) as r:
        assert r.info["injection"] == "live"


@pytest.mark.parametrize("trait", ["own_memory", "twice"])
def test_auto_is_the_plan_where_the_weights_in_memory_are_not_certain(
    tmp_path: Path, trait: str
) -> None:
    with runner(tmp_path, fake=library(**{trait: True})) as r:
        assert r.info["injection"] == "plan"
        flips = some_flips(r.space)
        with r.faults(flips):
            assert np.array_equal(r(IMAGES), reference(with_flips(flips), IMAGES))


def test_live_says_what_it_cannot_reach(tmp_path: Path) -> None:
    with runner(tmp_path, "live", library(own_memory=True)) as r:
        flips = some_flips(r.space)
        assert r.info["coverage"] == 0.0
        assert r.unreachable(flips) == 300
        with pytest.raises(BackendError, match="cannot reach 300 of the 300 bits"), r.faults(flips):
            pass


def test_a_weight_that_the_map_lacks_is_unreachable_in_the_plan(tmp_path: Path) -> None:
    with runner(tmp_path, "plan", drop="conv2") as r:
        flips = some_flips(r.space)
        lost = int(np.bitwise_count(flips["conv2"].masks).sum())
        assert r.unreachable(flips) == lost > 0
        assert r.info["coverage"] == pytest.approx((432 + 1440) / (432 + 1440 + 2304))


def test_an_engine_that_writes_to_its_weights_is_noticed(tmp_path: Path) -> None:
    with runner(tmp_path, "live") as r:
        flips = some_flips(r.space, 1)

        def trial() -> None:
            with r.faults(flips):
                for block in r.loader.device.blocks.values():  # type: ignore[attr-defined]
                    block ^= 0x10

        with pytest.raises(BackendError, match="not golden again"):
            trial()


def test_an_engine_that_was_not_built_to_be_refitted(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="not built to be refitted"):
        runner(tmp_path, "refit", library(refittable=False))


def test_closing_frees_all_device_memory(tmp_path: Path) -> None:
    r = runner(tmp_path)
    r(IMAGES)
    with r.faults(some_flips(r.space)):
        r(IMAGES)
    device = r.loader.device
    r.close()
    assert isinstance(device, HostDevice)
    assert device.blocks == {}
    assert device.closed


def test_the_backends_by_name(tmp_path: Path) -> None:
    fake = library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan())
    with open_runner(bundle, "tensorrt", device=device_of, module=fake) as r:
        assert r.backend == "tensorrt"
    assert BACKENDS["tensorrt-rtx"].endswith(TrtRtxRunner.__name__)
    with pytest.raises(BackendError, match=r"no TensorRT-RTX plan; its plans: orin \(tensorrt\)"):
        TrtRtxRunner.open(bundle, device=device_of, module=fake)


def test_several_plans_and_names(tmp_path: Path) -> None:
    fake = library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan(), names=("a", "b"))
    with pytest.raises(BackendError, match="several TensorRT plans"):
        TrtRunner.open(bundle, device=device_of, module=fake)
    with pytest.raises(BackendError, match="named 'c'"):
        TrtRunner.open(bundle, engine="c", device=device_of, module=fake)
    TrtRunner.open(bundle, engine="b", device=device_of, module=fake).close()
    with pytest.raises(BackendError, match=r"unknown way of injection 'laser' \(one of: live"):
        TrtRunner.open(bundle, engine="b", injection="laser", device=device_of, module=fake)
    with pytest.raises(BackendError, match="no option 'threads'"):
        TrtRunner.open(bundle, engine="b", device=device_of, module=fake, threads=2)


def test_a_plan_of_another_version(tmp_path: Path) -> None:
    fake = library()
    plan = b"FAKE" + fake.plan()[4:]
    bundle = write_bundle(tmp_path / "m.resq", plan, version="10.3.0")
    with pytest.raises(
        BackendError, match=r"built by TensorRT 10\.3\.0; 10\.9\.0 is installed"
    ) as caught:
        TrtRunner.open(bundle, device=device_of, module=fake)
    assert "install 10.3.0, or export again" in caught.value.hint


def test_a_plan_cut_short(tmp_path: Path) -> None:
    fake = library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan()[:-20])
    with pytest.raises(BackendError, match="cut short or altered"):
        TrtRunner.open(bundle, device=device_of, module=fake)


def test_a_map_of_another_plan(tmp_path: Path) -> None:
    fake = library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan())
    plan = bundle.path / "engines" / "orin.plan"
    plan.write_bytes(plan.read_bytes()[:-1] + b"?")
    with pytest.raises(IntegrityError, match="another plan"):
        TrtRunner.open(bundle, device=device_of, module=fake)


def test_a_runtime_without_a_gpu(tmp_path: Path) -> None:
    def null(logger: Any) -> Any:
        raise TypeError("pybind11::init(): factory function returned nullptr")

    fake = library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan())
    fake.Runtime = null  # type: ignore[method-assign]
    with pytest.raises(BackendError, match="needs an NVIDIA GPU with its driver to run a plan"):
        TrtRunner.open(bundle, device=device_of, module=fake)


def broken(name: str, reason: str) -> Callable[..., Any]:
    """An import hook that fails as pycuda does without a driver."""

    class Finder:
        @staticmethod
        def find_spec(wanted: str, path: Any = None, target: Any = None) -> None:
            if wanted == name:
                raise ImportError(reason)

    return Finder


def test_pycuda_missing_and_pycuda_without_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan())
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(MissingExtra, match=r"pycuda is not installed"):
        TrtRunner.open(bundle, module=fake)
    package = ModuleType("pycuda")
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setattr(
        sys, "meta_path", [broken("pycuda.driver", "libcuda.so.1: cannot open"), *sys.meta_path]
    )
    with pytest.raises(BackendError, match="needs an NVIDIA GPU"):
        TrtRunner.open(bundle, module=fake)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda plan: plan[:1000], "cut short or altered"),
        (lambda plan: plan[:-1], "cut short or altered"),
        (lambda plan: plan + b"more", "cut short or altered"),
        (lambda plan: b"xxxx" + plan[4:], "written by another version of TensorRT-RTX"),
    ],
)
def test_what_tensorrt_rtx_says_of_spoilt_plans(
    tmp_path: Path, spoil: Callable[[bytes], bytes], said: str
) -> None:
    """The real library, whose messages the one-line errors are made of."""
    import tensorrt_rtx

    from resq_deploy.export.engine import build_engine
    from tests.runtime.plans import conv_file

    path = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3))
    build_engine(path, tmp_path / "m.plan", sm=["86"])
    loader = Loader("tensorrt-rtx", tensorrt_rtx, HostDevice())
    with pytest.raises(BackendError, match=said) as caught:
        loader.load(spoil((tmp_path / "m.plan").read_bytes()))
    assert "\n" not in str(caught.value)


def test_two_users_of_the_library_both_hear_what_it_says() -> None:
    """It keeps to the first logger while anything lives that was given it."""
    import tensorrt_rtx

    loaders = [Loader("tensorrt-rtx", tensorrt_rtx, HostDevice()) for _ in range(2)]
    assert loaders[0].log.logger is loaders[1].log.logger
    for loader in loaders:
        with pytest.raises(BackendError, match="another version"):
            loader.load(b"xxxx" + bytes(500))


def test_messages_of_tensorrt_become_one_line() -> None:
    from resq_deploy.runtime.trtlib import refusal

    def said(*lines: str) -> str:
        return str(refusal("tensorrt", "10.9.0", "load the plan", list(lines)))

    assert "another GPU" in said(
        "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated on an"
        " incompatible device, expecting compute 8.6 got compute 8.9, please rebuild.)"
    )
    assert "another version" in said(
        "The engine plan file is not compatible with this version of TensorRT, expecting library version 10.9.0 got 8.6"
    )
    assert "out of GPU memory" in said("Error Code 2: OutOfMemory (no further information)")
    assert "needs an NVIDIA GPU" in said("CUDA initialization failure with error: 35")
    assert (
        said("Something new (In f at /a/b.cpp:3)")
        == "TensorRT 10.9.0 could not load the plan: Something new"
    )
    assert "no reason" in said()
