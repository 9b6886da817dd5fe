"""Common corruptions: all of them on small and large images, the same for a seed, refusals."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.errors import DataError, MissingExtra
from resq_deploy.runtime import corruptions
from resq_deploy.runtime.corruptions import CORRUPTIONS, corrupt, evaluate
from resq_deploy.runtime.double import NumpyRunner

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 40, 36)]


def blocks(count: int, shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Images of 4 x 4 blocks of random grey or colour, a little noisy."""
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 200, (count, shape[0], 4, 4))
    whole = np.kron(steps, np.ones((1, 1, max(shape) // 4, max(shape) // 4)))
    noise = rng.integers(0, 56, (count, *shape))
    images = (whole[:, :, : shape[1], : shape[2]] + noise) / 255
    return images.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_corruption_changes_images_and_repeats(
    name: str, shape: tuple[int, int, int]
) -> None:
    images = blocks(2, shape)
    made = corrupt(images, name, 3, seed=1)
    assert made.shape == images.shape
    assert made.dtype == np.float32
    assert made.min() >= 0
    assert made.max() <= 1
    assert np.abs(made - images).max() > 0.01
    assert np.array_equal(made, corrupt(images, name, 3, seed=1))
    assert np.array_equal(made[:1], corrupt(images[:1], name, 3, seed=1))


@pytest.mark.parametrize("name", ["gaussian_noise", "impulse_noise", "glass_blur", "snow"])
def test_seeds_differ_and_global_state_stays(name: str) -> None:
    images = np.random.default_rng(1).random((1, 1, 32, 32), dtype=np.float32)
    before = (random.getstate(), str(np.random.get_state()), np.random.default_rng)  # noqa: NPY002
    assert not np.array_equal(corrupt(images, name, 2, seed=0), corrupt(images, name, 2, seed=1))
    after = (random.getstate(), str(np.random.get_state()), np.random.default_rng)  # noqa: NPY002
    assert before == after


def test_severities_rise() -> None:
    images = np.full((4, 3, 32, 32), 0.5, np.float32)
    moved = [np.abs(corrupt(images, "gaussian_noise", s) - images).mean() for s in (1, 2, 3, 4, 5)]
    assert moved == sorted(moved)


def test_accuracy_is_figured_per_cell_and_over_all() -> None:
    runner = NumpyRunner(shape=(1, 8, 8))
    sample = runner.sample(30)
    names, levels = ("brightness", "fog"), (1, 5)
    found = evaluate(runner, sample, names, levels)
    assert [(c.corruption, c.severity) for c in found.cells] == [
        ("brightness", 1),
        ("brightness", 5),
        ("fog", 1),
        ("fog", 5),
    ]
    assert tuple(found.figures) == corruptions.figure_names(names, levels)
    mean, fog = found.figures[corruptions.MEAN], found.figures["accuracy@corruption=fog"]
    assert mean.mean == pytest.approx(np.mean([c.accuracy.mean for c in found.cells]))
    assert fog.mean == pytest.approx(np.mean([c.accuracy.mean for c in found.cells[2:]]))
    assert mean.low <= mean.mean <= mean.high
    assert mean.n == 4 * 30
    right = (runner(corrupt(sample.images, "fog", 5)).argmax(1) == sample.labels).mean()
    assert found.figures["accuracy@corruption=fog,severity=5"].mean == pytest.approx(right)


def test_nothing_asked_is_nothing_found() -> None:
    runner = NumpyRunner(shape=(1, 8, 8))
    assert evaluate(runner, runner.sample(3), ()).figures == {}
    assert corruptions.figure_names((), (1,)) == ()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("", ()),
        ("fog", ("fog",)),
        ("fog, gaussian-noise", ("gaussian_noise", "fog")),
        ("weather,fog", ("snow", "frost", "fog", "brightness")),
        ("ALL", CORRUPTIONS),
    ],
)
def test_names_are_read(text: str, names: tuple[str, ...]) -> None:
    assert corruptions.parse_names(text) == names


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"unknown corruption 'rain'.*weather.*fog"):
        corruptions.parse_names("fog,rain")


def test_bad_requests_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    images = np.zeros((1, 1, 8, 8), np.float32)
    with pytest.raises(DataError, match=r"unknown corruption 'rain'"):
        corrupt(images, "rain", 1)
    with pytest.raises(DataError, match="severity of 6"):
        corrupt(images, "fog", 6)
    with pytest.raises(DataError, match="cannot be corrupted"):
        corrupt(np.zeros((1, 2, 8, 8), np.float32), "fog", 1)
    with pytest.raises(DataError, match="cannot be corrupted"):
        corruptions.check(("fog",), (1,), (4, 8, 8))
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    corruptions._package.cache_clear()
    with pytest.raises(MissingExtra, match=r"resq-deploy\[corruptions\]"):
        corrupt(images, "fog", 1)
    with pytest.raises(MissingExtra, match=r"resq-deploy\[corruptions\]"):
        corruptions.check(("fog",), (1,), (1, 8, 8))
    corruptions.check((), (1,), (1, 8, 8))
    corruptions._package.cache_clear()
