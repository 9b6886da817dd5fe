"""The weight memory of a deployed graph: its initializers, what each is for, and its layer."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

import numpy as np
import onnx
from onnx import numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.faults import FaultSpace, Kind, Memory
from resq_deploy.onnx_file import read_onnx

_QDQ = frozenset({"QuantizeLinear", "DequantizeLinear"})
_CODES: Mapping[int, Kind] = {
    onnx.TensorProto.INT8: "weights",
    onnx.TensorProto.UINT8: "weights",
    onnx.TensorProto.INT16: "weights",
    onnx.TensorProto.UINT16: "weights",
    onnx.TensorProto.INT32: "bias",
}
_FLOATS = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.DOUBLE})
_PASSED_BY = frozenset({"Cast", "Identity", "Reshape", "Transpose", "Unsqueeze"})
_SHAPED = frozenset({"Resize", "Upsample"})  # their scales only say how large a tensor becomes
_BIASED = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}  # op -> which input is the bias


def fault_space(model: onnx.ModelProto | str | os.PathLike[str]) -> FaultSpace:
    """Every parameter of a QDQ INT8 graph as a FaultSpace, in graph order.

    Codes of 8 or 16 bits behind a DequantizeLinear are `weights`, of 32 bits `bias`; scales and zero points of Q/DQ are
    `scales` and `zero-points`; the bias of Conv or Gemm, and an addend of one value per channel, is `bias`; any
    other float parameter is `float`. Constants that only describe shapes are no weight memory.
    Raises ModelError where the graph has no INT8 weights, IntegrityError for a file that read_onnx refuses.
    """
    proto = model if isinstance(model, onnx.ModelProto) else read_onnx(model)
    arrays = {t.name: t for t in proto.graph.initializer}
    memories, seen = [], set[str]()
    for name, layer, kind in _uses(proto.graph, arrays):
        if name in seen:
            continue
        seen.add(name)
        value = np.array(numpy_helper.to_array(arrays[name]), order="C")  # a scalar stays one
        if kind == "float" and value.dtype.kind != "f":
            continue
        value.flags.writeable = False
        memories.append(Memory(name, layer, kind, value))
    if not any(memory.kind == "weights" for memory in memories):
        raise ModelError(
            "the graph has no INT8 weights",
            "resq-export writes one; see model.int8.onnx in a bundle",
        )
    return FaultSpace(memories)


def _uses(
    graph: onnx.GraphProto, arrays: Mapping[str, onnx.TensorProto]
) -> Iterator[tuple[str, str, Kind]]:
    consumers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in arrays and not (position and node.op_type in _SHAPED):
                yield name, _layer(node, consumers), _kind(node, position, arrays[name])


def _kind(node: onnx.NodeProto, position: int, tensor: onnx.TensorProto) -> Kind:
    if node.op_type in _QDQ:
        if position:
            return "scales" if position == 1 else "zero-points"
        return _CODES.get(tensor.data_type, "float")
    if _BIASED.get(node.op_type) == position:
        return "bias"
    one_channelwise = (
        sum(size > 1 for size in tensor.dims) <= 1
    )  # [C], or [1, C, 1, 1] behind a Conv
    is_float = tensor.data_type in _FLOATS
    return "bias" if node.op_type == "Add" and one_channelwise and is_float else "float"


def _layer(node: onnx.NodeProto, consumers: Mapping[str, list[onnx.NodeProto]]) -> str:
    """The layer a parameter belongs to: for Q/DQ of a weight, the node that computes with it."""
    seen = 0
    while node.op_type in _QDQ | _PASSED_BY and node.output[0] in consumers and seen < 8:
        node, seen = consumers[node.output[0]][0], seen + 1
    return node.name or node.output[0]
