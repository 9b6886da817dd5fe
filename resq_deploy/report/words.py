"""How figures, faults and attacks are put into words: one place, so that every face of a report says the same."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from resq_deploy.budget import format_eps
from resq_deploy.report.model import AttackResult, Campaign, Figure, JointAttack, Report

OUTCOMES = {
    "masked": "The logits are the same to the last bit: the fault left no trace.",
    "sdc1": "Silent data corruption: the answer (top-1 class) changed, and nothing said so.",
    "sdc5": "The class answered without the fault is no longer among the five best.",
    "critical": "A right answer became a wrong one.",
    "due": "Detectable, unrecoverable error: a logit is infinite or not a number.",
}
OUTCOME_NAMES = {
    "masked": "masked",
    "sdc1": "SDC-1",
    "sdc5": "SDC-5",
    "critical": "critical",
    "due": "DUE",
}
GLOSSARY = {
    "BER": "Bit error rate: the chance that any one bit of the weight memory is flipped.",
    "SEU": "Single-event upset: one random bit of the weight memory is flipped.",
    "MBU": "Multiple-bit upset: a few neighbouring bits are flipped at once.",
    "trial": "One draw of faults, and one run over all its images with these faults in memory.",
    "golden run": "The run without any fault that faulty runs are compared with.",
    "clean accuracy": "The share of unaltered images that the network classifies correctly.",
    "robust accuracy": "The share of images still classified correctly after an attacker altered them.",
    "eps": "The attacker's budget: how far each pixel (L-inf), or the image as a whole (L2), may move; "
    "pixels lie between 0 and 1.",
    "FGSM, PGD, APGD": "Attacks that follow the gradient of the network, from one step to a hundred; "
    "apgd-t tries one wrong class after the other. worst: each image under the strongest of all that ran.",
    "Square, HopSkipJump": "Attacks that only ask the network for answers, as anyone with the device can.",
    "twin": "A copy of the INT8 network that has gradients: attacks are crafted on it, and judged on the artifact.",
    "corruption": "What happens to images without an attacker: noise, blur, weather, compression; "
    "severity 1 is mild, 5 strong.",
    "interval": "Where the true figure lies, at the stated confidence, given how much was measured.",
    "bit 7": "The most significant bit of an INT8 weight, its sign; bit 0 is the least significant.",
}
NOT_MEASURED = "not measured"
_NORMS = {"linf": "L-inf", "l2": "L2"}
_FIXED_FAULTS = {
    "seu": "one random bit flipped",
    "sbu": "one random bit flipped",
    "byte": "one random byte replaced",
    "word": "one random 32-bit word replaced",
    "list": "the faults of a list",
    "stuck-at-0": "one random bit stuck at 0",
    "stuck-at-1": "one random bit stuck at 1",
}


def decimals(figure: Figure) -> int:
    """Digits after the point of a percentage that the width of the interval supports: 1 to 5."""
    half = (figure.high - figure.low) * 50
    return 1 if half <= 0 else min(max(1 - math.floor(math.log10(half)) - 1, 1), 5)


def percent(share: float, digits: int = 1) -> str:
    """A share as a percentage, `91.8%`; never rounded to 0% or 100% that it is not."""
    if share in (0, 1):
        return f"{share:.0%}"
    written = f"{share * 100:.{digits}f}%"
    if share > 0 and float(written[:-1]) == 0:
        return f"<{10**-digits:.{digits}f}%"
    if share < 1 and float(written[:-1]) == 100:
        return f">{100 - 10**-digits:.{digits}f}%"
    return written


def mean(figure: Figure) -> str:
    """`91.8%`, with as many digits as the interval supports, and as a small share needs not to look like none.

    `not measured` where nothing was counted.
    """
    if not figure.n:
        return NOT_MEASURED
    digits = decimals(figure)
    while 0 < round(figure.mean * 100, 5) < 0.5 * 10**-digits and digits < 5:
        digits += 1
    return percent(figure.mean, digits)


def interval(figure: Figure) -> str:
    """`90.1\u201393.2%`; an end that is exactly 0 or 100% has no digits; a dash where nothing was counted."""
    if not figure.n:
        return "\u2013"
    low, high = (_end(share, decimals(figure)) for share in (figure.low, figure.high))
    return f"{low}\u2013{high}%"


def _end(share: float, digits: int) -> str:
    return f"{share * 100:.0f}" if share in (0, 1) else f"{share * 100:.{digits}f}"


def both(figure: Figure) -> str:
    """`91.8% (90.1\u201393.2%)`; `not measured`."""
    return f"{mean(figure)} ({interval(figure)})" if figure.n else NOT_MEASURED


def points(difference: float) -> str:
    """A difference of two shares: `\u221218.4 points`."""
    return f"{difference * 100:+.1f} points".replace("-", "\u2212")


def rate(value: float) -> str:
    """A bit error rate as people write it: `1e-4`."""
    digits, _, exponent = (
        f"{value:.3g}".partition("e") if value >= 0.1 else f"{value:.2e}".partition("e")
    )
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return f"{digits}e{int(exponent)}" if exponent else digits


def count(value: int) -> str:
    """`12,345`."""
    return f"{value:,}"


def bit_error_rate(fault: str) -> float | None:
    """The rate in `ber:1e-4` or `ber=1e-4`; None for another fault model."""
    found = re.fullmatch(r"ber[:=]([0-9.eE+-]+)", fault)
    try:
        return float(found[1]) if found else None
    except ValueError:
        return None


def fault_name(fault: str) -> str:
    """A fault model's short name: `BER 1e-4`, `SEU`, `MBU of 4`."""
    kind, _, value = fault.partition(":")
    if (ber := bit_error_rate(fault)) is not None:
        return f"BER {rate(ber)}"
    if kind in ("seu", "sbu"):
        return kind.upper()
    return f"MBU of {value}" if kind == "mbu" and value else fault


