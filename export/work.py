"""What a pass of a graph costs, in multiply-accumulates: to share out time, not to predict it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx

from resq_deploy.export import fold, rules

ELEMENT = 100  # multiply-accumulates that take as long as one element of an activation

Shapes = Mapping[str, tuple[int | None, ...]]


def work_per_image(fp32: onnx.ModelProto) -> float:
    """Cost of one image in multiply-accumulates.

    Those of the layers with weights, and 100 for each element of an activation: what depthwise
    convolutions, norms and gates wait for is memory.
    """
    shapes, arrays = fold.shapes(fp32), fold.initializers(fp32.graph)
    total = 0.0
    for node in fp32.graph.node:
        total += sum(ELEMENT * elements(shapes, name) for name in node.output)
        if node.op_type in rules.WEIGHTED and node.input[1] in arrays:
            total += multiplications(node, arrays[node.input[1]], shapes)
    return total


def multiplications(node: onnx.NodeProto, weight: onnx.TensorProto, shapes: Shapes) -> float:
    """Multiply-accumulates of one image in a Conv, ConvTranspose, Gemm or MatMul."""
    axis = rules.output_axis(node, len(weight.dims))
    each = float(np.prod(weight.dims)) / int(weight.dims[axis])
    return elements(shapes, node.output[0]) * each


def elements(shapes: Shapes, name: str) -> float:
    """Elements of a tensor for one image; 0 where its shape is unknown."""
    return float(np.prod([d or 1 for d in shapes.get(name, (0, 0))[1:]]))
