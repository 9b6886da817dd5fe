"""Readers of the data sets' files: pixels, labels and class names as they lie on disk."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy._pixels import Images, Shape, download, existing_folder, folder_to_fill
from resq_deploy.console import Reporter
from resq_deploy.errors import DataError, MissingExtra

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
SIDE = 32  # what 28x28 and odd-sized images are brought to

_FASHION = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


def checked_pixels(name: str, images: NDArray[Any]) -> NDArray[Any]:
    """uint8 as it is, or floats as float32; [N, C, H, W]; DataError unless 4-D, not empty, finite
    and in [0, 1].
    """
    if images.ndim != 4 or 0 in images.shape[1:]:
        raise DataError(
            f"{name}: images of shape {images.shape}", "expected [N, C, H, W] or [N, H, W, C]"
        )
    if not len(images):
        raise DataError(f"{name} is empty", "at least one example is needed")
    if images.dtype == np.uint8:
        return images
    if not np.issubdtype(images.dtype, np.floating):
        raise DataError(f"{name}: pixels of type {images.dtype}", "store uint8, or float in [0, 1]")
    if not np.isfinite(images).all():
        raise DataError(f"{name} has NaN or infinite pixels", "clean the data")
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        raise DataError(
            f"{name}: float pixels in [{low:g}, {high:g}], expected [0, 1]",
            "divide by 255, and do not normalize: preprocessing belongs to the model",
        )
    return images.astype(np.float32, copy=False)


def checked_labels(
    name: str, labels: NDArray[Any], count: int, classes: Sequence[str] | None
) -> NDArray[np.int64]:
    """int64 [N]; DataError unless there are `count` whole numbers, each naming a class."""
    if not count:
        raise DataError(f"{name} is empty", "at least one example is needed")
    if labels.ndim != 1 or len(labels) != count:
        raise DataError(
            f"{name}: {count} images but labels of shape {labels.shape}",
            "store one label per image",
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{name}: labels of type {labels.dtype}", "store whole numbers")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes and high >= len(classes)):
        top = f"0..{len(classes) - 1}" if classes else "0 or more"
        raise DataError(f"{name}: labels in {low}..{high}, expected {top}", "renumber the classes")
    return labels.astype(np.int64)


def digits(_place: str, split: str, _shape: Shape | None, _reporter: Reporter) -> Images:
    """scikit-learn's 1,797 8x8 digits, each pixel drawn 4x4, so 1x32x32; a fifth of each class is
    the test split.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingExtra("scikit-learn", "data") from error
    bunch = load_digits()
    small = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    large = small.repeat(4, axis=1).repeat(4, axis=2)[:, None]
    chosen = _stratified(bunch.target, split)
    return Images(large[chosen], bunch.target[chosen], tuple("0123456789"))


def _stratified(labels: NDArray[Any], split: str) -> NDArray[np.int64]:
    rng = np.random.default_rng(0)
    parts = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        cut = len(members) // 5
        parts.append(members[:cut] if split == "test" else members[cut:])
    return np.sort(np.concatenate(parts))


def fashion_mnist(place: str, split: str, _shape: Shape | None, reporter: Reporter) -> Images:
    """Zalando's 28x28 grey images in idx files, zero-padded to 1x32x32."""
    folder = _fashion_folder(place, reporter)
    stem = "train" if split == "train" else "t10k"
    images = _idx(_either(folder, f"{stem}-images-idx3-ubyte"))
    labels = _idx(_either(folder, f"{stem}-labels-idx1-ubyte"))
    if images.ndim != 3 or max(images.shape[1:]) > SIDE:
        raise DataError(f"{folder}: images of shape {images.shape}", "expected [N, 28, 28]")
    return Images(_padded(images)[:, None], labels, _FASHION)


