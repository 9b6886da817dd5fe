"""Layers of a Q/DQ graph, whoever wrote it, whose INT8 weights can be written anew: other codes, scales, copies.

Every edit keeps the graph's nodes and the ranges of its activations. Biases of 32 bits stay in units of s_x s_w, as an
integer kernel reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy import quantization, saturation
from resq_deploy.export import fold, rules
from resq_deploy.export.biases import LARGEST
from resq_deploy.export.names import Unique
from resq_deploy.export.split import MOST
from resq_deploy.saturation import Pairs

_DQ, _Q = "DequantizeLinear", "QuantizeLinear"


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A Conv, Gemm or MatMul with an INT8 weight of its own: zero points 0, float32 scales, one or one a channel.

    `weight`: the initializer of its codes; `axis`: of its output channels; `codes`: INT8; `scale`: float32 [channels];
    `unit`: scale of the tensor it reads, None where that is float; `typed`: whether that comes with a zero point, which
    says what type its codes have; `bias`: float32 values, one or one a channel, 0 where it has none.
    """

    node: onnx.NodeProto
    weight: str
    axis: int
    codes: NDArray[np.int8]
    scale: NDArray[np.float32]
    unit: np.float32 | None
    typed: bool
    bias: NDArray[np.float32]

    @property
    def values(self) -> NDArray[np.float32]:
        """What its codes stand for."""
        wide = quantization.channelwise(self.scale, self.codes.ndim, self.axis)
        made: NDArray[np.float32] = self.codes.astype(np.float32) * wide
        return made

    @property
    def least(self) -> NDArray[np.float32]:
        """Scales below which its bias is more than an integer kernel holds (see qdq.py), [1] or [channels]."""
        if self.unit is None:
            return np.zeros(1, np.float32)
        return (np.abs(self.bias).astype(np.float64) / (self.unit * LARGEST)).astype(np.float32)


def layers(model: onnx.ModelProto) -> dict[str, Coded]:
    """Weight -> its layer, in graph order."""
    look = _Look(model.graph)
    found = (look.layer(node) for node in model.graph.node if node.op_type in rules.WEIGHTED)
    return {layer.weight: layer for layer in found if layer is not None}


def rewrite(
    model: onnx.ModelProto, new: Mapping[str, tuple[NDArray[np.int8], NDArray[np.float32]]]
) -> onnx.ModelProto:
    """The graph with other codes and scales, by weight; `scale`: float32 [channels]. Biases keep their value."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    edit = _Edit(made)
    for name, layer in layers(made).items():
        if name in new:
            edit.weight(layer, *new[name])
    fold.drop_unused(made.graph)
    return fold.compact(made)


def split(model: onnx.ModelProto, copies: Mapping[str, int]) -> onnx.ModelProto:
    """The graph whose layers, by weight, read `copies` (a power of 2) of their input: the same function (split.py).

    What is copied are codes: DQ -> Concat -> Q -> DQ with the scale and zero point of the input. Only where copies of a
    code would meet in 16 bits and saturate, which nothing did before, are codes rounded anew.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    edit, look, pairs = _Edit(made), _Look(made.graph), saturation.kept(model)
    for name, layer in layers(made).items():
        if name in copies:
            count, axis = copies[name], input_axis(layer)
            codes = np.concatenate([layer.codes] * count, axis=axis)
            scale = (layer.scale / np.float32(count)).astype(np.float32)
            own = saturation.of_layer(layer.node, codes.shape) if name in pairs else None
            if own is not None:
                codes, scale = _refit(codes, scale, layer.axis, own, layer.least)
            edit.weight(layer, codes, scale)
            where = 1 if layer.node.op_type == "Conv" else -1
            dq = look.makers[layer.node.input[0]]
            layer.node.input[0] = edit.copied(layer.node.name, dq, count, where)
    edit.place()
    fold.drop_unused(made.graph)
    return fold.compact(made)


