"""Stage III, bundles and requests by ONNX Runtime's rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from resq_deploy.errors import BackendError, ModelError
from resq_deploy.export import graph, qdq, session_rules
from resq_deploy.export.adjust import adjust
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.design import Design
from resq_deploy.export.dialect import ONNXRUNTIME
from resq_deploy.export.on_device import add_engines
from resq_deploy.export.pipeline import export_model
from resq_deploy.metrics import agreement
from resq_deploy.runtime import stock
from resq_deploy.runtime.runner import open_runner
from tests.export import nets
from tests.export.sessions import arrays, quantized, session
from tests.export.short import few_steps
from tests.helpers import (
    Residual,
    checkpoint,
    dataset,
    exported,
)

FAST: dict[str, Any] = {"attacks": (), "calib": dataset(64, 0), "eval": dataset(40, 1)}


def test_stage_three_learns_by_these_rules_too() -> None:
    fp32, images = nets.residual(), nets.images(96)
    where = ONNXRUNTIME.plan(fp32)
    ranges = calibrate(fp32, where.activations, [images], unsigned=True, threads=1)
    plain = qdq.quantize_graph(fp32, ranges, dialect=ONNXRUNTIME)
    with few_steps(trials=True):
        found = adjust(
            plain, fp32, images, ranges=ranges, design=Design(1e-2), dialect=ONNXRUNTIME, threads=1
        )
    assert [step["step"] for step in found.record.steps][:4] == [
        *("equalize", "split", "reconstruct", "distill"),
    ]
    made = qdq.finish(found.model, ONNXRUNTIME)
    graph.check(made)
    values = arrays(made)
    points = [
        v for name, v in values.items() if name.endswith(".zero_point") and v.dtype == np.uint8
    ]
    assert len(points) >= len(where.activations)
    assert found.record.applied
    measured = found.record.measured
    assert measured["adjusted"]["faulty_agreement"] > measured["plain"]["faulty_agreement"]


def test_no_sum_saturates_where_that_is_asked_for(tmp_path: Path) -> None:
    """An ordinary session answers to the last bit what an exact one does, with stage III and without."""
    checkpoint().save(tmp_path / "m.pt")
    for adjust_it in (False, True):
        with few_steps(trials=True):
            made = export_model(
                tmp_path / "m.pt", **FAST, adjust=adjust_it, rules="onnxruntime",
                overflow_fix=True, force=True,
            )  # fmt: skip
        assert made.manifest.quantization.saturates is False
        assert made.manifest.metrics.agreement >= 0.9
        model, images = onnx.load(made.int8), made.eval_sample().images
        exact, found = session(model, tmp_path / "o.onnx")
        assert not found["Conv"] + found["FusedConv"]
        usual = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        a, b = (s.run(None, {"input": images})[0] for s in (exact, usual))
        assert np.array_equal(a, b)
        (said,) = stock.unseen(made)
        assert "with a flipped weight" in said
    assert made.manifest.adjustment.steps
    other = export_model(tmp_path / "m.pt", **FAST, adjust=False, force=True, rules="onnxruntime")
    assert other.manifest.quantization.saturates is True


def test_a_bundle_is_validated_as_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint().save(tmp_path / "m.pt")
    made = export_model(tmp_path / "m.pt", **FAST, adjust=False, rules="onnxruntime")
    told = made.manifest.quantization
    assert (told.scheme, told.rules) == ("int8-qdq", "onnxruntime")
    assert {a.zero_point for a in told.activations.values()} - {0}
    assert made.manifest.metrics.agreement >= 0.9
    sample = made.eval_sample()
    plain, found = session(onnx.load(made.int8), tmp_path / "o.onnx")
    assert not found["Conv"] + found["FusedConv"]
    with open_runner(made) as runner:
        answers = runner(sample.images)
    assert agreement(plain.run(None, {"input": sample.images})[0], answers) >= 0.97
    monkeypatch.setattr(stock, "saturates", lambda: False)
    assert "can saturate in" in stock.unseen(made)[0]
    usual = export_model(tmp_path / "m.pt", tmp_path / "u.resq", **FAST, adjust=False)
    told = usual.manifest.quantization
    assert (told.scheme, told.rules) == ("int8-symmetric-qdq", "tensorrt")
    with pytest.raises(BackendError, match="unsigned codes"):
        add_engines(made.path, targets=("tensorrt-rtx",), sm=("86",))


@pytest.mark.parametrize(
    ("options", "message", "cure"),
    [
        ({"targets": ("onnx", "tensorrt-rtx")}, "no engine takes", "--target tensorrt-rtx"),
        ({"high_precision": "fp16"}, "float32 scales only", "--high-precision"),
        ({"rules": "openvino"}, "--rules openvino", "tensorrt, onnxruntime"),
    ],
)
def test_what_cannot_be_had_is_refused_before_anything_is_read(
    options: dict[str, Any], message: str, cure: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        export_model(tmp_path / "missing.pt", **{"rules": "onnxruntime", **options})
    assert cure in caught.value.hint


def test_a_file_that_is_quantized_has_its_own_rules(tmp_path: Path) -> None:
    onnx.save(quantized(Residual), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="quantized already") as caught:
        export_model(tmp_path / "m.onnx", **FAST, rules="onnxruntime")
    assert "leave it out" in caught.value.hint
    made = export_model(tmp_path / "m.onnx", **FAST)
    told, values = made.manifest.quantization, arrays(quantized(Residual))
    assert told.rules is None
    for name in session_rules.plan(exported(Residual)[1]).activations:
        assert told.activations[name].zero_point == values[f"{name}.zero_point"]
