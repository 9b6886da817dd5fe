"""Where a network is in doubt: mixtures of two images, those of them that FP32 hesitates at.

Of some hundred calibration images, which a network may have been trained on, one or two lie near a decision, so that
they cannot tell an agreement of 99.3% from one of 98.9%. Mixtures lie there often, and FP32's margins say which ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resq_deploy.metrics import top1

Images = NDArray[np.float32]
Logits = NDArray[np.float32]
Values = NDArray[np.float64]
Indices = NDArray[np.int64]

DRAWN = 4096
KEPT = 1024  # of them, with the narrowest margins: a quarter
FEWEST = 1024  # that are drawn where a pass takes long
_OTHER = (0.3, 0.5)  # weight of the second image
_NEIGHBOURS = 0.2  # of the kept ones: how many of like margin tell how much such a margin changes
_AT_ONCE = 64


@dataclass(frozen=True, slots=True, eq=False)
class Mixtures:
    """Mixtures of two images each: `first` and `second` int64 [N], `weight` of the second float32 [N].

    As in mixup (Zhang et al., 1710.09412), but never so little of the second that it is only noise.
    """

    images: Images
    first: Indices
    second: Indices
    weight: Images

    @classmethod
    def draw(cls, images: Images, seed: int, count: int = DRAWN) -> Mixtures:
        """So many of 50 to 70% of one image and the rest of another; every image is the first one equally often."""
        rng = np.random.default_rng([seed, 1])
        first = np.resize(rng.permutation(len(images)), count)
        second = (first + rng.integers(1, max(len(images), 2), count)) % len(images)
        return cls(images, first, second, rng.uniform(*_OTHER, count).astype(np.float32))

    def take(self, rows: Indices) -> Mixtures:
        """Some of them."""
        return Mixtures(self.images, self.first[rows], self.second[rows], self.weight[rows])

    def __len__(self) -> int:
        return len(self.first)

    def __iter__(self) -> Iterator[Images]:
        """Float32 [<= 64, C, H, W] at a time: they are many more than the images, and are not kept."""
        for i in range(0, len(self), _AT_ONCE):
            a, b, w = (v[i : i + _AT_ONCE] for v in (self.first, self.second, self.weight))
            w = w[:, None, None, None]
            yield (1 - w) * self.images[a] + w * self.images[b]


@dataclass(frozen=True, slots=True, eq=False)
class Doubt:
    """The mixtures at which FP32 hesitates most, its logits [N, classes] for them, and their share of all."""

    mixtures: Mixtures
    reference: Logits
    share: float

    @classmethod
    def find(
        cls,
        images: Images,
        logits: Callable[[Mixtures], Logits],
        seed: int,
        count: int = DRAWN,
    ) -> Doubt:
        """A quarter of `count` mixtures of the images; `logits` gives FP32's for them."""
        drawn = Mixtures.draw(images, seed, count)
        reference, kept = logits(drawn), round(count * KEPT / DRAWN)
        rows = np.argsort(_margins(reference, top1(reference)), kind="stable")[:kept]
        return cls(drawn.take(rows), reference[rows], kept / count)

    def disagreement(self, run: Callable[[Images], Logits]) -> float:
        """Share of all mixtures drawn whose top-1 is not FP32's, smoothed, taking it that the others agree."""
        return self.share * smoothed(
            self.reference, np.concatenate([run(m) for m in self.mixtures])
        )


def smoothed(reference: Logits, logits: Logits) -> float:
    """Share of rows whose top-1 is not the reference's, in [0, 1], with less scatter than a count has.

    A row's margin is what FP32's choice leads by. It is held against the changes of all margins in a fifth of the rows
    around it, and not against its own alone: whether one margin of 0.1 happened to change by 0.2 is chance, how
    often such margins do is not. A row that is not finite counts as changed.
    """
    best = top1(reference)
    margins = _margins(reference, best)
    changes = np.nan_to_num(margins - _margins(logits, best), nan=np.inf)
    order = np.argsort(margins, kind="stable")
    size = max(1, round(_NEIGHBOURS * len(order)))
    starts = np.clip(np.arange(len(order)) - size // 2, 0, len(order) - size)
    around = np.lib.stride_tricks.sliding_window_view(changes[order], size)[starts]
    return float((around > margins[order][:, None]).mean())


def _margins(logits: Logits, best: Indices) -> Values:
    """What the logit of each row's `best` is above the largest other: float64 [N]."""
    rows = np.arange(len(logits))
    others = logits.astype(np.float64)
    chosen = others[rows, best]
    others[rows, best] = -np.inf
    found: Values = chosen - others.max(axis=1)
    return found
