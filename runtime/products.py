"""Convolutions and matrix products of codes, as ONNX Runtime's integer operators."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy.runtime.forms import MS, Forms, Weight
from resq_deploy.runtime.graph import attributes, sane_scale

_SMALL_MAP = 16  # output pixels up to which im2col and one matrix product beat QLinearConv
_GATHER_CHANNELS = 128  # from so many bytes a pixel on, patches are best gathered pixel by pixel
_LANES = 4  # channels of an image that a QLinearConv needs to read it without im2col ...
_FILTERS = 16  # ... which pays from so many output channels on
_BIAS_LIMIT = 2.0**30  # an int32 bias plus any accumulator must not overflow


class Products(Forms):
    """What a layer with INT8 weights becomes."""

    def rank(self, name: str) -> int | None:
        """Number of dimensions of a tensor of the file."""
        return self.graph.rank(name)

    def bias(self, node: onnx.NodeProto, position: int) -> NDArray[np.float32] | None:
        """The float bias of a node, zeros where it has none; None where it is not constant."""
        if len(node.input) <= position or not node.input[position]:
            return np.zeros(1, np.float32)
        value = self.constant(node.input[position])
        fits = value is not None and value.dtype == np.float32 and value.ndim <= 1
        return value if fits else None

    def fits(self, x: str, w: Weight, axis: int) -> Weight | None:
        """The weight with its channels on this axis, where fused kernels may multiply the two: sane scales.

        One scale for the whole tensor fits any axis; the file names none then.
        """
        scale = self.graph.arrays[w.scale]
        usable = (scale.size == 1 or w.axis == axis) and self.sane(x) and sane_scale(scale)
        return replace(w, axis=axis) if usable else None

    def is_small(self, name: str) -> bool:
        pixels = self.graph.shapes.get(name, (None,) * 4)[2:]
        return None not in pixels and math.prod(p or 0 for p in pixels) <= _SMALL_MAP

    def bias_codes(self, x: str, w: Weight, bias: NDArray[np.float32]) -> NDArray[np.int32] | None:
        """The bias in units of the accumulator, s_x * s_w; None where INT32 cannot hold it."""
        arrays = self.graph.arrays
        unit = np.float64(arrays[self.quants[x].scale].reshape(-1)[0]) * self._scales(w)
        codes = np.rint(bias.astype(np.float64) / unit)
        fits = bool(np.all(np.abs(codes) <= _BIAS_LIMIT))  # False for NaN too
        return codes.astype(np.int32) if fits else None

    def _scales(self, w: Weight) -> NDArray[np.float32]:
        """One scale for each output channel."""
        scale, shape = self.graph.arrays[w.scale], self.graph.arrays[w.name].shape
        return np.broadcast_to(scale.reshape(-1), (shape[w.axis],)).astype(np.float32)

    def _weight_params(self, w: Weight) -> tuple[str, str]:
        """Names of a weight's scales and zero points, one for each output channel."""
        scales = self._scales(w)
        zeros = self.derived(f"{w.name}/{w.axis}/zeros", np.zeros(scales.size, np.int8))
        return self.derived(f"{w.name}/{w.scale}/{w.axis}", scales), zeros

    def qlinear_conv(
        self, node: onnx.NodeProto, w: Weight, bias: NDArray[np.int32], scale: str, zero: int
    ) -> tuple[str, bool]:
        scales, zeros = self._weight_params(w)
        codes = self.derived(f"{node.output[0]}/bias", bias)
        attrs = {k: v for k, v in attributes(node).items() if k != "auto_pad"}
        filters, channels = self.graph.arrays[w.name].shape[:2]
        if channels < _LANES and filters >= _FILTERS and attrs.get("group", 1) == 1:
            x, weights = self._widened(node.input[0], w)
        else:
            x, weights = self.operand(node.input[0], True), w.name
        ins = [*x, weights, scales, zeros, scale, self.const(zero, np.uint8), codes]
        return self.emit("QLinearConv", ins, MS, channels_last=1, **attrs), True

    def _widened(self, x: str, w: Weight) -> tuple[tuple[str, str, str], str]:
        """An image and a layer's weights with channels of zeros added: the same sums, faster."""
        codes, scale, zero = self.operand(x, False)
        shape = list(self.graph.arrays[w.name].shape)
        shape[1] = _LANES - shape[1]
        pads = self.const([0, 0, 0, 0, 0, shape[1], 0, 0], np.int64)
        wide = self.transposed(self.emit("Pad", [codes, pads, zero]), True)
        more = self.derived(f"{w.name}/lanes", np.zeros(shape, np.int8))
        return (wide, scale, zero), self.emit("Concat", [w.name, more], axis=1)

    def conv_to_float(self, node: onnx.NodeProto, w: Weight, bias: NDArray[np.float32]) -> None:
        self.begin(node.output[0])
        codes, *x = self.operand(node.input[0], True)
        columns = self._im2col(codes, x[1], node)
        flipped = self.emit("Transpose", [w.name], perm=[3, 2, 1, 0])
        shape = self.graph.arrays[w.name].shape
        size = self.const([-1, shape[0]], np.int64)
        matrix = self.emit("Reshape", [flipped, size])
        self.floats[node.output[0]] = {
            True: self.product(columns, matrix, x, w, bias, node.output[0])
        }

    def product(
        self, a: str, b: str, x: list[str], w: Weight, bias: NDArray[np.float32], out: str
    ) -> str:
        scales, zeros = self._weight_params(w)
        full = np.broadcast_to(bias, (self._scales(w).size,)).astype(np.float32)
        ins = [a, b, x[0], scales, x[1], zeros, self.derived(f"{out}/bias", full)]
        return self.emit("MatMulIntegerToFloat", ins, MS)

    def _im2col(self, codes: str, zero: str, node: onnx.NodeProto) -> str:
        """Patches as rows: [N, H', W', kw * kh * C], in the order of kw, kh, C."""
        attrs = attributes(node)
        kh, kw = self.graph.arrays[self.weights[node.input[1]].name].shape[2:]
        pads = attrs.get("pads", [0] * 4)
        strides, steps = attrs.get("strides", [1, 1]), attrs.get("dilations", [1, 1])
        if kh == kw == 1 and strides == [1, 1] and not any(pads):
            return codes
        shape, out = self.graph.shapes[node.input[0]], self.graph.shapes.get(node.output[0], ())
        known = all(shape[1:]) and len(out) == 4 and all(out[1:])
        if known and (shape[1] or 0) >= _GATHER_CHANNELS:
            window = (kh, kw, pads[:2], strides, steps)
            return self._gather(codes, zero, shape[1:], out[2:], window)
        if any(pads):
            wide = self.const([0, pads[0], pads[1], 0, 0, pads[2], pads[3], 0], np.int64)
            codes = self.emit("Pad", [codes, wide, zero])
        columns = self._taps(codes, 1, kh, strides[0], steps[0])
        if not known or kw == 1:
            return self._taps(columns, 2, kw, strides[1], steps[1])
        size = (shape[3] or 0) + pads[1] + pads[3], kh * (shape[1] or 0)
        return self._joined(columns, out[2:], size, (kw, strides[1], steps[1]))

    def _gather(self, codes: str, zero: str, shape: Any, out: Any, window: tuple[Any, ...]) -> str:
        """Patches by one Gather of pixels; a pixel outside the image is one more, of zeros."""
        channels, height, width = shape
        kh, kw, pads, strides, steps = window
        y = _places(out[0], kh, strides[0], steps[0], pads[0])[:, None, None, :]
        x = _places(out[1], kw, strides[1], steps[1], pads[1])[None, :, :, None]
        inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)
        index = np.where(inside, y * width + x, height * width).astype(np.int32).reshape(-1)
        key = "_".join(map(str, (*shape, *out, kh, kw, *pads, *strides, *steps)))
        rows = self.emit("Reshape", [codes, self.const([-1, height * width, channels], np.int64)])
        if not inside.all():
            rows = self.emit("Pad", [rows, self.const([0, 0, 0, 0, 1, 0], np.int64), zero])
        patches = self.emit("Gather", [rows, self.derived(f"pixels/{key}", index)], axis=1)
        return self.emit("Reshape", [patches, self.const([-1, *out, kw * kh * channels], np.int64)])

    def _taps(self, codes: str, axis: int, kernel: int, stride: int, step: int) -> str:
        """What the taps of a kernel see along one axis, side by side in the channels."""
        slices = []
        for tap in range(0, kernel * step, step):
            last = tap - (kernel - 1) * step
            parts = ([tap], [last or np.iinfo(np.int64).max], [axis], [stride])
            slices.append(self.emit("Slice", [codes, *(self.const(p, np.int64) for p in parts)]))
        return self.emit("Concat", slices, axis=3) if len(slices) > 1 else slices[0]

    def _joined(self, columns: str, out: Any, size: Any, taps: tuple[int, int, int]) -> str:
        """Patches of columns of pixels, `size` = (columns in a line, bytes in each), by one Gather."""
        kernel, stride, step = taps
        line = _places(out[1], kernel, stride, step, 0)
        index = (np.arange(out[0])[:, None, None] * size[0] + line).astype(np.int32).reshape(-1)
        key = "_".join(map(str, (*out, *size, *taps)))
        flat = self.const([-1, out[0] * size[0], size[1]], np.int64)
        rows = self.emit("Reshape", [columns, flat])
        patches = self.emit("Gather", [rows, self.derived(f"columns/{key}", index)], axis=1)
        return self.emit("Reshape", [patches, self.const([-1, *out, kernel * size[1]], np.int64)])


def _places(count: int, kernel: int, stride: int, step: int, pad: int) -> NDArray[np.int64]:
    """Along one axis: where each tap of the kernel looks, [count, kernel]."""
    place = np.arange(count)[:, None] * stride + np.arange(kernel)[None, :] * step - pad
    return place.astype(np.int64)
