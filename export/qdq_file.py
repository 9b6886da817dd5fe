"""A Q/DQ graph that somebody else's quantizer wrote: in the form that faults need, listed, and without its rounding.

Nothing that the file computes is changed. Weights that it keeps in float behind a QuantizeLinear (as NNCF and
quantization-aware training write them) become the INT8 codes that an engine makes of them when it loads the file: those
are what lies in the memory of the device, and what faults are for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from resq_deploy import saturation
from resq_deploy.errors import ModelError
from resq_deploy.export import fold, graph, names
from resq_deploy.manifest import FloatOp
from resq_deploy.memory import fault_space

GIVEN = "as in the file"
_DQ, _Q = "DequantizeLinear", "QuantizeLinear"
_BYTES = (TensorProto.INT8, TensorProto.UINT8)
_KNOWN = (*_BYTES, TensorProto.INT16, TensorProto.UINT16, TensorProto.INT32)  # the last: of biases
_SIGNED = (TensorProto.INT8, TensorProto.INT32)
_SIXTEEN_BITS = 21  # the opset that gave Q/DQ codes of 16 bits
_LIMITS: Mapping[Any, tuple[int, int]] = {
    np.dtype(kind): (int(np.iinfo(kind).min), int(np.iinfo(kind).max))
    for kind in (np.int8, np.uint8, np.int16, np.uint16)
}


def canonical(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with every weight as codes, constants as initializers, one name for each node, and no account of origins.

    Raises ModelError for a graph without INT8 weights, with codes of other than 8 or 16 bits (biases: 32), with
    scales that are computed as it runs, or are not positive and finite.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    fold.fold_constants(made)
    _own_domain(made)
    _fold_weights(made)
    names.forget_notes(made)
    unique = names.Unique()
    for node in made.graph.node:
        node.name = unique(node.name or node.op_type.lower())
    _check(made)
    fault_space(made)
    return fold.compact(made)


def listing(model: onnx.ModelProto) -> dict[str, Any]:
    """The manifest's account of a canonical graph: every scale in it, and which nodes have float parameters."""
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    ops = {node.name: node.op_type for node in model.graph.node}
    readers = {n.input[0]: n for n in model.graph.node if n.op_type == _DQ}
    half = any(t.data_type == TensorProto.FLOAT16 for t in model.graph.initializer)
    weights = {}
    for memory in fault_space(model).memories:
        if memory.kind == "weights":
            scale = arrays[readers[memory.name].input[1]].astype(np.float64).reshape(-1)
            axis = _attribute(readers[memory.name], "axis", 1) % max(memory.value.ndim, 1)
            weights[memory.name] = {
                "layer": memory.layer,
                "op": ops.get(memory.layer, ""),
                "shape": memory.value.shape,
                "axis": axis if scale.size > 1 else None,
                "scale": tuple(map(float, scale)),
            }
    return {
        "scheme": "int8-symmetric-qdq" if is_symmetric(model) else "int8-qdq",
        "saturates": saturation.could(model),
        "weights": weights,
        "activations": dict(_activations(model)),
        "float_ops": tuple(_float_ops(model, ops)),
        "high_precision": "fp16" if half else "fp32",
    }


def is_symmetric(model: onnx.ModelProto) -> bool:
    """Whether all codes are signed and all zero points 0, which is what TensorRT takes."""
    arrays = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in (_Q, _DQ):
            zero = arrays.get(node.input[2]) if len(node.input) > 2 else None
            codes = arrays.get(node.input[0])
            if any(t is not None and t.data_type not in _SIGNED for t in (zero, codes)):
                return False
            if zero is not None and numpy_helper.to_array(zero).any():
                return False
            if node.op_type == _Q and _code_type(node, arrays) != np.int8:
                return False
    return True


