"""Dual resilience of a set of bundles: faults against attacks, and whether the one helps the other.

    found = compare([Subject.of(path) for path in ("plain.resq", "I.resq", "I+II.resq")])
    found.verdict                 # in a sentence

A bundle is compared with those that lack some of its stages and have no others: I + II with I and with II, if both are
there; where stages do not tell, with the bundle before it. What a step was meant for is read from the stages that it
adds: stage I is for attacks, II and III are for faults. So one sees what fault hardening did to attack resilience, and
the other way round: RESQ (2603.15413) finds that the first helps and the second does not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from resq_deploy.budget import ATTACKS
from resq_deploy.bundle import Bundle
from resq_deploy.errors import CampaignError
from resq_deploy.report import curves
from resq_deploy.report.by_image import ByImage
from resq_deploy.report.charts import Point
from resq_deploy.report.model import Figure, Report
from resq_deploy.runtime import evidence
from resq_deploy.runtime.corruptions import MEAN
from resq_deploy.runtime.differences import Change, change, widened
from resq_deploy.runtime.places import report_folder

Threat = Literal["faults", "attacks"]
Measure = Callable[[Bundle], Report]

_FAULT, _ATTACK, _AWARE = "accuracy@ber=", "robust@", ",aware@"
CAUTION = (
    "Faults run on the first images of the sample, so their rows can lie above the clean one. "
    "Intervals are over images and faults. Each bundle is one training: "
    "two seeds of one recipe can differ by more."
)
_STAGES = {"I": {"stage I", "1"}, "II": {"stage II", "2"}}


@dataclass(frozen=True, slots=True)
class Subject:
    """A bundle and the figures that a validation found. `stages`: of hardening, among I, II, III.

    Intervals of `figures` are over images as well as faults: a network is compared with another, not a sample.
    `by_image`: how often each image was right, of the figures of which the report says so. `curve`: accuracy at each
    bit error rate, with the report's own intervals. `sha256`: of the INT8 graph, hex.
    """

    name: str
    stages: tuple[str, ...]
    figures: Mapping[str, Figure]
    by_image: Mapping[str, ByImage] = field(default_factory=dict)
    curve: tuple[Point, ...] = ()
    sha256: str = ""

    @classmethod
    def of(
        cls,
        path: str | os.PathLike[str],
        measure: Measure | None = None,
        reports: Sequence[str | os.PathLike[str]] = (),
    ) -> Subject:
        """A bundle with its report: of the folders `reports`, beside it, or what `measure` makes now.

        Raises CampaignError where there is none, ReportError for a folder without a report.
        """
        from resq_deploy.runtime.contents import nearby_report, report_of

        bundle = Bundle.open(path)
        report = report_of(bundle, reports) or nearby_report(bundle)
        if report is None and measure is not None:
            report = measure(bundle)
        if report is None:
            raise CampaignError(
                f"{path} has no report of this very artifact in {report_folder(bundle.path)}",
                f"give one that lies elsewhere with --report, or make one: resq-validate {path} --joint",
            )
        lines = {line.name: line.points for line in curves.lines_of(report)}
        return cls(
            _name(Path(path)),
            stages_of(bundle),
            _over_images(report),
            report.by_image,
            lines.get(curves.UNALTERED, ()),
            report.subject.int8_sha256,
        )

    @property
    def label(self) -> str:
        """The stages as people write them: `plain`, `I+II`."""
        return "+".join(self.stages) or "plain"


@dataclass(frozen=True, slots=True)
class Step:
    """From one bundle to the next. `against`: the threats that the stages it adds are for; `clean`: what it costs.

    `attack`: None where a report has no attacks. `both`: what it did under attacks that know the faults, at the highest
    rate that all bundles have; None: none has.
    """

    before: str
    after: str
    added: tuple[str, ...]
    against: tuple[Threat, ...]
    clean: Change
    fault: Change
    attack: Change | None = None
    both: Change | None = None

    @property
    def changes(self) -> dict[str, Change]:
        """What it changed of what was measured, by threat."""
        every = {
            "clean": self.clean,
            "faults": self.fault,
            "attacks": self.attack,
            "both": self.both,
        }
        return {threat: change for threat, change in every.items() if change is not None}

    @property
    def failed(self) -> bool:
        """Whether it lowered a figure that it was meant to raise: it then says nothing about hardening."""
        own = self.changes
        return any(own[t].effect == "hurts" for t in self.against if t in own)


@dataclass(frozen=True, slots=True)
class Comparison:
    """The matrix: `rows` are bundles, `columns` the names of figures that any of them has.

    `fault_figure` and `attack_figure` are the ones that steps are judged by: the highest bit error rate, and the
    worst case over attacks (else the attack that leaves least), among those that all bundles have; None: there is a
    report without attacks, and faults alone are compared.
    """

    rows: tuple[Subject, ...]
    columns: tuple[str, ...]
    fault_figure: str
    attack_figure: str | None
    steps: tuple[Step, ...]
    verdict: str


def compare(subjects: Sequence[Subject]) -> Comparison:
    """Put bundles beside each other, under attacks too where all reports have them.

    Raises CampaignError for fewer than two, or no figures in common.
    """
    if len(subjects) < 2:
        raise CampaignError("a comparison needs at least two bundles", "resq compare A.resq B.resq")
    common = set.intersection(*(set(s.figures) for s in subjects))
    fault = _hardest_fault(common)
    attack = _hardest_attack(common, subjects)
    both = max((n for n in common if _AWARE in n), key=lambda n: (_rate(n), n), default=None)
    steps = tuple(_step(*pair, fault, attack, both) for pair in pairs(subjects))
    names = dict.fromkeys(n for s in subjects for n in s.figures if _shown(n))
    return Comparison(
        tuple(subjects), tuple(sorted(names, key=_order)), fault, attack, steps, verdict(steps)
    )


def pairs(subjects: Sequence[Subject]) -> list[tuple[Subject, Subject]]:
    """Which bundles a step leads between: from each to those that add the fewest stages to its own.

    A bundle whose stages nest with no other's is compared with the one before it.
    """
    sets = [frozenset(s.stages) for s in subjects]
    found = []
    for after, stages in enumerate(sets):
        below = [i for i, s in enumerate(sets) if s < stages]
        nearest = [i for i in below if not any(sets[i] < sets[j] for j in below)]
        if not nearest and after and not any(stages < other for other in sets):
            nearest = [after - 1]
        found += [(subjects[i], subjects[after]) for i in nearest]
    return found


def stages_of(bundle: Bundle) -> tuple[str, ...]:
    """Which of RESQ's stages a bundle went through, from what its manifest says of training and adjustment."""
    training = bundle.manifest.provenance.training
    phases = training.get("phases", ())
    named = {str(p) for p in phases} if isinstance(phases, (list, tuple)) else set[str]()
    named |= set(str(training.get("stages", "")).split("+"))
    found = [stage for stage, words in _STAGES.items() if named & words]
    return (*found, "III") if bundle.manifest.adjustment.applied else tuple(found)


