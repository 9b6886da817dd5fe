"""A file that another tool quantized becomes a bundle as it is, and is validated like one of ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnxruntime import quantization as q

from resq_deploy.bundle import Bundle
from resq_deploy.errors import BackendError, ModelError
from resq_deploy.export import adopt, graph, qdq_file
from resq_deploy.export.pipeline import export_model
from resq_deploy.memory import fault_space
from resq_deploy.onnx_file import read_onnx
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import validate_bundle
from tests.helpers import CLASSES, SHAPE, checkpoint, images, save_npz
from tests.qdq import same_under_faults

FAST: dict[str, Any] = {"attacks": ("fgsm",), "attack_samples": 8, "eval_samples": 24}
NORMAL: dict[str, Any] = {"mean": (0.3,), "std": (0.25,)}


class Reader(q.CalibrationDataReader):  # type: ignore[misc]
    """Calibration images for ONNX Runtime's quantizer, one by one."""

    def __init__(self, name: str, x: NDArray[np.float32]) -> None:
        self.rest = iter([{name: image[None]} for image in x])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        """The next one."""
        return next(self.rest, None)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt, trained on data.npz; its network as ONNX, raw.onnx, which wants normalized pixels."""
    path = tmp_path_factory.mktemp("home")
    data = save_npz(path / "data.npz")
    checkpoint(trained={"stages": "none", "data": data}).save(path / "model.pt")
    with graph.quiet():
        torch.onnx.export(
            checkpoint().network(),
            (torch.zeros(1, *SHAPE),),
            str(path / "raw.onnx"),
            dynamo=False,
            opset_version=17,
            input_names=["x"],
        )
    return path


def static(home: Path, path: Path, **options: Any) -> Path:
    """raw.onnx by ONNX Runtime's quantizer."""
    x, _ = images(48, 0)
    normal = ((x / np.float32(255) - np.float32(0.3)) / np.float32(0.25)).astype(np.float32)
    q.quantize_static(str(home / "raw.onnx"), str(path), Reader("x", normal), **options)
    return path


U8 = {"activation_type": q.QuantType.QUInt8}


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        ({}, "int8-qdq"),
        ({"per_channel": True, **U8}, "int8-qdq"),
        ({"weight_type": q.QuantType.QUInt8, **U8}, "int8-qdq"),
        (
            {"extra_options": {"ActivationSymmetric": True, "WeightSymmetric": True}},
            "int8-symmetric-qdq",
        ),
    ],
    ids=["as it comes", "U8S8", "U8U8", "symmetric"],
)
def test_a_file_of_onnx_runtimes_quantizer(
    options: dict[str, Any], scheme: str, home: Path, tmp_path: Path
) -> None:
    file = static(home, tmp_path / "net.onnx", **options)
    made = export_model(file, reference=home / "model.pt", **FAST)
    bundle = Bundle.open(made.path)
    manifest = bundle.manifest
    assert manifest.quantization.scheme == scheme
    assert len(manifest.quantization.weights) == 11
    assert (manifest.arch, manifest.classes) == ("resnet8", CLASSES)
    assert (manifest.input.mean, manifest.input.std) == ((0.3,), (0.25,))  # found out
    assert manifest.metrics.reference == "fp32"
    assert manifest.metrics.agreement >= 0.9
    assert manifest.adjustment.reason == adopt.REASON
    assert manifest.provenance.calibration["samples"] == 0

    x = bundle.eval_sample().images
    shown, before = read_onnx(bundle.int8), onnx.load(file)
    given = (x - np.float32(0.3)) / np.float32(0.25)
    whole = ort.SessionOptions()
    whole.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(before.SerializeToString(), whole)
    expected = np.concatenate([session.run(None, {"x": image[None]})[0] for image in given])
    np.testing.assert_allclose(graph.run(shown, x, optimize=False), expected, atol=1e-5)
    codes = {t.name: numpy_helper.to_array(t) for t in before.graph.initializer}
    for memory in fault_space(shown).memories:
        if memory.kind == "weights":
            np.testing.assert_array_equal(memory.value, codes[memory.name])


