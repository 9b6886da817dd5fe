"""ONNX operators in torch that take each element for itself: activation functions, sums, products."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from resq_deploy.export.twin_ops import Inputs, Node, Op, plain


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


def _prelu(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, slope = inputs
    return (torch.where(x < 0, x * slope, x),)


def _elu(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (F.elu(inputs[0], node.get("alpha", 1.0)),)


def _selu(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    alpha = node.get("alpha", 1.67326319217681884765625)
    return (F.elu(inputs[0], alpha) * node.get("gamma", 1.05070102214813232421875),)


def _celu(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (F.celu(inputs[0], node.get("alpha", 1.0)),)


def _thresholded_relu(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (F.threshold(inputs[0], node.get("alpha", 1.0), 0.0),)


def _shrink(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    limit, bias = node.get("lambd", 0.5), node.get("bias", 0.0)
    outside = torch.where(x < 0, x + bias, x - bias)
    return (outside.masked_fill(x.abs() <= limit, 0.0),)


def _div(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    a, b = inputs
    exact = a.is_floating_point()
    return (torch.div(a, b) if exact else torch.div(a, b, rounding_mode="trunc"),)


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Op:
    def op(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
        value: Tensor = inputs[0]
        for other in inputs[1:]:
            value = function(value, other)
        return (value,)

    return op


def _mean(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    (total,) = _fold(torch.add)(node, inputs)
    return (total / len(inputs),)


ELEMENTWISE_OPS: Mapping[str, Op] = {
    "Abs": plain(torch.abs),
    "Acos": plain(torch.acos),
    "Acosh": plain(torch.acosh),
    "Add": plain(torch.add),
    "Asin": plain(torch.asin),
    "Asinh": plain(torch.asinh),
    "Atan": plain(torch.atan),
    "Atanh": plain(torch.atanh),
    "Ceil": plain(torch.ceil),
    "Celu": _celu,
    "Clip": _clip,
    "Cos": plain(torch.cos),
    "Cosh": plain(torch.cosh),
    "Div": _div,
    "Elu": _elu,
    "Erf": plain(torch.erf),
    "Exp": plain(torch.exp),
    "Floor": plain(torch.floor),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": plain(F.hardswish),
    "LeakyRelu": _leaky_relu,
    "Log": plain(torch.log),
    "Max": _fold(torch.maximum),
    "Mean": _mean,
    "Min": _fold(torch.minimum),
    "Mish": plain(F.mish),
    "Mul": plain(torch.mul),
    "Neg": plain(torch.neg),
    "PRelu": _prelu,
    "Pow": plain(torch.pow),
    "Reciprocal": plain(torch.reciprocal),
    "Relu": plain(torch.relu),
    "Round": plain(torch.round),
    "Selu": _selu,
    "Shrink": _shrink,
    "Sigmoid": plain(torch.sigmoid),
    "Sign": plain(torch.sign),
    "Sin": plain(torch.sin),
    "Sinh": plain(torch.sinh),
    "Softplus": plain(F.softplus),
    "Softsign": plain(F.softsign),
    "Sqrt": plain(torch.sqrt),
    "Sub": plain(torch.sub),
    "Sum": _fold(torch.add),
    "Tan": plain(torch.tan),
    "Tanh": plain(torch.tanh),
    "ThresholdedRelu": _thresholded_relu,
}
