"""Small graphs, and what the twin and ONNX Runtime make of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from resq_deploy import networks
from resq_deploy.export import graph


def run_ort(
    model: onnx.ModelProto, feed: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> list[NDArray[Any]]:
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    have = {output.name for output in wide.graph.output}
    wide.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in have)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(
        wide.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    found: list[NDArray[Any]] = session.run(list(names), dict(feed))
    return found


def artifact(model: onnx.ModelProto, images: NDArray[np.float32]) -> NDArray[np.float32]:
    (logits,) = run_ort(model, {model.graph.input[0].name: images}, [model.graph.output[0].name])
    return logits


def logits_of(twin: nn.Module, images: NDArray[np.float32]) -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = twin(torch.from_numpy(images)).numpy()
    return found


def whole(arch: str, args: Mapping[str, Any]) -> graph.Preprocessed:
    """A network of the exporter's own for 3 x 32 x 32, with random weights and statistics of random images."""
    torch.manual_seed(0)
    network = networks.build(arch, input_shape=(3, 32, 32), classes=10, args=args).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(16, 3, 32, 32))
    return graph.Preprocessed(network.eval(), [0.5] * 3, [0.25] * 3).eval()


I64 = np.int64


def pair(scale: float, zero: int) -> onnx.ModelProto:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    constants = [
        numpy_helper.from_array(np.float32(scale), "s"),  # type: ignore[arg-type]
        numpy_helper.from_array(np.int8(zero), "z"),  # type: ignore[arg-type]
    ]
    return model_of(nodes, constants, {"x": ("N", None)})


def model_of(
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[onnx.TensorProto],
    inputs: Mapping[str, Sequence[Any]],
    opset: int = 20,
) -> onnx.ModelProto:
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    output = helper.make_empty_tensor_value_info(nodes[-1].output[0])
    made = helper.make_graph(list(nodes), "g", values, [output], list(constants))
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 9
    return model
