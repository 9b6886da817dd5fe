"""Cross-layer equalization against bit flips: the same FP32 function, in weights that a flip moves less.

A channel of a tensor between two layers may be divided by r > 0 where it is made (weights and bias)
and multiplied by r where it is read; ReLU, pooling and residual sums let r through (Nagel et al.,
ICCV 2019, 1906.04721). With one INT8 scale per output channel, the layer that makes the tensor does
not notice: its scales absorb r. The layer that reads it does. A flip moves a weight by a power of two
times the scale of its channel, s_o = max_i |W_oi| r_i / 127, whatever the weight itself, so that the
expected noise power at its output is

    N(r) = K sum_o s_o^2 taps sum_i E[x_i^2] / r_i^2
           + 1/12 (max_i |x_i| / (127 r_i))^2 sum_oi |W_oi|^2 r_i^2

    K = 21,845 BER + 1/12:   the sum over bits b of 4^b, times BER, and what rounding costs

The first term is flipped and rounded weights, the second the activation's own rounding with its
single scale. N is minimized over log r per group of tied tensors, relative to the power of the
output, by gradient descent from r = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy.export import fold

FLIP_POWER = (4**8 - 1) // 3  # sum of 4^b over the 8 bits of a code: E[dq^2] = BER * FLIP_POWER
_THROUGH = frozenset(
    {"Relu", "LeakyRelu", "MaxPool", "AveragePool", "GlobalAveragePool", "Identity", "Dropout"}
)
_LAYERS = frozenset({"Conv", "Gemm"})
_STEPS = 200
_LIMIT = 3.0  # of |log r|


@dataclass(slots=True)
class Group:
    """Tensors whose channels are scaled together, the layers that make them and those that read them."""

    tensors: set[str] = field(default_factory=set)
    producers: list[onnx.NodeProto] = field(default_factory=list)
    consumers: list[onnx.NodeProto] = field(default_factory=list)


def groups(model: onnx.ModelProto) -> list[Group]:
    """Every group of tensors of an FP32 graph that can be scaled without changing its function."""
    finder = _Finder(model)
    for node in model.graph.node:
        finder.visit(node)
    return finder.groups()


class _Finder:
    def __init__(self, model: onnx.ModelProto) -> None:
        self.shapes = fold.shapes(model)
        self.arrays = fold.initializers(model.graph)
        self.parent: dict[str, str] = {}
        values = (*model.graph.input, *model.graph.output)
        self.fixed = {value.name for value in values}
        self.made: list[tuple[str, onnx.NodeProto]] = []
        self.read: list[tuple[str, onnx.NodeProto]] = []

    def visit(self, node: onnx.NodeProto) -> None:
        source, target = node.input[0], node.output[0]
        if node.op_type in _LAYERS and self._is_layer(node):
            self.read.append((source, node))
            self.made.append((target, node))
        elif node.op_type in _THROUGH or self._flattens(node):
            self._tie(source, target)
        elif node.op_type == "Add" and self._same(*node.input, target):
            self._tie(source, target)
            self._tie(node.input[1], target)
        else:
            self.fixed.update((*node.input, *node.output))

    def groups(self) -> list[Group]:
        found: dict[str, Group] = {}
        for name, node in self.made:
            group = found.setdefault(self._root(name), Group())
            group.producers.append(node)
            group.tensors.add(name)
        for name, node in self.read:
            group = found.setdefault(self._root(name), Group())
            group.consumers.append(node)
            group.tensors.add(name)
        fixed = {self._root(name) for name in self.fixed}
        for name in self.parent:
            if self._root(name) in found:
                found[self._root(name)].tensors.add(name)
        usable = (g for root, g in found.items() if root not in fixed)
        return [g for g in usable if g.producers and g.consumers]

    def _is_layer(self, node: onnx.NodeProto) -> bool:
        weight = self.arrays.get(node.input[1])
        bias = node.input[2] if len(node.input) > 2 else ""
        return weight is not None and (not bias or bias in self.arrays) and is_simple(node, weight)

    def _flattens(self, node: onnx.NodeProto) -> bool:
        """[N, C, H, W] -> [N, C * H * W]: channel c becomes H * W neighbours."""
        if node.op_type not in ("Flatten", "Reshape"):
            return False
        before, after = (self.shapes.get(n, ()) for n in (node.input[0], node.output[0]))
        sizes = [d or 0 for d in before[1:]]
        return len(before) == 4 and len(after) == 2 and after[1] == int(np.prod(sizes)) > 0

    def _same(self, *names: str) -> bool:
        shapes = [self.shapes.get(name, ()) for name in names]
        constant = any(name in self.arrays for name in names)
        return not constant and len(shapes[0]) == 4 and all(s == shapes[0] for s in shapes)

    def _root(self, name: str) -> str:
        while self.parent.setdefault(name, name) != name:
            name = self.parent[name]
        return name

    def _tie(self, a: str, b: str) -> None:
        self.parent[self._root(a)] = self._root(b)


def is_simple(node: onnx.NodeProto, weight: onnx.TensorProto) -> bool:
    """A plain or depthwise Conv, or a Gemm y = x B^T + c."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Gemm":
        ones = given.get("alpha", 1.0) == 1.0 == given.get("beta", 1.0)
        return ones and not given.get("transA", 0) and bool(given.get("transB", 0))
    return given.get("group", 1) == 1 or is_depthwise(node, weight.dims)


