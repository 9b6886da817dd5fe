"""Channel splitting: a layer reads k copies of its input, each with a kth of every weight, and a flip moves 1/k as far.

    w x = sum over k copies of (w / k) x

is the same function. Its scales are a kth, its weights k times as many: k times the flips, each a kth as far, so the
expected squared error at a bit error rate p falls from 21,845 p s^2 E[x^2] a weight to a kth of that, and the rare flip
of a high bit, which alone can wreck a first layer, becomes k small ones. (Zhao et al., ICML 2019, 1901.09504, split
channels for the sake of outliers.) The price is the layer's multiply-accumulates and bytes, times k; it is paid where
flips hurt most for it: in first layers, which are small and which everything after them reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from resq_deploy.export import fold, rules
from resq_deploy.export.work import ELEMENT, elements, multiplications, work_per_image

MOST = 16  # copies
_WORTH = 0.01  # of the divergence of all layers, that doubling the copies of one must save


@dataclass(frozen=True, slots=True)
class Split:
    """A graph of the same function: `copies` of its input by weight, `sources`: tensor of copies -> what it copies.

    `work`: the share of the network's work that it adds.
    """

    model: onnx.ModelProto
    copies: Mapping[str, int]
    sources: Mapping[str, str]
    work: float


def split(fp32: onnx.ModelProto, divergence: Mapping[str, float], budget: float) -> Split:
    """Split the layers of an FP32 graph where that saves most divergence (by weight, nats) for the work it adds.

    `budget`: the share of the network's work that may be added, 0 or more. Layers are Conv of one group, Gemm and
    MatMul whose weight nothing else reads.
    """
    nodes = _candidates(fp32, divergence)
    shapes, arrays = fold.shapes(fp32), fold.initializers(fp32.graph)
    work = work_per_image(fp32)
    costs = {
        name: Cost(
            multiplications(node, arrays[name], shapes), ELEMENT * elements(shapes, node.input[0])
        )
        for name, node in nodes.items()
    }
    given = {name: divergence[name] for name in nodes}
    copies = allocate(given, costs, budget * work, sum(divergence.values()))
    model, sources = _rewritten(fp32, {nodes[name].name: k for name, k in copies.items()})
    return Split(model, copies, sources, work_per_image(model) / work - 1)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a layer costs, and what one copy of its input does, in multiply-accumulates."""

    layer: float
    copy: float

    def of(self, copies: int) -> float:
        """What `copies` add, 2 or more."""
        return self.layer * (copies - 1) + self.copy * copies

    def doubling(self, copies: int) -> float:
        """Of 2k copies instead of k; the first two are both written, one alone is not."""
        return (self.layer + self.copy) * copies + (self.copy if copies == 1 else 0.0)


def allocate(
    divergence: Mapping[str, float], costs: Mapping[str, Cost], budget: float, total: float
) -> dict[str, int]:
    """Copies (a power of 2, 16 at most) of each layer that gets more than one: greedily, what saves most for its cost.

    Doubling k copies saves divergence / 2k; what saves less than a hundredth of `total` is left alone.
    """
    copies = dict.fromkeys(divergence, 1)
    while True:
        options = {}
        for name, k in copies.items():
            saved, cost = divergence[name] / (2 * k), costs[name].doubling(k)
            if k < MOST and cost <= budget and saved > _WORTH * total:
                options[name] = saved / cost
        if not options:
            return {name: k for name, k in copies.items() if k > 1}
        name = max(options, key=lambda n: options[n])
        budget -= costs[name].doubling(copies[name])
        copies[name] *= 2


def _candidates(
    fp32: onnx.ModelProto, divergence: Mapping[str, float]
) -> dict[str, onnx.NodeProto]:
    """Weight -> its node, of the layers that can be split."""
    readers, arrays = fold.consumers(fp32.graph), fold.initializers(fp32.graph)
    found = {}
    for node in fp32.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul") or node.input[1] not in divergence:
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        plain = given.get("group", 1) == 1 and not given.get("transA", 0)
        matrix = node.op_type == "Conv" or len(arrays[node.input[1]].dims) == 2
        if plain and matrix and len(readers[node.input[1]]) == 1:
            found[node.input[1]] = node
    return found


def _rewritten(
    fp32: onnx.ModelProto, copies: Mapping[str, int]
) -> tuple[onnx.ModelProto, dict[str, str]]:
    """The graph with these nodes split, and what each new tensor holds copies of."""
    model = onnx.ModelProto()
    model.CopyFrom(fp32)
    arrays = fold.initializers(model.graph)
    sources: dict[str, str] = {}
    nodes = []
    for node in model.graph.node:
        count = copies.get(node.name, 1)
        if count > 1:
            weight = arrays[node.input[1]]
            values, axis = numpy_helper.to_array(weight), _input_axis(node, len(weight.dims))
            parts = np.concatenate([values / np.float32(count)] * count, axis=axis)
            weight.CopyFrom(numpy_helper.from_array(parts, weight.name))
            source, where = node.input[0], 1 if node.op_type == "Conv" else -1
            name = f"{source}.x{count}" if where == 1 else f"{source}.last.x{count}"
            if name not in sources:
                nodes.append(
                    helper.make_node("Concat", [source] * count, [name], name=name, axis=where)
                )
                sources[name] = source
            node.input[0] = name
        nodes.append(node)
    fold.replace(model.graph.node, nodes)
    return fold.compact(model), sources


def _input_axis(node: onnx.NodeProto, ndim: int) -> int:
    """Axis of the input channels in the weight of a Conv, Gemm or MatMul."""
    if node.op_type == "Conv":
        return 1
    return 1 - rules.output_axis(node, ndim) if node.op_type == "Gemm" else ndim - 2
