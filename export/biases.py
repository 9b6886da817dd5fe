"""Biases on the grid of the accumulator, so that a runtime that keeps them as integers computes what the file says.

An integer kernel (ONNX Runtime's QLinearConv and its own QDQ fusion, TFLite's specification) adds the bias to int32
sums of codes, so it rounds a float bias to units of s_x * s_w; the file alone says a float bias. The rounding is far
below a step of the layer's output, but it moves every output of a channel the same way, and a code here and there with
it: on a hardened resnet8 that changed 0.5% of the answers. Rounded once, at export, file, twin and kernels agree.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
from onnx import numpy_helper

_LAYERS = ("Conv", "Gemm")
LARGEST = 2**22  # units: beyond, float32 cannot tell neighbouring multiples apart with certainty


def snap_biases(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a QDQ graph with each float bias of an INT8 Conv or Gemm rounded to a multiple of s_x * s_w.

    Half to even, in float32. Biases that several layers read, or that are more than 2^22 units, stay as they are.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensors = {t.name: t for t in made.graph.initializer}
    makers = {name: node for node in made.graph.node for name in node.output}
    readers = Counter(name for node in made.graph.node for name in node.input)
    for node in made.graph.node:
        if node.op_type not in _LAYERS or len(node.input) < 3:
            continue
        bias = tensors.get(node.input[2])
        unit = _unit(node, makers, tensors)
        if bias is not None and unit is not None and readers[bias.name] == 1:
            value = numpy_helper.to_array(bias)
            if value.dtype == np.float32:
                bias.CopyFrom(numpy_helper.from_array(_snapped(value, unit), bias.name))
    return made


def _unit(
    node: onnx.NodeProto,
    makers: dict[str, onnx.NodeProto],
    tensors: dict[str, onnx.TensorProto],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]] | None:
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


def _snapped(
    bias: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    unit: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    count = np.rint(bias / unit)
    return np.where(np.abs(count) < LARGEST, (count * unit).astype(np.float32), bias)
