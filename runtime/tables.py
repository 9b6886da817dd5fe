"""What `resq` prints: tables that fit 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from resq_deploy.bundle import Bundle
from resq_deploy.metrics import unpacked
from resq_deploy.report import words
from resq_deploy.report.model import Figure
from resq_deploy.runtime.compare import CAUTION, Comparison, Step, Subject
from resq_deploy.runtime.contents import Check, Layer
from resq_deploy.runtime.differences import EFFECTS, Change, signed
from resq_deploy.runtime.journal import Replay
from resq_deploy.runtime.plan import PlanMap

_RULES = {
    "tensorrt": "by TensorRT's rules",
    "onnxruntime": "by ONNX Runtime's rules: no engine takes them",
}
_DASH = "\u2013"
_ACROSS = 5  # bundles beside each other
_NAMES = 55  # characters for their names, side by side
_WIDTH = 79


def console() -> Console:
    """Standard output, without highlighting."""
    return Console(highlight=False)


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], left: int = 1) -> Table:
    """A plain table; the first `left` columns are text and may wrap, the others are figures."""
    drawn = Table(box=None, pad_edge=False, header_style="dim")
    for index, name in enumerate(head):
        text = index < left
        drawn.add_column(
            name,
            justify="left" if text else "right",
            overflow="fold",
            no_wrap=not text,
        )
    for row in rows:
        drawn.add_row(*(Text(str(cell)) for cell in row))
    return drawn


def contents(bundle: Bundle, found: Sequence[Layer], shown: int, measured: bool) -> Iterable[Any]:
    """A bundle in short, and its most sensitive layers."""
    manifest = bundle.manifest
    metrics = manifest.metrics
    size = "x".join(map(str, manifest.input.shape))
    yield Text(
        f"{manifest.name}: {manifest.arch}, input {size}, {len(manifest.classes)} classes", "bold"
    )
    yield Text(
        f"accuracy on {metrics.samples:,} images: {metrics.exact} {metrics.fp32_accuracy:.2%}, "
        f"INT8 {metrics.int8_accuracy:.2%}, same answer {metrics.agreement:.2%}"
    )
    codes = manifest.quantization
    by = f", {_RULES[codes.rules]}" if codes.rules else ""
    fit = ", no two products saturate without VNNI" if codes.saturates is False else ""
    yield Text(f"codes: {codes.scheme}{by}{fit}")
    yield Text(_adjusted(bundle))
    for kind, names in (("attacks", manifest.attacks), ("engines", manifest.engines)):
        yield Text(f"{kind}: {', '.join(names) or 'none'}")
    yield Text("")
    yield layer_table(found[:shown], measured)
    if len(found) > shown:
        yield Text(f"... and {len(found) - shown} more: --all", "dim")
    for op in manifest.quantization.float_ops:
        yield Text(f"in floating point: {op.node} ({op.op}), {op.reason}")


def layer_table(found: Iterable[Layer], measured: bool) -> Table:
    """Layers with their sizes and sensitivities."""
    head = ["layer", "op", "shape", "SQNR dB", "sign flip"]
    rows: list[list[str]] = []
    for layer in found:
        row = [layer.layer, layer.op, "x".join(map(str, layer.shape))]
        row += [f"{layer.sqnr_db:.1f}" if layer.sqnr_db is not None else _DASH]
        row += [f"{layer.sign_flip:.3f}"]
        if measured:
            row += [words.percent(layer.sdc1, 3) if layer.sdc1 is not None else _DASH]
        rows.append(row)
    return table([*head, "SDC-1"] if measured else head, rows, left=3)


def scales(bundle: Bundle) -> Iterable[Any]:
    """Every scale: of weights by their range over channels, of activations with the method that chose it."""
    quantization = bundle.manifest.quantization
    weights = [
        (name, len(w.scale), f"{min(w.scale):.4g}", f"{max(w.scale):.4g}")
        for name, w in quantization.weights.items()
    ]
    yield table(("weights", "scales", "least", "largest"), weights)
    yield Text("")
    activations = [
        (name, a.method, *(f"{v:.4g}" for v in (a.low, a.high, a.scale)), _zero(a.zero_point))
        for name, a in quantization.activations.items()
    ]
    yield table(("activation", "method", "low", "high", "scale", "zero"), activations)


def _zero(point: int | None) -> str:
    return _DASH if point is None else str(point)


def check(path: Path, found: Check) -> Iterable[Any]:
    """What `resq verify` has to say."""
    yield Text(
        f"{path}: {found.files} files, {words.count(found.size)} bytes, as the manifest says"
    )
    yield Text(f"signature: {found.signature}" + (f", key {found.key}" if found.key else ""))
    for name, coverage in found.engines.items():
        yield Text(f"engine {name}: {coverage:.2%} of its weights located")
    for name in found.unlisted:
        yield Text(f"not in the manifest, and never read: {name}")


def plan(name: str, found: PlanMap) -> Iterable[Any]:
    """Where a plan keeps each tensor."""
    yield Text(
        f"{name}: {words.count(found.size)} bytes, {found.coverage:.2%} of the weights located",
        "bold",
    )
    rows = [(n, p.layout, p.offset, words.count(p.located)) for n, p in found.tensors.items()]
    yield table(("tensor", "layout", "offset", "located"), rows, left=2)
    for tensor, lost in found.unlocated.items():
        yield Text(f"not located: {tensor}, {lost.reason}")


def replayed(name: str, trial: int, found: Replay) -> Iterable[Any]:
    """One trial, then and now."""
    same = "the same bits and bit-identical logits" if found.same else "NOT the same"
    yield Text(f"{name}, trial {trial}: {same}", "bold" if found.same else "bold red")
    rows = [
        (key, getattr(found.before, key), getattr(found.now, key))
        for key in ("status", "flips", "flips_sha", "logits_sha", "correct", "sdc1", "due")
    ]
    yield table(("", "then", "now"), rows)
    for fault in found.faults:
        yield Text(f"  {fault}")


def replayed_json(found: Replay) -> dict[str, Any]:
    """A replay as JSON types; of `changed` the images themselves, counted from 0 among those of the campaign."""
    shown = asdict(found)
    for row in (shown["before"], shown["now"]):
        row["changed"] = np.flatnonzero(unpacked(row["changed"], 8 * len(row["changed"]))).tolist()
    return {"same": found.same, **shown}


def compared(found: Comparison) -> Iterable[Any]:
    """The matrix, bundles across, a few at a time; then each step, and the verdict."""
    for start in range(0, len(found.rows), _ACROSS):
        yield _matrix(found, found.rows[start : start + _ACROSS])
        yield Text("")
    for step in found.steps:
        yield from _step(step)
    yield Text("")
    yield from (Text(line, "bold") for line in textwrap.wrap(found.verdict, _WIDTH))
    for line in textwrap.wrap(CAUTION, _WIDTH):
        yield Text(line, "dim")


def _matrix(found: Comparison, part: Sequence[Subject]) -> Table:
    """A row for each figure: the mean, and its interval below it."""
    drawn = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    drawn.add_column("", overflow="fold", max_width=25)
    most = _NAMES // len(part) - 1
    for subject in part:
        drawn.add_column(Text(subject.name[-most:]), justify="right", no_wrap=True)
    drawn.add_row("stages", *(s.label for s in part), end_section=True)
    for name in found.columns:
        cells = [_ends(s.figures[name]) if name in s.figures else Text(_DASH) for s in part]
        drawn.add_row(Text(words.short(name)), *cells)
    return drawn


def _ends(figure: Figure) -> Text:
    low, high = (f"{share * 100:.1f}" for share in (figure.low, figure.high))
    shown = Text(f"{figure.mean * 100:.1f}%\n")
    return shown.append(f"{low}\u2013{high}", "dim")


def _step(step: Step) -> Iterable[Text]:
    """What one step did to either threat."""
    added = "+".join(step.added) or "no stage"
    meant = f", against {' and '.join(step.against)}" if step.against else ""
    yield Text(f"{step.before} -> {step.after} (adds {added}{meant})", "bold")
    for threat, change in step.changes.items():
        low, high = (signed(end) for end in (change.low, change.high))
        yield Text(
            f"  {threat:<8}{_figure(change):<25}{signed(change.difference):>6} points "
            f"({low} to {high}): {EFFECTS[change.effect]}"
        )
    for line in textwrap.wrap(_paired(step.changes), _WIDTH - 2):
        yield Text(f"  {line}", "dim")


def _paired(changes: Mapping[str, Change]) -> str:
    """Which differences were taken image by image, on how many images, and why others were not."""
    on: dict[int, list[str]] = {}
    why: dict[str, list[str]] = {}
    for threat, change in changes.items():
        if change.paired_on:
            on.setdefault(change.paired_on, []).append(threat)
        else:
            why.setdefault(change.unpaired, []).append(threat)
    counts = [f"{words.count(n)} ({', '.join(each)})" for n, each in on.items()]
    said = [f"paired on {', '.join(counts)}".replace(" (", " images (", 1)] if on else []
    reasons = ", ".join(f"{', '.join(each)} ({reason})" for reason, each in why.items())
    return "; ".join([*said, f"not paired: {reasons}"] if why else said)


def _figure(change: Change) -> str:
    return "" if change.figure == "accuracy" else words.short(change.figure)


def comparison_json(found: Comparison) -> dict[str, Any]:
    """A comparison as JSON types."""
    return {
        "bundles": [
            {
                "name": s.name,
                "stages": list(s.stages),
                "figures": {n: f.model_dump(mode="json") for n, f in s.figures.items()},
            }
            for s in found.rows
        ],
        "fault_figure": found.fault_figure,
        "attack_figure": found.attack_figure,
        "steps": [asdict(step) for step in found.steps],
        "verdict": found.verdict,
    }


def _adjusted(bundle: Bundle) -> str:
    adjustment = bundle.manifest.adjustment
    if not adjustment.applied:
        return f"stage III: not applied{': ' + adjustment.reason if adjustment.reason else ''}"
    ber = (
        f" for a bit error rate of {words.rate(adjustment.design_ber)}"
        if adjustment.design_ber
        else ""
    )
    return f"stage III: {len(adjustment.steps)} steps{ber}"
