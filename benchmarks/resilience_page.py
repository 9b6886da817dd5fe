"""The RESQ table as a page of the documentation, and the targets it is held against. Part of resilience.py."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BERS = (1e-4, 1e-3, 5e-3, 1e-2, 2e-2, 3e-2)
JOINT_BER = 5e-3
DESIGN_BER = 1e-2  # of stage III: stage II has left nothing to gain at 1e-3
LOSS_WANTED = 1 / 3  # "the BER where plain has lost a third"


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the table: its name there, its arguments, and how long its phases last."""

    name: str
    arch: str
    args: Mapping[str, Any]
    epochs: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Setup:
    """What one run of the benchmark measures, and how much of it."""

    data: str
    work: Path
    seeds: tuple[int, ...]
    images: int
    attacked: int
    trials: int
    amp: str


def targets(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
) -> list[tuple[str, float, str, bool]]:
    """(what, figure in points or percent, wanted, met) of the gains that RESQ reports, best row I+II+III."""
    plain, best = rows["plain PTQ"], rows["I+II+III"]
    lost = [p for p in BERS if plain[f"BER {p:g}"][0] <= (1 - LOSS_WANTED) * plain["clean"][0]]
    found = []
    if lost:
        column = f"BER {lost[0]:g}"
        gain = 100 * (best[column][0] - plain[column][0])
        found.append(
            (f"gain at {column}, where plain has lost a third", gain, ">= 12.5", gain >= 12.5)
        )
    gain = 100 * (best["APGD"][0] - plain["APGD"][0])
    found.append(("gain under the APGD ensemble", gain, ">= 10.4", gain >= 10.4))
    cost = 100 * (plain["clean"][0] - best["clean"][0])
    found.append(("clean accuracy lost", cost, "<= 1.5", cost <= 1.5))
    level = 100 * best["BER 0.01"][0]
    found.append(("accuracy at BER 0.01", level, ">= 74.7", level >= 74.7))
    return found


def page(
    table: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    setup: Setup,
    networks: Sequence[Network],
) -> str:
    """docs/results.md."""
    now = datetime.datetime.now(datetime.timezone.utc).date()
    lines = [
        "# Results",
        "",
        f"Written by `{command()}` on {now}; no figure is typed by hand.",
        "",
        f"Data: {setup.data}. Seeds: {', '.join(map(str, setup.seeds))}. Machine: {machine()}.",
        "",
        "Every figure is of the deployed INT8 bundle on ONNX Runtime, in percent: the mean over seeds, with a 95%",
        "interval (Student's t); a figure without an interval is of one seed.",
        "",
        "* clean: all test images.",
        f"* PGD-20, APGD: {setup.attacked} test images, L-inf 8/255, crafted for each bundle through its own",
        "  arithmetic; APGD is the ensemble: an image counts only if it withstands PGD-20, APGD and targeted APGD.",
        f"* BER p: every bit of every INT8 weight flips with probability p; {setup.images} test images,",
        f"  {setup.trials} trials.",
        f"* joint: the PGD-20 inputs at BER {JOINT_BER:g}; they were crafted for memory without faults. An attacker",
        "  who knows the flips does more ([attacks](attacks.md)).",
        f"* I+II+III: stage III for a design BER of {DESIGN_BER:g}; where its guard finds too little",
        "  to gain, it is I+II.",
    ]
    for network in networks:
        rows = table[network.name]
        plain, one, two = network.epochs
        lines += ["", f"## {network.name}", ""]
        lines += [
            f"Epochs: {plain:g} plain, {one:g} of stage I, {two:g} of stage II; mixed precision: {setup.amp}.",
            "",
        ]
        columns = list(next(iter(rows.values())))
        lines += ["| | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
        lines += [
            f"| {row} | " + " | ".join(cell(f[c]) for c in columns) + " |"
            for row, f in rows.items()
        ]
        lines += [
            "",
            "| target (I+II+III against plain PTQ) | measured | wanted | met |",
            "| --- | ---: | ---: | --- |",
        ]
        lines += [
            f"| {w} | {v:.1f} | {t} | {'yes' if m else 'no'} |" for w, v, t, m in targets(rows)
        ]
    return "\n".join(lines) + "\n"


def command() -> str:
    """The command line, as it can be typed again at the repository's root, without the places of this machine."""
    kept, skip = [], False
    for word in sys.argv[1:]:
        local = word.partition("=")[0] in ("--work", "--results", "--threads")
        if not local and not skip:
            kept.append(shlex.quote(word))
        skip = local and "=" not in word
    return " ".join(["python benchmarks/resilience.py", *kept])


def cell(figure: Sequence[float]) -> str:
    """91.2 (90.8-91.6)"""
    mean, low, high = (100 * v for v in figure)
    return f"{mean:.1f} ({low:.1f}-{high:.1f})" if low < high else f"{mean:.1f}"


def machine() -> str:
    """What it ran on, in words."""
    cpu = platform.processor() or platform.machine()
    try:
        text = Path("/proc/cpuinfo").read_text()
        cpu = next(line.split(":")[1].strip() for line in text.splitlines() if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{cpu}, {os.cpu_count()} cores, {platform.system()}"
