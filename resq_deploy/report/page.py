"""report.html: one file, nothing fetched, no script. The same report gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources

from resq_deploy.report import curves, evidence, matrix, sections
from resq_deploy.report.markup import Child, Safe, tag
from resq_deploy.report.model import Report

_PARTS = (
    ("summary", "In short"),
    ("ber", "Accuracy and BER"),
    ("outcomes", "Outcomes"),
    ("weak", "Vulnerability"),
    ("attacks", "Attacks"),
    ("corruptions", "Corruptions"),
    ("coverage", "Coverage"),
    ("figures", "All figures"),
    ("provenance", "Provenance"),
    ("words", "Words"),
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def render(report: Report) -> str:
    """The whole page as HTML text."""
    body = [
        sections.verdict(report),
        sections.summary(report),
        curves.accuracy_against_ber(report),
        sections.outcomes(report),
        evidence.vulnerability(report),
        sections.attacks(report),
        matrix.corruptions(report),
        evidence.coverage(report),
        sections.figures(report),
        evidence.provenance(report),
        evidence.glossary(report),
    ]
    return document(
        f"{report.subject.name}: resilience report",
        _masthead(report, "".join(body)),
        body,
        f"resq-deploy, report version {report.report_version}",
    )


def document(title: str, header: Safe, body: Sequence[Child], footer: str) -> str:
    """A page in the report's style: one file, nothing fetched, no script."""
    page = tag(
        "html",
        _head(title),
        tag(
            "body",
            tag("a", "To the verdict", href="#main", class_="skip"),
            header,
            tag("main", body, id="main"),
            tag("footer", tag("p", footer)),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def masthead(
    kicker: str, title: str, facts: Sequence[str], links: Sequence[tuple[str, str]]
) -> Safe:
    """The head of a page: what it is, of what, and where its parts are. `links`: (identifier, title)."""
    items = [tag("li", tag("a", name, href=f"#{ident}")) for ident, name in links]
    return tag(
        "header",
        tag("p", kicker, class_="kicker"),
        tag("h1", title),
        tag("p", " \u00b7 ".join(filter(None, facts)), class_="subject"),
        tag("nav", tag("ul", items), aria_label="Parts of this page"),
    )


def _head(title: str) -> Safe:
    style = resources.files("resq_deploy.report").joinpath("style.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        tag("style", Safe(style)),
    )


def _masthead(report: Report, body: str) -> Safe:
    subject = report.subject
    facts = [
        subject.arch,
        f"INT8, {report.runner.get('backend', 'unknown backend')}",
        str(report.provenance.get("time", "")),
        f"sha256 {subject.int8_sha256[:12]}",
    ]
    links = [(ident, name) for ident, name in _PARTS if f'id="{ident}"' in body]
    return masthead("Resilience report", subject.name, facts, links)