def fitting(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with codes and scales of which no pair saturates (saturation.py), in layers that can be rewritten.

    Channels that fit stay as they are; the graph itself comes back where all do.
    """
    new = {}
    for name, layer in layers(model).items():
        pairs = saturation.of_layer(layer.node, layer.codes.shape)
        if pairs is not None and not pairs.fits(layer.codes):
            new[name] = _refit(layer.codes, layer.scale, layer.axis, pairs, layer.least)
    return rewrite(model, new) if new else model


def _refit(
    codes: NDArray[np.int8],
    scale: NDArray[np.float32],
    axis: int,
    pairs: Pairs,
    least: NDArray[np.float32],
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Codes and scales of the same weight, of which no pair saturates: others where one could."""
    unfit = pairs.unfit(codes)
    values = quantization.dequantize(codes, scale, axis)
    wide = np.where(unfit, np.maximum(saturation.weight_scales(values, axis, pairs), least), scale)
    new = pairs.fit(quantization.quantize(values, wide, axis))
    return np.where(quantization.channelwise(unfit, codes.ndim, axis), new, codes), wide


def can_split(layer: Coded) -> bool:
    """Whether its input is made of codes, its weight a matrix of all inputs, and its scales leave room for its bias."""
    given = {a.name: helper.get_attribute_value(a) for a in layer.node.attribute}
    plain = given.get("group", 1) == 1 and not given.get("transA", 0)
    matrix = layer.node.op_type == "Conv" or layer.codes.ndim == 2
    fits = bool((layer.scale / MOST >= layer.least).all())
    return plain and matrix and fits and layer.typed


def input_axis(layer: Coded) -> int:
    """Axis of the input channels in the weight of a Conv, Gemm or MatMul."""
    if layer.node.op_type == "Conv":
        return 1
    return 1 - layer.axis if layer.node.op_type == "Gemm" else layer.codes.ndim - 2


class _Look:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.arrays = fold.initializers(graph)
        self.makers, self.readers = fold.producers(graph), fold.consumers(graph)

    def layer(self, node: onnx.NodeProto) -> Coded | None:
        dq = self._own(node.input[1]) if node.op_type != "ConvTranspose" else None
        codes = self._held(dq, 0)
        if dq is None or codes is None or codes.dtype != np.int8 or not self._known(dq):
            return None
        axis = rules.output_axis(node, codes.ndim)
        scale, channels = self._values(dq, 1), codes.shape[axis]
        along = next((int(a.i) for a in dq.attribute if a.name == "axis"), 1) % codes.ndim
        if scale.size > 1 and (scale.shape != (channels,) or along != axis):
            return None
        bias = self._bias(node, channels)
        if bias is None:
            return None
        wide = np.broadcast_to(scale.reshape(-1), (channels,)).copy()
        unit = self._unit(node.input[0])
        typed = unit is not None and len(self.makers[node.input[0]].input) > 2
        return Coded(node, dq.input[0], axis, codes, wide, unit, typed, bias)

    def _own(self, name: str) -> onnx.NodeProto | None:
        """The DQ that makes a tensor, if nothing else reads the tensor, nor the codes."""
        dq = self.makers.get(name)
        if dq is None or dq.op_type != _DQ or len(self.readers[name]) > 1:
            return None
        return dq if len(self.readers[dq.input[0]]) == 1 else None

    def _held(self, node: onnx.NodeProto | None, position: int) -> NDArray[Any] | None:
        name = "" if node is None or len(node.input) <= position else node.input[position]
        return numpy_helper.to_array(self.arrays[name]) if name in self.arrays else None

    def _known(self, dq: onnx.NodeProto) -> bool:
        """One float32 scale or one a channel, and no zero point but 0."""
        scale, zero = self._held(dq, 1), self._held(dq, 2)
        plain = not any(a.name == "block_size" and a.i for a in dq.attribute)
        real = scale is not None and scale.dtype == np.float32 and scale.ndim <= 1
        return plain and real and (zero is None or not zero.any())

    def _values(self, node: onnx.NodeProto, position: int) -> NDArray[Any]:
        return numpy_helper.to_array(self.arrays[node.input[position]])

    def _unit(self, name: str) -> np.float32 | None:
        """Scale of a tensor that is codes."""
        dq = self.makers.get(name)
        scale = self._held(dq, 1) if dq is not None and dq.op_type == _DQ else None
        if scale is None or scale.size != 1 or scale.dtype != np.float32:
            return None
        return np.float32(scale.reshape(()))

    def _bias(self, node: onnx.NodeProto, channels: int) -> NDArray[np.float32] | None:
        """Its bias in float, 0 where there is none; None where it cannot be rewritten beside the weight."""
        name = node.input[2] if len(node.input) > 2 else ""
        if not name:
            return np.zeros(1, np.float32)
        if name in self.arrays:
            given = numpy_helper.to_array(self.arrays[name])
            return given.astype(np.float32).reshape(-1) if given.dtype == np.float32 else None
        dq = self._own(name)
        codes, scale = self._held(dq, 0), self._held(dq, 1)
        if dq is None or codes is None or scale is None or codes.shape != (channels,):
            return None
        if codes.dtype != np.int32 or not self._known(dq) or self._unit(node.input[0]) is None:
            return None
        value: NDArray[np.float32] = (codes * scale.reshape(-1).astype(np.float64)).astype(
            np.float32
        )
        return value


class _Edit:
    """Writes weights, their biases and copies of inputs into a graph."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.graph = model.graph
        self.look = _Look(model.graph)
        tensors = {*self.look.arrays, *self.look.makers, *(v.name for v in model.graph.input)}
        self._tensor = Unique(tensors)
        self._node = Unique([node.name for node in model.graph.node])
        self._copies: dict[tuple[str, int, int], str] = {}
        self._before: dict[str, list[onnx.NodeProto]] = {}

    def weight(self, layer: Coded, codes: NDArray[np.int8], scale: NDArray[np.float32]) -> None:
        """Write codes and scales, and the bias in their units."""
        self._coded(self.look.makers[layer.node.input[1]], codes, scale, layer.axis)
        dq = self.look.makers.get(layer.node.input[2]) if len(layer.node.input) > 2 else None
        if dq is not None and layer.unit is not None:
            units = (layer.unit * scale).astype(np.float32)
            count = np.rint(layer.bias.astype(np.float64) / units)
            self._coded(dq, count.clip(-(2**31), 2**31 - 1).astype(np.int32), units, 0)

    def copied(self, reader: str, dq: onnx.NodeProto, count: int, axis: int) -> str:
        """A tensor of `count` copies of what a DQ makes, along this axis; made once, before the node that reads it."""
        key = (dq.output[0], count, axis)
        if key not in self._copies:
            stem = f"{dq.output[0]}.{'last.' * (axis == -1)}x{count}"
            joined, codes, back = (self._tensor(f"{stem}{end}") for end in ("", ".codes", ".again"))
            name = self._node(stem)
            self._before[reader] = [
                helper.make_node("Concat", [dq.output[0]] * count, [joined], name=name, axis=axis),
                self._twin(_Q, joined, dq, codes, f"{name}.quantize"),
                self._twin(_DQ, codes, dq, back, f"{name}.dequantize"),
            ]
            self._copies[key] = back
        return self._copies[key]

    def place(self) -> None:
        """Put the new nodes where they belong."""
        nodes = [n for node in self.graph.node for n in (*self._before.get(node.name, ()), node)]
        fold.replace(self.graph.node, nodes)

    def _twin(
        self, op: str, source: str, dq: onnx.NodeProto, made: str, name: str
    ) -> onnx.NodeProto:
        return helper.make_node(op, [source, *dq.input[1:]], [made], name=self._node(name))

    def _coded(
        self, dq: onnx.NodeProto, codes: NDArray[Any], scale: NDArray[np.float32], axis: int
    ) -> None:
        """Other codes behind a DQ, one scale a channel, and zero points to match."""
        zero = np.zeros(scale.shape, codes.dtype)
        for position, value in ((0, codes), (1, scale), (2, zero))[: len(dq.input)]:
            self._set(dq, position, value)
        kept = [a for a in dq.attribute if a.name != "axis"]
        fold.replace(dq.attribute, [*kept, helper.make_attribute("axis", axis)])

    def _set(self, dq: onnx.NodeProto, position: int, value: NDArray[Any]) -> None:
        """Another initializer for one input: under its name, or a new one where others read that too."""
        name = dq.input[position]
        if len(self.look.readers[name]) > 1:
            dq.input[position] = self._tensor(name)
            made = numpy_helper.from_array(value, dq.input[position])
            self.graph.initializer.append(made)
        elif name in self.look.arrays:
            self.look.arrays[name].CopyFrom(numpy_helper.from_array(value, name))
