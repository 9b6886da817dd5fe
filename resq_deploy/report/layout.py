"""What every section of the page is made of: titles, tables, notes, and parts that open on demand."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from resq_deploy.report.markup import Child, Safe, tag


def section(ident: str, title: str, *children: Child) -> Safe:
    """A titled part of the page; empty where there is nothing to show."""
    if not any(children):
        return Safe("")
    return tag(
        "section", tag("h2", title, id=ident), children, aria_labelledby=ident, class_="part"
    )


def table(caption: str, head: Sequence[Child], rows: Iterable[Sequence[Child]]) -> Safe:
    """A table whose first column names the row and whose other columns are figures."""
    columns = [tag("th", cell, scope="col") for cell in head]
    body = [
        tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]])
        for row in rows
    ]
    return tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", tag("tr", columns)),
            tag("tbody", body),
        ),
        class_="scroll",
        role="group",
        tabindex="0",
        aria_label=caption,
    )


def note(*children: Child) -> Safe:
    """A paragraph that explains."""
    return tag("p", children, class_="note")


def details(summary_text: str, *children: Child) -> Safe:
    """Something that opens on demand, and is open on paper."""
    return tag("details", tag("summary", summary_text), children)
