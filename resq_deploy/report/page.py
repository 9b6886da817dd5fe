"""report.html: one file, nothing fetched, no script. The same report gives the same bytes."""

from __future__ import annotations

from importlib import resources

from resq_deploy.report import curves, evidence, matrix, sections
from resq_deploy.report.markup import Safe, tag
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
    page = tag(
        "html",
        _head(report),
        tag(
            "body",
            tag("a", "To the verdict", href="#main", class_="skip"),
            _masthead(report, "".join(body)),
            tag("main", body, id="main"),
            tag("footer", tag("p", f"resq-deploy, report version {report.report_version}")),
        ),
        lang="en",
    )
    return f"<!doctype html>\n{page}\n"


def _head(report: Report) -> Safe:
    style = resources.files("resq_deploy.report").joinpath("style.css").read_text(encoding="utf-8")
    return tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", f"{report.subject.name}: resilience report"),
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
    links = [
        tag("li", tag("a", name, href=f"#{ident}"))
        for ident, name in _PARTS
        if f'id="{ident}"' in body
    ]
    return tag(
        "header",
        tag("p", "Resilience report", class_="kicker"),
        tag("h1", subject.name),
        tag("p", " \u00b7 ".join(filter(None, facts)), class_="subject"),
        tag("nav", tag("ul", links), aria_label="Parts of this report"),
    )
