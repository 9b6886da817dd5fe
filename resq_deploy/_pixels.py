"""Where pixels lie: in memory, or in image files decoded when they are read; and how they get
there.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.console import Reporter
from resq_deploy.errors import DataError, MissingExtra

Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class MemorySource:
    """Images in memory: uint8, or float32 in [0, 1]; [N, C, H, W]."""

    pixels: NDArray[Any]

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [B, C, H, W] in [0, 1]."""
        chosen = self.pixels[indices]
        if chosen.dtype == np.uint8:
            return chosen.astype(np.float32) / np.float32(255)
        return chosen.astype(np.float32, copy=False)

    def raw(self, indices: NDArray[np.int64]) -> bytes:
        """The stored bytes of these images."""
        chosen = self.pixels[indices]
        return np.ascontiguousarray(chosen, dtype=chosen.dtype.newbyteorder("<")).tobytes()


@dataclass(frozen=True, slots=True, eq=False)
class FileSource:
    """Image files, decoded when read: scaled to cover `shape`, then centre-cropped to it (or
    `stretch`ed).
    """

    paths: tuple[Path, ...]
    shape: Shape
    stretch: bool = False

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """float32 [B, C, H, W] in [0, 1]."""
        out = np.empty((len(indices), *self.shape), dtype=np.float32)
        for row, index in enumerate(indices):
            out[row] = self.decode(int(index)).astype(np.float32) / np.float32(255)
        return out

    def raw(self, indices: NDArray[np.int64]) -> bytes:
        """The decoded bytes of these images."""
        return b"".join(self.decode(int(index)).tobytes() for index in indices)

    def decode(self, index: int) -> NDArray[np.uint8]:
        """uint8 [C, H, W]."""
        image_module = pillow()
        channels, height, width = self.shape
        path = self.paths[index]
        try:
            with image_module.open(path) as file:
                image = file.convert("L" if channels == 1 else "RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"cannot decode {path}: {error}", "remove or replace the file"
            ) from error
        pixels = np.asarray(self._fitted(image, (width, height)), dtype=np.uint8)
        return pixels[None] if channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))

    def _fitted(self, image: Any, size: tuple[int, int]) -> Any:
        if self.stretch:
            return image.resize(size, pillow().Resampling.BILINEAR)
        scale = max(size[0] / image.width, size[1] / image.height)
        wide, high = (
            max(round(side * scale), low) for side, low in zip(image.size, size, strict=True)
        )
        scaled = image.resize((wide, high), pillow().Resampling.BILINEAR)
        left, top = (wide - size[0]) // 2, (high - size[1]) // 2
        return scaled.crop((left, top, left + size[0], top + size[1]))


@dataclass(frozen=True, slots=True, eq=False)
class Images:
    """What a reader found: pixels in memory [N, C, H, W] or files, labels [N] and class names if they
    are known.
    """

    pixels: NDArray[Any] | FileSource
    labels: NDArray[Any] | None
    classes: tuple[str, ...] | None = None


def existing_folder(place: str, hint: str = "give a directory that exists") -> Path:
    """`place` as a directory that exists, or DataError."""
    root = Path(place).expanduser()
    if not root.is_dir():
        raise DataError(f"{place} is not a directory", hint)
    return root


def folder_to_fill(place: str) -> Path:
    """`place`, into which a download may go; DataError where it does not exist.

    A mistyped path must not be made and filled: making the directory is how one asks for it.
    """
    return existing_folder(place, f"mistyped? mkdir {place} to have it downloaded there")


def download(name: str, root: Path, reporter: Reporter) -> None:
    """torchvision's files of a data set into `root`, or DataError."""
    try:
        from torchvision import datasets
    except ImportError as error:
        raise MissingExtra("torchvision", "harden") from error
    reporter.log(f"downloading {name} into {root}")
    try:
        with redirect_stdout(io.StringIO()):
            if name == "GTSRB":
                for split in ("train", "test"):
                    datasets.GTSRB(str(root), split=split, download=True)
            else:
                getattr(datasets, name)(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"cannot download {name} into {root}: {error}",
            "check the network, or put torchvision's files there yourself",
        ) from error


def pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise MissingExtra("pillow", "data") from error
    return Image
