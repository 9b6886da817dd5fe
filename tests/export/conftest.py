"""Settings of the tests of exports."""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Callable, Iterator
from functools import wraps

import onnx
import pytest
import torch

from resq_deploy.export import graph


@pytest.fixture(scope="session", autouse=True)
def traced_once() -> Iterator[None]:
    """Torch traces a network for seconds: one with the same pickle is traced once, but for `traced_anew`."""
    trace: Callable[..., onnx.ModelProto] = graph._exported
    known = dict[str, bytes]()

    @wraps(trace)
    def remembered(
        module: graph.Preprocessed, shape: tuple[int, int, int], opset: int
    ) -> onnx.ModelProto:
        try:
            torch.save(module, content := io.BytesIO())
        except Exception:  # classes inside functions, programs: pickle raises many kinds
            return trace(module, shape, opset)
        key = hashlib.sha256(repr((shape, opset)).encode() + content.getvalue()).hexdigest()
        if key not in known:
            known[key] = trace(module, shape, opset).SerializeToString()
        made: onnx.ModelProto = onnx.ModelProto.FromString(known[key])
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_exported", remembered)
        yield


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is exported is traced again."""
    monkeypatch.setattr(graph, "_exported", inspect.unwrap(graph._exported))
