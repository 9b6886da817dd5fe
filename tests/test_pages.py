"""The pages of benchmarks say what the committed figures say: no figure is typed by hand."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"


def module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def test_the_export_page_is_of_the_figures_in_the_repository(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    shown = (ROOT / "docs" / "export-results.md").read_text()
    (command,) = (
        line.split("`")[1] for line in shown.splitlines() if line.startswith("Written by")
    )
    words = [*command.split()[1:], "--results", str(BENCHMARKS / "results"), "--threads", "1"]
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", [*words, "--page", str(page)])
    assert "--no-speed" in words
    made = module("export")
    monkeypatch.setattr(made, "wanted", list)  # nothing is measured
    made.main()
    assert page.read_text() == shown
    for path in (BENCHMARKS / "results").glob("*.json"):
        assert str(Path.home()) not in json.dumps(path.read_text())
