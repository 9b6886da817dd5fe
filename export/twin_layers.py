"""ONNX operators in torch that mix elements: convolutions, products of matrices, pools, norms, reductions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from resq_deploy.export.twin_ops import Inputs, Node, Op, ints, plain, unsupported

_CONV = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOL = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


def _conv(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, weight = inputs[0], inputs[1]
    bias = inputs[2] if len(inputs) > 2 else None
    spatial = weight.ndim - 2
    dilations = node.get("dilations", [1] * spatial)
    strides = node.get("strides", [1] * spatial)
    kernel = _reach(weight.shape[2:], dilations)
    x, padding = _pad_image(node, x, kernel, strides, 0.0)
    conv = _of_rank(_CONV, spatial, node)
    return (conv(x, weight, bias, strides, padding, dilations, node.get("group", 1)),)


def _conv_transpose(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """The whole of it, then cut: what padding takes away and output_padding adds may differ from side to side."""
    x, weight = inputs[0], inputs[1]
    spatial = weight.ndim - 2
    dilations = node.get("dilations", [1] * spatial)
    strides = node.get("strides", [1] * spatial)
    extra = node.get("output_padding", [0] * spatial)
    kernel = _reach(weight.shape[2:], dilations)
    begin, end = _transposed_pads(node, x.shape[2:], kernel, strides, extra)
    conv = _of_rank(_TRANSPOSED, spatial, node)
    whole = conv(x, weight, None, strides, 0, 0, node.get("group", 1), dilations)
    sides = list(zip(begin, end, extra, strict=True))
    out = F.pad(whole, [p for b, e, more in reversed(sides) for p in (-b, more - e)])
    bias = inputs[2] if len(inputs) > 2 else None
    return (out if bias is None else out + bias.reshape(-1, *[1] * spatial),)


def _transposed_pads(
    node: Node,
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    extra: Sequence[int],
) -> tuple[list[int], list[int]]:
    auto, shape = node.get("auto_pad", "NOTSET"), node.get("output_shape")
    if shape is None and auto in ("NOTSET", "VALID"):
        none = [0] * (2 * len(kernel))
        pads = list(node.get("pads", none)) if auto == "NOTSET" else none
        return pads[: len(kernel)], pads[len(kernel) :]
    wanted = shape or [size * stride for size, stride in zip(sizes, strides, strict=True)]
    begin, end = [], []
    for size, stride, width, more, out in zip(
        sizes, strides, kernel, extra, wanted[-len(kernel) :], strict=True
    ):
        total = stride * (size - 1) + more + width - out
        cut, lacking = max(total, 0), min(total, 0)  # what is wanted and not there is 0, at the end
        small, large = cut // 2, cut - cut // 2
        begin.append(small if auto == "SAME_UPPER" else large)
        end.append((large if auto == "SAME_UPPER" else small) + lacking)
    return begin, end


def _reach(kernel: Sequence[int], dilations: Sequence[int]) -> list[int]:
    return [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]


def _of_rank(
    functions: Sequence[Callable[..., Tensor]], spatial: int, node: Node
) -> Callable[..., Tensor]:
    if not 1 <= spatial <= len(functions):
        raise unsupported(node, f"{spatial} spatial dimensions")
    return functions[spatial - 1]


def _pad_image(
    node: Node, x: Tensor, kernel: Sequence[int], strides: Sequence[int], value: float
) -> tuple[Tensor, list[int]]:
    """Asymmetric padding is made here; symmetric padding is left to the kernel, which does it for nothing.

    Torch's pools refuse padding of more than half a window: that is made here too.
    """
    count = len(kernel)
    pads = node.get("pads", [0] * (2 * count))
    auto = node.get("auto_pad", "NOTSET")
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = _same(x.shape[-count:], kernel, strides, upper=auto == "SAME_UPPER")
    elif auto == "VALID":
        pads = [0] * (2 * count)
    begin, end = pads[:count], pads[count:]
    windows = node.attributes["kernel_shape"] if node.op.endswith("Pool") else ()
    if begin == end and all(2 * p <= width for p, width in zip(begin, windows, strict=False)):
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


def _einsum(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (torch.einsum(node.attributes["equation"].replace(" ", ""), *inputs),)


def _max_pool(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    kernel = node.attributes["kernel_shape"]
    strides = node.get("strides", [1] * len(kernel))
    dilations = node.get("dilations", [1] * len(kernel))
    x, padding = _pad_image(node, inputs[0], _reach(kernel, dilations), strides, float("-inf"))
    pool = _of_rank(_MAX_POOL, len(kernel), node)
    made = pool(x, kernel, strides, padding, dilations, bool(node.get("ceil_mode", 0)))
    return (_inside(node, made, inputs[0], _reach(kernel, dilations), strides),)


def _average_pool(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    kernel = node.attributes["kernel_shape"]
    strides = node.get("strides", [1] * len(kernel))
    if set(node.get("dilations", [1])) != {1}:
        raise unsupported(node, "dilations")
    ceil, whole = bool(node.get("ceil_mode", 0)), bool(node.get("count_include_pad", 0))
    pool = _of_rank(_AVERAGE_POOL, len(kernel), node)
    x, padding = _pad_image(node, inputs[0], kernel, strides, 0.0)
    made = pool(x, kernel, strides, padding, ceil, whole)
    if x is not inputs[0] and not whole:
        ones, _ = _pad_image(node, torch.ones_like(inputs[0]), kernel, strides, 0.0)
        made = made / pool(ones, kernel, strides, padding, ceil, whole)
    return (_inside(node, made, inputs[0], kernel, strides),)


def _inside(
    node: Node, made: Tensor, x: Tensor, kernel: Sequence[int], strides: Sequence[int]
) -> Tensor:
    """What a pool made, without windows that begin behind the image: torch does not know padding made before it."""
    pads = node.get("pads")
    if not node.get("ceil_mode", 0) or pads is None:
        return made
    count = len(kernel)
    for axis, (width, stride) in enumerate(zip(kernel, strides, strict=True)):
        begin, end, size = pads[axis], pads[count + axis], x.shape[axis - count]
        windows = -(-(size + begin + end - width) // stride) + 1
        windows -= (windows - 1) * stride >= size + begin
        made = made.narrow(axis - count, 0, windows)
    return made


def _lp_pool(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    kernel, power = node.attributes["kernel_shape"], node.get("p", 2)
    strides = node.get("strides", [1] * len(kernel))
    if set(node.get("dilations", [1])) != {1} or node.get("ceil_mode", 0):
        raise unsupported(node, "dilations or ceil_mode")
    x, padding = _pad_image(node, inputs[0].abs() ** power, kernel, strides, 0.0)
    pool = _of_rank(_AVERAGE_POOL, len(kernel), node)
    total = pool(x, kernel, strides, padding) * float(torch.tensor(kernel).prod())
    # the root's slope at 0 is infinite, which would make 0 * inf of the gradient
    return (torch.where(total > 0, total, 1.0) ** (1 / power) * (total > 0),)


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


def _norm(order: int) -> Callable[..., Tensor]:
    def norm(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(x, order, dim=dim, keepdim=keepdim)
        return length

    return norm


def _square_sum(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return (x * x).sum(dim=dim, keepdim=keepdim)


def _log_sum(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    return x.sum(dim=dim, keepdim=keepdim).log()


def _product(x: Tensor, dim: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted((d % x.ndim for d in dim), reverse=True):
        x = x.prod(dim=axis, keepdim=keepdim)
    return x


def _softmax(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (torch.softmax(inputs[0], dim=node.get("axis", -1)),)


def _log_softmax(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    return (torch.log_softmax(inputs[0], dim=node.get("axis", -1)),)


def _layer_norm(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    if len(node.outputs) > 1:
        raise unsupported(node, "more than one output")
    x: Tensor = inputs[0]
    shape = x.shape[node.get("axis", -1) :]
    bias = inputs[2] if len(inputs) > 2 else None
    bias = None if bias is None else _spread(bias, shape)
    return (F.layer_norm(x, shape, _spread(inputs[1], shape), bias, node.get("epsilon", 1e-5)),)


def _spread(value: Tensor, shape: torch.Size) -> Tensor:
    """A parameter as large as what it is for; dimensions of 1 before that say nothing."""
    return value.reshape(value.shape[max(value.ndim - len(shape), 0) :]).expand(shape)


def _batch_norm(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, scale, bias, mean, variance = inputs[:5]
    return (F.batch_norm(x, mean, variance, scale, bias, False, 0.0, node.get("epsilon", 1e-5)),)


def _instance_norm(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """As groups of one channel: torch's own instance_norm refuses images of one pixel."""
    x, scale, bias = inputs
    return (torch.group_norm(x, x.shape[1], scale, bias, node.get("epsilon", 1e-5)),)