def _over_images(report: Report) -> dict[str, Figure]:
    """A report's figures, those of campaigns widened by what other images of the same kind would have given."""
    images = {
        name: c.images
        for c in report.campaigns
        for name in evidence.campaign_names(c.fault, c.on).values()
    }
    return {
        name: widened(figure, images[name]) if name in images else figure
        for name, figure in report.figures.items()
    }


def verdict(steps: Sequence[Step]) -> str:
    """What the steps say about RESQ's asymmetry, in a few sentences.

    Steps against both threats at once say nothing, nor do those that lowered what they were meant to raise.
    """
    if not any(s.added for s in steps):
        return "No bundle adds a stage of hardening to another's: what they differ by is all that is compared."
    single = [s for s in steps if len(s.against) == 1]
    sound = [s for s in single if not s.failed]
    crossed = [s.attack for s in sound if s.against == ("faults",) and s.attack is not None]
    back = [s.fault for s in sound if s.against == ("attacks",)]
    left_out = "".join(
        f" {s.before} -> {s.after} is left out: it lowered what it was meant to raise."
        for s in single
        if s.failed
    )
    if not crossed and not back:
        return (
            f"No step hardens against one threat alone: nothing can be said of asymmetry.{left_out}"
        )
    there = _tally("Hardening against faults", "attack resilience", crossed)
    again = _tally("Hardening against attacks", "fault resilience", back)
    return f"{there} {again} {_conclusion(crossed, back)}{left_out}"


