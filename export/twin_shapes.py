"""ONNX operators in torch that move, cut and compare tensors without arithmetic on values: shapes, indices, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from resq_deploy.export.twin_ops import Inputs, Node, Op, ints, unsupported

# TensorProto.DataType -> torch
DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    5: torch.int16,
    6: torch.int32,
    7: torch.int64,
    9: torch.bool,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}


def _reshape(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    shape = ints(inputs[1])
    if not node.get("allowzero", 0):
        shape = [x.shape[i] if size == 0 else size for i, size in enumerate(shape)]
    return (x.reshape(shape),)


def _flatten(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    axis = node.get("axis", 1)
    rows = x.shape[:axis].numel() if axis else 1
    return (x.reshape(rows, -1),)


def _transpose(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    return (x.permute(node.get("perm", list(reversed(range(x.ndim))))),)


def _axes(node: Node, inputs: Inputs) -> list[int]:
    given = node.get("axes")
    return list(given) if given else ints(inputs[1] if len(inputs) > 1 else None)


def _squeeze(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    axes = _axes(node, inputs) or [i for i, size in enumerate(x.shape) if size == 1]
    return (x.squeeze(tuple(axes)),)


def _unsqueeze(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    axes = _axes(node, inputs)
    rank = x.ndim + len(axes)
    for axis in sorted(a % rank for a in axes):
        x = x.unsqueeze(axis)
    return (x,)


def _concat(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (torch.cat(list(inputs), dim=node.attributes["axis"]),)


def _split(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    axis = node.get("axis", 0)
    sizes = node.get("split") or ints(inputs[1] if len(inputs) > 1 else None)
    if not sizes:
        each = -(-x.shape[axis] // len(node.outputs))
        return tuple(torch.split(x, each, dim=axis))
    return tuple(torch.split(x, list(sizes), dim=axis))


def _slice(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    starts, ends = ints(inputs[1]), ints(inputs[2])
    axes = ints(inputs[3] if len(inputs) > 3 else None) or list(range(len(starts)))
    steps = ints(inputs[4] if len(inputs) > 4 else None) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        picked = range(x.shape[axis])[start:end:step]
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(start, end, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(picked), device=x.device))
    return (x,)


def _gather(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, index = inputs[0], inputs[1].long()
    axis = node.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    flat = x.index_select(axis, index.reshape(-1))
    return (flat.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :]),)


def _pad(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    if node.get("mode", "constant") not in ("constant", b"constant"):
        raise unsupported(node, f"mode {node.get('mode')}")
    x: Tensor = inputs[0]
    pads = ints(inputs[1])
    value = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else 0.0
    axes = ints(inputs[3] if len(inputs) > 3 else None) or list(range(x.ndim))
    both = {a % x.ndim: (pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)}
    flat = [p for axis in reversed(range(x.ndim)) for p in both.get(axis, (0, 0))]
    return (F.pad(x, flat, value=value),)


def _expand(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    wanted = ints(inputs[1])
    rank = max(len(wanted), x.ndim)
    have, want = [1] * (rank - x.ndim) + list(x.shape), [1] * (rank - len(wanted)) + wanted
    return (x.expand([h if w == 1 else w for h, w in zip(have, want, strict=True)]),)


def _tile(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs[0].tile(ints(inputs[1])),)


def _shape(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    shape = list(inputs[0].shape)[node.get("start", 0) : node.get("end")]
    return (torch.tensor(shape, dtype=torch.int64),)


def _constant_of_shape(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    value = node.get("value")
    fill = torch.zeros(1) if value is None else value
    return (fill.reshape(1).expand(ints(inputs[0])).clone(),)


def _constant(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    for name, dtype in (("value_int", torch.int64), ("value_float", torch.float32)):
        if name in node.attributes:
            return (torch.tensor(node.attributes[name], dtype=dtype),)
    for name, dtype in (("value_ints", torch.int64), ("value_floats", torch.float32)):
        if name in node.attributes:
            return (torch.tensor(list(node.attributes[name]), dtype=dtype),)
    value: Tensor = node.attributes["value"]
    return (value,)


def _range(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    start, limit, step = (v.item() for v in inputs)
    return (torch.arange(start, limit, step, dtype=inputs[0].dtype, device=inputs[0].device),)


def _scatter_nd(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    if node.get("reduction", "none") != "none":
        raise unsupported(node, f"reduction {node.get('reduction')}")
    data, index, update = inputs
    out = data.clone()
    out[tuple(index.long().unbind(-1))] = update
    return (out,)


def _cast(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    dtype = DTYPES.get(node.attributes["to"])
    if dtype is None:
        raise unsupported(node, f"data type {node.attributes['to']}")
    return (inputs[0].to(dtype),)


def _where(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (torch.where(inputs[0], inputs[1], inputs[2]),)


def _identity(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs[0],)


def _mod(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    function = torch.fmod if node.get("fmod", 0) else torch.remainder
    return (function(inputs[0], inputs[1]),)


def _plain(function: Callable[..., Any]) -> Op:
    return lambda node, inputs: (function(*inputs),)


SHAPE_OPS: Mapping[str, Op] = {
    "And": _plain(torch.logical_and),
    "Cast": _cast,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Dropout": _identity,
    "Equal": _plain(torch.eq),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Greater": _plain(torch.gt),
    "GreaterOrEqual": _plain(torch.ge),
    "Identity": _identity,
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "Mod": _mod,
    "Not": _plain(torch.logical_not),
    "Or": _plain(torch.logical_or),
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
}
