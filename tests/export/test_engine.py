"""Building plans: options, progress, what is refused. TensorRT-RTX really builds; no GPU is needed."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from resq_deploy.console import Reporter
from resq_deploy.errors import BackendError, MissingExtra
from resq_deploy.export import engine, engine_options
from resq_deploy.export.engine import add_engine, build_engine
from resq_deploy.export.engine_options import BATCH, EngineOptions, requests
from resq_deploy.runtime.plan import PlanMap
from tests.export.engines import SM
from tests.runtime.plans import QdqGraph, conv_file, weight


def test_what_it_was_built_for(tmp_path: Path) -> None:
    path = conv_file(tmp_path / "m.onnx", weight(32, 16, 3, 3))
    info = build_engine(
        path, tmp_path / "m.plan", sm=["8.6", 89, "sm_120", "SM86"], batch=(2, 4, 16),
        optimization_level=2, workspace=2**28,
    )  # fmt: skip
    assert info.backend == "tensorrt-rtx"
    assert info.size == (tmp_path / "m.plan").stat().st_size
    assert info.built_for["sm"] == ["SM86", "SM89", "SM120"]
    assert info.built_for["batch"] == [2, 4, 16]
    assert info.built_for["optimization_level"] == 2
    assert info.built_for["workspace"] == 2**28
    assert info.version.split(".")[0].isdecimal()


def test_the_plan_is_stored_as_the_library_wrote_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """trtexec and Polygraphy take it as it is."""
    import tensorrt_rtx as trt

    written = []

    def recording(logger: Any) -> Any:
        real = trt.Builder(logger)

        def build(network: Any, config: Any) -> bytes:
            written.append(bytes(real.build_serialized_network(network, config)))
            return written[-1]

        return FakeModule(real, build_serialized_network=build)

    monkeypatch.setattr(engine, "library", lambda backend: FakeModule(trt, Builder=recording))
    path = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3))
    build_engine(path, tmp_path / "m.plan", sm=SM)
    assert (tmp_path / "m.plan").read_bytes() == written[0]


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    stream = io.StringIO()
    path = conv_file(tmp_path / "m.onnx", weight(32, 16, 3, 3))
    build_engine(path, tmp_path / "m.plan", sm=SM, reporter=Reporter(quiet=False, stream=stream))
    assert "Building engine: 6/6 steps" in stream.getvalue()


def test_ctrl_c_stops_the_build(tmp_path: Path) -> None:
    class Impatient(Reporter):
        def task(self, title: str, total: float | None, unit: str = "") -> Any:
            from contextlib import nullcontext

            from resq_deploy.console import Task

            def advance(_: float) -> None:
                raise KeyboardInterrupt

            return nullcontext(Task(advance, lambda _: None))

    path = conv_file(tmp_path / "m.onnx", weight(32, 16, 3, 3))
    with pytest.raises(KeyboardInterrupt):
        build_engine(path, tmp_path / "m.plan", sm=SM, reporter=Impatient())
    assert not (tmp_path / "m.plan").exists()


def single(tmp_path: Path, op: str, domain: str = "") -> Path:
    graph = QdqGraph(3, 8, 8)
    model = graph.model(graph.node(op, "input", domain=domain))
    if domain:
        model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


def int32_bias(tmp_path: Path) -> Path:
    path = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3))
    model = onnx.load(path)
    bias = next(t for t in model.graph.initializer if t.name == "w.bias")
    bias.CopyFrom(onnx.numpy_helper.from_array(np.zeros(8, np.int32), "w.bias"))
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    at = list(model.graph.node).index(conv)
    dequantize = onnx.helper.make_node(
        "DequantizeLinear", ["w.bias", "s"], ["bias"], name="bias_dq"
    )
    model.graph.node.insert(at, dequantize)
    model.graph.node[at + 1].input[2] = "bias"
    onnx.save(model, path)
    return path


def garbage(tmp_path: Path) -> Path:
    (tmp_path / "m.onnx").write_bytes(b"not ONNX" * 50)
    return tmp_path / "m.onnx"


def free_side(tmp_path: Path) -> Path:
    path = single(tmp_path, "Relu")
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_param = "side"
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: single(p, "Det"), r"^TensorRT-RTX has no operator Det \(node Det_0\)"),
        (lambda p: single(p, "Foo", "com.acme"), r"no operator Foo \(node Foo_0\)"),
        (int32_bias, r"refuses node bias_dq \(DequantizeLinear\): .*type Int32"),
        (garbage, r"cannot read m\.onnx: .*Failed to parse"),
        (free_side, r"only the batch may vary"),
        (lambda p: p / "none.onnx", r"none\.onnx does not exist"),
    ],
)
def test_what_the_parser_refuses_is_one_line(
    tmp_path: Path, make: Callable[[Path], Path], said: str
) -> None:
    with pytest.raises(BackendError, match=said) as caught:
        build_engine(make(tmp_path), tmp_path / "m.plan", sm=SM)
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    assert not (tmp_path / "m.plan").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sm": ["90"]}, r"does not know SM 90 \(it knows 75, 80, 86, 89"),
        ({"sm": ["banana"]}, "does not know SM banana"),
        ({"backend": "openvino"}, r"unknown engine 'openvino' \(one of: tensorrt, tensorrt-rtx"),
        ({"backend": "tensorrt", "sm": ["86"]}, "--sm is for TensorRT-RTX"),
        ({"batch": (4, 2, 8)}, "a batch of 4:2:8"),
        ({"batch": (0, 2, 8)}, "a batch of 0:2:8"),
        ({"optimization_level": 9}, "optimization level 9"),
        ({"workspace": 0}, "a workspace of 0 bytes"),
        ({"version_compatible": True}, "TensorRT-RTX has no version compatible"),
        ({"hardware_compatible": True}, "TensorRT-RTX has no hardware compatible"),
        ({"timing_cache": "cache"}, "TensorRT-RTX has no timing cache"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, options: dict[str, Any], said: str
) -> None:
    path = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3))
    with pytest.raises(BackendError, match=said):
        build_engine(path, tmp_path / "m.plan", **options)


def test_engine_options_reach_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """REFIT builds of TensorRT-RTX need a GPU, so the build itself is left out."""
    import tensorrt_rtx as trt

    configs = []

    class Builder(trt.Builder):  # type: ignore[misc]
        def create_builder_config(self) -> Any:
            configs.append(super().create_builder_config())
            return configs[-1]

        def build_serialized_network(self, network: Any, config: Any) -> None:
            return None

    monkeypatch.setattr(engine, "library", lambda backend: FakeModule(trt, Builder=Builder))
    path = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3))
    with pytest.raises(BackendError, match="could not build the engine: it gives no reason"):
        build_engine(
            path, tmp_path / "m.plan", backend="tensorrt", refit=True, version_compatible=True,
            workspace=2**28, optimization_level=1,
        )  # fmt: skip
    config = configs[0]
    assert config.get_flag(trt.BuilderFlag.REFIT)
    assert config.get_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 2**28
    assert config.builder_optimization_level == 1
    assert config.num_optimization_profiles == 1


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    path = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3))
    with pytest.raises(BackendError, match="cannot write"):
        build_engine(path, tmp_path / "none" / "m.plan", sm=SM)


def test_a_library_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tensorrt", None)
    with pytest.raises(MissingExtra, match=r"TensorRT is not installed .*resq-deploy\[tensorrt\]"):
        build_engine(tmp_path / "m.onnx", tmp_path / "m.plan", backend="tensorrt")


def test_classic_tensorrt_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Builder is a null pointer then, which pybind11 turns into a TypeError."""
    import tensorrt_rtx

    class Null:
        def __init__(self, *_: object) -> None:
            raise TypeError("pybind11::init(): factory function returned nullptr")

    fake = FakeModule(tensorrt_rtx, Builder=Null)
    monkeypatch.setattr(engine, "library", lambda backend: fake)
    with pytest.raises(
        BackendError, match="needs an NVIDIA GPU with its driver to build"
    ) as caught:
        build_engine(tmp_path / "m.onnx", tmp_path / "m.plan", backend="tensorrt")
    assert "--target tensorrt-rtx" in caught.value.hint


