"""By whose rules an INT8 graph is written: TensorRT's, which every runtime reads, or ONNX Runtime's sessions'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import onnx

from resq_deploy.export import rules as tensorrt
from resq_deploy.export import session_rules
from resq_deploy.export.pairing import paired
from resq_deploy.export.rules import Plan
from resq_deploy.saturation import Pairs, of_layer

Rules = Literal["tensorrt", "onnxruntime"]
RULES: tuple[Rules, ...] = get_args(Rules)


@dataclass(frozen=True, slots=True)
class Dialect:
    """`rules`: whose; `half`: whether what stays float becomes float16, with scales that it holds (halves.py).

    `overflow_fix`: whether weights keep to codes whose sums fit 16 bits (saturation.py).
    """

    rules: Rules = "tensorrt"
    half: bool = False
    overflow_fix: bool = False

    @property
    def unsigned(self) -> bool:
        """Whether activations are U8 with zero points, and biases INT32."""
        return self.rules == "onnxruntime"

    def prepared(self, fp32: onnx.ModelProto) -> onnx.ModelProto:
        """The FP32 graph to begin with: the same function, in operators that the runtime has kernels for."""
        made = session_rules.prepared(fp32) if self.rules == "onnxruntime" else fp32
        return self.paired(made)

    def paired(self, fp32: onnx.ModelProto) -> onnx.ModelProto:
        """An FP32 graph with channels in the order that suits `overflow_fix`, where that is asked for."""
        return paired(fp32, self.pairs(fp32, self.plan(fp32))) if self.overflow_fix else fp32

    def plan(self, fp32: onnx.ModelProto) -> Plan:
        """What of an FP32 graph becomes INT8."""
        if self.rules == "onnxruntime":
            return session_rules.plan(fp32)
        return tensorrt.plan(fp32, half=self.half)

    def pairs(self, fp32: onnx.ModelProto, where: Plan) -> dict[str, Pairs]:
        """Weight -> the pairs of its codes that must fit, of a plan for this FP32 graph."""
        if not self.overflow_fix:
            return {}
        nodes = {node.name: node for node in fp32.graph.node}
        dims = {tensor.name: tensor.dims for tensor in fp32.graph.initializer}
        found = {w.name: of_layer(nodes[w.node], dims[w.name]) for w in where.weights}
        return {name: pairs for name, pairs in found.items() if pairs is not None}


TENSORRT = Dialect()
ONNXRUNTIME = Dialect("onnxruntime")
