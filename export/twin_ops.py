"""ONNX operators in torch, by name: what the twin computes with. Quantize and dequantize are straight-through.

An operator takes the node and its inputs (None where an optional one is left out), and returns its outputs as a tuple.
Float operators follow the ONNX definition with the order of operations that ONNX Runtime's CPU kernels have; sums
inside a kernel may run in another order, which moves a result by a last place.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resq_deploy.errors import ModelError

Inputs = Sequence[Any]  # Tensor, or None for an optional input that is absent
Op = Callable[["Node", Inputs], tuple[Tensor, ...]]


@dataclass(frozen=True, slots=True)
class Node:
    """One ONNX node: operator, names of tensors in and out, attributes as Python values."""

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or the default that ONNX gives it."""
        return self.attributes.get(name, default)


class RoundSte(torch.autograd.Function):
    """Round half to even; gradient 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Any float tensor -> the same shape."""
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Straight through."""
        return grads[0]


class FakeQuantize(torch.autograd.Function):
    """Q then DQ in one step: (clamp(round(x / s) + z) - z) * s.

    Gradient 1 inside the range and 0 where the code saturated (the clipped straight-through
    estimator of PACT, 1805.06085).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: float, low: int, high: int) -> Tensor:
        """Float x, positive scale that broadcasts against it."""
        code = x / scale
        code.round_()
        if zero:
            code.add_(zero)
        ctx.save_for_backward(code)
        ctx.range = (low - 0.5, high + 0.5)
        kept = code.clamp(low, high)
        if zero:
            kept.sub_(zero)
        return kept.mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Straight through where the code did not saturate."""
        (code,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], code, *ctx.range), None, None, None, None


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """Q then DQ. Learnable scales take the composite way, whose gradient is LSQ's (1902.08153, eq. 3)."""
    if scale.requires_grad:
        return dequantize(quantize(x, scale, zero, low, high), scale, zero)
    if zero is not None and zero.numel() > 1:
        return dequantize(quantize(x, scale, zero, low, high), scale, zero)
    shift = 0.0 if zero is None else float(zero)
    made: Tensor = FakeQuantize.apply(x, scale, shift, low, high)
    return made


def quantize(x: Tensor, scale: Tensor, zero: Tensor | None, low: int, high: int) -> Tensor:
    """Float to codes, kept as float32 (an INT8 code is exact in it); rounds half to even, saturates."""
    code: Tensor = RoundSte.apply(x / scale)
    if zero is not None:
        code = code + zero
    return code.clamp(low, high)


