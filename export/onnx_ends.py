"""Edits that make somebody else's ONNX graph take pixels in NCHW, any number of them, and give logits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.export import fold, names

Shape = tuple[int, int, int]

TO_NHWC = (0, 2, 3, 1)
_PLANES = (1, 3, 4)  # channels that pictures have


def layout(file: Path, images: onnx.ValueInfoProto, given: Shape | None) -> tuple[bool, Shape]:
    """Whether channels come last in a file's images, and (C, H, W); `given`: by the user. Raises ModelError."""
    dims = images.type.tensor_type.shape.dim
    if len(dims) != 4:
        raise ModelError(
            f"{file} takes a tensor of {len(dims)} dimensions", "it must take images: [N, C, H, W]"
        )
    a, b, c = (
        d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in dims[1:]
    )
    first, last = (a, b, c), (c, a, b)
    if given is not None:
        for channels_last, own in ((False, first), (True, last)):
            if all(o in (None, g) for o, g in zip(own, given, strict=True)):
                return channels_last, given
        raise ModelError(
            f"{file} takes images of {_text(first)}, not {_text(given)}",
            "leave out --input-shape, or give the file's own",
        )
    channels_last = a not in _PLANES and c in _PLANES
    found = last if channels_last else first
    if None in found:
        raise ModelError(
            f"{file} leaves the size of its images open ({_text(found)})",
            "give --input-shape, for example 3x32x32",
        )
    return channels_last, (found[0] or 0, found[1] or 0, found[2] or 0)


def _text(dims: Sequence[int | None]) -> str:
    return "x".join("?" if d is None else str(d) for d in dims)


def without_softmax(g: onnx.GraphProto) -> bool:
    """Take the Softmax off the end, in place; whether there was one."""
    made, output, cut = fold.producers(g), g.output[0], False
    name = output.name
    while name in made and made[name].op_type in ("Softmax", "Identity"):
        cut |= made[name].op_type == "Softmax"
        name = made[name].input[0]
    if cut and name in made:
        output.name = name
        fold.drop_unused(g)
    return cut and name in made


def gives_probabilities(g: onnx.GraphProto) -> bool:
    """Whether a graph ends in a Softmax, quantized or not."""
    made, name = fold.producers(g), g.output[0].name
    while name in made and made[name].op_type in ("QuantizeLinear", "DequantizeLinear", "Identity"):
        name = made[name].input[0]
    return name in made and made[name].op_type == "Softmax"


def end_alike(fp32: onnx.ModelProto, int8: onnx.ModelProto, *, cut: bool) -> None:
    """Give a reference, in place, the end of the file it is held against: a Softmax or, where that was `cut`, none."""
    if cut:
        without_softmax(fp32.graph)
        names.rename_tensors(fp32.graph, {fp32.graph.output[0].name: names.OUTPUT})
    elif gives_probabilities(int8.graph) and not gives_probabilities(fp32.graph):
        names.rename_tensors(fp32.graph, {names.OUTPUT: f"{names.OUTPUT}.before"})
        last = helper.make_node(
            "Softmax", [f"{names.OUTPUT}.before"], [names.OUTPUT], name="softmax", axis=1
        )
        fp32.graph.node.append(last)
        fp32.graph.output[0].name = names.OUTPUT


def free_batch(g: onnx.GraphProto) -> None:
    """Let the batch vary, in place: of input and output, and of what is reshaped to the batch that was fixed."""
    (images,) = fold.inputs(g)
    fixed = images.type.tensor_type.shape.dim[0].dim_value
    for value in (images, *g.output):
        if value.type.tensor_type.shape.dim:
            value.type.tensor_type.shape.dim[0].dim_param = names.BATCH
    del g.value_info[:]
    if fixed < 1:
        return
    fold.lift_constants(g)
    held = fold.initializers(g)
    for node in g.node:
        moves = node.op_type == "Reshape" and node.input[0] not in held  # a parameter has no batch
        shape = held.get(node.input[1]) if moves else None
        wanted = numpy_helper.to_array(shape) if shape is not None else np.zeros(0, np.int64)
        if wanted.ndim == 1 and wanted.size > 1 and wanted[0] == fixed:
            free = np.concatenate([[0], wanted[1:]]).astype(np.int64)  # 0: as long as the input's
            node.input[1] = f"{node.output[0]}.free_shape"
            if 0 not in wanted:
                fold.replace(node.attribute, [a for a in node.attribute if a.name != "allowzero"])
            g.initializer.append(numpy_helper.from_array(free, node.input[1]))


def in_front(
    g: onnx.GraphProto,
    channels_last: bool,
    shape: Shape,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    """Pixels in NCHW -> what the file takes, in place; ends get the names that exports use."""
    (old,) = fold.inputs(g)
    used = {n for node in g.node for n in (*node.input, *node.output)}
    used.update(t.name for t in g.initializer)
    unique = names.Unique(used | {names.INPUT, names.OUTPUT})
    own = {old.name: names.INPUT, g.output[0].name: names.OUTPUT}
    for name in (names.INPUT, names.OUTPUT):
        if name in used and name not in own:
            own[name] = unique(name)
    names.rename_tensors(g, own)
    fold.replace(g.input, fold.inputs(g))
    fold.replace(
        g.input[0].type.tensor_type.shape.dim,
        [onnx.TensorShapeProto.Dimension(dim_param=names.BATCH)]
        + [onnx.TensorShapeProto.Dimension(dim_value=size) for size in shape],
    )
    front: list[onnx.NodeProto] = []
    steps: list[tuple[str, NDArray[np.float32]]] = []
    if any(mean) or any(s != 1 for s in std):
        steps = [("Sub", np.array(mean, np.float32)), ("Div", np.array(std, np.float32))]
    current, called = names.INPUT, names.Unique({node.name for node in g.node})
    for op, value in steps:
        name = called(f"preprocess.{op.lower()}")
        constant, out = unique(f"{name}.in1"), unique(f"{name}.out")
        g.initializer.append(numpy_helper.from_array(value.reshape(1, -1, 1, 1), constant))
        front.append(helper.make_node(op, [current, constant], [out], name=name))
        current = out
    if channels_last:
        out = unique("preprocess.transpose.out")
        front.append(
            helper.make_node(
                "Transpose",
                [current],
                [out],
                name=called("preprocess.transpose"),
                perm=TO_NHWC,
            )
        )
        current = out
    if front:
        for node in g.node:
            for position, name in enumerate(node.input):
                if name == names.INPUT:
                    node.input[position] = current
        fold.replace(g.node, [*front, *g.node])
