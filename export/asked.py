"""What an export is asked for, and whether that can be had: looked at before any long work begins."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from resq_deploy.budget import parse_eps
from resq_deploy.errors import AttackError, DataError, ModelError
from resq_deploy.export import graph, halves
from resq_deploy.export.craft import white_box
from resq_deploy.export.design import LEAST, Design
from resq_deploy.export.dialect import RULES
from resq_deploy.export.formats import is_quantized, path_of
from resq_deploy.export.joint import TRIALS, FaultyAttack


def check_attacks(
    attacks: Sequence[str], eps: float | str, faulty: Sequence[FaultyAttack], trials: int
) -> None:
    """Raise AttackError for an attack or a budget that does not exist, or for `trials` of no faulty attack."""
    for name in attacks:
        white_box(name)
    parse_eps(eps)
    if trials != TRIALS and not faulty:
        raise AttackError(
            "--faulty-trials is for --attack-faulty", "name one: --attack-faulty 1e-3"
        )


def check_precision(high_precision: str, opset: int | None) -> None:
    """Raise ModelError for an opset that torch does not write, or that has no float16 scales where they are wanted."""
    wanted = graph.checked_opset(opset)
    if high_precision == "fp16":
        halves.check_opset(wanted)


def check_rules(rules: str, taken: bool, targets: Sequence[str], high_precision: str) -> None:
    """Raise ModelError for rules that do not exist, or for ONNX Runtime's where they cannot be had."""
    if rules not in RULES:
        raise ModelError(f"--rules {rules}", f"one of: {', '.join(RULES)}")
    if rules != "onnxruntime":
        return
    engines = [target for target in targets if target != "onnx"]
    if taken:
        said, cure = "is for a float network, and this file is quantized already", "leave it out"
    elif engines:
        said = "makes unsigned codes, which no engine takes"
        cure = f"leave out --target {engines[0]}, or export twice"
    elif high_precision != "fp32":
        said = "is for byte kernels, which take float32 scales only"
        cure = "leave out --high-precision"
    else:
        return
    raise ModelError(f"--rules onnxruntime {said}", cure)


def check_classes(classes: Sequence[str]) -> None:
    """Raise DataError where there is nothing to tell apart."""
    if len(classes) < 2:
        raise DataError(
            f"one class only: {', '.join(map(str, classes))}",
            "top-1 needs two at least; give a network with one output two, [0, x]",
        )


def check_design(design: Design, adjust: bool) -> None:
    """Raise DataError for a design that is not the usual one where stage III is left out."""
    usual = Design()
    if adjust or design == usual:
        return
    flags = {"ber": "design-ber", "redundancy": "redundancy", "effort": "effort"}
    given = next(f for name, f in flags.items() if getattr(design, name) != getattr(usual, name))
    raise DataError(
        f"--{given} is for stage III, which --no-adjust leaves out", "leave out one of them"
    )


def check_taken(
    file: Path,
    taken: bool,
    adjust: bool,
    reference: str | os.PathLike[str] | None,
    design: Design,
    high_precision: str,
    opset: int | None,
) -> None:
    """Raise ModelError for requests that do not fit a file that is quantized already (`taken`), or one that is not."""
    if reference is not None and not taken:
        raise ModelError(
            f"--reference is for a file that is quantized already, and {file} is not",
            "leave it out: the network is its own reference",
        )
    if reference is not None and is_quantized(path_of(reference)):
        raise ModelError(
            f"--reference {reference} is quantized itself", "give the float network it was made of"
        )
    if taken and (high_precision != "fp32" or opset is not None):
        raise ModelError(
            f"{file} is quantized already, and keeps its opset and what is float in it",
            "leave out --high-precision and --opset",
        )
    if taken and not adjust and design != Design():
        raise ModelError(
            f"{file} is quantized already, and taken as it is",
            "--adjust lets stage III change its weights; or leave out --design-ber, --redundancy and --effort",
        )


def check_calibration(images: int, adjust: bool) -> None:
    """Raise DataError for fewer calibration images than stage III needs."""
    if adjust and images < LEAST:
        raise DataError(
            f"{images} calibration images, and stage III needs at least {LEAST}",
            "give more --calib-samples, or --no-adjust",
        )
