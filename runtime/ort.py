"""The ONNX Runtime backend: the deployed INT8 graph, run in integers, and bit flips in its weights.

How faults get in. A session packs its weights when it is made and runs the packed copies, so bytes
changed later in the initializer's buffer are silently not noticed; without packing they are, but
every run is slower. Making a session anew costs milliseconds, so `faults` rebuilds those sessions
whose weights change, from golden bytes with the bits flipped in them, and drops them afterwards.
What runs inside `faults` is exactly `lower` of the flipped file.
"""

from __future__ import annotations

import os
import platform
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.bundle import Bundle
from resq_deploy.errors import BackendError, ModelError
from resq_deploy.faults import Flips, Memory, TensorFlips, flipped
from resq_deploy.memory import fault_space
from resq_deploy.runtime.forms import MS, Lowered
from resq_deploy.runtime.graph import Arrays, Graph
from resq_deploy.runtime.lower import lower_graph
from resq_deploy.runtime.runner import Images, Logits, Runner
from resq_deploy.runtime.segments import (
    Segment,
    Tensors,
    cut,
    open_session,
    run_segment,
    session_options,
    tensor_types,
)

CHUNK = 16  # images a thread takes at once
_WIDE = 2**15  # from so many values of one layer on, the patches of few images fill a core's cache
_FEW, _MANY = 2, 8  # images at once in wide layers, and in the others

Changed = dict[str, NDArray[Any]]
_T = TypeVar("_T")
_R = TypeVar("_R")


