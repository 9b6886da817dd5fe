"""The matrices of the page: attacks by faults, and corruptions by severities; each cell coloured by what it costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from resq_deploy.report import words
from resq_deploy.report.curves import GOLDEN, golden
from resq_deploy.report.layout import note, section, table
from resq_deploy.report.markup import Child, Safe, tag
from resq_deploy.report.model import Figure, Report

_COLOURS = (
    "The stronger the colour, the more is lost against no attack and no fault: a step is 10 points."
)


def both_threats(report: Report) -> Child:
    """Rows: no attack, and each attack. Columns: no fault, and each fault. Cells: accuracy."""
    cells = _joint_cells(report)
    faults = ["", *_by_rate({fault for _, fault in cells} - {""}, report)]
    if len(faults) == 1 or not any(on != "clean" and fault for on, fault in cells):
        return None
    rows = [
        (_row_name(on), *(_cell(cells.get((on, fault)), report) for fault in faults))
        for on in dict.fromkeys(on for on, _ in cells)
    ]
    return (
        tag("h3", "Both threats at once"),
        note(
            "Accuracy with the attack of the row and the fault of the column; without fault it is the golden "
            f"run of the same images. {_COLOURS}"
        ),
        _matrix(
            "Accuracy under attacks and faults together",
            ("Attack", *(words.fault_name(f) if f else "no fault" for f in faults)),
            rows,
        ),
        _known(report),
    )


def corruptions(report: Report) -> Safe:
    """Common corruptions: a row each, a column for each severity, and the mean over severities."""
    found = report.corruptions
    if not found:
        return Safe("")
    names = tuple(dict.fromkeys(c.corruption for c in found))
    levels = sorted({c.severity for c in found})
    cells = {(c.corruption, c.severity): c.accuracy for c in found}
    rows = [
        (
            words.corruption_name(name),
            *(_cell(cells.get((name, level)), report) for level in levels),
            _cell(report.figures.get(f"accuracy@corruption={name}"), report),
        )
        for name in names
    ]
    return section(
        "corruptions",
        "Common corruptions",
        note(
            "What noise, blur, weather and compression do without any attacker: the corruptions of ImageNet-C, "
            f"on {words.count(found[0].accuracy.n)} images each. Severities were made for photographs of 224 "
            f"pixels; on small images they are harder. {_COLOURS}"
        ),
        _mean_line(report),
        _matrix(
            "Accuracy by corruption and severity",
            ("Corruption", *(f"severity {level}" for level in levels), "mean"),
            rows,
        ),
    )


def _joint_cells(report: Report) -> dict[tuple[str, str], Figure]:
    cells: dict[tuple[str, str], Figure] = {("clean", ""): report.accuracy}
    cells |= {(words.attack_name(a), ""): a.robust for a in report.attacks}
    cells |= {(c.on, ""): f for c in report.campaigns if (f := golden(c)) is not None}
    cells |= {(c.on, c.fault): c.accuracy for c in report.campaigns}
    cells |= {(words.aware_name(j), j.fault): j.aware for j in report.joint}
    return cells


def _by_rate(faults: Iterable[str], report: Report) -> list[str]:
    """Faults that attacked images saw, as the campaigns have them, then by rate."""
    order = list(dict.fromkeys(c.fault for c in report.campaigns if c.on != "clean"))
    rest = sorted(
        {j.fault for j in report.joint} - set(order), key=lambda f: words.bit_error_rate(f) or 0
    )
    return [f for f in (*order, *rest) if f in set(faults)]


def _known(report: Report) -> Child:
    """Why inputs crafted for golden memory flatter: the same images and faults, with and without that knowledge."""
    if not report.joint:
        return None
    rows = [
        (
            words.attack_name(j),
            words.fault_name(j.fault),
            f"{words.count(j.trials)} \u00d7 {words.count(j.images)}"
            + (f", {words.count(j.failed)} failed" if j.failed else ""),
            words.count(j.unreachable),
            words.both(j.clean),
            words.both(j.unaware) if j.unaware else "not stored",
            words.both(j.aware),
        )
        for j in report.joint
    ]
    head = ("Attack", "Fault", "Trials \u00d7 images", "Unreachable flips", "No attack")
    return (
        tag("h3", "An attacker who knows which bits flipped"),
        note(
            "Inputs that were crafted for memory without faults miss a network that faults have moved: accuracy "
            "under attack can even rise with the faults, which is no resilience. Crafted anew for each faulty "
            "network they show what is left. The last column is the figure to require."
        ),
        table(
            "The same images and faults",
            (*head, "Crafted for no faults", "Crafted for these faults"),
            rows,
        ),
    )


def _mean_line(report: Report) -> Child:
    mean = report.figures.get("accuracy@corruptions")
    return tag("p", "Over all of them: ", tag("b", words.both(mean)), ".") if mean else None


def _matrix(caption: str, head: Sequence[str], rows: Iterable[Sequence[Child]]) -> Safe:
    return tag("div", table(caption, head, rows), class_="matrix")


def _row_name(on: str) -> str:
    if on == "clean":
        return "no attack"
    return on.replace(",aware", ", knowing the faults")


def _cell(figure: Figure | None, report: Report) -> Child:
    if figure is None:
        return tag("span", "\u2013", class_="missing", title="not run")
    lost = max(report.accuracy.mean - figure.mean, 0.0)
    shade = f"h{min(math.ceil(lost * 10 - 0.01), 7) if lost else 0}"
    return tag(
        "span",
        tag("b", words.mean(figure)),
        tag("small", "golden run" if figure.method == GOLDEN else words.interval(figure)),
        class_=f"cell {shade}",
    )
