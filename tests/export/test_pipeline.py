"""From a model file to a bundle, and nothing left behind where that fails."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy.bundle import Bundle, sha256_of
from resq_deploy.errors import AttackError, BackendError, BundleError, DataError, ResqError
from resq_deploy.export import pipeline, writing
from resq_deploy.export.adjust import Adjusted
from resq_deploy.export.design import Design
from resq_deploy.export.pipeline import export_model
from resq_deploy.manifest import Adjustment
from resq_deploy.metrics import top1
from resq_deploy.runtime.plan import PlanMap
from tests.helpers import CLASSES, SHAPE, checkpoint, dataset, images, save_npz

FAST: dict[str, Any] = {"attacks": (), "adjust": False, "calib_samples": 32, "eval_samples": 24}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model.pt, trained on data.npz, and the bundle model.resq of it."""
    path = tmp_path_factory.mktemp("home")
    data = save_npz(path / "data.npz")
    checkpoint(trained={"stages": "none", "data": data}).save(path / "model.pt")
    export_model(path / "model.pt", **{**FAST, "attacks": ("fgsm",)}, command=("resq-export", "x"))
    return path


@pytest.fixture
def bundle(home: Path) -> Bundle:
    return Bundle.open(home / "model.resq")


def logits(path: Path, x: NDArray[np.float32]) -> NDArray[np.float32]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    found: NDArray[np.float32] = session.run(None, {"input": x})[0]
    return found


def test_stock_tools_take_both_graphs(bundle: Bundle) -> None:
    x = bundle.eval_sample().images
    for path in (bundle.fp32, bundle.int8):
        onnx.checker.check_model(str(path), full_check=True)
        assert logits(path, x).shape == (24, 3)


def test_the_manifest_says_what_the_graph_holds(bundle: Bundle) -> None:
    manifest = bundle.manifest
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(bundle.int8).graph.initializer}
    before = {t.name: numpy_helper.to_array(t) for t in onnx.load(bundle.fp32).graph.initializer}
    assert len(manifest.quantization.weights) == 11
    for name, told in manifest.quantization.weights.items():
        assert arrays[name].dtype == np.int8
        assert told.shape == arrays[name].shape
        np.testing.assert_array_equal(np.array(told.scale, np.float32), arrays[f"{name}.scale"])
        error = arrays[name] * arrays[f"{name}.scale"].reshape(-1, *[1] * (len(told.shape) - 1))
        noise = np.square(before[name] - error).sum()
        ratio = 10 * np.log10(np.square(before[name]).sum() / noise)
        assert told.sqnr_db == pytest.approx(ratio, abs=0.01)
    for name, activation in manifest.quantization.activations.items():
        assert arrays[f"{name}.scale"] == np.float32(activation.scale)
    assert {op.op for op in manifest.quantization.float_ops} == {"Sub", "Div"}
    assert (manifest.arch, manifest.classes, manifest.input.mean) == ("resnet8", CLASSES, (0.3,))


def test_the_figures_can_be_had_again_from_the_files(bundle: Bundle) -> None:
    sample, metrics = bundle.eval_sample(), bundle.manifest.metrics
    exact, coded = (top1(logits(p, sample.images)) for p in (bundle.fp32, bundle.int8))
    assert metrics.samples == len(sample) == 24
    assert metrics.fp32_accuracy == np.mean(exact == sample.labels)
    assert metrics.int8_accuracy == np.mean(coded == sample.labels)
    assert metrics.agreement == np.mean(exact == coded)
    assert set(metrics.sqnr_db) == {"logits"}
    assert metrics.sqnr_db["logits"] > 20


def test_attacks_are_crafted_on_the_held_out_sample_through_this_graph(bundle: Bundle) -> None:
    sample, told = bundle.attack_sample("fgsm")
    clean = bundle.eval_sample()
    assert np.abs(sample.images - clean.images).max() <= 8 / 255 + 1e-6
    assert np.abs(sample.images - clean.images).max() > 7 / 255
    np.testing.assert_array_equal(sample.indices, clean.indices)
    assert told.model_sha256 == sha256_of(bundle.int8)
    assert told.crafted_through == "twin"
    right = top1(logits(bundle.int8, clean.images)) == clean.labels
    wrong = top1(logits(bundle.int8, sample.images)) != clean.labels
    assert told.transfer["int8"] == (right & wrong).sum() / max(right.sum(), 1)