def is_depthwise(node: onnx.NodeProto, dims: Sequence[int]) -> bool:
    count = next((a.i for a in node.attribute if a.name == "group"), 1)
    return count > 1 and count == dims[0] and dims[1] == 1


def tensors(found: Iterable[Group]) -> list[str]:
    """The activations whose statistics `equalize` needs: what the groups' consumers read."""
    names = (node.input[0] for group in found for node in group.consumers)
    return list(dict.fromkeys(names))


def _zero() -> NDArray[np.float64]:
    return np.zeros(1)


@dataclass(slots=True)
class Moments:
    """Per channel of one activation: sum, sum of squares, extremes (0 among them), count; `add` sees a batch."""

    total: NDArray[np.float64] = field(default_factory=_zero)
    squares: NDArray[np.float64] = field(default_factory=_zero)
    low: NDArray[np.float64] = field(default_factory=_zero)
    high: NDArray[np.float64] = field(default_factory=_zero)
    count: int = 0

    def add(self, values: NDArray[np.float32]) -> None:
        """float32 [B, C, ...]."""
        flat = np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)
        self.total = self.total + flat.sum(axis=1, dtype=np.float64)
        self.squares = self.squares + np.square(flat, dtype=np.float64).sum(axis=1)
        self.low = np.minimum(self.low, flat.min(axis=1).astype(np.float64))
        self.high = np.maximum(self.high, flat.max(axis=1).astype(np.float64))
        self.count += flat.shape[1]

    def mean(self) -> NDArray[np.float64]:
        """E[x] of each channel."""
        return self.total / max(self.count, 1)

    def power(self) -> NDArray[np.float64]:
        """E[x^2] of each channel."""
        return self.squares / max(self.count, 1)


@dataclass(frozen=True, slots=True, eq=False)
class Reader:
    """One layer in numbers: |W|max and |W|^2 [O, C], and of its input E[x], E[x^2] and extremes [C]; kernel taps."""

    largest: torch.Tensor
    energy: torch.Tensor
    mean: torch.Tensor
    power: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    taps: int

    @classmethod
    def of(cls, node: onnx.NodeProto, weights: NDArray[Any], seen: Moments) -> Reader:
        """A Conv or Gemm that reads a tensor with these moments."""
        weight = weights.astype(np.float64)
        if is_depthwise(node, weight.shape):
            # Its own scales absorb r: no noise of weights that r could change.
            energy = np.square(weight).reshape(1, len(weight), -1).sum(axis=2)
            largest = np.zeros_like(energy)
        else:
            flat = weight.reshape(*weight.shape[:2], -1)
            largest, energy = np.abs(flat).max(axis=2), np.square(flat).sum(axis=2)
        tensor = torch.from_numpy
        inputs = tensor(seen.mean()), tensor(seen.power()), tensor(seen.low), tensor(seen.high)
        return cls(tensor(largest), tensor(energy), *inputs, int(np.prod(weight.shape[2:])))

    def noise(self, log_r: torch.Tensor, shift: torch.Tensor, flips: float) -> torch.Tensor:
        """N(r) of (x - shift) / r, relative to the power of the output; both [C], or [C / n] for n neighbours each."""
        each = len(self.power) // len(log_r)
        r, shift = (v.repeat_interleave(each) for v in (log_r.exp(), shift))
        scales = (self.largest * r).amax(dim=1) / 127
        power = self.power - 2 * shift * self.mean + shift.square()
        weights = flips * scales.square().sum() * self.taps * (power / r.square()).sum()
        peak = torch.maximum((self.high - shift).abs(), (self.low - shift).abs())
        step = (peak / r).amax() / 127
        rounding = step.square() / 12 * (self.energy * r.square()).sum()
        signal = (self.energy * self.power).sum()
        return (weights + rounding) / signal.clamp_min(1e-30)


