"""Channels centred and scaled where no layer makes them alone: behind a SiLU, a GELU, a gate, a LayerNorm.

Equalization hides a channel's factor in the layer that makes it (equalize.py). Where what makes a tensor is not
homogeneous, the factor is written into the graph, and a shift with it,

    x'_i = (x_i - c_i) / r_i,     W'_oi = W_oi r_i,     b'_o = b_o + sum_i W_oi c_i

one product and one sum for each element before Q, in the float epilogue of what made it; a LayerNorm has both already
(Wei et al., Outlier Suppression+, EMNLP 2023, 2304.09145; Xiao et al., SmoothQuant, ICML 2023, 2211.10438). Symmetric
INT8 spends half of its codes on a side where a SiLU has next to nothing; and a flipped weight moves its output by
dw x', so that what all images share in x no longer counts. r and c minimize N (equalize.py) of the layers that read the
tensor, flips included. A layer that pads with zeros, or has no bias, gets no shift.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.export import equalize, fold, rules
from resq_deploy.export.equalize import Moments, Reader, is_depthwise, is_simple

LEAST = 1.0  # dB of expected noise that it must save: it costs two operations on a tensor

Arrays = dict[str, NDArray[Any]]
Readers = Mapping[str, list[tuple[onnx.NodeProto, int]]]


@dataclass(frozen=True, slots=True)
class _Layer:
    """A layer that can absorb r and c: its weight, [O, C, ...] or `turned` [C, O], and its bias, if there is one."""

    node: onnx.NodeProto
    weight: str
    bias: str
    turned: bool

    def weights(self, arrays: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        """[O, C, ...]."""
        return arrays[self.weight].T if self.turned else arrays[self.weight]

    @property
    def shifts(self) -> bool:
        """Whether c can be absorbed: zeros beyond the edge of an input stand for x = 0."""
        given = {a.name: helper.get_attribute_value(a) for a in self.node.attribute}
        pads = any(given.get("pads", ())) or given.get("auto_pad", b"NOTSET") != b"NOTSET"
        return bool(self.bias) and not pads

    def absorb(self, arrays: Arrays, r: NDArray[np.float64], shift: NDArray[np.float64]) -> None:
        """Read (x - shift) / r instead of x."""
        values = self.weights(arrays).astype(np.float64)
        if shift.any():
            taps = values.reshape(*values.shape[:2], -1).sum(axis=2)
            single = is_depthwise(self.node, values.shape)
            moved = taps[:, 0] * shift if single else taps @ shift
            arrays[self.bias] = (arrays[self.bias] + moved).astype(np.float32)
        made = equalize.stretched(self.node, values, r)
        arrays[self.weight] = np.ascontiguousarray(made.T) if self.turned else made


def tensors(fp32: onnx.ModelProto) -> dict[str, int]:
    """The activations of an FP32 graph that could be centred and scaled, and the axis of their channels."""
    return {name: -1 if layers[0].turned else 1 for name, layers in _candidates(fp32).items()}


def center(
    fp32: onnx.ModelProto, moments: Mapping[str, Moments], ber: float, *, nodes: bool = True
) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """The same function with centred and scaled activations where that saves noise at this BER; what each gained in dB.

    `moments`: of every tensor in `tensors(fp32)`. Names of nodes stay; a tensor T is read as T.scaled or T.centered,
    or keeps its name where a LayerNorm makes it that nothing else reads: its own scale and bias then carry r and c.
    `nodes`: whether nodes of their own may carry them elsewhere.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(fp32)
    arrays = {t.name: numpy_helper.to_array(t) for t in copy.graph.initializer}
    producers, readers = fold.producers(copy.graph), fold.consumers(copy.graph)
    before: dict[str, list[onnx.NodeProto]] = {}
    record = []
    for name, layers in _candidates(copy).items():
        seen = [Reader.of(layer.node, layer.weights(arrays), moments[name]) for layer in layers]
        r, shift, gain = equalize.least_noise(
            seen,
            len(moments[name].high),
            equalize.power_of_changes(ber),
            shifts=all(layer.shifts for layer in layers),
        )
        if gain < LEAST:
            continue
        norm = _own_norm(producers.get(name), arrays, readers, layers)
        if norm is None and not nodes:
            continue
        if norm is not None:
            for parameter, values in ((norm.input[1], 0.0), (norm.input[2], shift)):
                arrays[parameter] = ((arrays[parameter] - values) / r).astype(np.float32)
        else:
            made = _written(name, layers[0], arrays, r, shift)
            before[layers[0].node.name] = made
            for layer in layers:
                layer.node.input[0] = made[-1].output[0]
        for layer in layers:
            layer.absorb(arrays, r, shift)
        record.append({"tensor": name, "gain_db": round(gain, 2), "shifted": bool(shift.any())})
    order = [new for node in copy.graph.node for new in (*before.get(node.name, ()), node)]
    fold.replace(copy.graph.node, order)
    made_of = (numpy_helper.from_array(value, name) for name, value in arrays.items())
    fold.replace(copy.graph.initializer, made_of)
    return fold.compact(copy), record


