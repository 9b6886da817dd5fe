"""Sample: labelled images as they travel in a bundle, small on disk and checked when they are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import BundleError
from resq_deploy.manifest import Manifest


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """Labelled images: float32 [N, C, H, W] in [0, 1] and int64 [N].

    `indices`: their place in the evaluation sample.
    """

    images: NDArray[np.float32]
    labels: NDArray[np.int64]
    indices: NDArray[np.int64]

    def __len__(self) -> int:
        return int(self.labels.size)

    def take(self, count: int | None) -> Sample:
        """The first `count` images (None: all)."""
        return (
            self
            if count is None
            else Sample(self.images[:count], self.labels[:count], self.indices[:count])
        )


def stacked(samples: Sequence[Sample]) -> Sample:
    """Several samples as one, a block after the other."""
    first, *others = samples
    if not others:
        return first
    parts = [(s.images, s.labels, s.indices) for s in samples]
    return Sample(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def as_pixels(images: NDArray[Any]) -> NDArray[np.float32]:
    """uint8 0..255 or float images to float32 in [0, 1]."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / np.float32(255)
    return images.astype(np.float32)


def compact(images: NDArray[np.float32]) -> NDArray[Any]:
    """Pixels as uint8 where that loses nothing, else float32."""
    codes = np.rint(images * 255).astype(np.uint8)
    return codes if np.array_equal(as_pixels(codes), images) else images


def sample_of(path: Path, arrays: Mapping[str, NDArray[Any]], manifest: Manifest) -> Sample:
    """The sample in the arrays `x`, `y` and `index` of a file of a bundle. Raises BundleError where it does not fit."""
    try:
        labels = _whole(arrays["y"])
        indices = _whole(arrays.get("index", np.arange(labels.size)))
        with np.errstate(over="ignore", invalid="ignore"):
            images = as_pixels(arrays["x"])
    except (KeyError, ValueError, TypeError) as error:
        raise BundleError(f"{path} lacks x or y", "export the model again") from error
    fits = (
        images.ndim == 4
        and images.shape[1:] == manifest.input.shape
        and labels.shape == indices.shape == images.shape[:1]
    )
    if not fits or labels.size == 0:
        raise BundleError(f"{path} does not fit the bundle's input", "export the model again")
    if not np.isfinite(images).all() or images.min() < 0 or images.max() > 1:
        raise BundleError(f"{path} has pixels outside [0, 1]", "export the model again")
    if indices.min() < 0:
        raise BundleError(f"{path} has a negative index", "export the model again")
    if labels.min() < 0 or labels.max() >= len(manifest.classes):
        raise BundleError(
            f"{path} has labels outside the bundle's classes", "export the model again"
        )
    return Sample(images, labels, indices)


def _whole(array: NDArray[Any]) -> NDArray[np.int64]:
    if array.dtype.kind not in "iu" or (array.size and array.max() > 2**62):
        raise ValueError("labels and indices are whole numbers")
    return array.astype(np.int64)
