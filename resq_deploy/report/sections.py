"""The sections of the page: verdict, summary, outcomes, attacks with the joint matrix, all figures."""

from __future__ import annotations

from collections.abc import Sequence

from resq_deploy.report import matrix, words
from resq_deploy.report.layout import details, note, section, table
from resq_deploy.report.markup import Child, Safe, tag
from resq_deploy.report.model import Campaign, Figure, Report, Requirement


def verdict(report: Report) -> Safe:
    """What was required, and what became of it."""
    state = "met" if report.met else "missed"
    line = words.verdict(report)
    if not report.requirements:
        hint = "This report states what was measured and judges nothing: give --require to judge."
        return tag(
            "section", tag("p", line, class_="verdict"), note(hint), class_="part first open"
        )
    rows = [_requirement(requirement) for requirement in report.requirements]
    return tag(
        "section",
        tag("h2", _sign(report.met), line, id="verdict", class_="verdict"),
        table("Requirements", ("Requirement", "Measured", "Interval", "Verdict"), rows),
        class_=f"part first {state}",
        aria_labelledby="verdict",
    )


def summary(report: Report) -> Safe:
    """The findings in sentences, and the headline figures."""
    tiles = [_tile("No fault, no attack", "clean accuracy", report.accuracy)]
    if (least := words.worst(report)) is not None:
        tiles.append(
            _tile("Bit flips", f"accuracy, {words.fault_name(least.fault)}", least.accuracy)
        )
    if report.attacks:
        hard = min(report.attacks, key=lambda a: a.robust.mean)
        tiles.append(_tile("Attack", f"robust accuracy, {words.attack_name(hard)}", hard.robust))
    if (both := words.worst_of_both(report)) is not None:
        tiles.append(_tile("Both at once", *both))
    if (natural := report.figures.get("accuracy@corruptions")) is not None:
        tiles.append(_tile("Corruptions", "accuracy, mean over corruptions", natural))
    return section(
        "summary",
        "In short",
        tag("div", tiles, class_="tiles"),
        tag("ul", [tag("li", line) for line in words.findings(report)], class_="findings"),
    )


def outcomes(report: Report) -> Safe:
    """What faults did, campaign by campaign, in the classes of the field."""
    clean = [c for c in report.campaigns if c.on == "clean"]
    attacked = [c for c in report.campaigns if c.on != "clean"]
    meaning = [
        (tag("dt", words.OUTCOME_NAMES[n]), tag("dd", words.OUTCOMES[n])) for n in words.OUTCOMES
    ]
    return section(
        "outcomes",
        "What the faults did",
        _outcome_table("Outcome classes, on unaltered images", clean) if clean else None,
        details(
            f"{len(attacked)} campaigns on attacked images",
            _outcome_table("Outcome classes, on attacked images", attacked),
        )
        if attacked
        else None,
        (
            note(
                "Shares of all (trial, image) pairs. The classes overlap: they do not add up to 100%."
            ),
            tag("dl", meaning, class_="terms"),
        )
        if report.campaigns
        else None,
    )


def _outcome_table(caption: str, campaigns: Sequence[Campaign]) -> Safe:
    names = tuple(words.OUTCOMES)
    rows = [
        (
            words.campaign_name(c),
            words.count(c.trials),
            words.count(c.flips),
            *(stacked(getattr(c, name)) for name in ("accuracy", *names)),
        )
        for c in campaigns
    ]
    outcome = (words.OUTCOME_NAMES[n] for n in names)
    return table(caption, ("Fault", "Trials", "Bits flipped", "Accuracy", *outcome), rows)


def attacks(report: Report) -> Safe:
    """Each attack, and the matrix of attacks and faults."""
    rows = [
        (
            words.attack_name(a),
            words.both(a.robust),
            words.both(a.success),
            words.budget(a.norm, a.eps),
            a.crafted_through,
        )
        for a in report.attacks
    ]
    if not rows:
        return Safe("")
    warned = [f"{words.attack_name(a)}: {text}" for a in report.attacks for text in a.warnings]
    return section(
        "attacks",
        "Attacks",
        note(
            "Success is the share of images that were right before the attack and are wrong after it."
        ),
        table(
            "Attacks on the deployed artifact",
            ("Attack", "Robust accuracy", "Success", "Budget", "Crafted through"),
            rows,
        ),
        tag("ul", [tag("li", w) for w in warned], class_="warnings") if warned else None,
        matrix.both_threats(report),
    )


def figures(report: Report) -> Safe:
    """Every figure under the name that `--require` knows it by."""
    rows = [
        (
            tag("code", name),
            words.group_of(name),
            words.mean(figure),
            words.interval(figure),
            f"{words.count(figure.n)}, {figure.method}",
        )
        for name, figure in report.figures.items()
    ]
    return section(
        "figures",
        "All figures",
        note(
            f"Intervals at {report.accuracy.confidence:.0%} confidence. These names work in --require."
        ),
        details(
            f"{len(rows)} figures",
            table("All figures", ("Figure", "Threat", "Mean", "Interval", "Counted, method"), rows),
        ),
    )


def _requirement(requirement: Requirement) -> tuple[Child, ...]:
    measured = requirement.measured
    counted = measured is None or measured.n > 0
    doubt = (
        "the interval reaches across the threshold" if counted and not requirement.certain else ""
    )
    state = "met" if requirement.met else "not met"
    return (
        tag("code", requirement.expression),
        words.mean(measured) if measured else words.percent(requirement.value, 2),
        words.interval(measured) if measured else "",
        (
            tag(
                "span",
                _sign(requirement.met),
                state,
                class_="good" if requirement.met else "bad",
            ),
            tag("small", doubt) if doubt else None,
        ),
    )


def _sign(good: bool) -> Safe:
    return tag("span", "\u2713" if good else "\u2717", aria_hidden="true", class_="sign")


def _tile(title: str, what: str, figure: Figure) -> Safe:
    return tag(
        "div",
        tag("p", title, class_="tile-title"),
        tag("p", words.mean(figure), class_="tile-value"),
        tag("p", words.interval(figure), class_="tile-interval"),
        tag("p", what, class_="tile-what"),
        class_="tile",
    )


def stacked(figure: Figure) -> Child:
    """A figure with its interval below it."""
    return (words.mean(figure), tag("small", words.interval(figure)))
