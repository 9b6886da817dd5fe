"""Black-box attacks on a Runner: they see logits (Square) or decisions (HopSkipJump) of the artifact, no weights.

Square is ours (square.py). HopSkipJump is the Adversarial Robustness Toolbox's, which needs no torch.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.budget import Budget
from resq_deploy.bundle import Sample
from resq_deploy.console import Reporter
from resq_deploy.errors import AttackError, MissingExtra
from resq_deploy.metrics import top1
from resq_deploy.runtime.runner import Images, Logits
from resq_deploy.runtime.square import square

Predict = Callable[[Images], Logits]
Labels = NDArray[np.int64]
Attack = Callable[[Predict, Images, Labels, Budget, int, np.random.Generator], Images]

QUERIES = {"square": 1000, "hopskipjump": 5000}

_AT_ONCE = 2**22  # pixels; few images at once would leave the artifact waiting for Python
_BATCH = 1024


class Counted:
    """A predict function that knows how many images it was asked for, and how long they took."""

    def __init__(self, predict: Predict) -> None:
        self._predict = predict
        self.images = 0
        self.seconds = 0.0

    def __call__(self, images: Images) -> Logits:
        """As the function itself."""
        start = time.perf_counter()
        try:
            return self._predict(images)
        finally:
            self.seconds += time.perf_counter() - start
            self.images += len(images)


def attack(
    predict: Predict,
    sample: Sample,
    name: str,
    budget: Budget,
    *,
    queries: int | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> NDArray[np.float32]:
    """Adversarial images, float32 [N, C, H, W] within the budget, of `square` or `hopskipjump`.

    `queries`: per image, about (default: QUERIES). Images that are wrong without any change are returned as they
    are. The same seed gives the same images. Raises AttackError, or MissingExtra without the `attacks` extra.
    """
    run = _attacks(name)
    limit = QUERIES[name] if queries is None else queries
    if limit < 2:
        raise AttackError(f"{limit} queries an image", "at least 2")
    made = sample.images.copy()
    batch = max(min(_AT_ONCE // sample.images[0].size, _BATCH), 1) if len(sample) else 1
    with (reporter or Reporter()).task(f"{name} {budget}", len(sample), "images") as task:
        for number, start in enumerate(range(0, len(sample), batch)):
            rows = np.arange(start, min(start + batch, len(sample)))
            right = rows[top1(predict(sample.images[rows])) == sample.labels[rows]]
            if right.size:
                rng = np.random.default_rng([seed, number])
                found = run(predict, sample.images[right], sample.labels[right], budget, limit, rng)
                made[right] = into_budget(sample.images[right], found, budget)
            task.advance(rows.size)
    return made


def into_budget(clean: Images, moved: Images, budget: Budget) -> NDArray[np.float32]:
    """The nearest images within the budget and [0, 1] that lie on the way from the originals."""
    delta = np.nan_to_num((moved - clean).astype(np.float32))
    if budget.norm == "linf":
        delta = np.clip(delta, -budget.eps, budget.eps)
    else:
        length = np.sqrt(np.square(delta, dtype=np.float64).sum(axis=(1, 2, 3), keepdims=True))
        delta = delta * np.minimum(1, budget.eps / np.maximum(length, 1e-12))
    inside: NDArray[np.float32] = np.clip(clean + delta, 0, 1).astype(np.float32)
    return inside


def _attacks(name: str) -> Attack:
    if name not in QUERIES:
        raise AttackError(f"{name} is no black-box attack", f"one of: {', '.join(QUERIES)}")
    return square if name == "square" else hopskipjump


def hopskipjump(
    predict: Predict,
    images: Images,
    labels: Labels,
    budget: Budget,
    queries: int,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """HopSkipJump (Chen et al., S&P 2020, 1904.02144): it sees which class wins, and nothing else.

    It starts from images given to it, because what it draws itself cannot be seeded.
    """
    classes = predict(images[:1]).shape[1]

    def decide(x: Images) -> NDArray[np.float32]:
        return np.eye(classes, dtype=np.float32)[top1(predict(x.astype(np.float32)))]

    evasion, classifier = _toolbox(decide, images, classes)
    start, found = _starts(predict, images, labels, rng)
    made = images.copy()
    if not found.any():
        return made
    with _global_seeds(rng):
        made[found] = evasion.HopSkipJump(
            classifier,
            norm=2 if budget.norm == "l2" else np.inf,
            max_iter=_jumps(queries),
            max_eval=10_000,
            init_eval=100,
            batch_size=_BATCH,
            verbose=False,
        ).generate(images[found], x_adv_init=start[found])
    return made


def _starts(
    predict: Predict, images: Images, labels: Labels, rng: np.random.Generator, tries: int = 20
) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """A misclassified image for each: noise, else noise over another of the images; and whether one was found."""
    start, found = images.copy(), np.zeros(len(images), dtype=bool)
    for attempt in range(tries):
        left = np.flatnonzero(~found)
        if not left.size:
            break
        guess = rng.random((left.size, *images.shape[1:]), dtype=np.float32)
        if attempt % 2:
            guess = images[rng.integers(0, len(images), left.size)]
        fooled = top1(predict(guess)) != labels[left]
        start[left[fooled]] = guess[fooled]
        found[left[fooled]] = True
    return start, found


def _jumps(queries: int) -> int:
    """Iterations that about fit: the k-th asks 100 sqrt(k + 1) times for a gradient, and 25 to search a boundary."""
    spent, jumps = 0.0, 0
    while spent < queries:
        jumps += 1
        spent += 100 * math.sqrt(jumps) + 25
    return max(jumps - 1, 1)


def _toolbox(predict: Predict, images: Images, classes: int | None = None) -> tuple[Any, Any]:
    """ART's attacks, and its view of a predict function."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it says that torch is missing, which is as intended
            from art.attacks import evasion
            from art.estimators.classification import BlackBoxClassifierNeuralNetwork
    except ImportError as error:
        raise MissingExtra("adversarial-robustness-toolbox", "attacks") from error
    count = classes or predict(images[:1]).shape[1]
    seen: Predict = lambda x: predict(x.astype(np.float32))  # noqa: E731
    view = BlackBoxClassifierNeuralNetwork(
        seen, images.shape[1:], count, channels_first=True, clip_values=(0.0, 1.0)
    )
    return evasion, view


@contextmanager
def _global_seeds(rng: np.random.Generator) -> Iterator[None]:
    """The toolbox draws from global state: seed it, and put it back."""
    import random

    seed = int(rng.integers(2**32))
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
