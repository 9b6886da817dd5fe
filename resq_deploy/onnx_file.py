"""Reading an ONNX file that somebody else wrote: nothing in it may lead to another file."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]
from onnx import TensorProto

from resq_deploy.errors import IntegrityError

_LIMIT = 2**31 - 1  # bytes: what protobuf can hold
_CURE, _ONE_FILE = "export the model again", "export the model again, as one .onnx file"
_KINDS: dict[
    int, tuple[str, int]
] = {  # element type -> the field that holds it where raw_data does not, and its bytes
    TensorProto.FLOAT: ("float_data", 4),
    TensorProto.DOUBLE: ("double_data", 8),
    TensorProto.FLOAT16: ("int32_data", 2),
    TensorProto.BFLOAT16: ("int32_data", 2),
    TensorProto.BOOL: ("int32_data", 1),
    TensorProto.INT8: ("int32_data", 1),
    TensorProto.UINT8: ("int32_data", 1),
    TensorProto.INT16: ("int32_data", 2),
    TensorProto.UINT16: ("int32_data", 2),
    TensorProto.INT32: ("int32_data", 4),
    TensorProto.INT64: ("int64_data", 8),
    TensorProto.UINT32: ("uint64_data", 4),
    TensorProto.UINT64: ("uint64_data", 8),
}
_NARROW: dict[int, str] = {  # what other tools quantize to: 8-bit floats, 4 bits and fewer
    kind: name for name, kind in TensorProto.DataType.items() if kind > TensorProto.BFLOAT16
}
_FILE_OPS = frozenset({"EPContext"})  # operators that name a file for the engine to load


def read_onnx(path: str | os.PathLike[str], *, beside: bool = False) -> onnx.ModelProto:
    """A graph with all its tensors inside the file; with `beside`, also those in plain files of the same folder.

    Raises IntegrityError for a file that is no ONNX graph, is over 2 GiB, has a tensor whose size is not what its
    shape says, or whose elements are 8-bit floats or of 4 bits and fewer, has a node without an output, or refers
    to another file: a tensor with external data (the engine would open whatever path stands there), or an operator
    that loads a compiled context.
    """
    file = Path(path)
    try:
        if file.stat().st_size > _LIMIT:
            raise IntegrityError(f"{file} is too large to be an ONNX file", _CURE)
        model = onnx.ModelProto()
        model.ParseFromString(file.read_bytes())
    except OSError as error:
        raise IntegrityError(f"{file} cannot be read: {error.strerror}", _CURE) from error
    except (DecodeError, RuntimeError, ValueError) as error:
        raise IntegrityError(f"{file} is not an ONNX file", _CURE) from error
    if beside:
        _fetch(model, file)
    for wrong, cure in _wrong(model):
        raise IntegrityError(f"{file} {wrong}", cure)
    return model


def _fetch(model: onnx.ModelProto, file: Path) -> None:
    """Read, in place, what initializers keep in files beside this one, as torch's exporter writes them."""
    total = 0
    for tensor in model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        told = {entry.key: entry.value for entry in tensor.external_data}
        place = file.parent / told.get("location", "")
        if place.name != told.get("location") or place.is_symlink() or not place.is_file():
            raise IntegrityError(
                f"{file} keeps {tensor.name[:80]!r} in {told.get('location', '')[:80]!r}, which is no file beside it",
                "copy both files, or save the graph as one",
            )
        try:
            start = int(told.get("offset", 0))
            size = int(told.get("length", place.stat().st_size - start))
            total += size
            if min(start, size) < 0 or total > _LIMIT:
                raise ValueError
            with place.open("rb") as content:
                content.seek(start)
                tensor.raw_data = content.read(size)
        except (OSError, ValueError) as error:
            raise IntegrityError(f"{place} cannot be read", _CURE) from error
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]


def _wrong(message: Message) -> Iterator[tuple[str, str]]:
    """What is wrong anywhere in a graph, its subgraphs and its functions, and what to do about it."""
    if any(isinstance(text, bytes) for text in _texts(message)):
        yield "has a name that is no text", _CURE
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield f"refers to another file, in tensor {message.name[:80]!r}", _ONE_FILE
        elif message.data_type in _NARROW:
            kind = _NARROW[message.data_type]
            yield f"has codes in {kind}, in tensor {message.name[:80]!r}", "quantize it to INT8"
        elif not _is_whole(message):
            yield f"has a tensor {message.name[:80]!r} that is not what its shape says", _CURE
        return
    if isinstance(message, onnx.NodeProto) and not message.output:
        yield f"has a node {message.name[:80]!r} without an output", _CURE
    if isinstance(message, onnx.NodeProto) and message.op_type in _FILE_OPS:
        yield f"refers to another file, in operator {message.op_type}", _CURE
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in _parts(value):
                yield from _wrong(part)


def _texts(message: Message) -> Iterator[str | bytes]:
    """Every string of a message, not of those in it; protobuf gives one that is not UTF-8 as bytes."""
    for field, value in message.ListFields():
        if field.type == field.TYPE_STRING:
            yield from (value,) if isinstance(value, (str, bytes)) else value


def _is_whole(tensor: onnx.TensorProto) -> bool:
    """Whether a tensor is of a type that our graphs have, and holds as many elements as its shape says."""
    kind = _KINDS.get(tensor.data_type)
    if kind is None or any(size < 0 for size in tensor.dims):
        return False
    field, width = kind
    count = math.prod(tensor.dims)
    if tensor.HasField("raw_data"):
        return bool(len(tensor.raw_data) == count * width)
    return bool(len(getattr(tensor, field)) == count)


def _parts(value: Any) -> Iterator[Message]:
    if isinstance(value, Message):
        yield value
    else:
        yield from (part for part in value if isinstance(part, Message))
