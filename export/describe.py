"""What the manifest says about a quantized graph: every scale, what it costs, and FP32 against INT8."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy import quantization, saturation
from resq_deploy.bundle import Sample
from resq_deploy.export import graph
from resq_deploy.export.calibrate import Range
from resq_deploy.export.dialect import Dialect
from resq_deploy.export.rules import Plan, Weight
from resq_deploy.manifest import Metrics, Reference
from resq_deploy.metrics import accuracy, agreement, sqnr_db, top1

_PACKAGES = frozenset(
    {
        *("resq-deploy", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy"),
        *("tensorrt", "tensorrt-rtx"),
    }
)


LEAST_AGREEMENT = 0.97  # of INT8 with FP32, below which an export says so
MOST_LOST = 0.02  # of accuracy
GUESS = 0.1  # of the way from chance to always right
UNTOLD = 0.3  # ... where nobody said how pixels are normalized: forgetting it costs less than all
FLAT = 15.0  # dB, below which a few outliers take a tensor's range
_REFERENCES: Mapping[Reference, str] = {
    "fp32": "FP32",
    "dequantized": "its own weights in float arithmetic",
}


def compare(
    fp32: onnx.ModelProto, int8: onnx.ModelProto, sample: Sample, reference: Reference = "fp32"
) -> Metrics:
    """FP32 against INT8 on a held-out sample, both in ONNX Runtime on the CPU; `reference`: what `fp32` is."""
    exact, coded = graph.run(fp32, sample.images), graph.run(int8, sample.images)
    return Metrics(
        samples=len(sample),
        fp32_accuracy=accuracy(exact, sample.labels),
        int8_accuracy=accuracy(coded, sample.labels),
        agreement=agreement(exact, coded),
        sqnr_db={int8.graph.output[0].name: sqnr_db(exact, coded)},
        reference=reference,
    )


def guesses(
    metrics: Metrics, classes: int, *, told: bool = False, known: bool = False
) -> str | None:
    """What to say where the network itself answers hardly better than chance on the held-out images; else None.

    `told`: whether the user said how pixels are normalized; `known`: whether the network's file does.
    """
    chance = 1 / classes
    least = GUESS if told or known else UNTOLD
    if metrics.fp32_accuracy >= chance + least * (1 - chance):
        return None
    causes = ["if it wants normalized pixels, give --mean and --std"]
    causes = ["look at --mean and --std"] if told else [] if known else causes
    causes += ["look at the order of the classes" + " too" * bool(causes)]
    return (
        f"the network is right on {metrics.fp32_accuracy:.1%} of the held-out images, of {classes} classes:"
        f" {'; '.join(causes)}"
    )


def doubts(metrics: Metrics, ranges: Mapping[str, Mapping[str, Any]]) -> str | None:
    """What to say where INT8 is not what FP32 was; None where all is well."""
    lost = metrics.fp32_accuracy - metrics.int8_accuracy
    if metrics.agreement >= LEAST_AGREEMENT and lost <= MOST_LOST:
        return None
    said = (
        f"INT8 agrees with {_REFERENCES[metrics.reference]} on {metrics.agreement:.1%} of the held-out images"
        + (f" and loses {100 * lost:.1f} points of accuracy" if lost >= 0.001 else "")
    )
    known = [(name, span["sqnr_db"]) for name, span in ranges.items() if "sqnr_db" in span]
    if not known:
        return f"{said}. It takes pixels in [0, 1] here: if it wants others, give --mean and --std"
    worst = sorted(known, key=lambda item: float(item[1]))[:3]
    named = ", ".join(f"{name} ({decibel:.1f} dB)" for name, decibel in worst)
    return f"{said}; activations that INT8 holds worst on the calibration images: {named}. " + (
        f"Below about {FLAT:g} dB a few outliers take the whole range: look at how the network was trained"
        if float(worst[0][1]) < FLAT
        else "That is not bad, if they look like the images that the network will see: look at --calib"
    )


def attack_success(
    model: onnx.ModelProto, sample: Sample, adversarial: NDArray[np.float32]
) -> float:
    """Share of the images that a graph gets right of which it gets the adversarial version wrong, in [0, 1]."""
    right = top1(graph.run(model, sample.images)) == sample.labels
    fooled = top1(graph.run(model, adversarial)) != sample.labels
    return float((right & fooled).sum() / max(int(right.sum()), 1))


def quantization_of(
    fp32: onnx.ModelProto,
    int8: onnx.ModelProto,
    plan: Plan,
    ranges: Mapping[str, Range],
    dialect: Dialect,
) -> dict[str, Any]:
    """The manifest's account of every scale in the INT8 graph, and of what stayed float."""
    before = {t.name: t for t in fp32.graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    return {
        "scheme": "int8-qdq" if dialect.unsigned else "int8-symmetric-qdq",
        "rules": dialect.rules,
        "saturates": saturation.could(int8),
        "weights": {w.name: _weight(w, before[w.name], after) for w in plan.weights},
        "activations": {name: _activation(name, ranges[name], after) for name in plan.activations},
        "float_ops": plan.float_ops,
        "high_precision": "fp16" if dialect.half else "fp32",
    }


def _weight(
    weight: Weight, tensor: onnx.TensorProto, after: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    codes, scale = after[weight.name], after[f"{weight.name}.scale"].astype(np.float32)
    restored = quantization.dequantize(codes, scale, weight.axis)
    return {
        "layer": weight.node,
        "op": weight.op,
        "shape": codes.shape,
        "axis": weight.axis,
        "scale": tuple(map(float, scale)),
        "sqnr_db": sqnr_db(numpy_helper.to_array(tensor), restored),
    }


def _activation(name: str, chosen: Range, after: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    return {
        "scale": float(after[f"{name}.scale"]),
        "zero_point": int(after[f"{name}.zero_point"]),
        "low": chosen.low,
        "high": chosen.high,
        "method": chosen.method,
        "sqnr_db": chosen.sqnr_db,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that make bundles, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in sorted(_PACKAGES):
        installed = next(iter(metadata.Distribution.discover(name=package)), None)
        if installed is not None:
            found[package] = installed.version
    return found
