"""Which channels are neighbours: the same FP32 function, with channels in an order in which few pairs saturate.

Two weights of one sign that a kernel without VNNI adds up in 16 bits must share one weight's range (saturation.py), and
where many do, scales become wider for all. Which weights meet is the order of a layer's input channels, and that order
is free: the layers that make them write their outputs in any order, as long as all that is done to them goes along
(elementwise functions, sums and gates of two such tensors, depthwise convolutions, pools, flattening). So channels are
matched: neighbours become those with the least of

    c(i, j) = sum over all layers that read them, outputs o and places k of  max(0, |u_oik| + |u_ojk| - 1)^2,

over the k with one sign in both, u_o = W_o / max|W_o|. Greedy improvement: the partners of any two pairs are exchanged
as long as one of the three ways to match four channels is better than what is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.export import fold, graph
from resq_deploy.saturation import Pairs

_ALONG = frozenset(
    {
        *("Abs", "Clip", "Dropout", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish"),
        *("Identity", "LeakyRelu", "Mish", "Relu", "Selu", "Sigmoid", "Softplus", "Sqrt", "Tanh"),
    }
)  # elementwise: what they make of a channel stays that channel
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool"})
_TWO = frozenset({"Add", "Mul", "Sub", "Div"})
_COLUMNS = 4096  # weights of a channel that it is judged by, at most: every nth of those it has
_WORK = 2**31  # sums of two weights in one layer, at most: fewer weights of each of many channels
_SWEEPS = 50


@dataclass(slots=True)
class _Group:
    """Tensors with one order of channels: (initializer, axis, elements of a channel) that go along, and readers."""

    along: list[tuple[str, int, int]] = field(default_factory=list)
    readers: list[tuple[str, int, int]] = field(default_factory=list)


def paired(fp32: onnx.ModelProto, pairs: Mapping[str, Pairs]) -> onnx.ModelProto:
    """The same function (sums run in another order) with fewer pairs that share a range; `pairs`: by weight."""
    made = onnx.ModelProto()
    made.CopyFrom(fp32)
    if any(a.type in (a.GRAPH, a.GRAPHS) for node in made.graph.node for a in node.attribute):
        return made  # what is inside may read any tensor
    held = fold.initializers(made.graph)
    finder = _Finder(made)
    for node in made.graph.node:
        finder.visit(node)
    for group in finder.groups():
        costs = [
            _cost(numpy_helper.to_array(held[name]), axis)
            for name, axis, each in group.readers
            if each == 1 and name in pairs
        ]
        if not costs or len(costs[0]) % 2 or len(costs[0]) < 4:
            continue
        order = match(np.sum(costs, axis=0))
        for name, axis, each in group.along + group.readers:
            values = numpy_helper.to_array(held[name])
            spread = (order[:, None] * each + np.arange(each)).reshape(-1)
            held[name].CopyFrom(numpy_helper.from_array(values.take(spread, axis), name))
    return fold.compact(made if _same(fp32, made) else fp32)


def _same(fp32: onnx.ModelProto, made: onnx.ModelProto) -> bool:
    """Whether both answer alike: an order that something else depended on is not taken."""
    held = fold.initializers(fp32.graph)
    shape = next(v for v in fp32.graph.input if v.name not in held).type.tensor_type.shape
    images = graph.noise([d.dim_value for d in shape.dim[1:]])
    return graph.apart(*(graph.run(model, images) for model in (fp32, made))) <= graph.PARITY


def _cost(weight: NDArray[np.float32], axis: int) -> NDArray[np.float64]:
    """c(i, j) of one layer: [C, C]; `axis`: of its input channels, 0 or 1, the other is that of its outputs."""
    turned = np.moveaxis(weight, axis, 0).astype(np.float32)
    outputs = turned.reshape(*turned.shape[:2], -1)
    peak = np.maximum(np.abs(outputs).max(axis=(0, 2), keepdims=True), 1e-30)
    rows = (outputs / peak).reshape(len(outputs), -1)
    columns = min(_COLUMNS, max(_WORK // len(rows) ** 2, 1))
    step = -(-rows.shape[1] // columns)
    rows = np.ascontiguousarray(rows[:, ::step])
    cost = np.zeros((len(rows), len(rows)))
    for i, row in enumerate(rows[:-1]):
        rest = rows[i + 1 :]
        over = np.abs(row + rest) - 1  # of one sign: |a| + |b|; of two it is less than 1, and 0
        cost[i, i + 1 :] = np.square(over.clip(0)).sum(axis=1)
    return cost + cost.T


def match(cost: NDArray[np.float64]) -> NDArray[np.intp]:
    """An order of channels whose neighbours (0 and 1, 2 and 3, ...) cost little: [C], C even.

    `cost`: of making two channels neighbours, symmetric [C, C].
    """
    found = np.arange(len(cost)).reshape(-1, 2)
    for _ in range(_SWEEPS):
        if not sum(_exchanged(cost, found, p) for p in range(len(found))):
            break
    found = np.sort(found, axis=1)
    order: NDArray[np.intp] = found[np.argsort(found[:, 0])].reshape(-1)
    return order


def _exchanged(cost: NDArray[np.float64], found: NDArray[np.intp], p: int) -> bool:
    """Exchange partners of one pair and the other one that gains most; whether that gains anything."""
    (a, b), (c, d) = found[p], found.T
    now = cost[a, b] + cost[c, d]
    ways = np.stack([cost[a, c] + cost[b, d], cost[a, d] + cost[b, c]])
    gain = now - ways
    gain[:, p] = 0
    way, q = np.unravel_index(np.argmax(gain), gain.shape)
    if gain[way, q] <= 1e-9:
        return False
    left, right = found[q] if way == 0 else found[q][::-1]
    found[p], found[q] = (a, left), (b, right)
    return True


class _Finder:
    """Ties tensors whose channels must keep one order, and fixes those whose order something else depends on."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.shapes, self.held = fold.shapes(model), fold.initializers(model.graph)
        self.reads = fold.consumers(model.graph)
        self.parent: dict[str, str] = {}
        self.ends = {v.name for v in (*model.graph.input, *model.graph.output)}
        self.fixed = set(self.ends)
        self.axis: dict[str, int] = {}  # of the channels of a tensor
        self.each: dict[str, int] = {}  # elements of a channel on that axis
        self.along: list[tuple[str, str, int, int]] = []
        self.readers: list[tuple[str, str, int, int]] = []

    def visit(self, node: onnx.NodeProto) -> None:
        done = {
            "Conv": self._conv,
            "Gemm": self._product,
            "MatMul": self._product,
            "Flatten": self._flatten,
            "Reshape": self._flatten,
        }.get(node.op_type)
        if node.domain or len(node.output) != 1:
            known = False
        elif done is not None:
            known = done(node)
        elif node.op_type in _TWO:
            known = self._two(node)
        else:
            known = node.op_type in _ALONG or (node.op_type in _POOLS and self._images(node))
            if known:
                self._tie(node.input[0], node.output[0])
        if not known:
            self.fixed.update((*node.input, *node.output))

    def groups(self) -> list[_Group]:
        found: dict[str, _Group] = {}
        fixed = {self._root(name) for name in self.fixed}
        for tensor, name, axis, each in self.along:
            group = found.setdefault(self._root(tensor), _Group())
            group.along.append((name, axis, each))
        for tensor, name, axis, each in self.readers:
            group = found.setdefault(self._root(tensor), _Group())
            group.readers.append((name, axis, each))
        return [group for root, group in found.items() if root not in fixed]

    def _conv(self, node: onnx.NodeProto) -> bool:
        weight, groups = self.held.get(node.input[1]), _given(node).get("group", 1)
        if weight is None or not self._own(*node.input[1:]):
            return False
        source, target = node.input[0], node.output[0]
        if groups == 1:
            self._read(source, weight.name, 1, 1)
        elif weight.dims[1] == 1 and weight.dims[0] == groups and self._images(node):
            self._tie(source, target)
        else:
            return False
        self.axis[target] = 1
        self.along += [(target, name, 0, 1) for name in node.input[1:] if name]
        return True

    def _product(self, node: onnx.NodeProto) -> bool:
        weight, given = self.held.get(node.input[1]), _given(node)
        rank = len(self.shapes.get(node.input[0], ()))
        if weight is None or len(weight.dims) != 2 or given.get("transA", 0) or rank < 2:
            return False
        if not self._own(*node.input[1:]) or any(
            list(self.held[name].dims) != [weight.dims[self._out(given)]]
            for name in node.input[2:]
            if name
        ):
            return False
        out = self._out(given)
        self._read(node.input[0], weight.name, 1 - out, rank - 1)
        self.axis[node.output[0]] = rank - 1
        self.along.append((node.output[0], weight.name, out, 1))
        self.along += [(node.output[0], name, 0, 1) for name in node.input[2:] if name]
        return True

    @staticmethod
    def _out(given: Mapping[str, int]) -> int:
        return 0 if given.get("transB", 0) else 1

    def _read(self, source: str, weight: str, axis: int, channels: int) -> None:
        """A layer whose weight has its input channels on `axis` reads a tensor that should have them on `channels`."""
        if self.axis.get(source) != channels:
            self.fixed.add(source)
        self.readers.append((source, weight, axis, self.each.get(source, 1)))

    def _flatten(self, node: onnx.NodeProto) -> bool:
        """[N, C, H, W] -> [N, C * H * W]: channel c becomes H * W neighbours."""
        before, after = (self.shapes.get(name, ()) for name in (node.input[0], node.output[0]))
        sizes = [d or 0 for d in before[1:]]
        if len(before) < 3 or len(after) != 2 or not after[1] == int(np.prod(sizes)) > 0:
            return False
        if self.axis.get(node.input[0]) != 1:
            return False
        self._tie(node.input[0], node.output[0])
        self.each[node.output[0]] = int(np.prod(sizes[1:]))
        return True

    def _two(self, node: onnx.NodeProto) -> bool:
        constants = [name for name in node.input if name in self.held]
        tensors = [name for name in node.input if name not in self.held]
        target = node.output[0]
        if not tensors or any(name not in self.axis for name in tensors):
            return False
        axis, each = self.axis[tensors[0]], self.each.get(tensors[0], 1)
        ranks = {len(self.shapes.get(name, ())) for name in (*tensors, target)}
        widths = {self._width(name, axis) for name in (*tensors, target)}
        same = all(self.axis[n] == axis and self.each.get(n, 1) == each for n in tensors)
        if len(ranks) != 1 or len(widths) != 1 or None in widths or not same:
            return False
        for name in constants:
            dims = self.held[name].dims
            if np.prod(dims) > 1:
                place = axis - len(self.shapes[target]) + len(dims)
                if place < 0 or dims[place] != np.prod(dims) or not self._own(name):
                    return False
                self.along.append((target, name, place, each))
        for name in tensors:
            self._tie(name, target)
        return True

    def _width(self, name: str, axis: int) -> int | None:
        shape = self.shapes.get(name, ())
        return shape[axis] if axis < len(shape) else None

    def _images(self, node: onnx.NodeProto) -> bool:
        return self.axis.get(node.input[0]) == 1

    def _own(self, *names: str) -> bool:
        """Whether these are initializers that one node alone reads, once, and nobody outside."""
        known = [
            n in self.held and n not in self.ends and len(self.reads[n]) == 1 for n in names if n
        ]
        return all(known)

    def _tie(self, source: str, target: str) -> None:
        if source in self.axis:
            self.axis[target] = self.axis[source]
            self.each[target] = self.each.get(source, 1)
        else:
            self.fixed.add(source)
        self.parent[self._root(source)] = self._root(target)

    def _root(self, name: str) -> str:
        while self.parent.setdefault(name, name) != name:
            name = self.parent[name]
        return name


def _given(node: onnx.NodeProto) -> dict[str, int]:
    values: Sequence[onnx.AttributeProto] = node.attribute
    return {a.name: helper.get_attribute_value(a) for a in values}
