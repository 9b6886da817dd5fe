"""The page: read by a real browser, in light and dark, on a phone and on paper."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from resq_deploy.report import page, write_report
from resq_deploy.report.charts import Point, Series, accuracy_chart, heat_class
from resq_deploy.report.markup import Safe, tag
from resq_deploy.report.model import Report
from tests.report import example
from tests.report.browser import Browser
from tests.report.screenshot import LARGEST, shoot

LOOKS = {
    "light": {"width": 1200, "scheme": "light", "media": ""},
    "dark": {"width": 1200, "scheme": "dark", "media": ""},
    "phone": {"width": 390, "scheme": "light", "media": ""},
    "phone, dark": {"width": 390, "scheme": "dark", "media": ""},
    "paper": {"width": 794, "scheme": "dark", "media": "print"},
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    demands = (*example.DEMANDS, "accuracy >= 0.919", "high(sdc1@seu) < 0.01%")
    whole = example.report(demands)
    some = tuple(
        c for c in whole.campaigns if c.on != example.ATTACKS[0] and c.fault in ("seu", "ber=1e-2")
    )
    return write_report(
        whole.model_copy(update={"campaigns": some}), tmp_path_factory.mktemp("report")
    )


class References(HTMLParser):
    """Everything on a page that could make a browser fetch something, or run something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            points = name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
            if (points and not (value or "").startswith("#")) or name.startswith("on"):
                self.found.append(f"{tag} {name}={value}")
        if tag in ("script", "link", "iframe", "object", "embed", "base", "img", "form"):
            self.found.append(tag)


