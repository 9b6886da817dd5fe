"""Which images calibrate the network and which judge it: drawn from a seed, and never the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy import data
from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError
from resq_deploy.export.load import LoadedModel

Shape = tuple[int, int, int]
Source = str | data.Dataset

FEW = 100  # held-out images, below which a point of accuracy is less than one of them


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Calibration images and a held-out sample that has none of them; `record` says what they are.

    `labelled`: whether labels of the calibration images are classes of the network.
    """

    calibration: data.Dataset
    held_out: Sample
    classes: tuple[str, ...]
    record: Mapping[str, Any]
    labelled: bool = True


def shape_of(source: Source) -> Shape:
    """Shape (C, H, W) of a data set's images. Raises DataError."""
    return _load(source, "train", None, Reporter()).shape


def classes_of(source: Source, shape: Shape) -> int:
    """How many classes the data set has that a network of this input shape is judged by. Raises DataError."""
    return len(_load(source, "test", shape, Reporter()).classes)


def draw(
    model: LoadedModel,
    calib: Source | None,
    calib_samples: int,
    evaluation: Source | None,
    eval_samples: int,
    *,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Drawn:
    """Draw `calib_samples` images of a train split and `eval_samples` of a test split, classes evenly.

    `calib`, `evaluation`: names of data sets, or the sets themselves; default: what the checkpoint was
    trained on. An image that is used for calibration is not used for evaluation, wherever it comes from.
    Classes matter where networks are judged: calibration needs images only, and where its labels are no classes of the
    network, `labelled` is false. Raises DataError where there are no such data, they do not fit the network, or none is
    left.
    """
    say = reporter or Reporter()
    source = calib if calib is not None else model.trained.get("data")
    if not source:
        raise DataError(
            "there is no calibration data", f"give --calib, one of: {', '.join(data.known())}"
        )
    judge = evaluation if evaluation is not None else source
    train = _load(source, "train", model.input_shape, say)
    test = _load(judge, "test", model.input_shape, say)
    _check_classes(test, model, say)
    if train.classes != test.classes:
        _check_order(train, test)
    calibration = train.take(calib_samples, seed)
    held_out = _unseen(test.take(eval_samples + len(calibration), seed + 1), calibration)
    if not len(held_out):
        raise DataError(
            f"{test.name} has no test image that calibration does not use",
            "give another --eval, or fewer --calib-samples",
        )
    held_out = held_out.take(eval_samples)
    if len(held_out) < FEW:
        say.warn(
            f"{len(held_out)} held-out images say little of accuracy: give --eval, or fewer --calib-samples"
        )
    record = {
        "data": train.name,
        "split": "train",
        "samples": len(calibration),
        "sha256": calibration.digest(),
        "eval_data": test.name,
        "eval_split": "test",
    }
    named = model.form != "checkpoint" and len(test.classes) == len(model.classes)
    classes = test.classes if named else model.classes
    labelled = 1 < len(train.classes) <= len(classes)  # one class for all is nobody's label
    return Drawn(calibration, held_out, classes, record, labelled)


def batches(dataset: data.Dataset, size: int = 64) -> Iterator[NDArray[np.float32]]:
    """The images of a data set, float32 [B, C, H, W] in [0, 1], batch by batch."""
    for images, _ in dataset.batches(size):
        yield images


def as_sample(dataset: data.Dataset, count: int | None = None) -> Sample:
    """The first `count` images of a data set (None: all) in memory."""
    rows = np.arange(len(dataset))[:count]
    images, labels = dataset.batch(rows)
    return Sample(images, labels, rows)


def _load(
    source: Source, split: data.Split, shape: Shape | None, reporter: Reporter
) -> data.Dataset:
    if isinstance(source, str):
        return data.load(source, split, shape=shape, labelled=split == "test", reporter=reporter)
    if shape is not None and source.shape != shape:
        raise DataError(
            f"{source.name} has images of shape {source.shape}, not {shape}",
            "choose data of the network's input shape",
        )
    return source


def _check_order(train: data.Dataset, test: data.Dataset) -> None:
    """Raise DataError where two data sets name as many classes, but others: their numbers mean different classes."""
    if len(train.classes) == len(test.classes) and not (_numbered(train) or _numbered(test)):
        pairs = zip(train.classes, test.classes, strict=True)
        here, there = next((a, b) for a, b in pairs if a != b)
        raise DataError(
            f"{test.name} has {there!r} where {train.name} has {here!r}: labels would mean other classes",
            "name the classes alike in --calib and --eval",
        )


def _numbered(dataset: data.Dataset) -> bool:
    """Whether its classes have no names: then there are as many as its largest label says."""
    return dataset.classes == tuple(map(str, range(len(dataset.classes))))


def _check_classes(dataset: data.Dataset, model: LoadedModel, reporter: Reporter) -> None:
    if _numbered(dataset) and len(dataset.classes) < len(model.classes):
        return  # images of the last classes are not among them
    if len(dataset.classes) != len(model.classes):
        raise DataError(
            f"{dataset.name} has {len(dataset.classes)} classes, the network {len(model.classes)}",
            "choose the data it was trained on",
        )
    numbers = tuple(map(str, range(len(model.classes))))
    if model.form == "checkpoint" and dataset.classes != model.classes:
        pair = f"{dataset.classes[0]!r} where the network has {model.classes[0]!r}"
        if numbers not in (dataset.classes, model.classes):
            raise DataError(
                f"{dataset.name} has other classes: {pair}", "choose the data it was trained on"
            )
        reporter.warn(f"{dataset.name} names its classes otherwise: {pair}")


def _unseen(test: data.Dataset, calibration: data.Dataset) -> Sample:
    seen = {_key(image) for images in batches(calibration) for image in images}
    rows = (image for images in batches(test) for image in images)
    kept = np.array([i for i, image in enumerate(rows) if _key(image) not in seen], dtype=np.int64)
    images, labels = test.batch(kept)
    return Sample(images, labels, test.indices[kept])


def _key(image: NDArray[np.float32]) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=16).digest()