def fault_words(fault: str) -> str:
    """What one trial of a fault model does to the weight memory."""
    kind, _, value = fault.partition(":")
    if (ber := bit_error_rate(fault)) is not None:
        return f"each bit flipped with a probability of {rate(ber)}"
    if kind == "mbu" and value:
        return f"{value} neighbouring bits flipped"
    if kind == "bits" and value:
        return f"{value} random bits flipped"
    if kind.startswith("stuck-at-") and value:
        return _stuck(kind[-1], value)
    return _FIXED_FAULTS.get(kind, f"fault model {fault}")


def _stuck(at: str, value: str) -> str:
    try:
        number = float(value)
    except ValueError:
        return f"bits stuck at {at}"
    if number < 1:
        return f"each bit stuck at {at} with a probability of {rate(number)}"
    return f"{number:g} random bits stuck at {at}"


def budget(norm: str, eps: float) -> str:
    """An attack's budget in pixels of [0, 1]: `L-inf 8/255`, `L2 0.5`."""
    return f"{_NORMS.get(norm, norm)} {format_eps(eps)}"


def budget_words(norm: str, eps: float) -> str:
    """What an attacker may do: `each pixel by 8/255 of its range`."""
    if norm == "linf":
        return f"each pixel by {format_eps(eps)} of its range"
    return f"an image by a length of {format_eps(eps)}"


def aware_name(attack: JointAttack) -> str:
    """Inputs that know the faults, as figures name them: `pgd,eps=8/255,aware`."""
    return f"{attack_name(attack)},aware"


def corruption_name(name: str) -> str:
    """`gaussian_noise` as people write it."""
    return name.replace("_", " ").replace("jpeg", "JPEG")


def attack_name(attack: AttackResult | JointAttack) -> str:
    """An attack as figures name it: `pgd,eps=8/255`, `apgd,eps=0.5,norm=l2`."""
    norm = "" if attack.norm == "linf" else f",norm={attack.norm}"
    return f"{attack.attack},eps={format_eps(attack.eps)}{norm}"


def golden_accuracy(campaign: Campaign) -> float | None:
    """Accuracy on a campaign's images without faults, where it was kept."""
    found = campaign.execution.get("golden_accuracy")
    return float(found) if isinstance(found, int | float) and 0 <= found <= 1 else None


def short(figure: str) -> str:
    """A figure's name for a narrow table: `pgd 8/255, BER 1e-2`; `known` where the attacker knows the faults."""
    head, *parts = figure.split("@")
    if not parts:
        return "clean" if head == "accuracy" else head
    attack = parts.pop(0) if head == "robust" else ""
    name, *options = attack.split(",")
    plain = [o.removeprefix("eps=").replace("norm=l2", "L2") for o in options if o != "aware"]
    known = "known " if "aware" in options else ""
    said = [" ".join([name, *plain])] if attack else []
    return ", ".join([*said, *(known + fault_name(fault) for fault in parts)])


def where_words(where: Mapping[str, Any]) -> str:
    """The part of the weight memory that faults were drawn from."""
    parts = []
    for key, value in where.items():
        if value in (None, [], ()):
            continue
        shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        parts.append(shown if key in ("where", "kinds") else f"{key} {shown}")
    return "; ".join(parts) or "all weight memory"