def dequantize(code: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
    """Codes to float32: (code - zero point) * scale."""
    value = code.to(scale.dtype)
    if zero is not None:
        value = value - zero
    return value * scale


def unsupported(node: Node, detail: str = "") -> ModelError:
    """The error for a node that the twin cannot compute."""
    what = f"{node.op}{' with ' + detail if detail else ''} (node {node.name!r})"
    return ModelError(
        f"the differentiable copy does not support {what}",
        "attack this network with square or hopskipjump, which need no gradient",
    )


def ints(value: Tensor | None) -> list[int]:
    """A shape-like input as Python integers."""
    return [] if value is None else [int(v) for v in value.reshape(-1).tolist()]


def _conv(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    spatial = weight.ndim - 2
    if spatial not in (1, 2):
        raise unsupported(node, f"{spatial} spatial dimensions")
    dilations = node.get("dilations", [1] * spatial)
    strides = node.get("strides", [1] * spatial)
    kernel = [(k - 1) * d + 1 for k, d in zip(weight.shape[2:], dilations, strict=True)]
    x, padding = _pad_image(node, x, kernel, strides, 0.0)
    conv = F.conv2d if spatial == 2 else F.conv1d
    return (conv(x, weight, bias, strides, padding, dilations, node.get("group", 1)),)


def _pad_image(
    node: Node, x: Tensor, kernel: Sequence[int], strides: Sequence[int], value: float
) -> tuple[Tensor, list[int]]:
    """Asymmetric padding is made here; symmetric padding is left to the kernel, which does it for nothing."""
    count = len(kernel)
    pads = node.get("pads", [0] * (2 * count))
    auto = node.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same(x.shape[-count:], kernel, strides, upper=auto == "SAME_UPPER")
    elif auto == "VALID":
        pads = [0] * (2 * count)
    begin, end = pads[:count], pads[count:]
    if begin == end:
        return x, list(begin)
    flat = [p for pair in reversed(list(zip(begin, end, strict=True))) for p in pair]
    return F.pad(x, flat, value=value), [0] * count


def _same(
    sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], *, upper: bool
) -> list[int]:
    small, large = [], []
    for size, width, stride in zip(sizes, kernel, strides, strict=True):
        total = max((-(-size // stride) - 1) * stride + width - size, 0)
        small.append(total // 2)
        large.append(total - total // 2)
    return small + large if upper else large + small


def _gemm(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    a, b = inputs[0], inputs[1]
    a = a.t() if node.get("transA", 0) else a
    b = b if node.get("transB", 0) else b.t()
    out = F.linear(a, b) * node.get("alpha", 1.0) if node.get("alpha", 1.0) != 1.0 else None
    c = inputs[2] if len(inputs) > 2 else None
    if out is None:
        if c is not None and c.ndim == 1 and node.get("beta", 1.0) == 1.0:
            return (F.linear(a, b, c),)
        out = F.linear(a, b)
    return (out if c is None else out + c * node.get("beta", 1.0),)


def _max_pool(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    kernel = node.attributes["kernel_shape"]
    strides = node.get("strides", [1] * len(kernel))
    dilations = node.get("dilations", [1] * len(kernel))
    wide = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    x, padding = _pad_image(node, inputs[0], wide, strides, float("-inf"))
    ceil = bool(node.get("ceil_mode", 0))
    return (F.max_pool2d(x, kernel, strides, padding, dilations, ceil),)


def _average_pool(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    kernel = node.attributes["kernel_shape"]
    strides = node.get("strides", [1] * len(kernel))
    whole = bool(node.get("count_include_pad", 0))
    x, padding = _pad_image(node, inputs[0], kernel, strides, 0.0)
    if x is not inputs[0] and not whole:
        raise unsupported(node, "asymmetric padding")
    ceil = bool(node.get("ceil_mode", 0))
    return (F.avg_pool2d(x, kernel, strides, padding, ceil, whole),)


def _global(reduce: Callable[..., Tensor]) -> Op:
    def op(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
        x: Tensor = inputs[0]
        return (reduce(x, dim=tuple(range(2, x.ndim)), keepdim=True),)

    return op


def _reduce(reduce: Callable[..., Tensor]) -> Op:
    def op(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
        x: Tensor = inputs[0]
        axes = node.get("axes") or ints(inputs[1] if len(inputs) > 1 else None)
        if not axes and node.get("noop_with_empty_axes", 0):
            return (x,)
        dims = tuple(axes) or tuple(range(x.ndim))
        return (reduce(x, dim=dims, keepdim=bool(node.get("keepdims", 1))),)

    return op


def _softmax(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (torch.softmax(inputs[0], dim=node.get("axis", -1)),)


def _layer_norm(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    if len(node.outputs) > 1:
        raise unsupported(node, "more than one output")
    x: Tensor = inputs[0]
    shape = x.shape[node.get("axis", -1) :]
    bias = inputs[2] if len(inputs) > 2 else None
    return (F.layer_norm(x, shape, inputs[1], bias, node.get("epsilon", 1e-5)),)


def _batch_norm(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, scale, bias, mean, variance = inputs[:5]
    return (F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5)),)


def _gelu(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (F.gelu(inputs[0], approximate=node.get("approximate", "none")),)


def _clip(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    low = inputs[1] if len(inputs) > 1 else node.get("min")
    high = inputs[2] if len(inputs) > 2 else node.get("max")
    return (inputs[0] if low is None and high is None else torch.clamp(inputs[0], low, high),)


def _hard_sigmoid(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0] * node.get("alpha", 0.2) + node.get("beta", 0.5)
    return (x.clamp(0, 1),)


def _leaky_relu(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (F.leaky_relu(inputs[0], node.get("alpha", 0.01)),)


def _div(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    a, b = inputs
    exact = a.is_floating_point()
    return (torch.div(a, b) if exact else torch.div(a, b, rounding_mode="trunc"),)


def _plain(function: Callable[..., Tensor]) -> Op:
    """An operator that is one torch function of the inputs, without attributes."""
    return lambda node, inputs: (function(*inputs),)


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    def op(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
        value: Tensor = inputs[0]
        for other in inputs[1:]:
            value = function(value, other)
        return (value,)

    return op


FLOAT_OPS: Mapping[str, Op] = {
    "Abs": _plain(torch.abs),
    "Add": _plain(torch.add),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Clip": _clip,
    "Conv": _conv,
    "Div": _div,
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Gelu": _gelu,
    "Gemm": _gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _plain(F.hardswish),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": _leaky_relu,
    "Log": _plain(torch.log),
    "MatMul": _plain(torch.matmul),
    "Max": _fold(torch.maximum),
    "MaxPool": _max_pool,
    "Min": _fold(torch.minimum),
    "Mul": _plain(torch.mul),
    "Neg": _plain(torch.neg),
    "Pow": _plain(torch.pow),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceSum": _reduce(torch.sum),
    "Relu": _plain(torch.relu),
    "Sigmoid": _plain(torch.sigmoid),
    "Softmax": _softmax,
    "Sqrt": _plain(torch.sqrt),
    "Sub": _plain(torch.sub),
    "Tanh": _plain(torch.tanh),
}
