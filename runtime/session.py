"""A plan loaded on a GPU: the library's runtime, an allocator that keeps account, and one session per plan."""

from __future__ import annotations

from typing import Any

import numpy as np

from resq_deploy.errors import BackendError
from resq_deploy.runtime.cuda import Device
from resq_deploy.runtime.runner import Images, Logits
from resq_deploy.runtime.trtlib import Log, no_gpu, refusal


class Blocks:
    """The device memory an engine holds: address -> bytes, as its allocator hands it out."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.sizes: dict[int, int] = {}

    def allocate(self, size: int) -> int | None:
        if not size:
            return None
        try:
            address = self.device.allocate(size)
        except (
            Exception
        ):  # the library asks for None where memory is short; nothing may cross its frames
            return None
        self.sizes[address] = size
        return address

    def deallocate(self, address: int) -> bool:
        if address not in self.sizes:
            return not address
        del self.sizes[address]
        try:
            self.device.free(address)
        except Exception:
            return False
        return True


def allocator(module: Any, blocks: Blocks) -> Any:
    """The library's allocator interface over `blocks`. It must outlive the runtime and engines that use it."""

    class Allocator(module.IGpuAllocator):  # type: ignore[misc]
        def __init__(self) -> None:
            module.IGpuAllocator.__init__(self)

        def allocate(self, size: int, alignment: int, flags: int) -> int | None:
            return blocks.allocate(size)

        def reallocate(self, address: int, alignment: int, new_size: int) -> int | None:
            return None

        def deallocate(self, address: int) -> bool:
            return blocks.deallocate(address)

        def allocate_async(self, size: int, alignment: int, flags: int, stream: int) -> int | None:
            return blocks.allocate(size)

        def deallocate_async(self, address: int, stream: int) -> bool:
            blocks.device.synchronize()
            return blocks.deallocate(address)

    return Allocator()


class Session:
    """One plan, loaded and ready to run on batches of any size."""

    def __init__(self, loader: Loader, plan: bytes | bytearray) -> None:
        trt, self.device = loader.module, loader.device
        loader.log.clear()
        self.engine = loader.runtime.deserialize_cuda_engine(plan)
        if self.engine is None:
            raise loader.refused("load the plan")
        self.context = self.engine.create_execution_context()
        if self.context is None:
            raise loader.refused("prepare the plan")
        self._loader = loader
        names = [self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors)]
        inputs = [n for n in names if self.engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        outputs = [n for n in names if n not in inputs]
        if len(inputs) != 1 or len(outputs) != 1:
            raise BackendError(
                f"the plan has {len(inputs)} inputs and {len(outputs)} outputs, not 1"
            )
        self.input, self.output = inputs[0], outputs[0]
        shapes = self.engine.get_tensor_profile_shape(self.input, 0)
        self.smallest, self.largest = int(shapes[0][0]), int(shapes[2][0])
        self._sizes: dict[int, int] = {}
        self._addresses: dict[str, int] = {}

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
        self.context.set_input_shape(self.input, images.shape)
        shape = tuple(self.context.get_tensor_shape(self.output))
        logits = np.empty(shape, dtype=np.float32)
        for name, size in ((self.input, images.nbytes), (self.output, logits.nbytes)):
            self.context.set_tensor_address(name, self._buffer(name, size))
        self.device.upload(self._addresses[self.input], images)
        if not self.context.execute_async_v3(self.device.stream):
            raise self._loader.refused("run the plan")
        self.device.synchronize()
        raw = self.device.download(self._addresses[self.output], logits.nbytes)
        return np.frombuffer(raw, dtype=np.float32).reshape(shape)[:count].copy()

    def _buffer(self, name: str, size: int) -> int:
        held = self._addresses.get(name)
        if held is not None and self._sizes[held] >= size:
            return held
        if held is not None:
            self.device.free(held)
        self._addresses[name] = self.device.allocate(size)
        self._sizes[self._addresses[name]] = size
        return self._addresses[name]

    def close(self) -> None:
        """Free buffers, context and engine, in this order."""
        for address in self._addresses.values():
            self.device.free(address)
        self._addresses.clear()
        self.context = self.engine = None


class Loader:
    """The library's runtime on one device, with an allocator that keeps account of what engines hold."""

    def __init__(self, backend: str, module: Any, device: Device) -> None:
        self.backend, self.module, self.device = backend, module, device
        self.log = Log(module)
        self.blocks = Blocks(device)
        try:
            self.runtime = module.Runtime(self.log.logger)
        except TypeError as error:  # pybind11: the factory gave a null pointer
            raise no_gpu(backend, "run a plan") from error
        self._allocator = allocator(module, self.blocks)
        self.runtime.gpu_allocator = self._allocator

    def load(self, plan: bytes | bytearray) -> Session:
        """A session of a plan. Raises BackendError: another version or GPU, cut short, out of memory."""
        return Session(self, plan)

    def refused(self, doing: str) -> BackendError:
        """The error that the library's log amounts to."""
        return refusal(self.backend, self.module.__version__, doing, self.log.lines)

    def close(self) -> None:
        """Free the runtime before the allocator that it uses."""
        self.runtime = None
        self._allocator = None