class OrtRunner(Runner):
    """The INT8 graph of a bundle on ONNX Runtime's CPU kernels.

    `threads` threads (default: all cores) take images in chunks; a result does not depend on them.
    `exact=True` runs the file node by node, nothing fused, many times slower; so does a CPU whose
    byte products saturate, and on other than x86 ONNX Runtime's own fusions run the file.
    """

    backend: ClassVar[str] = "ort"

    def __init__(
        self, model: onnx.ModelProto, *, threads: int | None = None, exact: bool = False
    ) -> None:
        self.graph = Graph.of(model)
        self.mode = _mode(exact)
        self.threads = threads or os.cpu_count() or 1
        self._model = model
        self._pool = ThreadPoolExecutor(self.threads)
        self.lowered: Lowered | None = None
        self.types: Mapping[str, int] = {}
        if self.mode == "lowered":
            self.lowered = lower_graph(self.graph)
            self.types = tensor_types(self.lowered)
        self._split = True
        self._last = self.graph.outputs[0].name
        shape = _image_shape(self.graph)
        self._golden = self._active = self._build({}, None)
        if not self._splits(shape):
            self._split = False
            self._golden = self._active = self._build({}, None)
        classes = self._infer(np.zeros((1, *shape), np.float32)).shape[-1]
        super().__init__(fault_space(model), shape, int(classes))
        self._sums = {m.name: _checksum(m.value) for m in self.space.memories}

    @classmethod
    def open(
        cls, bundle: Bundle, *, threads: int | None = None, exact: bool = False, **options: Any
    ) -> OrtRunner:
        """Open a verified bundle's model.int8.onnx. Raises BackendError where it cannot be run."""
        if options:
            raise BackendError(
                f"the ort backend has no option {sorted(options)[0]!r}", "it has threads and exact"
            )
        return cls(onnx.load(os.fspath(bundle.int8)), threads=threads, exact=exact)

    @property
    def info(self) -> dict[str, Any]:
        """What ran: library version, threads, way of execution and of injection."""
        return {
            "backend": self.backend,
            "onnxruntime": ort.__version__,
            "threads": self.threads,
            "execution": self.mode,
            "injection": "sessions rebuilt from flipped bytes",
        }

    def close(self) -> None:
        """End the threads and drop the sessions."""
        self._pool.shutdown()
        self._golden = self._active = _Plan((), (), ())

    def _infer(self, images: Images) -> Logits:
        chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
        plan = self._active
        name = self.graph.inputs[0].name
        parts = self.each(lambda chunk: plan.run({name: chunk})[self._last], chunks)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    @contextmanager
    def _inject(self, flips: Flips) -> Iterator[None]:
        try:
            self._active = self.faulty_plan(self.changed(flips))
            yield
        finally:
            self._active = self._golden
            self.check_golden(flips)

    def changed(self, flips: Flips) -> Changed:
        """The tensors of a trial with their bits flipped. Raises BackendError where a bit was not."""
        arrays = {}
        for name, part in flips.items():
            memory = self.space.by_name[name]
            arrays[name] = flipped(memory, part)
            kind = part.masks.dtype
            old, new = (
                v.reshape(-1).view(kind)[part.elements] for v in (memory.value, arrays[name])
            )
            if not np.array_equal(old ^ new, part.masks):
                raise BackendError(f"bits of {name} did not flip")
        return arrays

    def check_golden(self, names: Iterable[str]) -> None:
        """Compare the golden bytes of these tensors with their checksums. Raises BackendError."""
        for name in names:
            if _checksum(self.space.by_name[name].value) != self._sums[name]:
                raise BackendError(f"golden bytes of {name} were changed during a trial")

    def weights_only(self, changed: Mapping[str, Any]) -> bool:
        """Whether only INT8 codes change: then the lowered graph keeps its shape and its constants."""
        return all(self.space.by_name[name].kind == "weights" for name in changed)

    def relowered(self, changed: Changed) -> Lowered:
        """The lowered graph of the file with some parameters exchanged."""
        assert self.lowered is not None
        if not self.weights_only(changed):
            return lower_graph(self.graph.replaced(changed))
        arrays = {**self.lowered.arrays, **changed}
        old = self.lowered
        return Lowered(old.graph, old.nodes, arrays, old.starts, old.sizes)

    def faulty_plan(self, changed: Changed) -> _Plan:
        """What runs with these parameters; sessions that they do not touch are the golden ones."""
        return self._build(changed, self._golden)

    def _build(self, changed: Changed, golden: _Plan | None) -> _Plan:
        if self.mode != "lowered":
            return self._build_whole(changed)
        assert self.lowered is not None
        lowered = self.relowered(changed) if golden else self.lowered
        starts, chunks = _blocks(lowered) if self._split else ([], (CHUNK,))
        segments = cut(lowered, starts, self.types_of(lowered))
        kept: list[ort.InferenceSession | None] = [None] * len(segments)
        if golden and len(golden.segments) == len(segments):
            kept = [
                session if same_segment(old, new, self.lowered.arrays, lowered.arrays) else None
                for old, session, new in zip(
                    golden.segments, golden.sessions, segments, strict=True
                )
            ]
        pairs = list(zip(segments, kept, strict=True))
        built = self.each(lambda pair: pair[1] or pair[0].build(lowered.arrays), pairs)
        return _Plan(segments, built, chunks)

    def types_of(self, lowered: Lowered) -> Mapping[str, int]:
        """Element types of the tensors of a graph that was lowered again."""
        known = all(n in self.types for node in lowered.nodes for n in node.output if n)
        return self.types if known else tensor_types(lowered)

    def each(self, work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """Do this for each item, in this runner's threads; results in order."""
        if self.threads == 1 or len(items) < 2:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))

    def part_sizes(self, segments: Sequence[Segment]) -> list[int]:
        """How many images at once a full run gives to each of these finer segments."""
        plan = self._golden
        starts = [s.begin for s in plan.segments]
        return [plan.chunks[bisect_right(starts, s.begin) - 1] for s in segments]

    def _build_whole(self, changed: Changed) -> _Plan:
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for tensor in model.graph.initializer:
            if tensor.name in changed:
                tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name], tensor.name))
        options = session_options(1)
        if self.mode == "plain":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        else:
            options.add_session_config_entry("session.disable_quant_qdq", "0")
        session = open_session(model.SerializeToString(), options)
        inputs = tuple(i.name for i in self.graph.inputs)
        outputs = tuple(o.name for o in self.graph.outputs)
        whole = Segment(self.graph.nodes, inputs, outputs, {}, ())
        return _Plan((whole,), (session,), (CHUNK,))

    def _splits(self, shape: tuple[int, int, int]) -> bool:
        """Whether every tensor between the parts holds one row for each image."""
        name = self.graph.inputs[0].name
        runs = [self._golden.run({name: np.zeros((n, *shape), np.float32)}) for n in (2, 3)]
        return all(
            len(live[n]) == count
            for count, live in zip((2, 3), runs, strict=True)
            for segment in self._golden.segments
            for n in segment.inputs
        )

    def unnoticed(self, images: Images, flips: int = 64) -> list[str]:
        """Self-check: INT8 tensors in which many flipped sign bits leave the logits as they are.

        An empty list says that every layer's weights are the ones that run.
        """
        golden, silent = self(images), []
        for memory in self.space.memories:
            if memory.kind == "weights":
                with self.faults(_sign_flips(memory, flips)):
                    if np.array_equal(self(images), golden, equal_nan=True):
                        silent.append(memory.name)
        return silent


