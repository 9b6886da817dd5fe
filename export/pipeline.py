"""export_model(): the whole way from MODEL.pt to a bundle, readable top to bottom."""

from __future__ import annotations

import hashlib
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from resq_deploy import data, quantization
from resq_deploy.bundle import (
    EVAL,
    FP32,
    INT8,
    Bundle,
    BundleWriter,
    Sample,
    check_free,
    compact,
    sha256_of,
)
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError, ModelError
from resq_deploy.export import graph, qdq, rules
from resq_deploy.export.calibrate import Range, calibrate
from resq_deploy.export.load import LoadedModel, load_model
from resq_deploy.manifest import Metrics
from resq_deploy.metrics import accuracy, agreement, sqnr_db

Shape = tuple[int, int, int]
HighPrecision = Literal["fp32", "fp16"]

CALIB_SAMPLES = 512
EVAL_SAMPLES = 2000
_BATCH = 64
_PACKAGES = ("resq-deploy", "torch", "torchvision", "onnx", "onnxscript", "onnxruntime", "numpy")


def export_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    input_shape: Shape | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    calib: str | None = None,
    calib_samples: int = CALIB_SAMPLES,
    eval: str | None = None,
    eval_samples: int = EVAL_SAMPLES,
    high_precision: HighPrecision = "fp32",
    opset: int | None = None,
    trust_pickle: bool = False,
    seed: int = 0,
    force: bool = False,
    reporter: Reporter | None = None,
    command: Sequence[str] = (),
) -> Bundle:
    """Turn a trained network into an INT8 bundle that can be deployed and validated.

    `model`: a file in any form of load.py; `output`: the bundle to write (default: beside the model, `.resq`).
    `calib`, `eval`: data sets (see data.load); default: what a checkpoint says it was trained on. Ranges come
    from the train split of `calib`, figures from the test split of `eval`; no image is in both.
    The same arguments and seed give the same model.int8.onnx, byte for byte.
    Raises ModelError, DataError or BundleError; nothing is left at `output` then.
    """
    say = reporter or Reporter()
    target = Path(output) if output is not None else Path(model).with_suffix(".resq")
    check_free(target, force=force)
    shape = input_shape or _shape_of(calib)
    loaded = load_model(
        model,
        arch=arch,
        arch_args=arch_args,
        input_shape=shape if arch or input_shape or not calib else shape,
        mean=mean,
        std=std,
        trust_pickle=trust_pickle,
    )
    say.log(f"loaded {model}: {loaded.arch}, {len(loaded.classes)} classes")
    chosen = choose_data(loaded, calib, calib_samples, eval, eval_samples, seed, say)
    loaded = replace(loaded, classes=chosen.classes)

    fp32 = graph.to_onnx(loaded.module, loaded.input_shape, name=_name(target), opset=opset)
    plan = rules.plan(fp32)
    ranges = calibrate(fp32, plan.activations, _images(chosen.calibration), reporter=say)
    int8 = qdq.quantize_graph(fp32, ranges, where=plan)
    graph.check(int8)
    metrics = compare(fp32, int8, chosen.evaluation)

    with BundleWriter(target, force=force) as writer:
        _save(fp32, writer.dir / FP32)
        _save(int8, writer.dir / INT8)
        sample = chosen.evaluation
        writer.save_npz(EVAL, x=compact(sample.images), y=sample.labels, index=sample.indices)
        return writer.finish(
            {
                "name": _name(target),
                "arch": loaded.arch,
                "input": {
                    "name": int8.graph.input[0].name,
                    "shape": loaded.input_shape,
                    "mean": loaded.mean,
                    "std": loaded.std,
                },
                "classes": loaded.classes,
                "quantization": describe(fp32, int8, plan, ranges, high_precision),
                "adjustment": {"applied": False},
                "metrics": metrics,
                "provenance": {
                    "versions": _versions(),
                    "command": tuple(command),
                    "seed": seed,
                    "model_sha256": loaded.sha256,
                    "calibration": chosen.record,
                    "training": {**loaded.trained, "metrics": dict(loaded.metrics)},
                },
            }
        )


@dataclass(frozen=True, slots=True, eq=False)
class ChosenData:
    """Calibration images, and an evaluation sample that has none of them."""

    calibration: data.Dataset
    evaluation: Sample
    classes: tuple[str, ...]
    record: Mapping[str, Any]


