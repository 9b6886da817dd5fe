"""Sanity checks of attack figures: what makes one doubt that a network is as robust as they say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from resq_deploy.budget import BLACK_BOX, WHITE_BOX
from resq_deploy.bundle import Bundle, Sample
from resq_deploy.runtime.attacks import Attacked
from resq_deploy.runtime.runner import Runner


def check(runner: Runner, bundle: Bundle, results: Sequence[Attacked]) -> list[Attacked]:
    """The same results with warnings: what makes one doubt that the network is as robust as they say.

    AutoAttack's checks (Croce & Hein 2020, and flag_docs.md of its code): outputs that are random, or
    probabilities; gradients that vanish; a stronger attack that finds less; a black box that breaks what the
    white box could not.
    """
    about = outputs(runner, bundle.eval_sample().take(32)) if results else []
    return [replace(r, warnings=(*about, *_doubts(r, results))) for r in results]


def outputs(runner: Runner, sample: Sample) -> list[str]:
    """Warnings about the artifact's outputs, whatever the attack."""
    said = []
    logits, again = runner(sample.images), runner(sample.images)
    if not np.array_equal(logits, again, equal_nan=True):
        said.append("two runs of the same images differ: attacks see noise, use more restarts")
    sums = logits.sum(axis=1, dtype=np.float64)
    if logits.min() >= 0 and logits.max() <= 1 and np.allclose(sums, 1, atol=1e-3):
        said.append(
            "outputs are probabilities, not logits: softmax hides gradients and scores from attacks"
        )
    if not np.isfinite(logits).all():
        said.append("some logits are not finite")
    return said


def _doubts(one: Attacked, results: Sequence[Attacked]) -> list[str]:
    said = []
    zero = one.spec.transfer.get("zero_gradients", 0.0)
    if zero > 0.01:
        said.append(
            f"{zero:.1%} of the images have no gradient at all: white-box figures say little, run square"
        )
    for other in results:
        if not _comparable(one, other):
            continue
        extra = int((one.robust & ~other.robust).sum())
        if one.spec.attack in WHITE_BOX and other.spec.attack in BLACK_BOX and extra:
            said.append(
                f"{other.name} breaks {extra} images that stand against {one.name}: "
                "the gradients are masked, or the white box is too weak"
            )
        if _weaker(other.spec.attack, one.spec.attack) and one.robust.sum() > other.robust.sum():
            said.append(
                f"{one.name} leaves {int(one.robust.sum())} images standing, the weaker {other.name} "
                f"{int(other.robust.sum())}: the gradients are masked"
            )
    return said


def _weaker(one: str, other: str) -> bool:
    return one == "fgsm" and other in ("pgd", "apgd", "apgd-t")


def _comparable(one: Attacked, other: Attacked) -> bool:
    same = one.spec.norm == other.spec.norm and abs(one.spec.eps - other.spec.eps) < 1e-9
    return one is not other and same and np.array_equal(one.clean.indices, other.clean.indices)
