"""A network and its ONNX graph compute the same, at any batch, with names that last."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from resq_deploy.errors import ModelError
from resq_deploy.export import fold, graph
from tests.helpers import SHAPE, ZOO, Attention, Residual, exported


@pytest.mark.parametrize("kind", ZOO)
def test_stock_onnx_runtime_agrees_with_torch_at_any_batch(kind: type[nn.Module]) -> None:
    module, model = exported(kind)
    onnx.checker.check_model(model, full_check=True)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    for batch in (1, 2, 5):
        x = torch.rand(batch, *SHAPE)
        with torch.no_grad():
            expected = module(x).numpy()
        (found,) = session.run(None, {"input": x.numpy()})
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_names_are_those_of_the_modules() -> None:
    _, model = exported(Residual)
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    assert list(nodes["stem"].input)[1:] == ["stem.weight", "stem.bias"]
    assert list(nodes["fc"].input)[1:] == ["fc.weight", "fc.bias"]
    assert list(nodes["stem"].output) == ["stem.out"]
    assert {"preprocess.sub", "preprocess.div", "a", "b", "skip", "c", "average"} <= nodes.keys()
    assert [value.name for value in model.graph.input] == ["input"]
    assert [value.name for value in model.graph.output] == ["logits"]
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", *SHAPE]


def test_batch_norm_is_folded_and_pools_are_pools() -> None:
    ops = [node.op_type for node in exported(Residual)[1].graph.node]
    assert "BatchNormalization" not in ops
    assert "ReduceMean" not in ops
    assert ops.count("GlobalAveragePool") == 1


def test_preprocessing_stays_outside_a_convolution_that_pads() -> None:
    module, model = exported(Residual)
    ops = [node.op_type for node in model.graph.node]
    assert ops[:3] == ["Sub", "Div", "Conv"]
    plain = graph.to_onnx(
        graph.Preprocessed(module.get_submodule("network"), (0.0,), (1.0,)), SHAPE, name="net"
    )
    assert plain.graph.node[0].op_type == "Conv"


def test_parameters_that_happen_to_be_equal_are_not_shared() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(256, 256), nn.Linear(256, 3)
            nn.init.constant_(self.a.weight, 0.01)
            self.c = nn.Linear(256, 256)
            self.c.load_state_dict(self.a.state_dict())

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.b(self.c(torch.relu(self.a(x.flatten(1)))))
            return out

    names = {t.name for t in exported(Twins)[1].graph.initializer}
    assert {"a.weight", "c.weight", "a.bias", "c.bias"} <= names


def test_a_linear_layer_of_tokens_keeps_its_name() -> None:
    _, model = exported(Attention)
    arrays = fold.initializers(model.graph)
    nodes = {node.name: node for node in model.graph.node}
    assert nodes["qkv"].op_type == "MatMul"
    assert list(arrays["qkv.weight"].dims) == [32, 96]
    assert {"qkv.bias", "place", "norm1.weight", "mlp.0.weight"} <= arrays.keys()


@pytest.mark.parametrize("opset", [17, 21])
def test_opsets(opset: int) -> None:
    _, model = exported(Residual, opset)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]


def test_an_unknown_opset_is_refused() -> None:
    with pytest.raises(ModelError, match="opset 12"):
        exported(Residual, 12)


SCRIPT = """
import hashlib
from tests.helpers import Residual, exported
print(hashlib.sha256(exported(Residual)[1].SerializeToString(deterministic=True)).hexdigest())
"""


def test_another_process_in_another_place_writes_the_same_bytes(tmp_path: Path) -> None:
    here = exported(Residual)[1].SerializeToString(deterministic=True)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-1] == hashlib.sha256(here).hexdigest()
    assert str(root).encode() not in here


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(1)
        return flat if flat.sum() > 0 else -flat


class Drawing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) + torch.rand_like(x.flatten(1))


@pytest.mark.parametrize(
    ("kind", "message"), [(Branching, "cannot export"), (Drawing, "differs from the torch network")]
)
def test_networks_that_have_no_static_graph_are_refused(
    kind: type[nn.Module], message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        exported(kind)
    assert caught.value.hint


def test_folding_leaves_what_depends_on_the_input() -> None:
    helper = onnx.helper
    graph_proto = helper.make_graph(
        [
            helper.make_node("Constant", [], ["two"], value_float=2.0),
            helper.make_node("Mul", ["w", "two"], ["doubled"]),
            helper.make_node("Shape", ["x"], ["size"], start=1),
            helper.make_node("ReduceProd", ["size"], ["count"], keepdims=0),
            helper.make_node("Cast", ["count"], ["number"], to=onnx.TensorProto.FLOAT),
            helper.make_node("Mul", ["x", "doubled"], ["scaled"]),
            helper.make_node("Div", ["scaled", "number"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4])],
        [onnx.numpy_helper.from_array(np.arange(4, dtype=np.float32), "w")],
    )
    model = helper.make_model(graph_proto, opset_imports=[helper.make_opsetid("", 20)])
    model.ir_version = 9
    fold.fold_constants(model)
    assert [node.op_type for node in model.graph.node] == ["Mul", "Div"]
    arrays = {k: onnx.numpy_helper.to_array(v) for k, v in fold.initializers(model.graph).items()}
    np.testing.assert_array_equal(arrays["w"], [0, 2, 4, 6])
    assert arrays["number"] == 4
