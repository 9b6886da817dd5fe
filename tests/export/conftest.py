"""Settings of the tests of exports."""

from __future__ import annotations

import hashlib
import inspect
import io
import os
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps

import onnx
import pytest
import torch

from resq_deploy.export import graph


@pytest.fixture(scope="session", autouse=True)
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Torch traces a network for seconds: one with the same pickle is traced once, but for `traced_anew`.

    Workers of pytest-xdist share what was traced: their folders lie in one of this run.
    """
    trace: Callable[..., onnx.ModelProto] = graph._exported
    base = tmp_path_factory.getbasetemp()
    known = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "traced"
    known.mkdir(exist_ok=True)

    @wraps(trace)
    def remembered(
        module: graph.Preprocessed, shape: tuple[int, int, int], opset: int
    ) -> onnx.ModelProto:
        try:
            torch.save(module, content := io.BytesIO())
        except Exception:  # classes inside functions, programs: pickle raises many kinds
            return trace(module, shape, opset)
        key = hashlib.sha256(repr((shape, opset)).encode() + content.getvalue()).hexdigest()
        if not (file := known / key).exists():
            part = base / key
            part.write_bytes(trace(module, shape, opset).SerializeToString())
            part.replace(file)
        made: onnx.ModelProto = onnx.ModelProto.FromString(file.read_bytes())
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph, "_exported", remembered)
        _list_operators_once(patch)
        yield


def _list_operators_once(patch: pytest.MonkeyPatch) -> None:
    """Half of what tracing a small network takes is that torch reads its operators' sources anew each time."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    listed = staticmethod(lru_cache(ONNXRegistry.from_torchlib))
    patch.setattr(ONNXRegistry, "from_torchlib", listed)


@pytest.fixture
def traced_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is exported is traced again."""
    monkeypatch.setattr(graph, "_exported", inspect.unwrap(graph._exported))
