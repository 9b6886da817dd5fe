"""Search for the few bits whose flips do most damage: a bit-flip attack on the deployed network.

Progressive bit search (Rakin, He & Fan, Bit-flip attack, ICCV 2019): one bit a step. Gradients rank all
bits of all tensors by first order, the best few are flipped in the artifact itself and measured there,
and the worst of them stays flipped. Without gradients the bits to measure are drawn at random.

    found = search_bits(engine, space, labels, bits=10, gradients=gradients)
    found.fault_list()      # one trial, for run_campaign or for another backend
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from resq_deploy._draws import below, trial_rng
from resq_deploy.console import Reporter
from resq_deploy.errors import AttackError
from resq_deploy.fault_lists import FaultList
from resq_deploy.faults import Fault, FaultSpace, Flips, Memory
from resq_deploy.metrics import Logits, accuracy
from resq_deploy.runtime.trials import TrialEngine

Gradients = Callable[[Flips], Mapping[str, NDArray[np.floating]]]
"""Flips in force -> for each tensor, the gradient of the mean loss by its stored values (codes, not weights)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One more bit: what all bits up to it do. `loss` is the mean cross-entropy in nats."""

    fault: Fault
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class BitSearch:
    """What a search found, bit after bit; `golden_loss` and `golden_accuracy` are without faults.

    `measured`: runs of all images that it took. `way`: `gradients` or `sampling`.
    """

    steps: tuple[Step, ...]
    golden_loss: float
    golden_accuracy: float
    measured: int
    way: str

    @property
    def accuracy(self) -> float:
        """With all bits flipped."""
        return self.steps[-1].accuracy if self.steps else self.golden_accuracy

    def fault_list(self) -> FaultList:
        """All bits as one trial."""
        return FaultList([[step.fault for step in self.steps]])


def search_bits(
    engine: TrialEngine,
    space: FaultSpace,
    labels: NDArray[np.int64],
    bits: int = 10,
    *,
    gradients: Gradients | None = None,
    candidates: int = 16,
    samples: int = 256,
    until: float | None = None,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> BitSearch:
    """Find up to `bits` bits of `space` that together raise the loss on these images most, greedily.

    With `gradients`, each step measures the best bit of every tensor, and the next best up to `candidates` in all;
    without, `samples` random ones. Stops early at an accuracy of `until` or below. Raises AttackError
    where there are no bits to search for.
    """
    if bits < 1 or candidates < 1 or samples < 1 or bits > space.size:
        raise AttackError(
            f"a search for {bits} of {space.size} bits, {candidates} candidates, {samples} samples",
            "each from 1 on, and no more bits than there are",
        )
    golden = engine.golden()
    chosen: list[Fault] = []
    steps: list[Step] = []
    measured = 0
    with (reporter or Reporter()).task("bit search", bits, "bits") as task:
        while len(steps) < bits and (until is None or _last(steps, golden, labels) > until):
            if gradients is not None:
                ranked = rank(space, gradients(space.flips_of(chosen)), candidates, chosen)
            else:
                ranked = _draw(space, seed, len(steps), samples, chosen)
            runs = [(fault, engine.run(space.flips_of([*chosen, fault]))) for fault in ranked]
            if not runs:
                break
            measured += len(runs)
            fault, logits = max(runs, key=lambda run: cross_entropy(run[1], labels))
            chosen.append(fault)
            steps.append(Step(fault, cross_entropy(logits, labels), accuracy(logits, labels)))
            task.advance(1)
            task.note(f"accuracy {steps[-1].accuracy:.3f}")
    way = "sampling" if gradients is None else "gradients"
    clean = cross_entropy(golden, labels), accuracy(golden, labels)
    return BitSearch(tuple(steps), *clean, measured, way)


def rank(
    space: FaultSpace,
    gradients: Mapping[str, NDArray[np.floating]],
    count: int,
    flipped: Iterable[Fault] = (),
) -> list[Fault]:
    """Bits by the rise in loss that a first-order estimate expects: the best of each tensor, and more up to `count`.

    Bits in `flipped` have their flipped value, and are not proposed again. Tensors without a gradient
    take no part.
    """
    taken = set(flipped)
    found: list[tuple[float, Fault]] = []
    best: list[tuple[float, Fault]] = []
    for memory, positions in space.parts():
        gradient = gradients.get(memory.name)
        if gradient is None:
            continue
        here = _best_of(memory, positions, gradient, count + len(taken), taken)
        here = [(gain, fault) for gain, fault in here if fault not in taken]
        best += here[:1]
        found += here[1:]
    others = sorted(found, key=_order)[: max(count - len(best), 0)]
    return [fault for _, fault in sorted([*best, *others], key=_order)]


def cross_entropy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Mean -log softmax of the label, in nats; infinite where a logit is not finite."""
    if not np.isfinite(logits).all():
        return float("inf")
    wide = logits.astype(np.float64)
    top = wide.max(axis=1)
    log_sum = top + np.log(np.exp(wide - top[:, None]).sum(axis=1))
    return float(np.mean(log_sum - wide[np.arange(labels.size), labels]))


def _best_of(
    memory: Memory,
    positions: Iterable[int],
    gradient: NDArray[np.floating],
    count: int,
    flipped: set[Fault],
) -> list[tuple[float, Fault]]:
    """(expected rise, bit) of the best bits of one tensor, best first."""
    value = memory.value.reshape(-1).copy()
    unsigned = value.view(f"u{value.dtype.itemsize}")
    for fault in flipped:
        if fault.tensor == memory.name:
            unsigned[fault.element] ^= unsigned.dtype.type(1 << fault.bit)
    slope = np.asarray(gradient, dtype=np.float64).reshape(-1)
    found: list[tuple[float, Fault]] = []
    for bit in positions:
        other = (unsigned ^ unsigned.dtype.type(1 << bit)).view(value.dtype)
        with np.errstate(all="ignore"):
            gain = slope * (other.astype(np.float64) - value.astype(np.float64))
        gain[~np.isfinite(gain)] = np.inf  # a float that became infinite or NaN
        top = np.argpartition(-gain, min(count, gain.size) - 1)[:count]
        found += [(float(gain[e]), Fault(memory.name, int(e), bit)) for e in top]
    return sorted(found, key=_order)[:count]


def _order(pair: tuple[float, Fault]) -> tuple[float, Fault]:
    return -pair[0], pair[1]


def _draw(
    space: FaultSpace, seed: int, step: int, samples: int, chosen: list[Fault]
) -> list[Fault]:
    drawn = np.unique(below(trial_rng(seed, step), space.size, samples))
    return [f for f in space.flips(drawn).faults() if f not in chosen]


def _last(steps: list[Step], golden: Logits, labels: NDArray[np.int64]) -> float:
    return steps[-1].accuracy if steps else accuracy(golden, labels)
