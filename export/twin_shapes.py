"""ONNX operators in torch that move, cut and compare tensors without arithmetic on values: shapes, indices, masks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from resq_deploy.export.twin_ops import Inputs, Node, Op, ints, plain, unsupported

# TensorProto.DataType -> torch
DTYPES: Mapping[int, torch.dtype] = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    4: torch.uint16,
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
            inside = slice(picked.start, picked.stop, step)  # torch warns of bounds such as -2^63
            x = x[(slice(None),) * (axis % x.ndim) + (inside,)]
        else:
            x = x.index_select(axis, torch.tensor(list(picked), device=x.device))
    return (x,)


def _gather(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, index = inputs[0], inputs[1].long()
    axis = node.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    flat = x.index_select(axis, index.reshape(-1))
    return (flat.reshape((*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])),)


def _gather_elements(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, index = inputs[0], inputs[1].long()
    axis = node.get("axis", 0)
    index = torch.where(index < 0, index + x.shape[axis], index)
    return (x.gather(axis, index),)


def _gather_nd(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, index = inputs[0], inputs[1].long()
    shared = node.get("batch_dims", 0)
    rows = [
        torch.arange(size, device=x.device).reshape(-1, *[1] * (index.ndim - 2 - i))
        for i, size in enumerate(index.shape[:shared])
    ]
    return (x[(*rows, *index.unbind(-1))],)


def _pad(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    pads = ints(inputs[1])
    axes = ints(inputs[3] if len(inputs) > 3 else None) or list(range(x.ndim))
    both = {a % x.ndim: (pads[i], pads[i + len(axes)]) for i, a in enumerate(axes)}
    mode = node.get("mode", "constant")
    if mode == "constant":
        value = float(inputs[2]) if len(inputs) > 2 and inputs[2] is not None else 0.0
        flat = [p for axis in reversed(range(x.ndim)) for p in both.get(axis, (0, 0))]
        return (F.pad(x, flat, value=value),)
    for axis, (begin, end) in both.items():
        if begin or end:
            size = x.shape[axis]
            kept = np.arange(size)[max(-begin, 0) : size - max(-end, 0)]
            index = np.pad(kept, (max(begin, 0), max(end, 0)), mode)
            x = x.index_select(axis, torch.from_numpy(index).to(x.device))
    return (x,)


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


def _scatter_elements(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    if node.get("reduction", "none") != "none":
        raise unsupported(node, f"reduction {node.get('reduction')}")
    data, index, update = inputs
    axis = node.get("axis", 0)
    index = torch.where(index < 0, index + data.shape[axis], index).long()
    return (data.scatter(axis, index, update),)


def _cast(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    dtype = DTYPES.get(node.attributes["to"])
    if dtype is None:
        raise unsupported(node, f"data type {node.attributes['to']}")
    return (inputs[0].to(dtype),)


def _cast_like(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs[0].to(inputs[1].dtype),)


def _size(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (torch.tensor(inputs[0].numel(), dtype=torch.int64),)


def _depth_to_space(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, block = inputs[0], node.attributes["blocksize"]
    if node.get("mode", "DCR") == "DCR":
        batch, channels, height, width = x.shape
        parts = x.reshape(batch, block * block, channels // block**2, height, width)
        x = parts.transpose(1, 2).reshape(x.shape)
    return (F.pixel_shuffle(x, block),)


def _space_to_depth(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, block = inputs[0], node.attributes["blocksize"]
    batch, channels, height, width = x.shape
    parts = F.pixel_unshuffle(x, block).reshape(batch, channels, block * block, -1)
    return (parts.transpose(1, 2).reshape(batch, -1, height // block, width // block),)


def _cumulative_sum(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, axis = inputs[0], int(inputs[1])
    back = bool(node.get("reverse", 0))
    total = (x.flip(axis) if back else x).cumsum(axis)
    total = total.flip(axis) if back else total
    return (total - x if node.get("exclusive", 0) else total,)


def _arg(reduce: Callable[..., Tensor]) -> Op:
    def op(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
        if node.get("select_last_index", 0):
            raise unsupported(node, "select_last_index")
        keep = bool(node.get("keepdims", 1))
        return (reduce(inputs[0], dim=node.get("axis", 0), keepdim=keep),)

    return op


def _top_k(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    largest, ordered = bool(node.get("largest", 1)), bool(node.get("sorted", 1))
    return tuple(inputs[0].topk(ints(inputs[1])[0], node.get("axis", -1), largest, ordered))


def _triangle(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    diagonal = int(inputs[1]) if len(inputs) > 1 and inputs[1] is not None else 0
    return ((torch.triu if node.get("upper", 1) else torch.tril)(inputs[0], diagonal),)


def _where(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (torch.where(inputs[0], inputs[1], inputs[2]),)


def _identity(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (inputs[0],)


def _mod(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    function = torch.fmod if node.get("fmod", 0) else torch.remainder
    return (function(inputs[0], inputs[1]),)


SHAPE_OPS: Mapping[str, Op] = {
    "And": plain(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "Cast": _cast,
    "CastLike": _cast_like,
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "CumSum": _cumulative_sum,
    "DepthToSpace": _depth_to_space,
    "Dropout": _identity,
    "Equal": plain(torch.eq),
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Greater": plain(torch.gt),
    "GreaterOrEqual": plain(torch.ge),
    "Identity": _identity,
    "Less": plain(torch.lt),
    "LessOrEqual": plain(torch.le),
    "Mod": _mod,
    "Not": plain(torch.logical_not),
    "Or": plain(torch.logical_or),
    "Pad": _pad,
    "Range": _range,
    "Reshape": _reshape,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Shape": _shape,
    "Size": _size,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "TopK": _top_k,
    "Transpose": _transpose,
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
    "Where": _where,
    "Xor": plain(torch.logical_xor),
}