class FakeModule:
    """A module with some of its names replaced."""

    def __init__(self, real: Any, **replaced: Any) -> None:
        self._real = real
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_the_code_path_of_classic_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same builder code under the name of TensorRT, on TensorRT-RTX's library."""
    import tensorrt_rtx

    monkeypatch.setattr(engine, "library", lambda backend: tensorrt_rtx)
    monkeypatch.setattr(engine, "_this_gpu", lambda: {"gpu": "test", "compute_capability": "8.7"})
    path = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3))
    info = build_engine(path, tmp_path / "m.plan", backend="tensorrt", hardware_compatible=True)
    assert info.built_for["gpu"] == "test"
    assert info.built_for["hardware_compatible"] is True
    assert "sm" not in info.built_for
    assert info.warnings == ("setHardwareCompatibilityLevel() is unsupported in TensorRT-RTX",)


def test_a_timing_cache_is_read_and_updated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_rtx

    monkeypatch.setattr(engine, "library", lambda backend: tensorrt_rtx)
    monkeypatch.setattr(engine, "_this_gpu", dict)
    path, cache = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3)), tmp_path / "timing.cache"
    for _ in range(2):
        with pytest.warns(DeprecationWarning, match="[Tt]iming"):  # TensorRT-RTX keeps none
            build_engine(path, tmp_path / "m.plan", backend="tensorrt", timing_cache=cache)
        assert cache.stat().st_size > 0


