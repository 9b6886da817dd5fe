"""Dual resilience: differences, the matrix, the verdict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from resq_deploy.bundle import Bundle
from resq_deploy.errors import CampaignError
from resq_deploy.paired import Spread
from resq_deploy.report import words
from resq_deploy.report.by_image import ByImage
from resq_deploy.report.model import Figure
from resq_deploy.runtime import evidence, tables
from resq_deploy.runtime.compare import Subject, compare, pairs, stages_of
from resq_deploy.runtime.comparison_page import render
from resq_deploy.runtime.differences import Change, change, difference, widened
from resq_deploy.runtime.settings import Settings
from resq_deploy.runtime.validate import validate_bundle
from resq_deploy.statistics import Tally, wilson
from tests.bundles import write_bundle
from tests.report import example

FAULT, ATTACK = "accuracy@ber=1e-2", "robust@pgd,eps=8/255"


def figure(share: float, n: int = 1000) -> Figure:
    found = wilson(round(share * n), n)
    return Figure(
        mean=found.mean, low=found.low, high=found.high, confidence=0.95, method="Wilson", n=n
    )


def subject(stages: str, fault: float, attack: float, **more: float) -> Subject:
    figures = {"accuracy": 0.9, "accuracy@ber=1e-4": 0.9, FAULT: fault, ATTACK: attack, **more}
    names = tuple(s for s in stages.split("+") if s)
    return Subject(stages or "plain", names, {k: figure(v) for k, v in figures.items()})


def test_two_quantizers_of_one_network_are_compared_without_talk_of_stages() -> None:
    found = compare([subject("", 0.5, 0.1), subject("", 0.9, 0.1)])
    assert found.verdict.startswith("No bundle adds a stage of hardening")
    assert found.steps[0].fault.effect == "helps"


def test_the_hardest_common_figures_are_compared() -> None:
    more: Any = {"robust@fgsm,eps=8/255": 0.4, f"{ATTACK}@ber=1e-2": 0.0, "sdc1@seu": 0.1}
    found = compare([subject("", 0.5, 0.1, **more), subject("I", 0.5, 0.5, **more)])
    assert (found.fault_figure, found.attack_figure) == (FAULT, ATTACK)
    assert found.columns == (
        "accuracy",
        "accuracy@ber=1e-4",
        FAULT,
        "robust@fgsm,eps=8/255",
        ATTACK,
        f"{ATTACK}@ber=1e-2",
    )
    more["robust@worst,eps=8/255"] = 0.3
    found = compare([subject("", 0.5, 0.1, **more), subject("I", 0.5, 0.5, **more)])
    assert found.attack_figure == "robust@worst,eps=8/255"


def test_faults_alone_are_compared_where_a_report_has_no_attacks() -> None:
    rows = [subject("", 0.5, 0.1), subject("I", 0.5, 0.5), subject("I+II", 0.8, 0.6)]
    bare = {k: v for k, v in rows[1].figures.items() if k != ATTACK}
    found = compare([rows[0], replace(rows[1], figures=bare), rows[2]])
    assert (found.fault_figure, found.attack_figure) == (FAULT, None)
    assert [list(step.changes) for step in found.steps] == 2 * [["clean", "faults"]]
    assert not any(step.failed for step in found.steps)
    assert "No step is hardening against faults alone" in found.verdict
    assert tables.comparison_json(found)["steps"][0]["attack"] is None
    assert words.short(ATTACK) in render(found)  # what the others have is in the table of figures
    assert list(tables.compared(found))


def test_a_step_counts_for_the_threat_it_hardens_against() -> None:
    rows = [subject("", 0.5, 0.1), subject("I", 0.5, 0.5), subject("I+II", 0.8, 0.6)]
    found = compare(rows)
    assert [(s.added, s.against) for s in found.steps] == [
        (("I",), ("attacks",)),
        (("II",), ("faults",)),
    ]
    assert found.steps[0].changes["attacks"].effect == "helps"
    assert found.steps[0].fault.effect == "undecided"
    assert [row.label for row in found.rows] == ["plain", "I", "I+II"]


def test_steps_lead_along_the_stages_in_any_order() -> None:
    rows = [subject(s, 0.5, 0.1) for s in ("I+II", "", "I+II+III", "I", "II")]
    found = [(a.label, b.label) for a, b in pairs(rows)]
    assert sorted(found) == [
        ("I", "I+II"),
        ("I+II", "I+II+III"),
        ("II", "I+II"),
        ("plain", "I"),
        ("plain", "II"),
    ]
    same = [subject("", 0.5, 0.1), subject("", 0.6, 0.1), subject("I", 0.6, 0.1)]
    assert len(pairs(same)) == 2
    assert [(a, b) for a, b in pairs(same[:2])] == [(same[0], same[1])]


@pytest.mark.parametrize(
    ("attack_to_fault", "fault_to_attack", "message"),
    [
        (0.5, 0.6, "asymmetric, as RESQ finds"),
        (0.3, 0.6, "asymmetric, as RESQ finds"),
        (0.6, 0.6, "each helps the other"),
        (0.6, 0.5, "the other way round"),
        (0.5, 0.5, "No asymmetry is shown"),
        (0.5, 0.3, "No asymmetry is shown"),
    ],
)
def test_the_verdict(attack_to_fault: float, fault_to_attack: float, message: str) -> None:
    rows = [
        subject("", 0.5, 0.1),
        subject("I", attack_to_fault, 0.5),
        subject("I+II", 0.8, fault_to_attack),
    ]
    assert message in compare(rows).verdict


def test_steps_against_both_or_none_say_nothing() -> None:
    both = compare([subject("", 0.5, 0.1), subject("I+II", 0.8, 0.6)])
    assert both.steps[0].against == ("faults", "attacks")
    assert "nothing can be said" in both.verdict
    one = compare([subject("I", 0.5, 0.1), subject("I+II", 0.8, 0.6)])
    assert "Asymmetry needs both kinds of step" in one.verdict


def test_a_step_that_fails_its_own_purpose_is_no_evidence() -> None:
    rows = [subject("", 0.5, 0.1), subject("I", 0.5, 0.5), subject("II", 0.2, 0.3)]
    found = compare(rows)
    assert [s.failed for s in found.steps] == [False, True]
    assert "plain -> II is left out" in found.verdict
    assert "Asymmetry needs both" in found.verdict


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(CampaignError, match="at least two"):
        compare([subject("", 0.5, 0.1)])
    bare = Subject("bare", (), {"accuracy": figure(0.9)})
    with pytest.raises(CampaignError, match="no bit error rate in common"):
        compare([bare, subject("", 0.5, 0.1)])
    other = {"accuracy": figure(0.9), FAULT: figure(0.9), "robust@fgsm,eps=8/255": figure(0.9)}
    with pytest.raises(CampaignError, match="no attack in common"):
        compare([Subject("other", (), other), subject("", 0.5, 0.1)])


@given(a=st.integers(0, 200), b=st.integers(0, 200))
def test_intervals_of_differences_hold_the_difference(a: int, b: int) -> None:
    before, after = figure(a / 200, 200), figure(b / 200, 200)
    there, back = difference("x", before, after), difference("x", after, before)
    assert -1 <= there.low <= there.difference <= there.high <= 1
    assert [there.low, there.high] == pytest.approx([-back.high, -back.low])
    assert (a == b) <= (there.effect == "undecided")


def test_newcombe_gives_the_published_interval() -> None:
    """56/70 against 48/80 (Newcombe 1998, table II, example a, method 10): 0.0524 to 0.3339."""
    found = difference("x", figure(48 / 80, 80), figure(56 / 70, 70))
    assert [found.low, found.high] == pytest.approx([0.0524, 0.3339], abs=5e-5)


def test_stages_are_read_from_the_manifest(tmp_path: Path) -> None:
    bundle = write_bundle(tmp_path / "net.resq")
    assert stages_of(bundle) == ("III",)
    for training, wanted in (
        ({"stages": "1+2"}, ("I", "II", "III")),
        ({"stages": "none", "phases": ["plain"]}, ("III",)),
        ({"stages": "2", "phases": ["plain", "stage I", "stage II"]}, ("I", "II", "III")),
    ):
        provenance = bundle.manifest.provenance.model_copy(update={"training": training})
        manifest = bundle.manifest.model_copy(update={"provenance": provenance})
        assert stages_of(Bundle(bundle.path, manifest)) == wanted


def test_a_bundle_without_a_report_says_how_to_get_one(tmp_path: Path) -> None:
    write_bundle(tmp_path / "net.resq")
    with pytest.raises(CampaignError, match="no report") as found:
        Subject.of(tmp_path / "net.resq")
    assert "resq-validate" in found.value.hint


def test_an_effect_needs_an_interval_off_zero() -> None:
    assert Change("x", 0.1, 0.01, 0.2).effect == "helps"
    assert Change("x", -0.1, -0.2, -0.01).effect == "hurts"
    assert Change("x", 0.1, -0.01, 0.2).effect == "undecided"


def test_equally_good_networks_are_told_apart_no_more_often_than_chance() -> None:
    """Trials on the same 256 images say much of faults and little of networks: some images are hard for either."""
    rng, images, trials = default_rng(0), 256, 300
    apart = as_counted = 0
    for _ in range(100):
        found = []
        for _ in range(2):
            right = (
                rng.random(images) < 0.9
            )  # of the images without faults; a fault costs some of them
            tally = Tally(images)
            for hits in rng.binomial(int(right.sum()), 0.99, trials):
                tally.add(int(hits))
            found.append(evidence.figure(tally.estimate()))
        as_counted += difference("x", *found).effect != "undecided"
        apart += difference("x", *(widened(f, images) for f in found)).effect != "undecided"
    assert apart <= 8
    assert as_counted > 50  # what intervals over faults alone would have said


def test_figures_of_campaigns_count_their_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_bundle(tmp_path / "net.resq")
    report = example.report()
    monkeypatch.setattr("resq_deploy.runtime.contents.nearby_report", lambda _: report)

    figures = Subject.of(tmp_path / "net.resq").figures

    for name, before in report.figures.items():
        wider = figures[name].low < before.low and figures[name].high > before.high
        assert wider == (
            ("@ber=" in name and "aware" not in name) or "@seu" in name or "@mbu" in name
        )
    assert figures["accuracy@ber=1e-4"].mean == report.figures["accuracy@ber=1e-4"].mean


SAME, OTHER = "0" * 64, "1" * 64


def kept(right: int, images: int = 1000, key: str = SAME) -> ByImage:
    return ByImage.of(key, np.arange(images) < right)


def with_counts(one: Subject, key: str = SAME) -> Subject:
    """As if every figure had been measured on a thousand images."""
    counts = {name: kept(round(f.mean * 1000), key=key) for name, f in one.figures.items()}
    return replace(one, by_image=counts)


def test_the_same_images_are_compared_one_by_one() -> None:
    rows = [subject("", 0.5, 0.1), subject("I", 0.53, 0.5), subject("I+II", 0.55, 0.52)]
    apart = compare(rows).steps
    together = compare([with_counts(row) for row in rows]).steps
    for step, before in zip(together, apart, strict=True):
        for threat in ("faults", "attacks"):
            now, then = step.changes[threat], before.changes[threat]
            assert (now.paired_on, now.unpaired) == (1000, "")
            assert (then.paired_on, then.unpaired) == (None, "no counts by image")
            assert now.difference == pytest.approx(then.difference)
            assert now.high - now.low < then.high - then.low
    assert (apart[0].fault.effect, together[0].fault.effect) == ("undecided", "helps")


def test_a_difference_is_paired_only_where_that_is_sound() -> None:
    before, after = figure(0.5), figure(0.6)
    pair = kept(500), kept(600)
    assert change("x", before, after, *pair).paired_on == 1000
    sure = after.model_copy(update={"confidence": 0.99})
    for said, *each in (
        ("no counts by image", before, after, pair[0], None),
        ("no counts by image", before, after, None, pair[1]),
        ("not the same images", before, after, pair[0], kept(600, key=OTHER)),
        ("not the same confidence", before, sure, *pair),
    ):
        found = change("x", *each)
        assert (found.paired_on, found.unpaired) == (None, said)
        assert (found.low, found.high) == (
            difference("x", *each[:2]).low,
            difference("x", *each[:2]).high,
        )


def test_equal_counts_leave_a_width() -> None:
    found = change("x", figure(0.9), figure(0.9), kept(900), kept(900))
    assert found.effect == "undecided"
    assert 0.002 < found.high - found.low < 0.01


def test_campaigns_bring_what_their_faults_add() -> None:
    counts = np.full(100, 90), np.full(100, 95)
    widths = []
    for variance in (0.0, 1e-4, 1e-3):
        spread = Spread(variance, 99)
        each = (ByImage.of(SAME, c, 100, spread) for c in counts)
        found = change("x", figure(0.9), figure(0.95), *each)
        widths.append(found.high - found.low)
        assert found.difference == pytest.approx(0.05)
    assert widths == sorted(widths)
    assert widths[2] > 2 * widths[0]


def test_two_validations_of_the_same_sample_are_paired(tmp_path: Path) -> None:
    paths = []
    for name, net in (("a", "resnet"), ("b", "resnet"), ("c", "resnet")):
        count = 12 if name != "c" else 10
        made = write_bundle(tmp_path / f"{name}.resq", net, count=count, faulty=True)
        few = Settings(ber=(1e-2,), faults=(), trials=3, joint=True)
        validate_bundle(made, few, output=tmp_path / f"{name}.report", workers=1)
        paths.append(made.path)
    (step,) = compare([Subject.of(path) for path in paths[:2]]).steps
    for found in (step.clean, step.fault, step.attack, step.both):
        assert found is not None
        assert (found.paired_on, found.difference, found.effect) == (12, 0.0, "undecided")
        assert found.low < 0 < found.high
    (step,) = compare([Subject.of(path) for path in paths[1:]]).steps
    assert (step.clean.paired_on, step.clean.unpaired) == (None, "not the same images")


def test_what_was_not_measured_is_not_widened() -> None:
    nothing = Figure(mean=0.0, low=0.0, high=1.0, confidence=0.95, method="betting", n=0)
    assert widened(nothing, 256) is nothing


def test_what_may_help_as_much_is_no_asymmetry() -> None:
    rows = [subject("", 0.5, 0.50), subject("I", 0.53, 0.6), subject("I+II", 0.8, 0.66)]
    found = compare(rows)
    assert found.steps[0].fault.effect == "undecided"
    assert found.steps[1].changes["attacks"].effect == "helps"
    assert "No asymmetry is shown" in found.verdict