def test_refers_to_nothing_outside(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    reader = References()
    reader.feed(text)
    assert reader.found == []
    assert not re.search(r"url\(|@import|@font-face", text)


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing_serious(chromium: Browser, written: Path, look: str) -> None:
    chromium.show(written, **LOOKS[look])  # type: ignore[arg-type]
    chromium.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = chromium.axe()
    assert [(v["id"], v["impact"], [n["target"] for n in v["nodes"]][:3]) for v in found] == []


@pytest.mark.parametrize("look", LOOKS)
def test_nothing_is_cut_off_or_fetched(chromium: Browser, written: Path, look: str) -> None:
    chromium.show(written, **LOOKS[look])  # type: ignore[arg-type]
    wide, inner = chromium.run("return [document.documentElement.scrollWidth, innerWidth]")
    assert wide <= inner
    assert chromium.run("return performance.getEntriesByType('resource').length") == 0
    shown = chromium.run(
        "return [...document.querySelectorAll('.chart')].filter(e => e.clientWidth > 0).length"
    )
    assert shown == 1


def test_the_verdict_comes_first(chromium: Browser, written: Path) -> None:
    chromium.show(written)
    first = chromium.run("return document.querySelector('main h2').innerText")
    assert "1 of 5 requirements not met" in first
    texts = chromium.run("return [...document.querySelectorAll('h2')].map(e => e.innerText)")
    assert texts[1:4] == ["In short", "Accuracy against bit error rate", "What the faults did"]
    assert "the interval reaches across" in chromium.run("return document.body.innerText")


def test_the_picture_for_the_readme_is_small(written: Path, tmp_path: Path) -> None:
    size = shoot(written, tmp_path / "images" / "report.png")
    assert 10_000 < size <= LARGEST
    assert (tmp_path / "images" / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_links_lead_somewhere(chromium: Browser, written: Path) -> None:
    chromium.show(written)
    dead = chromium.run(
        "return [...document.querySelectorAll('a')].map(a => a.getAttribute('href'))"
        ".filter(h => !document.getElementById(h.slice(1)))"
    )
    assert dead == []


def test_colours_change_with_the_scheme_and_paper_is_white(
    chromium: Browser, written: Path
) -> None:
    seen = {}
    for look, how in LOOKS.items():
        chromium.show(written, **how)  # type: ignore[arg-type]
        seen[look] = chromium.run("return getComputedStyle(document.body).backgroundColor")
    assert seen["light"] == seen["phone"] == seen["paper"] == "rgb(255, 255, 255)"
    assert seen["dark"] == seen["phone, dark"] != "rgb(255, 255, 255)"


def test_paper_shows_what_the_screen_folds(chromium: Browser, written: Path) -> None:
    heights = {}
    for media in ("", "print"):
        chromium.show(written, width=794, media=media)
        heights[media] = chromium.run(
            "return [...document.querySelectorAll('details table')]"
            ".filter(t => t.checkVisibility({contentVisibilityAuto: true})).length"
        )
    assert heights[""] == 0
    assert heights["print"] > 0


def test_a_bare_report_is_a_whole_page() -> None:
    figures = {"accuracy": example.figure(0.92)}
    bare = example.report(
        (), campaigns=(), attacks=(), figures=figures, not_covered=(), warnings=()
    )
    text = page.render(bare)
    assert "No requirement was set" in text
    assert 'id="ber"' not in text
    assert "Nothing was found that this validation left out" in text


def test_every_svg_has_its_words(written: Path) -> None:
    text = written.read_text(encoding="utf-8")
    pictures = re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)
    spoken = [p for p in pictures if 'aria-hidden="true"' not in p]
    assert len(spoken) > 2
    assert all("<title" in p and "<desc" in p and 'role="img"' in p for p in spoken)


def test_markup_escapes_everything_it_did_not_make() -> None:
    made = tag("p", "<b>", Safe("<i></i>"), ["&", None], title='"x"', hidden=True, lang=None)
    assert made == '<p title="&quot;x&quot;" hidden>&lt;b&gt;<i></i>&amp;</p>'


@pytest.mark.parametrize("rates", [(1e-4,), (0.0,), (0.0, 1e-3), (1e-9, 1e-1)])
def test_a_chart_of_few_points_stays_inside_its_frame(rates: tuple[float, ...]) -> None:
    points = tuple(Point(rate, example.figure(0.99), (0.2, 1.0)) for rate in rates)
    drawn = accuracy_chart([Series("one", points)], 360, 280, "narrow")
    places = [float(x) for x in re.findall(r'(?:cx|x1|x2)="([-0-9.]+)"', drawn)]
    assert min(places) >= 0
    assert max(places) <= 360
    assert "nan" not in drawn


def test_heat_classes_rise() -> None:
    shares = (0.0, 0.0005, 0.002, 0.005, 0.02, 0.05, 0.2, 1.0)
    assert [heat_class(s) for s in shares] == [f"h{i}" for i in range(8)]


def test_a_place_that_no_trial_hit_is_not_a_zero() -> None:
    report = example.report()
    seu = report.campaigns[0]
    rows = (seu.layers[0].model_copy(update={"trials": 0}), *seu.layers[1:])
    changed = seu.model_copy(update={"layers": rows, "cells": seu.cells[8:]})
    text = page.render(report.model_copy(update={"campaigns": (changed,)}))
    assert "not hit" in text
    assert text.count(">conv1<") == 2  # in the table, and in the heat map without a single figure


def test_a_chart_draws_as_many_lines_as_it_has_markers() -> None:
    report = example.report()
    run = next(c for c in report.campaigns if c.fault == "ber=1e-3" and c.on != "clean")
    more = tuple(run.model_copy(update={"on": f"a{i},eps=8/255"}) for i in range(5))
    text = page.render(report.model_copy(update={"campaigns": (*report.campaigns, *more)}))
    assert text.count('class="swatch"') == 4
    assert "Drawn are the 3 strongest attacks." in text


def test_an_unknown_backend_and_quantiles_are_no_reason_to_fail() -> None:
    report = example.report((), runner={})
    run = report.campaigns[0].model_copy(update={"accuracy_quantiles": {}})
    changed = Report(**(dict(report) | {"campaigns": (run,), "provenance": {}}))
    assert "unknown backend" in page.render(changed)
