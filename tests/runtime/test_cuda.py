"""The pycuda device against a stand-in for the driver: call order, contexts, sizes. The kernels need a GPU."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.errors import BackendError
from resq_deploy.runtime.cuda import CudaDevice
from tests.runtime.fake_trt import HostDevice


class Driver(ModuleType):
    """pycuda.driver over host memory. Every call but those that find the device wants a current context."""

    Error = type("Error", (Exception,), {})

    def __init__(self, devices: int = 1) -> None:
        super().__init__("pycuda.driver")
        self.host = HostDevice()
        self.devices, self.depth, self.detached = devices, 0, False
        driver = self

        class Context:
            push = staticmethod(lambda: driver.enter(1))
            pop = staticmethod(lambda: driver.enter(-1))

            @staticmethod
            def synchronize() -> None:
                driver.current()

            @staticmethod
            def detach() -> None:
                driver.detached = True

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
            retain_primary_context = staticmethod(lambda: driver.Context)

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
    return driver


def test_memory_goes_up_and_comes_down(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = install(monkeypatch, Driver())
    device = CudaDevice("tensorrt")
    array = np.arange(600, dtype=np.float32)
    address = device.allocate(array.nbytes)
    device.upload(address, array[::-1][::-1])
    assert device.download(address, array.nbytes) == array.tobytes()
    device.synchronize()
    assert device.name == "Made-up GPU, SM 87"
    assert device.stream == 42
    device.free(address)
    device.allocate(16)
    device.close()
    assert driver.host.blocks == {}
    assert driver.detached
    assert driver.depth == 0


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
