"""JSON from outside, read so that whatever was read can be written again."""

from __future__ import annotations

import json
import math
from typing import Any


def loads(content: bytes) -> Any:
    """The value in these bytes (UTF-8).

    Raises ValueError for what is no JSON, or is JSON that two readers may see differently: a key that is there twice,
    NaN and infinities (also 1e999), lone surrogates, nesting without end.
    """
    try:
        value = json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is no number")
    return value
