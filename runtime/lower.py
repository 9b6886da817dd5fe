"""Rewrite an INT8 QDQ graph so that ONNX Runtime on x86 computes it in integers, and fast.

x86 multiplies unsigned by signed bytes, so activations are re-encoded from S8 to U8: the same
integers, moved by a zero point of 128 (or, where a Relu makes them 0..127, not at all). Images lie in
NHWC. `lower` writes ONNX Runtime's integer operators itself and leaves nothing to its fusions:

    DQ -> Conv [-> Relu | Clip | MaxPool ...] -> Q     QLinearConv, then a clamp of bytes if needed
    DQ -> Conv -> float (a residual Add, SiLU, ...)    im2col and MatMulIntegerToFloat
    DQ -> MatMul | Gemm [-> Add bias]                  MatMulIntegerToFloat
    DQ, DQ -> Add | Mul -> Q                           QLinearAdd, QLinearMul
    DQ -> Sigmoid | LeakyRelu -> Q                     QLinearSigmoid, QLinearLeakyRelu
    DQ -> MaxPool | Relu | GlobalAveragePool -> Q      on bytes

What no pattern fits runs as the file says, in float. Weight initializers keep their names and
bytes, so a fault address means the same in both graphs.

How results differ. Sums of products are exact integers here; a float convolution of the same codes
(the unfused file) rounds each product and sum. The scales are applied in one float multiplication
instead of several, and in QLinearConv the float bias is rounded to the accumulator's unit s_x * s_w.
So a value next to a rounding boundary of a Q may land one code away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy.runtime.bytewise import Bytewise
from resq_deploy.runtime.cpu import unsaturated
from resq_deploy.runtime.forms import MOVES, MS, Lowered, Quant, Sink, Weight
from resq_deploy.runtime.graph import Graph, attributes

_UNARY = {"Relu", "Clip", "Sigmoid", "Tanh", "Erf", "HardSwish", "HardSigmoid", "LeakyRelu", "Gelu"}
ELEMENTWISE = frozenset(_UNARY | {"Add", "Sub", "Mul", "Div", "Min", "Max", "Sqrt", "Exp", "Neg"})
_LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})


def lower(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model for fast execution by ONNX Runtime on x86; same inputs, outputs and weight bytes.

    Patterns that are not known, and parameters out of the ordinary (a scale that is not positive and
    finite, a zero point on weights), stay float operators.
    """
    return unsaturated(lower_graph(Graph.of(model)).model(), keep=True)


def lower_graph(graph: Graph) -> Lowered:
    """`lower` on a parsed graph, whose parameters may have been exchanged."""
    with np.errstate(all="ignore"):  # parameters may be faulty: any bits at all
        return _Lowering(graph).run()


