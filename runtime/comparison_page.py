"""What `resq compare -o` writes: curves, differences and figures of some bundles, as one HTML file without a script."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from resq_deploy.errors import ReportError
from resq_deploy.report import page, words
from resq_deploy.report.charts import Series, accuracy_chart, difference_mark, swatch
from resq_deploy.report.files import put
from resq_deploy.report.layout import note, section, table
from resq_deploy.report.markup import Child, Safe, tag
from resq_deploy.report.sections import stacked
from resq_deploy.runtime.compare import CAUTION, Comparison, Step, Subject
from resq_deploy.runtime.differences import EFFECTS, Change, signed

_LINES = 4  # in one chart, which has as many markers
_PARTS = (
    ("curves", "Accuracy and BER"),
    ("changes", "Differences"),
    ("figures", "All figures"),
    ("artifacts", "Artifacts"),
)


def check_free(path: Path, *, force: bool = False) -> None:
    """Raise ReportError for a file that exists, unless it is to be replaced."""
    if path.exists() and not (force and path.is_file()):
        raise ReportError(f"{path} exists", "choose another -o, or replace a file with --force")


def write_page(found: Comparison, path: Path) -> Path:
    """Write the page of a comparison. Raises ReportError where it cannot be written."""
    try:
        put(path, render(found))
    except OSError as error:
        raise ReportError(
            f"cannot write {path}: {error.strerror or error}", "choose another -o"
        ) from error
    return path


def render(found: Comparison) -> str:
    """The page as HTML text; the same comparison gives the same bytes."""
    body = [_verdict(found), _curves(found), _changes(found), _figures(found), _artifacts(found)]
    whole = "".join(body)
    names = ", ".join(s.name for s in found.rows)
    links = [part for part in _PARTS if f'id="{part[0]}"' in whole]
    head = page.masthead("Comparison", names, [f"{len(found.rows)} artifacts"], links)
    return page.document(f"{names}: comparison", head, body, "resq-deploy")


def _verdict(found: Comparison) -> Safe:
    said = list(_told(found))
    all_of = sum(len(step.changes) for step in found.steps)
    clear = f"{len(said)} of {all_of} differences are clear"
    return tag(
        "section",
        tag("p", clear if said else "No difference is clear", class_="verdict"),
        tag("ul", [tag("li", line) for line in said], class_="findings") if said else "",
        tag("p", found.verdict),
        tag("p", CAUTION, class_="note"),
        class_="first",
        aria_label="Verdict",
    )


def _told(found: Comparison) -> Iterator[str]:
    """Every difference that is clear, in words."""
    for step in found.steps:
        clear = [c for c in step.changes.values() if c.effect != "undecided"]
        for c in clear:
            ends = f"{signed(c.low)} to {signed(c.high)}"
            size = signed(abs(c.difference)).lstrip("+")
            said = f"{words.short(c.figure)} is {size} points {EFFECTS[c.effect]} ({ends})"
            yield f"{step.before} \u2192 {step.after}: {said}"


def _curves(found: Comparison) -> Safe:
    lines = [
        Series(s.name, tuple(replace(p, spread=None) for p in s.curve))
        for s in found.rows
        if s.curve
    ]
    charts: list[Child] = []
    for number, group in enumerate(_groups(lines, _LINES)):
        keys = [tag("li", swatch(i), tag("span", line.name)) for i, line in enumerate(group)]
        charts += [
            tag("ul", keys, class_="legend"),
            tag("figure", accuracy_chart(group, 940, 340, f"wide-{number}")),
            tag("figure", accuracy_chart(group, 360, 280, f"narrow-{number}")),
        ]
    if not charts:
        return Safe("")
    return section(
        "curves",
        "Accuracy against bit error rate",
        note(
            "Each point is the mean over all trials at one rate, on the same images without attack; the band is about"
            " the faults that were drawn. The vertical axis may not start at 0."
        ),
        charts,
    )


def _groups(lines: Iterable[Series], size: int) -> Iterator[list[Series]]:
    rest = iter(lines)
    while group := list(islice(rest, size)):
        yield group


def _changes(found: Comparison) -> Safe:
    """Every step, with what it changed and how sure that is."""
    every = [c for step in found.steps for c in step.changes.values()]
    most = max((abs(end) for c in every for end in (c.low, c.high)), default=1.0)
    parts: list[Child] = []
    for step in found.steps:
        added = f"adds {'+'.join(step.added)}" if step.added else "adds no stage"
        name = f"{step.before} \u2192 {step.after}"
        rows = [_change_row(found, step, threat, c, most) for threat, c in step.changes.items()]
        head = (
            "Figure",
            step.before,
            step.after,
            "Points",
            "Interval",
            "On one scale",
            "Effect",
            "Paired on",
        )
        parts += [tag("h3", f"{name}: {added}"), table(f"Differences, {name}", head, rows)]
    return section(
        "changes",
        "What each step changed",
        note(
            "Differences are taken image by image where both reports have the same images; intervals are over images"
            " and faults."
        ),
        parts,
    )


def _change_row(
    found: Comparison, step: Step, threat: str, change: Change, most: float
) -> tuple[Child, ...]:
    rows = {s.name: s for s in found.rows}
    name = words.short(change.figure)
    return (
        name if name == threat else f"{threat}: {name}",
        *(words.mean(rows[end].figures[change.figure]) for end in (step.before, step.after)),
        signed(change.difference),
        f"{signed(change.low)} to {signed(change.high)}",
        difference_mark(change.low, change.difference, change.high, most),
        EFFECTS[change.effect],
        f"{words.count(change.paired_on)} images" if change.paired_on else change.unpaired,
    )


def _figures(found: Comparison) -> Safe:
    head = ("Figure", *(s.name for s in found.rows))
    rows = [(words.short(name), *(_cell(s, name) for s in found.rows)) for name in found.columns]
    return section("figures", "All figures", table("Figures of each artifact", head, rows))


def _cell(subject: Subject, name: str) -> Child:
    return stacked(subject.figures[name]) if name in subject.figures else "\u2013"


def _artifacts(found: Comparison) -> Safe:
    rows = [(s.name, s.label, tag("code", s.sha256[:16])) for s in found.rows]
    head = ("Artifact", "Stages of hardening", "sha256 of the INT8 graph")
    return section("artifacts", "Artifacts", table("What was compared", head, rows))
