"""The twin: a differentiable torch copy of model.int8.onnx, for gradients of the arithmetic that is deployed.

    twin = Twin(bundle.int8)
    logits = twin(images)                        # as unfused ONNX Runtime, straight-through where it rounds
    with twin.flipped(flips):                    # the same network with bits of its memory flipped
        logits = twin(images)
    shadows = twin.learnable(names)              # float shadows of codes, biases, scales: optimizer food
    twin.to_model()                              # the same graph with what they became

Forward repeats the graph node by node in float32, in the order and with the roundings of the ONNX definition, so codes
at every Q equal those of ONNX Runtime with optimizations off. Only sums inside Conv, Gemm, MatMul and means run in
another order: float32 sums of up to 2^24 / (127 * 128) = 1,032 products of codes would be exact as integers, but Q/DQ
graphs sum scaled values, which round in either runtime. Where such a sum lies within a last place of a rounding tie,
a code can differ by one step.

Backward is straight-through at Q/DQ (1308.3432), with gradient 0 where a code saturated.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from resq_deploy.errors import FaultError, ModelError
from resq_deploy.export import twin_ops
from resq_deploy.export.twin_ops import Node
from resq_deploy.export.twin_plan import DQ, FAKE, OPS, Q, Step, plan
from resq_deploy.export.twin_shapes import DTYPES
from resq_deploy.faults import Flips, TensorFlips, flip_bits
from resq_deploy.onnx_file import read_onnx
from resq_deploy.quantization import QMAX
from resq_deploy.saturation import Pairs, kept

_RANGES = {
    torch.int8: (-128, 127),
    torch.uint8: (0, 255),
    torch.int16: (-(2**15), 2**15 - 1),
    torch.uint16: (0, 2**16 - 1),
    torch.int32: (-(2**31), 2**31 - 1),
}


class Twin(nn.Module):
    """A QDQ INT8 graph as a torch module: float32 [B, C, H, W] in [0, 1] -> logits float32 [B, classes].

    `model`: a ModelProto or the path of one. Nothing in it requires a gradient until `learnable` is called, so
    gradients with respect to the input cost no more than they must. Raises ModelError for an operator that it
    does not know.
    """

    def __init__(self, model: onnx.ModelProto | str | os.PathLike[str]) -> None:
        super().__init__()
        self._model = model if isinstance(model, onnx.ModelProto) else read_onnx(model)
        graph = self._model.graph
        self._slots = {tensor.name: f"t{i}" for i, tensor in enumerate(graph.initializer)}
        for tensor in graph.initializer:
            value = np.array(numpy_helper.to_array(tensor))
            self.register_buffer(self._slots[tensor.name], torch.from_numpy(value))
        self._input = next(i.name for i in graph.input if i.name not in self._slots)
        self._output = graph.output[0].name
        self._plan = plan(graph, set(self._slots))
        self._flips: Flips | None = None
        self._override: dict[str, Tensor] = {}
        self._pairs: dict[str, Pairs] | None = (
            None  # of the codes as they were when they began to learn
        )
        self._cache: dict[str, tuple[tuple[tuple[Tensor, int], ...], tuple[Tensor, ...]]] = {}

    def forward(self, images: Tensor) -> Tensor:
        """Logits of pixels; differentiable with respect to them and to whatever is learnable."""
        return self.tensors(images, (self._output,))[self._output]

    def tensors(self, images: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
        """Any tensors of the graph by name; INT8 ones as codes in float32. Raises ModelError for an unknown name."""
        unknown = [n for n in names if n not in self._plan.known]
        if unknown:
            raise ModelError(f"the graph has no tensor {unknown[0]!r}")
        values: dict[str, Tensor] = {self._input: images}
        keep = {*names, *(self._plan.fused[n].outputs[0] for n in names if n in self._plan.fused)}
        for step in self._plan.steps:
            made = self._compute(step, values)
            values.update(zip(step.node.outputs, made, strict=False))
            for name in step.last:
                if name not in keep:
                    values.pop(name, None)
        return {name: self._tensor(name, values) for name in names}

    @property
    def parameters_by_initializer(self) -> dict[str, Tensor]:
        """Every initializer as the live tensor that forward reads: int8 codes, float32 scales and biases.

        Write with `tensor.copy_(...)` or an index; forward sees it. A learnable one is its float shadow instead.
        """
        live = {name: self._learned(name) for name in self._slots}
        return {n: self._buffer(n) if shadow is None else shadow for n, shadow in live.items()}

    def learnable(self, names: Iterable[str]) -> dict[str, nn.Parameter]:
        """Make these initializers learnable; name -> parameter (also in `parameters()`).

        Of INT8 codes it is a float32 shadow in code units, rounded half to even and clamped to [-127, 127] in forward,
        and to pairs that do not saturate where none does now (saturation.kept); straight-through in backward except
        where it would leave the range further. Biases and scales are themselves. Raises ModelError for an unknown name
        or an integer that is no code.
        """
        return {name: self._shadow(name) for name in names}

    def can_learn(self, name: str) -> bool:
        """Whether an initializer can be made learnable: INT8 codes and float32 values can."""
        return self._buffer(name).dtype in (torch.int8, torch.float32)

    @torch.no_grad()
    def settle(self) -> None:
        """After a step of an optimizer: shadows of codes that must fit in pairs move to the nearest that do."""
        for name, pairs in (self._pairs or {}).items():
            shadow = self._learned(name)
            if shadow is not None:
                held = shadow.clamp(-QMAX, QMAX).numpy()
                shadow.copy_(torch.from_numpy(pairs.nearest(held)))

    def freeze(self) -> None:
        """End learning: write what the shadows round to into the codes, and require no gradient any more."""
        with torch.no_grad():
            for name in self._slots:
                if self._learned(name) is not None:
                    self._buffer(name).copy_(self.codes(name))
                    self.register_parameter(_shadow_slot(self._slots[name]), None)

    def codes(self, name: str) -> Tensor:
        """An initializer as it would be written now: int8 codes of a shadow, else its value; without gradient."""
        buffer, shadow = self._buffer(name), self._learned(name)
        if shadow is None:
            return buffer.detach()
        if buffer.dtype.is_floating_point:
            return shadow.detach()
        codes = shadow.detach().round().clamp(-QMAX, QMAX).to(buffer.dtype)
        pairs = (self._pairs or {}).get(name)
        return codes if pairs is None else torch.from_numpy(pairs.fit(codes.numpy()))

    @contextmanager
    def flipped(self, flips: Flips) -> Iterator[Twin]:
        """The network with these bits of its memory flipped, inside the block; gradients pass the flips by.

        Of a learnable tensor, the bits of what it currently rounds to are flipped, forward uses the flipped value
        and backward gives its gradient to the shadow (RandBET, 2104.08323, section 3.3). Raises FaultError for an
        unknown tensor or element. Blocks do not nest.
        """
        if self._flips is not None:
            raise FaultError("flipped() blocks do not nest", "merge the flips into one")
        for name, part in flips.items():
            if name not in self._slots:
                raise FaultError(f"no tensor {name!r} in this graph")
            if part.elements[-1] >= self._buffer(name).numel():
                raise FaultError(f"{name} has no element {part.elements[-1]}")
        fixed = [name for name in flips if self._learned(name) is None]
        self._override = {name: _flip(self._buffer(name), flips[name]) for name in fixed}
        self._flips = flips
        try:
            yield self
        finally:
            self._flips, self._override = None, {}

    def to_model(self) -> onnx.ModelProto:
        """A copy of the graph with the current codes, biases and scales in it; nothing else changes."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for tensor in model.graph.initializer:
            value = self.codes(tensor.name).cpu().numpy()
            if not np.array_equal(value, numpy_helper.to_array(tensor)):
                tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        return model

    def _buffer(self, name: str) -> Tensor:
        if name not in self._slots:
            raise ModelError(f"the graph has no initializer {name!r}")
        found: Tensor = self.get_buffer(self._slots[name])
        return found

    def _learned(self, name: str) -> nn.Parameter | None:
        return self._parameters.get(_shadow_slot(self._slots[name]))

    def _shadow(self, name: str) -> nn.Parameter:
        buffer, shadow = self._buffer(name), self._learned(name)
        if not self.can_learn(name):
            raise ModelError(f"{name} is {buffer.dtype}, which cannot be learned")
        if shadow is None:
            if self._pairs is None:
                self._pairs = kept(self._model)
            shadow = nn.Parameter(buffer.detach().float().clone())
            self.register_parameter(_shadow_slot(self._slots[name]), shadow)
        return shadow

    def _value(self, name: str) -> Tensor:
        """An initializer as forward uses it: flipped, rounded from its shadow, or as it is."""
        shadow = self._learned(name)
        if shadow is None:
            return self._override[name] if name in self._override else self._buffer(name)
        value = self.codes(name)
        hit = self._flips is not None and name in self._flips
        if self._flips is not None and hit:
            value = _flip(value, self._flips[name])
        if not self._buffer(name).dtype.is_floating_point:
            return _apply(_Coded, shadow, value)
        return _apply(_Replaced, shadow, value) if hit else shadow

    def _compute(self, step: Step, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        if step.leaves is None or any(self._learned(n) is not None for n in step.leaves):
            return self._run(step.node, values)
        leaves = tuple(self._value(name) for name in step.leaves)
        key = tuple((leaf, leaf._version) for leaf in leaves)
        cached = self._cache.get(step.node.outputs[0])
        if cached and all(a is b and v == w for (a, v), (b, w) in zip(key, cached[0], strict=True)):
            return cached[1]
        with torch.no_grad():
            made = self._run(step.node, values)
        self._cache[step.node.outputs[0]] = (key, made)
        return made

    def _run(self, node: Node, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        given = [
            None if not n else values[n] if n in values else self._value(n) for n in node.inputs
        ]
        if node.op in (Q, DQ, FAKE):
            return (_quantization(node, given, self._code_range(node)),)
        return OPS[node.op](node, given)

    def _code_range(self, node: Node) -> tuple[int, int]:
        if node.op == DQ:
            return (0, 0)
        zero = node.inputs[2] if len(node.inputs) > 2 else ""
        dtype = self._buffer(zero).dtype if zero else DTYPES[node.get("output_dtype", 2) or 2]
        return _RANGES[dtype]

    def _tensor(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        if name in values:
            return values[name]
        if name in self._slots:
            return self._value(name)
        node = self._plan.fused[name]
        value = values[node.outputs[0]]
        scale, zero = _broadcast(node, value, self._value(node.inputs[1]), self._zero(node))
        code = (value / scale).round()
        return code if zero is None else code + zero

    def _zero(self, node: Node) -> Tensor | None:
        return self._value(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None


class _Replaced(torch.autograd.Function):
    """Another value in forward, the gradient as if nothing had happened."""

    @staticmethod
    def forward(ctx: Any, shadow: Tensor, value: Tensor) -> Tensor:
        return value.to(shadow.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], None


class _Coded(torch.autograd.Function):
    """Codes for a shadow; a gradient that would push a shadow further out of the range is dropped."""

    @staticmethod
    def forward(ctx: Any, shadow: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(shadow)
        return value.to(shadow.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (shadow,) = ctx.saved_tensors
        grad = grads[0]
        stuck = ((shadow > QMAX) & (grad < 0)) | ((shadow < -QMAX) & (grad > 0))
        return grad.masked_fill(stuck, 0.0), None


def _apply(function: type[torch.autograd.Function], *given: Tensor) -> Tensor:
    made: Tensor = function.apply(*given)
    return made


def _shadow_slot(slot: str) -> str:
    return f"shadow_{slot}"


def _quantization(node: Node, given: Sequence[Any], limits: tuple[int, int]) -> Tensor:
    x, scale = given[0], given[1]
    zero = given[2] if len(given) > 2 else None
    scale, zero = _broadcast(node, x, scale, zero)
    if node.op == DQ:
        return twin_ops.dequantize(x, scale, zero)
    if node.op == Q:
        return twin_ops.quantize(x, scale, zero, *limits)
    return twin_ops.fake_quantize(x, scale, zero, *limits)


def _broadcast(
    node: Node, x: Tensor, scale: Tensor, zero: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Per-channel scales and zero points in the shape that broadcasts along the node's axis."""
    if zero is not None:
        zero = zero.to(scale.dtype)
        zero = zero if bool(zero.any()) else None
    if scale.ndim == 0 or scale.numel() == 1:
        return scale.reshape(()), None if zero is None else zero.reshape(())
    shape = [1] * x.ndim
    shape[node.get("axis", 1)] = -1
    return scale.reshape(shape), None if zero is None else zero.reshape(shape)


def _flip(value: Tensor, flips: TensorFlips) -> Tensor:
    array = np.array(value.detach().cpu().numpy())
    flip_bits(array, flips)
    return torch.from_numpy(array).to(value.device)
