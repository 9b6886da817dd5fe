"""What stage III keeps: scores of adjusted graphs (guard.py) against those of plain INT8, and of each other.

A loss must be clear before it counts against a graph, and a gain before it counts for one: both are chance otherwise.
Graphs with as much memory meet the same flips, so that images alone are chance; where a layer was split, the draw of
flips is too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from resq_deploy.export.guard import Scores, Values

LOST = 0.003  # what an adjusted graph may lose clean or attacked
AGREEMENT = 0.99  # with FP32, that an adjusted graph should keep
HARDER = 3.0  # times as many mixtures as images lie near a decision: 1.8 to 5.7 times were found, 3.8 in the middle
WORSE = 1.05  # times the disagreement of the best so far, that may be where that is below AGREEMENT already
PRICE = 2.0  # points under flips at the design BER, that a point of agreement below must buy
LEAST = 0.003  # that plain INT8 must lose under flips before anything replaces it
WORTH = 0.25  # of what plain INT8 loses under flips, that an adjusted graph must take back to replace it; or LEAST
_Z = 2.33  # standard errors beyond what may be lost: 99%, one-sided; of one export some thirty are looked at
_Z_GAIN = 1.64  # ... that a gain must exceed 0 by: 95%


def objections(candidate: Scores, kept: Sequence[Scores]) -> list[str]:
    """Where a candidate loses, at any of the bit error rates; nothing where it may be kept.

    `kept`: scores of plain INT8 and of the steps kept since: values are held against plain INT8's, agreement against
    the best of them, and values under flips against the first that met the same flips, else plain INT8's.
    """
    plain = kept[0]
    alike = next((scores for scores in kept if scores.bits == candidate.bits), plain)
    pairs = [(alike.faulty[row], candidate.faulty[row]) for row in range(len(candidate.faulty))]
    compared = [
        ("clean", plain.clean, candidate.clean, LOST, 0.0),
        *(
            ("faulty", *pair, 0.0, _scatter(candidate, alike, [row]))
            for row, pair in enumerate(pairs)
        ),
        ("attacked", plain.attacked, candidate.attacked, LOST, 0.0),
    ]
    found = []
    for name, before, after, tolerance, scatter in compared:
        if before.size == 0:
            continue
        mean, error = _paired(after, before)
        if mean < -tolerance - _Z * math.hypot(error, scatter):
            found.append(f"{name} {before.mean():.4f} -> {after.mean():.4f}")
    best = min(scores.disagreement for scores in kept)
    mean, error = _change(candidate, kept[-1], [0])
    bought = max(0.0, mean - _Z_GAIN * error) / PRICE
    if candidate.disagreement > max(HARDER * (1 - AGREEMENT), WORSE * best) + HARDER * bought:
        found.append(f"agreement on mixtures {1 - best:.4f} -> {1 - candidate.disagreement:.4f}")
    return found


def balance(scores: Scores) -> float:
    """What graphs of one step are compared by: a point of worth at the design BER for a point of agreement."""
    return float(scores.worth[0].mean()) - scores.disagreement / HARDER


def gains(candidate: Scores, other: Scores) -> bool:
    """Whether a candidate is clearly worth more under flips than another."""
    mean, error = _change(candidate, other, range(len(other.faulty)))
    return mean > _Z_GAIN * error


def worthwhile(candidate: Scores, plain: Scores) -> bool:
    """Whether a candidate gains clearly under flips, and enough to be deployed instead of plain INT8.

    What stage II has hardened already, or what flips hardly touch, is left as it is: there a gain is mostly chance.
    Where much is lost, most of it at the highest rate, a quarter is more than many a gain that nobody would leave.
    """
    gained = float(candidate.faulty.mean() - plain.faulty.mean())
    lost = float(plain.clean.mean() - plain.faulty.mean())
    return lost >= LEAST and gains(candidate, plain) and gained > min(WORTH * lost, LEAST)


def _change(after: Scores, before: Scores, rows: Sequence[int]) -> tuple[float, float]:
    """Mean change under flips at these bit error rates, and its standard error."""
    mean, error = _paired(after.faulty[rows].mean(axis=0), before.faulty[rows].mean(axis=0))
    return mean, math.hypot(error, _scatter(after, before, rows))


def _scatter(after: Scores, before: Scores, rows: Sequence[int]) -> float:
    """Standard error of that change from one draw of flips to another; 0 where both graphs met the same flips.

    A trial draws by the same seed at every rate, and the flips of a lower one are among those of a higher: trials are
    independent, its rates are not.
    """
    if after.bits == before.bits:
        return 0.0
    worths = [scores.worth[rows].mean(axis=0) for scores in (after, before)]
    return math.sqrt(sum(float(w.var(ddof=1)) / w.size for w in worths))


def _paired(after: Values, before: Values) -> tuple[float, float]:
    """Mean change of values of the same images, and its standard error."""
    change = after - before
    return float(change.mean()), float(change.std()) / float(np.sqrt(change.size))
