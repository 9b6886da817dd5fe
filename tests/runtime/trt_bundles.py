"""Bundles whose plan the stand-in for TensorRT loads, and runners on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx

from resq_deploy.bundle import Bundle, BundleWriter
from resq_deploy.faults import FaultSpace, Flips, flip_bits
from resq_deploy.memory import fault_space
from resq_deploy.runtime.plan import locate
from resq_deploy.runtime.trt import TrtRunner
from tests.runtime.fake_trt import VERSION, FakeTensorRT, device_of
from tests.runtime.plans import QdqGraph, weight
from tests.test_bundle import graph, manifest

LAYOUTS = {"head": "ba", "conv2": "aBcd32b", "conv1": "acdB4b"}
WAYS = ["live", "plan", "refit"]


def network() -> onnx.ModelProto:
    graph = QdqGraph(3, 3, 3)
    hidden = graph.conv("input", "conv1", weight(16, 3, 3, 3, seed=1))
    hidden = graph.conv(hidden, "conv2", weight(16, 16, 3, 3, seed=2))
    flat = graph.node("Flatten", graph.quantized(hidden))
    head = graph.weight("head", weight(10, 144, seed=3))
    return graph.model(graph.node("Gemm", flat, head, transB=1))


MODEL = network()
IMAGES = np.random.default_rng(5).random((7, 3, 3, 3), dtype=np.float32)


def library(**changed: Any) -> FakeTensorRT:
    fake = FakeTensorRT(MODEL, LAYOUTS)
    for name, value in changed.items():
        assert hasattr(fake, name)
        setattr(fake, name, value)
    return fake


def write_bundle(
    path: Path,
    plan: bytes,
    *,
    names: tuple[str, ...] = ("orin",),
    drop: str = "",
    version: str = VERSION,
) -> Bundle:
    """A bundle with the network and plans of it; `drop`: a weight that its map does not have."""
    weights = {m.name: m.value for m in fault_space(MODEL).memories if m.kind == "weights"}
    found = locate(plan, weights)
    assert found.coverage == 1.0
    if drop:
        found = found.model_copy(
            update={"tensors": {n: p for n, p in found.tensors.items() if n != drop}}
        )
    entry = {"backend": "tensorrt", "version": version, "built_for": {"gpu": "Orin"}}
    with BundleWriter(path) as writer:
        onnx.save(MODEL, writer.dir / "model.int8.onnx")
        (writer.dir / "model.fp32.onnx").write_bytes(graph("fp32"))
        writer.save_npz("eval.npz", x=IMAGES, y=np.zeros(7, np.int64))
        (writer.dir / "engines").mkdir()
        for name in names:
            (writer.dir / "engines" / f"{name}.plan").write_bytes(plan)
            found.save(writer.dir / "engines" / f"{name}.weights.json")
        shape = {"name": "input", "shape": (3, 3, 3), "mean": (0.5,) * 3, "std": (0.5,) * 3}
        classes = tuple(map(str, range(10)))
        engines = dict.fromkeys(names, entry)
        attacks: dict[str, Any] = {"attacks": {}, "engines": engines}
        return writer.finish({**manifest(), "input": shape, "classes": classes, **attacks})


def runner(
    tmp_path: Path, injection: str = "auto", fake: FakeTensorRT | None = None, **kw: Any
) -> TrtRunner:
    fake = fake or library()
    bundle = write_bundle(tmp_path / "m.resq", fake.plan(), **kw)
    return TrtRunner.open(bundle, injection=injection, device=device_of, module=fake)


def some_flips(space: FaultSpace, count: int = 300, seed: int = 0) -> Flips:
    weights = space.select(kinds=["weights"])
    draws = np.random.default_rng(seed).choice(weights.size, count, replace=False)
    return weights.flips(np.sort(draws))


def with_flips(flips: Flips, golden: onnx.ModelProto = MODEL) -> onnx.ModelProto:
    """The graph with the flips in its initializers: what every backend must compute."""
    model = onnx.ModelProto()
    model.CopyFrom(golden)
    for tensor in model.graph.initializer:
        if tensor.name in flips:
            value = onnx.numpy_helper.to_array(tensor).copy()
            flip_bits(value, flips[tensor.name])
            tensor.CopyFrom(onnx.numpy_helper.from_array(value, tensor.name))
    return model