def campaign_name(campaign: Campaign) -> str:
    """`BER 1e-4`, or `BER 1e-4, on pgd,eps=8/255`."""
    name = fault_name(campaign.fault)
    return name if campaign.on == "clean" else f"{name}, on {campaign.on}"


def group_of(name: str) -> str:
    """What a figure is about: `clean`, `faults`, `attacks`, `both at once` or `corruptions`, from its name."""
    head, *parts = name.split("@")
    if parts and parts[0].startswith("corruption"):
        return "corruptions"
    if head == "robust":
        return "both at once" if len(parts) > 1 else "attacks"
    return "faults" if parts else "clean"


def verdict(report: Report) -> str:
    """The first line of every face."""
    total = len(report.requirements)
    failed = sum(not requirement.met for requirement in report.requirements)
    if total == 0:
        return "No requirement was set"
    if failed:
        return f"{failed} of {total} requirement{'s' * (total > 1)} not met"
    return "The requirement is met" if total == 1 else f"All {total} requirements are met"


def worst(report: Report) -> Campaign | None:
    """The campaign on unaltered images that cost most accuracy; None where none reached a bit."""
    clean = [c for c in report.campaigns if c.on == "clean" and c.accuracy.n]
    return min(clean, key=lambda c: c.accuracy.mean, default=None)


def findings(report: Report) -> list[str]:
    """What the figures say, in sentences for a reader who has not seen such a report before."""
    images = f"{count(report.accuracy.n)} images"
    said = [
        f"Without any fault or attack it classifies {both(report.accuracy)} of {images} correctly."
    ]
    if (stock := report.figures.get("agreement@stock")) is not None:
        said.append(
            f"An ordinary ONNX Runtime session on that machine gives the same answer on {both(stock)} of them."
        )
    said += _fault_findings(report)
    said += [
        f"Under the attack {attack.attack}, which may change {budget_words(attack.norm, attack.eps)}, "
        f"it still classifies {both(attack.robust)} correctly."
        for attack in sorted(report.attacks, key=lambda a: a.robust.mean)[:1]
    ]
    if (least := worst_of_both(report)) is not None:
        said.append(f"With both at once, {least[0]}, it classifies {both(least[1])} correctly.")
    return said + _natural_findings(report)


def worst_of_both(report: Report) -> tuple[str, Figure] | None:
    """The lowest accuracy with attack and faults together, and what they were; None where that was not run."""
    tried = [c for c in report.campaigns if c.on != "clean" and c.accuracy.n]
    found = [(campaign_name(c), c.accuracy) for c in tried]
    found += [
        (f"{fault_name(j.fault)} known to the attacker, on {attack_name(j)}", j.aware)
        for j in report.joint
    ]
    return min(found, key=lambda pair: pair[1].mean, default=None)


def _natural_findings(report: Report) -> list[str]:
    mean_of_all = report.figures.get("accuracy@corruptions")
    if not report.corruptions or mean_of_all is None:
        return []
    least = min(report.corruptions, key=lambda c: c.accuracy.mean)
    return [
        f"On corrupted images (noise, blur, weather, compression) it classifies {both(mean_of_all)} correctly "
        f"on average, and least with {corruption_name(least.corruption)} at severity {least.severity}: "
        f"{both(least.accuracy)}."
    ]


def _fault_findings(report: Report) -> list[str]:
    said = []
    if (least := worst(report)) is not None:
        golden = golden_accuracy(least)
        start = report.accuracy.mean if golden is None else golden
        change = points(least.accuracy.mean - start)
        said.append(
            f"With {fault_words(least.fault)} it classifies {both(least.accuracy)} correctly, "
            f"{change} against the same images without faults."
        )
    for campaign in report.campaigns:
        if not campaign.accuracy.n:
            said.append(
                f"{campaign_name(campaign)}: no trial could reach the memory; nothing was measured."
            )
        elif campaign.on == "clean" and campaign.fault in ("seu", "sbu"):
            said.append(
                f"One flipped bit changes the answer for {both(campaign.sdc1)} of the images."
            )
            said += _weakest(campaign)
    return said


def _weakest(campaign: Campaign) -> list[str]:
    """Layers and bit positions whose interval lies above the mean of all: others may be chance."""
    said = []
    for kind, found in (("layer", campaign.layers), ("bit position", campaign.bits)):
        above = [v for v in found if v.trials and v.sdc1.low > campaign.sdc1.mean]
        if above:
            first = max(above, key=lambda v: v.sdc1.mean)
            said.append(f"The most sensitive {kind} is {first.name}: {both(first.sdc1)}.")
    if campaign.layers and not said:
        said.append("No layer and no bit position stands out beyond its interval.")
    return said
