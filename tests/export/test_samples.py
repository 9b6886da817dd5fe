"""Which data calibrate and judge: classes are asked of what judges, images only of what calibrates."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resq_deploy.console import Reporter
from resq_deploy.data import Dataset
from resq_deploy.errors import DataError
from resq_deploy.export import samples
from resq_deploy.export.load import LoadedModel
from resq_deploy.export.pipeline import export_model
from tests.helpers import CLASSES, checkpoint, images


def network(form: str = "ONNX", classes: tuple[str, ...] = ("0", "1", "2")) -> LoadedModel:
    forms: Any = form
    return LoadedModel(None, forms, "net", (1, 8, 8), classes, (0.0,), (1.0,), "0" * 64)


def pictures(
    count: int, classes: tuple[str, ...] | None, seed: int = 0, labels: int = 3
) -> Dataset:
    rng = np.random.default_rng(seed)
    x = rng.random((count, 1, 8, 8), dtype=np.float32)
    return Dataset.from_arrays(f"pictures-{seed}", x, np.arange(count) % labels, classes)


def draw(calib: Dataset, judge: Dataset | None, **options: Any) -> tuple[samples.Drawn, str]:
    stream = io.StringIO()
    say = Reporter(quiet=False, stream=stream)
    drawn = samples.draw(network(**options), calib, 16, judge, 200, reporter=say)
    return drawn, stream.getvalue()


@pytest.mark.parametrize(
    "calib",
    [
        pictures(40, ("a", "b", "c", "d", "e"), 1, labels=5),
        pictures(40, None, 1, labels=1),
        pictures(40, None, 1, labels=9),
    ],
)
def test_images_of_other_classes_calibrate(calib: Dataset) -> None:
    drawn, _ = draw(calib, pictures(120, ("x", "y", "z")))
    assert drawn.classes == ("x", "y", "z")
    assert not drawn.labelled


def test_labels_of_the_networks_classes_are_used() -> None:
    assert draw(pictures(40, None, 1), pictures(120, None))[0].labelled


def test_classes_in_another_order_are_refused() -> None:
    with pytest.raises(DataError, match="pictures-0 has 'z' where pictures-1 has 'y'"):
        draw(pictures(40, ("x", "y", "z"), 1), pictures(120, ("x", "z", "y")))
    draw(pictures(40, None, 1), pictures(120, ("x", "z", "y")))


def test_images_of_the_last_classes_may_be_missing_where_classes_have_no_names() -> None:
    drawn, _ = draw(pictures(40, None, 1), pictures(120, None, labels=2))
    assert drawn.classes == ("0", "1", "2")
    with pytest.raises(DataError, match="pictures-0 has 2 classes, the network 3"):
        draw(pictures(40, None, 1), pictures(120, ("x", "y"), labels=2))
    with pytest.raises(DataError, match="pictures-0 has 4 classes, the network 3"):
        draw(pictures(40, None, 1), pictures(120, None, labels=4))


@pytest.mark.parametrize(("count", "warns"), [(99, True), (100, False)])
def test_few_held_out_images_are_said(count: int, warns: bool) -> None:
    _, said = draw(pictures(40, None, 1), pictures(count, None))
    assert (f"{count} held-out images say little of accuracy: give --eval" in said) == warns


def test_an_export_takes_what_the_network_says_for_labels_that_are_none(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "m.pt")
    x = images(40)[0]
    others = Dataset.from_arrays("others", x, np.arange(40), [f"c{i}" for i in range(40)])
    judge = Dataset.from_arrays("judge", *images(30, seed=2), CLASSES)
    np.savez(tmp_path / "none.npz", x=x)
    made = []
    for name, calib in (("others", others), ("none", f"{tmp_path}/none.npz")):
        made.append(
            export_model(
                tmp_path / "m.pt", output=tmp_path / name, calib=calib, eval=judge, attacks=(), adjust=False,
                calib_samples=40,
            )
        )  # fmt: skip
        assert made[-1].manifest.classes == CLASSES
    spans = [{n: a.scale for n, a in m.manifest.quantization.activations.items()} for m in made]
    assert spans[0] == spans[1]  # the same images: what their labels are called does not matter


def test_images_without_labels_judge_nothing(tmp_path: Path) -> None:
    checkpoint().save(tmp_path / "m.pt")
    np.savez(tmp_path / "none.npz", x=images(40)[0])
    with pytest.raises(DataError, match=r"none\.npz has no labels for its test split"):
        export_model(tmp_path / "m.pt", calib=f"{tmp_path}/none.npz", adjust=False)
