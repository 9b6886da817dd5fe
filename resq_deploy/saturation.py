"""INT8 weights whose sums fit 16 bits: on x86 without VNNI byte kernels then compute what the file says.

Such a processor multiplies unsigned by signed bytes and adds two neighbouring products in 16 bits, where they saturate.
Two weights a, b of one sign are safe beside any activations if

    255 (|a| + |b|) <= 32,767,  which is  |a| + |b| <= 128;

two of different signs always are. Quantizers that know of this keep all codes within 7 bits (reduce_range of ONNX
Runtime, overflow_fix of NNCF), at twice the step. The pair alone has to fit, and then most weights keep their 8 bits.

Which weights are a pair: a kernel adds up the inputs of an output channel in the order (place in the window, channel),
two at a time. ONNX Runtime goes through all of them; OpenVINO begins anew at each place, which differs where channels
are odd. Measured with ONNX Runtime 1.31 and OpenVINO 2026 on AVX2; kernels for one channel a group add in 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy import quantization

Number = TypeVar("Number", np.int32, np.float32)
Codes = NDArray[np.int32]
Order = NDArray[np.intp]

ROOM = 128  # of |a| + |b|
_HALF = ROOM // 2  # a code that has room beside any other that is as small
_IN_32_BITS = frozenset(
    {"Conv", "ConvTranspose", "Gather"}
)  # if their weights are not among `layers`
_WIDTHS = (1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0)  # of max|w| / 127


@dataclass(frozen=True, slots=True, eq=False)
class Pairs:
    """Which weights of one layer meet: `axis` of its output channels, and `partners` by order of adding.

    An order is [inputs]: for each input of a channel, in the order of the file, the input that it is added with, or the
    number of inputs where there is none.
    """

    axis: int
    partners: tuple[Order, ...]

    def rows(self, codes: NDArray[Any]) -> NDArray[Any]:
        """A weight as [channels, inputs]."""
        turned = np.moveaxis(codes, self.axis, 0)
        return turned.reshape(len(turned), -1)

    def fits(self, codes: NDArray[Any]) -> bool:
        """Whether no pair can saturate."""
        rows = self.rows(codes).astype(np.int32)
        return not any(_excess(rows, partner).any() for partner in self.partners)

    def fit(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        """The nearest codes of which no pair can saturate; see `fit_rows`."""
        rows = fit_rows(self.rows(codes).astype(np.int32), self.partners)
        return self._back(rows, codes).astype(np.int8)

    def nearest(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same for values in code units: what they round to fits as well."""
        rows = self.rows(values)
        for partner in self.partners:
            rows = rows - np.sign(rows) * (_excess(rows, partner) / 2)
        return self._back(rows, values)

    def _back(self, rows: NDArray[Any], codes: NDArray[Any]) -> NDArray[Any]:
        turned = np.moveaxis(codes, self.axis, 0).shape
        return np.ascontiguousarray(np.moveaxis(rows.reshape(turned), 0, self.axis))