class _Lowering(Bytewise):
    """One pass over the nodes; `on_X` returns whether a pattern fitted a node X."""

    def run(self) -> Lowered:
        for info in self.graph.inputs:
            self.finish(info.name)
        for node in self.graph.nodes:
            if id(node) not in self.done:
                handler: Callable[[onnx.NodeProto], bool] | None
                handler = getattr(self, f"on_{node.op_type}", None)
                if node.domain or handler is None or not handler(node):
                    self.plain(node)
        for info in self.graph.outputs:
            got = self.float_of(info.name)
            if got != info.name:
                identity = onnx.helper.make_node("Identity", [got], [info.name], "resq/out")
                self.out.nodes.append(identity)
        return self.out

    def plain(self, node: onnx.NodeProto) -> None:
        """A node as the file says; elementwise ones in whichever layout their inputs have."""
        nhwc = node.op_type in ELEMENTWISE and not node.domain and self._can_be_nhwc(node)
        if node.op_type in _LAYERS:
            self.begin(node.output[0])
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:], copy.output[:]
        copy.input.extend(self._float_input(name, nhwc) for name in node.input)
        suffix = "/nhwc" if nhwc else ""
        copy.output.extend(f"{name}{suffix}" if name else "" for name in node.output)
        self.out.nodes.append(copy)
        for name in filter(None, node.output):
            self.floats[name] = {nhwc: f"{name}{suffix}"}
            self.finish(name)

    def _can_be_nhwc(self, node: onnx.NodeProto) -> bool:
        if self.graph.rank(node.output[0]) != 4:
            return False
        variable = [n for n in node.input if n and n not in self.graph.arrays]
        constants = [self.graph.arrays[n] for n in node.input if n in self.graph.arrays]
        ranked = all(self.graph.rank(n) == 4 for n in variable)
        fits = all(c.size == 1 or c.ndim == 4 for c in constants)
        return ranked and fits and any(self.is_nhwc(n) for n in variable)

    def _float_input(self, name: str, nhwc: bool) -> str:
        array = self.graph.arrays.get(name)
        if nhwc and array is not None and array.ndim == 4 and array.size > 1:
            return self.derived(f"{name}/nhwc", np.ascontiguousarray(array.transpose(0, 2, 3, 1)))
        return self.float_of(name, nhwc)

    def finish(self, name: str) -> None:
        """A float tensor was made: quantize it at once if that is all that happens to it."""
        if sink := self.sink(name):
            self.close(sink, lambda scale, zero: self.quantized(name, scale, zero), self.rank(name))

    def quantized(self, name: str, scale: str, zero: int) -> tuple[str, bool]:
        """U8 codes of a float tensor, in the layout it has."""
        nhwc = self.is_nhwc(name)
        ins = [self.float_of(name, nhwc), scale, self.const(zero, np.uint8)]
        return self.emit("QuantizeLinear", ins), nhwc

    def on_QuantizeLinear(self, node: onnx.NodeProto) -> bool:
        name = node.input[0]
        if name in self.graph.arrays or name in self.weights or not self.q_fits(node, name):
            return False
        self.close(
            Sink((), node), lambda scale, zero: self.quantized(name, scale, zero), self.rank(name)
        )
        return True

    def on_DequantizeLinear(self, node: onnx.NodeProto) -> bool:
        arrays = self.graph.arrays
        if len(node.input) != 3 or node.input[1] not in arrays or node.input[2] not in arrays:
            return False
        source, scale, zero = node.input[0], node.input[1], arrays[node.input[2]]
        axis = attributes(node).get("axis", 1)
        if source in self.quants:
            q = self.quants[source]
            zero_u8 = int(zero.reshape(-1)[0]) + q.shift
            if arrays[scale].size != 1 or zero.size != 1 or not 0 <= zero_u8 <= 255:
                return self._dequantize_own(node, q)
            self.quants[node.output[0]] = replace(q, scale=scale, zero=zero_u8)
            return True
        if source not in arrays or zero.any() or arrays[scale].ndim > 1:
            return False
        if arrays[source].dtype == np.int8 and arrays[source].ndim:
            self.weights[node.output[0]] = Weight(source, scale, axis % arrays[source].ndim)
            return True
        return self._constant_bias(node)

    def _dequantize_own(self, node: onnx.NodeProto, q: Quant) -> bool:
        """A DQ whose parameters the U8 codes cannot express: give it the file's own codes."""
        codes = self.emit("Cast", [self.codes_of(node.input[0], False)], to=onnx.TensorProto.INT32)
        moved = self.emit("Sub", [codes, self.const(q.shift, np.int32)])
        own = onnx.TensorProto.INT8 if q.signed else onnx.TensorProto.UINT8
        self.quants.pop(node.input[0])
        self.floats[node.input[0]] = {False: self.emit("Cast", [moved], to=own)}
        return False

    def _constant_bias(self, node: onnx.NodeProto) -> bool:
        """An INT32 bias behind a DQ becomes the float bias that it stands for."""
        arrays = self.graph.arrays
        codes, scale = arrays[node.input[0]], arrays[node.input[1]]
        if codes.dtype != np.int32 or codes.ndim != 1:
            return False
        value = (codes.astype(np.float32) * scale).astype(np.float32)
        self.floats[node.output[0]] = {False: self.derived(f"{node.output[0]}/float", value)}
        return True

    def on_Conv(self, node: onnx.NodeProto) -> bool:
        w, bias = self.weights.get(node.input[1]), self.bias(node, 2)
        attrs = attributes(node)
        usable = attrs.get("auto_pad", b"NOTSET") == b"NOTSET" and self.rank(node.input[0]) == 4
        w = self.fits(node.input[0], w, 0) if w is not None and usable else None
        if w is None or bias is None:
            return False
        out = node.output[0]
        sink, group = self.sink(out), attrs.get("group", 1)
        codes = None if sink is None else self.bias_codes(node.input[0], w, bias)
        if sink and codes is not None and not (group == 1 and self.is_small(out)):
            self.begin(out)
            self.close(sink, lambda s, z: self.qlinear_conv(node, w, codes, s, z), 4)
        elif group == 1:
            self._defer(out, lambda: self.conv_to_float(node, w, bias), sink)
        else:
            return False
        return True

    def _defer(self, out: str, emit: Callable[[], None], sink: Sink | None) -> None:
        """A layer with a float result is written where the result is used, not before."""
        self.pending[out] = emit
        if sink or self.graph.only_consumer(out) is None:
            self.float_of(out, True)
            self.finish(out)

    def on_MatMul(self, node: onnx.NodeProto) -> bool:
        a, b = node.input
        if b in self.weights and len(self.graph.arrays[self.weights[b].name].shape) == 2:
            return self._dense(node, self.weights[b], np.zeros(1, np.float32), False)
        if not (self.sane(a) and self.sane(b)):
            return False
        self.begin(node.output[0])
        left, right = self.operand(a, False), self.operand(b, False)
        ins = [left[0], right[0], left[1], right[1], left[2], right[2]]
        self.floats[node.output[0]] = {False: self.emit("MatMulIntegerToFloat", ins, MS)}
        self.finish(node.output[0])
        return True

    def on_Gemm(self, node: onnx.NodeProto) -> bool:
        attrs, bias = attributes(node), self.bias(node, 2)
        w = self.weights.get(node.input[1])
        unit = attrs.get("alpha", 1.0) == 1.0 == attrs.get("beta", 1.0)
        if w is None or bias is None or not unit or attrs.get("transA", 0):
            return False
        return self._dense(node, w, bias, bool(attrs.get("transB", 0)))

    def _dense(
        self, node: onnx.NodeProto, w: Weight, bias: NDArray[np.float32], turned: bool
    ) -> bool:
        fitting = self.fits(node.input[0], w, 0 if turned else 1)
        if fitting is None:
            return False
        w = fitting
        out, added = node.output[0], self._added_bias(node, w)
        if added is not None:
            bias, out = added
        self.begin(out)
        codes, *x = self.operand(node.input[0], False)
        matrix = self.emit("Transpose", [w.name], perm=[1, 0]) if turned else w.name
        self.floats[out] = {False: self.product(codes, matrix, x, w, bias, out)}
        self.finish(out)
        return True

    def _added_bias(
        self, node: onnx.NodeProto, w: Weight
    ) -> tuple[NDArray[np.float32], str] | None:
        """The vector that an Add after a MatMul adds, and that Add's output."""
        add = self.graph.only_consumer(node.output[0])
        if node.op_type != "MatMul" or add is None or add.op_type != "Add":
            return None
        other = add.input[1] if add.input[0] == node.output[0] else add.input[0]
        value = self.constant(other)
        if value is None or value.dtype != np.float32 or value.shape != (self._scales(w).size,):
            return None
        self.done.add(id(add))
        return value, add.output[0]

    def on_GlobalAveragePool(self, node: onnx.NodeProto) -> bool:
        x, out = node.input[0], node.output[0]
        sink = self.sink(out)
        if not self.is_nhwc(x) or self.rank(x) != 4:
            return False
        if sink and self.sane(x) and self._has_mean(x, sink):
            self.close(sink, lambda s, z: self._mean(x, s, z), 4)
            return True
        source = self.float_of(x, True)
        if self.graph.opset >= 18:
            axes = self.const([1, 2], np.int64)
            mean = self.emit("ReduceMean", [source, axes], keepdims=1)
        else:
            mean = self.emit("ReduceMean", [source], axes=[1, 2], keepdims=1)
        self.floats[out] = {True: mean}
        self.finish(out)
        return True

    def _has_mean(self, x: str, sink: Sink) -> bool:
        """Whether ONNX Runtime's kernel takes this factor from sums to codes: 2^-32 <= s_x / (s_y H W) < 256."""
        arrays, (_, _, *sides) = self.graph.arrays, self.graph.shapes[x]
        known = [n for n in sides if n]
        factor = arrays[self.quants[x].scale].item() / arrays[sink.q.input[1]].item()
        return len(known) == 2 and 2.0**-32 <= factor / math.prod(known) < 256

    def _mean(self, x: str, scale: str, zero: int) -> tuple[str, bool]:
        ins = [*self.operand(x, True), scale, self.const(zero, np.uint8)]
        return self.emit("QLinearGlobalAveragePool", ins, MS, channels_last=1), True

    def on_MaxPool(self, node: onnx.NodeProto) -> bool:
        return self._on_codes(node) or self._flattened(node)

    on_Flatten = on_Reshape = on_Transpose = on_Identity = on_Squeeze = on_Unsqueeze = on_MaxPool

    def _on_codes(self, node: onnx.NodeProto) -> bool:
        """A pool or a move between a DQ and a Q of the same scale and zero point."""
        x, sink = node.input[0], self.sink(node.output[0])
        q = self.quants.get(x)
        if q is None or sink is None or not (self._passes(node, x) and self._is_alike(q, sink)):
            return False
        self.close(
            Sink((node, *sink.between), sink.q), lambda s, z: (q.name, q.nhwc), q.rank, q.shift
        )
        return True

    def on_Concat(self, node: onnx.NodeProto) -> bool:
        """Copies of a tensor's channels between a DQ and a Q of the same scale and zero point (split.py)."""
        x, axis, sink = node.input[0], attributes(node)["axis"], self.sink(node.output[0])
        q = self.quants.get(x)
        if q is None or sink is None or sink.between or not self._is_alike(q, sink):
            return False
        if any(name != x for name in node.input) or (q.rank == 4 and axis not in (1, -3)):
            return False
        copies, where = [q.name] * len(node.input), 3 if q.nhwc else axis
        self.close(
            sink, lambda s, z: (self.emit("Concat", copies, axis=where), q.nhwc), q.rank, q.shift
        )
        return True

    def _is_alike(self, q: Quant, sink: Sink) -> bool:
        """Whether the codes of a quantized tensor are what the Q of a sink would make of its values."""
        arrays = self.graph.arrays
        zero = int(arrays[sink.q.input[2]].reshape(-1)[0])
        same = arrays[q.scale].tobytes() == arrays[sink.q.input[1]].tobytes()
        return same and zero + q.shift == q.zero

    def _flattened(self, node: onnx.NodeProto) -> bool:
        """A Flatten of one pixel needs no change of layout."""
        x, out = node.input[0], node.output[0]
        if node.op_type not in MOVES or not self.is_nhwc(x) or not self.is_vector(node):
            return False
        self.floats[out] = {False: self.emit("Flatten", [self.float_of(x, True)])}
        self.finish(out)
        return True
