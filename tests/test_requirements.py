"""Requirements: every way to write one, every way to get one wrong, and the verdict."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resq_deploy import requirements
from resq_deploy.errors import RequirementError
from resq_deploy.report.model import Figure


def figure(mean: float, half: float = 0.01) -> Figure:
    low, high = max(mean - half, 0.0), min(mean + half, 1.0)
    return Figure(mean=mean, low=low, high=high, confidence=0.95, method="wilson", n=1000)


FIGURES = {
    "accuracy": figure(0.92),
    "accuracy@ber=1e-4": figure(0.90),
    "accuracy@ber=1e-3": figure(0.85),
    "sdc1@seu": figure(0.001, 0.0005),
    "sdc1@mbu:4": figure(0.002, 0.0005),
    "robust@pgd,eps=8/255": figure(0.41),
    "robust@pgd,eps=8/255@ber=1e-4": figure(0.40),
}


@pytest.mark.parametrize(
    ("text", "name", "op", "threshold", "compared"),
    [
        ("accuracy >= 0.85", "accuracy", ">=", 0.85, "mean"),
        ("accuracy@ber=1e-4>=.85", "accuracy@ber=1e-4", ">=", 0.85, "mean"),
        ("accuracy@ber=1e-4 ≥ 85%", "accuracy@ber=1e-4", ">=", 0.85, "mean"),
        (" low( accuracy@ber=1e-4 )  > 85 % ", "accuracy@ber=1e-4", ">", 0.85, "low"),
        ("high(sdc1@seu) <= 1e-3", "sdc1@seu", "<=", 0.001, "high"),
        ("mean(sdc1@mbu:4) < 0.1%", "sdc1@mbu:4", "<", 0.001, "mean"),
        ("robust@pgd,eps=8/255 >= 0", "robust@pgd,eps=8/255", ">=", 0.0, "mean"),
        (
            "robust@pgd, eps=8/255 @ber=1e-4 >= 1",
            "robust@pgd,eps=8/255@ber=1e-4",
            ">=",
            1.0,
            "mean",
        ),
    ],
)
def test_reads(text: str, name: str, op: str, threshold: float, compared: str) -> None:
    read = requirements.parse(text)
    assert (read.figure, read.operator, read.threshold, read.compared) == (
        name,
        op,
        threshold,
        compared,
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "needs one of"),
        ("accuracy", "needs one of"),
        ("accuracy = 0.85", "needs one of"),
        ("accuracy == 0.85", "needs one of"),
        ("accuracy >= ", "not a number"),
        ("accuracy >= high", "not a number"),
        ("accuracy >= nan", "not a number"),
        ("accuracy >= inf", "not a number"),
        ("accuracy >= -0.5", "not a number"),
        ("accuracy >= 1e9999", "not a number"),
        ("accuracy >= 85", "did you mean 85%"),
        ("accuracy >= 101%", "100% is the most"),
        (f"accuracy >= {'9' * 350}", "100% is the most"),
        (f"accuracy >= {'9' * 5000}", "needs one of"),
        (">= 0.85", "names no figure"),
        ("low() >= 0.85", "names no figure"),
        ("median(accuracy) >= 0.85", "no median(...)"),
        ("low(accuracy >= 0.85", "not the name"),
        ("accuracy >= 0.8 <= 0.9", "needs one of"),
        ("accu$racy >= 0.8", "not the name"),
        ("@ber=1e-4 >= 0.8", "not the name"),
    ],
)
def test_refuses(text: str, says: str) -> None:
    with pytest.raises(
        RequirementError, match=says.replace("(", r"\(").replace(")", r"\)")
    ) as caught:
        requirements.parse(text)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "met", "certain"),
    [
        ("accuracy >= 0.85", True, True),
        ("accuracy >= 0.92", True, False),
        ("accuracy > 0.92", False, False),
        ("low(accuracy) >= 0.92", False, False),
        ("high(accuracy) <= 93%", True, True),
        ("accuracy@ber=0.0001 >= 0.85", True, True),
        ("accuracy@ber=1e-3 >= 0.90", False, True),
        ("high(sdc1@SEU) < 0.2%", True, True),
        ("robust@pgd,eps=0.03137254902 >= 0.35", True, True),
        ("robust@eps=8/255,pgd@ber=1e-4 < 0.2", False, True),
    ],
)
def test_judges(text: str, met: bool, certain: bool) -> None:
    (verdict,) = requirements.judge([requirements.parse(text)], FIGURES)
    assert (verdict.met, verdict.certain) == (met, certain)
    assert verdict.figure in FIGURES
    assert verdict.measured == FIGURES[verdict.figure]


def test_an_unknown_figure_lists_the_known_ones_closest_first() -> None:
    with pytest.raises(RequirementError) as caught:
        requirements.check([requirements.parse("acuracy@ber=1e-4 >= 0.85")], FIGURES)
    assert caught.value.message == "no figure 'acuracy@ber=1e-4' in this validation"
    listed = caught.value.hint.removeprefix("known, closest first: ").split(", ")
    assert listed[0] == "accuracy@ber=1e-4"
    assert "sdc1@seu" in listed
    with pytest.raises(RequirementError, match="closest first"):
        requirements.judge([requirements.parse("accuracy@ber=1e-5 >= 0.85")], FIGURES)


def test_the_same_requirement_twice_counts_once() -> None:
    assert len(requirements.parse_all(["accuracy >= 0.9", "accuracy  >= 0.9", "accuracy>0.9"])) == 2


shares = st.floats(0, 1)


@given(
    mean=shares,
    half=shares,
    threshold=shares,
    op=st.sampled_from([">=", "<=", ">", "<"]),
)
def test_a_certain_verdict_holds_for_both_ends(
    mean: float, half: float, threshold: float, op: str
) -> None:
    figures = {"accuracy": figure(mean, half)}
    verdicts = requirements.judge(
        requirements.parse_all(
            f"{b}(accuracy) {op} {threshold!r}" for b in ("mean", "low", "high")
        ),
        figures,
    )
    assert [v.threshold for v in verdicts] == [threshold] * 3
    if verdicts[0].certain:
        assert len({v.met for v in verdicts}) == 1
    conservative = verdicts[1 if op.startswith(">") else 2]
    assert not conservative.met or all(v.met for v in verdicts)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text: str) -> None:
    hint = "read"
    try:
        assert 0 <= requirements.parse(text).threshold <= 1
    except RequirementError as error:
        hint = error.hint
    assert hint


@pytest.mark.parametrize("text", ["sdc1@seu < 1%", "low(sdc1@seu) <= 0", "sdc1@seu >= 0"])
def test_what_counted_nothing_meets_nothing(text: str) -> None:
    nothing = Figure(mean=0.0, low=0.0, high=1.0, confidence=0.95, method="betting", n=0)

    (judged,) = requirements.judge([requirements.parse(text)], {"sdc1@seu": nothing})

    assert not judged.met
    assert not judged.certain or text == "sdc1@seu >= 0"
