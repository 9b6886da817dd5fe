"""Accuracy against bit error rate: the lines, and the section with their chart."""

from __future__ import annotations

from collections.abc import Sequence

from resq_deploy.report import words
from resq_deploy.report.charts import Point, Series, accuracy_chart, swatch
from resq_deploy.report.layout import details, note, section, table
from resq_deploy.report.markup import Safe, tag
from resq_deploy.report.model import Campaign, Figure, Report

GOLDEN = "golden run"
UNALTERED = "unaltered images"
_LINES = 4  # in the chart, which has as many markers; the table has all


def accuracy_against_ber(report: Report) -> Safe:
    """The chart for each line that has at least one bit error rate, and its table."""
    lines = lines_of(report)
    if not lines:
        return Safe("")
    drawn = _strongest(lines)
    legend = tag(
        "ul",
        [tag("li", swatch(i), tag("span", line.name)) for i, line in enumerate(drawn)],
        class_="legend",
    )
    rows = [
        (
            line.name,
            words.rate(point.rate) if point.rate else "no fault",
            words.mean(point.figure),
            words.interval(point.figure),
            _spread(point),
        )
        for line in lines
        for point in line.points
    ]
    level = f"{report.accuracy.confidence:.0%}"
    return section(
        "ber",
        "Accuracy against bit error rate",
        note(
            f"Each point is the mean over all trials at one rate; the dark band is its {level} "
            "interval, the light band holds 90% of the trials. The vertical axis may not start at 0."
            + (f" Drawn are the {_LINES - 1} strongest attacks." if len(drawn) < len(lines) else "")
        ),
        legend,
        tag("figure", accuracy_chart(drawn, 940, 340, "wide")),
        tag("figure", accuracy_chart(drawn, 360, 280, "narrow")),
        details(
            "The same as a table",
            table(
                "Accuracy at each bit error rate",
                ("Images", "BER", "Accuracy", "Interval", "5th\u201395th percentile of trials"),
                rows,
            ),
        ),
    )


def lines_of(report: Report) -> list[Series]:
    """A line for unaltered images, if any rate was measured on them, and for those of each attack."""
    bases: dict[str, Figure] = {"clean": report.accuracy}
    bases |= {words.attack_name(a): a.robust for a in report.attacks}
    lines = []
    for on in dict.fromkeys(c.on for c in report.campaigns):
        here = [c for c in report.campaigns if c.on == on and c.accuracy.n]
        swept = [c for c in here if words.bit_error_rate(c.fault)]
        points = [
            Point(words.bit_error_rate(c.fault) or 0, c.accuracy, _quantiles(c)) for c in swept
        ]
        if start := _without_faults(swept, bases.get(on)):
            points.append(Point(0.0, start))
        if points:
            name = UNALTERED if on == "clean" else f"under {on}"
            lines.append(Series(name, tuple(sorted(points, key=lambda p: p.rate))))
    return lines


def _strongest(lines: Sequence[Series]) -> list[Series]:
    """As many lines as there are markers: unaltered images, and the attacks that leave least."""
    ranked = sorted(lines[1:], key=lambda line: line.points[0].figure.mean)[: _LINES - 1]
    return [*lines[:1], *(line for line in lines[1:] if line in ranked)]


def golden(campaign: Campaign) -> Figure | None:
    """Accuracy on a campaign's own images without faults: counted, so no interval; None if it was not kept."""
    share = words.golden_accuracy(campaign)
    if share is None:
        return None
    level = campaign.accuracy.confidence
    return Figure(
        mean=share, low=share, high=share, confidence=level, method=GOLDEN, n=campaign.images
    )


def _without_faults(swept: Sequence[Campaign], otherwise: Figure | None) -> Figure | None:
    """Where a line starts: the same images without faults, as the campaigns saw them."""
    return next(filter(None, map(golden, swept)), otherwise) if swept else None


def _quantiles(campaign: Campaign) -> tuple[float, float] | None:
    found = campaign.accuracy_quantiles
    if "0.05" in found and "0.95" in found:
        return found["0.05"], found["0.95"]
    return None


def _spread(point: Point) -> str:
    if point.spread is None:
        return ""
    return f"{point.spread[0]:.1%}\u2013{point.spread[1]:.1%}"
