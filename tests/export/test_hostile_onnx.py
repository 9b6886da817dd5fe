"""Whoever is given the path of a graph reads it with read_onnx: nothing in it leads to another file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from resq_deploy import onnx_file
from resq_deploy.bundle import INT8, Bundle
from resq_deploy.errors import IntegrityError
from resq_deploy.export.twin import Twin
from resq_deploy.memory import fault_space
from resq_deploy.runtime.ort import OrtRunner
from tests.bundles import write_bundle


def _unverified(path: Path) -> Any:
    """As somebody opens a bundle who said that it need not be checked."""
    return OrtRunner.open(Bundle.open(path.parent, verify=False))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "net.resq").path / INT8


@pytest.mark.parametrize("read", [fault_space, Twin, _unverified])
def test_weights_in_another_file_are_refused(graph: Path, read: Callable[[Path], Any]) -> None:
    read(graph)
    model = onnx.load(graph)
    weight = next(t for t in model.graph.initializer if t.dims)
    (graph.parent / "secret").write_bytes(weight.raw_data)
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="secret")
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(IntegrityError, match="refers to another file"):
        read(graph)


@pytest.mark.parametrize("read", [fault_space, Twin, _unverified])
def test_too_large_a_file_is_not_read(
    graph: Path, read: Callable[[Path], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_LIMIT", graph.stat().st_size - 1)
    with pytest.raises(IntegrityError, match="too large"):
        read(graph)


@pytest.mark.parametrize("read", [fault_space, Twin])
def test_what_is_no_graph_is_refused(tmp_path: Path, read: Callable[[Path], Any]) -> None:
    (tmp_path / "x.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(IntegrityError, match="not an ONNX file"):
        read(tmp_path / "x.onnx")
    with pytest.raises(IntegrityError, match="cannot be read"):
        read(tmp_path / "nowhere.onnx")
