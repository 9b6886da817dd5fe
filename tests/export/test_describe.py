"""What an export says about what it made."""

from __future__ import annotations

import pytest

from resq_deploy.export.describe import doubts, guesses
from resq_deploy.manifest import Metrics

RANGES = {name: {"sqnr_db": decibel} for name, decibel in (("a", 40.0), ("b", 1.7), ("c", 30.0))}


@pytest.mark.parametrize(
    ("right", "classes", "silent"),
    [(0.17, 10, False), (0.2, 10, True), (0.12, 1000, True), (0.05, 1000, False), (0.56, 2, True), (0.52, 2, False)],
)  # fmt: skip
def test_a_network_that_guesses_may_want_other_pixels(
    right: float, classes: int, silent: bool
) -> None:
    metrics = Metrics(
        samples=100, fp32_accuracy=right, int8_accuracy=right, agreement=1.0, sqnr_db={}
    )
    told = guesses(metrics, classes, told=True)
    assert (told is None) == silent
    assert told is None or ("look at --mean" in told and "give" not in told)
    known = guesses(metrics, classes, known=True)
    assert (known is None) == silent
    assert known is None or "--mean" not in known


@pytest.mark.parametrize(("right", "silent"), [(0.26, False), (0.36, False), (0.38, True)])
def test_normalization_that_nobody_told_may_be_what_is_missing(right: float, silent: bool) -> None:
    metrics = Metrics(
        samples=100, fp32_accuracy=right, int8_accuracy=right, agreement=1.0, sqnr_db={}
    )
    said = guesses(metrics, 10)
    assert (said is None) == silent
    assert said is None or "give --mean and --std" in said


@pytest.mark.parametrize(
    ("fp32", "int8", "agreement", "silent"),
    [(0.9, 0.9, 0.99, True), (0.9, 0.9, 0.9, False), (0.9, 0.87, 0.98, False), (0.5, 0.6, 1.0, True)],
)  # fmt: skip
def test_an_export_that_loses_says_where(
    fp32: float, int8: float, agreement: float, silent: bool
) -> None:
    metrics = Metrics(
        samples=100, fp32_accuracy=fp32, int8_accuracy=int8, agreement=agreement, sqnr_db={}
    )
    said = doubts(metrics, RANGES)
    assert (said is None) == silent
    if said:
        assert said.index("b (1.7 dB)") < said.index("c (30.0 dB)") < said.index("a (40.0 dB)")
        assert "look at how the network was trained" in said
        assert ("loses" in said) == (fp32 > int8)
        fine = doubts(metrics, {"a": {"sqnr_db": 40.0}})
        assert fine is not None
        assert "look at --calib" in fine
