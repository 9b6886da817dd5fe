"""The pycuda device against a stand-in for the driver: call order, contexts, sizes. The kernels need a GPU."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.errors import BackendError, MissingExtra
from resq_deploy.runtime import cuda
from resq_deploy.runtime.cuda import CudaDevice
from tests.runtime.host_device import HostDevice


class Driver(ModuleType):
    """pycuda.driver over host memory. Every call but those that find the device wants a current context."""

    Error = type("Error", (Exception,), {})
    MemoryError = type("MemoryError", (Error,), {})

    def __init__(self, devices: int = 1) -> None:
        super().__init__("pycuda.driver")
        self.host = HostDevice()
        self.devices, self.depth, self.retained = devices, 0, 0
        driver = self

        class Context:
            push = staticmethod(lambda: driver.enter(1))
            pop = staticmethod(lambda: driver.enter(-1))

            @staticmethod
            def synchronize() -> None:
                driver.current()

        class Stream:
            handle = 42

            def synchronize(self) -> None:
                driver.current()

        class Module:
            def __init__(self, ptx: bytes) -> None:
                assert ptx.endswith(b"\0")
                self.ptx = ptx.decode()

            def get_function(self, name: str) -> Any:
                assert f".visible .entry {name}(" in self.ptx
                return getattr(driver, f"run_{name}")

        self.Context, self.Stream, self.module_from_buffer = Context, Stream, Module

    def retain(self) -> Any:
        self.retained += 1
        return self.Context

    def enter(self, step: int) -> None:
        self.depth += step

    def current(self) -> None:
        assert self.depth == 1, "no current context"

    def init(self) -> None:
        if not self.devices:
            raise self.Error("cuInit failed: no CUDA-capable device is detected")

    def Device(self, index: int) -> Any:
        driver = self

        class Device:
            name = staticmethod(lambda: "Made-up GPU")
            compute_capability = staticmethod(lambda: (8, 7))
            retain_primary_context = staticmethod(driver.retain)

        if index >= self.devices:
            raise self.Error("cuDeviceGet failed: invalid device ordinal")
        return Device

    def mem_alloc(self, size: int) -> Any:
        self.current()
        host, address = self.host, self.host.allocate(size)

        class Allocation:
            def __int__(self) -> int:
                return address

            def free(self) -> None:
                host.free(address)

        return Allocation()

    def to_device(self, array: NDArray[Any]) -> Any:
        block = self.mem_alloc(array.nbytes)
        self.memcpy_htod(int(block), array)
        return block

    def memcpy_htod(self, address: int, array: NDArray[Any]) -> None:
        self.current()
        self.host.upload(address, array)

    def memcpy_dtoh(self, array: NDArray[Any], address: Any) -> None:
        self.current()
        raw = self.host.download(int(address), array.nbytes)
        array[...] = np.frombuffer(raw, array.dtype).reshape(array.shape)

    def _arguments(self, where: Any, what: Any, count: np.uint32, **launch: Any) -> Any:
        (threads, *_), (blocks, _) = launch["block"], launch["grid"]
        assert 0 <= threads * blocks - int(count) < threads
        assert isinstance(count, np.uint32)
        raw = self.host.download(int(where), 8 * int(count))
        values = np.frombuffer(self.host.download(int(what), int(count)), np.uint8)
        return np.frombuffer(raw, np.uint64).astype(np.int64), values

    def run_flip(self, where: Any, what: Any, count: np.uint32, **launch: Any) -> None:
        self.host.flip(*self._arguments(where, what, count, **launch))

    def run_peek(self, where: Any, what: Any, count: np.uint32, **launch: Any) -> None:
        addresses, _ = self._arguments(where, what, count, **launch)
        self.host.upload(int(what), self.host.peek(addresses))


def install(monkeypatch: pytest.MonkeyPatch, driver: Driver) -> Driver:
    package = ModuleType("pycuda")
    package.driver = driver  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    monkeypatch.setattr(cuda, "_CONTEXTS", {})
    return driver


def test_memory_goes_up_and_comes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install(monkeypatch, Driver())
    device = CudaDevice("tensorrt")
    array = np.arange(600, dtype=np.float32)
    address = device.allocate(array.nbytes)
    device.upload(address, array[::-1][::-1])
    assert device.download(address, array.nbytes) == array.tobytes()
    device.synchronize()
    assert (device.name, device.sm) == ("Made-up GPU, SM 87", "87")
    assert device.stream == 42
    device.free(address)
    device.allocate(16)
    device.close()
    assert driver.host.blocks == {}
    assert driver.depth == 0
    device.close()


def test_devices_share_one_context_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A primary context that pycuda releases stays current in its thread, dead, for TensorRT to find."""
    driver = install(monkeypatch, Driver())
    CudaDevice("tensorrt").close()
    second = CudaDevice("tensorrt")
    second.free(second.allocate(8))
    assert driver.retained == 1


