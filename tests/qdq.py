"""A small Q/DQ network as other tools write it, in whatever form of scales, zero points and domains."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.runtime.ort import OrtRunner

SHAPE = (4, 8, 8)
CLASSES = 3
_BITS = {np.int8: 7, np.uint8: 8, np.int16: 15, np.uint16: 16}


class Network:
    """Conv, Relu, a residual Add of itself, mean and Gemm; every activation through a Q and a DQ of `kind`.

    `zero_points`: whether Q/DQ name theirs; where they do not, Q says its type if `told`. `codes`: operators on the
    codes behind the Relu, between Q and DQ. `shape`: of scales. `wide`: type of the weights. `constant`: a scalar of
    codes that is added.
    """

    def __init__(
        self,
        kind: Any = np.int8,
        *,
        wide: Any = np.int8,
        shape: tuple[int, ...] = (),
        zero_points: bool = True,
        told: bool = False,
        domain: str = "",
        codes: tuple[str, ...] = (),
        constant: bool = False,
        end: str = "",
    ) -> None:
        self.kind, self.shape, self.zero_points, self.told = kind, shape, zero_points, told
        self.domain, self.wide, self.codes = domain, wide, codes
        self.nodes: list[onnx.NodeProto] = []
        self.arrays: dict[str, NDArray[Any]] = {}
        rng = np.random.default_rng(0)
        x = self.quantized("x", 1.0)
        w = self.weight("conv.w", rng.normal(size=(16, 4, 3, 3)) / 6)
        self.arrays["conv.b"] = rng.normal(size=16).astype(np.float32) / 4
        self.node("Conv", [x, w, "conv.b"], "conv", pads=[1, 1, 1, 1])
        self.node("Relu", ["conv"], "relu")
        y = self.quantized("relu", 4.0, codes)
        self.node("Add", [y, y], "sum")
        last = "sum"
        if constant:
            c = self.weight("add.c", np.array(0.5))
            self.node("Add", [self.quantized("sum", 8.0), c], "more")
            last = "more"
        z = self.quantized(last, 8.0)
        self.node("GlobalAveragePool", [z], "mean")
        self.node("Flatten", ["mean"], "flat")
        v = self.weight("fc.w", rng.normal(size=(16, CLASSES)) / 2)
        self.arrays["fc.b"] = rng.normal(size=CLASSES).astype(np.float32)
        self.node("Gemm", [self.quantized("flat", 4.0), v, "fc.b"], "scores")
        if end:
            self.node(end, ["scores"], "ended", axis=1)
        self.node("Identity", [self.quantized("ended", 1.0) if end else "scores"], "y")

    def node(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        self.nodes.append(
            helper.make_node(op, inputs, [output], name=f"{output}.node", **attributes)
        )
        return output

    def parameters(self, name: str, scale: float, kind: Any) -> list[str]:
        self.arrays[f"{name}.s"] = np.full(self.shape, scale, np.float32)
        if not self.zero_points:
            return [f"{name}.s"]
        self.arrays[f"{name}.z"] = np.zeros(self.shape, kind)
        return [f"{name}.s", f"{name}.z"]

    def quantized(self, name: str, most: float, codes: tuple[str, ...] = ()) -> str:
        """Q, operators on codes, DQ."""
        given = self.parameters(name, most / (2 ** _BITS[self.kind] - 1), self.kind)
        told = helper.np_dtype_to_tensor_dtype(np.dtype(self.kind))
        extra: dict[str, Any] = {"output_dtype": told} if self.told else {}
        current = self.node(
            "QuantizeLinear", [name, *given], f"{name}.q", domain=self.domain, **extra
        )
        for i, op in enumerate(codes):
            pool = {"kernel_shape": [2, 2]} if op == "MaxPool" else {}
            current = self.node(op, [current], f"{name}.q{i}", **pool)
        return self.node("DequantizeLinear", [current, *given], f"{name}.dq", domain=self.domain)

    def weight(self, name: str, value: NDArray[Any]) -> str:
        """Codes of a weight behind a DQ."""
        scale = float(np.abs(value).max()) / (2 ** _BITS[self.wide] - 1)
        self.arrays[name] = np.rint(value / scale).astype(self.wide)
        given = self.parameters(name, scale, self.wide)
        return self.node("DequantizeLinear", [name, *given], f"{name}.dq", domain=self.domain)

    def model(self, opset: int = 21) -> onnx.ModelProto:
        """float32 [batch, 4, 8, 8] -> [batch, 3]."""
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *SHAPE])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", CLASSES])],
            [numpy_helper.from_array(value, name) for name, value in self.arrays.items()],
        )
        versions = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=versions, ir_version=10)


def same_under_faults(
    fast: OrtRunner, exact: OrtRunner, x: NDArray[np.float32], kind: str, count: int, within: float
) -> None:
    """Two ways of running a file agree under `count` single faults of a kind of memory, `within` the largest logit."""
    part, rng = fast.space.select(kinds=(kind,)), np.random.default_rng(0)
    size = float(np.abs(exact(x)).max())
    for place in rng.integers(0, part.size, count):
        flips = part.flips(np.array([place]))
        with fast.faults(flips), exact.faults(flips):
            ours, theirs = fast(x), exact(x)
        most = np.abs(theirs[np.isfinite(theirs)]).max(initial=size)
        np.testing.assert_allclose(ours, theirs, atol=within * most, equal_nan=True)


def pixels(count: int = 4) -> NDArray[np.float32]:
    """Images in [0, 1]."""
    return np.random.default_rng(1).random((count, *SHAPE), dtype=np.float32)