def choose_data(
    loaded: LoadedModel,
    calib: str | None,
    calib_samples: int,
    evaluate: str | None,
    eval_samples: int,
    seed: int,
    reporter: Reporter,
) -> ChosenData:
    """Draw the calibration set and the evaluation sample. Raises DataError where that cannot be done."""
    spec = calib or loaded.trained.get("data")
    if not spec:
        raise DataError(
            "there is no calibration data", f"give --calib, one of: {', '.join(data.known())}"
        )
    spec, held_out = str(spec), str(evaluate or spec)
    shape = loaded.input_shape
    train = data.load(spec, "train", shape=shape, reporter=reporter)
    test = data.load(held_out, "test", shape=shape, reporter=reporter)
    for name, dataset in ((spec, train), (held_out, test)):
        if len(dataset.classes) != len(loaded.classes):
            raise DataError(
                f"{name} has {len(dataset.classes)} classes, the network {len(loaded.classes)}",
                "choose the data it was trained on",
            )
    calibration = train.take(calib_samples, seed)
    evaluation = _unseen(test.take(eval_samples + len(calibration), seed + 1), calibration)
    if not len(evaluation):
        raise DataError(
            f"{held_out} has no test image that is not used for calibration",
            "give another --eval, or a smaller --calib-samples",
        )
    return ChosenData(
        calibration,
        evaluation.take(eval_samples),
        loaded.classes if loaded.form == "checkpoint" else test.classes,
        {
            "data": spec,
            "split": "train",
            "samples": len(calibration),
            "sha256": calibration.digest(),
            "eval_data": held_out,
            "eval_split": "test",
        },
    )


def _unseen(test: data.Dataset, calibration: data.Dataset) -> Sample:
    seen = {_key(image) for image in _rows(calibration)}
    kept = [i for i, image in enumerate(_rows(test)) if _key(image) not in seen]
    images, labels = test.batch(np.asarray(kept, dtype=np.int64))
    return Sample(images, labels, test.indices[kept])


def _rows(dataset: data.Dataset) -> Iterator[NDArray[np.float32]]:
    for images, _ in dataset.batches(256):
        yield from images


def _key(image: NDArray[np.float32]) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()


def _shape_of(spec: str | None) -> Shape | None:
    return data.load(spec, "train").shape if spec else None


def _images(dataset: data.Dataset) -> Iterator[NDArray[np.float32]]:
    return (images for images, _ in dataset.batches(_BATCH))


def compare(fp32: onnx.ModelProto, int8: onnx.ModelProto, sample: Sample) -> Metrics:
    """FP32 against INT8 on a held-out sample, by ONNX Runtime."""
    exact, coded = graph.run(fp32, sample.images), graph.run(int8, sample.images)
    return Metrics(
        samples=len(sample),
        fp32_accuracy=accuracy(exact, sample.labels),
        int8_accuracy=accuracy(coded, sample.labels),
        agreement=agreement(exact, coded),
        sqnr_db={int8.graph.output[0].name: sqnr_db(exact, coded)},
    )


def describe(
    fp32: onnx.ModelProto,
    int8: onnx.ModelProto,
    plan: rules.Plan,
    ranges: Mapping[str, Range],
    high_precision: HighPrecision,
) -> dict[str, Any]:
    """The manifest's account of every scale in the INT8 graph, and of what stayed float."""
    before = {t.name: t for t in fp32.graph.initializer}
    after = {t.name: numpy_helper.to_array(t) for t in int8.graph.initializer}
    return {
        "weights": {
            w.name: _weight(w, numpy_helper.to_array(before[w.name]), after) for w in plan.weights
        },
        "activations": {
            name: {
                "scale": float(after[f"{name}.scale"]),
                "low": ranges[name].low,
                "high": ranges[name].high,
                "method": ranges[name].method,
                "sqnr_db": ranges[name].sqnr_db,
            }
            for name in plan.activations
        },
        "float_ops": plan.float_ops,
        "high_precision": high_precision,
    }


def _weight(
    weight: rules.Weight, exact: NDArray[Any], after: Mapping[str, NDArray[Any]]
) -> dict[str, Any]:
    codes, scale = after[weight.name], after[f"{weight.name}.scale"].astype(np.float32)
    return {
        "layer": weight.node,
        "op": weight.op,
        "shape": codes.shape,
        "axis": weight.axis,
        "scale": tuple(map(float, scale)),
        "sqnr_db": sqnr_db(exact, quantization.dequantize(codes, scale, weight.axis)),
    }


def _save(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def _name(target: Path) -> str:
    return target.name.removesuffix(".resq") or "model"


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