@pytest.mark.parametrize(
    "options", [{}, U8, {"per_channel": True}, {"weight_type": q.QuantType.QUInt8, **U8}]
)
def test_every_kind_of_fault_lands_in_it(
    options: dict[str, Any], home: Path, tmp_path: Path
) -> None:
    """The fast way of running it and the file node by node see the same fault, in whatever kind of memory."""
    file = static(home, tmp_path / "net.onnx", **options)
    bundle = export_model(file, reference=home / "model.pt", **{**FAST, "attacks": ()})
    model, x = read_onnx(bundle.int8), bundle.eval_sample().images
    with OrtRunner(model, threads=1) as fast, OrtRunner(model, threads=1, exact=True) as exact:
        assert fast.unnoticed(x) == []
        for kind in ("weights", "bias", "scales", "zero-points"):
            same_under_faults(fast, exact, x, kind, 8, 0.05)


def test_it_is_validated_like_any_other(home: Path, tmp_path: Path) -> None:
    file = static(home, tmp_path / "net.onnx", per_channel=True)
    bundle = export_model(file, reference=home / "model.pt", **FAST)
    settings = Settings(faults=("seu",), trials=20, ber=(1e-3,), joint=True)
    report = validate_bundle(bundle, output=tmp_path / "out", settings=settings)
    assert {"accuracy", "sdc1@seu", "accuracy@ber=1e-3"} <= set(report.figures)
    assert any(name.startswith("robust@fgsm") for name in report.figures)
    said = " ".join(report.not_covered)
    assert "bias" in said
    assert "pixels are normalized in float" in said


def test_the_same_images_as_our_own_export_judge_it(home: Path, tmp_path: Path) -> None:
    ours = export_model(home / "model.pt", tmp_path / "a.resq", adjust=False, **FAST)
    file = static(home, tmp_path / "net.onnx")
    theirs = export_model(file, tmp_path / "b.resq", reference=home / "model.pt", **FAST)
    np.testing.assert_array_equal(ours.eval_sample().indices, theirs.eval_sample().indices)
    np.testing.assert_array_equal(ours.eval_sample().images, theirs.eval_sample().images)
    assert ours.manifest.metrics.fp32_accuracy == theirs.manifest.metrics.fp32_accuracy