def without_rounding(model: onnx.ModelProto) -> onnx.ModelProto:
    """The network that a canonical graph rounds, as far as it tells: float arithmetic on its dequantized weights.

    What a Q clips stays clipped: quantizers leave out a Relu where the range of codes ends at 0. Constants that codes
    are padded, joined or compared with become what they stand for. Raises ModelError where that differs by channel.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    held = fold.initializers(made.graph)
    known = [n for n in made.graph.node if n.op_type == _DQ and n.input[0] in held]
    values, shapes = fold.evaluate(made, known, [n.output[0] for n in known]), fold.shapes(model)
    passed, coded = dict[str, str](), dict[str, onnx.NodeProto]()
    kept = []
    for node in made.graph.node:
        if node.output[0] in values:
            continue
        q = node if node.op_type == _Q else next((coded[n] for n in node.input if n in coded), None)
        if q is not None and node.op_type not in (_DQ, "Shape", "Size"):
            coded |= dict.fromkeys(node.output, q)
            if node is not q:
                _meant(made.graph, node, q)
        for position, name in enumerate(node.input):
            node.input[position] = passed.get(name, name)
        if node.op_type == _DQ:
            passed[node.output[0]] = node.input[0]
        elif node.op_type == _Q:
            kept += _clipped(made.graph, node, len(shapes.get(node.input[0], ())))
        else:
            kept.append(node)
    last = made.graph.output[0].name
    if last in passed:
        kept.append(onnx.helper.make_node("Identity", [passed[last]], [last], name=f"{last}.float"))
    fold.replace(made.graph.node, kept)
    made.graph.initializer.extend(numpy_helper.from_array(v, n) for n, v in values.items())
    fold.drop_unused(made.graph)
    return fold.compact(made)


def _meant(graph: onnx.GraphProto, node: onnx.NodeProto, q: onnx.NodeProto) -> None:
    """Codes among a node's constants become, in place, what they stand for beside those of a Q that it moves."""
    arrays = fold.initializers(graph)
    if node.op_type == "Pad" and not any(node.input[2:3]):  # 0 is a code too, and not always 0
        zero = np.zeros((), onnx.helper.tensor_dtype_to_np_dtype(_code_kind(q, arrays)))
        name = f"{node.output[0]}.pad"
        arrays[name] = graph.initializer.add()
        arrays[name].CopyFrom(numpy_helper.from_array(zero, name))
        fold.replace(node.input, [*node.input[:2], name, *node.input[3:]])
    kind = _code_kind(q, arrays)
    for position, name in enumerate(node.input):
        if name not in arrays or arrays[name].data_type != kind:
            continue
        scale = numpy_helper.to_array(arrays[q.input[1]])
        shift = numpy_helper.to_array(arrays[q.input[2]]) if len(q.input) > 2 else np.zeros(1)
        if np.unique(scale).size > 1 or np.unique(shift).size > 1:
            raise ModelError(
                f"{node.name}: {node.op_type} has codes of its own between channels of several scales",
                "quantize this tensor with one scale",
            )
        codes = numpy_helper.to_array(arrays[name]).astype(np.float64)
        meant = (codes - float(shift.flat[0])) * float(scale.flat[0])
        node.input[position] = f"{node.output[0]}.in{position}"
        tensor = numpy_helper.from_array(meant.astype(scale.dtype), node.input[position])
        graph.initializer.append(tensor)


def _clipped(graph: onnx.GraphProto, q: onnx.NodeProto, rank: int) -> list[onnx.NodeProto]:
    """What a Q of a tensor of this rank (0: unknown) does but for rounding, with the ends of its range as initializers.

    Several ranges of one tensor are those of its channels; the widest is for all where the rank is not known.
    """
    arrays = fold.initializers(graph)
    scale = numpy_helper.to_array(arrays[q.input[1]])  # of the type that is quantized
    low, high = _range(scale, arrays, q)
    ends = [f"{q.output[0]}.low", f"{q.output[0]}.high"]
    apart = rank > 0 and np.unique(low).size + np.unique(high).size > 2
    if apart:
        shape = [1] * rank
        shape[_attribute(q, "axis", 1)] = -1
        bounds = [low.reshape(shape), high.reshape(shape)]
    else:
        bounds = [low.min(), high.max()]
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value).astype(scale.dtype), name)
        for value, name in zip(bounds, ends, strict=True)
    )
    if not apart:
        return [onnx.helper.make_node("Clip", [q.input[0], *ends], [q.output[0]], name=q.name)]
    above = f"{q.output[0]}.above"
    return [
        onnx.helper.make_node("Max", [q.input[0], ends[0]], [above], name=f"{q.name}.max"),
        onnx.helper.make_node("Min", [above, ends[1]], [q.output[0]], name=f"{q.name}.min"),
    ]


def _range(
    scale: NDArray[Any], arrays: Mapping[str, onnx.TensorProto], q: onnx.NodeProto
) -> tuple[NDArray[Any], NDArray[Any]]:
    """The least and the largest value that the codes of a Q stand for, float64, one for each scale."""
    low, high = _LIMITS.get(_code_type(q, arrays), (-128, 127))
    given = numpy_helper.to_array(arrays[q.input[2]]) if len(q.input) > 2 else np.zeros(1)
    shift, wide = given.astype(np.float64).reshape(-1), scale.astype(np.float64).reshape(-1)
    return (low - shift) * wide, (high - shift) * wide


