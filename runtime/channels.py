"""One weight changes one output channel: recompute just that channel of a layer.

A segment is split into what prepares the layer's input (kept as it is), the layer itself (now with
some columns of its weights, given at run time), and what follows, as long as it treats channels
apart: clamps, Q/DQ, residual Add, pooling.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper

from resq_deploy.runtime.forms import MS
from resq_deploy.runtime.graph import Arrays, attributes
from resq_deploy.runtime.lower import ELEMENTWISE
from resq_deploy.runtime.segments import Segment, Tensors, open_session, session_options

Channels = NDArray[np.int64]

_LOCAL = ELEMENTWISE | {
    "QuantizeLinear", "DequantizeLinear", "QLinearAdd", "QLinearMul", "QLinearLeakyRelu",
    "QLinearSigmoid", "NhwcMaxPool", "QLinearGlobalAveragePool", "ReduceMean", "Flatten", "Identity",
}  # fmt: skip
# op -> places of weights, scales, zero points and bias among its inputs
_CORES = {"QLinearConv": (3, 4, 5, 8), "MatMulIntegerToFloat": (1, 3, 5, 6)}
_ROLES = ("weights", "scales", "zeros", "bias")


@dataclass(frozen=True)
class ChannelKernel:
    """A layer that can be run for some of its output channels.

    `axis`: the channel axis of its weights in the file; `perm`: how the file's weights are turned
    for the matrix product, None for a QLinearConv, which may have input channels of zeros, `lanes`, behind
    those of the file; `size` channels of `fan_in` weights each.
    Inputs are given `whole` or `sliced` to the channels, like parameters with one value a channel,
    `vectors`.
    """

    session: ort.InferenceSession
    segment: Segment
    core: onnx.NodeProto
    weight: str
    axis: int
    perm: tuple[int, ...] | None
    lanes: int
    size: int
    fan_in: int
    sliced: tuple[str, ...]
    whole: tuple[str, ...]
    vectors: tuple[str, ...]

    def touched(self, before: Arrays, after: Arrays, flips: Mapping[str, Any]) -> Channels | None:
        """The channels that changed parameters reach; None where they reach more than channels."""
        found: list[NDArray[Any]] = []
        names = {self.core.input[i]: role for i, role in zip(*self._places(), strict=True)}
        for name in self.segment.params:
            if before[name] is after[name]:
                continue
            if name == self.weight:
                found.append(self._channels_of(flips[name].elements))
            elif name in names or name in self.vectors:
                found.append(np.flatnonzero(_differs(before[name], after[name])))
            elif before[name].tobytes() != after[name].tobytes():
                return None
        return np.unique(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def _places(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        return _CORES[self.core.op_type][1:], _ROLES[1:]

    def _channels_of(self, elements: NDArray[np.int64]) -> Channels:
        if self.axis:
            return elements % self.size
        return elements // self.fan_in

    def params(self, arrays: Arrays, channels: Channels) -> Tensors:
        """These channels of the layer's parameters, as `run` wants them."""
        found = {f"{name}/some": arrays[name][channels] for name in self.vectors}
        for place, role in zip(*self._places(), strict=True):
            found[role] = arrays[self.core.input[place]][channels]
        found["weights"] = self._columns(arrays[self.weight], channels)
        return found

    def joined(self, parts: Sequence[Tensors]) -> Tensors:
        """The parameters of several trials' channels, one behind the other."""
        axis = 0 if self.perm is None else 1
        return {
            name: np.concatenate([p[name] for p in parts], axis=axis if name == "weights" else 0)
            for name in parts[0]
        }

    def run(self, live: Tensors, channels: Channels, params: Tensors) -> Tensors:
        """The segment's outputs in these channels only (repetitions allowed); `live` holds its inputs, whole."""
        feed: Tensors = {name: live[name] for name in self.whole} | params
        for name in self.sliced:
            feed[f"{name}/some"] = np.ascontiguousarray(live[name][..., channels])
        outputs = self.session.run(self.segment.outputs, feed)
        return dict(zip(self.segment.outputs, outputs, strict=True))

    def _columns(self, weights: NDArray[Any], channels: Channels) -> NDArray[Any]:
        some = weights.take(channels, axis=self.axis)
        if self.perm is None:
            wide = [(0, self.lanes if axis == 1 else 0) for axis in range(some.ndim)]
            return np.pad(some, wide) if self.lanes else some
        return np.ascontiguousarray(some.transpose(self.perm).reshape(-1, len(channels)))


