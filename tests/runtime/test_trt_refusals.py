"""Plans that do not load, runners that do not open: each is one line. TensorRT-RTX's own messages, and a stand-in's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from resq_deploy.errors import BackendError, IntegrityError, MissingExtra
from resq_deploy.runtime.session import Loader
from resq_deploy.runtime.trt import TrtRunner
from resq_deploy.runtime.trtlib import Log, diagnosis, refusal
from tests.runtime.fake_trt import HOLDER, device_of
from tests.runtime.host_device import HostDevice
from tests.runtime.plans import conv_file, weight
from tests.runtime.trt_bundles import IMAGES, library, runner, write_bundle


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
    assert "install 10.3.0, or build it again" in caught.value.hint


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
    assert "newer NVIDIA driver" in said("OLD_CUDA_DRIVER")
    assert "another GPU" in said("UNSUPPORTED_CC")
    assert "another version" in said("it gives no reason", "VERSION_MISMATCH")


def test_tensorrt_rtx_is_asked_what_is_wrong_with_a_plan() -> None:
    import tensorrt_rtx

    log = Log(tensorrt_rtx)
    runtime = tensorrt_rtx.Runtime(log.logger)
    assert diagnosis(tensorrt_rtx, runtime, b"xxxx" + bytes(500)) == ["MALFORMED_ENGINE"]
    assert diagnosis(library(), library().Runtime(log.logger), b"") == []


def test_a_plan_for_another_gpu_says_for_which(tmp_path: Path) -> None:
    fake = library(
        says="Error Code 6: API Usage Error (The engine plan file is generated on an incompatible device,"
        " expecting compute 8.7 got compute 8.9, please rebuild.)"
    )
    bundle = write_bundle(tmp_path / "m.resq", fake.plan())
    with pytest.raises(BackendError, match="the plan was built for Orin; this is host memory"):
        TrtRunner.open(bundle, device=device_of, module=fake)
    assert HOLDER["device"].closed


def test_host_code_runs_only_where_it_is_allowed(tmp_path: Path) -> None:
    fake = library(version_compatible=True)
    bundle = write_bundle(tmp_path / "m.resq", fake.plan())
    with pytest.raises(BackendError, match="it brings host code") as caught:
        TrtRunner.open(bundle, device=device_of, module=fake)
    assert "allow_host_code=True" in caught.value.hint
    with TrtRunner.open(bundle, device=device_of, module=fake, allow_host_code=True) as r:
        assert r(IMAGES).shape == (7, 10)


def test_outputs_of_another_type_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="of the plan is float16, not float32"):
        runner(tmp_path, fake=library(half=True))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        ("create_execution_context", "could not prepare the plan"),
        ("set_input_shape", "could not take a batch of 2"),
        ("set_tensor_address", "could not bind"),
        ("execute_async_v3", "could not run the plan"),
    ],
)
def test_calls_that_the_library_refuses(tmp_path: Path, call: str, said: str) -> None:
    fake = library(refuses=call)
    with pytest.raises(BackendError, match=rf"{said}.*: out of luck$"):
        runner(tmp_path, fake=fake)
    device = HOLDER["device"]
    assert device.closed
    assert device.blocks == {}
    assert fake.crashes == []


def test_a_way_that_fails_to_open_frees_the_engine(tmp_path: Path) -> None:
    fake = library()

    class Refitter:
        def __init__(self, engine: Any, logger: Any) -> None:
            self.engine = engine

        def get_all_weights(self) -> list[str]:
            fake.refuses = "execute_async_v3"
            return []

    fake.Refitter = Refitter  # type: ignore[assignment, method-assign]
    with pytest.raises(BackendError, match="could not run the plan"):
        runner(tmp_path, "refit", fake)
    assert fake.crashes == []
    assert HOLDER["device"].blocks == {}
