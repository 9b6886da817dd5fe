"""What byte products of this CPU do, and integer operators that are right on every CPU.

x86 multiplies unsigned by signed bytes. Without VNNI it adds two such products in 16 bits, and they saturate: 255 * 127
* 2 is more than they hold. Products of unsigned bytes are added in 32 bits there, at half the speed. So where products
saturate, signed weights become unsigned ones with a zero point of 128: the same integers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

Codes = NDArray[np.int32]

# operator -> places of weights and their zero points among its inputs
_PRODUCTS = {"QLinearConv": (3, 5), "MatMulIntegerToFloat": (1, 5)}
_WEIGHTS = {"QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3, "MatMulIntegerToFloat": 1}
_SHIFT = 128
_BY = "resq/unsigned/by"  # 128 as a tensor


@lru_cache(maxsize=1)
def saturates() -> bool:
    """Whether ONNX Runtime's U8 x S8 products saturate in 16 bits here (AVX2 without VNNI).

    Its S8 x S8 products are the same kernels with shifted codes. Ordinary sessions then compute other sums than the
    file says, where two neighbouring products are large; what runs it node by node, in float, does not.
    """
    a, b = np.full((2, 64), 255, np.uint8), np.full((64, 16), 127, np.int8)
    info = [("a", TensorProto.UINT8), ("y", TensorProto.INT32)]
    x, y = (helper.make_tensor_value_info(name, kind, None) for name, kind in info)
    node = helper.make_node("MatMulInteger", ["a", "b"], ["y"])
    graph = helper.make_graph([node], "probe", [x], [y], [numpy_helper.from_array(b, "b")])
    versions = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=versions, ir_version=8)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return bool(np.any(session.run(None, {"a": a})[0] != 255 * 127 * 64))


def saturable(model: onnx.ModelProto) -> tuple[str, ...]:
    """Integer kernels of a session's graph (optimized_model_filepath) with weights that could saturate without VNNI.

    Two products meet in 16 bits where weights are neighbours: along the inputs of a Conv, at one place of its kernel
    (in the order of the file, where images are NCHW), and along the rows of a matrix. 255 (|w1| + |w2|) > 32,767 if
    both have one sign. Depthwise kernels add in 32 bits.
    """
    held = {t.name: t for t in model.graph.initializer}
    found = []
    for node in model.graph.node:
        place = _WEIGHTS.get(node.op_type)
        tensor = None if place is None else held.get(node.input[place])
        if tensor is not None and tensor.data_type == TensorProto.INT8:
            given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            codes = numpy_helper.to_array(tensor).astype(np.int32)
            if _could(_rows(node, codes, given)):
                found.append(node.name)
    return tuple(found)


def _rows(node: onnx.NodeProto, codes: Codes, given: Mapping[str, Any]) -> Codes:
    """Weights as the kernel reads them, one row an output: [outputs, inputs]."""
    if node.op_type == "QLinearConv":
        if codes.shape[1] == 1 and given.get("group", 1) > 1:
            return np.zeros((1, 0), np.int32)
        turned = np.moveaxis(codes, 1, -1) if node.domain else codes
        return turned.reshape(len(codes), -1)
    if codes.ndim < 2 or given.get("transB"):
        return codes.reshape(len(codes), -1)
    return np.moveaxis(codes, -2, -1).reshape(-1, codes.shape[-2])


def _could(rows: Codes) -> bool:
    """Whether two neighbours of one sign, the first of each pair at an even place, are more than 16 bits hold."""
    pairs = rows[:, : rows.shape[1] // 2 * 2].reshape(len(rows), -1, 2)
    alike = (pairs[..., 0] > 0) == (pairs[..., 1] > 0)
    return bool((np.abs(pairs).sum(axis=2)[alike] * 255 > np.iinfo(np.int16).max).any())


def unsaturated(model: onnx.ModelProto, *, keep: bool = False) -> onnx.ModelProto:
    """A lowered graph whose byte products do not saturate on this CPU; changed in place, if at all.

    Weights that are given when it runs, and those that nodes make, are shifted as it runs; `keep`: all others too, so
    that initializers keep their bytes.
    """
    if saturates():
        unsigned(model.graph, keep=keep)
    return model


def unsigned(graph: onnx.GraphProto, *, keep: bool = False) -> None:
    """Signed weights of integer products -> unsigned ones with a zero point of 128, in place; `keep` as above."""
    held = {t.name: t for t in graph.initializer}
    shifted: dict[str, str] = {}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        places = _PRODUCTS.get(node.op_type, ())
        zero = held.get(node.input[places[-1]]) if places else None
        if zero is not None and zero.data_type == TensorProto.UINT8:
            places = ()  # a product of two activations
        for place in places:
            name = node.input[place]
            if name not in shifted:
                shifted[name] = f"{name}/unsigned"
                if name in held and not keep:
                    value = numpy_helper.to_array(held[name]).view(np.uint8) ^ np.uint8(_SHIFT)
                    graph.initializer.append(numpy_helper.from_array(value, shifted[name]))
                else:
                    nodes += _shift(name, shifted[name])
            node.input[place] = shifted[name]
        nodes.append(node)
    if not shifted:
        return
    by = numpy_helper.from_array(np.asarray(_SHIFT, np.int32), _BY)
    read = {name for node in nodes for name in node.input}
    kept = [t for t in (*graph.initializer, by) if t.name in read]
    graph.ClearField("node")
    graph.node.extend(nodes)
    graph.ClearField("initializer")
    graph.initializer.extend(kept)


def _shift(name: str, made: str) -> list[onnx.NodeProto]:
    """INT8 -> UINT8, 128 more; ONNX Runtime has no sum of bytes."""
    wide, sum_ = f"{made}/wide", f"{made}/sum"
    return [
        helper.make_node("Cast", [name], [wide], name=wide, to=TensorProto.INT32),
        helper.make_node("Add", [wide, _BY], [sum_], name=sum_),
        helper.make_node("Cast", [sum_], [made], name=made, to=TensorProto.UINT8),
    ]
