"""Two networks whose difference is known, on the same images: how often intervals hold it, and how wide they are.

    python -m tests.paired_networks [--times 2000]      # the table of docs/explanation/statistics.md

An image has a margin (normal over images, of which both networks share most), a trial takes from all margins alike,
and an image is then right with the chance sigmoid(margin - harm); in some trials everything breaks down to one in ten.
Without faults an image is right where its margin is above 0. With one seed both networks have the same draws, and what
harms the one may help the other.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from resq_deploy import paired
from resq_deploy.report.by_image import ByImage
from resq_deploy.report.model import Figure
from resq_deploy.runtime import crossed
from resq_deploy.runtime.differences import change, difference, widened
from resq_deploy.statistics import Estimate, Tally, wilson

SAME = "0" * 64
BROKEN = 0.1
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Network:
    """Mean margin; spread of what a fault takes, or gives where it is negative; how often everything breaks down."""

    margin: float = 3.0
    harm: float = 0.0
    collapse: float = 0.0


@dataclass(frozen=True)
class Case:
    """Two networks on `images` images, each under `trials` draws of faults; 0: without faults. `own`: not shared."""

    what: str
    before: Network
    after: Network
    images: int = 200
    trials: int = 150
    common: float = 2.0
    own: float = 0.5
    known: bool = False  # few draws, as those of attacks that know the faults
    one_seed: bool = False  # the same draws for both

    def truth(self) -> float:
        """The difference over all images and all faults."""
        return self._mean(self.after) - self._mean(self.before)

    def _mean(self, network: Network) -> float:
        every = stats.norm.ppf((np.arange(2000) + 0.5) / 2000)
        margins = network.margin + np.hypot(self.common, self.own) * every
        if not self.trials:
            return float((margins > 0).mean())
        harms = network.harm * np.abs(every[::4])
        right = float(_chance(margins[:, None] - harms).mean())
        return right * (1 - network.collapse) + BROKEN * network.collapse

    def hits(
        self, network: Network, shared: Floats, rng: np.random.Generator, faults: int
    ) -> NDArray[np.bool_]:
        """Which images are right in which trial, bool [trials, images]; one row without faults."""
        margins = network.margin + shared + rng.normal(0, self.own, self.images)
        if not self.trials:
            return margins[None] > 0
        draws = np.random.default_rng(faults)
        harms = network.harm * np.abs(draws.normal(0, 1, self.trials))
        chances = _chance(margins - harms[:, None])
        chances[draws.random(self.trials) < network.collapse] = BROKEN
        return np.asarray(rng.random(chances.shape) < chances)

    def kept(self, hits: NDArray[np.bool_]) -> tuple[Figure, ByImage]:
        """A figure as a report has it, its images counted as drawn, and what it keeps of each image."""
        counts, trials = hits.sum(axis=0), max(self.trials, 1)
        found: Estimate
        spread: paired.Spread | None = None
        if not self.trials:
            found = wilson(int(hits.sum()), self.images)
        elif self.known:
            found = crossed.share(hits, sampled_rows=True)
            spread = paired.drawn(hits.mean(axis=1))
        else:
            tally = Tally(self.images)
            for each in hits.sum(axis=1):
                tally.add(int(each))
            found, spread = tally.estimate(), paired.rare(tally)
        figure = Figure(**asdict(found))
        if self.trials and not self.known:
            figure = widened(figure, self.images)
        by_trial = tuple(hits.sum(axis=1).tolist()) if self.trials else ()
        return figure, ByImage.of(SAME, counts, trials, spread, by_trial)


@dataclass(frozen=True)
class Found:
    """Of one way to take a difference: how often it held the truth, half its width, how often it left out 0."""

    held: float
    half: float
    power: float


PLAIN, BROKEN_BY_1, BROKEN_BY_3 = (
    Network(harm=0.5),
    Network(harm=0.5, collapse=0.01),
    Network(harm=0.5, collapse=0.03),
)
CASES = (
    Case("no faults, equal", Network(), Network(), 1000, 0),
    Case("no faults, one better", Network(2.7), Network(3.0), 1000, 0),
    Case("no faults, one better, few images", Network(0.0), Network(0.3), 100, 0),
    Case("faults, equal", PLAIN, PLAIN),
    Case("faults, one bears them better", Network(harm=1.2), PLAIN),
    Case("one seed, equal", PLAIN, PLAIN, one_seed=True),
    Case("one seed, one better", Network(harm=1.2), PLAIN, one_seed=True),
    Case(
        "one seed, faults help one and harm one",
        Network(0.0, -1.5),
        Network(0.0, 1.5),
        one_seed=True,
    ),
    Case("3% of faults break one", BROKEN_BY_3, PLAIN),
    Case("1% of faults break one, many images", BROKEN_BY_1, PLAIN, 2000, 213),
    Case("1% of faults break either, many images", BROKEN_BY_1, BROKEN_BY_1, 2000, 213),
    Case("known faults, equal", Network(1.0, 1.0), Network(1.0, 1.0), 128, 8, known=True),
    Case("known faults, one better", Network(1.0, 1.5), Network(1.0, 0.5), 128, 8, known=True),
    Case(
        "known faults, one seed, one better",
        Network(1.0, 1.5),
        Network(1.0, 0.5),
        images=128,
        trials=8,
        known=True,
        one_seed=True,
    ),
)


def simulate(case: Case, times: int, seed: int = 0) -> tuple[Found, Found]:
    """(paired, as two samples) over so many draws of images and faults."""
    rng, truth = np.random.default_rng(seed), case.truth()
    seen = np.zeros((2, 3))
    for _ in range(times):
        shared = rng.normal(0, case.common, case.images)
        first, second = map(int, rng.integers(2**32, size=2))
        before = case.kept(case.hits(case.before, shared, rng, first))
        seed_after = first if case.one_seed else second
        after = case.kept(case.hits(case.after, shared, rng, seed_after))
        for row, found in enumerate(
            (
                change("x", before[0], after[0], before[1], after[1]),
                difference("x", before[0], after[0]),
            )
        ):
            held = found.low <= truth <= found.high
            seen[row] += held, (found.high - found.low) / 2, found.effect != "undecided"
    one, two = (Found(*map(float, row / times)) for row in seen)
    return one, two


def _chance(margins: Floats) -> Floats:
    return np.asarray(1 / (1 + np.exp(-margins)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--times", type=int, default=2000)
    times = parser.parse_args().times
    print("| networks | images, trials | truth | held | ± | told apart | held | ± | told apart |")
    for case in CASES:
        cells = [case.what, f"{case.images}, {case.trials or '-'}", f"{case.truth() * 100:+.1f}"]
        for found in simulate(case, times):
            cells += [f"{found.held:.1%}", f"{found.half * 100:.1f}", f"{found.power:.0%}"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
