"""Stage III on a file that is quantized already: what changes, what stays, and that it gains."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from resq_deploy import saturation
from resq_deploy.bundle import Bundle
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError, ModelError
from resq_deploy.export import adopt, coded, gradients, qdq_file, stage
from resq_deploy.export.design import Design
from resq_deploy.export.pipeline import export_model
from resq_deploy.export.readjust import readjust
from resq_deploy.manifest import Adjustment
from resq_deploy.memory import fault_space
from resq_deploy.onnx_file import read_onnx
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import validate_bundle
from tests.export import nets, peer_files
from tests.export.short import few_steps
from tests.export.test_adjust import guard
from tests.helpers import CLASSES, checkpoint, images, save_npz

BER = 1e-2
IMAGES = nets.images(96)
SMALL: dict[str, Any] = {"attacks": ("fgsm",), "attack_samples": 8, "eval_samples": 24}


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    with few_steps(trials=True):
        yield


Made = tuple[onnx.ModelProto, onnx.ModelProto, Adjustment]


@pytest.fixture(scope="module", params=["per tensor", "U8S8", "float biases"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    fp32 = nets.residual()
    file = peer_files.static(fp32, IMAGES, tmp_path_factory.mktemp("file"), request.param)
    with few_steps():
        model, record = readjust(file, fp32, IMAGES, design=Design(BER), threads=1)
    return file, model, record


def test_it_gains_under_flips_and_the_record_says_so(made: Made) -> None:
    file, model, record = made
    assert Adjustment.model_validate_json(record.model_dump_json()) == record
    assert record.applied
    assert [s["step"] for s in record.steps][:3] == ["split", "reconstruct", "distill"]
    ours, theirs = guard().measure(model), guard().measure(file)
    assert ours.divergence < 0.8 * theirs.divergence
    assert ours.agreement > 0.9


def test_nodes_ranges_and_types_stay(made: Made) -> None:
    file, model, _ = made
    before, after = qdq_file.listing(file), qdq_file.listing(model)
    assert after["scheme"] == before["scheme"]
    assert set(after["weights"]) == set(before["weights"])
    copied = [n.name for n in model.graph.node if n.op_type == "Concat"]
    assert len(model.graph.node) == len(file.graph.node) + 3 * len(copied)
    assert {n.name for n in file.graph.node} <= {n.name for n in model.graph.node}
    for name, found in before["activations"].items():
        assert after["activations"][name] == found
    types, later = ({m.name: m.value.dtype for m in fault_space(m).memories} for m in (file, model))
    assert all(later[name] == kind for name, kind in types.items())


def test_integer_kernels_agree_with_the_file(made: Made) -> None:
    _, model, _ = made
    x = nets.images(32, 3)
    with OrtRunner(model, threads=1) as fast, OrtRunner(model, threads=1, exact=True) as exact:
        assert fast.unnoticed(x) == []
        np.testing.assert_allclose(fast(x), exact(x), atol=0.02 * np.abs(exact(x)).max())


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    file = peer_files.static(nets.residual(), IMAGES, tmp_path)
    first, second = (
        readjust(file, nets.residual(), IMAGES[:32], design=Design(BER, 0, 0), seed=s, threads=1)[0]
        for s in (1, 1)
    )
    assert first.SerializeToString() == second.SerializeToString()


def test_where_nothing_is_to_be_gained_the_file_stays_as_it_is(tmp_path: Path) -> None:
    file = peer_files.static(nets.residual(), IMAGES, tmp_path)
    model, record = readjust(file, nets.residual(), IMAGES, design=Design(1e-7, 0, 0), threads=1)
    assert not record.applied
    assert model is file
    assert record.measured["kept"] == "plain"


def test_scales_that_a_quantizer_chose_too_large_get_smaller(tmp_path: Path) -> None:
    stem, after = _with_stem_scales_times(np.float32(1.5), tmp_path)
    assert (after.scale <= 1.02 * stem.scale).all()


def test_codes_within_seven_bits_saturate_as_little_afterwards(tmp_path: Path) -> None:
    """NNCF's overflow_fix and reduce_range keep them so, for processors whose byte products saturate."""
    stem, after = _with_stem_scales_times(np.float32(2), tmp_path)
    pairs = saturation.of_layer(after.node, after.codes.shape)
    assert pairs is not None
    assert pairs.fits(after.codes)
    assert not pairs.fits(stem.codes)
    assert np.abs(after.codes.astype(int)).max() > 64
    assert np.abs(after.codes - stem.codes / 2).max() > 1  # they were learned all the same


