"""An ONNX graph compiled for the twin: nodes in order, Q/DQ pairs fused, constants told from what the input reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

from resq_deploy.errors import ModelError
from resq_deploy.export.twin_elementwise import ELEMENTWISE_OPS
from resq_deploy.export.twin_layers import LAYER_OPS
from resq_deploy.export.twin_ops import Node, unsupported
from resq_deploy.export.twin_resize import RESIZE_OPS
from resq_deploy.export.twin_shapes import SHAPE_OPS

Q, DQ, FAKE = "QuantizeLinear", "DequantizeLinear", "FakeQuantize"
OPS = {**ELEMENTWISE_OPS, **LAYER_OPS, **RESIZE_OPS, **SHAPE_OPS}


@dataclass(frozen=True, slots=True)
class Step:
    """A node to compute.

    `leaves`: the initializers it is a function of (None: it depends on the input); `last`: tensors that nothing
    needs after this step.
    """

    node: Node
    leaves: tuple[str, ...] | None
    last: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """What to compute in which order.

    `fused`: output of a Q that became part of a FakeQuantize -> that node. `known`: all tensor names.
    """

    steps: tuple[Step, ...]
    fused: Mapping[str, Node]
    known: frozenset[str]


def plan(graph: onnx.GraphProto, constants: set[str]) -> Plan:
    """Compile a graph whose initializers are `constants`. Raises ModelError for an operator nobody knows."""
    nodes = [_node(proto) for proto in graph.node]
    for node in nodes:
        if node.op not in OPS and node.op not in (Q, DQ):
            raise unsupported(node)
    nodes, fused = _fuse(nodes, {o.name for o in graph.output})
    leaves: dict[str, tuple[str, ...]] = {name: (name,) for name in constants}
    last = {name: i for i, node in enumerate(nodes) for name in node.inputs if name}
    steps = []
    for i, node in enumerate(nodes):
        constant = _leaves(node, leaves)
        if constant is not None:
            leaves |= dict.fromkeys(node.outputs, constant)
        done = () if constant is not None else tuple({n for n in node.inputs if last.get(n) == i})
        steps.append(Step(node, constant, tuple(n for n in done if n not in leaves)))
    known = {*constants, *fused, *(v.name for v in graph.input)}
    known.update(name for node in nodes for name in node.outputs)
    return Plan(tuple(steps), fused, frozenset(known))


def _leaves(node: Node, leaves: Mapping[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """The initializers that a node's outputs are a function of, None where the input takes part."""
    named = [name for name in node.inputs if name]
    if not all(name in leaves for name in named):
        return None
    return tuple(dict.fromkeys(leaf for name in named for leaf in leaves[name]))


def _fuse(nodes: list[Node], outputs: set[str]) -> tuple[list[Node], dict[str, Node]]:
    """Q whose only readers are DQ of the same scale and zero point become one FakeQuantize; DQ alike share it."""
    readers: dict[str, list[Node]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    fused: dict[str, Node] = {}
    made: list[Node] = []
    for node in nodes:
        after = readers.get(node.outputs[0], [])
        alike = all(r.op == DQ and r.inputs[1:] == node.inputs[1:] for r in after)
        if node.op == Q and after and alike and node.outputs[0] not in outputs:
            joint = Node(node.name, FAKE, node.inputs, after[0].outputs, node.attributes)
            fused[node.outputs[0]] = joint
            made.append(joint)
        elif node.op == DQ and node.inputs[0] in fused:
            first = fused[node.inputs[0]].outputs
            if node.outputs != first:
                made.append(Node(node.name, "Identity", first, node.outputs))
        else:
            made.append(node)
    return made, fused


def _node(proto: onnx.NodeProto) -> Node:
    attributes = {a.name: _attribute(helper.get_attribute_value(a)) for a in proto.attribute}
    if proto.op_type in (Q, DQ) and attributes.get("block_size"):
        raise ModelError(f"{proto.name}: quantization in blocks is not supported")
    name = proto.name or proto.output[0]
    return Node(name, proto.op_type, tuple(proto.input), tuple(proto.output), attributes)


def _attribute(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return torch.from_numpy(np.array(numpy_helper.to_array(value)))
    return value
