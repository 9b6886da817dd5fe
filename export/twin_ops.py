"""ONNX operators in torch: what all share, and quantize and dequantize, which are straight-through.

    twin_elementwise.py   each element for itself: activation functions, sums, products
    twin_layers.py        convolutions, products of matrices, pools, norms, reductions
    twin_resize.py        interpolation
    twin_shapes.py        what moves, cuts and compares tensors

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


def plain(function: Callable[..., Any]) -> Op:
    """An operator that is one torch function of the inputs, without attributes."""
    return lambda node, inputs: (function(*inputs),)
