"""Q/DQ files in every form that other tools write: made canonical, listed, and without their rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.export import graph, names, onnx_ends, onnx_source, qdq_file
from resq_deploy.export.gradients import obstacle
from resq_deploy.export.onnx_source import Source
from tests.qdq import SHAPE, Network, pixels


def source(model: onnx.ModelProto) -> Source:
    return onnx_source.read(Path("net.onnx"), model)


def nodes(model: onnx.ModelProto, op: str) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == op]


def test_an_empty_zero_point_is_none() -> None:
    model = Network(np.uint8).model()
    for node in (*nodes(model, "QuantizeLinear"), *nodes(model, "DequantizeLinear")):
        node.input[2] = "" if node.input[0] not in ("conv.w", "fc.w") else node.input[2]
    made = qdq_file.canonical(source(model).model)
    assert {len(node.input) for node in nodes(made, "QuantizeLinear")} == {2}
    ranges = qdq_file.listing(made)["activations"]
    assert ranges["input"]["low"] == 0
    assert ranges["input"]["high"] == pytest.approx(1)


@pytest.mark.parametrize(
    ("kind", "low", "symmetric"),
    [(np.int8, -128 / 127, True), (np.uint8, 0, False), (np.int16, -(2**15) / (2**15 - 1), False)],
)
def test_codes_without_zero_points_are_what_the_q_says(
    kind: Any, low: float, symmetric: bool
) -> None:
    made = qdq_file.canonical(source(Network(kind, zero_points=False, told=True).model()).model)
    listed = qdq_file.listing(made)
    assert listed["activations"]["input"]["low"] == pytest.approx(low, rel=0.01)
    assert qdq_file.is_symmetric(made) == symmetric
    assert (listed["scheme"] == "int8-symmetric-qdq") == symmetric
    wide, coded = (graph.run(m, pixels()) for m in (qdq_file.without_rounding(made), made))
    assert np.abs(wide - coded).max() <= 0.1 * np.abs(coded).max()
    assert obstacle(made, SHAPE) is None


def test_runs_of_a_graph_without_zero_points_are_not_fused() -> None:
    """ONNX Runtime takes what is left out for unsigned, and refuses the Add."""
    model = source(Network(zero_points=False, told=True).model()).model
    with_them = source(Network().model()).model
    np.testing.assert_allclose(
        graph.run(model, pixels()), graph.run(with_them, pixels(), optimize=False), atol=1e-6
    )


@pytest.mark.parametrize("kind", [np.int16, np.uint16])
def test_codes_of_16_bits_have_gradients(kind: Any) -> None:
    made = qdq_file.canonical(source(Network(kind, wide=np.int16).model()).model)
    assert obstacle(made, SHAPE) is None
    assert set(qdq_file.listing(made)["weights"]) == {"conv.w", "fc.w"}


def test_onnx_runtimes_own_domain_is_onnxs_where_that_has_the_codes() -> None:
    own = qdq_file.canonical(source(Network(domain="com.microsoft").model(17)).model)
    assert {node.domain for node in nodes(own, "QuantizeLinear")} == {""}
    assert {node.domain for node in nodes(own, "DequantizeLinear")} == {""}
    wide = Network(np.uint16, domain="com.microsoft").model(17)
    made = qdq_file.canonical(source(wide).model)
    assert {node.domain for node in nodes(made, "QuantizeLinear")} == {"com.microsoft"}


def test_notes_of_source_code_stay_behind() -> None:
    model = Network().model()
    model.graph.node[0].doc_string = "/home/me/net.py"
    model.graph.node[0].metadata_props.add(key="stack_trace", value="/home/me/net.py")
    assert b"/home/me" not in qdq_file.canonical(source(model).model).SerializeToString()


def test_without_rounding_in_float16() -> None:
    """Weights, scales and sums in float16 between two Casts, as tools for GPUs write them."""
    model = Network().model()
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    names.rename_tensors(model.graph, {"x": "half", "y": "half.y"})
    model.graph.input[0].name, model.graph.output[0].name = "x", "y"
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["half"], to=TensorProto.FLOAT16))
    model.graph.node.append(helper.make_node("Cast", ["half.y"], ["y"], to=TensorProto.FLOAT))
    made = qdq_file.canonical(source(model).model)
    wide, coded = (graph.run(m, pixels()) for m in (qdq_file.without_rounding(made), made))
    assert np.abs(wide - coded).max() <= 0.1 * np.abs(coded).max()
    assert qdq_file.listing(made)["high_precision"] == "fp16"
    assert (
        qdq_file.listing(qdq_file.canonical(source(Network().model()).model))["high_precision"]
        == "fp32"
    )


def test_codes_that_nothing_here_reads(tmp_path: Path) -> None:
    for kind in (TensorProto.INT4, TensorProto.FLOAT8E4M3FN):
        model = Network().model()
        model.graph.initializer.append(helper.make_tensor("narrow", kind, [2], [1, 2]))
        onnx.save(model, tmp_path / "net.onnx")
        name = TensorProto.DataType.Name(kind)
        with pytest.raises(ModelError, match=rf"codes in {name}.*quantize it to INT8"):
            onnx_source.load(tmp_path / "net.onnx")
    told = Network().model()
    for node in nodes(told, "QuantizeLinear"):
        del node.input[2]
        node.attribute.append(helper.make_attribute("output_dtype", TensorProto.FLOAT8E4M3FN))
    with pytest.raises(ModelError, match="its codes are float8"):
        qdq_file.canonical(told)


def test_outputs_that_are_no_logits() -> None:
    model = Network().model()
    model.graph.node.append(helper.make_node("Cast", ["y"], ["codes"], to=TensorProto.INT8))
    model.graph.output[0].name = "codes"
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.INT8
    with pytest.raises(ModelError, match=r"logits in int8.*DequantizeLinear"):
        source(model)


def test_branches_are_refused() -> None:
    model = Network().model()
    bodies = [
        helper.make_graph(
            [helper.make_node(op, ["y"], [op])],
            op,
            [],
            [helper.make_tensor_value_info(op, TensorProto.FLOAT, None)],
        )
        for op in ("Identity", "Neg")
    ]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    model.graph.node.append(
        helper.make_node("If", ["which"], ["z"], then_branch=bodies[0], else_branch=bodies[1])
    )
    model.graph.output[0].name = "z"
    with pytest.raises(ModelError, match=r"branches or loops \(If\).*onnxsim"):
        source(model)


def test_a_parameter_is_no_batch() -> None:
    """A bias that the file turns to [1, C, 1, 1], in a file for one image."""
    model = Network().model()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    conv = nodes(model, "Conv")[0]
    shape = numpy_helper.from_array(np.array([1, 16, 1, 1]), "shape")
    model.graph.initializer.append(shape)
    where = list(model.graph.node).index(conv)
    added = [
        helper.make_node("Reshape", ["conv.b", "shape"], ["turned"]),
        helper.make_node("Add", ["plain", "turned"], ["conv"]),
    ]
    del conv.input[2:]
    conv.output[0] = "plain"
    for place, node in enumerate(added, where + 1):
        model.graph.node.insert(place, node)
    given = source(Network().model()).model
    np.testing.assert_allclose(
        graph.run(source(model).model, pixels(), optimize=False),
        graph.run(given, pixels(), optimize=False),
        atol=0.01,
    )


def test_ends_of_a_reference() -> None:
    quantized = qdq_file.canonical(source(Network(np.uint8, end="Softmax").model()).model)
    plain = qdq_file.canonical(source(Network(np.uint8).model()).model)
    assert onnx_ends.gives_probabilities(quantized.graph)
    assert not onnx_ends.gives_probabilities(plain.graph)
    logits = graph.run(plain, pixels())
    onnx_ends.end_alike(plain, quantized, cut=False)
    powers = np.exp(logits)
    expected = powers / powers.sum(1, keepdims=True)
    np.testing.assert_allclose(graph.run(plain, pixels()), expected, atol=1e-6)
    onnx_ends.end_alike(plain, quantized, cut=True)
    np.testing.assert_allclose(graph.run(plain, pixels()), logits, atol=1e-6)
