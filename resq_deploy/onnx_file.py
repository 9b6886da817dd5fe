"""Reading an ONNX file that somebody else wrote: nothing in it may lead to another file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError, Message  # type: ignore[import-untyped]

from resq_deploy.errors import IntegrityError

_LIMIT = 2**31 - 1  # bytes: what protobuf can hold
_CURE = "export the model again"
_FILE_OPS = frozenset({"EPContext"})  # operators that name a file for the engine to load


def read_onnx(path: str | os.PathLike[str]) -> onnx.ModelProto:
    """A graph with all its tensors inside the file.

    Raises IntegrityError for a file that is no ONNX graph, is over 2 GiB, or refers to another file: a tensor with
    external data (the engine would open whatever path stands there), or an operator that loads a compiled context.
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
    if where := next(_outside(model), ""):
        raise IntegrityError(f"{file} refers to another file, in {where[:80]}", _CURE)
    return model


def _outside(message: Message) -> Iterator[str]:
    """Names of everything in a graph, its subgraphs and its functions that is kept in another file."""
    if isinstance(message, onnx.TensorProto):
        if message.data_location == onnx.TensorProto.EXTERNAL or message.external_data:
            yield f"tensor {message.name!r}"
        return
    if isinstance(message, onnx.NodeProto) and message.op_type in _FILE_OPS:
        yield f"operator {message.op_type}"
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in _parts(value):
                yield from _outside(part)


def _parts(value: Any) -> Iterator[Message]:
    if isinstance(value, Message):
        yield value
    else:
        yield from (part for part in value if isinstance(part, Message))