def test_no_sum_of_a_whole_file_saturates_where_none_did(tmp_path: Path) -> None:
    file = peer_files.static(nets.residual(), IMAGES, tmp_path)
    assert saturation.could(file)
    assert saturation.kept(file) == {}
    fit = coded.fitting(file)
    assert not saturation.could(fit)
    model, record = readjust(fit, nets.residual(), IMAGES, design=Design(BER), threads=1)
    assert record.applied
    assert not saturation.could(model)
    split = next(s for s in record.steps if s["step"] == "split")
    assert split["copies"]  # copies of one channel would meet themselves


def _with_stem_scales_times(factor: np.float32, folder: Path) -> tuple[coded.Coded, coded.Coded]:
    """The first layer of a file, and what becomes of it after its scales were made larger."""
    file = peer_files.static(nets.residual(), IMAGES, folder)
    stem = coded.layers(file)["stem.weight_quantized"]
    codes = np.rint(stem.codes / factor).astype(np.int8)
    wide = coded.rewrite(file, {stem.weight: (codes, stem.scale * factor)})
    model, record = readjust(wide, nets.residual(), IMAGES, design=Design(BER, 0), threads=1)
    assert record.applied
    return stem, coded.layers(model)["stem.weight_quantized"]


def test_too_few_images_are_refused(tmp_path: Path) -> None:
    file = peer_files.static(nets.residual(), IMAGES, tmp_path)
    with pytest.raises(DataError, match="15 calibration images"):
        readjust(file, nets.residual(), IMAGES[:15])


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.pt, and shipped.onnx, which quantize_static made of it."""
    path = tmp_path_factory.mktemp("home")
    checkpoint(trained={"stages": "none", "data": save_npz(path / "data.npz")}).save(
        path / "model.pt"
    )
    ours = export_model(path / "model.pt", path / "ours.resq", adjust=False, **SMALL)
    x = images(48, 0)[0] / np.float32(255)
    file = peer_files.static(onnx.load(ours.fp32), x.astype(np.float32), path, "float biases")
    onnx.save(file, path / "shipped.onnx")
    return path


def test_a_bundle_of_an_adjusted_file(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for verdict in ("gains", "worthwhile"):  # an untrained network has little to win
        monkeypatch.setattr(stage, verdict, lambda *_: True)
    with few_steps(trials=True):
        bundle = export_model(
            home / "shipped.onnx",
            tmp_path / "a.resq",
            reference=home / "model.pt",
            adjust=True,
            design_ber=BER,
            redundancy=0.5,
            **SMALL,
        )
    manifest = Bundle.open(bundle.path).manifest
    assert manifest.adjustment.design_ber == BER
    assert manifest.adjustment.reason is None
    assert manifest.classes == CLASSES
    assert manifest.provenance.calibration["samples"] > 16
    assert "these are stage III's" in manifest.provenance.calibration["by"]
    assert manifest.adjustment.applied
    as_it_is = export_model(
        home / "shipped.onnx", tmp_path / "b.resq", reference=home / "model.pt", **SMALL
    )
    assert as_it_is.manifest.adjustment.reason == adopt.REASON
    assert read_onnx(as_it_is.int8) != read_onnx(bundle.int8)
    report = validate_bundle(
        bundle, output=tmp_path / "out", settings=Settings(faults=("seu",), trials=10, ber=(1e-3,))
    )
    assert "accuracy@ber=1e-3" in report.figures


def test_without_being_asked_it_is_left_alone(home: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"reference": home / "model.pt", **SMALL}
    with pytest.raises(ModelError, match="taken as it is") as caught:
        export_model(home / "shipped.onnx", tmp_path / "a.resq", design_ber=1e-2, **common)
    assert "--adjust lets" in caught.value.hint
    with pytest.raises(ModelError, match="keeps its opset"):
        export_model(home / "shipped.onnx", tmp_path / "a.resq", adjust=True, opset=18, **common)
    with pytest.raises(DataError, match="--effort is for stage III"):
        export_model(home / "model.pt", tmp_path / "a.resq", adjust=False, effort=2.0, **SMALL)


def test_codes_of_a_file_that_cannot_saturate(home: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"reference": home / "model.pt", "overflow_fix": True, **SMALL}
    plain = export_model(home / "shipped.onnx", tmp_path / "a.resq", **common)
    assert plain.manifest.adjustment.reason == adopt.FITTED
    with few_steps(trials=True):
        learned = export_model(home / "shipped.onnx", tmp_path / "b.resq", adjust=True, **common)
    for bundle in (plain, learned):
        assert bundle.manifest.quantization.saturates is False
        assert not saturation.could(read_onnx(bundle.int8))
        assert bundle.manifest.metrics.agreement >= 0.9


def test_unsigned_weights_are_refused(home: Path, tmp_path: Path) -> None:
    model = onnx.load(home / "shipped.onnx")
    dqs = {n.input[0]: n for n in model.graph.node if n.op_type == "DequantizeLinear"}
    arrays = {t.name: t for t in model.graph.initializer}
    for memory in fault_space(model).select(kinds=("weights",)).memories:
        codes = (memory.value.astype(np.int16) + 128).astype(np.uint8)
        zero = arrays[dqs[memory.name].input[2]]
        shape = tuple(zero.dims)
        arrays[memory.name].CopyFrom(onnx.numpy_helper.from_array(codes, memory.name))
        zero.CopyFrom(onnx.numpy_helper.from_array(np.full(shape, 128, np.uint8), zero.name))
    onnx.save(model, tmp_path / "unsigned.onnx")
    common: dict[str, Any] = {"reference": home / "model.pt", **SMALL}
    with pytest.raises(ModelError, match="no signed INT8 weights"):
        export_model(tmp_path / "unsigned.onnx", adjust=True, **common)
    export_model(tmp_path / "unsigned.onnx", **common)


def test_a_reference_that_cannot_teach_leaves_stage_three_out(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gradients, "obstacle", lambda m, _: lacks(m))

    def lacks(model: onnx.ModelProto) -> str | None:
        rounds = any(n.op_type == "QuantizeLinear" for n in model.graph.node)
        return None if rounds else "the twin has no Hardmax"

    bundle = export_model(
        home / "shipped.onnx",
        tmp_path / "a.resq",
        reference=home / "model.pt",
        adjust=True,
        reporter=Reporter(quiet=False),
        **SMALL,
    )
    assert bundle.manifest.adjustment.reason == "the twin has no Hardmax"
    assert set(bundle.manifest.attacks) == {"fgsm"}
    assert "stage III is left out, and the file is taken as it is" in capsys.readouterr().err


def test_weights_that_cannot_be_written_anew_still_learn(tmp_path: Path) -> None:
    """Something between DQ and layer: scales stay, nothing is split, codes learn."""
    file = peer_files.static(nets.residual(), IMAGES, tmp_path, "float biases")
    layers = [n for n in file.graph.node if n.op_type in ("Conv", "Gemm")]
    for node in layers:
        between = onnx.helper.make_node(
            "Identity", [node.input[1]], [f"{node.name}.w"], f"{node.name}.id"
        )
        node.input[1] = between.output[0]
        file.graph.node.insert(list(file.graph.node).index(node), between)
    assert coded.layers(file) == {}
    assert saturation.could(coded.fitting(file))
    stream = io.StringIO()
    adopt._fitted(Path("odd.onnx"), file, Reporter(quiet=False, stream=stream))
    assert "odd.onnx can still saturate" in stream.getvalue()
    old = onnx.ModelProto()
    old.CopyFrom(file)
    old.opset_import[0].version = 11
    with pytest.raises(ModelError, match="opset 11"):
        adopt._check_opset(Path("odd.onnx"), old)
    with few_steps():
        _, record = readjust(file, nets.residual(), IMAGES, design=Design(BER), threads=1)
    split, reconstruct, distill = record.steps[:3]
    assert (split["copies"], reconstruct["scales"]) == ({}, {})
    assert distill["steps"] == 30
    assert record.applied
