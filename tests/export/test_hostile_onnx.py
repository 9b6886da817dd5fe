"""Whoever is given the path of a graph reads it with read_onnx: nothing in it leads to another file."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import onnx
import pytest

from resq_deploy import onnx_file
from resq_deploy.bundle import INT8, Bundle
from resq_deploy.errors import IntegrityError, ModelError
from resq_deploy.export import qdq_file
from resq_deploy.export.load import load_model
from resq_deploy.export.twin import Twin
from resq_deploy.memory import fault_space
from resq_deploy.runtime.ort import OrtRunner
from tests.bundles import write_bundle
from tests.runtime import graphs


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


@pytest.mark.parametrize("read", [fault_space, Twin])
def test_a_name_that_is_no_text_is_refused(graph: Path, read: Callable[[Path], Any]) -> None:
    content = graph.read_bytes()
    name = onnx.load(graph).graph.node[0].input[0].encode()
    graph.write_bytes(content.replace(name, b"\xff" * len(name)))
    with pytest.raises(IntegrityError, match="a name that is no text"):
        read(graph)


OPS = (
    "Relu",
    "QuantizeLinear",
    "DequantizeLinear",
    "Conv",
    "Reshape",
    "Softmax",
    "Identity",
    "Nix",
    "If",
)


def spoil(model: onnx.ModelProto, rng: Random) -> None:
    """One edit that a damaged or malicious file may have."""
    g = model.graph
    node, tensor = rng.choice(g.node), rng.choice(g.initializer)
    match rng.randrange(9):
        case 0 if node.input:
            names = ["", rng.choice(g.node).output[0], tensor.name, "nix"]
            node.input[rng.randrange(len(node.input))] = rng.choice(names)
        case 1:
            node.op_type = rng.choice(OPS)
        case 2:
            g.node.remove(node)
        case 3:
            del node.attribute[:]
        case 4:
            tensor.data_type = rng.choice([0, 1, 2, 3, 6, 7, 9, 10, 11, 16, 22])
        case 5:
            tensor.dims.append(rng.choice([0, 1, -1, 3]))
        case 6:
            g.initializer.remove(tensor)
        case 7:
            node.output[0] = rng.choice(["", "input", "logits", rng.choice(g.node).output[0]])
        case _:
            sizes = g.input[0].type.tensor_type.shape.dim
            sizes[rng.randrange(len(sizes))].dim_value = rng.choice([0, 1, -1, 7, 1000])


@pytest.mark.parametrize("name", ["resnet", "transformer"])
@pytest.mark.parametrize("quantized", [True, False])
def test_a_graph_is_read_or_refused(name: str, quantized: bool, tmp_path: Path) -> None:
    """Nothing but a ModelError comes of a graph that somebody edited, float or quantized."""
    model = graphs.quantized(name) if quantized else graphs.NETS[name](0)
    rng, path, read = Random(7), tmp_path / "net.onnx", 0
    for _ in range(40):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        spoil(copy, rng)
        onnx.save(copy, path)
        with suppress(ModelError):
            loaded = load_model(path, default_shape=lambda: (3, 8, 8))
            if loaded.form == "ONNX":
                loaded.to_onnx()
            else:
                assert loaded.source is not None
                made = qdq_file.canonical(loaded.source.model)
                qdq_file.listing(made)
                qdq_file.without_rounding(made)
            read += 1
    assert 0 < read < 40