def power_of_changes(ber: float) -> float:
    """K: E[dq^2] of a code by flips at this BER and by rounding."""
    return ber * FLIP_POWER + 1 / 12


def equalize(
    model: onnx.ModelProto, moments: Mapping[str, Moments], ber: float
) -> tuple[onnx.ModelProto, list[dict[str, Any]]]:
    """The same function in weights with the least expected noise at this BER, and what each group gained in dB.

    `moments`: of every tensor in `tensors(groups(model))`. Depthwise readers bring only their activation's rounding.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    arrays = {t.name: numpy_helper.to_array(t).copy() for t in copy.graph.initializer}
    record = []
    for group in groups(copy):
        readers = [
            Reader.of(node, arrays[node.input[1]], moments[node.input[0]])
            for node in group.consumers
        ]
        channels = len(arrays[group.producers[0].input[1]])
        made = {len(arrays[node.input[1]]) for node in group.producers}
        if made != {channels} or any(len(r.power) % channels for r in readers):
            continue
        r, _, gain = least_noise(readers, channels, power_of_changes(ber))
        if gain > 0.05:
            _apply(group, arrays, r)
            name = group.consumers[0].name or group.consumers[0].output[0]
            record.append({"into": name, "channels": channels, "gain_db": round(gain, 2)})
    for tensor in copy.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(arrays[tensor.name], tensor.name))
    return fold.compact(copy), record


def least_noise(
    readers: Sequence[Reader], channels: int, flips: float, *, shifts: bool = False
) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
    """r and shift [channels] with the least noise, and what they gain in dB; without `shifts`, those are 0.

    `flips`: K. A reader's input may have a multiple of the channels, as neighbours (flattening).
    """
    log_r, share = (torch.zeros(channels, dtype=torch.float64, requires_grad=True) for _ in "rc")
    low, high = (torch.stack([getattr(r, n)[:channels] for r in readers]) for n in ("low", "high"))
    span = (high.amax(0) - low.amin(0)) if shifts else torch.zeros(channels, dtype=torch.float64)
    optimizer = torch.optim.Adam([log_r, share], lr=0.05)
    best, start, least = (log_r.detach().clone(), share.detach().clone()), 0.0, float("inf")
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / _STEPS)
        optimizer.zero_grad()
        loss = torch.stack([r.noise(log_r, share * span, flips) for r in readers]).sum()
        value = float(loss.detach())
        start = start or value
        if not value > 0:  # what is read, or what reads it, is all 0: there is nothing to weigh
            return np.ones(channels), np.zeros(channels), 0.0
        if value < least:
            best, least = (log_r.detach().clone(), share.detach().clone()), value
        loss.log().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        with torch.no_grad():
            log_r.clamp_(-_LIMIT, _LIMIT)
    return best[0].exp().numpy(), (best[1] * span).numpy(), float(10 * np.log10(start / least))


def _apply(group: Group, arrays: dict[str, NDArray[Any]], r: NDArray[Any]) -> None:
    for node in group.producers:
        weight = arrays[node.input[1]]
        arrays[node.input[1]] = (weight.T / r).T.astype(np.float32)
        for bias in filter(None, node.input[2:]):
            arrays[bias] = (arrays[bias] / r).astype(np.float32)  # a Gemm's may be [1, M] too
    for node in group.consumers:
        arrays[node.input[1]] = stretched(node, arrays[node.input[1]], r)


def stretched(node: onnx.NodeProto, weight: NDArray[Any], r: NDArray[Any]) -> NDArray[np.float32]:
    """The weight of a Conv or Gemm whose input was divided by r, [channels]."""
    axis = 0 if is_depthwise(node, weight.shape) else 1
    trailing = [1] * (weight.ndim - 1 - axis)
    spread = np.repeat(r, weight.shape[axis] // len(r)).reshape(-1, *trailing)
    made: NDArray[np.float32] = (weight * spread).astype(np.float32)
    return made
