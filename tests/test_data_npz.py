"""Data sets in npz files: every layout, and every refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.data import UNLABELLED, load
from resq_deploy.errors import DataError
from tests.test_data import pixels


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (pixels(6, 3, 8, 8), (3, 8, 8)),
        (pixels(6, 8, 8, 3), (3, 8, 8)),
        (pixels(6, 8, 8), (1, 8, 8)),
        (pixels(6, 8, 8, 1).astype(np.float64) / 255, (1, 8, 8)),
    ],
)
def test_npz_in_any_layout(tmp_path: Path, x: NDArray[Any], expected: tuple[int, int, int]) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x=x, y=np.arange(6) % 2)
    train, test = load(str(path), "train"), load(str(path), "test", shape=expected)
    assert train.shape == expected
    assert train.digest() == test.digest()
    images, _ = train.batch(np.arange(6))
    assert images.dtype == np.float32
    assert 0 <= images.min() < images.max() <= 1


def test_npz_with_two_splits_and_names(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(
        path,
        x_train=pixels(8, 1, 4, 4),
        y_train=np.arange(8) % 2,
        x_test=pixels(4, 1, 4, 4),
        y_test=np.arange(4) % 2,
        classes=["good", "bad"],
    )
    assert len(load(str(path), "train")) == 8
    assert len(load(str(path), "test")) == 4
    assert load(str(path), "test").classes == ("good", "bad")


X, Y = pixels(4, 1, 4, 4), np.array([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X.astype(np.float32) / 255 * np.nan, "y": Y}, "NaN"),
        ({"x": X.astype(np.float32) / 0.1, "y": Y}, r"expected \[0, 1\]"),
        ({"x": X.astype(np.int64), "y": Y}, "int64"),
        ({"x": X, "y": Y - 1}, "labels in -1..0"),
        ({"x": X, "y": Y, "classes": ["one"]}, r"expected 0\.\.0"),
        ({"x": X, "y": Y[:3]}, "4 images but labels"),
        ({"x": X, "y": Y.astype(float)}, "float64"),
        ({"x": X[:0], "y": Y[:0]}, "is empty"),
        ({"x": X[0, 0], "y": Y}, "shape"),
        ({"x": X}, "has no labels for its test split"),
        ({"y": Y}, "has no x"),
        ({"x": np.array([object()]), "y": Y}, "pickle"),
    ],
)
def test_npz_that_cannot_be_used_is_refused(
    tmp_path: Path, arrays: dict[str, Any], message: str
) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, **arrays)
    with pytest.raises(DataError, match=message):
        load(str(path), "test")


def test_labels_may_be_missing_where_nobody_is_judged(tmp_path: Path) -> None:
    path = tmp_path / "d.npz"
    np.savez(path, x_train=X, x_test=X[:2], y_test=Y[:2])
    found = load(str(path), "train", labelled=False)
    assert found.classes == UNLABELLED
    assert len(found.take(3, 0)) == 3
    assert np.array_equal(found.batch([1])[0][0] * 255, X[1])
    assert load(str(path), "test", labelled=False).classes == ("0", "1")
    with pytest.raises(DataError, match="no labels for its train split"):
        load(str(path), "train")
