"""Where Q/DQ go for ordinary ONNX Runtime sessions on the CPU: wherever an integer kernel then runs.

Such a session turns a node into an integer kernel where all that it reads is dequantized and what it makes is quantized
at once; else it computes DQ and the node in float, which is slower than FP32. A Relu or Clip vanishes in the end of
a range only if the codes begin there, so activations are U8 with zero points. Against TensorRT's rules (rules.py):

1. What a Conv makes, behind its Relu or Clip if one reads it, is INT8, too, and its bias INT32 in units of s_x s_w.
2. A sum, a product (a gate), a Sigmoid (with the product a SiLU) and a LeakyRelu of what integer kernels make read INT8
   and make INT8. Where one side is float they stay float. A HardSigmoid has no byte kernel; it makes INT8 all the same,
   for the product that it is a side of.
3. What a pool or a Concat makes is INT8 before it is moved; a Concat takes each input with its own codes.
4. What is moved (Flatten, Split) has the codes that it has afterwards, so that the move is of bytes.
5. No layer stays float for being thin: byte kernels work on any number of channels.

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
_PASS = frozenset({"MaxPool", "Concat"}) | rules.AVERAGE
_NO_KERNEL = "ONNX Runtime has no byte kernel for it here: float between the layers"
_VANISH = frozenset({"Relu", "Clip"})


def plan(fp32: onnx.ModelProto) -> rules.Plan:
    """Decide what of an FP32 graph (uniquely named nodes) becomes INT8, by the rules above."""
    return _Planner(fp32).plan()


def prepared(fp32: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of the same function in operators that have byte kernels.

    x HardSigmoid(x) stands for HardSwish(x), as sessions compute it: the product is then of bytes. The gate of a node N
    with output T is N.gate, which makes T.gate. A product of matrices and the vector that is added to it are one
    Gemm, which sessions make of them anyway, but with a bias that stays float.
    """
    made = onnx.ModelProto()
    made.CopyFrom(fp32)
    _join_biases(made)
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


def _join_biases(model: onnx.ModelProto) -> None:
    """MatMul [N, K] x constant [K, M], then Add of a constant [M] -> Gemm under the product's name; in place."""
    shapes, arrays = fold.shapes(model), fold.initializers(model.graph)
    readers, gone = fold.consumers(model.graph), set[str]()
    for node in model.graph.node:
        after = readers.get(node.output[0], [])
        if node.op_type != "MatMul" or len(after) != 1 or after[0][0].op_type != "Add":
            continue
        add, position = after[0]
        weight, bias = arrays.get(node.input[1]), arrays.get(add.input[1 - position])
        if weight is None or bias is None or len(shapes.get(node.input[0], ())) != 2:
            continue
        if len(weight.dims) == 2 and list(bias.dims) == [weight.dims[1]]:
            node.op_type = "Gemm"
            node.input.append(bias.name)
            node.output[0] = add.output[0]
            gone.add(add.name)
    fold.replace(model.graph.node, [n for n in model.graph.node if n.name not in gone])


@dataclass
class _Planner(rules.Planner):
    # tensors that are INT8 as integer kernels make them, and the nodes that do but for layers
    made: set[str] = field(default_factory=set)
    kernels: set[str] = field(default_factory=set)

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
        if node.op_type != "HardSigmoid":
            self.kernels.add(node.name)
        self._makes(node)

    def _pool(self, node: onnx.NodeProto) -> None:
        super()._pool(node)
        if node.op_type not in rules.AVERAGE | {"MaxPool"} or (node.name, 0) not in self.reads:
            return
        self.kernels.add(node.name)
        if node.op_type != "MaxPool":
            self._makes(node)

    def _concat(self, node: onnx.NodeProto) -> None:
        if node.op_type == "Concat" and not self._is_one(node):
            if self._later(node.output[0]):
                for position, name in enumerate(node.input):
                    if name not in self.arrays:
                        self._read(node, position)
                self.kernels.add(node.name)
                self._makes(node)
        else:
            super()._concat(node)

    def _makes(self, node: onnx.NodeProto) -> None:
        """What a node makes is INT8, behind the Relu or Clip that alone reads it, for all that read it."""
        name = node.output[0]
        readers = self.consumers.get(name, [])
        if len(readers) == 1 and readers[0][0].op_type in _VANISH:
            name = readers[0][0].output[0]
        self._hand_on(name)

    def _hand_on(self, name: str) -> None:
        """All that read a tensor read it as INT8, and what moves make of it, with the same codes."""
        for reader, position in self.consumers.get(name, []):
            self._read(reader, position)
            self.made.add(name)
            if reader.op_type in rules.MOVES - {"Concat"} and position == 0:
                for output in reader.output:
                    self._share(name, output)
                    self._hand_on(output)

    def _is_made(self, name: str) -> bool:
        """Whether a tensor is made by an integer kernel, or moved, pooled or joined from what is."""
        name = self._origin(name)
        maker = self.producers.get(name)
        if maker is not None and maker.op_type in _PASS:
            return all(self._is_made(source) for source in maker.input)
        return name in self.made

    def _done(self) -> set[str]:
        layers = {weight.node for weight in self.weights}
        floats = {n.name for n in self.model.graph.node if n.op_type in rules.EPILOGUE - _VANISH}
        return layers | self.kernels | (self.epilogue - floats)

    def _reason(self, node: onnx.NodeProto) -> str:
        reason = super()._reason(node)
        return _NO_KERNEL if "epilogue" in reason else reason
