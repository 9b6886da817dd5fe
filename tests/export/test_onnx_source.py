"""Somebody else's ONNX graph becomes the network that it is: any layout, batch, opset, normalization and end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from resq_deploy.bundle import Bundle
from resq_deploy.errors import ModelError
from resq_deploy.export import graph, onnx_source
from resq_deploy.export.load import load_model
from resq_deploy.export.pipeline import export_model
from tests.export.short import few_steps
from tests.helpers import SHAPE, checkpoint, save_npz

NORMAL: dict[str, Any] = {"mean": (0.3,), "std": (0.25,)}
X = np.random.default_rng(1).random((4, *SHAPE), dtype=np.float32)


class Turned(nn.Module):
    """Channels last, as Keras has it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """[N, H, W, C] -> logits."""
        logits: Tensor = self.network(x.permute(0, 3, 1, 2))
        return logits


def expected() -> NDArray[np.float32]:
    with torch.no_grad():
        found: NDArray[np.float32] = (
            checkpoint().network()((torch.from_numpy(X) - 0.3) / 0.25).numpy()
        )
    return found


def save(
    path: Path, network: nn.Module | None = None, *, last: bool = False, **options: Any
) -> Path:
    """A network as torch writes it, for one image at a time unless told otherwise."""
    x = torch.zeros(1, 16, 16, 1) if last else torch.zeros(1, *SHAPE)
    with graph.quiet():
        torch.onnx.export(
            network or checkpoint().network(),
            (x,),
            str(path),
            **{"dynamo": False, "opset_version": 17, **options},
        )
    return path


def free(**options: Any) -> dict[str, Any]:
    return {
        "input_names": ["x"],
        "output_names": ["y"],
        "dynamic_axes": {"x": {0: "n"}, "y": {0: "n"}},
        **options,
    }