def _padded(images: NDArray[Any]) -> NDArray[Any]:
    gaps = [SIDE - side for side in images.shape[1:]]
    return np.pad(images, ((0, 0), *((gap // 2, gap - gap // 2) for gap in gaps)))


def _fashion_folder(place: str, reporter: Reporter) -> Path:
    if place:
        roots = [existing_folder(place)]
    else:
        cache = Path.home() / ".cache" / "resq-deploy"
        roots = [DEBIAN_FASHION_MNIST, cache]
    for root in roots:
        for folder in (root, root / "FashionMNIST" / "raw", root / "raw"):
            if any(folder.glob("t10k-images-idx3-ubyte*")):
                return folder
    if place:
        raise DataError(
            f"{place} has no t10k-images-idx3-ubyte[.gz]", "write fashion-mnist to download it"
        )
    download("FashionMNIST", cache, reporter)
    return cache / "FashionMNIST" / "raw"


def _either(folder: Path, stem: str) -> Path:
    for path in (folder / stem, folder / f"{stem}.gz"):
        if path.is_file():
            return path
    raise DataError(f"{folder} has no {stem}[.gz]", "all four idx files are needed")


def _idx(path: Path) -> NDArray[np.uint8]:
    """An idx file: two zero bytes, type 8 (uint8), the number of dimensions, each as a big-endian
    int32, then data.
    """
    try:
        blob = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, gzip.zlib.error) as error:  # type: ignore[attr-defined]
        raise DataError(f"cannot read {path}: {error}", "download it again") from error
    if len(blob) < 4 or blob[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an idx file of bytes", "download it again")
    head = 4 + 4 * blob[3]
    shape = tuple(int(n) for n in np.frombuffer(blob[4:head], dtype=">i4"))
    if len(blob) != head + int(np.prod(shape)):
        raise DataError(f"{path} is truncated", "download it again")
    return np.frombuffer(blob, dtype=np.uint8, offset=head).reshape(shape)


def cifar10(place: str, split: str, _shape: Shape | None, reporter: Reporter) -> Images:
    """CIFAR-10 in torchvision's layout (DIR/cifar-10-batches-py), 3x32x32."""
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    return _cifar("CIFAR10", place, "cifar-10-batches-py", names, "", reporter)


def cifar100(place: str, split: str, _shape: Shape | None, reporter: Reporter) -> Images:
    """CIFAR-100 (fine labels) in torchvision's layout (DIR/cifar-100-python), 3x32x32."""
    return _cifar("CIFAR100", place, "cifar-100-python", [split], "fine_", reporter)


def _cifar(
    torch_name: str, place: str, sub: str, names: list[str], kind: str, reporter: Reporter
) -> Images:
    root = folder_to_fill(place)
    folder = next((f for f in (root / sub, root) if (f / names[0]).is_file()), None)
    if folder is None:
        download(torch_name, root, reporter)
        folder = root / sub
    meta = "meta" if kind else "batches.meta"
    batches = [_unpickled(folder / name) for name in names]
    try:
        pixels = np.concatenate([np.asarray(b["data"], np.uint8) for b in batches])
        labels = np.concatenate([np.asarray(b[f"{kind}labels"], np.int64) for b in batches])
        classes = tuple(_unpickled(folder / meta)[f"{kind}label_names"])
        return Images(pixels.reshape(-1, 3, SIDE, SIDE), labels, classes)
    except (KeyError, ValueError) as error:
        raise DataError(f"{folder} is not {torch_name}: {error}", "download it again") from error


class _ArraysOnly(pickle.Unpickler):
    """Reads what CIFAR's files hold (dicts, lists, text, arrays) and refuses to call anything
    else.
    """

    _ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode", "_frombuffer"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in {"numpy", "_codecs"} and name in self._ALLOWED:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        value = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except (OSError, EOFError, pickle.UnpicklingError, ValueError, AttributeError) as error:
        raise DataError(f"cannot read {path}: {error}", "download it again") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no dict", "download it again")
    return value


def npz(place: str, split: str, shape: Shape | None, _reporter: Reporter) -> Images:
    """x (uint8, or float in [0, 1]; NCHW, NHWC or NHW) and y, if there are labels; or x_train, y_train,
    x_test, y_test; maybe classes.
    """
    path = Path(place)
    if not path.is_file():
        raise DataError(f"{place} does not exist", "give the path of an .npz file")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {place}: {error}", "save it with numpy.savez") from error
    x, y = (_part(arrays, key, split) for key in "xy")
    if x is None:
        held = ", ".join(sorted(arrays)) or "nothing"
        raise DataError(f"{place} has no x or x_{split} (it has {held})", "save x= and y=")
    classes = tuple(map(str, arrays["classes"])) if "classes" in arrays else None
    return Images(_channels_first(x, shape), y, classes)


def _part(arrays: dict[str, NDArray[Any]], key: str, split: str) -> NDArray[Any] | None:
    return next((arrays[name] for name in (f"{key}_{split}", key) if name in arrays), None)


def _channels_first(x: NDArray[Any], shape: Shape | None) -> NDArray[Any]:
    if x.ndim == 3:
        return x[:, None]
    if x.ndim != 4:
        return x
    fits = shape is not None and x.shape[1:] != shape and x.shape[1:] == (*shape[1:], shape[0])
    looks = shape is None and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if fits or looks else x
