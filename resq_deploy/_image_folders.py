"""Readers of data sets that are folders of image files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import numpy as np

from resq_deploy._pixels import (
    FileSource,
    Images,
    Shape,
    download,
    existing_folder,
    folder_to_fill,
    pillow,
)
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError

SIDE = 32
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".webp", ".tif", ".tiff"})
_GTSRB_CLASSES = 43


def gtsrb(place: str, split: str, _shape: Shape | None, reporter: Reporter) -> Images:
    """German traffic signs in torchvision's layout (DIR/gtsrb), 43 classes, scaled to 3x32x32."""
    root = folder_to_fill(place)
    base = root / "gtsrb"
    if not base.is_dir():
        download("GTSRB", root, reporter)
    found = _gtsrb_train(base) if split == "train" else _gtsrb_test(base)
    if not found:
        raise DataError(f"{base} has no {split} images", "download it again")
    source = FileSource(tuple(p for p, _ in found), (3, SIDE, SIDE), stretch=True)
    pixels = np.stack([source.decode(i) for i in range(len(found))])
    names = tuple(f"{label:02d}" for label in range(_GTSRB_CLASSES))
    return Images(pixels, np.array([label for _, label in found]), names)


def _gtsrb_train(base: Path) -> list[tuple[Path, int]]:
    files = sorted((base / "GTSRB" / "Training").glob("*/*.ppm"))
    return [(path, int(path.parent.name)) for path in files]


def _gtsrb_test(base: Path) -> list[tuple[Path, int]]:
    try:
        text = (base / "GT-final_test.csv").read_text()
    except OSError as error:
        raise DataError(f"cannot read GTSRB's labels: {error}", "download it again") from error
    rows = csv.DictReader(io.StringIO(text), delimiter=";")
    folder = base / "GTSRB" / "Final_Test" / "Images"
    return [(folder / row["Filename"], int(row["ClassId"])) for row in rows]


def image_folder(place: str, split: str, shape: Shape | None, _reporter: Reporter) -> Images:
    """DIR/{train,val,test}/CLASS/* or DIR/CLASS/*, or images without labels in DIR itself: decoded when
    read, scaled and centre-cropped to `shape`.
    """
    root = existing_folder(place)
    if shape is None:
        raise DataError("an imagefolder has no shape of its own", "give --input-shape CxHxW")
    if shape[0] not in (1, 3):
        raise DataError(f"images of {shape[0]} channels", "an imagefolder has 1 or 3")
    folder = _split_folder(root, split)
    classes = tuple(sorted(p.name for p in folder.iterdir() if p.is_dir()))
    found = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]
    flat = [] if found else _images(folder)
    if not found and not flat:
        raise DataError(f"{folder} holds no images", "put them in DIR/CLASS/")
    pillow()
    if flat:
        return Images(FileSource(tuple(flat), shape), None)
    source = FileSource(tuple(path for path, _ in found), shape)
    return Images(source, np.array([label for _, label in found]), classes)


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _SUFFIXES)


def _split_folder(root: Path, split: str) -> Path:
    names = ("train",) if split == "train" else ("test", "val")
    present = [root / name for name in ("train", "val", "test") if (root / name).is_dir()]
    if not present:
        return root
    for name in names:
        if root / name in present:
            return root / name
    raise DataError(f"{root} has no {' or '.join(names)} folder", "add it, or use DIR/CLASS/*")
