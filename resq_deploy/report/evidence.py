"""The sections of the page that show where the network is weak, what was covered, and how to get the figures again."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from resq_deploy.report import words
from resq_deploy.report.charts import HEAT_STEPS, heat_map, interval_mark
from resq_deploy.report.layout import details, note, section, table
from resq_deploy.report.markup import Child, Safe, tag
from resq_deploy.report.model import Campaign, Report, Vulnerability

_SHOWN = 12  # layers in the open table; the others are behind a click


def vulnerability(report: Report) -> Safe:
    """Where one fault does most harm: layer by bit position, then each of the two by itself."""
    found = [c for c in report.campaigns if c.cells or c.layers or c.bits]
    found.sort(key=lambda c: (c.on != "clean", c.fault not in ("seu", "sbu")))
    parts = [_weakness(c, index) for index, c in enumerate(found)]
    more = details(f"{len(parts) - 1} more campaigns", parts[1:]) if len(parts) > 1 else None
    return section(
        "weak",
        "Where it is vulnerable",
        note(
            "The share of answers (top-1) that a fault at this place changed, in percent. "
            "A dot marks a place that no trial hit."
        )
        if parts
        else None,
        parts[:1],
        more,
    )


def coverage(report: Report) -> Safe:
    """What the faults could reach, and what nobody looked at."""
    rows = [
        (
            words.campaign_name(c),
            words.where_words(c.where),
            words.count(c.locations),
            words.count(c.unreachable),
            words.count(c.trials),
            words.count(c.images),
            c.stopped,
        )
        for c in report.campaigns
    ]
    head = ("Fault", "Memory", "Locations", "Unreachable", "Trials", "Images", "Stopped because")
    return section(
        "coverage",
        "What was covered, and what was not",
        _list(
            "Not covered", report.not_covered, "Nothing was found that this validation left out."
        ),
        _list("Warnings", report.warnings, ""),
        table("Coverage of each campaign", head, rows) if rows else None,
    )


def provenance(report: Report) -> Safe:
    """The artifact, how it was run, and the commands that give the same figures again."""
    subject = report.subject
    facts: dict[str, Any] = {
        "Bundle": subject.name,
        "Network": subject.arch,
        "Input": "\u00d7".join(map(str, subject.input_shape)) + ", pixels in [0, 1]",
        "Classes": subject.classes,
        "Weight memory": f"{words.count(subject.weights)} parameters, "
        f"{words.count(subject.weight_bits)} bits",
        "model.int8.onnx": f"sha256 {subject.int8_sha256}",
        "manifest.json": f"sha256 {subject.manifest_sha256}",
    }
    rest = {k: v for k, v in report.provenance.items() if k != "command"}
    return section(
        "provenance",
        "Provenance, and how to get these figures again",
        _commands(report),
        tag("h3", "Artifact"),
        _facts(facts),
        tag("h3", "Run"),
        _facts(report.runner | {"data": report.data} | rest),
    )


def glossary(report: Report) -> Safe:
    """The words of the field, for a reader who is new to it."""
    terms = [(tag("dt", word), tag("dd", meaning)) for word, meaning in words.GLOSSARY.items()]
    return section("words", "Words on this page", tag("dl", terms, class_="terms"))


def replay_commands(report: Report) -> list[str]:
    """Shell lines: the whole validation again, and one trial of it."""
    command = report.provenance.get("command")
    if isinstance(command, list | tuple):  # what is there now is evidence: it asks before it goes
        command = [word for word in command if word not in ("--force", "--resume")]
    lines = [command]
    if report.campaigns:
        lines.append(
            f"resq replay . --campaign {report.campaigns[0].fault} --trial 0"
            "   # in the folder of this report; any campaign, any trial"
        )
    return [_shell(line) for line in lines if line]


def _shell(line: Any) -> str:
    return shlex.join(map(str, line)) if isinstance(line, list | tuple) else str(line)


def _commands(report: Report) -> Child:
    lines = replay_commands(report)
    if not lines:
        return None
    return (
        note(
            "The seed, the bundle and the versions below decide every figure: "
            "trial i of a seed is the same on every machine."
        ),
        tag(
            "pre",
            tag("code", "\n".join(lines)),
            tabindex="0",
            role="group",
            aria_label="Commands",
        ),
    )


def _weakness(campaign: Campaign, index: int) -> Child:
    return (
        tag("h3", f"{words.campaign_name(campaign)}: {words.fault_words(campaign.fault)}"),
        _layer_by_bit(campaign, index),
        _ranked("layer", campaign.layers),
        _by_bit(campaign.bits),
    )


def _layer_by_bit(campaign: Campaign, index: int) -> Child:
    if not campaign.cells:
        return None
    rows = list(
        dict.fromkeys([*(v.name for v in campaign.layers), *(c.layer for c in campaign.cells)])
    )
    columns = [str(b) for b in sorted({c.bit for c in campaign.cells}, reverse=True)]
    cells = {(c.layer, str(c.bit)): (c.sdc1, c.trials) for c in campaign.cells}
    title = f"Changed answers by layer and bit position, {words.campaign_name(campaign)}"
    return tag(
        "figure",
        tag("figcaption", "Layer (rows) by bit position (columns, most significant first)"),
        tag(
            "div",
            heat_map(rows, columns, cells, f"heat{index}", title),
            class_="scroll",
            role="group",
            tabindex="0",
            aria_label=title,
        ),
        _heat_legend(),
    )


def _heat_legend() -> Safe:
    steps = ["0", *(f"\u2264 {step * 100:g}" for step in HEAT_STEPS[1:]), f"> {HEAT_STEPS[-1]:.0%}"]
    keys = [tag("li", tag("i", class_=f"key h{i}"), text) for i, text in enumerate(steps)]
    return tag("ul", keys, class_="legend heat-legend", aria_label="Colours, in percent")


def _ranked(what: str, found: tuple[Vulnerability, ...]) -> Child:
    if not found:
        return None
    order = sorted(found, key=lambda v: (v.trials > 0, v.sdc1.mean), reverse=True)
    first = _vulnerabilities(f"Most sensitive {what}s", what, order[:_SHOWN])
    if len(order) <= _SHOWN:
        return first
    rest = _vulnerabilities(f"The other {what}s", what, order[_SHOWN:])
    return (first, details(f"{len(order) - _SHOWN} more {what}s", rest))


def _by_bit(found: tuple[Vulnerability, ...]) -> Child:
    def position(v: Vulnerability) -> int:
        digits = "".join(ch for ch in v.name if ch.isdigit())
        return int(digits[:4]) if digits else -1

    order = sorted(found, key=position, reverse=True)
    return _vulnerabilities("By bit position", "bit", order) if order else None


def _vulnerabilities(caption: str, what: str, found: list[Vulnerability]) -> Safe:
    most = max((v.sdc1.high for v in found if v.trials), default=1.0)
    head = (what.capitalize(), "Answers changed", "Interval", "On one scale", "Trials", "Locations")
    return table(caption, head, [_vulnerable(v, most) for v in found])


def _vulnerable(v: Vulnerability, most: float) -> tuple[Child, ...]:
    """One row; of a place that no trial hit nothing is known, which is not 0."""
    known = (words.mean(v.sdc1), words.interval(v.sdc1), interval_mark(v.sdc1, most))
    measured = known if v.trials else ("not hit", "\u2013", "")
    return (v.name, *measured, words.count(v.trials), words.count(v.locations))


def _list(title: str, lines: tuple[str, ...], otherwise: str) -> Child:
    if not lines and not otherwise:
        return None
    body = tag("ul", [tag("li", line) for line in lines]) if lines else note(otherwise)
    return (tag("h3", title), body)


def _facts(facts: Mapping[str, Any]) -> Safe:
    rows = [
        (tag("dt", key.replace("_", " ")), tag("dd", _value(value)))
        for key, value in facts.items()
        if value not in (None, "", [], {})
    ]
    return tag("dl", rows, class_="facts")


def _value(value: Any) -> Child:
    if not isinstance(value, Mapping):
        return _plain(value)
    parts = (
        f"{key} {_shell(part) if key == 'command' else _plain(part)}"
        for key, part in value.items()
        if part not in (None, "", [], {})
    )
    return ", ".join(parts)


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_plain, value))
    if isinstance(value, Mapping):
        return "; ".join(f"{k} {_plain(v)}" for k, v in value.items())
    return f"{value:g}" if isinstance(value, float) else str(value)
