"""The page of a comparison: what it says, that it fetches nothing, and that everybody can read it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from resq_deploy import console
from resq_deploy.errors import ReportError
from resq_deploy.paired import Spread
from resq_deploy.report import curves
from resq_deploy.report.by_image import ByImage
from resq_deploy.runtime import comparison_page
from resq_deploy.runtime.compare import Subject, compare
from resq_deploy.runtime.comparison_page import render, write_page
from resq_deploy.runtime.resq import group
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import validate_bundle
from tests.bundles import write_bundle
from tests.report import example
from tests.report.browser import Browser
from tests.report.test_page import LOOKS, References


def subject(name: str, lost: float = 0.0) -> Subject:
    """The example report under a name, its accuracy at BER 1e-2 lower on every tenth image or so."""
    report = example.report()
    line = next(x for x in curves.lines_of(report) if x.name == curves.UNALTERED)
    fault = "accuracy@ber=1e-2"
    right = np.arange(400) < 300 * (1 - lost)
    kept = ByImage.of("d" * 64, right * 50, 50, Spread(1e-5, 49), [int(right.sum())] * 50)
    figure = report.figures[fault].model_copy(update={"mean": kept.mean, "low": 0.1, "high": 0.9})
    figures = {**report.figures, fault: figure}
    return Subject(name, (), figures, {**report.by_image, fault: kept}, line.points, "a" * 64)


FOUND = compare([subject("ours"), subject("theirs <b>", 0.2)])


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(FOUND, tmp_path_factory.mktemp("page") / "compared.html")


def test_it_says_what_is_clear_in_words() -> None:
    text = render(FOUND)
    assert re.search(r"BER 1e-2 is 15\.0 points lower \(", text)
    assert text.count("points lower") == 1
    assert "400 images" in text
    assert "theirs &lt;b&gt;" in text
    assert "theirs <b>" not in text
    assert text == render(FOUND)


def test_it_refers_to_nothing_outside(written: Path) -> None:
    reader = References()
    reader.feed(written.read_text(encoding="utf-8"))
    assert reader.found == []


@pytest.mark.parametrize("look", ["light", "dark", "phone"])
def test_axe_finds_nothing_serious(chromium: Browser, written: Path, look: str) -> None:
    chromium.show(written, **LOOKS[look])  # type: ignore[arg-type]
    found = chromium.axe()
    assert [(v["id"], v["impact"], [n["target"] for n in v["nodes"]][:3]) for v in found] == []


def test_one_line_for_each_bundle_and_one_chart_for_four() -> None:
    rows = [replace(FOUND.rows[0], name=f"n{i}") for i in range(6)]
    text = render(compare(rows))
    assert text.count('class="chart wide"') == 2
    assert text.count("<polyline") == 2 * 6  # for wide windows, and for narrow ones
    bare = render(compare([replace(row, curve=()) for row in rows[:2]]))
    assert 'id="curves"' not in bare


def test_the_command_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(trials=8, samples=16, ber=(1e-2,), faults=(), attacks=None)
    for name in "ab":
        made = write_bundle(tmp_path / f"{name}.resq")
        validate_bundle(made, settings, output=tmp_path / f"{name}.report", workers=1)
    bundles, page = [str(tmp_path / f"{n}.resq") for n in "ab"], tmp_path / "out.html"
    assert console.run(group, ["compare", *bundles, "-o", str(page)]) == console.OK
    assert f"page: {page}" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").count('class="chart wide"') == 1


def test_a_page_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="cannot write"):
        write_page(FOUND, tmp_path / "no folder" / "x.html")
    assert comparison_page.write_page(FOUND, tmp_path / "x.html").exists()
