"""The tables of the export benchmark as a page of the documentation. Part of export.py."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from export_material import Setup

Figures = Mapping[str, Any]


def page(found: Mapping[str, Figures], speeds: Mapping[str, Figures], setup: Setup) -> str:
    """docs/export-results.md: accuracy, flips, attacks, speed by what multiplies bytes; every figure as measured."""
    lines = [
        "# Export: results",
        "",
        f"Written by `{command()}`; no figure is typed by hand.",
        "",
        f"Data: {setup.data}; {setup.calibration} calibration images, as many for every method.",
        "Flips are drawn by the same seeds for all graphs.",
        "",
        *amounts(found, setup),
        "",
        "Percent; intervals are 95%, Student's t over trials. `plain`: INT8 without stage III; `design p`: with it.",
        "",
        "## Accuracy and agreement with FP32",
        "",
        "| | FP32 | quantize_static | NNCF | plain | design |"
        " agreement: static, NNCF, plain, design | TensorRT-RTX builds |",
        "| --- " * 8 + "|",
        *(accuracy_row(arch, f) for arch, f in found.items()),
        "",
        f"`quantize_static`: the better of MinMax and entropy ranges. `design`: {setup.design[0]:g}.",
        "",
        "Points above the others' accuracy, image by image: where an interval holds 0, neither is shown to be better.",
        "",
        "| | above FP32 | above quantize_static | above NNCF |",
        "| --- " * 4 + "|",
        *ahead_rows(found),
        *modelopt_lines(found),
        "",
        "## Under attack",
        "",
        "White-box PGD-20, L-inf, 8/255, through each graph itself; points above FP32's accuracy, image by image.",
        "An interval without width says that no image differed, not that none could.",
        "",
        "| | FP32 | plain | design | plain above FP32 | design above FP32 |",
        "| --- " * 6 + "|",
        *(attack_row(arch, f) for arch, f in found.items()),
        "",
        "## Under bit flips",
        "",
        "| | FP32 without flips | INT8 | BER 1e-3 | 3e-3 | 1e-2 |",
        "| --- " * 6 + "|",
        *(row for arch, f in found.items() for row in flip_rows(arch, f)),
        "",
        "Points above plain INT8, trial by trial; and as a share of what plain INT8 loses, where it loses any.",
        "",
        "| | | at BER 1e-3 | 3e-3 | 1e-2 | of the loss at 1e-3 | 3e-3 | 1e-2 |",
        "| --- " * 8 + "|",
        *(row for arch, f in found.items() for row in gain_rows(arch, f)),
    ]  # fmt: skip
    lines += ["", "## The design BER on all test images", "", *round_lines(found)]
    lines += ["", "## Other quantizers' files under bit flips", "", *peer_lines(found)]
    if speeds:
        lines += ["", "## Time", "", *speed_lines(speeds)]
    return "\n".join(lines) + "\n"


def amounts(found: Mapping[str, Figures], setup: Setup) -> list[str]:
    """How many images and trials each network was measured with."""
    alike: dict[Setup, list[str]] = {}
    for arch in found:
        alike.setdefault(setup.of(arch), []).append(arch)
    lines = []
    for s, archs in alike.items():
        trials = ", ".join(f"{s.trials_at(p)} trials at BER {p:g}" for p in (1e-3, 3e-3, 1e-2))
        when = dict.fromkeys(day for arch in archs for day in found[arch]["measured"])
        lines += [
            f"* {', '.join(archs)}: {s.test:,} test images, {s.faulty:,} of them under flips",
            f"  ({trials}), {s.attacked:,} under attack; measured {', '.join(when)}.",
        ]
    return lines


def accuracy_row(arch: str, f: Figures) -> str:
    """One network's accuracies."""
    agrees = f["agreements"]
    static = max(f["quantize_static_by_method"], key=f["quantize_static_by_method"].get)
    names = (static, "nncf", "plain", "int8")
    cells = [
        arch, *(percent(f[k]) for k in ("fp32", "quantize_static", "nncf", "int8_plain", "int8")),
        ", ".join(percent(agrees[name]) for name in names),
        f["tensorrt_rtx"],
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def ahead_rows(found: Mapping[str, Figures]) -> list[str]:
    """How accuracy compares with others': one line for each network, and their mean."""
    names = ("fp32", "quantize_static", "nncf")
    rows = [[arch, *(spread(f["ahead_of"][n], 2) for n in names)] for arch, f in found.items()]
    means = []
    for name in names:
        all_of = [f["ahead_of"][name] for f in found.values()]
        mean = math.fsum(m for m, _, _ in all_of) / len(all_of)
        half = math.hypot(*(high - m for m, _, high in all_of)) / len(all_of)
        means.append(spread((mean, mean - half, mean + half), 2))
    return ["| " + " | ".join(row) + " |" for row in [*rows, ["mean", *means]]]


def attack_row(arch: str, f: Figures) -> str:
    """One network's accuracies under attack."""
    shares = [percent(f[name]) for name in ("pgd_fp32", "pgd_int8_plain", "pgd_int8")]
    above = [spread(f["pgd_ahead_of_fp32"][name], 2) for name in ("plain", "int8")]
    return "| " + " | ".join([arch, *shares, *above]) + " |"


def flip_rows(arch: str, f: Figures) -> list[str]:
    """Accuracies: one line for each graph of a network."""
    rows = []
    for name in dict.fromkeys(name for name, *_ in f["flips"]):
        cells = [(m, low, high) for n, _, m, low, high in f["flips"] if n == name]
        shown = [f"{percent(m)} [{percent(low)}, {percent(high)}]" for m, low, high in cells]
        exact = percent(f["fp32_of_flipped"]) if name == "plain" else ""
        rows.append("| " + " | ".join([arch, exact, name, *shown]) + " |")
    return rows


def gain_rows(arch: str, f: Figures) -> list[str]:
    """What stage III gains: one line for each design BER."""
    shares = {(name, ber): f"{spread(v, 0)}%" for name, ber, *v in f["recovered"]}
    rows = []
    for name in dict.fromkeys(name for name, *_ in f["gains"]):
        gained = {ber: spread(v, 2) for n, ber, *v in f["gains"] if n == name}
        back = [shares.get((name, ber), "") for ber in gained]
        rows.append("| " + " | ".join([arch, name, *gained.values(), *back]) + " |")
    return rows


def round_lines(found: Mapping[str, Figures]) -> list[str]:
    """What the design BER costs on all test images, and how much of it stage III takes back."""
    lines = [
        "A loss of a tenth of a point is one of 1,000 images. Here the images of a trial go round all test images: its",
        "accuracy is that of all of them without flips, plus the change that its flips make on its own. Points lost",
        "to FP32; share of them that stage III takes back (Fieller's interval; none where no loss can be told from 0);",
        "and what flips alone take, from the accuracy that the same graph has without them.",
        "",
        "| | BER | trials x images | plain loses | with stage III | gained | of the loss | flips alone |",
        "| --- " * 8 + "|",
    ]
    for arch, f in found.items():
        r = f["rounds"]
        lost = [spread(r[name], 2) for name in ("lost", "lost_with_stage_iii", "gained")]
        share = f"{spread(r['recovered'], 0)}%" if r["recovered"] else ""
        alone = [
            100 * (r[name][0] - f["fp32"] + f[own])
            for name, own in (("lost", "int8_plain"), ("lost_with_stage_iii", "int8"))
        ]
        trials = f"{r['trials']} x {r['images']:,}"
        cells = [arch, f"{r['ber']:g}", trials, *lost, share, "{:.2f}, {:.2f}".format(*alone)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def peer_lines(found: Mapping[str, Figures]) -> list[str]:
    """How files of others bear the same rates, and what ours with stage III is above them."""
    head = "| | file | BER 1e-3 | 3e-3 | 1e-2 | design above it: 1e-3 | 3e-3 | 1e-2 |"
    lines = [
        "What `quantize_static` (the better of its two), NNCF and ModelOpt wrote, taken in as it is (`resq-export",
        "FILE.onnx`): the same images, rates and numbers of trials. Each file has faults of its own, so the interval",
        "of a difference is the root of the sum of squares of both. It is about faults on these images: a tenth of a",
        "point is one of 1,000 images, which two files may round differently without any fault. Faults are in INT8",
        "weights; ModelOpt leaves the classifier of a convolutional network in float, and it is not hit here.",
        "",
        head,
        "| --- " * 8 + "|",
    ]
    for arch, f in found.items():
        above, flips = above_peers(f), peer_flips(f)
        for name in dict.fromkeys(name for name, *_ in flips):
            cells = {ber: v for n, ber, *v in flips if n == name}
            shown = [
                f"{percent(m)} [{percent(low)}, {percent(high)}]" for m, low, high in cells.values()
            ]
            row = [arch, name, *shown, *(spread(above[name, ber], 2) for ber in cells)]
            lines.append("| " + " | ".join(row) + " |")
    return lines


def peer_flips(f: Figures) -> list[tuple[str, float, float, float, float]]:
    """(file, BER, mean, low, high) of all that was measured of others."""
    return [*f["peer_flips"], *f.get("modelopt_flips", ())]


def modelopt_lines(found: Mapping[str, Figures]) -> list[str]:
    """Accuracy of ModelOpt's files, of the networks that were measured."""
    rows = {arch: f for arch, f in found.items() if "modelopt" in f}
    if not rows:
        return []
    versions = ", ".join(dict.fromkeys(f["modelopt_version"] for f in rows.values()))
    return [
        "",
        f"ModelOpt {versions} on the same calibration images, its defaults, what stays float in float32:",
        "",
        "| | ModelOpt | agreement with FP32 | above FP32 | design above FP32 |",
        "| --- " * 5 + "|",
        *(
            f"| {arch} | {percent(f['modelopt'])} | {percent(f['modelopt_agreement'])}"
            f" | {spread(f['modelopt_ahead_of_fp32'], 2)} | {spread(f['ahead_of']['fp32'], 2)} |"
            for arch, f in rows.items()
        ),
    ]


def above_peers(f: Figures) -> dict[tuple[str, float], tuple[float, float, float]]:
    """(file, BER) -> how far ours, of the first design BER, is above it: mean, low and high."""
    name = next(name for name, *_ in f["flips"] if name != "plain")
    mine = {ber: (mean, high - mean) for n, ber, mean, _, high in f["flips"] if n == name}
    found = {}
    for peer, ber, mean, _, high in peer_flips(f):
        gap, half = mine[ber][0] - mean, math.hypot(mine[ber][1], high - mean)
        found[peer, ber] = gap, gap - half, gap + half
    return found


def spread(shares: Sequence[float], digits: int) -> str:
    """Mean, low and high in hundredths: 60 [33, 87]"""
    mean, low, high = (f"{100 * share:+.{digits}f}" for share in shares)
    return f"{mean} [{low}, {high}]"


def speed_lines(speeds: Mapping[str, Figures]) -> list[str]:
    """Images/s and seconds of an export, a column for each kind of byte products."""
    timed = list(speeds.values())
    rates = [
        [who, *(f"{s['images_per_s'][who]:.0f}" for s in timed)] for who in timed[0]["images_per_s"]
    ]
    shares = {
        "ours / quantize_static S8 in ONNX Runtime": ("speed_vs_ort_s8", "{:.2f}"),
        "ours / our file in OpenVINO": ("speed_vs_openvino", "{:.2f}"),
        "export, seconds": ("plain_s", "{:.1f}"),
        "... / quantize_static with entropy ranges": ("time_vs_quantize_static", "{:.2f}"),
        "... peak memory, MiB": ("peak_plain_mib", "{:.0f}"),
        "export with stage III, seconds": ("adjusted_s", "{:.0f}"),
        "... peak memory, MiB ": ("peak_mib", "{:.0f}"),
    }
    rows = rates + [
        [name, *(form.format(s[key]) for s in timed)] for name, (key, form) in shares.items()
    ]
    return [
        f"{timed[0]['speed_arch']}, images/s in batches of 64, by what the CPU multiplies bytes with.",
        "VNNI of a CPU with AMX is what it does where AMX is refused (`benchmarks/no_amx.py`).",
        "An export is calibration and quantization.",
        "",
        *(f"* {kind}: measured {s['measured']}, {threads(s)}." for kind, s in speeds.items()),
        "",
        f"| | {' | '.join(speeds)} |",
        "| --- |" + " ---: |" * len(timed),
        *("| " + " | ".join(map(str.strip, row)) + " |" for row in rows),
    ]


def threads(speed: Figures) -> str:
    """one thread"""
    return "one thread" if speed["threads"] == 1 else f"{speed['threads']} threads"


def percent(share: float) -> str:
    """90.15"""
    return f"{100 * share:.2f}"


def command() -> str:
    """The command line without the places of this machine."""
    kept, skip = [], False
    for word in sys.argv[1:]:
        local = word.partition("=")[0] in ("--checkpoints", "--results", "--page", "--threads")
        if not local and not skip:
            kept.append(shlex.quote(word))
        skip = local and "=" not in word
    return " ".join(["python benchmarks/export.py", *kept])
