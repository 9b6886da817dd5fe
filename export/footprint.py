"""How many images may go through a graph at once, by what its activations take."""

from __future__ import annotations

import numpy as np
import onnx

from resq_deploy.export import fold
from resq_deploy.export.work import elements

MIB = 2**20
RUN_BYTES = 256 * MIB  # of activations that ONNX Runtime may hold at once
GRADIENT_BYTES = (
    768 * MIB
)  # ... that a network with gradients may keep: counted so, of which it keeps some 80%
RUN_BATCH = 256
GRADIENT_BATCH = 128

_ITEM = 4  # bytes of a float32
_BYTES = frozenset({"QuantizeLinear"})  # what makes one byte an element
_IN_PLACE = frozenset({"Relu", "Clip", "LeakyRelu", "Sigmoid", "Add", "Sub", "Mul", "Div"})
_VIEWS = frozenset(
    {
        *("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity", "Expand"),
        *("Slice", "Split"),
    }
)


def run_batch(model: onnx.ModelProto) -> int:
    """Images that ONNX Runtime may run at once, 256 at most."""
    return _within(RUN_BYTES, live_bytes(model), RUN_BATCH)


def gradient_batch(model: onnx.ModelProto) -> int:
    """Images whose gradients a torch module of this graph may take at once, 128 at most."""
    return _within(GRADIENT_BYTES, kept_bytes(model), GRADIENT_BATCH)


def live_bytes(model: onnx.ModelProto) -> float:
    """Bytes of one image's activations that are needed at once, at most: nothing is kept that is no longer read."""
    sizes, last = _sizes(model), dict[str, int]()
    for number, node in enumerate(model.graph.node):
        last.update(dict.fromkeys(node.input, number))
    live = most = 0.0
    for number, node in enumerate(model.graph.node):
        made = sum(sizes[name] for name in node.output)
        done = [sizes.get(name, 0.0) for name in {*node.input} if last[name] == number]
        reused = node.op_type in _IN_PLACE and made in done
        most = max(most, live if reused else live + made)
        live += made - sum(done)
    return most


def kept_bytes(model: onnx.ModelProto) -> float:
    """Bytes of one image's activations, all of which a backward pass needs."""
    sizes = _sizes(model)
    made = (node.output for node in model.graph.node if node.op_type not in _VIEWS)
    return sum(sizes[name] for names in made for name in names)


def _sizes(model: onnx.ModelProto) -> dict[str, float]:
    """Bytes of one image in every tensor that a node computes."""
    shapes = fold.shapes(model)
    return {
        name: elements(shapes, name) * (1 if node.op_type in _BYTES else _ITEM)
        for node in model.graph.node
        for name in node.output
    }


def _within(budget: int, each: float, most: int) -> int:
    return int(np.clip(budget // max(each, 1.0), 1, most))