def _code_type(q: onnx.NodeProto, arrays: Mapping[str, onnx.TensorProto]) -> Any:
    """The numpy type of what a Q makes."""
    return onnx.helper.tensor_dtype_to_np_dtype(_code_kind(q, arrays))


def _code_kind(q: onnx.NodeProto, arrays: Mapping[str, onnx.TensorProto]) -> int:
    """What a Q makes: its zero point's type, else what it says, else unsigned."""
    told = _attribute(q, "output_dtype", 0) or TensorProto.UINT8
    return arrays[q.input[2]].data_type if len(q.input) > 2 else told


def _own_domain(model: onnx.ModelProto) -> None:
    """Q/DQ of ONNX Runtime's domain become ONNX's where it has these codes, and no input is an empty name; in place."""
    arrays = {t.name: t.data_type for t in model.graph.initializer}
    wide = graph.opset_of(model) >= _SIXTEEN_BITS
    for node in model.graph.node:
        if node.op_type not in (_Q, _DQ):
            continue
        while node.input and not node.input[-1]:
            node.input.pop()
        kind = arrays.get(node.input[2] if len(node.input) > 2 else node.input[0])
        if wide or kind in (*_BYTES, TensorProto.INT32):
            node.domain = ""


def _fold_weights(model: onnx.ModelProto) -> None:
    """Float weights behind a Q -> codes, in place."""
    graph = model.graph
    held = fold.initializers(graph)
    ready = [
        n for n in graph.node if n.op_type == _Q and all(name in held for name in n.input if name)
    ]
    values = fold.evaluate(model, ready, [n.output[0] for n in ready])
    unique, gone = names.Unique({*held, *fold.producers(graph)}), {n.output[0] for n in ready}
    new = {n.output[0]: unique(f"{n.input[0]}_quantized") for n in ready}
    fold.replace(graph.node, [n for n in graph.node if n.output[0] not in gone])
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = new.get(name, name)
    graph.initializer.extend(numpy_helper.from_array(v, new[n]) for n, v in values.items())
    fold.drop_unused(graph)


def _check(model: onnx.ModelProto) -> None:
    held = fold.initializers(model.graph)
    for node in model.graph.node:
        if node.op_type not in (_Q, _DQ):
            continue
        if any(name not in held for name in node.input[1:] if name):
            raise ModelError(
                f"{node.name}: the scale is computed while the graph runs",
                "quantize it statically, with calibration images",
            )
        for name in (node.input[0], *node.input[2:]):
            if name in held and held[name].data_type not in _KNOWN:
                kind = TensorProto.DataType.Name(held[name].data_type)
                raise ModelError(f"{node.name}: {name} is in {kind}", "quantize it to INT8")
        if node.op_type == _Q and _code_type(node, held) not in _LIMITS:
            raise ModelError(
                f"{node.name}: its codes are {_code_type(node, held).name}", "quantize it to INT8"
            )
        scale = numpy_helper.to_array(held[node.input[1]]).astype(np.float64)
        if not (np.isfinite(scale).all() and (scale > 0).all()):
            raise ModelError(
                f"{node.name}: its scale is not positive and finite", "quantize it again"
            )


def _activations(model: onnx.ModelProto) -> Iterator[tuple[str, dict[str, Any]]]:
    """Tensor -> what quantizes it; the second Q of a tensor is listed as `NAME_1`."""
    arrays = fold.initializers(model.graph)
    unique = names.Unique()
    for node in model.graph.node:
        if node.op_type == _Q:
            scale = numpy_helper.to_array(arrays[node.input[1]]).astype(np.float64)
            low, high = _range(scale, arrays, node)
            zero = numpy_helper.to_array(arrays[node.input[2]]) if len(node.input) > 2 else None
            one = scale.size == 1
            yield (
                unique(node.input[0]),
                {
                    "scale": float(scale.max()),
                    "zero_point": (0 if zero is None else int(zero.reshape(()))) if one else None,
                    "low": float(low.min()),
                    "high": float(high.max()),
                    "method": GIVEN if one else f"{GIVEN}, {scale.size} channels",
                },
            )


def _float_ops(model: onnx.ModelProto, ops: Mapping[str, str]) -> Iterator[FloatOp]:
    """Nodes with parameters that stay float: more than one value, and no bias."""
    seen = set[str]()
    for memory in fault_space(model).memories:
        name = memory.layer
        pixels = name.startswith("preprocess.")
        if memory.kind == "float" and (memory.value.size > 1 or pixels) and name not in seen:
            seen.add(name)
            why = (
                "pixels are normalized in float"
                if pixels
                else "its parameters are float in the file"
            )
            yield FloatOp(node=name, op=ops.get(name, ""), reason=why)


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)