def _written(
    name: str,
    layer: _Layer,
    arrays: Arrays,
    r: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> list[onnx.NodeProto]:
    """The nodes that divide a tensor by r and shift it, for a layer that reads it."""
    shape = (-1,) if layer.turned else (1, -1) + (1,) * (arrays[layer.weight].ndim - 2)
    nodes: list[onnx.NodeProto] = []
    for op, verb, values in (("Mul", "scaled", 1 / r), ("Add", "centered", -shift / r)):
        if values.any():
            target = f"{name}.{verb}"
            source = nodes[-1].output[0] if nodes else name
            arrays[f"{target}.by"] = values.astype(np.float32).reshape(shape)
            nodes.append(helper.make_node(op, [source, f"{target}.by"], [target], name=target))
    return nodes


def _own_norm(
    node: onnx.NodeProto | None, arrays: Arrays, readers: Readers, layers: Sequence[_Layer]
) -> onnx.NodeProto | None:
    """The LayerNorm over the channels that makes a tensor for these layers alone, with parameters of its own."""
    if node is None or node.op_type != "LayerNormalization" or len(node.input) < 3:
        return None
    if layers[0].node.op_type == "Conv":  # its channels are not the last axis
        return None
    last = next((a.i for a in node.attribute if a.name == "axis"), -1)
    vectors = all(n in arrays and len(readers[n]) == 1 for n in node.input[1:3])
    alone = len(readers[node.output[0]]) == len(layers)
    fits = last == -1 or (vectors and arrays[node.input[1]].ndim == 1)
    return node if vectors and alone and fits else None


def _candidates(fp32: onnx.ModelProto) -> dict[str, list[_Layer]]:
    """Tensor -> the INT8 layers that read it, where equalization cannot reach and all of them can absorb r."""
    tied = set().union(*(group.tensors for group in equalize.groups(fp32)))
    nodes = {node.name: node for node in fp32.graph.node}
    arrays, readers = fold.initializers(fp32.graph), fold.consumers(fp32.graph)
    found: dict[str, list[_Layer | None]] = {}
    for weight in rules.plan(fp32).weights:
        node = nodes[weight.node]
        found.setdefault(node.input[0], []).append(_layer(node, arrays, readers))
    whole = {name: [v for v in layers if v is not None] for name, layers in found.items()}
    return {
        name: layers
        for name, layers in whole.items()
        if name not in tied
        and len(layers) == len(found[name])
        and len({layer.turned for layer in layers}) == 1
    }


def _layer(
    node: onnx.NodeProto, arrays: Mapping[str, onnx.TensorProto], readers: Readers
) -> _Layer | None:
    """A Conv, Gemm or MatMul as one that absorbs, if nothing else reads its weight, and nothing else its bias."""

    def own(name: str) -> bool:
        return name in arrays and len(readers[name]) == 1

    weight = node.input[1]
    if not own(weight):
        return None
    if node.op_type == "MatMul":
        fits = len(arrays[weight].dims) == 2
        return _Layer(node, weight, _addend(node, arrays, readers), True) if fits else None
    if node.op_type not in ("Conv", "Gemm") or not is_simple(node, arrays[weight]):
        return None
    bias = node.input[2] if len(node.input) > 2 else ""
    return _Layer(node, weight, bias if own(bias) else "", False) if own(bias) or not bias else None


def _addend(node: onnx.NodeProto, arrays: Mapping[str, onnx.TensorProto], readers: Readers) -> str:
    """The bias that an Add behind a MatMul adds, which nothing else reads; empty if there is none."""
    after = readers.get(node.output[0], [])
    if len(after) != 1 or after[0][0].op_type != "Add":
        return ""
    add, position = after[0]
    other: str = add.input[1 - position]
    fits = other in arrays and tuple(arrays[other].dims) == (arrays[node.input[1]].dims[1],)
    return other if fits and len(readers[other]) == 1 else ""
