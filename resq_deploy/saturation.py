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

from collections.abc import Iterator, Mapping, Sequence
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
Reader = tuple[onnx.NodeProto, int]  # and the place among its inputs

ROOM = 128  # of |a| + |b|
_BLOCK = 2**22  # weights that scales are sought for at once
_ROUNDING = 1e-3  # of a code: float32 may end up above a bound by less
_DQ = "DequantizeLinear"
_SUMS = frozenset(("Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"))
_MOVES = frozenset(
    {
        *("Cast", "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice"),
        *("Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
    }
)  # sessions may move a DequantizeLinear past these
# operator -> place of its weights among its inputs
_WEIGHTS: Mapping[str, int] = {
    "QLinearConv": 3,
    "QLinearMatMul": 3,
    "QGemm": 3,
    "MatMulIntegerToFloat": 1,
}
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
        return not self.unfit(codes).any()

    def fit(self, codes: NDArray[np.int8]) -> NDArray[np.int8]:
        """Codes next to these of which no pair can saturate; see `fit_rows`."""
        rows = fit_rows(self.rows(codes).astype(np.int32), self.partners)
        return self._back(rows, codes).astype(np.int8)

    def nearest(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """The same for values in code units: what they round to fits as well."""
        rows = self.rows(values)
        for partner in self.partners:
            over = _excess(rows, partner)
            rows = rows - np.sign(rows) * np.where(over > 0, (over + np.float32(_ROUNDING)) / 2, 0)
        return self._back(rows, values)

    def unfit(self, codes: NDArray[Any]) -> NDArray[np.bool_]:
        """Channels in which some pair could saturate, bool [channels]."""
        rows = self.rows(codes).astype(np.int32)
        over = [_excess(rows, partner).any(axis=1) for partner in self.partners]
        found: NDArray[np.bool_] = np.any(over, axis=0)
        return found

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
    rows, best = pairs.rows(weights), np.ones_like(full)
    size = max(1, _BLOCK // max(rows.shape[1], 1))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        best[part] = _widths(rows[part], full[part], pairs.partners)
    return full * best


def _widths(
    rows: NDArray[np.float32], full: NDArray[np.float32], partners: Sequence[Order]
) -> NDArray[np.float32]:
    """The best of _WIDTHS for each of [channels, inputs]."""
    best, least = np.ones_like(full), np.full(len(full), np.inf)
    fits = np.zeros(len(full), bool)
    for factor in _WIDTHS:
        scales = full * np.float32(factor)
        whole = quantization.quantize(rows, scales).astype(np.int32)
        codes = fit_rows(whole, partners)
        error = np.square(rows - codes * scales[:, None]).sum(axis=1)
        better = ~fits & (error < least)
        best[better], least[better] = factor, error[better]
        fits |= (whole == codes).all(axis=1)
        if fits.all():
            break
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
    """Weight -> its pairs and its codes, of every layer of a Q/DQ graph with an INT8 weight of its own."""
    weights = {t.name: t for t in model.graph.initializer if t.data_type == TensorProto.INT8}
    reads, found = _readers(model), {}
    for dq in model.graph.node:
        tensor = weights.get(dq.input[0]) if dq.op_type == _DQ else None
        made = reads.get(dq.output[0], [])
        if tensor is None or len(reads[tensor.name]) > 1 or len(made) != 1:
            continue
        ((node, place),) = made
        pairs = of_layer(node, tensor.dims) if place == 1 else None
        if pairs is not None:
            found[tensor.name] = (pairs, numpy_helper.to_array(tensor))
    return found


def could(model: onnx.ModelProto) -> bool:
    """Whether any pair of codes in a Q/DQ graph could saturate.

    Weights that several nodes read, or that are moved before they are read, could if any code is above 64, and so
    could products of two activations of which the second is signed.
    """
    found, reads = layers(model), _readers(model)
    if not all(pairs.fits(codes) for pairs, codes in found.values()):
        return True
    held = {t.name: t for t in model.graph.initializer}
    for dq in model.graph.node:
        if dq.op_type != _DQ or dq.input[0] in found:
            continue
        codes = held.get(dq.input[0])
        if codes is None:
            zero = held.get(dq.input[2]) if len(dq.input) > 2 else None
            risky = zero is None or zero.data_type != TensorProto.UINT8
        else:
            risky = codes.data_type == TensorProto.INT8 and _largest(codes) > ROOM // 2
        if risky and any(_adds_up(*read, codes) for read in _moved(dq.output[0], reads)):
            return True
    return False


def _moved(tensor: str, reads: Mapping[str, list[Reader]]) -> Iterator[Reader]:
    """The nodes that read a tensor, or what is left of it after moves, and where."""
    waiting, seen = [tensor], {tensor}
    while waiting:
        for node, place in reads.get(waiting.pop(), ()):
            yield node, place
            if node.op_type in _MOVES:
                waiting += [name for name in node.output if name not in seen]
                seen.update(node.output)


def _largest(codes: TensorProto) -> int:
    return int(np.abs(numpy_helper.to_array(codes).astype(np.int16)).max(initial=0))


def _readers(model: onnx.ModelProto) -> dict[str, list[Reader]]:
    """Tensor -> the nodes that read it, and where."""
    found: dict[str, list[Reader]] = {}
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            found.setdefault(name, []).append((node, place))
    return found


def _adds_up(node: onnx.NodeProto, place: int, codes: TensorProto | None) -> bool:
    """Whether a node adds up products of 8-bit weights `codes`, or of a signed activation (None), in its place."""
    if codes is None:
        return node.op_type == "Einsum" or (node.op_type == "MatMul" and place == 1)
    if node.op_type == "Conv" and place == 1:
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        return not _alone(codes.dims, given)
    return node.op_type in _SUMS


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
                found[node.name or node.output[0]] = bool(_excess(rows, partner).any())
    return found


def _as_added(node: onnx.NodeProto, codes: NDArray[Any]) -> Codes:
    """Weights of a kernel in the order that it adds them in, one row an output: [outputs, inputs].

    That of the file for images that are NCHW; NHWC ones are read by nodes of a domain of their own.
    """
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "QLinearConv":
        if _alone(codes.shape, given):
            return np.zeros((1, 0), np.int32)
        turned = np.moveaxis(codes, 1, -1) if node.domain else codes
    elif codes.ndim < 2:
        turned = codes.reshape(1, -1)
    elif given.get("transB"):
        turned = codes
    else:
        turned = np.moveaxis(codes, -2, -1)
        return turned.reshape(-1, turned.shape[-1]).astype(np.int32)
    return turned.reshape(len(turned), -1).astype(np.int32)


def _alone(dims: Sequence[int], given: Mapping[str, Any]) -> bool:
    """Whether a convolution has one input and one output a group: those are added up in 32 bits."""
    return dims[1] == 1 and dims[0] == given.get("group", 1) > 1
