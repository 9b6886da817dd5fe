"""Small FP32 graphs, built by hand so that tests need not wait for torch's exporter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.export.grid import Grid

Images = NDArray[np.float32]
SIDE = 12
CLASSES = 6


@dataclass(frozen=True)
class Fixed:
    """A range that nobody calibrated."""

    grid: Grid


class Builder:
    """Nodes one after another, with random weights; channels of very different size."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def conv(self, name: str, source: str, shape: Sequence[int], **given: Any) -> str:
        """Conv with weight `shape` [O, I, k, k], padded to keep the size."""
        fan = int(np.prod(shape[1:]))
        spread = np.exp(0.6 * self.rng.standard_normal((shape[0], 1, 1, 1)))
        weight = self.rng.standard_normal(shape) * np.sqrt(2 / fan) * spread
        self._parameters(name, weight, shape[0])
        pad = [shape[2] // 2] * 4
        return self._node(
            "Conv", name, [source, f"{name}.weight", f"{name}.bias"], pads=pad, **given
        )

    def gemm(self, name: str, source: str, inputs: int, outputs: int) -> str:
        """Gemm with weight [outputs, inputs]; its output is `logits`."""
        self._parameters(
            name, self.rng.standard_normal((outputs, inputs)) / np.sqrt(inputs), outputs
        )
        node = helper.make_node(
            "Gemm", [source, f"{name}.weight", f"{name}.bias"], ["logits"], name=name, transB=1
        )
        self.nodes.append(node)
        return "logits"

    def op(self, kind: str, name: str, *sources: str, **given: Any) -> str:
        """Any operator without parameters."""
        return self._node(kind, name, list(sources), **given)

    def model(self) -> onnx.ModelProto:
        """The graph `input` [batch, 1, 12, 12] -> `logits` [batch, 6]."""
        images = helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 1, SIDE, SIDE])
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])
        graph = helper.make_graph(self.nodes, "small", [images], [logits], self.tensors)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.checker.check_model(made, full_check=True)
        return made

    def _parameters(self, name: str, weight: NDArray[Any], outputs: int) -> None:
        bias = 0.1 * self.rng.standard_normal(outputs)
        for part, value in (("weight", weight), ("bias", bias)):
            self.tensors.append(numpy_helper.from_array(value.astype(np.float32), f"{name}.{part}"))

    def _node(self, kind: str, name: str, sources: list[str], **given: Any) -> str:
        self.nodes.append(helper.make_node(kind, sources, [f"{name}.out"], name=name, **given))
        return f"{name}.out"


def residual(seed: int = 0) -> onnx.ModelProto:
    """stem - relu - (conv - relu - conv) + (1x1 conv) - relu - mean - fc: 16 and 32 channels."""
    b = Builder(seed)
    x = b.op("Relu", "relu", b.conv("stem", "input", (16, 1, 3, 3)))
    y = b.op("Relu", "relu1", b.conv("conv1", x, (16, 16, 3, 3)))
    y = b.conv("conv2", y, (32, 16, 3, 3))
    y = b.op("Relu", "relu2", b.op("Add", "add", y, b.conv("skip", x, (32, 16, 1, 1))))
    y = b.op("Flatten", "flatten", b.op("GlobalAveragePool", "mean", y))
    b.gemm("fc", y, 32, CLASSES)
    return b.model()


def chain() -> onnx.ModelProto:
    """conv - relu - maxpool - depthwise - sigmoid - conv - relu - flatten - fc."""
    b = Builder(1)
    x = b.op("Relu", "relu", b.conv("conv1", "input", (16, 1, 3, 3)))
    x = b.op("MaxPool", "pool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = b.op("Sigmoid", "gate", b.conv("deep", x, (16, 1, 3, 3), group=16))
    x = b.op("Relu", "relu2", b.conv("conv2", x, (24, 16, 3, 3)))
    b.gemm("fc", b.op("Flatten", "flatten", x), 24 * 36, CLASSES)
    return b.model()


def images(count: int, seed: int = 0) -> Images:
    """Smooth random images, float32 [count, 1, 12, 12] in [0, 1]."""
    noise = np.random.default_rng(seed).random((count, 1, 4, 4), dtype=np.float32)
    return np.repeat(np.repeat(noise, 3, axis=2), 3, axis=3)


def arrays(model: onnx.ModelProto) -> dict[str, NDArray[Any]]:
    """Name -> value of every initializer."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
