"""What an application's own session answers, beside the run that is validated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.bundle import Bundle
from resq_deploy.console import Reporter
from resq_deploy.metrics import top1
from resq_deploy.runtime import cpu, evidence, stock
from resq_deploy.runtime.runner import open_runner
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import validate_bundle
from resq_deploy.saturation import in_16_bits
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


def products(codes: Any, kernel: str) -> onnx.ModelProto:
    """One layer in integers, U8 images of 255 in, float out."""
    conv = kernel == "QLinearConv"
    scale, zero = np.asarray(1, np.float32), np.asarray(0, np.uint8)
    none = np.zeros(len(codes) if conv else codes.shape[1], np.int8)
    size = 1 / 2**16 if conv else 1.0
    held = {"s": scale, "z": zero, "w": codes, "wz": none, "ws": np.ones(none.shape, np.float32)}
    held |= {"ys": np.asarray(1 / size, np.float32), "yz": np.asarray(0, np.uint8)}
    if conv:
        inputs = ["x", "s", "z", "w", "ws", "wz", "ys", "yz"]
        node = helper.make_node("QLinearConv", inputs, ["y"], name="layer")
    else:
        inputs = ["x", "w", "s", "ws", "z", "wz"]
        node = helper.make_node(kernel, inputs, ["y"], name="layer", domain="com.microsoft")
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, None)],
        [
            helper.make_tensor_value_info(
                "y", TensorProto.UINT8 if conv else TensorProto.FLOAT, None
            )
        ],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    versions = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


@pytest.mark.parametrize(
    ("pair", "could"),
    [((64, 64), False), ((65, 64), True), ((127, -127), False), ((-128, -1), True)],
)
def test_pairs_that_16_bits_do_not_hold(pair: tuple[int, int], could: bool) -> None:
    matrix = np.zeros((32, 16), np.int8)
    matrix[4:6, 3] = pair
    model = products(matrix, "MatMulIntegerToFloat")
    assert in_16_bits(model) == {"layer": could}
    if cpu.saturates():
        session = ort.InferenceSession(model.SerializeToString())
        (y,) = session.run(None, {"x": np.full((8, 32), 255, np.uint8)})
        assert (y[0, 3] == 255 * sum(pair)) != could


@pytest.mark.parametrize("nhwc", [False, True])
def test_pairs_of_a_convolution_are_inputs_at_one_place_of_its_kernel(nhwc: bool) -> None:
    def could(*places: tuple[Any, ...], shape: tuple[int, ...] = (16, 4, 3, 3)) -> bool:
        codes = np.zeros(shape, np.int8)
        for place in places:
            codes[place] = 100
        model = products(codes, "QLinearConv")
        model.graph.node[0].domain = "com.ms.internal.nhwc" if nhwc else ""
        if shape[1] == 1:
            model.graph.node[0].attribute.append(helper.make_attribute("group", shape[0]))
        return in_16_bits(model) == {"layer": True}

    assert not could()
    assert could((2, slice(2, 4), 1, 1)) == nhwc
    assert (
        could((2, 0, 0, slice(0, 2))) != nhwc
    )  # neighbours where patches of NCHW images are copied
    assert not could((2, slice(1, 3), 0, 0))  # in other pairs
    assert not could((2,), shape=(16, 1, 3, 3))  # depthwise
    assert not could((2,), shape=(16, 1, 1, 1))


def test_what_other_machines_could_answer_is_not_covered(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stock, "saturates", lambda: False)
    assert stock.unseen(bundle) == ()  # its session computes in float
    monkeypatch.setattr(stock, "in_16_bits", lambda model: {"a": True, "b": True, "c": False})
    (said,) = stock.unseen(bundle)
    assert (
        f"saturate in 2 layers. Validate there too (agreement@stock), set {stock.PRECISE}=1 or export with"
        in said
    )
    report = validate_bundle(bundle, QUICK, output=tmp_path / "out", workers=1)
    assert said in report.not_covered
    for saturated, kernels in ((True, {"a": True}), (False, {"a": False})):
        monkeypatch.setattr(stock, "saturates", lambda s=saturated: s)
        monkeypatch.setattr(stock, "in_16_bits", lambda model, k=kernels: k)
        (said,) = stock.unseen(bundle)
        assert "with a flipped weight" in said
        assert ("on this CPU" in said) == saturated
