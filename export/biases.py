"""Biases on the grid of the accumulator, so that a runtime that keeps them as integers computes what the file says.

An integer kernel (ONNX Runtime's QLinearConv and its own QDQ fusion, TFLite's specification) adds the bias to int32
sums of codes, so it rounds a float bias to units of s_x * s_w; the file alone says a float bias. The rounding is far
below a step of the layer's output, but it moves every output of a channel the same way, and a code here and there with
it: on a hardened resnet8 that changed 0.5% of the answers. Rounded once, at export, file, twin and kernels agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.export import fold
from resq_deploy.export.names import Unique

Array = NDArray[np.float32]

_LAYERS = ("Conv", "Gemm")
LARGEST = 2**22  # units: beyond, float32 cannot tell neighbouring multiples apart with certainty


def snap_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a QDQ graph with each float bias of an INT8 Conv or Gemm rounded to a multiple of s_x * s_w.

    Half to even, in float32. Biases that several layers read, or that are more than 2^22 units, stay as they are.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    for _, bias, unit in _biases(made.graph):
        value = numpy_helper.to_array(bias)
        bias.CopyFrom(numpy_helper.from_array(_snapped(value, unit), bias.name))
    return made


def as_integers(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a QDQ graph whose biases of INT8 layers are INT32 in units of s_x * s_w, behind a DQ: [channels].

    For integer kernels of ONNX Runtime's sessions, which take no float bias. Exact for biases that were snapped.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    tensor = Unique({*fold.initializers(graph), *fold.producers(graph)})
    named = Unique([node.name for node in graph.node])
    before: dict[str, onnx.NodeProto] = {}
    for node, bias, unit in list(_biases(graph)):
        value = numpy_helper.to_array(bias).reshape(-1)
        value, units = np.broadcast_arrays(value, unit)
        count = np.rint(value / units.astype(np.float64)).clip(-(2**31), 2**31 - 1)
        scale, zero, wide = (
            tensor(f"{bias.name}.{end}") for end in ("scale", "zero_point", "dequantized")
        )
        bias.CopyFrom(numpy_helper.from_array(count.astype(np.int32), bias.name))
        graph.initializer.append(numpy_helper.from_array(units.copy(), scale))
        graph.initializer.append(numpy_helper.from_array(np.zeros(value.shape, np.int32), zero))
        before[node.name] = helper.make_node(
            "DequantizeLinear",
            [bias.name, scale, zero],
            [wide],
            name=named(f"{bias.name}.dequantize"),
            axis=0,
        )
        node.input[2] = wide
    order = [n for node in graph.node for n in (before.get(node.name), node) if n is not None]
    fold.replace(graph.node, order)
    return fold.compact(made)


def _biases(
    graph: onnx.GraphProto,
) -> Iterator[tuple[onnx.NodeProto, onnx.TensorProto, Array]]:
    """(layer, its float bias, s_x * s_w) of INT8 layers whose bias nothing else reads."""
    tensors, makers = fold.initializers(graph), fold.producers(graph)
    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if node.op_type not in _LAYERS or len(node.input) < 3:
            continue
        bias, unit = tensors.get(node.input[2]), _unit(node, makers, tensors)
        if bias is None or unit is None or readers[bias.name] > 1:
            continue
        vector = sum(size > 1 for size in bias.dims) <= 1
        if bias.data_type == onnx.TensorProto.FLOAT and vector:
            yield node, bias, unit


def _unit(
    node: onnx.NodeProto,
    makers: Mapping[str, onnx.NodeProto],
    tensors: Mapping[str, onnx.TensorProto],
) -> Array | None:
    """s_x * s_w of a layer whose inputs are both dequantized, float32, one or one per channel."""
    made = [makers.get(name) for name in node.input[:2]]
    if any(n is None or n.op_type != "DequantizeLinear" for n in made):
        return None
    scales = [tensors.get(n.input[1]) for n in made if n is not None]
    x, w = (None if s is None else numpy_helper.to_array(s) for s in scales)
    if x is None or w is None or x.size != 1 or x.dtype != np.float32 or w.dtype != np.float32:
        return None
    unit = (x.reshape(()) * w).reshape(-1)
    return unit if bool(np.isfinite(unit).all() and (unit > 0).all()) else None


def _snapped(bias: Array, unit: Array) -> Array:
    count = np.rint(bias / unit)
    return np.where(np.abs(count) < LARGEST, (count * unit).astype(np.float32), bias)