def channel_kernel(segment: Segment, arrays: Arrays) -> ChannelKernel | None:
    """The kernel of a segment with one layer whose channels can be told apart; else None."""
    cores = [n for n in segment.nodes if n.op_type in _CORES and n.domain == MS]
    if len(cores) != 1 or attributes(cores[0]).get("group", 1) != 1:
        return None
    core = cores[0]
    places = _CORES[core.op_type]
    if len(core.input) <= places[3]:
        return None
    weight, path = _weight(segment, core.input[places[0]], arrays)
    if weight is None:
        return None
    before = _ancestors(segment, [n for i, n in enumerate(core.input) if i not in places])
    rest = [n for n in segment.nodes if not (_in(n, before) or _in(n, path) or n is core)]
    if not all(_is_local(n) for n in rest):
        return None
    axis = 0 if core.op_type == "QLinearConv" or path else 1
    perm, lanes = _turned(core, path, arrays)
    size = arrays[weight].shape[axis]
    fan_in = arrays[weight].size // size
    tail = _tail(segment, core, rest, size, arrays)
    if tail is None:
        return None
    nodes, sliced, vectors = tail
    whole = tuple(n for n in segment.inputs if any(n in p.input for p in (*before, core)))
    session = _session(
        segment, [*before, _with_roles(core), *nodes], whole, sliced, vectors, arrays
    )
    return ChannelKernel(
        session, segment, core, weight, axis, perm, lanes, size, fan_in, sliced, whole, vectors
    )


def _turned(
    core: onnx.NodeProto, path: Sequence[onnx.NodeProto], arrays: Arrays
) -> tuple[tuple[int, ...] | None, int]:
    """How a layer's weights are turned, and how many input channels of zeros they are given."""
    if core.op_type != "QLinearConv":
        return (tuple(attributes(path[0])["perm"]) if path else (0, 1)), 0
    return None, (arrays[path[0].input[1]].shape[1] if path else 0)


def _weight(segment: Segment, name: str, arrays: Arrays) -> tuple[str | None, list[onnx.NodeProto]]:
    """The parameter behind a layer's weight input, and the nodes that turn it, first one first."""
    path: list[onnx.NodeProto] = []
    made = {n.output[0]: n for n in segment.nodes}
    while name in made:
        path.insert(0, made[name])
        name = made[name].input[0]
    known = name in arrays and name in segment.params and len(path) <= 2
    return (name if known else None), path


def _ancestors(segment: Segment, names: Sequence[str]) -> list[onnx.NodeProto]:
    wanted = set(names)
    found: list[onnx.NodeProto] = []
    for node in reversed(segment.nodes):
        if set(node.output) & wanted:
            found.insert(0, node)
            wanted |= set(node.input)
    return found


def _in(node: onnx.NodeProto, nodes: Sequence[onnx.NodeProto]) -> bool:
    return any(node is other for other in nodes)


def _is_local(node: onnx.NodeProto) -> bool:
    attrs = attributes(node)
    if node.op_type == "ReduceMean":
        return bool(attrs.get("axes") == [1, 2])
    return node.op_type in _LOCAL and attrs.get("axis", 1) == 1


def _with_roles(core: onnx.NodeProto) -> onnx.NodeProto:
    copy = onnx.NodeProto()
    copy.CopyFrom(core)
    for place, role in zip(_CORES[core.op_type], _ROLES, strict=True):
        copy.input[place] = role
    return copy


def _tail(
    segment: Segment,
    core: onnx.NodeProto,
    rest: Sequence[onnx.NodeProto],
    size: int,
    arrays: Arrays,
) -> tuple[list[onnx.NodeProto], tuple[str, ...], tuple[str, ...]] | None:
    """The other nodes with their inputs renamed to slices; None where an input cannot be sliced."""
    made = {name for node in (core, *rest) for name in node.output}
    sliced: dict[str, None] = {}
    vectors: dict[str, None] = {}
    nodes = []
    for node in rest:
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name in segment.inputs:
                sliced[name] = None
            elif name in arrays and arrays[name].size > 1 and node.op_type != "ReduceMean":
                if arrays[name].shape != (size,):
                    return None
                vectors[name] = None
            elif name and name not in made and name not in arrays:
                return None
            copy.input[i] = f"{name}/some" if name in sliced or name in vectors else name
        nodes.append(copy)
    return nodes, tuple(sliced), tuple(vectors)


def _session(
    segment: Segment,
    nodes: Sequence[onnx.NodeProto],
    whole: Sequence[str],
    sliced: Sequence[str],
    vectors: Sequence[str],
    arrays: Arrays,
) -> ort.InferenceSession:
    kinds = (onnx.TensorProto.INT8, onnx.TensorProto.FLOAT, onnx.TensorProto.INT8)
    core = next(n for n in nodes if n.op_type in _CORES and "weights" in n.input)
    bias = onnx.TensorProto.INT32 if core.op_type == "QLinearConv" else onnx.TensorProto.FLOAT
    types = dict(segment.types) | dict(zip(_ROLES, (*kinds, bias), strict=True))
    types |= {f"{n}/some": segment.types[n] for n in sliced}
    types |= {f"{n}/some": helper.np_dtype_to_tensor_dtype(arrays[n].dtype) for n in vectors}
    inputs = (*whole, *(f"{n}/some" for n in (*sliced, *vectors)), *_ROLES)
    part = replace(segment, nodes=tuple(nodes), inputs=inputs, types=types)
    return open_session(part.model(arrays).SerializeToString(), session_options(1))


def _differs(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    kind = f"u{a.dtype.itemsize}"
    return np.asarray(a.view(kind) != b.view(kind))
