"""The report on a terminal: a table that fits 80 columns."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from resq_deploy.report import words
from resq_deploy.report.files import HTML
from resq_deploy.report.model import Figure, Report, Requirement

_SHOWN = 40  # figures; the rest is in the files


def print_report(
    report: Report, *, folder: Path | None = None, console: Console | None = None
) -> None:
    """Print the figures, what was not covered, the requirements, and where the page lies, to stdout."""
    out = console or Console(highlight=False)
    subject = report.subject
    title = f"{subject.name} ({subject.arch}) on {report.runner.get('backend', '?')}"
    out.print(Text(title, style="bold"))
    out.print(_figures(report))
    if report.corruptions:
        out.print(_corruptions(report))
    for line in report.warnings:
        out.print(Text(f"warning: {line}"), soft_wrap=True)
    for line in report.not_covered:
        out.print(Text(f"not covered: {line}"), soft_wrap=True)
    if report.requirements:
        out.print(_requirements(report))
    out.print(_verdict(report))
    if folder is not None:
        out.print(Text(f"report: {folder / HTML}"), soft_wrap=True)


def _figures(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("figure", overflow="fold")
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column(f"{report.accuracy.confidence:.0%} interval", justify="right", no_wrap=True)
    table.add_column("counted", justify="right", no_wrap=True)
    shown = [name for name in report.figures if _is_headline(name)][:_SHOWN]
    for name in shown:
        table.add_row(Text(name), *_numbers(report.figures[name]))
    if len(report.figures) > len(shown):
        table.add_row(f"... {len(report.figures) - len(shown)} more in figures.csv", "", "", "")
    return table


def _corruptions(report: Report) -> Table:
    """A row for each corruption: its accuracy at each severity, and over them."""
    levels = sorted({c.severity for c in report.corruptions})
    cells = {(c.corruption, c.severity): c.accuracy for c in report.corruptions}
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("severity of corruption")
    for level in levels:
        table.add_column(str(level), justify="right", no_wrap=True)
    table.add_column("mean", justify="right", no_wrap=True)
    table.add_column("interval", justify="right", no_wrap=True)
    for name in dict.fromkeys(c.corruption for c in report.corruptions):
        row = (words.percent(cells[name, s].mean) if (name, s) in cells else "" for s in levels)
        mean = report.figures.get(f"accuracy@corruption={name}")
        ends = (words.mean(mean), words.interval(mean)) if mean else ("", "")
        table.add_row(Text(words.corruption_name(name)), *row, *ends)
    return table


def _is_headline(name: str) -> bool:
    """Accuracies, and how often one fault model changes an answer on unaltered images."""
    head, _, rest = name.partition("@")
    if rest.startswith("corruption="):
        return False
    return head in ("accuracy", "robust") or (head == "sdc1" and "@" not in rest)


def _numbers(figure: Figure) -> tuple[str, str, str]:
    return words.mean(figure), words.interval(figure), words.count(figure.n)


def _requirements(report: Report) -> Table:
    table = Table(box=None, pad_edge=False, show_edge=False, header_style="dim")
    table.add_column("requirement", overflow="fold")
    table.add_column("measured", justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for requirement in report.requirements:
        verdict = Text("met", "green") if requirement.met else Text("not met", "bold red")
        if requirement.measured and not requirement.measured.n:
            verdict.append(" (nothing counted)", "yellow")
        elif not requirement.certain:
            verdict.append(" (uncertain)", "yellow")
        table.add_row(Text(requirement.expression), _compared(requirement), verdict)
    return table


def _compared(requirement: Requirement) -> str:
    if requirement.measured and not requirement.measured.n:
        return words.NOT_MEASURED
    digits = words.decimals(requirement.measured) if requirement.measured else 2
    end = "" if requirement.compared == "mean" else f"{requirement.compared} "
    return end + words.percent(requirement.value, digits)


def _verdict(report: Report) -> Text:
    style = "bold" if not report.requirements else "bold green" if report.met else "bold red"
    return Text(words.verdict(report), style)
