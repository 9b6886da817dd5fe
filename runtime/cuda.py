"""GPU memory through pycuda: allocate, copy, and flip or read single bytes wherever they are.

The two kernels are PTX, which the driver compiles: a device image needs no nvcc.
"""

from __future__ import annotations

import atexit
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import BackendError, ExecutionError, MissingExtra
from resq_deploy.runtime.layouts import Indices
from resq_deploy.runtime.trtlib import no_gpu

_THREADS = 256

# %where: the address that thread i was given; %bits: its byte in `values`. Bytes, so nothing need be aligned.
_KERNEL = """
.visible .entry {name}(.param .u64 addresses, .param .u64 values, .param .u32 count)
{{
    .reg .pred %p;
    .reg .b16 %byte, %mask;
    .reg .b32 %i, %b, %n, %limit;
    .reg .b64 %list, %where, %step, %bits;
    ld.param.u64 %list, [addresses];
    ld.param.u64 %bits, [values];
    ld.param.u32 %limit, [count];
    mov.u32 %i, %tid.x;
    mov.u32 %b, %ctaid.x;
    mov.u32 %n, %ntid.x;
    mad.lo.u32 %i, %b, %n, %i;
    setp.ge.u32 %p, %i, %limit;
    @%p bra DONE;
    cvta.to.global.u64 %list, %list;
    cvta.to.global.u64 %bits, %bits;
    mul.wide.u32 %step, %i, 8;
    add.u64 %list, %list, %step;
    ld.global.u64 %where, [%list];
    cvta.to.global.u64 %where, %where;
    cvt.u64.u32 %step, %i;
    add.u64 %bits, %bits, %step;
    ld.global.u8 %byte, [%where];
{body}
DONE:
    ret;
}}
"""
_FLIP = """    ld.global.u8 %mask, [%bits];
    xor.b16 %byte, %byte, %mask;
    st.global.u8 [%where], %byte;"""
_PEEK = "    st.global.u8 [%bits], %byte;"

PTX = (
    "\n.version 6.0\n.target sm_50\n.address_size 64\n"
    + _KERNEL.format(name="flip", body=_FLIP)
    + _KERNEL.format(name="peek", body=_PEEK)
)
_CONTEXTS: dict[int, Any] = {}  # device -> its primary context, retained


