"""What `lower` builds on: the forms a tensor can take, and how a quantized tensor is written in bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.runtime.graph import Arrays, Graph, attributes, sane_scale

MS = "com.microsoft"
MOVES = frozenset({"Flatten", "Reshape", "Transpose", "Identity", "Squeeze", "Unsqueeze"})
_POOL = frozenset({"kernel_shape", "strides", "pads", "dilations"})

Produce = Callable[[str, int], tuple[str, bool]]


@dataclass(frozen=True, slots=True)
class Quant:
    """A quantized tensor that exists as U8 codes.

    `scale` is the name of a parameter, `zero` the zero point of the U8 codes; the file's codes are
    these minus `shift`, S8 where `signed`.
    """

    name: str
    scale: str
    zero: int
    shift: int
    nhwc: bool
    rank: int | None
    signed: bool


@dataclass(frozen=True, slots=True)
class Weight:
    """INT8 weights behind a DequantizeLinear; `scale` is the name of a parameter."""

    name: str
    scale: str
    axis: int


@dataclass(frozen=True, slots=True)
class Sink:
    """What follows a float tensor up to the Q that ends it: the nodes between, and the Q."""

    between: tuple[onnx.NodeProto, ...]
    q: onnx.NodeProto


@dataclass(slots=True)
class Lowered:
    """The rewritten nodes, the parameters they read, and where in `nodes` each layer starts.

    `sizes`: how many values each of these layers gives for one image, 0 where that is not known.
    """

    graph: Graph
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    arrays: dict[str, NDArray[Any]] = field(default_factory=dict)
    starts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def model(self) -> onnx.ModelProto:
        """As an ONNX model; parameters that no node reads any more are left out."""
        used = {name for node in self.nodes for name in node.input}
        inits = [numpy_helper.from_array(v, k) for k, v in self.arrays.items() if k in used]
        graph = helper.make_graph(
            self.nodes, "lowered", list(self.graph.inputs), list(self.graph.outputs), inits
        )
        return helper.make_model(graph, opset_imports=opsets(self.graph), ir_version=9)


def opsets(graph: Graph) -> list[onnx.OperatorSetIdProto]:
    """The opsets of a lowered graph: the file's, and ONNX Runtime's own domain."""
    versions = {domain: version for domain, version in graph.opsets if domain != MS}
    return [helper.make_opsetid(d, v) for d, v in versions.items()] + [helper.make_opsetid(MS, 1)]


class Forms:
    """The tensors of a graph while it is rewritten.

    A tensor can exist in float, NCHW or NHWC, and as U8 codes; a form is made when first asked for.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.out = Lowered(graph, arrays=dict(graph.arrays))
        self.floats: dict[str, dict[bool, str]] = {i.name: {False: i.name} for i in graph.inputs}
        self.quants: dict[str, Quant] = {}
        self.weights: dict[str, Weight] = {}
        self.pending: dict[str, Callable[[], None]] = {}
        self.done: set[int] = set()
        self._turned: dict[str, str] = {}
        self._fresh = 0

    def emit(self, op: str, inputs: list[str], domain: str = "", **attrs: Any) -> str:
        """Append a node; gives the name of its one output."""
        self._fresh += 1
        name = f"resq/{op}_{self._fresh}"
        node = helper.make_node(op, inputs, [name], name=name, domain=domain, **attrs)
        self.out.nodes.append(node)
        return name

    def const(self, value: Any, dtype: Any) -> str:
        """A small parameter whose name tells its value."""
        array = np.asarray(value, dtype=dtype)
        text = "_".join(map(str, array.reshape(-1).tolist()))
        return self.derived(f"{array.dtype.name}/{array.ndim}/{text}", array)

    def derived(self, name: str, array: NDArray[Any]) -> str:
        """A parameter computed from those of the file."""
        name = f"resq/{name}"
        self.out.arrays[name] = array
        return name

    def begin(self, output: str) -> None:
        """The next node is the first of a layer that makes `output`."""
        here = len(self.out.nodes)
        if not self.out.starts or self.out.starts[-1] != here:
            shape = self.graph.shapes.get(output, ())[1:]
            self.out.starts.append(here)
            self.out.sizes.append(math.prod(d or 0 for d in shape))

    def constant(self, name: str) -> NDArray[Any] | None:
        """A parameter's value: of the file, or of a constant that was computed from it."""
        if name in self.graph.arrays:
            return self.graph.arrays[name]
        forms = self.floats.get(name, {})
        return self.out.arrays.get(forms[False]) if False in forms else None

    def float_of(self, name: str, nhwc: bool = False) -> str:
        """The float form of a tensor of the file, in the layout asked for."""
        if name in self.graph.arrays or not name:
            return name
        if name in self.pending:
            self.pending.pop(name)()
        forms = self.floats.setdefault(name, {})
        if nhwc not in forms:
            forms[nhwc] = self._new_float(name, forms, nhwc)
        return forms[nhwc]

    def _new_float(self, name: str, forms: dict[bool, str], nhwc: bool) -> str:
        if forms:
            return self.transposed(forms[not nhwc], nhwc)
        if name in self.quants:
            q = self.quants[name]
            ins = [self.codes_of(name, nhwc), q.scale, self.const(q.zero, np.uint8)]
            return self.emit("DequantizeLinear", ins)
        if name in self.weights:
            w = self.weights[name]
            scale = self.graph.arrays[w.scale]
            zero = self.derived(f"{w.name}/{w.scale}/zero", np.zeros(scale.shape, np.int8))
            attrs: dict[str, Any] = {"axis": w.axis} if scale.ndim else {}
            return self.emit("DequantizeLinear", [w.name, w.scale, zero], **attrs)
        return name

    def codes_of(self, name: str, nhwc: bool) -> str:
        """The U8 codes of a quantized tensor, in the layout asked for."""
        q = self.quants[name]
        if q.rank != 4 or q.nhwc == nhwc:
            return q.name
        if q.name not in self._turned:
            self._turned[q.name] = self.transposed(q.name, nhwc)
        return self._turned[q.name]

    def operand(self, name: str, nhwc: bool) -> tuple[str, str, str]:
        """A quantized tensor as an integer operator takes it: codes, scale, zero point."""
        q = self.quants[name]
        return self.codes_of(name, nhwc), self.scalar(q.scale), self.const(q.zero, np.uint8)

    def scalar(self, scale: str) -> str:
        """A scale of one value as integer operators take it: some refuse the shape [1]."""
        value = self.graph.arrays[scale]
        return scale if value.ndim == 0 else self.derived(f"{scale}/scalar", value.reshape(()))

    def transposed(self, name: str, nhwc: bool) -> str:
        """A rank-4 tensor in the other layout."""
        return self.emit("Transpose", [name], perm=[0, 2, 3, 1] if nhwc else [0, 3, 1, 2])

    def is_nhwc(self, name: str) -> bool:
        """Whether a rank-4 tensor is at hand, or about to be, in NHWC."""
        if self.graph.rank(name) != 4:
            return False
        if name in self.pending or True in self.floats.get(name, {}):
            return True
        return name in self.quants and self.quants[name].nhwc

    def sane(self, name: str) -> bool:
        """Whether a tensor is quantized, with a scale that fused kernels may use."""
        q = self.quants.get(name)
        return q is not None and sane_scale(self.graph.arrays[q.scale])

    def sink(self, name: str) -> Sink | None:
        """Follow a tensor through clamps, pools and moves to its Q; None where it is used otherwise."""
        between: list[onnx.NodeProto] = []
        while (node := self.graph.only_consumer(name)) is not None:
            if node.op_type == "QuantizeLinear":
                return Sink(tuple(between), node) if self.q_fits(node, name) else None
            if not self._passes(node, name):
                return None
            between.append(node)
            name = node.output[0]
        return None

    def _passes(self, node: onnx.NodeProto, name: str) -> bool:
        """Whether Q may be done before this node instead of after it, with the same result."""
        if node.input[0] != name or len(node.output) != 1 or node.domain:
            return False
        if node.op_type == "MaxPool":
            attrs = attributes(node)
            plain = attrs.get("auto_pad", b"NOTSET") == b"NOTSET" and not attrs.get("ceil_mode")
            return self.graph.rank(name) == 4 and plain
        limits = _clip_range(node, self.graph.arrays)
        return limits is not None or node.op_type in MOVES

    def q_fits(self, q: onnx.NodeProto, name: str) -> bool:
        """Whether fused kernels may end in a Q: per tensor, 8 bits, constant, of a sane scale, read by DQ only."""
        arrays = self.graph.arrays
        known = len(q.input) == 3 and q.input[1] in arrays and q.input[2] in arrays
        if not known or q.domain or q.input[0] != name or not self._is_hidden(q.output[0]):
            return False
        scale, zero = arrays[q.input[1]], arrays[q.input[2]]
        return scale.size == 1 == zero.size and zero.dtype.itemsize == 1 and sane_scale(scale)

    def _is_hidden(self, codes: str) -> bool:
        """Whether nothing but DequantizeLinear reads codes, so that they may be kept in another form."""
        readers = self.graph.consumers.get(codes, [])
        alike = all(n.op_type == "DequantizeLinear" and not n.domain for n in readers)
        return alike and codes not in self.graph.output_names

    def close(
        self, sink: Sink, produce: Produce, rank: int | None, shift: int | None = None
    ) -> None:
        """Emit what produces U8 codes, then a sink's clamps, pools and moves on the bytes.

        `produce(scale, zero point)` emits the codes; it returns their name and whether they are NHWC.
        S8 codes q are kept as q + 128, or after a Relu as q, where one clamp is then left to do; U8 codes as they are.
        """
        scale, zeros = sink.q.input[1], self.graph.arrays[sink.q.input[2]].reshape(-1)
        z, signed = int(zeros[0]), zeros.dtype == np.int8
        low, high = self._clamp(sink, scale, z, signed)
        if shift is None:
            shift = 128 if signed and (low < 0 or z < 0) else 0
        name, nhwc = produce(self.scalar(scale), z + shift)
        if low + shift > 0:
            name = self.emit("Max", [name, self.const(low + shift, np.uint8)])
        if high + shift < 255:
            name = self.emit("Min", [name, self.const(high + shift, np.uint8)])
        for node in sink.between:
            name, nhwc = self._move(node, name, nhwc)
            self.done.add(id(node))
        self.done.add(id(sink.q))
        rank = self.graph.rank(sink.between[-1].output[0]) if sink.between else rank
        self.quants[sink.q.output[0]] = Quant(name, scale, z + shift, shift, nhwc, rank, signed)

    def _clamp(self, sink: Sink, scale: str, zero: int, signed: bool) -> tuple[int, int]:
        """The range of the file's codes that the clamps of a sink leave."""
        low, high = ends = (-128, 127) if signed else (0, 255)
        for node in sink.between:
            limits = _clip_range(node, self.graph.arrays)
            if limits is not None:
                floor, top = (_code(v, self.graph.arrays[scale], zero, ends) for v in limits)
                low, high = (min(max(v, floor), top) for v in (low, high))
        return low, high

    def _move(self, node: onnx.NodeProto, name: str, nhwc: bool) -> tuple[str, bool]:
        """Do a pool or a move of the file on codes; clamps were done before."""
        attrs = attributes(node)
        if node.op_type == "MaxPool":
            name = name if nhwc else self.transposed(name, True)
            pool = {k: v for k, v in attrs.items() if k in _POOL}
            return self.emit("NhwcMaxPool", [name], MS, **pool), True
        if node.op_type not in MOVES:
            return name, nhwc
        if nhwc and self.is_vector(node):
            return self.emit("Flatten", [name]), False
        name = self.transposed(name, False) if nhwc else name
        return self.emit(node.op_type, [name, *node.input[1:]], **attrs), False

    def is_vector(self, node: onnx.NodeProto) -> bool:
        """Whether a node flattens images of one pixel, which is the same in both layouts."""
        before = self.graph.shapes.get(node.input[0], ())
        after = self.graph.shapes.get(node.output[0], ())
        return len(before) == 4 and before[2:] == (1, 1) and tuple(after[1:]) == (before[1],)


def _clip_range(node: onnx.NodeProto, arrays: Arrays) -> tuple[float, float] | None:
    """(low, high) of a Relu or a Clip with constant limits; None for anything else."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    limits = [-np.inf, np.inf]
    for i, name in enumerate(node.input[1:3]):
        if name and name not in arrays:
            return None
        if name:
            limits[i] = float(arrays[name].reshape(-1)[0])
    ordered = limits[0] <= limits[1]
    return (limits[0], limits[1]) if ordered else None


def _code(value: float, scale: NDArray[Any], zero: int, ends: tuple[int, int]) -> int:
    """The code of a value, as QuantizeLinear computes it; `ends`: least and largest."""
    quotient = np.rint(np.float32(value) / scale.reshape(-1)[0].astype(np.float32))
    return int(np.clip(quotient + zero, *ends))