def test_a_graph_as_torch_writes_it(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path / "net.onnx"), **NORMAL)
    assert (loaded.form, loaded.arch, loaded.input_shape) == ("ONNX", "net", SHAPE)
    assert (loaded.mean, loaded.std, loaded.classes) == ((0.3,), (0.25,), ("0", "1", "2"))
    model = loaded.to_onnx()
    onnx.checker.check_model(model, full_check=True)
    np.testing.assert_allclose(graph.run(model, X), expected(), atol=1e-4)
    assert graph.opset_of(model) == 17
    assert [n.op_type for n in model.graph.node[:3]] == ["Sub", "Div", "Conv"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize(
    "options",
    [
        {"opset_version": 13},
        {"opset_version": 15, "do_constant_folding": False},
        free(),
        {"dynamo": True, "opset_version": 18},
        {"dynamo": True, "opset_version": 20, "external_data": True},
    ],
    ids=["opset 13", "BatchNorm apart", "free batch", "dynamo", "weights beside it"],
)
def test_every_way_to_write_it(options: dict[str, Any], tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", **options)
    model = load_model(path, **NORMAL).to_onnx()
    np.testing.assert_allclose(graph.run(model, X), expected(), atol=1e-4)
    assert not any(n.op_type == "BatchNormalization" for n in model.graph.node)
    assert len({n.name for n in model.graph.node}) == len(model.graph.node)


def test_layers_keep_the_names_that_the_file_tells(tmp_path: Path) -> None:
    folded = load_model(save(tmp_path / "a.onnx"), **NORMAL).to_onnx()
    assert "/layer1/conv1/Conv" in {n.name for n in folded.graph.node}
    told = save(tmp_path / "b.onnx", dynamo=True, opset_version=18)
    names = {n.name for n in load_model(told, **NORMAL).to_onnx().graph.node}
    assert {"conv1", "layer1.conv1", "fc"} <= names


def test_channels_last_and_probabilities(tmp_path: Path) -> None:
    network = nn.Sequential(Turned(checkpoint().network()), nn.Softmax(1)).eval()
    path = save(tmp_path / "net.onnx", network, last=True)
    loaded = load_model(path, **NORMAL)
    assert loaded.input_shape == SHAPE
    assert loaded.source is not None
    assert loaded.source.cut
    np.testing.assert_allclose(graph.run(loaded.to_onnx(), X), expected(), atol=1e-4)
    assert load_model(path, **NORMAL, input_shape=SHAPE).input_shape == SHAPE


def test_initializers_that_are_listed_as_inputs(tmp_path: Path) -> None:
    """As older files have them, here before the images, whose batch is fixed."""
    path = save(tmp_path / "net.onnx", dynamo=True, opset_version=18, external_data=False)
    model = onnx.load(path)
    listed = [
        helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in model.graph.initializer
    ]
    images = list(model.graph.input)
    del model.graph.input[:]
    model.graph.input.extend([*listed, *images])
    onnx.save(model, path)
    found = load_model(path, **NORMAL).to_onnx()
    assert [value.name for value in found.graph.input] == ["input"]
    np.testing.assert_allclose(graph.run(found, X), expected(), atol=1e-4)


def test_an_open_size_wants_a_shape(tmp_path: Path) -> None:
    axes = {"x": {0: "n", 2: "h", 3: "w"}, "y": {0: "n"}}
    path = save(tmp_path / "net.onnx", **free(dynamic_axes=axes))
    with pytest.raises(ModelError, match=r"leaves the size of its images open \(1x\?x\?\)"):
        load_model(path)
    assert load_model(path, default_shape=lambda: SHAPE).input_shape == SHAPE
    model = load_model(path, **NORMAL, input_shape=SHAPE).to_onnx()
    np.testing.assert_allclose(graph.run(model, X), expected(), atol=1e-4)


def test_another_opset_is_converted(tmp_path: Path) -> None:
    loaded = load_model(save(tmp_path / "net.onnx"), **NORMAL)
    assert graph.opset_of(loaded.to_onnx(19)) == 19
    np.testing.assert_allclose(graph.run(loaded.to_onnx(19), X), expected(), atol=1e-4)


def test_a_tensor_called_like_ours_is_renamed(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", **free())
    model = onnx.load(path)
    for old, new in (("x", "logits"), ("y", "input")):
        for node in model.graph.node:
            for side in (node.input, node.output):
                for i, name in enumerate(side):
                    side[i] = new if name == old else name
        next(v for v in (*model.graph.input, *model.graph.output) if v.name == old).name = new
    onnx.save(model, path)
    found = load_model(path, **NORMAL).to_onnx()
    assert (found.graph.input[0].name, found.graph.output[0].name) == ("input", "logits")
    np.testing.assert_allclose(graph.run(found, X), expected(), atol=1e-4)


def edited(path: Path, edit: Any) -> Path:
    model = onnx.load(save(path, **free()))
    edit(model)
    onnx.save(model, path)
    return path


def second_output(model: onnx.ModelProto) -> None:
    model.graph.output.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *SHAPE]))


def bytes_in(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Cast", ["u"], ["x"], to=TensorProto.FLOAT))
    model.graph.input[0].name = "u"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8


def foreign(model: onnx.ModelProto) -> None:
    relu = next(n for n in model.graph.node if n.op_type == "Relu")
    relu.op_type, relu.domain = "Gelu", "com.microsoft"
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))


def unknown(model: onnx.ModelProto) -> None:
    relu = next(n for n in model.graph.node if n.op_type == "Relu")
    relu.op_type, relu.domain = "Mine", "my.domain"
    model.opset_import.append(helper.make_opsetid("my.domain", 1))


def infinite(model: onnx.ModelProto) -> None:
    bias = next(t for t in model.graph.initializer if t.name.endswith("bias"))
    value = np.full(tuple(bias.dims), np.inf, np.float32)
    bias.CopyFrom(numpy_helper.from_array(value, bias.name))


def old(model: onnx.ModelProto) -> None:
    model.opset_import[0].version = 12


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (second_output, "1 inputs and 2 outputs"),
        (bytes_in, "takes images in UINT8"),
        (foreign, "the operator Gelu is of com.microsoft"),
        (unknown, "ONNX Runtime does not run"),
        (infinite, "not finite"),
        (old, "is of opset 12"),
    ],
)
def test_what_is_refused(edit: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        load_model(edited(tmp_path / "net.onnx", edit)).to_onnx()


def test_more_that_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="takes images of 1x16x16, not 3x16x16"):
        load_model(path, input_shape=(3, 16, 16))
    with pytest.raises(ModelError, match="3 outputs for 2 classes"):
        load_model(path, classes=("a", "b"))
    with pytest.raises(ModelError, match="preprocessing"):
        load_model(path, std=(0.0,))
    (tmp_path / "no.onnx").write_bytes(b"\xff" * 40)
    with pytest.raises(ModelError, match="not an ONNX file"):
        load_model(tmp_path / "no.onnx")


