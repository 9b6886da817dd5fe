"""GPU memory through pycuda: allocate, copy, and flip or read single bytes wherever they are.

The two kernels are PTX, which the driver compiles: a device image needs no nvcc.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import MissingExtra
from resq_deploy.runtime.layouts import Indices
from resq_deploy.runtime.trtlib import no_gpu

_THREADS = 256

_PTX = """
.version 6.0
.target sm_50
.address_size 64

.visible .entry flip(.param .u64 addresses, .param .u64 masks, .param .u32 count)
{
    .reg .pred %p;
    .reg .b16 %old, %mask;
    .reg .b32 %i, %b, %n, %limit;
    .reg .b64 %list, %where, %step, %bits;
    ld.param.u64 %list, [addresses];
    ld.param.u64 %bits, [masks];
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
    ld.global.u8 %mask, [%bits];
    ld.global.u8 %old, [%where];
    xor.b16 %old, %old, %mask;
    st.global.u8 [%where], %old;
DONE:
    ret;
}

.visible .entry peek(.param .u64 addresses, .param .u64 values, .param .u32 count)
{
    .reg .pred %p;
    .reg .b16 %old;
    .reg .b32 %i, %b, %n, %limit;
    .reg .b64 %list, %where, %step, %out;
    ld.param.u64 %list, [addresses];
    ld.param.u64 %out, [values];
    ld.param.u32 %limit, [count];
    mov.u32 %i, %tid.x;
    mov.u32 %b, %ctaid.x;
    mov.u32 %n, %ntid.x;
    mad.lo.u32 %i, %b, %n, %i;
    setp.ge.u32 %p, %i, %limit;
    @%p bra DONE;
    cvta.to.global.u64 %list, %list;
    cvta.to.global.u64 %out, %out;
    mul.wide.u32 %step, %i, 8;
    add.u64 %list, %list, %step;
    ld.global.u64 %where, [%list];
    cvta.to.global.u64 %where, %where;
    cvt.u64.u32 %step, %i;
    add.u64 %out, %out, %step;
    ld.global.u8 %old, [%where];
    st.global.u8 [%out], %old;
DONE:
    ret;
}
"""


class Device(Protocol):
    """What the runner needs of a GPU. Addresses are integers; every call is complete when it returns."""

    @property
    def name(self) -> str: ...
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
        self._title = f"{device.name()}, SM {major}{minor}"
        self._context = device.retain_primary_context()
        self._held: dict[int, Any] = {}
        with self._current():
            self._stream = self._driver.Stream()
            module = self._driver.module_from_buffer(_PTX.encode() + b"\0")
            self._flip, self._peek = module.get_function("flip"), module.get_function("peek")

    @property
    def name(self) -> str:
        return self._title

    @property
    def stream(self) -> int:
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
        with self._current():
            self._stream.synchronize()

    def close(self) -> None:
        """Give back what is still allocated, and the context."""
        for address in list(self._held):
            self.free(address)
        self._context.detach()

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
        self._context.push()
        try:
            yield
        finally:
            self._driver.Context.pop()


def _driver(backend: str) -> Any:
    try:
        from pycuda import driver
    except ModuleNotFoundError as error:
        raise MissingExtra("pycuda", "tensorrt") from error
    except ImportError as error:  # libcuda.so.1 belongs to the driver
        if re.search(r"libcuda", str(error)):
            raise no_gpu(backend, "run a plan") from error
        raise
    return driver
