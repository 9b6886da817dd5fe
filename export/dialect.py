"""By whose rules an INT8 graph is written: TensorRT's, which every runtime reads, or ONNX Runtime's sessions'."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import onnx

from resq_deploy.export import rules as tensorrt
from resq_deploy.export import session_rules
from resq_deploy.export.rules import Plan

Rules = Literal["tensorrt", "onnxruntime"]
RULES: tuple[Rules, ...] = get_args(Rules)


@dataclass(frozen=True, slots=True)
class Dialect:
    """`rules`: whose; `half`: whether what stays float becomes float16, with scales that it holds (halves.py)."""

    rules: Rules = "tensorrt"
    half: bool = False

    @property
    def unsigned(self) -> bool:
        """Whether activations are U8 with zero points, and biases INT32."""
        return self.rules == "onnxruntime"

    def prepared(self, fp32: onnx.ModelProto) -> onnx.ModelProto:
        """The FP32 graph to begin with: the same function, in operators that the runtime has kernels for."""
        return session_rules.prepared(fp32) if self.rules == "onnxruntime" else fp32

    def plan(self, fp32: onnx.ModelProto) -> Plan:
        """What of an FP32 graph becomes INT8."""
        if self.rules == "onnxruntime":
            return session_rules.plan(fp32)
        return tensorrt.plan(fp32, half=self.half)


TENSORRT = Dialect()
ONNXRUNTIME = Dialect("onnxruntime")
