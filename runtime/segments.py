"""A lowered graph cut into a chain of small ONNX Runtime sessions, one for each layer.

A session packs its weights when it is made, and what it packed is what runs: bytes changed later are
not noticed. So a fault rebuilds the one session whose weights it changes; the others stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from resq_deploy.errors import ExecutionError
from resq_deploy.runtime.cpu import suited
from resq_deploy.runtime.forms import Lowered, opsets
from resq_deploy.runtime.graph import Arrays, attributes

Tensors = dict[str, NDArray[Any]]
# Float kernels that sum in an order that may depend on the number of rows they are given.
_ROW_SENSITIVE = frozenset({"Gemm", "MatMul"})
_TYPES = {
    "tensor(float)": onnx.TensorProto.FLOAT,
    "tensor(uint8)": onnx.TensorProto.UINT8,
    "tensor(int8)": onnx.TensorProto.INT8,
    "tensor(int32)": onnx.TensorProto.INT32,
    "tensor(int64)": onnx.TensorProto.INT64,
    "tensor(bool)": onnx.TensorProto.BOOL,
}


@dataclass(frozen=True)
class Segment:
    """Consecutive nodes of a lowered graph, from node `begin` on; tensors go in and out."""

    nodes: tuple[onnx.NodeProto, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    types: Mapping[str, int]
    opsets: tuple[onnx.OperatorSetIdProto, ...]
    begin: int = 0

    @cached_property
    def params(self) -> tuple[str, ...]:
        """Names of the parameters it may read: inputs of its nodes that nothing in it makes."""
        made = {name for node in self.nodes for name in node.output} | set(self.inputs)
        read = dict.fromkeys(name for node in self.nodes for name in node.input if name)
        return tuple(name for name in read if name not in made)

    @cached_property
    def row_sensitive(self) -> bool:
        """Whether bits of a result may depend on how many images are run together."""
        return any(node.op_type in _ROW_SENSITIVE for node in self.nodes)

    def model(self, arrays: Arrays, inputs: Sequence[str] = ()) -> onnx.ModelProto:
        """As a model with these parameters; those named in `inputs` are asked for at each run."""
        nodes, folded = fold(self.nodes, {n: arrays[n] for n in self.params if n not in inputs})
        used = {name for node in nodes for name in node.input}
        inits = [numpy_helper.from_array(v, k) for k, v in folded.items() if k in used]
        types = {
            **self.types,
            **{n: helper.np_dtype_to_tensor_dtype(arrays[n].dtype) for n in inputs},
        }
        graph = helper.make_graph(
            nodes,
            "segment",
            [helper.make_tensor_value_info(n, types[n], None) for n in (*self.inputs, *inputs)],
            [helper.make_tensor_value_info(n, types[n], None) for n in self.outputs],
            inits,
        )
        return suited(helper.make_model(graph, opset_imports=self.opsets, ir_version=9))

    def build(self, arrays: Arrays) -> ort.InferenceSession:
        """A session with these parameters packed into it."""
        return open_session(self.model(arrays).SerializeToString(), session_options(1))


def fold(
    nodes: Iterable[onnx.NodeProto], arrays: Mapping[str, NDArray[Any]]
) -> tuple[list[onnx.NodeProto], Tensors]:
    """Do Transpose, Reshape and Concat of parameters now, faster than ONNX Runtime's folding."""
    known, left = dict(arrays), []
    for node in nodes:
        if node.op_type == "Transpose" and node.input[0] in known:
            perm = attributes(node)["perm"]
            known[node.output[0]] = np.ascontiguousarray(known[node.input[0]].transpose(perm))
        elif node.op_type == "Reshape" and all(name in known for name in node.input):
            shape = known[node.input[1]]
            known[node.output[0]] = known[node.input[0]].reshape(shape.tolist())
        elif node.op_type == "Concat" and all(name in known for name in node.input):
            some = [known[name] for name in node.input]
            known[node.output[0]] = np.concatenate(some, axis=attributes(node)["axis"])
        else:
            left.append(node)
    return left, known


