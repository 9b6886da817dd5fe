"""A data set's name -> images and labels; importable with the base install alone."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from resq_deploy import _image_folders as folders
from resq_deploy import _readers as readers
from resq_deploy._pixels import Images, MemorySource, Shape
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError

Split = Literal["train", "test"]

UNLABELLED = ("unlabelled",)  # the classes of images that nobody has labelled

_CHUNK = 1024


class PixelSource(Protocol):
    """Where a data set keeps its pixels: all in memory, or files decoded when they are asked
    for.
    """

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [B, C, H, W] in [0, 1]."""

    def raw(self, indices: NDArray[np.int64]) -> bytes:
        """The stored bytes of these images, for hashing."""


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Labelled images of one shape: float32 [C, H, W] in [0, 1], labels int64 in [0,
    len(classes)).
    """

    name: str
    classes: tuple[str, ...]
    shape: Shape
    labels: NDArray[np.int64]
    source: PixelSource = field(repr=False)
    indices: NDArray[np.int64] = field(repr=False)

    @classmethod
    def from_arrays(
        cls,
        name: str,
        images: NDArray[np.generic],
        labels: NDArray[np.generic],
        classes: Sequence[str] | None = None,
    ) -> Dataset:
        """Images uint8 or float in [0, 1], [N, C, H, W]; labels integers [N]. Raises DataError on
        anything else.
        """
        pixels = readers.checked_pixels(name, images)
        numbers = readers.checked_labels(name, labels, len(pixels), classes)
        names = tuple(classes) if classes else tuple(map(str, range(int(numbers.max()) + 1)))
        _, channels, height, width = pixels.shape
        source = MemorySource(pixels)
        return cls(name, names, (channels, height, width), numbers, source, np.arange(len(pixels)))

    def __len__(self) -> int:
        return len(self.labels)

    def batch(
        self, indices: Sequence[int] | NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Images float32 [B, C, H, W] in [0, 1] and labels int64 [B] at these positions."""
        where = np.asarray(indices, dtype=np.int64)
        return self.source.read(self.indices[where]), self.labels[where]

    def batches(
        self, size: int, *, seed: int | None = None
    ) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int64]]]:
        """Every example once, `size` at a time (the last batch may be smaller); shuffled when
        seeded.
        """
        if size < 1:
            raise DataError(f"a batch of {size} examples", "the batch size must be at least 1")
        order = np.arange(len(self))
        if seed is not None:
            np.random.default_rng(seed).shuffle(order)
        for start in range(0, len(order), size):
            yield self.batch(order[start : start + size])

    def subset(self, indices: NDArray[np.int64]) -> Dataset:
        """The examples at these positions, in this order."""
        return replace(self, labels=self.labels[indices], indices=self.indices[indices])

    def take(self, n: int, seed: int) -> Dataset:
        """`n` examples (or all, if fewer), drawn without replacement, classes as equal as they can
        be.

        The same seed gives the same examples on every machine, and a smaller `n` gives a prefix of
        a larger one.
        """
        if n < 1:
            raise DataError(f"cannot take {n} examples", "ask for at least 1")
        rng = np.random.default_rng(seed)
        order = rng.permutation(len(self))
        rank = np.empty(len(self), dtype=np.int64)
        for label in range(len(self.classes)):
            members = order[self.labels[order] == label]
            rank[members] = np.arange(len(members))
        return self.subset(np.lexsort((rng.random(len(self)), rank))[:n])

    def digest(self) -> str:
        """sha256 (hex) of classes, shape, labels and pixels in their order."""
        hashed = hashlib.sha256(repr((self.classes, self.shape, len(self))).encode())
        hashed.update(self.labels.astype("<i8").tobytes())
        for start in range(0, len(self), _CHUNK):
            hashed.update(self.source.raw(self.indices[start : start + _CHUNK]))
        return hashed.hexdigest()


def load(
    spec: str,
    split: Split,
    *,
    shape: Shape | None = None,
    labelled: bool = True,
    reporter: Reporter | None = None,
) -> Dataset:
    """The train or test split of a named data set.

    `spec`: `digits`, `fashion-mnist[:DIR]`, `cifar10:DIR`, `cifar100:DIR`, `gtsrb:DIR`,
    `imagefolder:DIR` or `FILE.npz`. `shape` (C, H, W) is what the images must have; an imagefolder
    is scaled and centre-cropped to it. `labelled` false: an npz or imagefolder need not have labels; where
    it has none, all are 0 and the classes are UNLABELLED. CIFAR and GTSRB are downloaded into a DIR that exists and
    does not hold them, Fashion-MNIST without DIR into ~/.cache/resq-deploy. Raises DataError, or
    MissingExtra where a reader needs a package that is not installed.
    """
    if split not in ("train", "test"):
        raise DataError(f"unknown split {split!r}", "a data set has 'train' and 'test'")
    reader, place = _reader(spec)
    images = reader(place, split, shape, reporter or Reporter())
    labels = images.labels
    if labels is None:
        if labelled:
            raise DataError(
                f"{spec} has no labels for its {split} split",
                "an npz has them as y, an imagefolder as DIR/CLASS/",
            )
        labels, images = np.zeros(len(images.pixels), np.int64), replace(images, classes=UNLABELLED)
    dataset = _dataset(spec, images, labels)
    if shape is not None and dataset.shape != tuple(shape):
        raise DataError(
            f"{spec} has images of shape {_times(dataset.shape)}, not {_times(shape)}",
            "choose data of the network's input shape (resq-export, resq-harden: or another --input-shape)",
        )
    return dataset


def known() -> tuple[str, ...]:
    """How a data set can be named."""
    return (
        "digits",
        "fashion-mnist[:DIR]",
        *(f"{name}:DIR" for name in ("cifar10", "cifar100", "gtsrb", "imagefolder")),
        "FILE.npz",
    )


_Reader = Callable[[str, Split, Shape | None, Reporter], Images]

_READERS: Mapping[str, _Reader] = {
    "digits": readers.digits,
    "fashion-mnist": readers.fashion_mnist,
    "cifar10": readers.cifar10,
    "cifar100": readers.cifar100,
    "gtsrb": folders.gtsrb,
    "imagefolder": folders.image_folder,
}
_NEED_PLACE = frozenset({"cifar10", "cifar100", "gtsrb", "imagefolder"})


def _reader(spec: str) -> tuple[_Reader, str]:
    if spec.lower().endswith(".npz"):
        return readers.npz, spec
    name, _, place = spec.partition(":")
    if name not in _READERS:
        near = get_close_matches(name, _READERS, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        raise DataError(f"unknown data set {spec!r}", f"{guess}known: {', '.join(known())}")
    if name in _NEED_PLACE and not place:
        raise DataError(f"{name} needs a directory", f"write {name}:DIR")
    if name == "digits" and place:
        raise DataError("digits ships with scikit-learn and takes no directory", "write digits")
    return _READERS[name], place


def _dataset(spec: str, images: Images, labels: NDArray[Any]) -> Dataset:
    if isinstance(images.pixels, np.ndarray):
        return Dataset.from_arrays(spec, images.pixels, labels, images.classes)
    numbers = readers.checked_labels(spec, labels, len(images.pixels), images.classes)
    classes = tuple(images.classes or ())
    return Dataset(
        spec, classes, images.pixels.shape, numbers, images.pixels, np.arange(len(images.pixels))
    )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