def test_without_a_reference_it_is_compared_with_its_own_weights(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from resq_deploy.console import Reporter

    file = static(home, tmp_path / "net.onnx", per_channel=True)
    bundle = export_model(
        file, calib=str(home / "data.npz"), reporter=Reporter(quiet=False), **NORMAL, **FAST
    )
    assert "--reference names" in capsys.readouterr().err
    metrics = bundle.manifest.metrics
    assert (metrics.reference, bundle.manifest.arch) == ("dequantized", "net")
    assert metrics.agreement >= 0.9
    exact = onnx.load(bundle.fp32)
    assert not any("Linear" in node.op_type for node in exact.graph.node)
    raw = (bundle.eval_sample().images - np.float32(0.3)) / np.float32(0.25)
    session = ort.InferenceSession(str(home / "raw.onnx"))
    expected = np.concatenate([session.run(None, {"x": image[None]})[0] for image in raw])
    found = graph.run(exact, bundle.eval_sample().images)
    assert np.abs(found - expected).max() <= 0.05 * np.abs(expected).max()


def test_normalization_inside_the_file_is_left_alone(home: Path, tmp_path: Path) -> None:
    """What our own export wrote, taken in as if somebody else had."""
    ours = export_model(home / "model.pt", tmp_path / "a.resq", adjust=False, **FAST)
    (tmp_path / "again.onnx").write_bytes(ours.int8.read_bytes())
    theirs = export_model(tmp_path / "again.onnx", reference=home / "model.pt", **FAST)
    x = ours.eval_sample().images
    np.testing.assert_array_equal(
        graph.run(onnx.load(ours.int8), x), graph.run(onnx.load(theirs.int8), x)
    )
    assert theirs.manifest.input.mean == (0.0,)
    a, b = ours.manifest.quantization, theirs.manifest.quantization
    assert (b.scheme, set(b.weights)) == (a.scheme, set(a.weights))
    for name, scale in a.activations.items():
        assert b.activations[name].scale == pytest.approx(scale.scale)
    for name, weight in a.weights.items():
        assert b.weights[name].scale == pytest.approx(weight.scale)
        assert (b.weights[name].axis, b.weights[name].layer) == (weight.axis, weight.layer)


def test_who_wants_the_pixels_that_the_user_tells_of(home: Path, tmp_path: Path) -> None:
    """A checkpoint knows its own preprocessing; of any other reference, and of the file, it is found out."""
    ours = export_model(home / "model.pt", tmp_path / "a.resq", adjust=False, **FAST)
    inside, outside = tmp_path / "inside.onnx", static(home, tmp_path / "out.onnx")
    inside.write_bytes(ours.int8.read_bytes())
    (tmp_path / "net.onnx").write_bytes(ours.fp32.read_bytes())
    data, nothing = str(home / "data.npz"), {"mean": (0.0,), "std": (1.0,)}
    for file, reference, told, mean in (
        (inside, home / "model.pt", nothing, 0.0),
        (outside, home / "model.pt", NORMAL, 0.3),
        (inside, home / "raw.onnx", NORMAL, 0.0),
        (outside, home / "raw.onnx", NORMAL, 0.3),
        (outside, tmp_path / "net.onnx", NORMAL, 0.3),
    ):
        made = export_model(
            file, tmp_path / "b.resq", reference=reference, calib=data, force=True, **told, **FAST
        ).manifest
        assert made.input.mean == (mean,)
        assert made.metrics.fp32_accuracy == ours.manifest.metrics.fp32_accuracy
        assert made.metrics.sqnr_db["logits"] > 20


def test_folding_that_would_change_a_file_is_noticed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(model: onnx.ModelProto) -> onnx.ModelProto:
        made = canonical(model)
        bias = next(t for t in made.graph.initializer if t.name == "fc.bias_quantized")
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 999, bias.name))
        return made

    file, canonical = static(home, tmp_path / "net.onnx"), qdq_file.canonical
    monkeypatch.setattr(qdq_file, "canonical", wrong)
    with pytest.raises(ModelError, match="differs from itself"):
        export_model(file, reference=home / "model.pt", **FAST)


def with_float_weights(file: Path) -> onnx.ModelProto:
    """A file as quantization-aware training writes it: weights in float, behind a QuantizeLinear."""
    model = onnx.load(file)
    arrays = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    for node in list(model.graph.node):
        codes = arrays.get(node.input[0])
        if node.op_type == "DequantizeLinear" and codes is not None and codes.dtype == np.int8:
            scale = arrays[node.input[1]]
            wide = scale.reshape(-1, *[1] * (codes.ndim - 1)) if scale.size > 1 else scale
            name = node.input[0].removesuffix("_quantized")
            value = numpy_helper.from_array(np.asarray(codes * wide, np.float32), name)
            model.graph.initializer.append(value)
            made = helper.make_node("QuantizeLinear", [name, *node.input[1:]], [f"{name}_q"])
            made.attribute.extend(node.attribute)
            model.graph.node.insert(0, made)
            node.input[0] = f"{name}_q"
    return model


