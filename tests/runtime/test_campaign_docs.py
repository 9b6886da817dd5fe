"""The Python in the documents of fault campaigns runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from resq_deploy.fault_models import MODELS, trial_rng
from tests.test_fault_models import SPACE

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def run(name: str) -> dict[str, Any]:
    """Execute the python blocks of one document, one after the other."""
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / name).read_text("utf-8"), re.M | re.S)
    assert blocks
    names: dict[str, Any] = {"__name__": "docs"}
    for block in blocks:
        exec(block, names)
    return names


def test_the_fault_model_of_the_document() -> None:
    try:
        model = run("adding-a-fault-model.md")["model"]
        drawn = {tuple(model.draw(SPACE, trial_rng(0, i)).tolist()) for i in range(50)}
        assert drawn == {tuple(range(512)), tuple(range(512, SPACE.size))}
    finally:
        MODELS.pop("row", None)


def test_the_campaign_of_the_document(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("campaigns.md")["result"].accuracy.margin <= 0.05
    assert "within 0.05" in capsys.readouterr().out


def test_every_fault_model_is_in_the_document() -> None:
    text = (DOCS / "campaigns.md").read_text("utf-8")
    assert [word for word in MODELS if f"`{word}" not in text] == []
