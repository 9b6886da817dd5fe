"""Names of an exported graph: nodes by module path, tensors by their node, parameters as in the state_dict."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Mapping

import onnx
from onnx import helper

from resq_deploy.export import fold

INPUT = "input"
OUTPUT = "logits"
BATCH = "batch"  # the dimension that is left free

_SCOPES = "pkg.torch.onnx.name_scopes"
_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "Conv": ("", "weight", "bias"),
    "ConvTranspose": ("", "weight", "bias"),
    "Gemm": ("", "weight", "bias"),
    "MatMul": ("", "weight"),
    "BatchNormalization": ("", "weight", "bias", "running_mean", "running_var"),
    "LayerNormalization": ("", "weight", "bias"),
    "GroupNormalization": ("", "weight", "bias"),
    "InstanceNormalization": ("", "weight", "bias"),
    "PRelu": ("", "weight"),
}
# what later steps call things that belong to a tensor: qdq.py, center.py, split.py, halves.py
_LATER = re.compile(
    r"scale|zero_point|quantized?|dequantized?|scaled|centered|by|last|x\d+|half|sum|add|cast"
)


def rename(
    model: onnx.ModelProto,
    prefix: str,
    leaves: Collection[str],
    *,
    own: Mapping[str, str] | None = None,
) -> None:
    """Give every node, tensor and parameter its lasting name, in place.

    A node with a weight is called as the weight's module (`layer1.0.conv1`), and so are its weight and
    bias (`layer1.0.conv1.weight`). Any other node is called as its module if that is one of `leaves`
    and makes no other kind of node, else as module and operation (`layer1.0.add`). `prefix` is what a wrapper
    put before every path; `own`: names of nodes whose module is not known, by what they compute. What a node
    computes is called `NODE.out`. A parameter whose name is taken, or that a later step needs (`input.scale`), gets a
    number.
    """
    graph = model.graph
    _unshare(graph)
    arrays = fold.initializers(graph)
    modules = [_module(node, arrays, prefix) for node in graph.node]
    kinds: dict[str, set[str]] = {}
    for node, module in zip(graph.node, modules, strict=True):
        kinds.setdefault(module, set()).add(node.op_type)
    unique, names = Unique(), {INPUT: INPUT, OUTPUT: OUTPUT, "": ""}
    for node, module in zip(graph.node, modules, strict=True):
        whole = _weight(node, arrays, prefix) or (module in leaves and len(kinds[module]) == 1)
        parts = (module,) if whole else (module, node.op_type.lower())
        if own is not None and not module:
            parts = (own.get(node.output[0]) or node.name or node.op_type.lower(),)
        node.name = unique(".".join(filter(None, parts)))
        for position, name in enumerate(node.output):
            many = str(position) if len(node.output) > 1 else ""
            names.setdefault(name, f"{node.name}.out{many}")
    computed, wanted = set(names.values()) - {""}, dict[str, str]()
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name in arrays and name not in names:
                wanted.setdefault(name, _parameter(node, position, name, prefix))
    known = computed | set(wanted.values())
    for name, good in wanted.items():
        names[name] = unique(good, lambda new: new in computed or _is_later(new, known))
    rename_tensors(graph, names)


def rename_tensors(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    """Rename tensors wherever they are used, in place; names not given stay."""
    for node in graph.node:
        for side in (node.input, node.output):
            for position, name in enumerate(side):
                side[position] = names.get(name, name)
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for value in (*graph.input, *graph.output):
        value.name = names.get(value.name, value.name)
    del graph.value_info[:]


def forget_origin(model: onnx.ModelProto, name: str, opset: int) -> None:
    """Remove, in place, what tells the machine and the exporter: metadata, doc strings, paths, idle opsets.

    The same weights then give the same bytes wherever they are exported.
    """
    forget_notes(model)
    del model.functions[:]
    model.graph.name = name
    model.producer_name, model.producer_version = "resq-deploy", ""
    model.domain, model.model_version = "", 0
    model.ir_version = 8 if opset < 19 else 9 if opset < 21 else 10
    fold.replace(model.opset_import, [helper.make_opsetid("", opset)])


def forget_notes(model: onnx.ModelProto) -> None:
    """Remove, in place, what was only noted beside a graph: exporters write paths and lines of source code there."""
    graph = model.graph
    for thing in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        thing.doc_string = ""
        del thing.metadata_props[:]
    del graph.value_info[:], graph.quantization_annotation[:]


class Unique:
    """Hands out names, each once and none of those `used`: the second `a` is `a_1`."""

    def __init__(self, used: Collection[str] = ()) -> None:
        self._used = set(used)

    def __call__(self, name: str, reserved: Callable[[str], bool] = lambda _: False) -> str:
        found, count = name, 0
        while found in self._used or reserved(found):
            count += 1
            found = f"{name}_{count}"
        self._used.add(found)
        return found


def _is_later(name: str, tensors: Collection[str]) -> bool:
    """Whether a later step may call something of one of these tensors so."""
    while "." in name:
        name, _, word = name.rpartition(".")
        if not _LATER.fullmatch(word):
            return False
        if name in tensors:
            return True
    return False


def _unshare(graph: onnx.GraphProto) -> None:
    """One copy of a parameter for each layer that reads it: in an engine they are separate places in memory.

    Whatever else reads it has another copy, which stays as it is where the layer's is rescaled or quantized.
    """
    seen, arrays = set[str](), fold.initializers(graph)
    parameters = {name for n in graph.node for i, name in enumerate(n.input) if _is_parameter(n, i)}
    for node in graph.node:
        for position, name in enumerate(node.input):
            if name not in arrays or name not in parameters:
                continue
            layer = _is_parameter(node, position)
            if name in seen or not layer:
                copy = f"{name}.{node.output[0]}"
                if copy not in arrays:
                    arrays[copy] = graph.initializer.add()
                    arrays[copy].CopyFrom(arrays[name])
                    arrays[copy].name = copy
                node.input[position] = copy
            if layer:
                seen.add(name)


def _is_parameter(node: onnx.NodeProto, position: int) -> bool:
    return 0 < position < len(_PARAMETERS.get(node.op_type, ()))


def _weight(node: onnx.NodeProto, arrays: Mapping[str, onnx.TensorProto], prefix: str) -> str:
    """Module of the weight that a node computes with, or an empty text."""
    if not _is_parameter(node, 1) or len(node.input) < 2 or node.input[1] not in arrays:
        return ""
    name = node.input[1]
    module = name.removeprefix(prefix).removesuffix(".weight")
    return module if name.startswith(prefix) and name.endswith(".weight") else ""


def _module(node: onnx.NodeProto, arrays: Mapping[str, onnx.TensorProto], prefix: str) -> str:
    """Path of the module that a node came from: its weight's, else the scope that the exporter noted."""
    module = _weight(node, arrays, prefix)
    if module:
        return module
    noted = {entry.key: entry.value for entry in node.metadata_props}.get(_SCOPES, "[]")
    scopes = [str(scope) for scope in ast.literal_eval(noted)]
    scope = scopes[-2] if len(scopes) > 1 else ""
    inside = not scope.startswith("_") and f"{scope}." != prefix
    return scope.removeprefix(prefix) if inside else ""


def _parameter(node: onnx.NodeProto, position: int, name: str, prefix: str) -> str:
    if _is_parameter(node, position):
        return f"{node.name}.{_PARAMETERS[node.op_type][position]}"
    if name.startswith(prefix):
        return name.removeprefix(prefix)
    return name if "." in name else f"{node.name}.in{position}"