@pytest.mark.parametrize(
    ("kind", "said"), [("MemoryError", "out of memory"), ("Error", "the GPU failed: ECC")]
)
def test_errors_of_the_driver_are_one_line(
    monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    driver = install(monkeypatch, Driver())
    device = CudaDevice("tensorrt")

    def fails(*_: Any) -> None:
        raise getattr(driver, kind)("ECC")

    for name in ("mem_alloc", "memcpy_htod", "memcpy_dtoh", "run_flip"):
        monkeypatch.setattr(driver, name, fails)
    addresses, masks = np.array([5]), np.array([1], np.uint8)
    with pytest.raises(BackendError, match=said):
        device.allocate(8)
    with pytest.raises(BackendError, match=said):
        device.flip(addresses, masks)
    with pytest.raises(BackendError, match=said):
        device.download(5, 8)
    assert driver.depth == 0


def test_without_pycuda_the_message_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycuda", None)
    with pytest.raises(MissingExtra, match=r"pycuda is not installed .*resq-deploy\[cuda\]"):
        CudaDevice("tensorrt-rtx")


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("libcuda.so.1: cannot open shared object file", "needs an NVIDIA GPU with its driver"),
        ("_driver.so: undefined symbol: cuCtxCreate_v4", "pycuda is installed but does not load"),
    ],
)
def test_pycuda_that_does_not_load(monkeypatch: pytest.MonkeyPatch, reason: str, said: str) -> None:
    class Broken(ModuleType):
        def __getattr__(self, name: str) -> Any:
            warnings.warn("Failed to import the CUDA driver interface", stacklevel=2)
            raise ImportError(reason)

    monkeypatch.setitem(sys.modules, "pycuda", Broken("pycuda"))
    monkeypatch.delitem(sys.modules, "pycuda.driver", raising=False)
    with pytest.raises(BackendError, match=said):
        CudaDevice("tensorrt")


def test_the_kernels_are_one_but_for_what_they_do_with_a_byte() -> None:
    flip, peek = (part.split("{", 1)[1] for part in cuda.PTX.split(".visible .entry ")[1:])
    only = {line.strip() for line in flip.splitlines()} ^ {
        line.strip() for line in peek.splitlines()
    }
    assert only == {
        "ld.global.u8 %mask, [%bits];",
        "xor.b16 %byte, %byte, %mask;",
        "st.global.u8 [%where], %byte;",
        "st.global.u8 [%bits], %byte;",
    }


@pytest.mark.parametrize("count", [0, 1, 256, 257, 1000])
def test_flips_and_peeks(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    driver = install(monkeypatch, Driver())
    device = CudaDevice("tensorrt")
    golden = np.arange(4000).astype(np.uint8)
    address = device.allocate(4000)
    device.upload(address, golden)
    offsets = np.random.default_rng(0).choice(4000, count, replace=False)
    masks = np.random.default_rng(1).integers(1, 256, count).astype(np.uint8)
    device.flip(offsets + address, masks)
    expected = golden.copy()
    expected[offsets] ^= masks
    assert device.download(address, 4000) == expected.tobytes()
    assert np.array_equal(device.peek(offsets + address), expected[offsets])
    assert list(driver.host.blocks) == [address]


@pytest.mark.parametrize(("devices", "index"), [(0, 0), (1, 1)])
def test_no_such_gpu(monkeypatch: pytest.MonkeyPatch, devices: int, index: int) -> None:
    install(monkeypatch, Driver(devices))
    with pytest.raises(BackendError, match="needs an NVIDIA GPU with its driver to run a plan"):
        CudaDevice("tensorrt", index)