def session_options(threads: int, *, fuse: bool = False) -> ort.SessionOptions:
    """Options of every session; unless `fuse`, no Q/DQ is fused that `lower` did not fuse."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_quant_qdq", "0" if fuse else "1")
    return options


def open_session(model: bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    """A CPU session. Raises ExecutionError where ONNX Runtime refuses the model."""
    try:
        return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExecutionError(f"ONNX Runtime refuses the model: {error}") from error


def cut(lowered: Lowered, starts: Sequence[int], types: Mapping[str, int]) -> tuple[Segment, ...]:
    """Cut a lowered graph before the nodes at these places; `types` as from `tensor_types`."""
    bounds = [0, *sorted({s for s in starts if s}), len(lowered.nodes)]
    spans = list(pairwise(bounds))
    counts = _counts(lowered, types)
    parts = [_with_counts(lowered.nodes[begin:end], counts) for begin, end in spans]
    made, read = _uses(parts, counts)
    ends = {o.name for o in lowered.graph.outputs}
    versions = tuple(opsets(lowered.graph))
    segments = []
    for index, nodes in enumerate(parts):
        here = [name for node in nodes for name in node.output if name]
        wanted = dict.fromkeys(name for node in nodes for name in node.input)
        outside = [n for n in wanted if n in types and n not in here and made.get(n, -1) < index]
        out = [n for n in here if n not in counts and (read.get(n, -1) > index or n in ends)]
        begin = spans[index][0]
        segments.append(Segment(nodes, tuple(outside), tuple(out), types, versions, begin))
    return tuple(segments)


def _counts(lowered: Lowered, types: Mapping[str, int]) -> dict[str, onnx.NodeProto]:
    """Integers that say how many images there are, and the nodes that make them.

    They follow from the graph's input alone; each segment makes those that it needs itself.
    """
    inputs = {i.name for i in lowered.graph.inputs}
    found: dict[str, onnx.NodeProto] = {}
    for node in lowered.nodes:
        variable = [n for n in node.input if n and n not in lowered.arrays]
        known = variable and all(n in found for n in variable)
        counted = types.get(node.output[0]) == onnx.TensorProto.INT64
        if (node.op_type == "Shape" and node.input[0] in inputs) or (known and counted):
            found.update(dict.fromkeys(node.output, node))
    return found


def _with_counts(
    nodes: Sequence[onnx.NodeProto], counts: Mapping[str, onnx.NodeProto]
) -> tuple[onnx.NodeProto, ...]:
    made = {name for node in nodes for name in node.output}
    extra: list[onnx.NodeProto] = []

    def need(names: Iterable[str]) -> None:
        for name in names:
            if name in counts and name not in made:
                need(counts[name].input)
                made.update(counts[name].output)
                extra.append(counts[name])

    for node in nodes:
        need(node.input)
    return (*extra, *nodes)


def _uses(
    parts: Sequence[Sequence[onnx.NodeProto]], counts: Mapping[str, onnx.NodeProto]
) -> tuple[dict[str, int], dict[str, int]]:
    """Tensor -> the segment that makes it, and the last one that reads it."""
    made: dict[str, int] = {}
    read: dict[str, int] = {}
    for index, nodes in enumerate(parts):
        for node in nodes:
            made.update({n: index for n in node.output if n not in counts})
            read.update(dict.fromkeys(node.input, index))
    return made, read


def tensor_types(lowered: Lowered) -> dict[str, int]:
    """Element types of all tensors of a lowered graph, as ONNX Runtime infers them."""
    model = lowered.model()
    have = {o.name for o in model.graph.output}
    names = [n for node in lowered.nodes for n in node.output if n and n not in have]
    model.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names)
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    session = open_session(model.SerializeToString(), options)
    infos = (*session.get_inputs(), *session.get_outputs())
    return {info.name: _TYPES.get(info.type, onnx.TensorProto.UNDEFINED) for info in infos}


def run_segment(segment: Segment, session: ort.InferenceSession, live: Tensors) -> Tensors:
    """The outputs of one segment."""
    feed = {name: live[name] for name in segment.inputs}
    outputs = session.run(segment.outputs, feed)
    return dict(zip(segment.outputs, outputs, strict=True))