def _group_norm(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    """Scale and bias are of channels; before opset 21 they were of groups."""
    x, groups = inputs[0], node.attributes["num_groups"]
    scale, bias = (v.repeat_interleave(x.shape[1] // len(v)) for v in inputs[1:])
    return (torch.group_norm(x, groups, scale, bias, node.get("epsilon", 1e-5)),)


def _local_response_norm(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x, size = inputs[0], node.attributes["size"]
    around = [0, 0] * (x.ndim - 2) + [(size - 1) // 2, size // 2]
    total = F.pad(x * x, around).unfold(1, size, 1).sum(-1)
    scale = node.get("bias", 1.0) + node.get("alpha", 1e-4) / size * total
    return (x / scale ** node.get("beta", 0.75),)


def _lp_normalization(node: Node, inputs: Inputs) -> tuple[Tensor, ...]:
    x: Tensor = inputs[0]
    length = torch.linalg.vector_norm(x, node.get("p", 2), dim=node.get("axis", -1), keepdim=True)
    return (x / torch.where(length > 0, length, 1.0),)


LAYER_OPS: Mapping[str, Op] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Einsum": _einsum,
    "Gemm": _gemm,
    "GlobalAveragePool": _global(torch.mean),
    "GlobalMaxPool": _global(torch.amax),
    "GroupNormalization": _group_norm,
    "InstanceNormalization": _instance_norm,
    "LRN": _local_response_norm,
    "LayerNormalization": _layer_norm,
    "LogSoftmax": _log_softmax,
    "LpNormalization": _lp_normalization,
    "LpPool": _lp_pool,
    "MatMul": plain(torch.matmul),
    "MaxPool": _max_pool,
    "ReduceL1": _reduce(_norm(1)),
    "ReduceL2": _reduce(_norm(2)),
    "ReduceLogSum": _reduce(_log_sum),
    "ReduceLogSumExp": _reduce(torch.logsumexp),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMean": _reduce(torch.mean),
    "ReduceMin": _reduce(torch.amin),
    "ReduceProd": _reduce(_product),
    "ReduceSum": _reduce(torch.sum),
    "ReduceSumSquare": _reduce(_square_sum),
    "Softmax": _softmax,
}
