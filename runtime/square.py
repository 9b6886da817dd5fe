"""Square (Andriushchenko et al., ECCV 2020, 1912.00049): random search over squares, by the logits alone.

Written here and not taken from the toolbox, whose version (ART 1.20) asks the artifact three times for every query,
tries one and the same square for the whole batch, and divides by zero in L2. Here every image has a square of its
own, is left alone once it is fooled, and one query is one image in `predict`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from resq_deploy.budget import Budget

Floats = NDArray[np.float32]
Labels = NDArray[np.int64]
Predict = Callable[[Floats], Floats]
_Index = tuple[NDArray[np.int64], ...]
_Rows = NDArray[np.bool_]

_SHARE = {
    "linf": 0.8,
    "l2": 0.1,
}  # of the image's area, of the first square; as in the authors' code
# Query (of 10,000) from which on the area is halved again (section 4)
_HALVED_AT = np.array([10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000])
_TILES = 5  # L2 starts from a grid of 5 x 5 bumps
_TINY = np.float32(1e-10)
_COUNTED = 64  # queries after which lengths are summed anew, so that rounding does not pile up


def square(
    predict: Predict,
    images: Floats,
    labels: Labels,
    budget: Budget,
    queries: int,
    rng: np.random.Generator,
) -> Floats:
    """Adversarial images, float32 [N, C, H, W], of images that are right; about within the budget.

    `queries`: at most so many for each image. Algorithm 1, with the steps of algorithms 2 (L-inf) and 3 (L2).
    """
    start, step = (_stripes, _flip_square) if budget.norm == "linf" else (_bumps, _move_mass)
    made = start(images, budget.eps, rng)
    value = lead(predict(made), labels)
    standing = np.flatnonzero(value > 0)
    best, clean, loss = made[standing], images[standing], value[standing]
    spent = np.empty(0, np.float32)
    for query in range(1, queries):
        if not standing.size:
            break
        if spent.size != standing.size or query % _COUNTED == 0:
            spent = _squared(best - clean, (1, 2, 3)).ravel()
        side = _side(query / queries, _SHARE[budget.norm], images.shape)
        undo = step(best, clean, spent, budget.eps, side, rng)
        value = lead(predict(best), labels[standing])
        worse = value >= loss
        undo(worse)
        loss = np.where(worse, loss, value)
        if (loss <= 0).any():
            made[standing] = best
            left = loss > 0
            standing, best, clean, loss = standing[left], best[left], clean[left], loss[left]
    made[standing] = best
    return made


def lead(logits: Floats, labels: Labels) -> Floats:
    """True logit minus the largest other, [B]: 0 or less where fooled; what is not a number counts as fooled."""
    rows = np.arange(len(labels))
    others = logits.copy()
    others[rows, labels] = -np.inf
    gap: Floats = logits[rows, labels] - others.max(axis=1)
    gap[np.isnan(gap)] = -np.inf
    return gap


_Undo = Callable[[_Rows], None]  # puts back the images of these rows


def _stripes(images: Floats, eps: float, rng: np.random.Generator) -> Floats:
    """Vertical stripes of +-eps: what convolutions are most sensitive to (section 3.1)."""
    stripes = _signs(rng, (*images.shape[:2], 1, images.shape[3]), eps)
    made: Floats = np.clip(images + stripes, 0, 1)
    return made


def _flip_square(
    best: Floats, clean: Floats, spent: Floats, eps: float, side: int, rng: np.random.Generator
) -> _Undo:
    """Set a square of each image to +-eps, one sign a channel, in place (algorithm 2)."""
    window = _windows(rng, clean.shape, side)
    old = best[window]
    best[window] = np.clip(clean[window] + _signs(rng, (*clean.shape[:2], 1, 1), eps), 0, 1)

    def undo(rows: _Rows) -> None:
        best[_of(window, rows)] = old[rows]

    return undo


def _bumps(images: Floats, eps: float, rng: np.random.Generator) -> Floats:
    """A grid of bumps with random signs, at length eps."""
    count, channels, height, width = images.shape
    side = max(min(height, width) // _TILES, 2)
    delta = np.zeros_like(images)
    for top in range(0, height - side + 1, side):
        for left in range(0, width - side + 1, side):
            signs = _signs(rng, (count, channels, 1, 1))
            delta[:, :, top : top + side, left : left + side] = signs * _bump(side)
    return _at_length(images, delta, eps)


def _move_mass(
    best: Floats, clean: Floats, spent: Floats, eps: float, side: int, rng: np.random.Generator
) -> _Undo:
    """Move the change inside one square into a bump in another, in place, at the same length (algorithm 3).

    `spent`: squared length of each image's change, kept up to date, so that only the two squares are touched: what
    they free and what is left of eps^2 goes into the new bump, and no image has to be scaled as a whole.
    """
    side = max(side | 1, 3)
    target, source = (_windows(rng, clean.shape, side) for _ in range(2))
    old, old_source, before = best[target], best[source], spent.copy()
    original, original_source = clean[target], clean[source]
    here = old - original
    freed = _energy(old_source - original_source)
    best[source] = original_source
    freed += _energy(best[target] - original)
    left = np.maximum(np.float32(eps**2) - spent, 0)[:, None] / np.float32(clean.shape[1])
    bump = _bump(side) if rng.random() < 0.5 else _bump(side).T
    new = _signs(rng, (*clean.shape[:2], 1, 1)) * bump
    new += here / _spread(np.sqrt(_energy(here)) + _TINY)
    new *= _spread(np.sqrt(left + freed) / (np.sqrt(_energy(new)) + _TINY))
    moved = np.clip(original + new, 0, 1)
    best[target] = moved
    spent += (_energy(moved - original) - freed).sum(axis=1)

    def undo(rows: _Rows) -> None:
        best[_of(target, rows)] = old[rows]
        best[_of(source, rows)] = old_source[rows]
        spent[rows] = before[rows]

    return undo


def _energy(delta: Floats) -> Floats:
    """Sum of squares of each channel, [N, C]."""
    total: Floats = np.einsum("ncij,ncij->nc", delta, delta)
    return total


def _spread(values: Floats) -> Floats:
    """[N, C] over a square."""
    return values[:, :, None, None]


@lru_cache
def _bump(side: int) -> Floats:
    """Two opposite pyramids side by side, at length 1: eta of section 3.3."""
    half = side // 2
    both = np.concatenate([_pyramid(half, side), -_pyramid(side - half, side)])
    made: Floats = (both / math.sqrt(float(np.square(both).sum()))).astype(np.float32)
    return made


def _pyramid(height: int, width: int) -> Floats:
    """sum over k >= r of 1 / (k + 1)^2, where r is the distance of a cell from the middle; at length 1."""
    middle = height // 2, width // 2
    rows, columns = np.ogrid[:height, :width]
    distance = np.maximum(abs(rows - middle[0]), abs(columns - middle[1]))
    steps = 1.0 / np.arange(1, distance.max() + 2) ** 2
    made = np.cumsum(steps[::-1])[::-1][distance]
    scaled: Floats = (made / math.sqrt(float(np.square(made).sum()))).astype(np.float32)
    return scaled


def _at_length(clean: Floats, delta: Floats, eps: float) -> Floats:
    length = np.sqrt(_squared(delta, (1, 2, 3)))
    made: Floats = np.clip(clean + delta * (np.float32(eps) / (length + _TINY)), 0, 1)
    return made


def _squared(delta: NDArray[np.floating], axes: tuple[int, ...]) -> Floats:
    total: Floats = np.square(delta).sum(axis=axes, keepdims=True)
    return total


def _signs(rng: np.random.Generator, shape: tuple[int, ...], size: float = 1.0) -> Floats:
    """+size or -size, each as likely."""
    signs: Floats = rng.integers(0, 2, shape, dtype=np.int8) * np.float32(2 * size)
    return signs - np.float32(size)


def _side(progress: float, share: float, shape: tuple[int, ...]) -> int:
    """Side of the square after this part of the queries."""
    height, width = shape[2:]
    halvings = int(np.searchsorted(_HALVED_AT, progress * 10_000, side="left"))
    side = round(math.sqrt(share / 2**halvings * height * width))
    return max(min(side, height - 1, width - 1), 1)


def _windows(rng: np.random.Generator, shape: tuple[int, ...], side: int) -> _Index:
    """An index into [N, C, H, W] that selects one random square of each image: [N, C, side, side]."""
    count, channels, height, width = shape
    span = np.arange(side)
    top = rng.integers(0, height - side + 1, count)[:, None, None, None]
    left = rng.integers(0, width - side + 1, count)[:, None, None, None]
    return (
        np.arange(count)[:, None, None, None],
        np.arange(channels)[:, None, None],
        top + span[:, None],
        left + span,
    )


def _of(window: _Index, rows: _Rows) -> _Index:
    """The same squares of these images only."""
    image, channel, top, left = window
    return image[rows], channel, top[rows], left[rows]