def test_where_it_came_from(home: Path, bundle: Bundle) -> None:
    provenance = bundle.manifest.provenance
    assert provenance.model_sha256 == sha256_of(home / "model.pt")
    assert provenance.command == ("resq-export", "x")
    assert provenance.calibration["samples"] == 32
    assert provenance.training["stages"] == "none"
    assert {"onnx", "onnxruntime", "torch", "python"} <= provenance.versions.keys()


@pytest.mark.usefixtures("traced_anew")
def test_the_same_command_writes_the_same_bytes_in_another_place(
    home: Path, tmp_path: Path
) -> None:
    again = export_model(
        home / "model.pt",
        tmp_path / "deep" / "model.resq",
        **{**FAST, "attacks": ("fgsm",)},
        command=("resq-export", "x"),
    )
    for name in ("model.int8.onnx", "model.fp32.onnx", "eval.npz", "manifest.json"):
        assert sha256_of(again.path / name) == sha256_of(home / "model.resq" / name), name
    assert b"/" + tmp_path.name.encode() not in (again.path / "model.int8.onnx").read_bytes()


def test_another_seed_calibrates_on_other_images(home: Path, tmp_path: Path) -> None:
    other = export_model(home / "model.pt", tmp_path / "m.resq", **FAST, seed=1).manifest
    first = Bundle.open(home / "model.resq").manifest
    assert other.provenance.calibration["sha256"] != first.provenance.calibration["sha256"]


def test_no_image_calibrates_and_judges(tmp_path: Path) -> None:
    """One pool of 40 images for both: whatever calibration takes, evaluation does not see."""
    x, y = images(40)
    source = str(tmp_path / "pool.npz")
    np.savez(source, x=x, y=y, classes=CLASSES)
    checkpoint(trained={"data": source}).save(tmp_path / "m.pt")
    with pytest.raises(DataError, match="no test image that calibration does not use") as caught:
        export_model(tmp_path / "m.pt", **{**FAST, "calib_samples": 40})
    assert "--calib-samples" in caught.value.hint
    made = export_model(tmp_path / "m.pt", **{**FAST, "calib_samples": 30, "eval_samples": 99})
    assert made.manifest.metrics.samples == 10


def test_data_sets_in_memory(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "m.pt")
    made = export_model(tmp_path / "m.pt", calib=dataset(64, 0), eval=dataset(30, 1), **FAST)
    assert made.manifest.provenance.calibration["eval_data"] == "pictures-1"


