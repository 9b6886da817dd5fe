"""Batches shrink where images are large, and only there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from resq_deploy.export import footprint, graph, joint, pipeline, writing
from resq_deploy.export.craft import craft
from tests.export import nets
from tests.helpers import checkpoint, dataset

KB = 1024


def steps(side: int) -> onnx.ModelProto:
    """input - conv - relu - quantize - dequantize - conv - mean: 16 channels of side x side."""
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("QuantizeLinear", ["b", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("Conv", ["d", "w"], ["c"]),
        helper.make_node("GlobalAveragePool", ["c"], ["m"]),
        helper.make_node("Flatten", ["m"], ["y"]),
    ]
    made = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 16, side, side])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 16])],
        [
            numpy_helper.from_array(np.eye(16, dtype=np.float32).reshape(16, 16, 1, 1), "w"),
            numpy_helper.from_array(np.array(0.1, np.float32), "s"),
            numpy_helper.from_array(np.array(0, np.int8), "z"),
        ],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_what_one_image_takes() -> None:
    model = steps(16)  # 16 KiB a float32 tensor
    assert footprint.kept_bytes(model) == (4 * 16 + 4) * KB + 64  # a, b, d, c, q in bytes, m
    assert footprint.live_bytes(model) == 2 * 16 * KB  # d and c; a and b are one place


def test_batches_of_small_networks_are_the_usual_ones() -> None:
    for model in (nets.residual(), nets.chain(), steps(16)):
        assert (footprint.run_batch(model), footprint.gradient_batch(model)) == (256, 128)


def test_batches_of_large_images_are_small() -> None:
    model = steps(512)  # 16 MiB a float32 tensor
    assert footprint.run_batch(model) == 8
    assert footprint.gradient_batch(model) == 768 // 68
    assert footprint.run_batch(steps(8192)) == footprint.gradient_batch(steps(8192)) == 1


def test_onnx_runtime_gets_no_more_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = nets.residual(), nets.images(10)
    whole = graph.run(model, images)
    sizes = []

    class Session:
        def __init__(self, *_: Any, **__: Any) -> None:
            pass

        def run(self, _: Any, feed: dict[str, Any]) -> list[Any]:
            sizes.append(len(feed["input"]))
            return [whole[: sizes[-1]]]

    monkeypatch.setattr(footprint, "RUN_BYTES", 4 * footprint.live_bytes(model))
    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    graph.run(model, images)
    assert sizes == [4, 4, 2]


def test_attacks_are_crafted_on_no_more_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def noted(*given: Any, **options: Any) -> Any:
        sizes.append(options["batch"])
        return craft(*given, **options)

    for module in (pipeline, writing, joint):
        monkeypatch.setattr(module, "craft", noted)
    monkeypatch.setattr(footprint, "GRADIENT_BYTES", 2**20)
    checkpoint().save(tmp_path / "m.pt")
    pipeline.export_model(
        tmp_path / "m.pt",
        calib=dataset(64, 0),
        eval=dataset(30, 1),
        adjust=False,
        attacks=("fgsm",),
        attack_samples=8,
        attack_faulty=("fgsm@1e-2",),
        faulty_trials=2,
    )
    assert len(sizes) == 4  # for the ranges, golden, and two draws of faults
    assert all(1 <= size < 64 for size in sizes)
