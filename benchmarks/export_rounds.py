"""Accuracy at the design BER on every test image, finely enough to see what stage III takes back. Part of export.py.

A network may lose a tenth of a point at its design BER: one image of the 1,000 that the other trials show, and less
than what two graphs differ by without any flip. Here the images of a trial go round the whole test set, and

    accuracy of trial t = accuracy on all images without flips + change that flips make on the images of t,

which has the mean of trials on all images, at the cost of trials on some.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from export_material import Setup
from export_parts import Graphs, deployed, interval, run
from numpy.typing import NDArray
from scipy import stats

Values = NDArray[np.float64]


def at_design(graphs: Graphs) -> dict[str, Any]:
    """Accuracy of plain INT8 and of stage III at the design BER, trial by trial; what that takes back of the loss."""
    from resq_deploy.metrics import accuracy

    m, setup = graphs.m, graphs.setup
    ber, fp32 = setup.design[0], accuracy(run(m.fp32, m.test, setup), m.labels)
    plain = trials(graphs, "plain", ber)
    mine = plain if graphs.first == graphs.plain else trials(graphs, "int8", ber)
    return {
        "rounds": {
            "ber": ber,
            "trials": setup.deep,
            "images": setup.faulty,
            "lost": interval((fp32 - plain).tolist()),
            "lost_with_stage_iii": interval((fp32 - mine).tolist()),
            "gained": interval((mine - plain).tolist()),
            "recovered": ratio(mine - plain, fp32 - plain),
        }
    }


def trials(graphs: Graphs, name: str, ber: float) -> Values:
    """Accuracy of each trial: float64 [trials]; flips by the same seeds for every graph."""
    from resq_deploy.console import Reporter
    from resq_deploy.fault_models import parse, trial_rng
    from resq_deploy.memory import fault_space
    from resq_deploy.metrics import top1
    from resq_deploy.runtime.ort import OrtRunner

    m, setup = graphs.m, graphs.setup
    model = graphs.plain if name == "plain" else graphs.first
    golden = (top1(deployed(model, m.test, setup)) == m.labels).astype(np.float64)
    space, fault = fault_space(model).select(kinds=("weights",)), parse(f"ber:{ber:g}")
    found = np.full(setup.deep, golden.mean())
    with (
        OrtRunner(model, threads=setup.threads) as runner,
        Reporter(quiet=False).task(f"design BER: {name}", setup.deep, "trials") as task,
    ):
        for trial in range(setup.deep):
            rows = shown(trial, setup)
            with runner.faults(fault.sample(space, trial_rng(setup.seed, trial))):
                right = top1(runner(m.test[rows])) == m.labels[rows]
            found[trial] += float(np.mean(right - golden[rows]))
            task.advance(1)
    return found


def shown(trial: int, setup: Setup) -> NDArray[np.intp]:
    """The test images that a trial shows: intp [faulty], going round."""
    return (trial * setup.faulty + np.arange(setup.faulty)) % setup.test


def ratio(part: Values, whole: Values) -> tuple[float, float, float] | None:
    """mean(part) / mean(whole) over trials with its 95% interval; None where `whole` cannot be told from 0.

    Fieller's interval (1954): the r for which mean(part - r whole) cannot be told from 0.
    """
    count = len(part)
    t = float(stats.t.ppf(0.975, count - 1)) / np.sqrt(count)
    (pp, pw), (_, ww) = np.cov(part, whole) * t**2
    p, w = part.mean(), whole.mean()
    a, b, c = w**2 - ww, p * w - pw, p**2 - pp
    if a <= 0 or w <= 0:
        return None
    half = np.sqrt(max(b**2 - a * c, 0.0))
    return float(p / w), float((b - half) / a), float((b + half) / a)
