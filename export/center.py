"""Channels centred and scaled where nothing else can carry it: behind a SiLU, a gate, a bottleneck that is summed.

Equalization hides a channel's factor in the layer that makes it (equalize.py). Where what makes a tensor is not
homogeneous, the factor is written into the graph, and a shift with it,

    x'_i = (x_i - c_i) / r_i,     W'_oi = W_oi r_i,     b'_o = b_o + sum_i W_oi c_i

one product and one sum for each element before Q, in the float epilogue of what made it (Wei et al., Outlier
Suppression+, EMNLP 2023, 2304.09145). Symmetric INT8 spends half of its codes on a side where a SiLU has next to
nothing; and a flipped weight moves its output by dw x', so that what all images share in x no longer counts. r and c
minimize N (equalize.py) of the layers that read the tensor. A layer that pads with zeros gets no shift.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.export import equalize, fold, rules
from resq_deploy.export.equalize import Moments, Reader, is_depthwise, is_simple

LEAST = 1.0  # dB of expected noise that it must save: it costs two operations on a tensor

Weights = dict[str, NDArray[Any]]


def tensors(fp32: onnx.ModelProto) -> list[str]:
    """The activations of an FP32 graph that could be centred and scaled: those whose statistics `center` needs."""
    return list(_candidates(fp32))


def center(
    fp32: onnx.ModelProto, moments: Mapping[str, Moments], ber: float
) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """The same function with centred and scaled activations where that saves noise at this BER; what each gained in dB.

    `moments`: of every tensor in `tensors(fp32)`. Names of nodes stay; a tensor T becomes T.scaled or T.centered.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(fp32)
    arrays = {t.name: numpy_helper.to_array(t) for t in copy.graph.initializer}
    before: dict[str, list[onnx.NodeProto]] = {}
    record = []
    for name, nodes in _candidates(copy).items():
        readers = [Reader.of(node, arrays[node.input[1]], moments[name]) for node in nodes]
        channels = len(moments[name].high)
        shifts = not any(_pads(node) for node in nodes)
        r, shift, gain = equalize.least_noise(
            readers, channels, equalize.power_of_changes(ber), shifts=shifts
        )
        if gain < LEAST:
            continue
        source, made = name, []
        shape = (1, -1) + (1,) * (arrays[nodes[0].input[1]].ndim - 2)
        for op, verb, values in (("Mul", "scaled", 1 / r), ("Add", "centered", -shift / r)):
            if not values.any():
                continue
            target = f"{name}.{verb}"
            arrays[f"{target}.by"] = values.astype(np.float32).reshape(shape)
            made.append(helper.make_node(op, [source, f"{target}.by"], [target], name=target))
            source = target
        before[nodes[0].name] = made
        for node in nodes:
            _absorb(node, arrays, r, shift)
            node.input[0] = source
        record.append({"tensor": name, "gain_db": round(gain, 2), "shifted": bool(shift.any())})
    order = [new for node in copy.graph.node for new in (*before.get(node.name, ()), node)]
    fold.replace(copy.graph.node, order)
    tensors = (numpy_helper.from_array(value, name) for name, value in arrays.items())
    fold.replace(copy.graph.initializer, tensors)
    return copy, record


def _candidates(fp32: onnx.ModelProto) -> dict[str, list[onnx.NodeProto]]:
    """Tensor -> the INT8 layers that read it, where equalization cannot reach and all of them can absorb r and c."""
    tied = set().union(*(group.tensors for group in equalize.groups(fp32)))
    nodes = {node.name: node for node in fp32.graph.node}
    arrays, readers = fold.initializers(fp32.graph), fold.consumers(fp32.graph)
    found: dict[str, list[onnx.NodeProto]] = {}
    for weight in rules.plan(fp32).weights:
        node = nodes[weight.node]
        found.setdefault(node.input[0], []).append(node)
    return {
        name: layers
        for name, layers in found.items()
        if name not in tied and all(_absorbs(node, arrays, readers) for node in layers)
    }


def _absorbs(
    node: onnx.NodeProto,
    arrays: Mapping[str, onnx.TensorProto],
    readers: Mapping[str, list[tuple[onnx.NodeProto, int]]],
) -> bool:
    """Whether a layer is a Conv or Gemm that equalization understands, with a weight and a bias of its own."""
    if node.op_type not in ("Conv", "Gemm") or len(node.input) < 3 or not node.input[2]:
        return False
    own = all(name in arrays and len(readers[name]) == 1 for name in node.input[1:3])
    return own and is_simple(node, arrays[node.input[1]])


def _pads(node: onnx.NodeProto) -> bool:
    """Whether a layer may read zeros beyond the edge of its input, which stand for x = 0."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return any(given.get("pads", ())) or given.get("auto_pad", b"NOTSET") != b"NOTSET"


def _absorb(
    node: onnx.NodeProto, arrays: Weights, r: NDArray[np.float64], shift: NDArray[np.float64]
) -> None:
    weight, bias = node.input[1:3]
    values = arrays[weight].astype(np.float64)
    taps = values.reshape(*values.shape[:2], -1).sum(axis=2)
    moved = taps[:, 0] * shift if is_depthwise(node, values.shape) else taps @ shift
    arrays[bias] = (arrays[bias] + moved).astype(np.float32)
    arrays[weight] = equalize.stretched(node, values, r)
