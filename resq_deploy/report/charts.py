"""Plots as SVG, drawn by hand: no script, no font, no colour of their own (the page's style sheet gives them)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resq_deploy.report import words
from resq_deploy.report.markup import Safe, tag
from resq_deploy.report.model import Figure

HEAT_STEPS = (
    0.0,
    0.001,
    0.003,
    0.01,
    0.03,
    0.1,
    0.3,
)  # upper ends of the classes h0 to h6; h7 above
_MARKERS = 4
_CELL = 24  # height of a cell of a heat map
_NAME = 26  # characters of a layer's name that are shown


@dataclass(frozen=True, slots=True)
class Point:
    """Accuracy at one bit error rate (0: no fault). `spread`: the 5th and 95th percentile over trials, if known."""

    rate: float
    figure: Figure
    spread: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Series:
    """One line of the accuracy chart."""

    name: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class _Frame:
    """Where the data area lies, and how values become positions."""

    width: int
    height: int
    rates: tuple[float, ...]
    floor: float
    ceiling: float
    left: int = 50
    right: int = 16
    top: int = 14
    bottom: int = 44

    def x(self, rate: float) -> float:
        place = self._place(rate)
        return self.left + 18 + place * (self.width - self.left - self.right - 36)

    def y(self, share: float) -> float:
        part = (share - self.floor) / (self.ceiling - self.floor)
        return self.height - self.bottom - part * (self.height - self.top - self.bottom)

    def _place(self, rate: float) -> float:
        measured = [math.log10(r) for r in self.rates if r > 0]
        if rate <= 0 or not measured:
            return 0.0
        first = 0.16 if 0.0 in self.rates else 0.0
        span = measured[-1] - measured[0]
        part = (math.log10(rate) - measured[0]) / span if span else 0.5
        return first + part * (1 - first)


def accuracy_chart(series: Sequence[Series], width: int, height: int, ident: str) -> Safe:
    """Accuracy against bit error rate: a line per series, its confidence interval, and its spread over trials."""
    rates = tuple(sorted({point.rate for line in series for point in line.points}))
    floor, ceiling = _range([p for line in series for p in line.points])
    frame = _Frame(width, height, rates, floor, ceiling)
    return tag(
        "svg",
        tag("title", "Accuracy against bit error rate", id=f"{ident}-title"),
        tag("desc", _describe(series), id=f"{ident}-desc"),
        _grid(frame),
        [_line(frame, line, index) for index, line in enumerate(series)],
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        class_=f"chart {ident.partition('-')[0]}",
    )


def heat_class(share: float) -> str:
    """The colour class of a share of changed answers: h0 (none) to h7 (30% and more)."""
    return f"h{sum(share > step for step in HEAT_STEPS)}"


def heat_map(
    rows: Sequence[str],
    columns: Sequence[str],
    cells: Mapping[tuple[str, str], tuple[float, int]],
    ident: str,
    title: str,
) -> Safe:
    """A grid of shares. `cells`: (row, column) -> (share, trials); a cell that no trial hit stays empty."""
    label = max((len(_short_name(row)) for row in rows), default=0) * 7 + 10
    wide = max(40, 7 * max(map(len, columns), default=0) + 8)
    width, height = label + wide * len(columns) + 2, _CELL * (len(rows) + 1) + 2
    body = [
        (
            tag("text", _short_name(row), x=label - 8, y=y + 16, class_="end"),
            [
                _heat_cell(label + wide * i, y, wide, *cells.get((row, column), (0.0, 0)))
                for i, column in enumerate(columns)
            ],
        )
        for y, row in zip(range(_CELL, height, _CELL), rows, strict=False)
    ]
    head = [
        tag("text", c, x=label + wide * i + wide / 2, y=16, class_="mid")
        for i, c in enumerate(columns)
    ]
    return tag(
        "svg",
        tag("title", title, id=f"{ident}-title"),
        tag("desc", _heat_description(cells), id=f"{ident}-desc"),
        tag("g", head, class_="axis"),
        body,
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        role="img",
        aria_labelledby=f"{ident}-title {ident}-desc",
        class_="heat",
    )


def interval_mark(figure: Figure, most: float) -> Safe:
    """A dot with its interval on a scale from 0 to `most`; says the same as the numbers beside it."""
    width = 120
    scale = (width - 12) / (most or 1.0)
    low, mid, high = (6 + min(v, most) * scale for v in (figure.low, figure.mean, figure.high))
    return _mark_line(width, low, mid, high)


def difference_mark(low: float, mid: float, high: float, most: float) -> Safe:
    """A dot with its interval on a scale from -`most` to `most`, 0 marked; says the same as the numbers beside it."""
    width = 160
    scale = (width / 2 - 6) / (most or 1.0)
    left, dot, right = (width / 2 + max(min(v, most), -most) * scale for v in (low, mid, high))
    zero = tag("line", x1=width / 2, x2=width / 2, y1=1, y2=13, class_="tick")
    return _mark_line(width, left, dot, right, zero)


def _mark_line(width: int, low: float, mid: float, high: float, *marks: Safe) -> Safe:
    return tag(
        "svg",
        tag("line", x1=6, x2=width - 6, y1=7, y2=7, class_="grid"),
        marks,
        tag("line", x1=low, x2=high, y1=7, y2=7, class_="span"),
        tag("circle", cx=mid, cy=7, r=3.5, class_="dot"),
        viewBox=f"0 0 {width} 14",
        width=width,
        height=14,
        aria_hidden="true",
        class_="mark-line",
    )


def swatch(index: int) -> Safe:
    """The line and the marker of a series, for a legend."""
    return tag(
        "svg",
        tag("line", x1=1, x2=31, y1=7, y2=7, class_=f"line s{index % _MARKERS}"),
        _marker(16, 7, index),
        viewBox="0 0 32 14",
        width=32,
        height=14,
        aria_hidden="true",
        class_="swatch",
    )


def _range(points: Sequence[Point]) -> tuple[float, float]:
    ends = [end for p in points for end in (p.figure.low, p.figure.high, *(p.spread or ()))]
    floor = max(math.floor(min(ends, default=0.0) * 10 - 0.2) / 10, 0.0)
    ceiling = min(math.ceil(max(ends, default=1.0) * 10) / 10, 1.0)
    if ceiling - floor < 0.2:
        floor = max(ceiling - 0.2, 0.0)
    return floor, max(ceiling, floor + 0.2)


def _grid(frame: _Frame) -> Safe:
    steps = round((frame.ceiling - frame.floor) * 10)
    ticks = [frame.floor + i / 10 for i in range(0, steps + 1, 1 if steps <= 5 else 2)]
    middle, base = (frame.left + frame.width - frame.right) / 2, frame.height - frame.bottom
    axis = tag("text", "bit error rate of the weight memory", x=middle, y=base + 38, class_="mid")
    return tag(
        "g",
        [_rule(frame, share) for share in ticks],
        [_tick(frame, rate, base) for rate in frame.rates],
        axis,
        class_="axis",
    )


def _rule(frame: _Frame, share: float) -> tuple[Safe, Safe]:
    y, right = frame.y(share), frame.width - frame.right
    line = tag("line", x1=frame.left, x2=right, y1=y, y2=y, class_="grid")
    return line, tag("text", f"{share:.0%}", x=frame.left - 8, y=y + 4, class_="end")


def _tick(frame: _Frame, rate: float, base: float) -> tuple[Safe, Safe]:
    x = frame.x(rate)
    line = tag("line", x1=x, x2=x, y1=base, y2=base + 5, class_="tick")
    name = words.rate(rate) if rate > 0 else "no fault"
    return line, tag("text", name, x=x, y=base + 19, class_="mid")


def _line(frame: _Frame, line: Series, index: int) -> Safe:
    spread = [(p.rate, *p.spread) for p in line.points if p.spread]
    sure = [(p.rate, p.figure.low, p.figure.high) for p in line.points]
    path = " ".join(f"{frame.x(p.rate):.1f},{frame.y(p.figure.mean):.1f}" for p in line.points)
    return tag(
        "g",
        _band(frame, spread, "spread"),
        _band(frame, sure, "band"),
        tag("polyline", points=path, class_="line"),
        [_point(frame, point, index) for point in line.points],
        class_=f"s{index % _MARKERS}",
    )


def _point(frame: _Frame, point: Point, index: int) -> tuple[Safe, Safe]:
    x, low, high = frame.x(point.rate), frame.y(point.figure.low), frame.y(point.figure.high)
    whisker = tag("line", x1=x, x2=x, y1=low, y2=high, class_="whisker")
    return whisker, _marker(x, frame.y(point.figure.mean), index)


def _band(frame: _Frame, ends: Sequence[tuple[float, float, float]], class_: str) -> Safe:
    if len(ends) < 2:
        return Safe("")
    upper = [f"{frame.x(rate):.1f},{frame.y(high):.1f}" for rate, _, high in ends]
    lower = [f"{frame.x(rate):.1f},{frame.y(low):.1f}" for rate, low, _ in reversed(ends)]
    return tag("polygon", points=" ".join(upper + lower), class_=class_)


def _marker(x: float, y: float, index: int) -> Safe:
    kind, class_ = index % _MARKERS, f"mark s{index % _MARKERS}"
    if kind == 0:
        return tag("circle", cx=x, cy=y, r=4, class_=class_)
    if kind == 1:
        return tag("rect", x=x - 4, y=y - 4, width=8, height=8, class_=class_)
    corners = {
        2: [(x, y - 5), (x + 5, y + 4), (x - 5, y + 4)],
        3: [(x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y)],
    }[kind]
    return tag("polygon", points=" ".join(f"{a:.1f},{b:.1f}" for a, b in corners), class_=class_)


def _heat_cell(x: float, y: float, wide: int, share: float, trials: int) -> Safe:
    shown = _short_percent(share) if trials else "\u00b7"
    return tag(
        "g",
        tag("rect", x=x, y=y, width=wide - 1, height=_CELL - 1),
        tag("text", shown, x=x + wide / 2, y=y + 16, class_="mid"),
        class_=heat_class(share) if trials else "none",
    )


def _short_name(name: str) -> str:
    return name if len(name) <= _NAME else "\u2026" + name[1 - _NAME :]


def _short_percent(share: float) -> str:
    value = share * 100
    if value == 0:
        return "0"
    if value >= 10:
        return f"{value:.0f}"
    return (
        f"{value:.1f}" if value >= 0.095 else f"{value:.2f}".lstrip("0") if value >= 0.01 else "~0"
    )


def _describe(series: Sequence[Series]) -> str:
    lines = [
        f"{line.name}: "
        + ", ".join(
            f"{words.both(p.figure)} {'at ' + words.rate(p.rate) if p.rate else 'without faults'}"
            for p in line.points
        )
        for line in series
    ]
    return "; ".join(lines) + ". The same figures are in the table below."


def _heat_description(cells: Mapping[tuple[str, str], tuple[float, int]]) -> str:
    hit = {key: share for key, (share, trials) in cells.items() if trials}
    if not hit:
        return "No trial hit any cell."
    (row, column), share = max(hit.items(), key=lambda item: item[1])
    return (
        f"{len(hit)} cells. The highest is {words.percent(share)}, {row}, bit {column}. "
        "The same figures are in the CSV tables beside this report."
    )
