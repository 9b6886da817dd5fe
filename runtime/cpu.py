"""What byte products of this CPU do, and integer operators that are right on every CPU and fast on this one.

x86 multiplies unsigned by signed bytes. Without VNNI it adds two such products in 16 bits, and they saturate: 255 * 127
* 2 is more than they hold. Products of unsigned bytes are added in 32 bits there, at half the speed. So where products
saturate, signed weights become unsigned ones with a zero point of 128: the same integers.

With AMX a core multiplies tiles, several times as many bytes at once as with VNNI. ONNX Runtime's matrix products do
so, its convolution of weights without a zero point does not. It looks for one among constants: where the zero point
may be given when the graph runs, which nobody does, it takes its general convolution, and that is a matrix product.
"""

from __future__ import annotations

import ctypes
import platform
from functools import lru_cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

# operator -> places of weights and their zero points among its inputs
_PRODUCTS = {"QLinearConv": (3, 5), "MatMulIntegerToFloat": (1, 5)}
_SHIFT = 128
_BY = "resq/unsigned/by"  # 128 as a tensor
# Layers that gain by tiles: products summed into one output, output channels, weights in all.
_SUMMED, _FILTERS, _WEIGHTS = 256, 64, 2**15
_ARCH_PRCTL, _PERMIT, _TILES = 158, 0x1023, 18  # x86-64 Linux: ARCH_REQ_XCOMP_PERM of XTILEDATA


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


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether ONNX Runtime multiplies bytes in AMX tiles here: the CPU has them and Linux lets us use them."""
    info = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not info.is_file() or "amx_int8" not in info.read_text():
        return False
    return bool(ctypes.CDLL(None).syscall(_ARCH_PRCTL, _PERMIT, _TILES) == 0)


def suited(model: onnx.ModelProto) -> onnx.ModelProto:
    """A lowered graph as this CPU computes it exactly, and fastest; changed in place, if at all."""
    if has_tiles():
        in_tiles(model.graph)
    return unsaturated(model)


def in_tiles(graph: onnx.GraphProto) -> None:
    """Convolutions that gain by tiles become matrix products; in place."""
    held = {t.name: t for t in graph.initializer}
    given = {i.name for i in graph.input}
    for node in graph.node:
        if node.op_type != "QLinearConv" or node.input[3] not in held:
            continue
        (filters, *window), zero = held[node.input[3]].dims, node.input[5]
        summed = int(np.prod(window))
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        gains = summed >= _SUMMED and filters >= _FILTERS and filters * summed >= _WEIGHTS
        if groups == 1 and gains and zero in held and zero not in given:
            kind = held[zero].data_type
            graph.input.append(helper.make_tensor_value_info(zero, kind, held[zero].dims))
            given.add(zero)


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
