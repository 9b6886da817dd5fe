"""Small networks in float ONNX, and a quantizer that writes them as the exporter does.

`quantize` places Q/DQ by TensorRT's rules: symmetric S8 activations per tensor on the inputs of
Conv, Gemm and MatMul, S8 weights per output channel, float bias, nothing between a Conv and its
Relu, on a residual Add the skip input only, on pooling both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Array = NDArray[np.generic]


class Net:
    """Writes a float ONNX graph node by node; weights come from one seed."""

    def __init__(self, shape: Sequence[int], seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.inits: list[onnx.TensorProto] = []
        self.shape = shape

    def add(self, op: str, *inputs: str, **attrs: object) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name=name, **attrs))  # type: ignore[arg-type]
        return name

    def const(self, value: Array, name: str | None = None) -> str:
        name = name or f"c_{len(self.inits)}"
        self.inits.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, *shape: int, fan: int) -> str:
        value = self.rng.normal(0, (1.5 / fan) ** 0.5, shape).astype(np.float32)
        return self.const(value, f"w_{len(self.inits)}")

    def conv(self, x: str, cin: int, cout: int, k: int = 3, stride: int = 1, group: int = 1) -> str:
        w = self.weight(cout, cin // group, k, k, fan=cin // group * k * k)
        b = self.const(self.rng.normal(0, 0.1, cout).astype(np.float32), f"b_{len(self.inits)}")
        attrs = {"kernel_shape": [k, k], "pads": [k // 2] * 4, "strides": [stride] * 2}
        return self.add("Conv", x, w, b, group=group, **attrs)

    def linear(self, x: str, cin: int, cout: int) -> str:
        b = self.const(self.rng.normal(0, 0.1, cout).astype(np.float32), f"b_{len(self.inits)}")
        return self.add("Gemm", x, self.weight(cout, cin, fan=cin), b, transB=1)

    def silu(self, x: str) -> str:
        return self.add("Mul", x, self.add("Sigmoid", x))

    def model(self, output: str) -> onnx.ModelProto:
        graph = helper.make_graph(
            self.nodes,
            "net",
            [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", *self.shape])],
            [helper.make_tensor_value_info(output, TensorProto.FLOAT, ["n", None])],
            self.inits,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def resnet(seed: int = 0, width: int = 16, size: int = 8, maxpool: bool = False) -> onnx.ModelProto:
    """Stem, an identity block, a strided block with a 1x1 skip, pooling, Gemm."""
    net = Net((3, size, size), seed)
    x = net.add("Relu", net.conv("input", 3, width))
    if maxpool:
        x = net.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    y = net.conv(net.add("Relu", net.conv(x, width, width)), width, width)
    x = net.add("Relu", net.add("Add", y, x))
    y = net.conv(net.add("Relu", net.conv(x, width, 2 * width, stride=2)), 2 * width, 2 * width)
    x = net.add("Relu", net.add("Add", y, net.conv(x, width, 2 * width, 1, 2)))
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    return net.model(net.linear(x, 2 * width, 10))


def vgg(seed: int = 0, width: int = 16, size: int = 8) -> onnx.ModelProto:
    """Convs and max pools, then a Flatten of an image and two Gemms."""
    net = Net((3, size, size), seed)
    x = net.add("Relu", net.conv("input", 3, width))
    x = net.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    x = net.add("Relu", net.conv(x, width, width))
    x = net.add("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    features = width * (size // 4) ** 2
    x = net.add("Relu", net.linear(net.add("Flatten", x), features, 24))
    return net.model(net.linear(x, 24, 10))


def efficientnet(seed: int = 0, width: int = 16, size: int = 8) -> onnx.ModelProto:
    """Two inverted bottlenecks: SiLU, depthwise conv, squeeze and excite, residual."""
    net = Net((3, size, size), seed)
    x = net.silu(net.conv("input", 3, width, stride=2))
    for _ in range(2):
        y = net.silu(net.conv(x, width, 2 * width, 1))
        y = net.silu(net.conv(y, 2 * width, 2 * width, group=2 * width))
        se = net.add("GlobalAveragePool", y)
        se = net.silu(net.conv(se, 2 * width, 8, 1))
        y = net.add("Mul", y, net.add("Sigmoid", net.conv(se, 8, 2 * width, 1)))
        x = net.add("Add", net.conv(y, 2 * width, width, 1), x)
    x = net.add("Flatten", net.add("GlobalAveragePool", x))
    return net.model(net.linear(x, width, 10))


def transformer(seed: int = 0, dim: int = 16, size: int = 8) -> onnx.ModelProto:
    """Patch embedding, single-head attention, LayerNorm, GELU MLP: what Swin is made of."""
    net = Net((3, size, size), seed)
    patch = net.weight(dim, 3, 2, 2, fan=12)
    bias = net.const(np.zeros(dim, np.float32), "b_patch")
    x = net.add("Conv", "input", patch, bias, kernel_shape=[2, 2], strides=[2, 2])
    tokens = (size // 2) ** 2
    x = net.add("Transpose", x, perm=[0, 2, 3, 1])
    x = net.add("Reshape", x, net.const(np.array([-1, tokens, dim])))

    def dense(x: str, cin: int, cout: int) -> str:
        bias = net.const(net.rng.normal(0, 0.1, cout).astype(np.float32), f"b_{len(net.inits)}")
        return net.add("Add", net.add("MatMul", x, net.weight(cin, cout, fan=cin)), bias)

    def norm(x: str) -> str:
        ones, zeros = net.const(np.ones(dim, np.float32)), net.const(np.zeros(dim, np.float32))
        return net.add("LayerNormalization", x, ones, zeros, axis=-1)

    y = norm(x)
    q, k, v = (dense(y, dim, dim) for _ in range(3))
    scores = net.add("MatMul", q, net.add("Transpose", k, perm=[0, 2, 1]))
    scores = net.add("Mul", scores, net.const(np.array(dim**-0.5, np.float32)))
    y = net.add("MatMul", net.add("Softmax", scores, axis=-1), v)
    x = net.add("Add", x, dense(y, dim, dim))
    y = dense(norm(x), dim, 2 * dim)
    half, root = net.const(np.array(0.5, np.float32)), net.const(np.array(2**-0.5, np.float32))
    erf = net.add("Erf", net.add("Mul", y, root))
    one = net.const(np.array(1, np.float32))
    y = net.add("Mul", net.add("Mul", y, half), net.add("Add", erf, one))
    x = net.add("Add", x, dense(y, 2 * dim, dim))
    x = net.add("ReduceMean", norm(x), axes=[1], keepdims=0)
    return net.model(net.linear(x, dim, 10))


NETS = {"resnet": resnet, "vgg": vgg, "efficientnet": efficientnet, "transformer": transformer}


class _Quantizer:
    def __init__(self, model: onnx.ModelProto, amax: dict[str, float]) -> None:
        self.model, self.amax = model, amax
        self.weights = {i.name: numpy_helper.to_array(i) for i in model.graph.initializer}
        self.producer = {o: n for n in model.graph.node for o in n.output}
        self.inits: dict[str, Array] = dict(self.weights)
        self.nodes: list[onnx.NodeProto] = []
        self.done: dict[str, str] = {}

    def activation(self, name: str) -> str:
        """Q/DQ on `name`, once however many consumers ask."""
        if name not in self.done:
            scale = np.float32(max(self.amax[name], 1e-6) / 127)
            self.inits[f"{name}_scale"] = np.asarray(scale)
            self.inits[f"{name}_zero_point"] = np.asarray(np.int8(0))
            params = [f"{name}_scale", f"{name}_zero_point"]
            q = helper.make_node("QuantizeLinear", [name, *params], [f"{name}_q"], f"{name}_Q")
            dq = helper.make_node(
                "DequantizeLinear", [f"{name}_q", *params], [f"{name}_dq"], f"{name}_DQ"
            )
            self.nodes += [q, dq]
            self.done[name] = f"{name}_dq"
        return self.done[name]

    def weight(self, name: str, axis: int) -> str:
        value = self.weights[name]
        others = tuple(i for i in range(value.ndim) if i != axis)
        scale = np.maximum(np.abs(value).max(others, keepdims=True) / 127, 1e-8).astype(np.float32)
        self.inits[name] = np.clip(np.rint(value / scale), -127, 127).astype(np.int8)
        self.inits[f"{name}_scale"] = scale.reshape(-1)
        self.inits[f"{name}_zero_point"] = np.zeros(scale.size, np.int8)
        inputs = [name, f"{name}_scale", f"{name}_zero_point"]
        self.nodes.append(
            helper.make_node("DequantizeLinear", inputs, [f"{name}_dq"], f"{name}_DQ", axis=axis)
        )
        return f"{name}_dq"

    def inputs(self, node: onnx.NodeProto) -> list[str]:
        ins = list(node.input)
        if node.op_type in ("Conv", "Gemm", "MatMul"):
            ins[0] = self.activation(ins[0])
            if ins[1] in self.weights:
                trans = any(a.name == "transB" and a.i for a in node.attribute)
                axis = 0 if node.op_type == "Conv" or trans else self.weights[ins[1]].ndim - 1
                ins[1] = self.weight(ins[1], axis)
            else:
                ins[1] = self.activation(ins[1])
        elif node.op_type == "Add" and not set(ins) & set(self.weights):
            skip = self._skip(ins)
            ins[skip] = self.activation(ins[skip])
        elif node.op_type == "GlobalAveragePool":
            ins[0] = self.activation(ins[0])
        return ins

    def _skip(self, ins: list[str]) -> int:
        """The skip input of a residual Add: the one already quantized, else the second."""
        return 0 if ins[0] in self.done else 1

    def run(self) -> onnx.ModelProto:
        for node in self.model.graph.node:
            ins = self.inputs(node)
            copy = onnx.NodeProto()
            copy.CopyFrom(node)
            del copy.input[:]
            copy.input.extend(ins)
            self.nodes.append(copy)
        used = {i for n in self.nodes for i in n.input}
        graph = helper.make_graph(
            self.nodes,
            self.model.graph.name,
            self.model.graph.input,
            self.model.graph.output,
            [numpy_helper.from_array(np.asarray(v), k) for k, v in self.inits.items() if k in used],
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _ranges(model: onnx.ModelProto, x: NDArray[np.float32]) -> dict[str, float]:
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    names = [o for n in model.graph.node for o in n.output]
    have = {o.name for o in model.graph.output}
    extra: Iterable[str] = (n for n in names if n not in have)
    probe.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in extra)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(probe.SerializeToString(), options)
    outs = [o.name for o in session.get_outputs()]
    values = session.run(outs, {"input": x})
    amax = {n: float(np.abs(v).max()) for n, v in zip(outs, values, strict=True)}
    return amax | {"input": float(np.abs(x).max())}


def quantize(
    model: onnx.ModelProto, x: NDArray[np.float32], shrink: float = 0.8
) -> onnx.ModelProto:
    """The QDQ file of `model`, calibrated on `x`; `shrink` < 1 makes activations saturate."""
    amax = {k: v * shrink for k, v in _ranges(model, x).items()}
    return _Quantizer(model, amax).run()


def images(model: onnx.ModelProto, n: int = 8, seed: int = 1) -> NDArray[np.float32]:
    """`n` random images in [0, 1] of the model's input shape."""
    dims = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    return np.random.default_rng(seed).random((n, *dims), dtype=np.float32)


def quantized(name: str, seed: int = 0) -> onnx.ModelProto:
    """One of `NETS`, quantized on its own random images."""
    model = NETS[name](seed)
    return quantize(model, images(model, 16))
