"""Where Q/DQ go for ordinary ONNX Runtime sessions on the CPU: wherever an integer kernel then runs.

Such a session turns a node into an integer kernel where all that it reads is dequantized and what it makes is quantized
at once; else it computes DQ and the node in float, which is slower than FP32. A Relu or Clip vanishes in the end of
a range only if the codes begin there, so activations are U8 with zero points. Against TensorRT's rules (rules.py):

1. What a Conv makes, behind its Relu or Clip if one reads it, is INT8, too, and its bias INT32 in units of s_x s_w.
2. A sum, a product (a gate), a Sigmoid (with the product a SiLU) and a LeakyRelu of what integer kernels make read INT8
   and make INT8. Where one side is float they stay float. A HardSigmoid has no byte kernel; it makes INT8 all the same,
   for the product that it is a side of.
3. What an average pool makes is INT8 before it is moved (Flatten), with the codes that it has afterwards.
4. No layer stays float for being thin: byte kernels work on any number of channels.

Gemm and MatMul have kernels with float outputs and need no more. What else has no byte kernel (GELU,
LayerNorm, attention) is float between them, as by TensorRT's rules.

Source: ONNX Runtime 1.31, "Quantize ONNX models" and the node selectors of its QDQ transformer (qdq_selectors.h).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx
from onnx import helper

from resq_deploy.export import fold, rules
from resq_deploy.export.names import Unique

_KERNELS = frozenset({"Add", "Mul", "Sigmoid", "HardSigmoid", "LeakyRelu"})
_VANISH = frozenset({"Relu", "Clip"})


def plan(fp32: onnx.ModelProto) -> rules.Plan:
    """Decide what of an FP32 graph (uniquely named nodes) becomes INT8, by the rules above."""
    return _Planner(fp32).plan()


def prepared(fp32: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which x HardSigmoid(x) stands for HardSwish(x), as sessions compute it: the product is then of bytes.

    The gate of a node N with output T is N.gate, which makes T.gate.
    """
    made = onnx.ModelProto()
    made.CopyFrom(fp32)
    tensor = Unique({*fold.initializers(made.graph), *fold.producers(made.graph)})
    named = Unique([node.name for node in made.graph.node])
    nodes: list[onnx.NodeProto] = []
    for node in made.graph.node:
        if node.op_type == "HardSwish" and not node.domain:
            gate, name = tensor(f"{node.output[0]}.gate"), named(f"{node.name}.gate")
            nodes.append(
                helper.make_node(
                    "HardSigmoid", [node.input[0]], [gate], name=name, alpha=1 / 6, beta=0.5
                )
            )
            node.op_type = "Mul"
            node.input.append(gate)
        nodes.append(node)
    fold.replace(made.graph.node, nodes)
    return fold.compact(made)


@dataclass
class _Planner(rules.Planner):
    made: set[str] = field(
        default_factory=set
    )  # tensors that are INT8 as integer kernels make them

    def _weighted(self, node: onnx.NodeProto) -> None:
        super()._weighted(node)
        if node.op_type == "Conv" and (node.name, 0) in self.reads:
            self._makes(node)

    def _too_thin(self, node: onnx.NodeProto, shape: tuple[int, ...]) -> str:
        return ""

    def _residual(self, node: onnx.NodeProto) -> None:
        if node.op_type not in _KERNELS or not all(self._is_made(name) for name in node.input):
            return
        for position in range(len(node.input)):
            self._read(node, position)
        self._makes(node)

    def _pool(self, node: onnx.NodeProto) -> None:
        super()._pool(node)
        if node.op_type in rules.AVERAGE and (node.name, 0) in self.reads:
            self._makes(node)
            self._share(*self._later(node.output[0]))

    def _makes(self, node: onnx.NodeProto) -> None:
        """What a node makes is INT8, behind the Relu or Clip that alone reads it, for all that read it."""
        name = node.output[0]
        readers = self.consumers.get(name, [])
        if len(readers) == 1 and readers[0][0].op_type in _VANISH:
            name = readers[0][0].output[0]
        for reader, position in self.consumers.get(name, []):
            self._read(reader, position)
            self.made.add(name)

    def _is_made(self, name: str) -> bool:
        """Whether a tensor is made by an integer kernel, or moved or pooled from what is."""
        name = self._origin(name)
        maker = self.producers.get(name)
        if maker is not None and maker.op_type == "MaxPool":
            return self._is_made(maker.input[0])
        return name in self.made
