"""`--high-precision fp16`: what stays float computes in float16; the input and the output stay float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.export import fold
from resq_deploy.export.names import Unique

LOWEST_OPSET = 19  # Q/DQ take float16 from here on
_BIASED = frozenset({"Conv", "ConvTranspose", "Gemm"})
_MAX = np.float32(65504)
_MIN_SCALE = np.float32(2.0**-24)  # smallest positive float16


def as_half_scales(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales rounded to float16, kept in float32: quantizing with them makes the later conversion exact. > 0."""
    rounded: NDArray[np.float32] = np.maximum(
        np.minimum(scales, _MAX).astype(np.float16).astype(np.float32), _MIN_SCALE
    )
    return rounded


def check_opset(opset: int) -> None:
    """Raise ModelError for an opset whose Q/DQ take float32 only."""
    if opset < LOWEST_OPSET:
        raise ModelError(
            f"opset {opset} cannot hold float16 scales", f"choose --opset {LOWEST_OPSET} or later"
        )


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of a QDQ graph whose float tensors are float16, with a Cast after the input and before the output.

    Q/DQ scales become float16 as well: the type of a scale is the type that the layer behind it computes
    in. The bias of an INT8 layer becomes an Add behind it: ONNX Runtime (1.31) quantizes a float16 bias
    of an INT8 Conv or Gemm to INT32 wrongly while it optimizes, and engines fuse the Add again.
    Raises ModelError for an opset below 19, where Q/DQ take float32 only.
    """
    check_opset(next(o.version for o in model.opset_import if not o.domain))
    half = onnx.ModelProto()
    half.CopyFrom(model)
    graph = half.graph
    scales = _scales(graph)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(_halved(tensor, is_scale=tensor.name in scales))
    for node in graph.node:
        for attribute in node.attribute:
            _halve_attribute(node, attribute)
    _split_biases(graph)
    _cast_ends(graph)
    return half


def _scales(graph: onnx.GraphProto) -> set[str]:
    both = ("QuantizeLinear", "DequantizeLinear")
    return {node.input[1] for node in graph.node if node.op_type in both}


def _halved(tensor: onnx.TensorProto, *, is_scale: bool) -> onnx.TensorProto:
    values: NDArray[Any] = numpy_helper.to_array(tensor)
    values = as_half_scales(values) if is_scale else np.clip(values, -_MAX, _MAX)
    return numpy_helper.from_array(np.asarray(values.astype(np.float16)), tensor.name)


def _halve_attribute(node: onnx.NodeProto, attribute: onnx.AttributeProto) -> None:
    if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
        attribute.i = TensorProto.FLOAT16
    if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
        attribute.t.CopyFrom(_halved(attribute.t, is_scale=False))


def _split_biases(graph: onnx.GraphProto) -> None:
    arrays, producers = fold.initializers(graph), fold.producers(graph)
    unique = Unique([node.name for node in graph.node])
    nodes = []
    for node in graph.node:
        nodes.append(node)
        weight = producers.get(node.input[1]) if len(node.input) > 2 else None
        if node.op_type not in _BIASED or weight is None or node.input[2] not in arrays:
            continue
        if weight.op_type != "DequantizeLinear":
            continue
        if node.op_type != "Gemm":
            dims, rank = arrays[node.input[2]].dims, len(arrays[weight.input[0]].dims)
            fold.replace(dims, [1, dims[0], *[1] * (rank - 2)])
        bias, output = node.input.pop(), node.output[0]
        node.output[0] = f"{output}.sum"
        name = unique(f"{node.name}.add")
        nodes.append(helper.make_node("Add", [node.output[0], bias], [output], name=name))
    fold.replace(graph.node, nodes)


def _cast_ends(graph: onnx.GraphProto) -> None:
    first, last = [], []
    for value in graph.input:
        name = f"{value.name}.half"
        _redirect(graph, value.name, name, outputs=False)
        first.append(_cast(value.name, name, TensorProto.FLOAT16))
    for value in graph.output:
        name = f"{value.name}.half"
        _redirect(graph, value.name, name, outputs=True)
        last.append(_cast(name, value.name, TensorProto.FLOAT))
    fold.replace(graph.node, [*first, *graph.node, *last])


def _cast(source: str, target: str, kind: int) -> onnx.NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)


def _redirect(graph: onnx.GraphProto, old: str, new: str, *, outputs: bool) -> None:
    for node in graph.node:
        for side in (node.input, node.output) if outputs else (node.input,):
            for position, name in enumerate(side):
                if name == old:
                    side[position] = new
