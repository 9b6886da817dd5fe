"""The files of a report: report.json, CSV tables, junit.xml and report.html, each put in place in one step."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from pydantic import ValidationError

from resq_deploy import strict_json
from resq_deploy.errors import ReportError
from resq_deploy.report import page, words
from resq_deploy.report.markup import clean
from resq_deploy.report.model import Campaign, Figure, JointAttack, Report, Vulnerability

JSON = "report.json"
HTML = "report.html"
JUNIT = "junit.xml"

_TABLES = (
    *("figures", "campaigns", "layers", "bits", "cells"),
    *("attacks", "joint", "corruptions", "requirements"),
)
_LARGEST = 256 * 2**20  # bytes of a report.json that are read
_SHARES = ("accuracy", "masked", "sdc1", "sdc5", "critical", "due")
_ENDS = ("mean", "low", "high")
_CAMPAIGN = ("fault", "on", "locations", "unreachable", "trials", "images", "flips", "stopped")
_ATTACK = ("name", "attack", "norm", "eps", "crafted_through")
_REQUIREMENT = ("expression", "figure", "compared", "value", "operator", "threshold")
_VERDICT = ("met", "certain")

Row = Sequence[Any]


def write_report(report: Report, directory: str | os.PathLike[str]) -> Path:
    """Write every face of a report into a folder (made if need be) and return the path of its HTML page.

    report.json, report.html, junit.xml, and figures.csv, campaigns.csv, layers.csv, bits.csv, cells.csv,
    attacks.csv, joint.csv, corruptions.csv, requirements.csv. Raises ReportError where the folder cannot be written.
    """
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in faces(report).items():
            put(folder / name, content)
    except OSError as error:
        raise ReportError(
            f"cannot write the report to {folder}: {error.strerror}", "choose another -o"
        ) from error
    return folder / HTML


def remove_report(directory: str | os.PathLike[str]) -> None:
    """Delete every face of a report from a folder, and nothing else. Raises OSError."""
    for name in (JSON, JUNIT, HTML, *(f"{name}.csv" for name in _TABLES)):
        (Path(directory) / name).unlink(missing_ok=True)


def faces(report: Report) -> dict[str, str]:
    """File name -> content of everything that `write_report` writes; the same report gives the same bytes."""
    return {
        JSON: report.model_dump_json(indent=1) + "\n",
        JUNIT: junit(report),
        HTML: page.render(report),
        **{f"{name}.csv": _csv(rows) for name, rows in tables(report).items()},
    }


def read_report(path: str | os.PathLike[str]) -> Report:
    """A report.json, or the one in a folder. Raises ReportError."""
    file = Path(path)
    file = file / JSON if file.is_dir() else file
    try:
        if file.stat().st_size > _LARGEST:
            raise ReportError(f"{file} is too large to be a report")
        raw = strict_json.loads(file.read_bytes())
    except OSError as error:
        raise ReportError(
            f"{file} cannot be read: {error.strerror}", "give the folder that resq-validate wrote"
        ) from error
    except ValueError as error:
        raise ReportError(f"{file} is not JSON", "run resq-validate again") from error
    return _checked(raw, file)


def junit(report: Report) -> str:
    """JUnit XML: one test case per requirement; an unmet one is a failure."""
    failed = sum(not requirement.met for requirement in report.requirements)
    counts = {"tests": str(len(report.requirements)), "failures": str(failed), "errors": "0"}
    seconds = sum(campaign.seconds for campaign in report.campaigns)
    root = ElementTree.Element("testsuites", counts)
    suite = ElementTree.SubElement(
        root,
        "testsuite",
        {"name": clean(f"resq-validate {report.subject.name}"), **counts, "time": f"{seconds:.3f}"},
    )
    properties = ElementTree.SubElement(suite, "properties")
    for name, value in _properties(report):
        ElementTree.SubElement(properties, "property", {"name": name, "value": clean(value)})
    for requirement in report.requirements:
        case = ElementTree.SubElement(
            suite,
            "testcase",
            {"classname": "requirements", "name": requirement.expression, "time": "0"},
        )
        said = _measured(requirement.measured)
        if requirement.met:
            ElementTree.SubElement(case, "system-out").text = said
        else:
            ElementTree.SubElement(
                case, "failure", {"message": f"not met: {said}", "type": "requirement"}
            )
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def tables(report: Report) -> dict[str, list[Row]]:
    """The CSV tables: name -> rows, the first of them the header."""
    return {
        "figures": [
            ("figure", *_ENDS, "confidence", "method", "n"),
            *((k, *_ends(f), f.confidence, f.method, f.n) for k, f in report.figures.items()),
        ],
        "campaigns": _campaigns(report.campaigns),
        "layers": _vulnerabilities("layer", ((c, c.layers) for c in report.campaigns)),
        "bits": _vulnerabilities("bit", ((c, c.bits) for c in report.campaigns)),
        "cells": [
            ("fault", "on", "layer", "bit", "trials", "sdc1"),
            *(
                (c.fault, c.on, cell.layer, cell.bit, cell.trials, cell.sdc1)
                for c in report.campaigns
                for cell in c.cells
            ),
        ],
        "attacks": [
            (*_ATTACK, *(f"{share}_{end}" for share in ("robust", "success") for end in _ENDS)),
            *(
                (*(getattr(a, k) for k in _ATTACK), *_ends(a.robust), *_ends(a.success))
                for a in report.attacks
            ),
        ],
        "joint": _joint(report.joint),
        "corruptions": [
            ("corruption", "severity", *(f"accuracy_{end}" for end in _ENDS), "images"),
            *(
                (c.corruption, c.severity, *_ends(c.accuracy), c.accuracy.n)
                for c in report.corruptions
            ),
        ],
        "requirements": [
            (*_REQUIREMENT, *_VERDICT),
            *(
                tuple(getattr(r, k) for k in (*_REQUIREMENT, *_VERDICT))
                for r in report.requirements
            ),
        ],
    }


def _campaigns(campaigns: Iterable[Campaign]) -> list[Row]:
    plain = (*_CAMPAIGN, "seconds", "images_per_second")
    head = (*plain, *(f"{share}_{end}" for share in _SHARES for end in _ENDS))
    rows = [
        tuple(getattr(c, name) for name in plain)
        + tuple(value for share in _SHARES for value in _ends(getattr(c, share)))
        for c in campaigns
    ]
    return [head, *rows]


def _joint(found: Iterable[JointAttack]) -> list[Row]:
    plain = (
        "name",
        "attack",
        "norm",
        "eps",
        "fault",
        "trials",
        "images",
        "flips",
        "unreachable",
        "failed",
    )
    shares = ("clean", "unaware", "aware")
    rows: list[Row] = [(*plain, *(f"{share}_{end}" for share in shares for end in _ENDS))]
    for j in found:
        known = (_ends(f) if (f := getattr(j, share)) else ("", "", "") for share in shares)
        rows.append((*(getattr(j, key) for key in plain), *(end for ends in known for end in ends)))
    return rows


def _vulnerabilities(
    what: str, found: Iterable[tuple[Campaign, tuple[Vulnerability, ...]]]
) -> list[Row]:
    head = ("fault", "on", what, "locations", "trials", *(f"sdc1_{end}" for end in _ENDS))
    rows = [
        (c.fault, c.on, v.name, v.locations, v.trials, *_ends(v.sdc1))
        for c, vs in found
        for v in vs
    ]
    return [head, *rows]


def _properties(report: Report) -> list[tuple[str, str]]:
    settings = report.provenance.get("settings")
    seed = settings.get("seed", "") if isinstance(settings, dict) else ""
    return [
        ("model.int8.onnx sha256", report.subject.int8_sha256),
        ("manifest.json sha256", report.subject.manifest_sha256),
        ("backend", str(report.runner.get("backend", ""))),
        ("seed", str(seed)),
    ]


def _measured(figure: Figure | None) -> str:
    if figure is None:
        return "measured"
    return f"measured {words.both(figure)} at {figure.confidence:.0%} confidence"


def _ends(figure: Figure) -> tuple[float, float, float]:
    return figure.mean, figure.low, figure.high


def _csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def put(path: Path, content: str) -> None:
    """Write a text file in one step."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(content, encoding="utf-8", newline="\n", errors="replace")
    os.replace(part, path)


def _checked(raw: Any, file: Path) -> Report:
    try:
        return Report.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise ReportError(
            f"{file} is not a report this program reads: {where}: {first['msg']}",
            "run resq-validate again, or upgrade resq-deploy",
        ) from error