class _Plan:
    """Sessions run one after the other, each on as many images at once as the cache likes."""

    def __init__(
        self,
        segments: Sequence[Segment],
        sessions: Sequence[ort.InferenceSession],
        chunks: Sequence[int],
    ) -> None:
        self.segments = tuple(segments)
        self.sessions = tuple(sessions)
        self.chunks = tuple(chunks)

    def run(self, live: Tensors) -> Tensors:
        """The outputs for one chunk of images."""
        for segment, session, size in zip(self.segments, self.sessions, self.chunks, strict=True):
            live = {**live, **in_parts(segment, session, live, size)}
        return live


def in_parts(segment: Segment, session: ort.InferenceSession, live: Tensors, size: int) -> Tensors:
    """A segment's outputs, computed for `size` images at a time."""
    count = len(live[segment.inputs[0]])
    if count <= size:
        return run_segment(segment, session, live)
    parts = [
        run_segment(segment, session, {n: live[n][i : i + size] for n in segment.inputs})
        for i in range(0, count, size)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in segment.outputs}


def same_segment(old: Segment, new: Segment, before: Arrays, after: Arrays) -> bool:
    """Whether two segments compute the same: equal nodes and equal bytes of parameters."""
    if old.nodes is not new.nodes and old.nodes != new.nodes:
        return False
    return all(same_bytes(before[n], after[n]) for n in old.params)


def same_bytes(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays hold the same bytes (NaNs too)."""
    return a is b or (a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes())


def _blocks(lowered: Lowered) -> tuple[list[int], tuple[int, ...]]:
    """Where to cut for speed, and how many images to run at once in each part.

    Layers with large maps run on few images, so that a layer's patches stay in the cache.
    """
    layers = list(zip(lowered.starts, lowered.sizes, strict=True))
    wide = [at for at, size in layers if size > _WIDE]
    after = [at for at in lowered.starts if wide and at > wide[-1]]
    if not wide or not after:
        return [], (_FEW if wide else _MANY,)
    return after[:1], (_FEW, _MANY)


def _mode(exact: bool) -> str:
    if exact:
        return "plain"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "stock"
    return "plain" if _saturates() else "lowered"


@lru_cache(maxsize=1)
def _saturates() -> bool:
    """Whether this CPU's U8 x S8 products saturate in 16 bits (AVX2 without VNNI: 255 * 127 * 2)."""
    a, b = np.full((2, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    info = [("a", onnx.TensorProto.UINT8), ("y", onnx.TensorProto.INT32)]
    x, y = (helper.make_tensor_value_info(name, kind, None) for name, kind in info)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "probe", [x], [y], [numpy_helper.from_array(b, "b")])
    versions = [helper.make_opsetid("", 17), helper.make_opsetid(MS, 1)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    session = open_session(model.SerializeToString(), session_options(1))
    return bool(np.any(session.run(None, {"a": a})[0] != 255 * 127 * 64))


def _image_shape(graph: Graph) -> tuple[int, int, int]:
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise ModelError("the graph needs one input of images and one output of logits")
    shape = graph.shapes.get(graph.inputs[0].name, ())
    if len(shape) != 4 or None in shape[1:]:
        raise ModelError("the graph's input is not [N, C, H, W] with C, H and W fixed")
    _, channels, height, width = (d or 0 for d in shape)
    return channels, height, width


def _sign_flips(memory: Memory, count: int) -> Flips:
    size = memory.value.size
    elements = np.unique(np.linspace(0, size - 1, min(count, size)).astype(np.int64))
    return Flips({memory.name: TensorFlips(elements, np.full(elements.size, 128, np.uint8))})


def _checksum(array: NDArray[Any]) -> int:
    """Sum of the bytes as 64-bit words, modulo 2**64: one flipped bit always shows."""
    raw = array.reshape(-1).view(np.uint8)
    whole = raw.size // 8 * 8
    total = int(raw[:whole].view(np.uint64).sum(dtype=np.uint64))
    return (total + int.from_bytes(raw[whole:].tobytes(), "little")) % 2**64
