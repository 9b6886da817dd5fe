"""A QDQ graph as `lower` reads it: nodes, who consumes what, shapes, and parameters as arrays.

The structure is read once; the parameters can be exchanged (for faulty ones) without reading again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Graph:
    """The structure of a model and its parameters.

    `shapes` holds what shape inference could tell; None stands for a dimension that varies.
    """

    nodes: tuple[onnx.NodeProto, ...]
    arrays: Arrays
    inputs: tuple[onnx.ValueInfoProto, ...]
    outputs: tuple[onnx.ValueInfoProto, ...]
    opsets: tuple[tuple[str, int], ...]
    shapes: Mapping[str, tuple[int | None, ...]]

    @classmethod
    def of(cls, model: onnx.ModelProto) -> Graph:
        """Read a model. Constant nodes become parameters; arrays are read-only."""
        arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        nodes = []
        for node in model.graph.node:
            if node.op_type == "Constant" and node.attribute[0].name == "value":
                arrays[node.output[0]] = numpy_helper.to_array(node.attribute[0].t)
            else:
                nodes.append(node)
        _add_zero_points(nodes, arrays)
        for array in arrays.values():
            array.flags.writeable = False
        inputs = tuple(i for i in model.graph.input if i.name not in arrays)
        opsets = tuple((o.domain, o.version) for o in model.opset_import)
        return cls(tuple(nodes), arrays, inputs, tuple(model.graph.output), opsets, _shapes(model))

    def replaced(self, arrays: Arrays) -> Graph:
        """The same structure with some parameters exchanged."""
        merged = {**self.arrays, **arrays}
        fields = (self.nodes, merged, self.inputs, self.outputs, self.opsets, self.shapes)
        graph = Graph(*fields)
        graph.__dict__["consumers"] = self.consumers
        return graph

    @cached_property
    def consumers(self) -> dict[str, list[onnx.NodeProto]]:
        """Tensor name -> the nodes that read it, a node once for each reading input."""
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @cached_property
    def output_names(self) -> frozenset[str]:
        """Names of the graph's outputs."""
        return frozenset(o.name for o in self.outputs)

    @property
    def opset(self) -> int:
        """Version of the default ONNX domain."""
        return max((v for d, v in self.opsets if d in ("", "ai.onnx")), default=1)

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads a tensor; None for several, none, or a graph output."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.output_names else None

    def rank(self, name: str) -> int | None:
        """Number of dimensions, where known."""
        shape = self.shapes.get(name)
        return None if shape is None else len(shape)


def has_zero_points(model: onnx.ModelProto) -> bool:
    """Whether every Q/DQ names its zero point: ONNX Runtime's own fusions take one that is left out for unsigned."""
    return all(
        len(node.input) > 2 and node.input[2]
        for node in model.graph.node
        if node.op_type in ("QuantizeLinear", "DequantizeLinear")
    )


def _add_zero_points(nodes: list[onnx.NodeProto], arrays: dict[str, NDArray[Any]]) -> None:
    """Write out, in place, the zero points that Q/DQ leave to the standard: zeros, and no memory of the device."""
    kinds = {name: array.dtype for name, array in arrays.items()}
    for i, node in enumerate(nodes):
        if (
            node.op_type not in ("QuantizeLinear", "DequantizeLinear")
            or node.input[1] not in arrays
        ):
            continue
        if node.op_type == "QuantizeLinear":
            kinds[node.output[0]] = _code_type(node, arrays)
        kind = (
            kinds.get(node.input[0])
            if node.op_type == "DequantizeLinear"
            else kinds[node.output[0]]
        )
        if kind is None or kind.kind not in "iu" or (len(node.input) > 2 and node.input[2]):
            continue
        name = f"resq/no_zero_point/{node.output[0]}"
        arrays[name] = np.zeros(arrays[node.input[1]].shape, kind)
        nodes[i] = onnx.NodeProto()
        nodes[i].CopyFrom(node)
        del nodes[i].input[2:]
        nodes[i].input.append(name)


def _code_type(q: onnx.NodeProto, arrays: Arrays) -> np.dtype[Any]:
    if len(q.input) > 2 and q.input[2] in arrays:
        return arrays[q.input[2]].dtype
    told = attributes(q).get("output_dtype", 0)
    return helper.tensor_dtype_to_np_dtype(told or onnx.TensorProto.UINT8)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes as Python values."""
    return {a.name: helper.get_attribute_value(a) for a in node.attribute}


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    light = onnx.ModelProto()
    light.CopyFrom(model)
    try:
        graph = onnx.shape_inference.infer_shapes(light).graph
    except Exception:
        graph = model.graph  # shapes only help: without them patterns are left as they are
    found: dict[str, tuple[int | None, ...]] = {}
    for info in (*graph.value_info, *graph.input, *graph.output):
        if info.type.tensor_type.HasField("shape"):
            dims = info.type.tensor_type.shape.dim
            found[info.name] = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
    for tensor in graph.initializer:
        found[tensor.name] = tuple(int(d) for d in tensor.dims)
    return found


def sane_scale(scale: NDArray[Any]) -> bool:
    """Whether fused kernels may use a scale: normal, positive, far from overflow."""
    with np.errstate(invalid="ignore"):  # a flip can make a signalling NaN
        value = np.asarray(scale, dtype=np.float64)
        return bool(np.all((value >= 2.0**-100) & (value <= 2.0**60)))
