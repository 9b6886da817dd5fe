"""A stand-in for TensorRT and its GPU: loads made-up plans into host memory and runs what lies there.

It keeps to what the real library shows: allocation through IGpuAllocator, None and log lines instead of
exceptions, an engine that reads its weights from device memory at every run. What it computes is the
ONNX graph with the weights found in that memory, by ONNX Runtime. Whether a real GPU behaves so is for
tests/gpu to show.
"""

from __future__ import annotations

import enum
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy.runtime.layouts import Layout
from tests.runtime.host_device import HostDevice
from tests.runtime.plans import noise

MAGIC = b"fake"
VERSION = "10.9.0"


class _Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class _ILogger:
    Severity = _Severity


class _IoMode(enum.Enum):
    INPUT = 0
    OUTPUT = 1


class _GpuAllocator:
    """As pybind11 has it: unusable where the base class was not initialized, and no method falls back to it."""

    def __init__(self) -> None:
        self.ready = True

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"IGpuAllocator.{name} was called, but it is not overridden")


class _DataType(enum.Enum):
    FLOAT = np.float32
    HALF = np.float16


class FakeTensorRT:
    """The module. `model`: the INT8 graph that its plans hold; `layouts`: weight -> tag, in the plan's order."""

    def __init__(self, model: onnx.ModelProto, layouts: Mapping[str, str]) -> None:
        self.model, self.layouts = model, dict(layouts)
        self.__version__ = VERSION
        self.refittable = True
        self.own_memory = False  # weights outside the allocator's blocks
        self.twice = False  # a second, dead copy of the weights
        self.batch = (2, 3, 4)
        self.fixed = False  # the plan has a fixed batch, and no profile
        self.half = False  # the plan's output is float16
        self.version_compatible = False
        self.refuses = ""  # the call that returns False, and a log line
        self.says = ""  # why no plan is loaded
        self.fails = False  # a run with a flipped sign bit in the first weight fails ...
        self.sticky = False  # ... and each one after it
        self.lost = False
        self.why = "an illegal instruction was encountered"
        self.ILogger, self.IGpuAllocator, self.TensorIOMode = _ILogger, _GpuAllocator, _IoMode
        self.Weights = np.asarray
        self.crashes: list[str] = []  # what would have ended the process

    def nptype(self, kind: _DataType) -> Any:
        return kind.value

    def takes(self, call: str, logger: Any) -> bool:
        """Whether a call succeeds; where not, it says why in the log."""
        if call == self.refuses:
            logger.log(
                _Severity.ERROR,
                f"IExecutionContext::{call}: Error Code 3: API Usage Error (out of luck)",
            )
        return call != self.refuses

    def plan(self) -> bytes:
        """Header, noise, weights in their layouts, noise."""
        values = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}
        body = noise(100)
        for name, tag in self.layouts.items():
            body += Layout(tag, values[name].shape).pack(values[name]).tobytes() + noise(24)
        return MAGIC + len(body).to_bytes(4, "little") + body

    def survives(self, weights: Mapping[str, NDArray[Any]]) -> bool:
        """Whether a run with these weights comes to its end."""
        if not self.fails:
            return True
        name = next(iter(self.layouts))
        golden = {t.name: numpy_helper.to_array(t) for t in self.model.graph.initializer}[name]
        bad = bool(np.any((weights[name] ^ golden) & np.int8(-128)))
        self.lost = self.lost or (bad and self.sticky)
        return not bad and not self.lost

    def Runtime(self, logger: Any) -> _Runtime:
        return _Runtime(self, logger)

    def Refitter(self, engine: _Engine, logger: Any) -> _Refitter:
        return _Refitter(engine)


class _Runtime:
    def __init__(self, library: FakeTensorRT, logger: Any) -> None:
        self.library, self.logger = library, logger
        self.device = HOLDER["device"]
        self.allocator: Any = lambda: None
        self.engine_host_code_allowed = False

    def _set_allocator(self, allocator: Any) -> None:
        """A bare pointer, as in the library: who sets it keeps it alive."""
        assert allocator.ready, "the base class was not initialized"
        self.allocator = weakref.ref(allocator)

    gpu_allocator = property(None, _set_allocator)

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        if self.library.says:
            self.logger.log(_Severity.ERROR, self.library.says)
            return None
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
        if self.library.version_compatible and not self.engine_host_code_allowed:
            self.logger.log(
                _Severity.ERROR,
                "IRuntime::deserializeCudaEngine: Error Code 3: API Usage Error (the plan has host code, and"
                " engineHostCodeAllowed is false)",
            )
            return None
        return _Engine(self, bytes(plan[8:]))


class _Engine:
    num_io_tensors = 2

    def __init__(self, runtime: _Runtime, body: bytes) -> None:
        self.runtime, self.library = runtime, runtime.library
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
        return self.runtime.device

    def take(self, size: int) -> int:
        if self.library.own_memory:
            return self.device.allocate(size)
        address: int = self.runtime.allocator().allocate(size, 256, 0)
        assert isinstance(address, int), "the bindings take nothing but an integer"
        return address

    def __del__(self) -> None:
        for address in self.held:
            if self.library.own_memory:
                self.device.free(address)
            elif self.runtime.allocator() is None:
                self.library.crashes.append("the allocator is gone, the engine still calls it")
            elif not self.runtime.allocator().deallocate(address):
                self.library.crashes.append("memory of the engine was freed behind its back")

    def create_execution_context(self) -> _Context | None:
        taken = self.library.takes("create_execution_context", self.runtime.logger)
        return _Context(self) if taken else None

    def get_tensor_dtype(self, name: str) -> _DataType:
        first = name == self.library.model.graph.input[0].name
        return _DataType.HALF if self.library.half and not first else _DataType.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.library.batch[0] if self.library.fixed else -1, 3, 3, 3)

    def get_tensor_name(self, index: int) -> str:
        graph = self.library.model.graph
        name: str = (graph.input[0].name, graph.output[0].name)[index]
        return name

    def get_tensor_mode(self, name: str) -> _IoMode:
        first = name == self.library.model.graph.input[0].name
        return _IoMode.INPUT if first else _IoMode.OUTPUT

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[tuple[int, ...]]:
        if self.library.fixed:
            return [(-1,)] * 3
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

    def _takes(self, call: str) -> bool:
        return self.engine.library.takes(call, self.engine.runtime.logger)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.library.batch
        if self.engine.library.fixed:
            high = low
        assert low <= shape[0] <= high, "a batch outside the profile"
        self.shape = tuple(shape)
        return self._takes("set_input_shape")

    def get_tensor_shape(self, name: str) -> tuple[int, int]:
        return self.shape[0], 10

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return self._takes("set_tensor_address")

    def execute_async_v3(self, stream: int) -> bool:
        if not self._takes("execute_async_v3"):
            return False
        if not self.engine.library.survives(self.engine.weights()):
            self.engine.runtime.logger.log(_Severity.ERROR, self.engine.library.why)
            return False
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
