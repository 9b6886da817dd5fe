"""Look into a torch.export archive before torch reads it: torch unpickles, evaluates and loads what it finds there.

torch.export.load calls pickle on weights that say so and on opaque constants, sympy's eval on size expressions, exec on
guards, getattr along operator names, and loads compiled libraries. An honest classifier needs none of the
dangerous forms, so what is not known to be harmless is named here and refused by the caller.
"""

from __future__ import annotations

import ast
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_OPERATOR = re.compile(
    r"torch\.ops\.(aten|prims|prim|higher_order|torchvision)\.\w+(\.\w+)?"
    r"|(_operator|operator|math)\.\w+|torch\._?sym_\w+"
)
_SYMBOL = re.compile(r"[a-z]{1,2}\d+")
_FUNCTIONS = frozenset(
    {
        *("Symbol", "Integer", "Float", "Rational", "Max", "Min", "Mod", "PythonMod", "FloorDiv"),
        *("CleanDiv", "CeilToInt", "floor", "ceiling", "Add", "Mul", "Pow", "Eq", "Ne", "Lt", "Le"),
        *("Gt", "Ge", "IntTrueDiv", "ModularIndexing", "And", "Or", "Not", "Piecewise", "true"),
        *("positive", "integer", "nonnegative", "L"),
    }
)
_MEMBERS = frozenset({"size", "stride", "storage_offset", "shape"})
_NODES = (
    *(ast.Expression, ast.Call, ast.Name, ast.Constant, ast.keyword, ast.Load, ast.BinOp),
    *(ast.UnaryOp, ast.Compare, ast.BoolOp, ast.operator, ast.unaryop, ast.cmpop, ast.boolop),
    *(ast.Attribute, ast.Subscript, ast.Tuple),
)


def danger(file: Path) -> str:
    """What in an archive would run code when torch.export reads it; an empty text if nothing would.

    Raises zipfile.BadZipFile, ValueError or KeyError for an archive that is damaged.
    """
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        if len({name.lower() for name in names}) < len(names):
            return "two files of one name"  # readers differ in which of them they take
        for name in names:
            if "opaque_obj" in name or "custom_obj" in name:
                return f"a pickled object, {name}"
            if "aotinductor" in name:
                return f"a compiled library, {name}"
            if name.endswith(".pt") and not _is_tensors(archive.read(name)):
                return f"a pickled object, {name}"
            if name.endswith(".json"):
                for found in _in_json(json.loads(archive.read(name))):
                    return found
    return ""


def _is_tensors(data: bytes) -> bool:
    try:
        torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # truncated, pickled, anything: not tensors
        return not data
    return True


def _in_json(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _in_json(item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _suspect(key, item)
            yield from _in_json(item)


def _suspect(key: str, value: Any) -> Iterator[str]:
    if key == "use_pickle" and value:
        yield "weights as pickled objects"
    if key == "expr_str" and not is_arithmetic(str(value)):
        yield f"an expression that is not arithmetic, {str(value)[:60]!r},"
    if key == "guards_code":
        yield from (f"a guard, {str(g)[:60]!r}," for g in value if not is_arithmetic(str(g)))
    if key == "range_constraints":
        yield from (f"a size named {name[:60]!r}" for name in value if not is_arithmetic(name))
    if key == "target" and isinstance(value, str) and not _OPERATOR.fullmatch(value):
        yield f"a call of {value[:60]}"


def is_arithmetic(text: str) -> bool:
    """Whether an expression is arithmetic over sizes: known functions and symbols, no text but a symbol's name."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    named = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            named.update(id(a) for a in node.args[:1] if node.func.id == "Symbol")
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
            named.add(id(node.slice))
    return all(_is_plain(node, id(node) in named) for node in ast.walk(tree))


def _is_plain(node: ast.AST, names_something: bool) -> bool:
    if isinstance(node, ast.Name):
        return node.id in _FUNCTIONS or _SYMBOL.fullmatch(node.id) is not None
    if isinstance(node, ast.Attribute):
        return node.attr in _MEMBERS
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return names_something and node.value.isidentifier()
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int | float)
    return isinstance(node, _NODES)
