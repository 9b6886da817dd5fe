"""Q/DQ graphs as other tools write them: the fast way of running them is the file, golden and with faults in it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.memory import fault_space
from resq_deploy.runtime import ort as ort_runner
from resq_deploy.runtime.ort import OrtRunner
from tests.qdq import Network, pixels, same_under_faults

FAST = {"QLinearConv", "QLinearAdd", "MatMulIntegerToFloat"}  # the conv and Gemm in integers

FORMS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "as it comes": ({}, FAST),
    "scales of shape [1]": ({"shape": (1,)}, FAST),
    "no zero points": ({"zero_points": False, "told": True}, FAST),
    "no zero points, unsigned": (
        {"kind": np.uint8, "zero_points": False},
        FAST,
    ),
    "a scalar of codes": ({"constant": True}, FAST),
    "moves on codes": ({"codes": ("MaxPool", "Identity")}, {"MatMulIntegerToFloat"}),
    "16 bits": ({"kind": np.int16, "wide": np.int16}, set()),
    "unsigned 16 bits": ({"kind": np.uint16}, set()),
    "another domain": ({"domain": "com.microsoft"}, set()),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_fast_way_is_the_file(form: str) -> None:
    options, expected = FORMS[form]
    model, x = Network(**options).model(), pixels()
    with OrtRunner(model, threads=1) as fast, OrtRunner(model, threads=1, exact=True) as exact:
        assert fast.unnoticed(x) == []
        golden = exact(x)
        np.testing.assert_allclose(fast(x), golden, atol=0.02 * float(np.abs(golden).max()))
        if fast.lowered is not None:
            assert expected <= {node.op_type for node in fast.lowered.nodes}
        for kind in ("weights", "bias", "scales", "zero-points"):
            if kind == "zero-points" and not options.get("zero_points", True):
                assert all(memory.kind != kind for memory in fast.space.memories)
                continue
            same_under_faults(fast, exact, x, kind, 6, 0.03)


def test_codes_that_two_layers_read_with_scales_of_their_own() -> None:
    model = Network(shape=(1,)).model()
    gemm = next(n for n in model.graph.node if n.op_type == "Gemm")
    arrays = {
        "half": np.full(1, 0.005, np.float32),
        "none": np.zeros(1, np.int8),
        "b": np.array([100, -50, 7], np.int32),
        "b.s": np.float32(0.01),
        "b.half": np.float32(0.002),
        "b.z": np.int32(0),
    }
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(v), k) for k, v in arrays.items()
    )
    made = [
        helper.make_node("DequantizeLinear", ["fc.w", "half", "none"], ["again"], name="again"),
        helper.make_node("DequantizeLinear", ["b", "b.s", "b.z"], ["b.one"], name="b.one"),
        helper.make_node("DequantizeLinear", ["b", "b.half", "b.z"], ["b.two"], name="b.two"),
        helper.make_node("Gemm", [gemm.input[0], "again", "b.two"], ["second"], name="second"),
        helper.make_node("Gemm", [*gemm.input[:2], "b.one"], ["first"], name="first"),
        helper.make_node("Sub", ["first", "second"], ["scores"], name="scores"),
    ]
    where = list(model.graph.node).index(gemm)
    model.graph.node.remove(gemm)
    for place, node in enumerate(made, where):
        model.graph.node.insert(place, node)
    with OrtRunner(model, threads=1) as fast, OrtRunner(model, threads=1, exact=True) as exact:
        golden = exact(pixels())
        np.testing.assert_allclose(fast(pixels()), golden, atol=0.02 * np.abs(golden).max())


def test_codes_of_16_bits_are_memory_and_sizes_are_not() -> None:
    model = Network(np.int16, wide=np.int16).model()
    weights = {m.name: m.width for m in fault_space(model).memories if m.kind == "weights"}
    assert weights == {"conv.w": 16, "fc.w": 16}
    flips = ort_runner._sign_flips(fault_space(model).by_name["fc.w"], 2)
    assert {fault.bit for fault in flips.faults()} == {15}
    last = next(n for n in model.graph.node if n.op_type == "GlobalAveragePool")
    grown = helper.make_node("Resize", [last.input[0], "", "by"], ["grown"], name="resize")
    last.input[0] = "grown"
    by = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "by")
    model.graph.initializer.append(by)
    model.graph.node.insert(list(model.graph.node).index(last), grown)
    assert "by" not in fault_space(model).by_name


def test_fusions_are_left_out_where_they_take_codes_for_unsigned(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with_them, without = (
        Network(zero_points=given, told=not given).model() for given in (True, False)
    )
    for model, mode in ((with_them, "stock"), (without, "plain")):
        with OrtRunner(model, threads=1) as runner:
            assert runner.mode == mode
            assert runner(pixels()).shape == (4, 3)


def test_a_graph_whose_output_is_codes() -> None:
    model = Network().model()
    q = next(n for n in model.graph.node if n.output[0] == "flat.q")
    del model.graph.node[list(model.graph.node).index(q) + 1 :]
    output = helper.make_tensor_value_info("flat.q", TensorProto.INT8, ["n", 16])
    del model.graph.output[:]
    model.graph.output.append(output)
    onnx.checker.check_model(model)
    with OrtRunner(model, threads=1) as fast, OrtRunner(model, threads=1, exact=True) as exact:
        apart = fast(pixels()).astype(np.int32) - exact(pixels())
        assert np.abs(apart).max() <= 1