def test_float_weights_behind_a_q_become_the_codes_that_an_engine_makes(
    home: Path, tmp_path: Path
) -> None:
    file = static(home, tmp_path / "net.onnx", per_channel=True)
    model = with_float_weights(file)
    with pytest.raises(ModelError, match="no INT8 weights"):
        fault_space(model)
    made, plain = qdq_file.canonical(model), qdq_file.canonical(onnx.load(file))
    mine, theirs = (
        [m.value for m in fault_space(g).memories if m.kind == "weights"] for g in (made, plain)
    )
    assert len(mine) == len(theirs) == 11
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not any(
        t.data_type == TensorProto.FLOAT and len(t.dims) > 1 for t in made.graph.initializer
    )


def nudge(kind: str) -> Callable[[onnx.ModelProto], None]:
    def edit(model: onnx.ModelProto) -> None:
        tensors = {t.name: t for t in model.graph.initializer}
        node = next(n for n in model.graph.node if n.op_type == "QuantizeLinear")
        scale = tensors[node.input[1]]
        if kind == "negative":
            scale.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(scale), scale.name))
        else:
            model.graph.node.insert(0, helper.make_node("ReduceMax", ["x"], ["live"], keepdims=0))
            node.input[1] = "live"

    return edit


@pytest.mark.parametrize(
    ("kind", "message"), [("negative", "not positive"), ("live", "while the graph runs")]
)
def test_scales_that_cannot_be(kind: str, message: str, home: Path, tmp_path: Path) -> None:
    model = onnx.load(static(home, tmp_path / "net.onnx"))
    nudge(kind)(model)
    with pytest.raises(ModelError, match=message):
        qdq_file.canonical(model)


def test_requests_that_do_not_fit(home: Path, tmp_path: Path) -> None:
    file = static(home, tmp_path / "net.onnx")
    with pytest.raises(ModelError, match="--reference is for a file that is quantized already"):
        export_model(home / "model.pt", tmp_path / "o.resq", reference=home / "raw.onnx", **FAST)
    with pytest.raises(ModelError, match="is quantized itself"):
        export_model(file, reference=file, **FAST)
    for options in (
        {"design_ber": 1e-2},
        {"high_precision": "fp16"},
        {"effort": 0.5},
        {"opset": 18},
    ):
        with pytest.raises(ModelError, match=r"quantized already, and (taken as it is|keeps)"):
            export_model(file, reference=home / "model.pt", **FAST, **options)
    with pytest.raises(BackendError, match="zero points or unsigned codes"):
        export_model(file, reference=home / "model.pt", targets=("tensorrt-rtx",), **FAST)
    assert not (tmp_path / "net.resq").exists()


def test_a_reference_of_other_classes(home: Path, tmp_path: Path) -> None:
    file = static(home, tmp_path / "net.onnx")
    model = onnx.load(home / "raw.onnx")
    head = next(t for t in model.graph.initializer if t.name == "fc.weight")
    bias = next(t for t in model.graph.initializer if t.name == "fc.bias")
    for tensor in (head, bias):
        value = numpy_helper.to_array(tensor)[:2]
        tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2
    onnx.save(model, tmp_path / "two.onnx")
    x, y = images(96, 0)
    x_test, y_test = images(60, 1)
    data = save_npz(
        tmp_path / "two.npz",
        x_train=x[y < 2], y_train=y[y < 2], x_test=x_test[y_test < 2], y_test=y_test[y_test < 2], classes=CLASSES[:2],
    )  # fmt: skip
    with pytest.raises(ModelError, match="has 3 outputs, its reference 2"):
        export_model(file, reference=tmp_path / "two.onnx", calib=data, **FAST)


def test_a_symmetric_file_becomes_an_engine(home: Path, tmp_path: Path) -> None:
    file = static(
        home,
        tmp_path / "net.onnx",
        per_channel=True,
        extra_options={"ActivationSymmetric": True, "QuantizeBias": False},
    )
    bundle = export_model(
        file, reference=home / "model.pt", targets=("tensorrt-rtx",), sm=("86",), **FAST
    )
    engine = bundle.manifest.engines["tensorrt-rtx"]
    assert engine.coverage is not None
    assert engine.coverage > 0.9
