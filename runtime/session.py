"""A plan loaded on a GPU: the library's runtime, an allocator that keeps account, and one session per plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from resq_deploy.errors import BackendError
from resq_deploy.runtime.cuda import Device
from resq_deploy.runtime.runner import Images, Logits
from resq_deploy.runtime.trtlib import Log, diagnosis, no_gpu, refusal

_KEPT: list[Any] = []  # allocators that engines still call, though their loader is closed


class Blocks:
    """The device memory an engine holds: address -> bytes, as its allocator hands it out.

    0 is the null pointer that the library takes for "no memory"; no exception may cross its frames.
    """

    def __init__(self, device: Device) -> None:
        self.device = device
        self.sizes: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        if not size:
            return 0
        try:
            address = self.device.allocate(size)
        except Exception:
            return 0
        self.sizes[address] = size
        return address

    def deallocate(self, address: int) -> bool:
        if address not in self.sizes:
            return not address
        del self.sizes[address]
        try:
            self.device.synchronize()
            self.device.free(address)
        except Exception:
            return False
        return True


def allocator(module: Any, blocks: Blocks) -> Any:
    """The library's allocator interface over `blocks`. It must outlive the runtime and engines that use it.

    A plain IGpuAllocator: the library then allocates in order with its streams by itself. Every method is
    overridden, since the bindings call none of the base class; an address comes and goes as an integer.
    """

    class Allocator(module.IGpuAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IGpuAllocator.__init__(self)

        def allocate(self, size: int, alignment: int, flags: int) -> int:
            return blocks.allocate(size)

        def reallocate(self, address: int, alignment: int, new_size: int) -> int:
            return 0  # the block stays as it is, and the library allocates another

        def deallocate(self, address: int) -> bool:
            return blocks.deallocate(address)

        def allocate_async(self, size: int, alignment: int, flags: int, stream: int) -> int:
            return blocks.allocate(size)

        def deallocate_async(self, address: int, stream: int) -> bool:
            return blocks.deallocate(address)

    return Allocator()


class Session:
    """One plan, loaded and ready to run on batches of any size."""

    def __init__(self, loader: Loader, plan: bytes | bytearray) -> None:
        self._loader, self.device = loader, loader.device
        self._sizes: dict[int, int] = {}
        self._addresses: dict[str, int] = {}
        self.context: Any = None
        self.engine: Any = None
        loader.log.clear()
        try:
            self.engine = loader.runtime.deserialize_cuda_engine(plan)
            if self.engine is None:
                raise loader.refused("load the plan", plan)
            self.context = self.engine.create_execution_context()
            if self.context is None:
                raise loader.refused("prepare the plan")
            self.input, self.output = self._ends()
            self.smallest, self.largest = self._batches()
        except BaseException:
            self.close()
            raise

    def _ends(self) -> tuple[str, str]:
        """Names of the input and the output, both float32."""
        trt, engine = self._loader.module, self.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if n not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(
                f"the plan has {len(inputs)} inputs and {len(outputs)} outputs, not 1"
            )
        for name in (*inputs, *outputs):
            kind = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
            if kind != np.float32:
                raise BackendError(f"{name!r} of the plan is {kind}, not float32")
        return inputs[0], outputs[0]

    def _batches(self) -> tuple[int, int]:
        """Smallest and largest batch; a plan with a fixed batch need not have a profile."""
        fixed, *_ = self.engine.get_tensor_shape(self.input)
        if fixed > 0:
            return int(fixed), int(fixed)
        (smallest, *_), _, (largest, *_) = self.engine.get_tensor_profile_shape(self.input, 0)
        return int(smallest), int(largest)

    def __call__(self, images: Images) -> Logits:
        """Logits, float32 [B, classes]; batches beyond the plan's profile are cut up or filled up."""
        parts = [
            self._run(images[i : i + self.largest]) for i in range(0, len(images), self.largest)
        ]
        return np.concatenate(parts)

    def _run(self, images: Images) -> Logits:
        count = len(images)
        if count < self.smallest:
            filling = np.repeat(images[-1:], self.smallest - count, axis=0)
            images = np.concatenate([images, filling])
        self._loader.log.clear()
        if not self.context.set_input_shape(self.input, images.shape):
            raise self._loader.refused(f"take a batch of {len(images)}")
        shape = tuple(int(length) for length in self.context.get_tensor_shape(self.output))
        if min(shape, default=-1) < 0:
            raise BackendError(f"the plan does not say how large its output is: {shape}")
        size = 4 * int(np.prod(shape))
        for name, needed in ((self.input, images.nbytes), (self.output, size)):
            if not self.context.set_tensor_address(name, self._buffer(name, needed)):
                raise self._loader.refused(f"bind {name!r}")
        self.device.upload(self._addresses[self.input], images)
        if not self.context.execute_async_v3(self.device.stream):
            raise self._loader.refused("run the plan")
        self.device.synchronize()
        raw = self.device.download(self._addresses[self.output], size)
        return np.frombuffer(raw, dtype=np.float32).reshape(shape)[:count].copy()

    def _buffer(self, name: str, size: int) -> int:
        held = self._addresses.get(name)
        if held is not None and self._sizes[held] >= size:
            return held
        if held is not None:
            del self._addresses[name], self._sizes[held]
            self.device.free(held)
        self._addresses[name] = self.device.allocate(size)
        self._sizes[self._addresses[name]] = size
        return self._addresses[name]

    def close(self) -> None:
        """Free buffers, context and engine, in this order."""
        while self._addresses:
            self.device.free(self._addresses.popitem()[1])
        self._sizes.clear()
        self.context = None
        self.engine = None


class Loader:
    """The library's runtime on one device, with an allocator that keeps account of what engines hold.

    `host_code`: let plans run code of their own on the host; one that is version compatible brings such code.
    """

    def __init__(
        self, backend: str, module: Any, device: Device, *, host_code: bool = False
    ) -> None:
        self.backend, self.module, self.device = backend, module, device
        self.log = Log(module)
        self.blocks = Blocks(device)
        try:
            self.runtime = module.Runtime(self.log.logger)
        except TypeError as error:  # pybind11: the factory gave a null pointer
            raise no_gpu(backend, "run a plan") from error
        self._allocator = allocator(module, self.blocks)
        self.runtime.gpu_allocator = self._allocator
        if host_code:
            self.runtime.engine_host_code_allowed = True

    def load(self, plan: bytes | bytearray) -> Session:
        """A session of a plan. Raises BackendError: another version or GPU, cut short, out of memory."""
        return Session(self, plan)

    def refused(self, doing: str, plan: bytes | bytearray | None = None) -> BackendError:
        """The error that the library's log amounts to; of a plan, what the library can say about it."""
        lines = list(self.log.lines)
        if plan is not None:
            lines += diagnosis(self.module, self.runtime, plan)
        return refusal(self.backend, self.module.__version__, doing, lines)

    def close(self) -> None:
        """Free the runtime before the allocator that it uses."""
        self.runtime = None
        if self.blocks.sizes:
            _KEPT.append(self._allocator)
        self._allocator = None
