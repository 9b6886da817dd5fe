"""Small edits of an ONNX graph: look-ups, and folding all that does not depend on the input into initializers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[Any]

_SMALL = 64  # elements; what describes shapes is smaller
_RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"})
_KEPT = frozenset({"QuantizeLinear", "DequantizeLinear", "If", "Loop", "Scan"})


def initializers(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    """Name -> initializer."""
    return {tensor.name: tensor for tensor in graph.initializer}


def inputs(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """What a graph is given when it runs: older files list their initializers as inputs too."""
    held = initializers(graph)
    return [value for value in graph.input if value.name not in held]


def producers(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Tensor name -> the node that computes it."""
    return {name: node for node in graph.node for name in node.output if name}


def consumers(graph: onnx.GraphProto) -> dict[str, list[tuple[onnx.NodeProto, int]]]:
    """Tensor name -> the (node, input position) pairs that read it, in graph order."""
    found: dict[str, list[tuple[onnx.NodeProto, int]]] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name:
                found.setdefault(name, []).append((node, position))
    return found


def replace(field: Any, values: Iterable[Any]) -> None:
    """Set a repeated field of a protobuf message."""
    items = list(values)
    del field[:]
    field.extend(items)


def compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same message in memory of its own: what is overwritten in a protobuf stays for as long as its arena.

    An INT8 graph of 11 MB that was made by replacing the weights of a copy took 64.
    """
    made: onnx.ModelProto = onnx.ModelProto.FromString(model.SerializeToString())
    return made


def shapes(model: onnx.ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Shapes of all tensors as far as they can be inferred; None for a dimension that is not fixed."""
    graph = onnx.shape_inference.infer_shapes(_without_weights(model), data_prop=True).graph
    found: dict[str, tuple[int | None, ...]] = {t.name: tuple(t.dims) for t in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if kind.HasField("shape"):
            found[value.name] = tuple(
                d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim
            )
    return found


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose large initializers are inputs: shape inference copies a model more than once."""
    graph = model.graph
    large = [t for t in graph.initializer if np.prod(t.dims) > _SMALL]
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    light.functions.extend(model.functions)
    light.graph.node.extend(graph.node)
    light.graph.input.extend(graph.input)
    light.graph.output.extend(graph.output)
    light.graph.initializer.extend(t for t in graph.initializer if np.prod(t.dims) <= _SMALL)
    light.graph.input.extend(
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in large
    )
    return light


def plain_products(graph: onnx.GraphProto) -> None:
    """Gemms x W + b of float constants, in place: alpha goes into W, beta into b, which becomes one value an output."""
    arrays, reads = initializers(graph), consumers(graph)
    for node in graph.node:
        held = [arrays[name] for name in node.input[1:] if name in arrays]
        if node.op_type != "Gemm" or len(held) < len(node.input) - 1:
            continue
        given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        outputs = held[0].dims[0 if given.get("transB", 0) else 1]
        factors = [given.get("alpha", 1.0), given.get("beta", 1.0)]
        for position, (tensor, factor) in enumerate(zip(held, factors, strict=False), 1):
            old = numpy_helper.to_array(tensor)
            value = old if factor == 1 else (old * factor).astype(old.dtype)
            if position == 2 and old.size in (1, outputs) and (1, *old.shape)[-1] == old.size:
                value = np.broadcast_to(value.reshape(-1), (outputs,))
            if factor == 1 and value.shape == old.shape:
                continue
            if len(reads[tensor.name]) > 1:
                tensor = graph.initializer.add()
                tensor.name = node.input[position] = f"{node.input[position]}.{node.output[0]}"
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
        replace(node.attribute, [a for a in node.attribute if a.name not in ("alpha", "beta")])


def drop_unused(graph: onnx.GraphProto) -> None:
    """Remove, in place, nodes and initializers that no output needs; initializers come out in order of use."""
    needed = {output.name for output in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            kept.append(node)
            needed.update(node.input)
    replace(graph.node, reversed(kept))
    order = {name: None for node in graph.node for name in node.input}
    order.update((output.name, None) for output in graph.output)
    place = {name: number for number, name in enumerate(order)}
    kept_tensors = [
        t for t in graph.initializer if t.name in place
    ]  # two of a name: for the checker
    replace(graph.initializer, sorted(kept_tensors, key=lambda t: place[t.name]))


def fold_constants(model: onnx.ModelProto) -> None:
    """Replace, in place, everything that does not depend on the input by its value, until nothing changes.

    Sizes that are known although the batch is not count as constants. A value made of one
    parameter only (a transposed weight) keeps that parameter's name.
    """
    lift_constants(model.graph)
    while _fold_once(model):
        pass
    drop_unused(model.graph)


def lift_constants(graph: onnx.GraphProto) -> None:
    """Constant nodes become initializers, in place."""
    kept = []
    for node in graph.node:
        if node.op_type == "Constant":
            graph.initializer.append(
                numpy_helper.from_array(_constant(node.attribute[0]), node.output[0])
            )
        else:
            kept.append(node)
    replace(graph.node, kept)


def _constant(attribute: onnx.AttributeProto) -> Array:
    value = helper.get_attribute_value(attribute)
    if attribute.name == "value":
        return numpy_helper.to_array(value)
    return np.asarray(value, dtype=np.float32 if "float" in attribute.name else np.int64)


def _fold_once(model: onnx.ModelProto) -> bool:
    """Evaluate every node that depends on constants only; whether there was one."""
    graph = model.graph
    known = _static_sizes(model)
    ready = _constant_nodes(graph)
    if not ready and not known:
        return False
    gone = {node.output[0] for node in ready} | set(known)
    outside = [node for node in graph.node if node.output[0] not in gone]
    used = {name for node in outside for name in node.input}
    used.update(output.name for output in graph.output)
    wanted = sorted({name for node in ready for name in node.output} & used)
    values = {**known, **evaluate(model, ready, wanted)}
    names = _inherited(graph, ready, wanted, used)
    replace(graph.node, outside)
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
    stale = set(names.values())
    replace(graph.initializer, [t for t in graph.initializer if t.name not in stale])
    for name, value in values.items():
        graph.initializer.append(numpy_helper.from_array(value, names.get(name, name)))
    drop_unused(graph)
    return True


def _constant_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    constants, ready = set(initializers(graph)), list[onnx.NodeProto]()
    for node in graph.node:
        inside = all(name in constants for name in node.input if name)
        if inside and node.op_type not in _RANDOM | _KEPT:
            ready.append(node)
            constants.update(node.output)
    return ready


def _static_sizes(model: onnx.ModelProto) -> dict[str, Array]:
    """Values of the Shape nodes whose dimensions are all known."""
    if not any(node.op_type == "Shape" for node in model.graph.node):
        return {}
    inferred, found = shapes(model), dict[str, Array]()
    for node in model.graph.node:
        shape = inferred.get(node.input[0]) if node.op_type == "Shape" else None
        if shape is not None:
            limits = {a.name: a.i for a in node.attribute}
            dims = shape[limits.get("start", 0) : limits.get("end", len(shape))]
            if None not in dims:
                found[node.output[0]] = np.asarray(dims, dtype=np.int64)
    return found


def evaluate(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], wanted: Sequence[str]
) -> dict[str, Array]:
    """Values of tensors that `nodes` compute from initializers alone, by ONNX Runtime without optimization."""
    if not wanted:
        return {}
    import onnxruntime as ort

    needed = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "constants",
        [],
        [onnx.ValueInfoProto(name=name) for name in wanted],
        [t for t in model.graph.initializer if t.name in needed],
    )
    small = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = ort.InferenceSession(
        small.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return dict(zip(wanted, session.run(list(wanted), {}), strict=True))


def _inherited(
    graph: onnx.GraphProto, nodes: Sequence[onnx.NodeProto], wanted: Sequence[str], used: set[str]
) -> Mapping[str, str]:
    """Folded tensor -> name of the one float parameter that it alone is made of."""
    floats = {
        t.name
        for t in graph.initializer
        if t.data_type == onnx.TensorProto.FLOAT and np.prod(t.dims) > 1
    }
    origins: dict[str, set[str]] = {name: {name} for name in floats}
    for node in nodes:
        merged = set().union(*(origins.get(name, set()) for name in node.input))
        origins.update((name, merged) for name in node.output)
    found = {name: next(iter(origins[name])) for name in wanted if len(origins[name]) == 1}
    sources = list(found.values())
    return {k: v for k, v in found.items() if v not in used and sources.count(v) == 1}
