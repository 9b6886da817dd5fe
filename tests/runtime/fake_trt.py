"""A stand-in for TensorRT and its GPU: loads made-up plans into host memory and runs what lies there.

It keeps to what the real library shows: allocation through IGpuAllocator, None and log lines instead of
exceptions, an engine that reads its weights from device memory at every run. What it computes is the
ONNX graph with the weights found in that memory, by ONNX Runtime. Whether a real GPU behaves so is for
tests/gpu to show.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy.runtime.layouts import Indices, Layout
from tests.runtime.plans import noise

MAGIC = b"fake"
VERSION = "10.9.0"


class HostDevice:
    """Device memory on the host: blocks far apart, so that an address beyond one is an error."""

    name = "host memory"
    stream = 7

    def __init__(self, backend: str = "tensorrt") -> None:
        self.blocks: dict[int, NDArray[np.uint8]] = {}
        self.closed = False
        self._next = 2**40

    def allocate(self, size: int) -> int:
        address, self._next = self._next, self._next + 2**32
        self.blocks[address] = np.zeros(size, dtype=np.uint8)
        return address

    def free(self, address: int) -> None:
        del self.blocks[address]

    def upload(self, address: int, array: NDArray[Any]) -> None:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self.at(address)[: raw.size] = raw

    def download(self, address: int, size: int) -> bytes:
        return self.at(address)[:size].tobytes()

    def flip(self, addresses: Indices, masks: NDArray[np.uint8]) -> None:
        for address, mask in zip(addresses.tolist(), masks.tolist(), strict=True):
            self.at(address)[0] ^= mask

    def peek(self, addresses: Indices) -> NDArray[np.uint8]:
        return np.array([self.at(a)[0] for a in addresses.tolist()], dtype=np.uint8)

    def synchronize(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def at(self, address: int) -> NDArray[np.uint8]:
        """Memory from an address to the end of its block."""
        base = max(a for a in self.blocks if a <= address)
        return self.blocks[base][address - base :]

    def content(self) -> bytes:
        """All that is allocated, to compare."""
        return b"".join(block.tobytes() for block in self.blocks.values())


class _Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class _ILogger:
    Severity = _Severity


class _IoMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class FakeTensorRT:
    """The module. `model`: the INT8 graph that its plans hold; `layouts`: weight -> tag, in the plan's order."""

    def __init__(self, model: onnx.ModelProto, layouts: Mapping[str, str]) -> None:
        self.model, self.layouts = model, dict(layouts)
        self.__version__ = VERSION
        self.refittable = True
        self.own_memory = False  # weights outside the allocator's blocks
        self.twice = False  # a second, dead copy of the weights
        self.batch = (2, 3, 4)
        self.ILogger, self.IGpuAllocator, self.TensorIOMode = _ILogger, object, _IoMode
        self.Weights = np.asarray

    def plan(self) -> bytes:
        """Header, noise, weights in their layouts, noise."""
        values = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}
        body = noise(100)
        for name, tag in self.layouts.items():
            body += Layout(tag, values[name].shape).pack(values[name]).tobytes() + noise(24)
        return MAGIC + len(body).to_bytes(4, "little") + body

    def Runtime(self, logger: Any) -> _Runtime:
        return _Runtime(self, logger)

    def Refitter(self, engine: _Engine, logger: Any) -> _Refitter:
        return _Refitter(engine)


class _Runtime:
    gpu_allocator: Any = None

    def __init__(self, library: FakeTensorRT, logger: Any) -> None:
        self.library, self.logger = library, logger

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        if plan[:4] != MAGIC:
            self.logger.log(
                _Severity.ERROR,
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion"
                " header.magicTag == kEXPECTED_MAGIC_TAG failed.Trying to load an engine created with"
                " incompatible serialization version. In parsePlan at /_src/runtime.cpp:715)",
            )
            return None
        if int.from_bytes(plan[4:8], "little") != len(plan) - 8:
            self.logger.log(
                _Severity.ERROR,
                "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion"
                " plan.header.size == blobSize failed. In parsePlan at /_src/runtime.cpp:780)",
            )
            return None
        return _Engine(self, bytes(plan[8:]))


