"""Figures, faults and attacks in words."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resq_deploy.report import words
from resq_deploy.report.model import Figure
from tests.report import example


@pytest.mark.parametrize(
    ("share", "digits", "said"),
    [
        (0.918, 1, "91.8%"),
        (0.0, 3, "0%"),
        (1.0, 2, "100%"),
        (0.0001, 1, "<0.1%"),
        (0.99999, 1, ">99.9%"),
        (0.00012, 3, "0.012%"),
    ],
)
def test_percentages(share: float, digits: int, said: str) -> None:
    assert words.percent(share, digits) == said


@pytest.mark.parametrize(
    ("value", "said"),
    [(1e-4, "1e-4"), (0.001, "1e-3"), (0.015, "1.5e-2"), (0.5, "0.5"), (1.25e-10, "1.25e-10")],
)
def test_rates(value: float, said: str) -> None:
    assert words.rate(value) == said


@pytest.mark.parametrize(
    ("fault", "name", "what"),
    [
        ("ber:0.0001", "BER 1e-4", "each bit flipped with a probability of 1e-4"),
        ("seu", "SEU", "one random bit flipped"),
        ("mbu:4", "MBU of 4", "4 neighbouring bits flipped"),
        ("bits:10", "bits:10", "10 random bits flipped"),
        ("stuck-at-1", "stuck-at-1", "one random bit stuck at 1"),
        ("stuck-at-0:8", "stuck-at-0:8", "8 random bits stuck at 0"),
        ("stuck-at-0:0.001", "stuck-at-0:0.001", "each bit stuck at 0 with a probability of 1e-3"),
        ("stuck-at-0:x", "stuck-at-0:x", "bits stuck at 0"),
        ("list:0123456789ab", "list:0123456789ab", "the faults of a list"),
        ("ber:x", "ber:x", "fault model ber:x"),
        ("my-own", "my-own", "fault model my-own"),
    ],
)
def test_faults(fault: str, name: str, what: str) -> None:
    assert (words.fault_name(fault), words.fault_words(fault)) == (name, what)


@pytest.mark.parametrize(
    ("low", "mid", "high", "said"),
    [
        (0.9, 0.918, 0.93, "91.8% (90.0\u201393.0%)"),
        (0.0, 0.0, 0.013, "0% (0\u20131.3%)"),
        (0.0001, 0.0004, 0.013, "0.04% (0.0\u20131.3%)"),
        (0.99, 1.0, 1.0, "100% (99.0\u2013100%)"),
        (0.0, 1e-9, 0.5, "<0.1% (0\u201350.0%)"),
    ],
)
def test_figures(low: float, mid: float, high: float, said: str) -> None:
    figure = Figure(mean=mid, low=low, high=high, confidence=0.95, method="wilson", n=10)
    assert words.both(figure) == said


def test_budgets() -> None:
    assert words.budget("linf", 8 / 255) == "L-inf 8/255"
    assert words.budget("linf", 0.0301) == "L-inf 0.0301"
    assert words.budget("l2", 0.5) == "L2 0.5"


def test_groups() -> None:
    names = ["accuracy", "sdc1@seu", "robust@pgd,eps=8/255", "robust@pgd,eps=8/255@ber=1e-4"]
    assert [words.group_of(n) for n in names] == ["clean", "faults", "attacks", "both at once"]


@pytest.mark.parametrize(
    ("demands", "said"),
    [
        ((), "No requirement was set"),
        (("accuracy >= 0.9",), "The requirement is met"),
        (("accuracy >= 0.9", "accuracy > 0.5"), "All 2 requirements are met"),
        (("accuracy >= 0.99",), "1 of 1 requirement not met"),
        (("accuracy >= 0.9", "accuracy > 0.99"), "1 of 2 requirements not met"),
    ],
)
def test_verdicts(demands: tuple[str, ...], said: str) -> None:
    assert words.verdict(example.report(demands)) == said


def test_findings_name_the_worst() -> None:
    said = "\n".join(words.findings(example.report()))
    assert "92.0% (90.3\u201393.7%) of 1,000 images" in said
    assert "probability of 1e-2" in said
    assert "\u221218.5 points" in said
    assert "The most sensitive layer is conv1: " in said
    assert "The most sensitive bit position is 7: " in said
    assert "pgd,eps=8/255" in said


def test_chance_is_not_called_a_weakness() -> None:
    report = example.report()
    seu = report.campaigns[0]
    wide = [
        v.model_copy(update={"sdc1": v.sdc1.model_copy(update={"low": 0.0})}) for v in seu.layers
    ]
    changed = seu.model_copy(update={"layers": tuple(wide), "bits": ()})
    said = "\n".join(words.findings(report.model_copy(update={"campaigns": (changed,)})))
    assert "No layer and no bit position stands out" in said
    assert "most sensitive" not in said


def test_findings_of_a_bare_report() -> None:
    nothing: dict[str, Any] = {"campaigns": (), "attacks": (), "joint": (), "corruptions": ()}
    bare = example.report((), **nothing, figures={"accuracy": example.figure(0.92)})
    assert len(words.findings(bare)) == 1


@given(low=st.floats(0, 1), mid=st.floats(0, 1), high=st.floats(0, 1))
def test_a_figure_is_never_rounded_to_certainty(low: float, mid: float, high: float) -> None:
    low, mid, high = sorted((low, mid, high))
    figure = Figure(mean=mid, low=low, high=high, confidence=0.95, method="wilson", n=10)
    said = words.mean(figure)
    assert (said == "0%") == (mid == 0)
    assert (said == "100%") == (mid == 1)
    assert 1 <= words.decimals(figure) <= 5


def test_the_worst_of_both_is_who_knows_the_faults() -> None:
    said = [line for line in words.findings(example.report()) if line.startswith("With both")]
    assert len(said) == 1
    assert "known to the attacker, on pgd,eps=8/255, it classifies 31.0%" in said[0]
    assert words.group_of("robust@pgd,eps=8/255,aware@ber=1e-2") == "both at once"


def test_corruptions_have_their_own_words() -> None:
    assert words.group_of("accuracy@corruption=fog,severity=3") == "corruptions"
    assert words.group_of("accuracy@corruptions") == "corruptions"
    said = words.findings(example.report())[-1]
    assert "least with JPEG compression at severity 4" in said


@pytest.mark.parametrize(
    ("figure", "said"),
    [
        ("accuracy", "clean"),
        ("accuracy@ber=1e-2", "BER 1e-2"),
        ("accuracy@corruptions", "corruptions"),
        ("robust@pgd,eps=8/255", "pgd 8/255"),
        ("robust@apgd,eps=0.5,norm=l2@seu", "apgd 0.5 L2, SEU"),
        ("robust@pgd,eps=8/255,aware@ber=1e-2", "pgd 8/255, known BER 1e-2"),
    ],
)
def test_short_names(figure: str, said: str) -> None:
    assert words.short(figure) == said
