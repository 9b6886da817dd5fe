"""What one figure of two networks differs by, with an interval: paired image by image where that can be done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot
from typing import Literal

from resq_deploy.paired import Spread, interval, together
from resq_deploy.report.by_image import ByImage
from resq_deploy.report.model import Figure
from resq_deploy.statistics import wilson

Effect = Literal["helps", "hurts", "undecided"]
EFFECTS: Mapping[Effect, str] = {"helps": "higher", "hurts": "lower", "undecided": "not clear"}


@dataclass(frozen=True, slots=True)
class Change:
    """Difference of one figure between two bundles, and its interval.

    `paired_on`: so many images, each compared with itself; None: the interval is that of two samples and a little too
    wide, for the reason `unpaired`.
    """

    figure: str
    difference: float
    low: float
    high: float
    paired_on: int | None = None
    unpaired: str = ""

    @property
    def effect(self) -> Effect:
        """`helps` or `hurts` where the interval leaves out 0."""
        return "helps" if self.low > 0 else "hurts" if self.high < 0 else "undecided"


def change(
    name: str,
    before: Figure,
    after: Figure,
    kept_before: ByImage | None = None,
    kept_after: ByImage | None = None,
) -> Change:
    """after - before: paired over images where both reports kept them of the same ones, else as `difference` has it."""
    if kept_before is None or kept_after is None:
        return difference(name, before, after, unpaired="no counts by image")
    if kept_before.images != kept_after.images:
        return difference(name, before, after, unpaired="not the same images")
    if before.confidence != after.confidence:
        return difference(name, before, after, unpaired="not the same confidence")
    each = kept_after.shares - kept_before.shares
    low, high = interval(each, _faults(kept_before, kept_after), before.confidence)
    gap = min(max(after.mean - before.mean, low), high)
    return Change(name, gap, low, high, paired_on=each.size)


def _faults(before: ByImage, after: ByImage) -> Spread:
    shares = before.trial_shares, after.trial_shares
    return together((before.spread, after.spread), shares, (before.trials, after.trials))


def difference(name: str, before: Figure, after: Figure, *, unpaired: str = "") -> Change:
    """after - before, by Newcombe's combination of their intervals (1998, method 10).

    It holds for independent samples, whatever made the two intervals; on the same images, where outcomes go
    together, it is wider than it need be. `unpaired`: why they are not paired.
    """
    gap = after.mean - before.mean
    low = gap - hypot(after.mean - after.low, before.high - before.mean)
    high = gap + hypot(after.high - after.mean, before.mean - before.low)
    return Change(name, gap, max(low, -1.0), min(high, 1.0), unpaired=unpaired)


def signed(share: float) -> str:
    """In points; what is not 0 is not rounded to it, but for less than a thousandth of a point."""
    text = next((t for n in (1, 2, 3) if float(t := f"{share * 100:+.{n}f}")), "+0.0")
    return text.replace("-", "\u2212")


def widened(figure: Figure, images: int) -> Figure:
    """A mean over trials whose interval counts the images as drawn too; as it is where nothing was measured.

    Each end moves out to the root of the sum of squares of its distance and of that of Wilson's interval for
    `images`. An image is right in some trials and wrong in others, which scatters less than right or wrong for
    good, as Wilson's has it: the interval is a little too wide.
    """
    if not figure.n or not images:
        return figure
    other = wilson(min(max(figure.mean, 0.0), 1.0) * images, images, figure.confidence)
    low = figure.mean - hypot(figure.mean - figure.low, other.mean - other.low)
    high = figure.mean + hypot(figure.high - figure.mean, other.high - other.mean)
    ends = {"low": max(low, 0.0), "high": min(high, 1.0)}
    return figure.model_copy(update={**ends, "method": f"{figure.method}, images by Wilson"})
