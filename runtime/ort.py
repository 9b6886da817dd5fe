"""The ONNX Runtime backend: the deployed INT8 graph, run in integers, and bit flips in its weights.

How faults get in. A session packs its weights when it is made and runs the packed copies, so bytes
changed later in the initializer's buffer are silently not noticed; without packing they are, but
every run is slower. Making a session anew costs milliseconds, so `faults` rebuilds those sessions
whose weights change, from golden bytes with the bits flipped in them, and drops them afterwards.
What runs inside `faults` is exactly `lower` of the flipped file, or, where a flip makes a scale or
another float that can bring NaNs about, that file node by node.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy.bundle import Bundle
from resq_deploy.errors import BackendError, ModelError
from resq_deploy.faults import Flips, Memory, TensorFlips, flipped
from resq_deploy.memory import fault_space
from resq_deploy.onnx_file import read_onnx
from resq_deploy.runtime.cpu import saturates
from resq_deploy.runtime.forms import Lowered
from resq_deploy.runtime.graph import Graph, has_zero_points, sane_scale
from resq_deploy.runtime.lower import lower_graph
from resq_deploy.runtime.runner import Images, Logits, Runner
from resq_deploy.runtime.segments import (
    Segment,
    cut,
    open_session,
    session_options,
    tensor_types,
)
from resq_deploy.runtime.stages import Stages, image_major, merged, part_sizes, same_segment

CHUNK = 16  # images a thread takes at once

Changed = dict[str, NDArray[Any]]
_T = TypeVar("_T")
_R = TypeVar("_R")


class OrtRunner(Runner):
    """The INT8 graph of a bundle on ONNX Runtime's CPU kernels.

    `threads` threads (default: all cores) take images in chunks; a result does not depend on them.
    `exact=True` runs the file node by node, nothing fused, many times slower. On other than x86, and where parts
    are in float16, ONNX Runtime's own fusions run the file; of float16 on a CPU whose byte products saturate, none.
    """

    backend: ClassVar[str] = "ort"

    def __init__(
        self, model: onnx.ModelProto, *, threads: int | None = None, exact: bool = False
    ) -> None:
        self.graph = Graph.of(model)
        self.exact, self.mode = exact, _mode(exact, model)
        self.threads = threads or os.cpu_count() or 1
        self._model = model
        self._pool = ThreadPoolExecutor(self.threads)
        self.lowered: Lowered | None = None
        self.types: Mapping[str, int] = {}
        if self.mode == "lowered":
            self.lowered = lower_graph(self.graph)
            self.types = tensor_types(self.lowered)
        shape = _image_shape(self.graph)
        self.segments: tuple[Segment, ...] = ()
        self.sessions: tuple[ort.InferenceSession, ...] = ()
        self._golden = self._active = self._first_stages(shape)
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
        return cls(read_onnx(bundle.int8), threads=threads, exact=exact)

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

    @property
    def identity(self) -> dict[str, Any]:
        """Node by node where that was asked for: the default is every machine's own."""
        return {"exact": True} if self.exact else {}

    def __enter__(self) -> OrtRunner:
        return self

    def close(self) -> None:
        """End the threads and drop the sessions."""
        self._pool.shutdown()
        self._golden = self._active = Stages()

    def _infer(self, images: Images) -> Logits:
        chunks = [images[i : i + CHUNK] for i in range(0, len(images), CHUNK)]
        stages, name, last = self._active, self.graph.inputs[0].name, self.graph.outputs[0].name
        parts = self.each(lambda chunk: stages.run({name: chunk})[last], chunks)
        return np.concatenate(parts) if len(parts) > 1 else parts[0]

    @contextmanager
    def _inject(self, flips: Flips) -> Iterator[None]:
        try:
            self._active = self._changed_stages(self.changed(flips))
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

    def is_odd(self, changed: Changed) -> bool:
        """Whether a parameter became one that can make a NaN: then the file runs node by node."""
        kinds = {name: self.space.by_name[name].kind for name in changed}
        odd_scale = any(
            kinds[name] == "scales" and not sane_scale(value) for name, value in changed.items()
        )
        floats = [value for value in changed.values() if value.dtype.kind == "f"]
        return odd_scale or any(not np.isfinite(value).all() for value in floats)

    def relowered(self, changed: Changed) -> Lowered:
        """The lowered graph of the file with some parameters exchanged."""
        assert self.lowered is not None
        if not self.weights_only(changed):
            return lower_graph(self.graph.replaced(changed))
        arrays = {**self.lowered.arrays, **changed}
        old = self.lowered
        return Lowered(old.graph, old.nodes, arrays, old.starts, old.sizes)

    def _first_stages(self, shape: tuple[int, int, int]) -> Stages:
        """Cut the golden graph at its layers where that can be done, and again for full runs."""
        lowered = self.lowered
        if lowered is None:
            return self._whole({})
        name = self.graph.inputs[0].name
        two = np.random.default_rng(0).random((2, *shape), dtype=np.float32)
        segments = cut(lowered, lowered.starts, self.types)
        stages = self._stages(lowered, segments)
        whole = Stages(*stages[:2], (2**30,) * len(segments))
        probe = [whole.run({name: two}), whole.run({name: two[1:]})]
        starts = image_major(segments, probe)
        if starts != [s.begin for s in segments if s.begin]:
            stages = self._stages(lowered, cut(lowered, starts, self.types))
        self.segments, self.sessions, _ = stages
        self._starts = merged(lowered, self.segments)
        if self._starts is None:
            self._starts = starts
            return Stages(*stages)
        return Stages(*self._stages(lowered, cut(lowered, self._starts, self.types)))

    def _stages(
        self, lowered: Lowered, segments: tuple[Segment, ...]
    ) -> tuple[tuple[Segment, ...], tuple[ort.InferenceSession, ...], tuple[int, ...]]:
        built = self.each(lambda s: s.build(lowered.arrays), segments)
        return segments, tuple(built), part_sizes(lowered, segments)

    def _changed_stages(self, changed: Changed) -> Stages:
        """What runs with these parameters; sessions that they do not touch are the golden ones."""
        if self.lowered is None or self.is_odd(changed):
            return self._whole(changed)
        before, after, golden = self.lowered, self.relowered(changed), self._golden
        if not same_nodes(before, after):  # parameters that fused kernels cannot take
            segments = cut(after, [], self.types_of(after))
            return Stages(*self._stages(after, segments))
        kept = [same_segment(s, s, before.arrays, after.arrays) for s in golden.segments]
        pairs = list(zip(golden.segments, golden.sessions, kept, strict=True))
        built = self.each(lambda p: p[1] if p[2] else p[0].build(after.arrays), pairs)
        return Stages(golden.segments, tuple(built), golden.parts)

    def types_of(self, lowered: Lowered) -> Mapping[str, int]:
        """Element types of the tensors of a graph that was lowered again."""
        known = all(n in self.types for node in lowered.nodes for n in node.output if n)
        return self.types if known else tensor_types(lowered)

    def each(self, work: Callable[[_T], _R], items: Sequence[_T]) -> list[_R]:
        """Do this for each item, in this runner's threads; results in order."""
        if self.threads == 1 or len(items) < 2:
            return [work(item) for item in items]
        return list(self._pool.map(work, items))

    def _whole(self, changed: Changed) -> Stages:
        """The file as it is, in one session, with some parameters exchanged."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for tensor in model.graph.initializer:
            if tensor.name in changed:
                tensor.CopyFrom(numpy_helper.from_array(changed[tensor.name], tensor.name))
        options = session_options(1, fuse=self.mode == "stock")
        if self.mode != "stock":
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = open_session(model.SerializeToString(), options)
        inputs = tuple(i.name for i in self.graph.inputs)
        outputs = tuple(o.name for o in self.graph.outputs)
        whole = Segment(self.graph.nodes, inputs, outputs, {}, ())
        return Stages((whole,), (session,), (CHUNK,))

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


def same_nodes(a: Lowered, b: Lowered) -> bool:
    """Whether two lowered graphs have the same nodes."""
    return a.nodes is b.nodes or a.nodes == b.nodes


def _mode(exact: bool, model: onnx.ModelProto) -> str:
    if exact:
        return "plain"
    stock = "stock" if has_zero_points(model) else "plain"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return stock
    half = any(t.data_type == onnx.TensorProto.FLOAT16 for t in model.graph.initializer)
    if half and saturates():
        return "plain"
    return stock if half else "lowered"  # the byte kernels know float32 scales only


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
    masks = np.full(elements.size, 1 << memory.width - 1, f"u{memory.value.dtype.itemsize}")
    return Flips({memory.name: TensorFlips(elements, masks)})


def _checksum(array: NDArray[Any]) -> int:
    """Sum of the bytes as 64-bit words, modulo 2**64: one flipped bit always shows."""
    raw = array.reshape(-1).view(np.uint8)
    whole = raw.size // 8 * 8
    total = int(raw[:whole].view(np.uint64).sum(dtype=np.uint64))
    return (total + int.from_bytes(raw[whole:].tobytes(), "little")) % 2**64
