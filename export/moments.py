"""Second moments E[x x^T] of what INT8 layers read: x is a patch of a convolution, or a row of a matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from resq_deploy.export import fold, rules
from resq_deploy.export.calibrate import Probe
from resq_deploy.export.grid import HasGrid

Images = NDArray[np.float32]

MOST_INPUTS = 8192  # of a layer: its matrix is the square of that
_ROWS = 16384  # patches that a matrix is averaged over
_COLUMNS = 1024  # of a matrix that are summed at once: its products take no second matrix
_PASS_BYTES = 384 * 2**20  # of matrices that one pass over the images fills


@dataclass(frozen=True, slots=True)
class Window:
    """How a 2-D convolution reads its input; `pads`: top, left, bottom, right."""

    kernel: tuple[int, ...]
    pads: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer with INT8 weights: its parameter, the tensor it reads, and how its weights are rows of inputs.

    `inputs`: weights of one output channel; `window`: None for a matrix product.
    """

    weight: str
    source: str
    axis: int
    groups: int
    inputs: int
    window: Window | None

    def rows(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """[groups, channels of a group, inputs]."""
        flat = np.moveaxis(weights, self.axis, 0).reshape(self.groups, -1, self.inputs)
        return np.ascontiguousarray(flat)

    def weights(self, rows: NDArray[np.int8], shape: Sequence[int]) -> NDArray[np.int8]:
        """The inverse of `rows`, for a weight of this shape."""
        turned = np.moveaxis(np.empty(shape, np.int8), self.axis, 0).shape
        return np.ascontiguousarray(np.moveaxis(rows.reshape(turned), 0, self.axis))


def layers(fp32: onnx.ModelProto, where: rules.Plan) -> list[Layer]:
    """The INT8 layers whose inputs can be written as rows: 2-D Conv, Gemm and MatMul of at most 8,192 inputs."""
    nodes = {node.name: node for node in fp32.graph.node}
    arrays, shapes = fold.initializers(fp32.graph), fold.shapes(fp32)
    found = []
    for weight in where.weights:
        node, dims = nodes[weight.node], tuple(arrays[weight.name].dims)
        layer = layer_of(node, weight.name, weight.axis, dims, len(shapes.get(node.input[0], ())))
        if layer is not None:
            found.append(layer)
    return found


def layer_of(
    node: onnx.NodeProto, weight: str, axis: int, dims: tuple[int, ...], rank: int
) -> Layer | None:
    """A node as a layer; `dims`: of its weight, `rank`: of what it reads. None for one without rows, or with wider."""
    given = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    inputs = int(np.prod(dims)) // dims[axis]
    if inputs > MOST_INPUTS:
        return None
    if node.op_type == "Conv" and len(dims) == 4 and given.get("auto_pad", b"NOTSET") == b"NOTSET":
        defaults = {"pads": (0, 0, 0, 0), "strides": (1, 1), "dilations": (1, 1)}
        window = Window(dims[2:], *(tuple(given.get(n, v)) for n, v in defaults.items()))
        return Layer(weight, node.input[0], axis, given.get("group", 1), inputs, window)
    product = node.op_type == "MatMul" or (node.op_type == "Gemm" and not given.get("transA", 0))
    if product and len(dims) == 2 and rank >= 2:
        return Layer(weight, node.input[0], axis, 1, inputs, None)
    return None


def second_moments(
    fp32: onnx.ModelProto,
    found: Sequence[Layer],
    ranges: Mapping[str, HasGrid],
    images: Images,
    seed: int = 0,
    threads: int | None = None,
) -> Iterator[tuple[Layer, Tensor]]:
    """(layer, E[x x^T] float32 [groups, inputs, inputs]), with x rounded to INT8 by `ranges` as deployed.

    Some thousand patches of all images are drawn; passes over the images bound memory, not the number of layers.
    """
    for part in _passes(found):
        means = _means(fp32, part, ranges, images, seed, threads)
        for layer in part:
            yield layer, means.pop(0)


def _means(
    fp32: onnx.ModelProto,
    part: Sequence[Layer],
    ranges: Mapping[str, HasGrid],
    images: Images,
    seed: int,
    threads: int | None,
) -> list[Tensor]:
    """E[x x^T] of some layers, in one pass over the images."""
    sums = [torch.zeros(layer.groups, layer.inputs, layer.inputs) for layer in part]
    counts = [0] * len(part)
    generator = torch.Generator().manual_seed(seed)
    probe = Probe(fp32, [layer.source for layer in part], threads)
    for size, values in probe.run(images):
        wanted = -(-_ROWS * size // len(images))
        for k, layer in enumerate(part):
            x = _rounded(values[layer.source], ranges.get(layer.source))
            rows = patches(layer, x, wanted, generator)
            for start in range(0, layer.inputs, _COLUMNS):
                block = slice(start, start + _COLUMNS)
                sums[k][:, :, block] += rows.transpose(1, 2) @ rows[:, :, block]
            counts[k] += rows.shape[1]
    return [total.div_(max(count, 1)) for total, count in zip(sums, counts, strict=True)]


def _passes(found: Sequence[Layer]) -> Iterator[list[Layer]]:
    part: list[Layer] = []
    held = 0
    for layer in found:
        size = 4 * layer.groups * layer.inputs**2
        if part and held + size > _PASS_BYTES:
            yield part
            part, held = [], 0
        part.append(layer)
        held += size
    if part:
        yield part


def _rounded(values: NDArray[np.float32], span: HasGrid | None) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(values))
    return x if span is None else span.grid.rounded(x)


def patches(layer: Layer, x: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """What the layer multiplies with one output channel's weights: [groups, rows, inputs], `most` random rows.

    `x`: [N, C, H, W] for a convolution, [..., inputs] for a matrix product.
    """
    window = layer.window
    if window is None:
        rows = x.reshape(1, -1, layer.inputs)
        return rows[:, _some(rows.shape[1], most, generator)]
    top, left, bottom, right = window.pads
    padded = F.pad(x, (left, right, top, bottom))
    columns = F.unfold(padded, window.kernel, window.dilations, 0, window.strides)
    each = min(columns.shape[2], max(1, most // len(x)))
    columns = columns[:, :, _some(columns.shape[2], each, generator)]
    split = columns.reshape(len(x), layer.groups, layer.inputs, each)
    return split.permute(1, 0, 3, 2).reshape(layer.groups, -1, layer.inputs)


def _some(count: int, most: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(count, generator=generator)[:most]
