"""Operators between a DQ and a Q that take each value for itself, as ONNX Runtime's operators on bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from resq_deploy.runtime.forms import MS, Sink
from resq_deploy.runtime.graph import attributes
from resq_deploy.runtime.products import Products


class Bytewise(Products):
    """Sums, products and activation functions of codes; `on_X` returns whether a node X fitted."""

    def on_Add(self, node: onnx.NodeProto) -> bool:
        """DQ, DQ -> Add -> Q, of one shape."""
        shapes = self.graph.shapes
        alike = shapes.get(node.input[0]) == shapes.get(node.input[1])
        return alike and self._two(node, "QLinearAdd")

    def on_Mul(self, node: onnx.NodeProto) -> bool:
        """DQ, DQ -> Mul -> Q, of one shape, or of a tensor and one value for each of its channels (a gate)."""
        shapes = [self.graph.shapes.get(name) for name in node.input]
        channels = [None if s is None or len(s) != 4 else (s[0], s[1], 1, 1) for s in shapes]
        gate = channels[0] is not None and channels[0] == channels[1] and channels[0] in shapes
        return (shapes[0] == shapes[1] or gate) and self._two(node, "QLinearMul")

    def on_Relu(self, node: onnx.NodeProto) -> bool:
        """DQ -> Relu -> Q."""
        return self._one(node, "QLinearLeakyRelu", alpha=0.0, clamps=(node,))

    def on_LeakyRelu(self, node: onnx.NodeProto) -> bool:
        """DQ -> LeakyRelu -> Q."""
        return self._one(node, "QLinearLeakyRelu", alpha=attributes(node).get("alpha", 0.01))

    def on_Sigmoid(self, node: onnx.NodeProto) -> bool:
        """DQ -> Sigmoid -> Q: a table of 256 codes."""
        return self._one(node, "QLinearSigmoid")

    def _one(
        self, node: onnx.NodeProto, op: str, clamps: tuple[onnx.NodeProto, ...] = (), **attrs: Any
    ) -> bool:
        """One quantized tensor in; `clamps`: nodes whose range the codes are to keep."""
        x, sink = node.input[0], self.sink(node.output[0])
        if sink is None or not self.sane(x):
            return False

        def produce(scale: str, zero: int) -> tuple[str, bool]:
            nhwc = self.is_nhwc(x)
            ins = [*self.operand(x, nhwc), scale, self.const(zero, np.uint8)]
            return self.emit(op, ins, MS, **attrs), nhwc

        self.close(Sink((*clamps, *sink.between), sink.q), produce, self.rank(x))
        return True

    def _two(self, node: onnx.NodeProto, op: str) -> bool:
        """Two quantized tensors in."""
        a, b = node.input
        sink, known = self.sink(node.output[0]), {a, b} <= self.graph.shapes.keys()
        if sink is None or not known or not (self.sane(a) and self.sane(b)):
            return False
        nhwc = self.is_nhwc(a) or self.is_nhwc(b)

        def produce(scale: str, zero: int) -> tuple[str, bool]:
            ins = [*self.operand(a, nhwc), *self.operand(b, nhwc), scale]
            return self.emit(op, [*ins, self.const(zero, np.uint8)], MS), nhwc

        self.close(sink, produce, self.rank(node.output[0]))
        return True
