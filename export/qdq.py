"""FP32 graph + ranges -> explicit QDQ INT8 ONNX: weights symmetric S8 per output channel, activations per tensor.

    weight      NAME (INT8), NAME.scale (float [channels]), NAME.zero_point -> DequantizeLinear -> the layer
    activation  TENSOR -> QuantizeLinear -> DequantizeLinear -> the layers that read it as INT8,
                with TENSOR.scale and TENSOR.zero_point

Where pairs go is decided in rules.py or session_rules.py, which codes activations have in grid.py. Biases stay float:
TensorRT's parser refuses an INT32 bias (onnxruntime#14229), and they learn; finish() makes what is deployed of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy import quantization, saturation
from resq_deploy.errors import ModelError
from resq_deploy.export import biases, fold
from resq_deploy.export.dialect import TENSORRT, Dialect
from resq_deploy.export.grid import Grid, HasGrid, covering
from resq_deploy.export.halves import as_half_scales
from resq_deploy.export.names import Unique
from resq_deploy.export.rules import Plan, Weight


def shared_grids(where: Plan, ranges: Mapping[str, HasGrid]) -> dict[str, Grid]:
    """Codes of every quantized tensor: over its own range, or over all of those that must share them.

    Raises ModelError for a tensor without a range, or a scale that is not finite and positive.
    """
    missing = [name for name in where.activations if name not in ranges]
    if missing:
        raise ModelError(f"tensor {missing[0]} has no activation range", "calibrate it")
    grids = {name: ranges[name].grid for name in where.activations}
    bad = [name for name, grid in grids.items() if not 0 < grid.scale < np.inf]
    if bad:
        raise ModelError(
            f"tensor {bad[0]} has scale {grids[bad[0]].scale}", "check the calibration images"
        )
    for group in where.groups:
        grids.update(dict.fromkeys(group, covering(grids[name] for name in group)))
    return grids


def quantize_graph(
    fp32: onnx.ModelProto,
    ranges: Mapping[str, HasGrid],
    *,
    dialect: Dialect = TENSORRT,
    where: Plan | None = None,
    weight_scales: Mapping[str, NDArray[np.float32]] | None = None,
    codes: Mapping[str, NDArray[np.int8]] | None = None,
) -> onnx.ModelProto:
    """The INT8 graph of an FP32 graph, with float biases; the original is not touched.

    `ranges`: one per tensor that becomes INT8 by `where`, the dialect's plan. `weight_scales` (float32 [channels]) and
    `codes` (INT8, shaped as the weight) replace, by weight name, what quantization.py would choose.
    Raises ModelError where a range, scale or code does not fit, or a tensor of the graph has a name that
    quantization needs.
    """
    where = where or dialect.plan(fp32)
    grids = shared_grids(where, ranges)
    if dialect.half:
        grids = {name: grid.half() for name, grid in grids.items()}
    model = onnx.ModelProto()
    model.CopyFrom(fp32)
    arrays = fold.initializers(model.graph)
    weights, pairs = {w.node: w for w in where.weights}, dialect.pairs(fp32, where)
    edited = _Edit(fp32.graph)
    for value in fp32.graph.input:
        edited.activation(value.name, grids)
    for node in model.graph.node:
        if node.name in weights:
            weight = weights[node.name]
            values = numpy_helper.to_array(arrays[weight.name])
            scale = (weight_scales or {}).get(weight.name)
            own = pairs.get(weight.name)
            if scale is None:
                scale = saturation.weight_scales(values, weight.axis, own)
            code = (codes or {}).get(weight.name)
            scale, code = _with_room(scale, code, values, weight, _least(node, arrays, grids))
            scale = as_half_scales(scale) if dialect.half else scale
            code, scale = _codes(weight, values, scale, code)
            chosen = (code if own is None else own.fit(code)), scale
            node.input[1] = edited.weight(weight, *chosen)
        for position, name in enumerate(node.input):
            if (node.name, position) in where.reads:
                node.input[position] = f"{name}.dequantized"
        edited.nodes.append(node)
        for name in node.output:
            edited.activation(name, grids)
    kept = [t for t in model.graph.initializer if t.name not in {w.name for w in where.weights}]
    fold.replace(model.graph.node, edited.nodes)
    fold.replace(model.graph.initializer, [*kept, *edited.tensors])
    fold.drop_unused(model.graph)
    return fold.compact(model)


def finish(int8: onnx.ModelProto, dialect: Dialect = TENSORRT) -> onnx.ModelProto:
    """A copy with biases as they are deployed: on the accumulator's grid, and INT32 where the dialect wants them so."""
    made = biases.snap_biases(int8)
    return biases.as_integers(made) if dialect.unsigned else made