def test_a_bundle_gets_plan_and_map(tmp_path: Path) -> None:
    path, stream = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3)), io.StringIO()
    reporter = Reporter(quiet=False, stream=stream)
    name, entry = add_engine(tmp_path, path, sm=SM, batch=(1, 2, 4), reporter=reporter)
    plan = (tmp_path / "engines" / f"{name}.plan").read_bytes()
    found = PlanMap.load(tmp_path / "engines" / f"{name}.weights.json")
    found.check(plan)
    assert name == entry.backend == "tensorrt-rtx"
    assert entry.coverage == found.coverage == 1.0
    assert entry.built_for["batch"] == [1, 2, 4]
    assert "100.00% of the weights located" in stream.getvalue()


def test_a_weight_that_is_not_located_is_named(tmp_path: Path) -> None:
    path, stream = conv_file(tmp_path / "m.onnx", np.ones((8, 4, 3, 3), np.int8)), io.StringIO()
    reporter = Reporter(quiet=False, stream=stream)
    _, entry = add_engine(tmp_path, path, name="odd", sm=SM, reporter=reporter)
    assert entry.coverage == 0.0
    assert "odd.plan: w was not located, too few different bytes" in stream.getvalue()
    assert entry.unlocated == {"w": "too few different bytes to tell it from others"}


def asked(request: Any) -> tuple[Any, ...]:
    return request.backend, request.sm, request.options.given


def test_each_target_gets_the_options_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    import tensorrt_rtx

    monkeypatch.setattr(engine_options, "library", lambda backend: tensorrt_rtx)
    options = EngineOptions(workspace=2**20, timing_cache="t.cache", version_compatible=True)
    both = requests(("onnx", "tensorrt", "tensorrt-rtx"), (1, 2, 3), (86,), options)
    assert [asked(request) for request in both] == [
        ("tensorrt", (), options.given),
        ("tensorrt-rtx", ("86",), {"workspace": 2**20}),
    ]
    assert requests(("onnx",), BATCH, (), EngineOptions()) == ()
    assert len(requests(("tensorrt-rtx",) * 2, (1, 2, 3), (), EngineOptions())) == 1


@pytest.mark.parametrize(
    ("targets", "sm", "options", "said"),
    [
        (("onnx",), ("86",), {}, r"^--sm is for engines"),
        (("onnx",), (), {"timing_cache": "c"}, r"^--timing-cache is for engines"),
        (("tensorrt",), ("86",), {}, "--sm is for TensorRT-RTX"),
        (("tensorrt-rtx",), (), {"version_compatible": True}, "no version compatible"),
        (("tensorrt-rtx",), ("90",), {}, "does not know SM 90"),
        (("openvino",), (), {}, r"unknown target 'openvino' \(one of: onnx, tensorrt,"),
    ],
)
def test_what_no_target_can_do_is_refused_before_any_work(
    targets: tuple[str, ...], sm: tuple[str, ...], options: dict[str, Any], said: str
) -> None:
    with pytest.raises(BackendError, match=said):
        requests(targets, (1, 2, 3), sm, EngineOptions(**options))


def test_a_timing_cache_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tensorrt_rtx

    monkeypatch.setattr(engine, "library", lambda backend: tensorrt_rtx)
    path = conv_file(tmp_path / "m.onnx", weight(8, 4, 3, 3))
    with pytest.raises(BackendError, match="cannot read the timing cache"):
        build_engine(path, tmp_path / "m.plan", backend="tensorrt", timing_cache=tmp_path)
