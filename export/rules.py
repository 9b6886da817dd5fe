"""Where Q/DQ go: TensorRT's rules for explicit INT8, as a plan over the FP32 graph.

1. Conv, ConvTranspose, Gemm and MatMul with a constant weight: the weight per output channel, the input per tensor.
   Bias, BatchNorm, activation function and residual sum stay in the float epilogue: no Q/DQ between them.
2. A residual sum reads one branch from the epilogue of its convolution and the other, the skip, as INT8.
3. Average pooling between INT8 layers: Q/DQ before and after it.
4. MaxPool commutes with rounding: Q/DQ before and after it, with one scale.
5. The inputs of a Concat that is read as INT8 share its scale; copies of a tensor are made of its codes (split.py).
6. All else stays float, and the plan says why. So do layers with fewer than 16 channels inside the network: INT8 tensor
   cores work on 16 at a time. The first and the last layer are INT8 whatever their width: their weights
   are weight memory, and a flipped bit moves an INT8 weight by no more than its range, a float one by 2^127.

Source: NVIDIA TensorRT Developer Guide, "Explicit quantization: Q/DQ layer-placement recommendations".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import onnx

from resq_deploy.export import fold
from resq_deploy.manifest import FloatOp

THIN = 16  # channels; INT8 tensor cores take this many at a time

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
MOVES = frozenset(
    {
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Expand", "Tile"),
        *("Slice", "Split", "Gather", "Pad", "Concat"),
    }
)
EPILOGUE = frozenset({"Relu", "Clip", "LeakyRelu", "PRelu"})
AVERAGE = frozenset({"AveragePool", "GlobalAveragePool"})
_INT8_FRIENDLY = frozenset({"Conv", "ConvTranspose", "Relu", "Clip", "Add", "MaxPool", "Concat"})
_PREPROCESSING = frozenset({"Sub", "Div", "Add", "Mul"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_INDEXING = frozenset({"Shape", "Size", "Range", "ConstantOfShape", "Cast", "NonZero"})

_NORM = "mean and variance need more than 8 bits"
_GATE = "a smooth activation function runs in the float epilogue of the layer before it"
_REASONS: Mapping[str, str] = {
    "Softmax": "exponentials span more than 8 bits",
    "LayerNormalization": _NORM,
    "GroupNormalization": _NORM,
    "InstanceNormalization": _NORM,
    "LpNormalization": _NORM,
    "BatchNormalization": "no convolution before it to fold it into",
    "Sigmoid": _GATE,
    "Gelu": _GATE,
    "Erf": _GATE,
    "HardSwish": _GATE,
    "HardSigmoid": _GATE,
    "Tanh": _GATE,
    **dict.fromkeys(("Elu", "Celu", "Selu", "Mish", "Softplus", "Softsign"), _GATE),
    "Mul": "a product of activations: a float epilogue costs nothing, INT8 costs accuracy",
    "Add": "a sum of float tensors: no INT8 convolution to join",
    "ReduceL2": _NORM,
    "Relu": "the layer before it is float",
    "Clip": "the layer before it is float",
    "MatMul": "attention: both operands are activations, fused attention kernels are float",
    "GlobalAveragePool": "the pooled tensor is float",
    "AveragePool": "the pooled tensor is float",
    "MaxPool": "the pooled tensor is float",
}


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight that becomes INT8: its initializer, the node that computes with it, its output-channel axis."""

    name: str
    node: str
    op: str
    axis: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What of an FP32 graph becomes INT8.

    `activations`: tensors that get a Q/DQ pair, in graph order; `groups`: those that share a scale;
    `reads`: the (node, input position) pairs that read the dequantized tensor; `float_ops`: what stays
    float and why.
    """

    weights: tuple[Weight, ...]
    activations: tuple[str, ...]
    groups: tuple[tuple[str, ...], ...]
    reads: frozenset[tuple[str, int]]
    float_ops: tuple[FloatOp, ...]


def plan(fp32: onnx.ModelProto, *, half: bool = False) -> Plan:
    """Decide what of an FP32 graph (uniquely named nodes) becomes INT8, by the rules above.

    `half`: for a graph that becomes float16 (halves.py), without rule 5: ONNX Runtime (1.31) makes its
    QLinearConcat of it, which takes no float16 scale. The Q/DQ behind the Concat says the same.
    """
    return Planner(fp32, half).plan()


@dataclass
class Planner:
    """Collects what is read as INT8, rule by rule; session_rules.py has others."""

    model: onnx.ModelProto
    half: bool = False
    reads: dict[tuple[str, int], str] = field(default_factory=dict)
    merged: list[set[str]] = field(default_factory=list)
    weights: list[Weight] = field(default_factory=list)
    thin: dict[str, str] = field(default_factory=dict)
    epilogue: set[str] = field(default_factory=set)
    pixels: set[str] = field(default_factory=set)
    behind_layers: set[str] = field(default_factory=set)
    before_layers: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self.arrays = fold.initializers(graph)
        self.producers = fold.producers(graph)
        self.consumers = fold.consumers(graph)
        self.depth = self._depths()
        self._find_ends()

    def plan(self) -> Plan:
        """All rules in their order."""
        nodes = self.model.graph.node
        for node in nodes:
            self._weighted(node)
        for node in nodes:
            self._residual(node)
        for node in reversed(nodes):
            self._pool(node)
            self._concat(node)
        for node in nodes:
            self._joins_epilogue(node)
        tensors = set(self.reads.values())
        order = [*(i.name for i in self.model.graph.input), *self.producers]
        groups = [sorted(group & tensors, key=order.index) for group in self.merged]
        return Plan(
            tuple(self.weights),
            tuple(name for name in order if name in tensors),
            tuple(tuple(group) for group in groups if len(group) > 1),
            frozenset(self.reads),
            tuple(self._float_ops()),
        )

    # Rule 1

    def _weighted(self, node: onnx.NodeProto) -> None:
        if node.op_type not in WEIGHTED or not self._is_weight(node):
            return
        shape = tuple(self.arrays[node.input[1]].dims)
        axis = output_axis(node, len(shape))
        reason = self._too_thin(node, shape)
        if reason:
            self.thin[node.name] = reason
            return
        self.weights.append(Weight(node.input[1], node.name, node.op_type, axis))
        self._read(node, 0)

    def _is_weight(self, node: onnx.NodeProto) -> bool:
        array = self.arrays.get(node.input[1])
        computed = node.input[0] not in self.arrays
        return computed and array is not None and array.data_type == onnx.TensorProto.FLOAT

    def _too_thin(self, node: onnx.NodeProto, shape: tuple[int, ...]) -> str:
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        inputs, outputs = _channels(node, shape, groups)
        if min(inputs, outputs) >= THIN or self._is_first(node) or self._is_last(node):
            return ""
        return f"thin: {inputs} -> {outputs} channels, below {THIN}"

    def _is_layer(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _RECURRENT or (node.op_type in WEIGHTED and self._is_weight(node))

    def _is_first(self, node: onnx.NodeProto) -> bool:
        return self.behind_layers.isdisjoint(node.input)

    def _is_last(self, node: onnx.NodeProto) -> bool:
        return self.before_layers.isdisjoint(node.output)

    def _find_ends(self) -> None:
        """Note which tensors are made of pixels alone, which are behind a layer, which are before one."""
        nodes = self.model.graph.node
        self.pixels.update(value.name for value in self.model.graph.input)
        for node in nodes:
            if self._is_layer(node) or not self._is_first(node):
                self.behind_layers.update(name for name in node.output if name)
            elif node.op_type not in ("Shape", "Size") and not self.pixels.isdisjoint(node.input):
                self.pixels.update(node.output)
        for node in reversed(nodes):
            if self._is_layer(node) or not self._is_last(node):
                self.before_layers.update(name for name in node.input if name)

    # Rule 2

    def _residual(self, node: onnx.NodeProto) -> None:
        if node.op_type != "Add" or any(name in self.arrays for name in node.input):
            return
        branches = [i for i in (0, 1) if self._ends_in_conv(node.input[i])]
        if not branches:
            return
        fused = max(branches, key=lambda i: (self.depth[node.input[i]], -i))
        self.epilogue.add(node.name)
        self._read(node, 1 - fused)

    def _ends_in_conv(self, name: str) -> bool:
        node = self.producers.get(name)
        alone = len(self.consumers.get(name, [])) == 1
        return (
            alone and node is not None and (node.name, 0) in self.reads and "Conv" in node.op_type
        )

    # Rules 3 to 5

    def _pool(self, node: onnx.NodeProto) -> None:
        if node.op_type not in AVERAGE | {"MaxPool"} or not self._is_int8_later(node.output[0]):
            return
        source = self.producers.get(self._origin(node.input[0]))
        friendly = source is not None and source.op_type in _INT8_FRIENDLY | AVERAGE
        if friendly or node.input[0] in self.reads.values():
            self._read(node, 0)
            if node.op_type == "MaxPool":
                self._share(node.input[0], *self._later(node.output[0]))

    def _concat(self, node: onnx.NodeProto) -> None:
        later = self._later(node.output[0])
        if node.op_type != "Concat" or not later or self.half:
            return
        if self._is_one(node) and len(set(node.input)) > 1:
            return
        for position, name in enumerate(node.input):
            if name not in self.arrays:
                self._read(node, position)
        self._share(*node.input, *later)

    def _is_one(self, node: onnx.NodeProto) -> bool:
        """Whether a Concat is of one tensor: a rotation of its pieces, or copies."""
        return len({self._origin(name) for name in node.input}) == 1

    def _later(self, name: str) -> list[str]:
        """The INT8 tensors that are this one, but for moves."""
        found = [name] if name in self.reads.values() else []
        for node, _ in self.consumers.get(name, []):
            if node.op_type in MOVES and (node.op_type != "Concat" or self._is_one(node)):
                for output in node.output:
                    found += self._later(output)
        return found

    def _is_int8_later(self, name: str) -> bool:
        return bool(self._later(name))

    def _origin(self, name: str) -> str:
        while name in self.producers and self.producers[name].op_type in MOVES - {"Concat"}:
            name = self.producers[name].input[0]
        return name

    # Rule 6

    def _joins_epilogue(self, node: onnx.NodeProto) -> None:
        source = self.producers.get(node.input[0]) if node.input else None
        if source is None:
            return
        after = (source.name, 0) in self.reads or source.name in self.epilogue
        bias = node.op_type == "Add" and any(name in self.arrays for name in node.input)
        if after and (node.op_type in EPILOGUE or (bias and source.op_type == "MatMul")):
            self.epilogue.add(node.name)

    def _float_ops(self) -> Iterator[FloatOp]:
        done = self._done()
        for node in self.model.graph.node:
            idle = node.op_type in MOVES | _INDEXING or self._origin(node.output[0]) in self._sizes
            if node.name not in done and not idle:
                yield FloatOp(node=node.name, op=node.op_type, reason=self._reason(node))

    def _done(self) -> set[str]:
        """Nodes that are part of an INT8 layer."""
        return {name for name, _ in self.reads} | self.epilogue

    def _reason(self, node: onnx.NodeProto) -> str:
        if node.name in self.thin:
            return self.thin[node.name]
        if node.op_type in _PREPROCESSING and node.output[0] in self.pixels:
            return "pixels are normalized in float"
        if node.op_type in ("Mul", "Add") and any(name in self.arrays for name in node.input):
            return "a constant factor or addend runs in the float epilogue of the layer before it"
        return _REASONS.get(node.op_type, "an elementwise operation between float tensors")

    @property
    def _sizes(self) -> set[str]:
        return {n.output[0] for n in self.model.graph.node if n.op_type in _INDEXING}

    def _read(self, node: onnx.NodeProto, position: int) -> None:
        self.reads[node.name, position] = node.input[position]

    def _share(self, *names: str) -> None:
        group = set(names)
        for other in [g for g in self.merged if g & group]:
            group |= other
            self.merged.remove(other)
        self.merged.append(group)

    def _depths(self) -> dict[str, int]:
        depth: dict[str, int] = {}
        for node in self.model.graph.node:
            longest = max((depth.get(name, 0) for name in node.input), default=0)
            depth.update((name, longest + 1) for name in node.output)
        return depth


def output_axis(node: onnx.NodeProto, ndim: int) -> int:
    """Axis of the output channels in the weight of a Conv, ConvTranspose, Gemm or MatMul."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return ndim - 1


def _channels(node: onnx.NodeProto, shape: tuple[int, ...], groups: int) -> tuple[int, int]:
    """Input and output channels of a weighted node, over all groups."""
    if node.op_type == "Conv":
        return shape[1] * groups, shape[0]
    if node.op_type == "ConvTranspose":
        return shape[0], shape[1] * groups
    axis = output_axis(node, len(shape))
    return shape[-1] if axis == 0 else shape[-2], shape[axis]