class Device(Protocol):
    """What the runner needs of a GPU. Addresses are integers; every call is complete when it returns."""

    @property
    def name(self) -> str: ...
    @property
    def sm(self) -> str: ...
    @property
    def stream(self) -> int: ...
    def allocate(self, size: int) -> int: ...
    def free(self, address: int) -> None: ...
    def upload(self, address: int, array: NDArray[Any]) -> None: ...
    def download(self, address: int, size: int) -> bytes: ...
    def flip(self, addresses: Indices, masks: NDArray[np.uint8]) -> None: ...
    def peek(self, addresses: Indices) -> NDArray[np.uint8]: ...
    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class CudaDevice:
    """One GPU, in its primary context, which is the one TensorRT uses."""

    def __init__(self, backend: str, index: int = 0) -> None:
        """Raises MissingExtra without pycuda, BackendError without a GPU and driver."""
        self._driver = _driver(backend)
        try:
            self._driver.init()
            device = self._driver.Device(index)
        except self._driver.Error as error:
            raise no_gpu(backend, "run a plan") from error
        major, minor = device.compute_capability()
        self._sm = f"{major}{minor}"
        self._title = f"{device.name()}, SM {self._sm}"
        self._held: dict[int, Any] = {}
        try:
            self._context = _primary(device, index)
        except self._driver.Error as error:
            raise _failed(self._driver, error) from error
        with self._current():
            self._stream = self._driver.Stream()
            module = self._driver.module_from_buffer(PTX.encode() + b"\0")
            self._flip, self._peek = module.get_function("flip"), module.get_function("peek")

    @property
    def name(self) -> str:
        return self._title

    @property
    def sm(self) -> str:
        """Compute capability, such as 87."""
        return self._sm

    @property
    def stream(self) -> int:
        """A stream that waits for copies and kernels of ours, which run on the legacy default stream."""
        return int(self._stream.handle)

    def allocate(self, size: int) -> int:
        with self._current():
            block = self._driver.mem_alloc(size)
        self._held[int(block)] = block
        return int(block)

    def free(self, address: int) -> None:
        with self._current():
            self._held.pop(address).free()

    def upload(self, address: int, array: NDArray[Any]) -> None:
        with self._current():
            self._driver.memcpy_htod(address, np.ascontiguousarray(array))

    def download(self, address: int, size: int) -> bytes:
        host = np.empty(size, dtype=np.uint8)
        with self._current():
            self._driver.memcpy_dtoh(host, address)
        return host.tobytes()

    def flip(self, addresses: Indices, masks: NDArray[np.uint8]) -> None:
        """XOR one byte at each address; addresses must be distinct."""
        self._launch(self._flip, addresses, masks)

    def peek(self, addresses: Indices) -> NDArray[np.uint8]:
        """The byte at each address."""
        return self._launch(self._peek, addresses, np.zeros(addresses.size, dtype=np.uint8))

    def synchronize(self) -> None:
        """Wait for all that runs on the GPU, in the engine's own streams too."""
        with self._current():
            self._driver.Context.synchronize()

    def close(self) -> None:
        """Give back what is still allocated. The context stays: TensorRT may have it current in this thread."""
        for address in list(self._held):
            self.free(address)
        with self._current():
            self._stream = self._flip = self._peek = None

    def _launch(
        self, kernel: Any, addresses: Indices, values: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        """Run a kernel on (addresses, values, count); `values` as they are afterwards."""
        count = int(addresses.size)
        if not count:
            return values
        with self._current():
            where = self._driver.to_device(np.ascontiguousarray(addresses, dtype=np.uint64))
            what = self._driver.to_device(np.ascontiguousarray(values))
            grid = ((count + _THREADS - 1) // _THREADS, 1)
            kernel(where, what, np.uint32(count), block=(_THREADS, 1, 1), grid=grid)
            self._driver.Context.synchronize()
            result = np.empty_like(values)
            self._driver.memcpy_dtoh(result, what)
            where.free()
            what.free()
        return result

    @contextmanager
    def _current(self) -> Iterator[None]:
        """The context, current in whichever thread calls: TensorRT allocates from its own threads too."""
        try:
            self._context.push()
            try:
                yield
            finally:
                self._driver.Context.pop()
        except self._driver.Error as error:
            raise _failed(self._driver, error) from error


def _primary(device: Any, index: int) -> Any:
    """The context that TensorRT uses, retained once, until the process ends.

    pycuda leaves a released primary context current in its thread, where the next call of TensorRT would find it.
    """
    if index not in _CONTEXTS:
        if not _CONTEXTS:
            atexit.register(_CONTEXTS.clear)
        _CONTEXTS[index] = device.retain_primary_context()
    return _CONTEXTS[index]


def _failed(driver: Any, error: Exception) -> BackendError:
    if isinstance(error, driver.MemoryError):
        return BackendError(
            "the GPU is out of memory", "use fewer --workers, or stop what else uses the GPU"
        )
    return ExecutionError(f"the GPU failed: {error}", "see dmesg, or nvidia-smi -q")


def _driver(backend: str) -> Any:
    try:
        with warnings.catch_warnings():  # pycuda says in a warning what it then raises
            warnings.simplefilter("ignore")
            from pycuda import driver
    except ModuleNotFoundError as error:
        raise MissingExtra("pycuda", "cuda") from error
    except ImportError as error:  # libcuda.so.1 belongs to the driver
        if "libcuda.so" in str(error):
            raise no_gpu(backend, "run a plan") from error
        raise BackendError(
            f"pycuda is installed but does not load: {error}",
            "update the NVIDIA driver, or compile pycuda again for the CUDA that is installed",
        ) from error
    return driver