def test_a_batch_that_cannot_be_freed(tmp_path: Path) -> None:
    class Fixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(2).mean(2) + torch.ones(2, 3).sum(0)[None] * torch.ones(2, 3)

    with graph.quiet():
        torch.onnx.export(
            Fixed(), (torch.zeros(2, *SHAPE),), str(tmp_path / "n.onnx"), dynamo=False
        )
    with pytest.raises(ModelError, match="free batch"):
        load_model(tmp_path / "n.onnx")


def test_weights_beside_the_file_lead_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = save(tmp_path / "in" / "net.onnx", dynamo=True, opset_version=18, external_data=True)
    model = onnx.load(path, load_external_data=False)
    kept = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    assert kept, "nothing lies beside the file, so this test shows nothing"
    (tmp_path / "secret").write_bytes(b"\0" * 10**6)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    for place in ("../secret", str(tmp_path / "secret"), "link", "missing"):
        for tensor in kept:
            next(e for e in tensor.external_data if e.key == "location").value = place
        onnx.save(model, path)
        with pytest.raises(ModelError, match="which is no file beside it"):
            load_model(path)


@pytest.mark.parametrize("lengths", ["short", "negative"])
def test_weights_beside_the_file_are_whole(lengths: str, tmp_path: Path) -> None:
    path = save(tmp_path / "net.onnx", dynamo=True, opset_version=18, external_data=True)
    content = tmp_path / "net.onnx.data"
    if lengths == "short":
        content.write_bytes(content.read_bytes()[:-8])
    else:
        model = onnx.load(path, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                entry.value = "-1" if entry.key == "offset" else entry.value
        onnx.save(model, path)
    with pytest.raises(ModelError, match=r"not what its shape says|cannot be read"):
        load_model(path)


def test_it_is_exported_like_any_other(tmp_path: Path) -> None:
    """Stage III runs, attacks are crafted, and INT8 answers as the network does."""
    data = save_npz(tmp_path / "data.npz")
    options: dict[str, Any] = {
        "calib": data,
        "calib_samples": 64,
        "eval_samples": 24,
        "effort": 0.0,
    }
    path = save(tmp_path / "net.onnx", **free())
    with few_steps(trials=True):
        bundle = export_model(path, attacks=("fgsm",), attack_samples=8, **NORMAL, **options)
    manifest = Bundle.open(bundle.path).manifest
    assert (manifest.arch, manifest.input.mean, len(manifest.classes)) == ("net", (0.3,), 3)
    assert manifest.metrics.reference == "fp32"
    assert manifest.metrics.agreement >= 0.9
    assert manifest.adjustment.reason is None
    assert manifest.attacks["fgsm"].transfer["fp32"] >= 0
    assert len(manifest.quantization.weights) == 11


def test_without_gradients_it_is_exported_without(tmp_path: Path) -> None:
    """An operator that the twin lacks: no stage III, no attacks, and calibration on clean images only."""

    def peculiar(model: onnx.ModelProto) -> None:
        next(n for n in model.graph.node if n.op_type == "Relu").op_type = "Hardmax"

    path = edited(tmp_path / "net.onnx", peculiar)
    data = save_npz(tmp_path / "data.npz")
    bundle = export_model(path, calib=data, calib_samples=32, eval_samples=24, **NORMAL)
    assert not bundle.manifest.attacks
    assert "Hardmax" in str(bundle.manifest.adjustment.reason)


def test_codes_in_other_forms_are_told_the_cure(tmp_path: Path) -> None:
    for op, message in (
        ("QLinearConv", "without Q/DQ"),
        ("DynamicQuantizeLinear", "while it runs"),
    ):
        node = helper.make_node(op, ["x"], ["y"])
        made = helper.make_model(helper.make_graph([node], "g", [], []))
        with pytest.raises(ModelError, match=message):
            onnx_source.is_quantized(made)
