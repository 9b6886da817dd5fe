"""What an application's own session answers, beside the run that is validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from resq_deploy.bundle import Bundle
from resq_deploy.console import Reporter
from resq_deploy.metrics import top1
from resq_deploy.runtime import cpu, evidence, stock
from resq_deploy.runtime.runner import open_runner
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import validate_bundle
from tests.bundles import write_bundle

QUICK = Settings(samples=24, ber=(), faults=("seu",), trials=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("stock") / "net.resq", count=24)


def answers(bundle: Bundle) -> Any:
    with open_runner(bundle) as runner:
        return top1(runner(bundle.eval_sample().images))


def test_a_report_says_how_often_both_agree(bundle: Bundle, tmp_path: Path) -> None:
    report = validate_bundle(bundle, QUICK, output=tmp_path / "out", workers=1)
    found = report.figures[evidence.STOCK]
    session = ort.InferenceSession(str(bundle.int8))
    sample = bundle.eval_sample()
    ours = top1(session.run(None, {session.get_inputs()[0].name: sample.images})[0])
    assert found.mean == float((ours == answers(bundle)).mean())
    assert found.n == len(sample)


def test_it_can_be_required(bundle: Bundle, tmp_path: Path) -> None:
    report = validate_bundle(
        bundle, QUICK, output=tmp_path / "out", workers=1, require=("agreement@stock>=0.5",)
    )
    assert report.met


@pytest.mark.parametrize(
    ("saturated", "said"),
    [(False, "its fusions compute otherwise"), (True, f"session option {stock.PRECISE}=1")],
)
def test_other_answers_are_warned_of(
    saturated: bool, said: str, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "saturates", lambda: saturated)
    sample = bundle.eval_sample()
    other = (answers(bundle) + 1) % len(bundle.manifest.classes)
    figures, (warning,) = stock.beside(bundle, sample, other, 0.95, Reporter())
    assert figures[evidence.STOCK].mean < 0.5
    assert said in warning
    assert "another answer on" in warning


def test_one_answer_of_many_is_no_warning_unless_products_saturate(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = bundle.eval_sample().take(20)
    whole = np.tile(np.arange(20), 10)
    many = type(sample)(sample.images[whole], sample.labels[whole], sample.indices[whole])
    session = ort.InferenceSession(str(bundle.int8))
    right = top1(session.run(None, {session.get_inputs()[0].name: many.images})[0])
    right[0] = (right[0] + 1) % len(bundle.manifest.classes)
    for saturated in (False, True):
        monkeypatch.setattr(stock, "saturates", lambda s=saturated: s)
        figures, warnings = stock.beside(bundle, many, right, 0.95, Reporter())
        assert figures[evidence.STOCK].mean == 0.995
        assert bool(warnings) == saturated


def test_a_file_that_a_session_refuses(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise RuntimeError("no kernel for Conv(99)\nmore")

    monkeypatch.setattr(ort, "InferenceSession", refused)
    found = stock.beside(bundle, bundle.eval_sample(), np.zeros(1, np.int64), 0.95, Reporter())
    assert found == (
        {},
        ("An ordinary ONNX Runtime session does not run the file: no kernel for Conv(99)",),
    )


def test_the_probe_agrees_with_what_the_processor_has() -> None:
    """Linux lists VNNI among a processor's flags; with it, products of bytes are summed in 32 bits."""
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "avx2" not in flags.read_text():
        assert not cpu.saturates()
    else:
        assert cpu.saturates() == ("vnni" not in flags.read_text())