def fit_rows(rows: NDArray[Number], partners: Sequence[Order]) -> NDArray[Number]:
    """Whole numbers [..., inputs], of which no pair can saturate: both of a pair give up half of what is too much."""
    for partner in partners:
        over = _excess(rows, partner)
        first = np.arange(rows.shape[-1]) < partner
        rows = (rows - np.sign(rows) * ((over + first) // 2)).astype(rows.dtype)
    return rows


def bounds_of_rows(
    rows: NDArray[Number], partners: Sequence[Order]
) -> tuple[NDArray[Number], NDArray[Number]]:
    """How far each of [..., inputs] may go while all others stay."""
    low, high = (np.full_like(rows, end) for end in (1 - ROOM, ROOM - 1))
    for partner in partners:
        beside = _beside(rows, partner)
        np.maximum(low, -ROOM - beside.clip(max=0), out=low)
        np.minimum(high, ROOM - beside.clip(min=0), out=high)
    return low, high


def _beside(rows: NDArray[Number], partner: Order) -> NDArray[Number]:
    """What each weight is added with, 0 for nothing."""
    padded = np.concatenate([rows, np.zeros_like(rows[..., :1])], axis=-1)
    return padded[..., partner]


def _excess(rows: NDArray[Number], partner: Order) -> NDArray[Number]:
    """By how much a weight and its partner, of one sign, are more than fits; 0 where they fit."""
    beside = _beside(rows, partner)
    over: NDArray[Number] = (np.abs(rows) + np.abs(beside) - ROOM).clip(0) * (rows * beside > 0)
    return over


def weight_scales(
    weights: NDArray[np.float32], axis: int, pairs: Pairs | None
) -> NDArray[np.float32]:
    """Scale of each channel, float32 [channels]: max|w| / 127; where pairs must fit, the one of least squared error.

    It is no wider than the first at which every pair fits without being cut, at most twice as wide.
    """
    full = quantization.weight_scales(weights, axis)
    if pairs is None:
        return full
    errors, fits = [], np.zeros(len(full), bool)
    for factor in _WIDTHS:
        scales = full * np.float32(factor)
        whole = quantization.quantize(weights, scales, axis)
        codes = pairs.fit(whole)
        rest = weights - quantization.dequantize(codes, scales, axis)
        error = np.square(pairs.rows(rest)).sum(axis=1)
        errors.append(np.where(fits, np.inf, error))
        fits |= (pairs.rows(whole) == pairs.rows(codes)).all(axis=1)
    best: NDArray[np.float32] = full * np.asarray(_WIDTHS, np.float32)[np.argmin(errors, axis=0)]
    return best


def neighbours(order: Order, run: int | None = None) -> Order:
    """Partners of inputs that are added in this order, a permutation of them; pairs begin anew after each `run`."""
    partner = np.full(len(order), len(order), np.intp)
    runs = order.reshape(-1, run or max(len(order), 1))
    even = runs[:, : runs.shape[1] // 2 * 2]
    partner[even[:, ::2]], partner[even[:, 1::2]] = even[:, 1::2], even[:, ::2]
    return partner


def of_window(channels: int, places: int) -> tuple[Order, ...]:
    """Partners in a convolution's weight [.., channels, places], in ONNX Runtime's order and OpenVINO's."""
    order = np.arange(channels * places).reshape(channels, places).T.reshape(-1)
    whole = neighbours(order)
    return (whole,) if channels % 2 == 0 or places == 1 else (whole, neighbours(order, channels))


def of_layer(node: onnx.NodeProto, dims: Sequence[int]) -> Pairs | None:
    """Pairs of a Conv, Gemm or MatMul with a weight of these dimensions; None where it is added up in 32 bits."""
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Conv":
        places = int(np.prod(dims[2:]))
        return None if _alone(dims, given) else Pairs(0, of_window(dims[1], places))
    if node.op_type not in ("Gemm", "MatMul") or len(dims) < 2:
        return None
    if node.op_type == "Gemm" and given.get("transB", 0):
        return Pairs(0, (neighbours(np.arange(dims[1])),))
    return Pairs(len(dims) - 1, (neighbours(np.arange(int(np.prod(dims[:-1]))), dims[-2]),))


def layers(model: onnx.ModelProto) -> dict[str, tuple[Pairs, NDArray[np.int8]]]:
    """Weight -> its pairs and its codes, of every layer of a Q/DQ graph with INT8 weights that meet in 16 bits."""
    held = {t.name: t for t in model.graph.initializer}
    coded = {
        n.output[0]: held[n.input[0]]
        for n in model.graph.node
        if n.op_type == "DequantizeLinear" and n.input[0] in held
    }
    found = {}
    for node in model.graph.node:
        tensor = coded.get(node.input[1]) if len(node.input) > 1 else None
        if tensor is not None and tensor.data_type == TensorProto.INT8:
            pairs = of_layer(node, tensor.dims)
            if pairs is not None:
                found[tensor.name] = (pairs, numpy_helper.to_array(tensor))
    return found


def could(model: onnx.ModelProto) -> bool:
    """Whether any pair of codes in a Q/DQ graph could saturate; those that are turned before they are read, too."""
    found = layers(model)
    if not all(pairs.fits(codes) for pairs, codes in found.values()):
        return True
    held = {t.name: t for t in model.graph.initializer}
    read = {name: node for node in model.graph.node for name in node.input}
    for node in model.graph.node:
        codes = held.get(node.input[0]) if node.op_type == "DequantizeLinear" else None
        if codes is None or codes.data_type != TensorProto.INT8 or len(codes.dims) < 2:
            continue
        known = codes.name in found or read[node.output[0]].op_type in _IN_32_BITS
        if (
            not known
            and int(np.abs(numpy_helper.to_array(codes).astype(int)).max(initial=0)) > _HALF
        ):
            return True
    return False


def kept(model: onnx.ModelProto) -> dict[str, Pairs]:
    """Weight -> its pairs, of layers of which none saturates now, and none should."""
    return {name: pairs for name, (pairs, codes) in layers(model).items() if pairs.fits(codes)}


def in_16_bits(model: onnx.ModelProto) -> dict[str, bool]:
    """Integer kernels of a session's graph (optimized_model_filepath) whose products x86 without VNNI adds in 16 bits.

    With each, whether its weights could saturate as they are; those of others, with bits flipped, may all the same.
    """
    held = {t.name: t for t in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        place = _WEIGHTS.get(node.op_type)
        tensor = None if place is None else held.get(node.input[place])
        if tensor is not None and tensor.data_type == TensorProto.INT8:
            rows = _as_added(node, numpy_helper.to_array(tensor))
            if rows.size:
                partner = neighbours(np.arange(rows.shape[1]))
                found[node.name] = bool(_excess(rows, partner).any())
    return found


# operator -> place of its weights among its inputs
_WEIGHTS: Mapping[str, int] = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "MatMulIntegerToFloat": 1,
}


def _as_added(node: onnx.NodeProto, codes: NDArray[Any]) -> Codes:
    """Weights of a kernel in the order that it adds them in, one row an output: [outputs, inputs].

    That of the file for images that are NCHW; NHWC ones are read by nodes of a domain of their own.
    """
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "QLinearConv":
        if _alone(codes.shape, given):
            return np.zeros((1, 0), np.int32)
        turned = np.moveaxis(codes, 1, -1) if node.domain else codes
    elif codes.ndim < 2 or given.get("transB"):
        turned = codes
    else:
        turned = np.moveaxis(codes, -2, -1)
        return turned.reshape(-1, turned.shape[-1]).astype(np.int32)
    return turned.reshape(len(turned), -1).astype(np.int32)


def _alone(dims: Sequence[int], given: Mapping[str, Any]) -> bool:
    """Whether a convolution has one input and one output a group: those are added up in 32 bits."""
    return dims[1] == 1 and dims[0] == given.get("group", 1) > 1