def test_stage_three_gets_the_plain_graph_and_its_result_is_deployed(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def stage3(int8: onnx.ModelProto, fp32: onnx.ModelProto, x: Any, **options: Any) -> Adjusted:
        seen.update(options, images=x)
        changed = onnx.ModelProto()
        changed.CopyFrom(int8)
        bias = next(t for t in changed.graph.initializer if t.name == "fc.bias")
        bias.CopyFrom(numpy_helper.from_array(np.array([9, 0, 0], np.float32), "fc.bias"))
        record = Adjustment(applied=True, design_ber=options["design"].ber, measured={"kept": "it"})
        return Adjusted(changed, fp32, options["ranges"], record)

    monkeypatch.setattr(pipeline, "stage3", stage3)
    options = {**FAST, "adjust": True, "design_ber": 1e-2, "eps": "4/255"}
    made = export_model(home / "model.pt", tmp_path / "m.resq", **options)
    assert (seen["design"], seen["eps"], seen["images"].shape) == (
        Design(1e-2),
        4 / 255,
        (32, *SHAPE),
    )
    arrays = {t.name: numpy_helper.to_array(t) for t in onnx.load(made.int8).graph.initializer}
    assert arrays["fc.bias"][0] == pytest.approx(9, rel=1e-4)  # rounded as integer kernels do
    assert made.manifest.adjustment.measured == {"kept": "it"}


def test_float16_beside_int8(home: Path, tmp_path: Path) -> None:
    made = export_model(home / "model.pt", tmp_path / "m.resq", **FAST, high_precision="fp16")
    kinds = {t.data_type for t in onnx.load(made.int8).graph.initializer}
    assert onnx.TensorProto.FLOAT not in kinds
    assert made.manifest.quantization.high_precision == "fp16"
    assert made.manifest.metrics.agreement >= 0.9


def test_an_engine_with_the_map_of_its_weights(home: Path, tmp_path: Path) -> None:
    made = export_model(
        home / "model.pt", tmp_path / "m.resq", **FAST, targets=("onnx", "tensorrt-rtx"), sm=("86",)
    )
    told = made.manifest.engines["tensorrt-rtx"]
    found = PlanMap.load(made.file("engines/tensorrt-rtx.weights.json"))
    plan = made.file("engines/tensorrt-rtx.plan").read_bytes()
    assert found.sha256 == hashlib.sha256(plan).hexdigest()
    assert told.coverage == found.coverage
    assert told.coverage is not None
    assert told.coverage > 0.9
    assert told.built_for["batch"] == [1, 8, 64]


def nans(x: NDArray[Any]) -> NDArray[Any]:
    broken = x.astype(np.float32) / 255
    broken[0, 0, 0, 0] = np.nan
    return broken


X = images(96)[0]


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": X[:0], "y_train": np.zeros(0, np.int64)}, "is empty"),
        ({"x_train": nans(X)}, "NaN or infinite"),
        ({"x_train": X[:, :, :8, :8]}, "shape"),
        ({"x_train": X.astype(np.float32) * 2}, "divide by 255|expected"),
        ({"y_train": np.zeros(5, np.int64)}, "96 images but labels"),
        ({"classes": ("a", "b", "c")}, "other classes"),
        ({"classes": (*CLASSES, "more")}, "4 classes, the network 3"),
    ],
)
def test_calibration_data_that_cannot_calibrate(
    arrays: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint().save(tmp_path / "m.pt")
    data = save_npz(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        export_model(tmp_path / "m.pt", calib=data, **FAST)
    assert caught.value.hint
    assert sorted(p.name for p in tmp_path.iterdir()) == ["d.npz", "m.pt"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"calib": None}, DataError, "no calibration data"),
        ({"calib": "mnist3d"}, DataError, "unknown data set"),
        ({"targets": ("openvino",)}, BackendError, "unknown target"),
        ({"attacks": ("magic",)}, AttackError, "unknown attack"),
        ({"attacks": ("square",)}, AttackError, "needs no gradients"),
        ({"eps": "much"}, AttackError, "cannot be read"),
        ({"opset": 11}, ResqError, "opset 11"),
        ({"high_precision": "fp16", "opset": 18}, ResqError, "opset 18"),
        ({"adjust": True, "design_ber": 2.0}, DataError, "design BER"),
        ({"redundancy": -0.1}, DataError, "redundancy"),
        ({"effort": -1.0}, DataError, "effort"),
        ({"calib_samples": 0}, DataError, "cannot take 0"),
    ],
)
def test_requests_that_cannot_be_met_leave_nothing(
    options: dict[str, Any], error: type[ResqError], message: str, tmp_path: Path
) -> None:
    checkpoint().save(tmp_path / "m.pt")
    data = {"calib": dataset(64, 0), "eval": dataset(30, 1)}
    with pytest.raises(error, match=message):
        export_model(tmp_path / "m.pt", tmp_path / "out.resq", **{**FAST, **data, **options})
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]


def test_a_design_that_cannot_be_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="design BER"):
        export_model(tmp_path / "missing.pt", tmp_path / "out.resq", design_ber=0.0)


def test_an_output_that_exists_is_kept_unless_forced(home: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.resq"
    export_model(home / "model.pt", target, **FAST)
    before = sha256_of(target / "manifest.json")
    with pytest.raises(BundleError, match="exists already"):
        export_model(home / "model.pt", target, **FAST, seed=1)
    assert sha256_of(target / "manifest.json") == before
    export_model(home / "model.pt", target, **FAST, seed=1, force=True)
    assert sha256_of(target / "manifest.json") != before
    assert [p.name for p in tmp_path.iterdir()] == ["m.resq"]


def test_a_failure_while_writing_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "_save_sample", full)
    with pytest.raises(KeyboardInterrupt):
        export_model(home / "model.pt", tmp_path / "m.resq", **FAST)
    assert list(tmp_path.iterdir()) == []
