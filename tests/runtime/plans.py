"""Plans for tests: bytes that hold weights as an engine's do, and QDQ graphs of one layer that real builders take."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.runtime.layouts import Layout

Int8 = NDArray[np.int8]


def weight(*shape: int, seed: int = 0) -> Int8:
    """Random INT8 codes."""
    return np.random.default_rng(seed).integers(-128, 128, shape).astype(np.int8)


def noise(size: int, seed: int = 99) -> bytes:
    """Bytes that stand for code and metadata between the weights of a plan."""
    return np.random.default_rng(seed).integers(0, 256, size).astype(np.uint8).tobytes()


def packed(array: NDArray[Any], tag: str) -> bytes:
    """A copy of a tensor in a layout."""
    return Layout(tag, array.shape).pack(array).tobytes()


def fake_plan(parts: Sequence[bytes], gap: int = 40) -> bytes:
    """Copies of weights with noise before, between and after them."""
    joined = b"".join(noise(gap + i, seed=i) + part for i, part in enumerate(parts))
    return joined + noise(gap, seed=len(parts))


class QdqGraph:
    """Writes a small INT8 graph with explicit Q/DQ, node by node. The input is `input` [batch, ...]."""

    def __init__(self, *shape: int) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Any] = {"s": np.float32(0.02), "z": np.int8(0)}

    def node(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attributes))
        return name

    def quantized(self, source: str) -> str:
        return self.node(
            "DequantizeLinear", self.node("QuantizeLinear", source, "s", "z"), "s", "z"
        )

    def weight(self, name: str, codes: Int8, axis: int = 0) -> str:
        self.constants |= {
            name: codes,
            f"{name}.scale": np.linspace(0.01, 0.02, codes.shape[axis], dtype=np.float32),
            f"{name}.zero_point": np.zeros(codes.shape[axis], np.int8),
        }
        scale, zero = f"{name}.scale", f"{name}.zero_point"
        return self.node("DequantizeLinear", name, scale, zero, axis=axis)

    def conv(self, source: str, name: str, codes: Int8, group: int = 1, stride: int = 1) -> str:
        shape = {
            "pads": [codes.shape[2] // 2] * 4,
            "strides": [stride] * 2,
            "kernel_shape": list(codes.shape[2:]),
        }
        bias = np.linspace(-1, 1, codes.shape[0], dtype=np.float32)
        self.constants[f"{name}.bias"] = bias
        quantized, dequantized = self.quantized(source), self.weight(name, codes)
        found = self.node("Conv", quantized, dequantized, f"{name}.bias", group=group, **shape)
        return self.node("Relu", found)

    def model(self, *outputs: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "graph",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", *self.shape])],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
            [numpy_helper.from_array(np.asarray(v), n) for n, v in self.constants.items()],
        )
        opset = helper.make_opsetid("", 19)
        return helper.make_model(graph, opset_imports=[opset], ir_version=9)


def conv_file(path: Path, codes: Int8, group: int = 1, side: int = 16) -> Path:
    """A file with one INT8 convolution whose weight is named `w`."""
    graph = QdqGraph(codes.shape[1] * group, side, side)
    onnx.save(graph.model(graph.quantized(graph.conv("input", "w", codes, group))), path)
    return path