def _conclusion(crossed: Sequence[Change], back: Sequence[Change]) -> str:
    if not crossed or not back:
        return "Asymmetry needs both kinds of step."
    if _exceeds(crossed, back) and not any(c.effect == "hurts" for c in crossed):
        return "So it is asymmetric, as RESQ finds."
    if _exceeds(back, crossed):
        return "So it is the other way round than RESQ finds."
    if all(any(c.effect == "helps" for c in changes) for changes in (crossed, back)):
        return "So each helps the other, and no asymmetry is shown."
    return "No asymmetry is shown by these figures."


def _exceeds(one: Iterable[Change], other: Sequence[Change]) -> bool:
    """Whether the one helps by more points than the other can have: an interval that holds 0 does not rule help out."""
    most = max(c.high for c in other)
    return not any(c.effect == "helps" for c in other) and any(
        c.effect == "helps" and c.low > most for c in one
    )


def _tally(what: str, which: str, changes: Sequence[Change]) -> str:
    if not changes:
        return f"No step is {what[0].lower() + what[1:]} alone."
    effects = [change.effect for change in changes]
    words = {"helps": "raised", "hurts": "lowered", "undecided": "did not clearly change"}
    parts = [f"{words[e]} it in {effects.count(e)}" for e in words if e in effects]
    first, *rest = parts
    said = ", ".join([first.replace(" it ", f" {which} "), *rest])
    return f"{what} {said} of {len(effects)} step{'s' * (len(effects) > 1)}."


def _step(
    before: Subject, after: Subject, fault: str, attack: str | None, both: str | None
) -> Step:
    added = tuple(s for s in after.stages if s not in before.stages)
    against = [t for t, stages in _AGAINST.items() if set(added) & stages]
    return Step(
        before.name,
        after.name,
        added,
        tuple(against),
        _change("accuracy", before, after),
        _change(fault, before, after),
        _change(attack, before, after) if attack else None,
        _change(both, before, after) if both else None,
    )


def _change(name: str, before: Subject, after: Subject) -> Change:
    kept = (subject.by_image.get(name) for subject in (before, after))
    return change(name, before.figures[name], after.figures[name], *kept)


_AGAINST: Mapping[Threat, frozenset[str]] = {
    "faults": frozenset({"II", "III"}),
    "attacks": frozenset({"I"}),
}


def _hardest_fault(names: Iterable[str]) -> str:
    rates = [n for n in names if n.startswith(_FAULT) and n.count("@") == 1]
    if not rates:
        raise CampaignError(
            "these reports have no bit error rate in common", "validate each with the same --ber"
        )
    return max(rates, key=_rate)


def _attacks(names: Iterable[str]) -> list[str]:
    return [n for n in names if n.startswith(_ATTACK) and n.count("@") == 1]


def _hardest_attack(names: Iterable[str], subjects: Sequence[Subject]) -> str | None:
    if not all(_attacks(s.figures) for s in subjects):
        return None
    attacks = _attacks(names)
    if not attacks:
        raise CampaignError(
            "these reports have no attack in common",
            "validate each with the same --attack, of inputs that both were exported with",
        )
    worst = [n for n in attacks if n.startswith(f"{_ATTACK}worst")]
    return min(worst or attacks, key=lambda n: sum(s.figures[n].mean for s in subjects))


def _rate(name: str) -> float:
    try:
        return float(name.rpartition("ber=")[2])
    except ValueError:
        return -1.0


def _shown(name: str) -> bool:
    return name in ("accuracy", MEAN) or name.startswith((_FAULT, _ATTACK))


def _order(name: str) -> tuple[int, int, float, str]:
    """Clean, then faults by rate, then attacks from weak to strong, then both at once."""
    if name in ("accuracy", MEAN):
        return (0, int(name == MEAN), 0.0, name)
    if name.startswith(_FAULT):
        return (1, 0, _rate(name), name)
    attack = name.removeprefix(_ATTACK).partition(",")[0]
    strength = ATTACKS.index(attack) if attack in ATTACKS else len(ATTACKS)
    both = name.count("@") > 1
    return (2 + both + (_AWARE in name), strength, _rate(name), name)


def _name(path: Path) -> str:
    return path.name.removesuffix(".resq") or str(path)