class _Engine:
    num_io_tensors = 2

    def __init__(self, runtime: _Runtime, body: bytes) -> None:
        self.library, self.allocator = runtime.library, runtime.gpu_allocator
        self.refittable = self.library.refittable
        self.values = {
            t.name: numpy_helper.to_array(t) for t in self.library.model.graph.initializer
        }
        self.places: dict[str, int] = {}
        self.held = [self.take(4096)]
        at, image = 100, bytearray()
        for name, tag in self.library.layouts.items():
            size = Layout(tag, self.values[name].shape).size
            image += bytes(-len(image) % 128)
            self.places[name] = len(image)
            image += body[at : at + size]
            at += size + 24
        for _ in range(2 if self.library.twice else 1):
            self.base = self.take(len(image))
            self.held.append(self.base)
            self.device.upload(self.base, np.frombuffer(bytes(image), np.uint8))

    @property
    def device(self) -> HostDevice:
        found: HostDevice = HOLDER["device"]
        return found

    def take(self, size: int) -> int:
        if self.library.own_memory:
            return self.device.allocate(size)
        address: int = self.allocator.allocate(size, 256, 0)
        return address

    def __del__(self) -> None:
        for address in self.held:
            if self.library.own_memory:
                self.device.free(address)
            else:
                self.allocator.deallocate(address)

    def create_execution_context(self) -> _Context:
        return _Context(self)

    def get_tensor_name(self, index: int) -> str:
        graph = self.library.model.graph
        name: str = (graph.input[0].name, graph.output[0].name)[index]
        return name

    def get_tensor_mode(self, name: str) -> _IoMode:
        first = name == self.library.model.graph.input[0].name
        return _IoMode.INPUT if first else _IoMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        return [(batch, 3, 3, 3) for batch in self.library.batch]

    def weights(self) -> dict[str, NDArray[Any]]:
        """What lies in device memory now."""
        found = dict(self.values)
        for name, tag in self.library.layouts.items():
            layout = Layout(tag, self.values[name].shape)
            raw = self.device.download(self.base + self.places[name], layout.size)
            found[name] = layout.unpack(np.frombuffer(raw, np.int8))
        return found


class _Context:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.shape: tuple[int, ...] = ()
        self.addresses: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.library.batch
        assert low <= shape[0] <= high, "a batch outside the profile"
        self.shape = tuple(shape)
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        return self.shape[0], 10

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        device, graph = self.engine.device, self.engine.library.model.graph
        source, sink = (self.addresses[v.name] for v in (graph.input[0], graph.output[0]))
        raw = device.download(source, 4 * int(np.prod(self.shape)))
        images = np.frombuffer(raw, np.float32).reshape(self.shape)
        model = onnx.ModelProto()
        model.CopyFrom(self.engine.library.model)
        for tensor in model.graph.initializer:
            value = self.engine.weights()[tensor.name]
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        device.upload(sink, reference(model, images))
        return True


class _Refitter:
    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.pending: dict[str, NDArray[Any]] = {}

    def get_all_weights(self) -> list[str]:
        return list(self.engine.library.layouts)

    def set_named_weights(self, name: str, weights: NDArray[Any]) -> bool:
        self.pending[name] = weights
        return True

    def refit_cuda_engine(self) -> bool:
        for name, value in self.pending.items():
            copy = Layout(self.engine.library.layouts[name], value.shape).pack(value)
            self.engine.device.upload(self.engine.base + self.engine.places[name], copy)
        self.pending.clear()
        return True


HOLDER: dict[str, HostDevice] = {}  # the device of the test that runs


def device_of(backend: str) -> HostDevice:
    """A fresh device, which the fake library allocates on."""
    HOLDER["device"] = HostDevice(backend)
    return HOLDER["device"]


def reference(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logits of a graph as the file says, nothing fused."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    logits: NDArray[np.float32] = session.run(None, {model.graph.input[0].name: images})[0]
    return logits
