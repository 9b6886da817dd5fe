"""Common corruptions: the 15 of ImageNet-C at 5 severities (Hendrycks & Dietterich, ICLR 2019, 1903.12261).

The natural counterpart of attacks, made by the package `imagecorruptions-imaug` (extra `corruptions`). Severities are
ImageNet's, made for 224 pixels: blurs of fixed radius weigh more on small images than CIFAR-10-C's do. The package
wants 32 x 32 pixels or more and 1 or 3 channels; smaller images are continued by reflection and cropped again.
"""

from __future__ import annotations

import importlib
import random
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError, MissingExtra
from resq_deploy.metrics import top1
from resq_deploy.report.model import Figure
from resq_deploy.runtime.runner import Images, Runner
from resq_deploy.statistics import Tally, wilson

CORRUPTIONS = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
SEVERITIES = (1, 2, 3, 4, 5)
MEAN = "accuracy@corruptions"
_SMALLEST = 32


@dataclass(frozen=True, slots=True)
class Corrupted:
    """Accuracy on one corruption at one severity."""

    corruption: str
    severity: int
    accuracy: Figure

    @property
    def figure_name(self) -> str:
        """How figures name it: `accuracy@corruption=fog,severity=3`."""
        return f"accuracy@corruption={self.corruption},severity={self.severity}"


@dataclass(frozen=True, slots=True)
class CorruptionResult:
    """All that were run. `mean`: over corruptions and severities, with the images as the sample."""

    cells: tuple[Corrupted, ...]
    mean: Figure

    def figures(self) -> dict[str, Figure]:
        """By name, as requirements use them."""
        return {**{cell.figure_name: cell.accuracy for cell in self.cells}, MEAN: self.mean}


def evaluate(
    runner: Runner,
    sample: Sample,
    names: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    *,
    confidence: float = 0.95,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> CorruptionResult:
    """Accuracy of the artifact on corrupted images. Raises DataError, MissingExtra."""
    wanted = [(name, severity) for name in names for severity in severities]
    for name, severity in wanted:
        _check(name, severity)
    right = np.zeros((len(wanted), len(sample)), dtype=bool)
    cells = []
    with (reporter or Reporter()).task("corruptions", len(wanted), "of them") as task:
        for row, (name, severity) in enumerate(wanted):
            images = corrupt(sample.images, name, severity, seed=seed)
            right[row] = top1(runner(images)) == sample.labels
            found = wilson(int(right[row].sum()), len(sample), confidence)
            cells.append(Corrupted(name, severity, Figure(**asdict(found))))
            task.advance(1)
    each = Tally(len(wanted))
    for hits in right.sum(axis=0):
        each.add(int(hits))
    return CorruptionResult(tuple(cells), Figure(**asdict(each.estimate(confidence))))


def corrupt(images: Images, name: str, severity: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Corrupted copies, float32 [N, C, H, W] in [0, 1] on 8-bit steps; C is 1 or 3.

    Image i of a seed is corrupted the same way on every call. Raises DataError, MissingExtra.
    """
    _check(name, severity)
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise DataError(f"images of shape {images.shape} cannot be corrupted", "1 or 3 channels")
    package = _package()
    height, width = images.shape[2:]
    below, right = max(_SMALLEST - height, 0), max(_SMALLEST - width, 0)
    codes = np.rint(images.transpose(0, 2, 3, 1) * 255).astype(np.uint8)
    codes = np.pad(codes, ((0, 0), (0, below), (0, right), (0, 0)), mode="symmetric")
    made = np.empty((len(images), height, width, images.shape[1]), dtype=np.uint8)
    for index, image in enumerate(codes):
        with _seeded([seed, CORRUPTIONS.index(name), severity, index]):
            moved = package.corrupt(image, severity=severity, corruption_name=name)
        made[index] = moved[:height, :width, : images.shape[1]]
    pixels: NDArray[np.float32] = made.transpose(0, 3, 1, 2).astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(pixels)


def _check(name: str, severity: int) -> None:
    if name not in CORRUPTIONS:
        raise DataError(f"unknown corruption {name!r}", f"one of: {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise DataError(f"a severity of {severity}", "1 to 5")


@lru_cache(maxsize=1)
def _package() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("imagecorruptions")
    except ImportError as error:
        raise MissingExtra("imagecorruptions-imaug", "corruptions") from error


@lru_cache(maxsize=1)
def _seed_compiled() -> Any:
    """Seeds the generator of numba's compiled code, which is its own: glass blur draws from it."""

    def seed(value: int) -> None:
        np.random.seed(value)  # noqa: NPY002

    return importlib.import_module("numba").njit(seed)


@contextmanager
def _seeded(entropy: Sequence[int]) -> Iterator[None]:
    """The package draws from four global generators and takes no seed: seed them, and put back what can be."""
    real = np.random.default_rng
    seeds = np.random.SeedSequence(entropy)
    number = int(seeds.generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002
    _seed_compiled()(number)
    try:
        with mock.patch("numpy.random.default_rng", return_value=real(seeds)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
