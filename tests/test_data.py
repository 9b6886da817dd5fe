"""Every named data set from small files in the real layouts, and every refusal."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from resq_deploy import _readers
from resq_deploy.data import UNLABELLED, Dataset, load
from resq_deploy.errors import DataError


def pixels(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def small(n: int = 12, classes: int = 3) -> Dataset:
    return Dataset.from_arrays("small", pixels(n, 1, 4, 4), np.arange(n) % classes)


def test_digits_are_split_by_class_and_upscaled() -> None:
    train, test = load("digits", "train"), load("digits", "test")
    assert train.shape == test.shape == (1, 32, 32)
    assert len(train) + len(test) == 1797
    assert train.classes == tuple("0123456789")
    shares = np.bincount(test.labels) / (np.bincount(test.labels) + np.bincount(train.labels))
    assert np.all(np.abs(shares - 0.2) < 0.01)
    images, labels = train.batch([0, 1])
    assert images.dtype == np.float32
    assert labels.dtype == np.int64
    assert images.min() == 0.0
    assert images.max() == 1.0
    assert np.array_equal(images[:, :, ::4, ::4].repeat(4, 2).repeat(4, 3), images)


def test_fashion_mnist_is_found_where_debian_puts_it() -> None:
    test = load("fashion-mnist", "test")
    assert len(test) == 10_000
    assert test.shape == (1, 32, 32)
    assert np.bincount(test.labels).tolist() == [1000] * 10
    images, _ = test.batch(np.arange(100))
    assert not images[:, :, :2].any()
    assert not images[:, :, :, -2:].any()
    assert images.max() == 1.0


def write_idx(path: Path, array: NDArray[np.uint8], *, zipped: bool) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape)
    blob = head + array.tobytes()
    path.write_bytes(gzip.compress(blob) if zipped else blob)


def fashion(root: Path, *, zipped: bool) -> None:
    root.mkdir(parents=True, exist_ok=True)
    suffix = ".gz" if zipped else ""
    for stem, count in (("train", 20), ("t10k", 10)):
        images = root / f"{stem}-images-idx3-ubyte{suffix}"
        write_idx(images, pixels(count, 28, 28), zipped=zipped)
        labels = root / f"{stem}-labels-idx1-ubyte{suffix}"
        write_idx(labels, np.arange(count, dtype=np.uint8) % 10, zipped=zipped)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("where", ["", "FashionMNIST/raw", "raw"])
def test_idx_files_are_read_zipped_or_not(tmp_path: Path, zipped: bool, where: str) -> None:
    fashion(tmp_path / where, zipped=zipped)
    train = load(f"fashion-mnist:{tmp_path}", "train")
    assert (len(train), train.shape, train.classes[-1]) == (20, (1, 32, 32), "Ankle boot")
    images, labels = train.batch([3])
    assert labels.tolist() == [3]
    assert np.array_equal(np.rint(images[0, 0, 2:30, 2:30] * 255), pixels(20, 28, 28)[3])


def pickled(path: Path, value: object) -> None:
    path.write_bytes(pickle.dumps(value, protocol=2))


def cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name in names:
        pickled(folder / name, {b"data": pixels(4, 3072), b"labels": [0, 1, 2, 9]})
    pickled(folder / "batches.meta", {"label_names": list("abcdefghij")})
    for name in names:
        pickled(folder / name, {"data": pixels(4, 3072), "labels": [0, 1, 2, 9]})


def cifar100(root: Path) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        pickled(folder / name, {"data": pixels(4, 3072), "fine_labels": [0, 1, 2, 99]})
    pickled(folder / "meta", {"fine_label_names": [f"c{i}" for i in range(100)]})


def picture(path: Path, width: int, height: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (height, width, 3) if mode == "RGB" else (height, width)
    Image.fromarray(pixels(*shape)).save(path)


def gtsrb(root: Path) -> None:
    base = root / "gtsrb"
    for label in (0, 42):
        for i in range(3):
            picture(base / "GTSRB" / "Training" / f"{label:05d}" / f"{i}.ppm", 30, 40)
    rows = ["Filename;Width;Height;ClassId"]
    for i in range(4):
        picture(base / "GTSRB" / "Final_Test" / "Images" / f"{i:05d}.ppm", 50, 35)
        rows.append(f"{i:05d}.ppm;50;35;{i}")
    (base / "GT-final_test.csv").write_text("\n".join(rows))


@pytest.mark.parametrize(
    ("name", "make", "train", "test", "classes"),
    [
        ("cifar10", cifar10, 20, 4, 10),
        ("cifar100", cifar100, 4, 4, 100),
        ("gtsrb", gtsrb, 6, 4, 43),
    ],
)
def test_torchvision_layouts(
    tmp_path: Path, name: str, make: Callable[[Path], None], train: int, test: int, classes: int
) -> None:
    make(tmp_path)
    spec = f"{name}:{tmp_path}"
    for split, count in (("train", train), ("test", test)):
        found = load(spec, "train" if split == "train" else "test", shape=(3, 32, 32))
        assert (len(found), found.shape, len(found.classes)) == (count, (3, 32, 32), classes)
        images, _ = found.batch(np.arange(count))
        assert 0 <= images.min() < images.max() <= 1


def test_cifar_rows_are_planes_of_red_green_and_blue(tmp_path: Path) -> None:
    cifar10(tmp_path)
    images, _ = load(f"cifar10:{tmp_path}", "test").batch([1])
    assert np.array_equal(np.rint(images[0] * 255), pixels(4, 3072)[1].reshape(3, 32, 32))


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (self.path,))


def test_a_pickle_among_the_data_does_not_run(tmp_path: Path) -> None:
    cifar10(tmp_path)
    pickled(tmp_path / "cifar-10-batches-py" / "test_batch", Bomb(str(tmp_path / "boom")))
    with pytest.raises(DataError, match=r"mkdir.*download it again"):
        load(f"cifar10:{tmp_path}", "test")
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize("split_folders", [True, False])
def test_image_folders_are_scaled_cropped_and_lazy(tmp_path: Path, split_folders: bool) -> None:
    for split in ("train", "val") if split_folders else ("",):
        for name in ("cat", "dog"):
            picture(tmp_path / split / name / "1.png", 20, 60)
            picture(tmp_path / split / name / "2.png", 16, 8, "L")
    found = load(f"imagefolder:{tmp_path}", "test", shape=(3, 16, 8))
    assert (len(found), found.classes, found.shape) == (4, ("cat", "dog"), (3, 16, 8))
    images, labels = found.batch([0, 2])
    assert images.shape == (2, 3, 16, 8)
    assert labels.tolist() == [0, 1]
    (tmp_path / ("val" if split_folders else "") / "dog" / "1.png").write_bytes(b"broken")
    with pytest.raises(DataError, match="cannot decode"):
        found.batch([2])


def test_a_folder_of_images_without_classes_has_no_labels(tmp_path: Path) -> None:
    for part, name in (("train", ""), ("test", "cat"), ("test", "dog")):
        for i in range(3):
            picture(tmp_path / part / name / f"{i}.png", 8, 8)
    spec = f"imagefolder:{tmp_path}"
    found = load(spec, "train", shape=(3, 8, 8), labelled=False)
    assert (len(found), found.classes) == (3, UNLABELLED)
    assert load(spec, "test", shape=(3, 8, 8), labelled=False).classes == ("cat", "dog")
    with pytest.raises(DataError, match=r"no labels for its train split .*DIR/CLASS/"):
        load(spec, "train", shape=(3, 8, 8))


def test_centre_crop_keeps_the_middle(tmp_path: Path) -> None:
    stripes = np.zeros((8, 24, 3), dtype=np.uint8)
    stripes[:, 8:16] = 255
    (tmp_path / "one").mkdir()
    Image.fromarray(stripes).save(tmp_path / "one" / "1.png")
    images, _ = load(f"imagefolder:{tmp_path}", "test", shape=(3, 8, 8)).batch([0])
    assert images.min() == 1.0


def empty(root: Path) -> None:
    root.joinpath("train", "a").mkdir(parents=True)


def truncated(root: Path) -> None:
    fashion(root, zipped=False)
    path = root / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])


def without_labels(root: Path) -> None:
    fashion(root, zipped=True)
    (root / "t10k-labels-idx1-ubyte.gz").unlink()


def half_zipped(root: Path) -> None:
    fashion(root, zipped=True)
    path = root / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(
    ("spec", "make", "message"),
    [
        ("fashion-mnits", None, "did you mean fashion-mnist"),
        ("nothing", None, "known: digits, fashion-mnist"),
        ("cifar10", None, "needs a directory"),
        ("digits:DIR", None, "takes no directory"),
        ("imagefolder:DIR/none", None, "not a directory"),
        ("fashion-mnist:DIR/none", None, "not a directory"),
        ("fashion-mnist:DIR", None, "has no t10k"),
        ("DIR/none.npz", None, "does not exist"),
        ("cifar10:DIR/none", None, r"not a directory \(mistyped\? mkdir /.*/none to have it down"),
        ("cifar100:DIR/none", None, "mistyped"),
        ("gtsrb:DIR/none", None, "mistyped"),
        ("imagefolder:DIR", empty, "no test or val"),
        ("fashion-mnist:DIR", truncated, "truncated"),
        ("fashion-mnist:DIR", without_labels, "has no t10k-labels"),
        ("fashion-mnist:DIR", half_zipped, "cannot read"),
    ],
)
def test_data_that_cannot_be_used_is_refused(
    tmp_path: Path, spec: str, make: Callable[[Path], None] | None, message: str
) -> None:
    if make:
        make(tmp_path)
    with pytest.raises(DataError, match=message):
        load(spec.replace("DIR", str(tmp_path)), "test", shape=(1, 32, 32))
    assert not (tmp_path / "none").exists()


def test_an_empty_image_folder_is_refused(tmp_path: Path) -> None:
    empty(tmp_path)
    with pytest.raises(DataError, match="no images"):
        load(f"imagefolder:{tmp_path}", "train", shape=(3, 8, 8))
    with pytest.raises(DataError, match="--input-shape"):
        load(f"imagefolder:{tmp_path}", "train")


def test_another_shape_than_asked_for_is_refused() -> None:
    with pytest.raises(DataError, match="1x32x32, not 3x32x32"):
        load("digits", "test", shape=(3, 32, 32))


def test_a_failed_download_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise RuntimeError("no network")

    monkeypatch.setattr(datasets, "CIFAR10", refuse)
    with pytest.raises(DataError, match=r"cannot download CIFAR10.*check the network"):
        load(f"cifar10:{tmp_path}", "test")


def test_fashion_mnist_is_downloaded_where_debian_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    def deliver(root: str, **_kwargs: object) -> None:
        fashion(Path(root) / "FashionMNIST" / "raw", zipped=True)

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(_readers, "DEBIAN_FASHION_MNIST", tmp_path / "absent")
    monkeypatch.setattr(datasets, "FashionMNIST", deliver)
    assert len(load("fashion-mnist", "test")) == 10


@given(n=st.integers(1, 80), seed=st.integers(0, 2**40), classes=st.integers(2, 7))
def test_take_is_balanced_distinct_and_nested(n: int, seed: int, classes: int) -> None:
    labels = np.repeat(np.arange(classes), 10)
    data = Dataset.from_arrays("d", pixels(len(labels), 1, 2, 2), labels)
    taken = data.take(n, seed)
    assert len(taken) == min(n, len(data))
    assert len(set(taken.indices.tolist())) == len(taken)
    counts = np.bincount(taken.labels, minlength=classes)
    assert counts.max() - counts.min() <= 1
    assert np.array_equal(taken.indices, data.take(len(data), seed).indices[:n])
    assert np.array_equal(taken.labels, data.labels[taken.indices])


def test_take_with_a_rare_class_gives_all_of_it() -> None:
    labels = np.array([0] * 20 + [1] * 2)
    taken = Dataset.from_arrays("d", pixels(22, 1, 2, 2), labels).take(10, 0)
    assert np.bincount(taken.labels).tolist() == [8, 2]


@given(size=st.integers(1, 15), seed=st.none() | st.integers(0, 99))
def test_batches_visit_every_example_once(size: int, seed: int | None) -> None:
    data = small()
    seen = [image.tobytes() for images, _ in data.batches(size, seed=seed) for image in images]
    wanted = [image.tobytes() for image in data.batch(np.arange(12))[0]]
    assert sorted(seen) == sorted(wanted)
    assert (seen == wanted) or seed is not None
    again = [image.tobytes() for images, _ in data.batches(size, seed=seed) for image in images]
    assert seen == again


def test_the_digest_follows_content_and_order() -> None:
    data = small()
    assert data.digest() == small().digest()
    assert data.take(12, 1).digest() != data.digest()
    changed = pixels(12, 1, 4, 4)
    changed[5, 0, 1, 1] ^= 1
    other = Dataset.from_arrays("small", changed, data.labels)
    assert other.digest() != data.digest()
    relabelled = Dataset.from_arrays("small", pixels(12, 1, 4, 4), data.labels[::-1])
    assert relabelled.digest() != data.digest()


@pytest.mark.parametrize("act", [lambda d: d.take(0, 0), lambda d: list(d.batches(0))])
def test_nothing_cannot_be_asked_for(act: Callable[[Dataset], object]) -> None:
    with pytest.raises(DataError, match="at least 1"):
        act(small())
