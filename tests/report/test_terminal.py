"""The report on a terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from resq_deploy.report import Report, print_report
from tests.report import example


def printed(report: Report, width: int = 80) -> str:
    out = io.StringIO()
    print_report(report, folder=Path("out"), console=Console(file=out, width=width))
    return out.getvalue()


def test_fits_80_columns_and_says_all() -> None:
    text = printed(example.report())
    lines = [x for x in text.splitlines() if not x.startswith(("not covered:", "warning:"))]
    assert max(map(len, lines)) <= 80
    for part in ("accuracy@ber=1e-4", "92.0%", "90.3\u201393.7%", "All 3 requirements are met"):
        assert part in text
    assert "not covered: 3 layers" in text
    assert "report: out/report.html" in text


def test_says_what_failed_and_what_is_uncertain() -> None:
    text = printed(example.report(("accuracy >= 0.95", "accuracy >= 0.919")))
    assert "not met" in text
    assert "met (uncertain)" in text
    assert "1 of 2 requirements not met" in text


def test_a_bracket_in_a_name_is_no_markup() -> None:
    subject = example.subject().model_copy(update={"name": "[red]x[/nope]"})
    assert "[red]x[/nope]" in printed(example.report((), subject=subject))


@pytest.mark.parametrize("count", [0, 100])
def test_many_figures_are_cut(count: int) -> None:
    figures = {f"accuracy@ber={i}e-9": example.figure(0.5) for i in range(1, count + 1)}
    text = printed(example.report((), figures=figures))
    assert ("60 more in figures.csv" in text) == (count == 100)


def test_corruptions_are_a_table_of_their_own() -> None:
    text = printed(example.report())
    row = next(line for line in text.splitlines() if line.startswith("elastic transform"))
    assert row.split()[2:6] == ["83.0%", "74.0%", "65.0%", "56.0%"]
    assert "accuracy@corruptions" in text
    assert "corruption=fog" not in text
