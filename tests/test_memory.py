from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.memory import fault_space


def _tiny() -> onnx.ModelProto:
    constants = {
        "x.scale": np.float32(0.1),
        "x.zero_point": np.int8(0),
        "conv.weight": np.arange(-8, 8, dtype=np.int8).reshape(4, 1, 2, 2),
        "conv.weight.scale": np.full(4, 0.5, np.float32),
        "conv.weight.zero_point": np.zeros(4, np.int8),
        "conv.bias": np.ones(4, np.float32),
        "gain": np.ones((1, 4, 1, 1), np.float32),
        "shape": np.array([0, -2], np.int64),
        "one": np.array([0, 1], np.int64),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x.scale", "x.zero_point"], ["xq"], "q"),
        helper.make_node("DequantizeLinear", ["xq", "x.scale", "x.zero_point"], ["xd"], "dq"),
        helper.make_node(
            "DequantizeLinear",
            ["conv.weight", "conv.weight.scale", "conv.weight.zero_point"],
            ["wd"],
            "wdq",
            axis=0,
        ),
        helper.make_node("Conv", ["xd", "wd", "conv.bias"], ["c"], "conv"),
        helper.make_node("Mul", ["c", "gain"], ["m"], "mul"),
        helper.make_node(
            "Add", ["shape", "one"], ["to"], "arithmetic"
        ),  # as torch's exporter writes for Swin
        helper.make_node("Reshape", ["m", "to"], ["y"], "flat"),
    ]
    graph = helper.make_graph(
        nodes,
        "tiny",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 1, 3, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    onnx.checker.check_model(model, full_check=True)
    return model


def test_every_parameter_has_a_kind_and_a_layer() -> None:
    space = fault_space(_tiny())
    assert {m.name: (m.kind, m.layer) for m in space.memories} == {
        "x.scale": ("scales", "conv"),
        "x.zero_point": ("zero-points", "conv"),
        "conv.weight": ("weights", "conv"),
        "conv.weight.scale": ("scales", "conv"),
        "conv.weight.zero_point": ("zero-points", "conv"),
        "conv.bias": ("bias", "conv"),
        "gain": ("float", "mul"),
    }
    assert space.size == 8 * (1 + 16 + 4) + 32 * (1 + 4 + 4 + 4)


def test_a_scalar_stays_a_scalar() -> None:
    """A scale of shape [1] in place of [] is refused by ONNX Runtime's fused operators, so a fault would be too."""
    assert fault_space(_tiny()).by_name["x.scale"].value.shape == ()


def test_what_other_quantizers_write() -> None:
    """Biases as 32-bit codes behind a DequantizeLinear, weights without a sign."""
    model = _tiny()
    arrays = {t.name: t for t in model.graph.initializer}
    codes = numpy_helper.from_array(
        np.arange(16, dtype=np.uint8).reshape(4, 1, 2, 2), "conv.weight"
    )
    arrays["conv.weight"].CopyFrom(codes)
    zeros = numpy_helper.from_array(np.full(4, 8, np.uint8), "conv.weight.zero_point")
    arrays["conv.weight.zero_point"].CopyFrom(zeros)
    arrays["conv.bias"].CopyFrom(numpy_helper.from_array(np.ones(4, np.int32), "conv.bias"))
    model.graph.initializer.append(
        numpy_helper.from_array(np.asarray(0.05, np.float32), "conv.bias.scale")
    )
    node = helper.make_node("DequantizeLinear", ["conv.bias", "conv.bias.scale"], ["bd"], "bdq")
    model.graph.node.insert(3, node)
    next(n for n in model.graph.node if n.name == "conv").input[2] = "bd"
    onnx.checker.check_model(model, full_check=True)
    found = fault_space(model).by_name
    assert (found["conv.weight"].kind, found["conv.weight"].width) == ("weights", 8)
    assert (found["conv.bias"].kind, found["conv.bias"].layer) == ("bias", "conv")
    assert found["conv.bias"].width == 32
    assert found["conv.bias.scale"].kind == "scales"


def test_golden_values_cannot_be_written() -> None:
    with pytest.raises(ValueError, match="read-only"):
        fault_space(_tiny()).by_name["conv.weight"].value[0] = 1


def test_a_graph_without_int8_weights_is_refused() -> None:
    model = _tiny()
    del model.graph.node[:5]
    with pytest.raises(ModelError, match="no INT8 weights"):
        fault_space(model)