def _least(
    node: onnx.NodeProto, arrays: Mapping[str, onnx.TensorProto], grids: Mapping[str, Grid]
) -> NDArray[np.float32]:
    """Scales below which the bias of a channel is more than an integer kernel holds: |b| / (s_x 2^22), or 0.

    Such a kernel keeps b in units of s_x s_w as INT32. A channel whose weights all but vanished, as where a batch
    normalization's factor decayed to 0, would have steps so small that its bias saturates, and it is all there is.
    """
    bias = arrays.get(node.input[2]) if len(node.input) > 2 else None
    if bias is None or node.input[0] not in grids:
        return np.zeros(1, np.float32)
    value = np.abs(numpy_helper.to_array(bias).astype(np.float64).reshape(-1))
    return (value / (grids[node.input[0]].scale * biases.LARGEST)).astype(np.float32)


def _with_room(
    scale: NDArray[np.float32],
    codes: NDArray[np.int8] | None,
    values: NDArray[Any],
    weight: Weight,
    least: NDArray[np.float32],
) -> tuple[NDArray[np.float32], NDArray[np.int8] | None]:
    """Scales no smaller than that, and codes that are rounded anew where one was raised."""
    fits = scale.ndim == 1 and least.size in (1, scale.size) and bool((scale > 0).all())
    if not fits or (scale >= least).all():
        return scale, codes
    raised = np.maximum(scale, least)
    if codes is not None:
        new = quantization.quantize(values, raised, weight.axis)
        where = quantization.channelwise(raised > scale, values.ndim, weight.axis)
        codes = np.where(where, new, codes)
    return raised, codes


def _codes(
    weight: Weight,
    values: NDArray[Any],
    scale: NDArray[np.float32],
    codes: NDArray[np.int8] | None,
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    if scale.shape != (values.shape[weight.axis],) or not (scale > 0).all():
        raise ModelError(f"the scales of {weight.name} do not fit its output channels")
    if codes is None:
        codes = quantization.quantize(values, scale, weight.axis)
    if codes.shape != values.shape or codes.dtype != np.int8:
        raise ModelError(f"the INT8 codes of {weight.name} do not have the weight's shape")
    return codes, scale


class _Edit:
    """Collects the nodes and initializers of the new graph, beside those of an FP32 graph."""

    def __init__(self, fp32: onnx.GraphProto) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []
        computed = (name for node in fp32.node for name in node.output)
        self._tensors = {*computed, *(v.name for v in (*fp32.input, *fp32.initializer))}
        self._name = Unique([node.name for node in fp32.node])

    def weight(self, weight: Weight, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> str:
        name = weight.name
        self.tensors.append(numpy_helper.from_array(codes, name))
        self._constant(f"{name}.scale", scale.astype(np.float32))
        self._constant(f"{name}.zero_point", np.zeros(scale.shape, np.int8))
        return self._node("DequantizeLinear", name, name, axis=weight.axis)

    def activation(self, name: str, grids: Mapping[str, Grid]) -> None:
        if name not in grids:
            return
        grid = grids[name]
        self._constant(f"{name}.scale", np.asarray(grid.scale, np.float32))
        self._constant(f"{name}.zero_point", np.asarray(grid.zero_point, grid.dtype))
        self._node("DequantizeLinear", self._node("QuantizeLinear", name, name), name)

    def _constant(self, name: str, value: NDArray[Any]) -> None:
        self.tensors.append(numpy_helper.from_array(value, self._new(name)))

    def _new(self, name: str) -> str:
        if name in self._tensors:
            raise ModelError(
                f"the graph has a tensor {name} already, and quantization needs the name",
                "rename the parameter",
            )
        self._tensors.add(name)
        return name

    def _node(self, op: str, source: str, stem: str, axis: int | None = None) -> str:
        verb = op.removesuffix("Linear").lower()
        inputs = [source, f"{stem}.scale", f"{stem}.zero_point"]
        output = self._new(f"{stem}.{verb}d")
        node = helper.make_node(op, inputs, [output], name=self._name(f"{stem}.{verb}"))
        if axis is not None:
            node.attribute.append(helper.make_attribute("axis", axis))
        self.nodes.append(node)
        return output
