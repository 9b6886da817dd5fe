"""Resize and GridSample in torch: interpolation, axis by axis, with positions computed as ONNX Runtime does.

Positions and weights of the pixels that make an output pixel come in float32, in the order of operations of ONNX
Runtime's CPU kernels: half a last place decides which pixel is nearest.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from resq_deploy.export.twin_ops import Inputs, Node, Op, ints, unsupported

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

_HALF = np.float32(0.5)
_SHARED = {"linear": 1, "cubic": 2}  # mode -> pixels to either side that take part


def _resize(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    _check(node)
    scales = inputs[2] if len(inputs) > 2 else None
    sizes = ints(inputs[3] if len(inputs) > 3 else None)
    axes = [a % x.ndim for a in node.get("axes", range(x.ndim))]
    given = [] if scales is None else scales.detach().cpu().numpy().astype(np.float32).tolist()
    for i, axis in enumerate(axes):
        have = x.shape[axis]
        want = sizes[i] if sizes else int(np.floor(np.float32(given[i]) * np.float32(have)))
        scale = np.float32(want) / np.float32(have) if sizes else np.float32(given[i])
        if scale != 1 or want != have:
            x = _along(x, axis, *_taps(node, have, want, np.float32(scale)))
    return (x,)


def _check(node: Node) -> None:
    for name, allowed in (
        ("mode", {"nearest", "linear", "cubic"}),
        ("keep_aspect_ratio_policy", {"stretch"}),
    ):
        value = node.get(name)
        if value is not None and value not in allowed:
            raise unsupported(node, f"{name} {value}")


def _along(x: Tensor, axis: int, index: Indices, weight: Floats) -> Tensor:
    """Sum of the pixels index[:, k] of an axis, each times weight[:, k]."""
    shape = [-1 if i == axis else 1 for i in range(x.ndim)]
    out: Tensor | None = None
    for k in range(index.shape[1]):
        part = x.index_select(axis, torch.from_numpy(index[:, k].copy()).to(x.device))
        if not (weight[:, k] == 1).all():
            factor = torch.from_numpy(weight[:, k].copy()).to(x.device, x.dtype)
            part = part * factor.reshape(shape)
        out = part if out is None else out + part
    return x if out is None else out


def _taps(node: Node, have: int, want: int, scale: np.float32) -> tuple[Indices, Floats]:
    """For each of `want` pixels: which of `have` it is made of, [want, K], and how much of each."""
    position = _positions(node, have, want, scale)
    mode = node.get("mode", "nearest")
    if mode == "nearest":
        return _nearest(node, position, have)[:, None], np.ones((want, 1), np.float32)
    if node.get("antialias", 0):
        return _wide(node, position, have, scale)
    if mode == "linear":
        position = position.clip(0, have - 1)
    reach = _SHARED[mode]
    first = np.floor(position).astype(np.int64)
    index = first[:, None] + np.arange(1 - reach, 1 + reach)
    weight = _kernel(node, position[:, None] - index.astype(np.float32))
    return _inside(node, index, weight, have)


def _inside(node: Node, index: Indices, weight: Floats, have: int) -> tuple[Indices, Floats]:
    outside = (index < 0) | (index >= have)
    if node.get("exclude_outside", 0) and node.get("mode") == "cubic":
        weight = np.where(outside, np.float32(0), weight)
        weight = weight / weight.sum(1, keepdims=True)
    return index.clip(0, have - 1), weight.astype(np.float32)


def _wide(node: Node, position: Floats, have: int, scale: np.float32) -> tuple[Indices, Floats]:
    """Antialiased: the kernel is as wide as the input pixels that an output pixel covers."""
    shrunk = min(scale, np.float32(1))
    support = np.float32(_SHARED[node.get("mode")]) / shrunk
    center = position + _HALF
    low, high = (np.floor(center + s + _HALF).astype(np.int64) for s in (-support, support))
    if node.get("exclude_outside", 0):
        low, high = low.clip(0), high.clip(None, have)
    index = low[:, None] + np.arange(int((high - low).max()))
    weight = _kernel(node, (index.astype(np.float32) - center[:, None] + _HALF) * shrunk)
    weight = np.where(index < high[:, None], weight, np.float32(0))
    return index.clip(0, have - 1), (weight / weight.sum(1, keepdims=True)).astype(np.float32)


def _kernel(node: Node, distance: Floats) -> Floats:
    t = np.abs(distance)
    if node.get("mode") == "linear":
        return np.maximum(np.float32(1) - t, np.float32(0))
    a = np.float32(node.get("cubic_coeff_a", -0.75))
    near = ((a + 2) * t - (a + 3)) * t * t + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    zero = np.float32(0)
    return np.where(t <= 1, near, np.where(t < 2, far, zero)).astype(np.float32)


def _nearest(node: Node, position: Floats, have: int) -> Indices:
    how = node.get("nearest_mode", "round_prefer_floor")
    if how == "round_prefer_floor":
        found = np.ceil(position - _HALF)
    elif how == "round_prefer_ceil":
        found = np.floor(position + _HALF)
    else:
        found = np.floor(position) if how == "floor" else np.ceil(position)
    index: Indices = found.astype(np.int64).clip(0, have - 1)
    return index


def _positions(node: Node, have: int, want: int, scale: np.float32) -> Floats:
    """Where in the input each output pixel lies."""
    how = node.get("coordinate_transformation_mode", "half_pixel")
    out = np.arange(want, dtype=np.float32)
    if how == "asymmetric":
        return out / scale
    if how == "align_corners":
        return out * np.float32(have - 1) / np.float32(max(want - 1, 1))
    centered = (out + _HALF) / scale - _HALF
    if how == "half_pixel" or (how == "pytorch_half_pixel" and want > 1):
        return centered
    if how == "pytorch_half_pixel":
        return np.zeros_like(out)
    raise unsupported(node, f"coordinate_transformation_mode {how}")


def _grid_sample(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    mode = node.get("mode", "linear")
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    corners = bool(node.get("align_corners", 0))
    padding = node.get("padding_mode", "zeros")
    return (F.grid_sample(inputs[0], inputs[1], mode, padding, corners),)


RESIZE_OPS: Mapping[str, Op] = {"GridSample": _grid_sample, "Resize": _resize}
