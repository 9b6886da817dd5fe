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
from resq_deploy.report.model import Corruption, Figure
from resq_deploy.runtime import crossed
from resq_deploy.runtime.runner import Images, Runner
from resq_deploy.statistics import wilson

GROUPS = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
}
CORRUPTIONS = tuple(name for names in GROUPS.values() for name in names)
SEVERITIES = (1, 2, 3, 4, 5)
IMAGES = 256  # a corruption of one image takes milliseconds, and there are 75 of them
MEAN = "accuracy@corruptions"
_SMALLEST = 32


@dataclass(frozen=True, slots=True)
class CorruptionResult:
    """All that were run, by name of figure, and cell by cell.

    `figures`: each corruption at each severity, each over its severities, and the mean over all. The
    intervals of means count images, not (image, corruption) pairs, which are not independent.
    """

    cells: tuple[Corruption, ...]
    figures: dict[str, Figure]


def figure_names(names: Sequence[str], severities: Sequence[int]) -> tuple[str, ...]:
    """Names of the figures of these corruptions, in the order of the report; none where there are none."""
    if not names:
        return ()
    cells = (cell_name(name, severity) for name in names for severity in severities)
    return (MEAN, *(f"accuracy@corruption={name}" for name in names), *cells)


def cell_name(name: str, severity: int) -> str:
    """How figures name one corruption at one severity: `accuracy@corruption=fog,severity=3`."""
    return f"accuracy@corruption={name},severity={severity}"


def parse_names(text: str) -> tuple[str, ...]:
    """`all`, groups (`noise,weather`) or single ones (`fog,snow`) in the order of the paper. Raises DataError."""
    wanted = {part.strip().lower().replace("-", "_") for part in text.split(",") if part.strip()}
    known = {"all": CORRUPTIONS, **GROUPS, **{name: (name,) for name in CORRUPTIONS}}
    for part in sorted(wanted - known.keys()):
        raise DataError(f"unknown corruption {part!r}", f"one of: {', '.join(known)}")
    chosen = {name for part in wanted for name in known[part]}
    return tuple(name for name in CORRUPTIONS if name in chosen)


def check(names: Sequence[str], severities: Sequence[int], shape: tuple[int, int, int]) -> None:
    """Raise DataError or MissingExtra unless these can be run on images of this shape; before any long work."""
    for name in names:
        for severity in severities:
            _check(name, severity)
    if names:
        _check_channels(shape)
        _package()


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
    check(names, severities, runner.shape)
    right = np.zeros((len(names), len(severities), len(sample)), dtype=bool)
    with (reporter or Reporter()).task("corruptions", right[..., 0].size, "of them") as task:
        for place in np.ndindex(*right.shape[:2]):
            images = corrupt(sample.images, names[place[0]], severities[place[1]], seed=seed)
            right[place] = top1(runner(images)) == sample.labels
            task.advance(1)
    found = [
        *([_mean(right, confidence)] if names else []),
        *(_mean(each, confidence) for each in right),
        *(_share(cell, confidence) for row in right for cell in row),
    ]
    figures = dict(zip(figure_names(names, severities), found, strict=True))
    return CorruptionResult(
        tuple(
            Corruption(corruption=n, severity=s, accuracy=figures[cell_name(n, s)])
            for n in names
            for s in severities
        ),
        figures,
    )


def _share(right: NDArray[np.bool_], confidence: float) -> Figure:
    return Figure(**asdict(wilson(int(right.sum()), right.size, confidence)))


def _mean(right: NDArray[np.bool_], confidence: float) -> Figure:
    """The mean over corruptions, which are all there are; the images, along the last axis, are a sample."""
    each = right.reshape(-1, right.shape[-1])
    return Figure(**asdict(crossed.share(each, confidence, sampled_rows=False)))


def corrupt(images: Images, name: str, severity: int, *, seed: int = 0) -> NDArray[np.float32]:
    """Corrupted copies, float32 [N, C, H, W] in [0, 1] on 8-bit steps; C is 1 or 3.

    Image i of a seed is corrupted the same way on every call. Raises DataError, MissingExtra.
    """
    _check(name, severity)
    if images.ndim != 4:
        raise DataError(f"images of shape {images.shape}", "[N, C, H, W]")
    _check_channels(images.shape[1:])
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


def _check_channels(shape: tuple[int, ...]) -> None:
    if shape[0] not in (1, 3):
        raise DataError(f"images of shape {shape} cannot be corrupted", "1 or 3 channels")


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
