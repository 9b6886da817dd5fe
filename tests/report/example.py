"""A synthetic report: every figure comes from a formula, none from a network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from resq_deploy import requirements
from resq_deploy.report.by_image import ByImage
from resq_deploy.report.model import (
    AttackResult,
    Campaign,
    Cell,
    Corruption,
    Figure,
    JointAttack,
    Report,
    Subject,
    Vulnerability,
)

LAYERS = ("conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2", "fc")
ATTACKS = ("fgsm,eps=8/255", "pgd,eps=8/255")
DEMANDS = ("accuracy >= 90%", "accuracy@ber=1e-4 >= 0.85", "low(robust@pgd,eps=8/255) >= 40%")


def figure(mean: float, n: int = 1000, half: float | None = None) -> Figure:
    """A share with a made-up interval."""
    half = 1.96 * math.sqrt(max(mean * (1 - mean), 1e-6) / n) if half is None else half
    return Figure(
        mean=mean,
        low=max(mean - half, 0.0),
        high=min(mean + half, 1.0),
        confidence=0.95,
        method="wilson",
        n=n,
    )


def report(demands: tuple[str, ...] = DEMANDS, **changes: Any) -> Report:
    """The whole example; `changes` replace fields of it."""
    campaigns = tuple(
        campaign(fault, on)
        for on in ("clean", *ATTACKS)
        for fault in ("seu", "mbu:4", "ber=1e-5", "ber=1e-4", "ber=1e-3", "ber=1e-2")
    )
    figures = {"accuracy": figure(0.92)}
    for run in campaigns:
        name = run.fault
        base = "accuracy" if run.on == "clean" else f"robust@{run.on}"
        figures[f"{base}@{name}"] = run.accuracy
        if run.on == "clean":
            figures[f"sdc1@{name}"] = run.sdc1
    attacks = tuple(attack(name) for name in ATTACKS)
    figures |= {f"robust@{a.name}": a.robust for a in attacks}
    figures |= {f"robust@{ATTACKS[1]},aware@ber=1e-2": joint().aware}
    figures |= _means(corruptions())
    fields: dict[str, Any] = {
        "subject": subject(),
        "runner": {"backend": "ort", "version": "1.31.0", "threads": 2, "injection": "prepacked"},
        "data": {"source": "the bundle's eval.npz", "images": 1000, "sha256": "d" * 64},
        "accuracy": figure(0.92),
        "campaigns": campaigns,
        "attacks": attacks,
        "joint": (joint(),),
        "corruptions": corruptions(),
        "figures": figures,
        "by_image": {} if "figures" in changes else by_image(),
        "requirements": requirements.judge(requirements.parse_all(demands), figures),
        "not_covered": (
            "3 layers stay in floating point: conv1, fc, layer2.0.shortcut",
            "TensorRT: this validation ran on ONNX Runtime only",
        ),
        "warnings": ("synthetic figures: no network was run",),
        "provenance": {
            "command": ["resq-validate", "example.resq", "--require", "accuracy >= 90%"],
            "time": "2030-01-01T00:00:00Z",
            "versions": {"python": "3.11.2", "onnxruntime": "1.31.0", "numpy": "2.4.0"},
            "settings": {"samples": 256, "margin": 0.01, "seed": 0},
        },
    }
    return Report(**(fields | changes))


def by_image() -> dict[str, ByImage]:
    """The first 920 of 1,000 images are right without faults."""
    return {"accuracy": ByImage.of("d" * 64, np.arange(1000) < 920)}


def subject() -> Subject:
    """An artifact that does not exist."""
    return Subject(
        name="example",
        arch="resnet8",
        int8_sha256="a" * 64,
        manifest_sha256="b" * 64,
        schema_version=1,
        input_shape=(1, 28, 28),
        classes=10,
        weights=77_360,
        weight_bits=618_880,
    )


def campaign(fault: str, on: str) -> Campaign:
    """Accuracy falls with the rate, and is lower under an attack."""
    rate = float(fault.partition("=")[2]) if fault.startswith("ber") else 2e-6
    start = {"clean": 0.92, ATTACKS[0]: 0.55, ATTACKS[1]: 0.45}[on]
    loss = min(rate * 20, 0.6)
    accuracy = figure(start * (1 - loss), 25_600, 0.004 + loss / 30)
    sdc = figure(min(loss + 0.0008, 1.0), 25_600)
    single = fault in ("seu", "mbu:4")
    return Campaign(
        fault=fault,
        where={"where": ["weights"]},
        on=on,
        locations=618_880,
        trials=100,
        images=256,
        flips=max(round(rate * 618_880 * 100), 100),
        accuracy=accuracy,
        accuracy_quantiles={
            "0.05": max(accuracy.mean - 0.01 - loss / 4, 0.0),
            "0.5": accuracy.mean,
            "0.95": min(accuracy.mean + 0.008, 1.0),
        },
        masked=figure(0.4 * (1 - loss), 25_600),
        sdc1=sdc,
        sdc5=figure(sdc.mean / 8, 25_600),
        critical=figure(sdc.mean * 0.8, 25_600),
        due=figure(0.0, 25_600, 0.0001),
        layers=_layers() if single else (),
        bits=_bits() if single else (),
        cells=_cells() if single else (),
        stopped="margin reached",
        seconds=12.5,
        images_per_second=2048.0,
        execution={"workers": 2, "engine": "suffix", "golden_accuracy": start + 0.001},
    )


def attack(name: str) -> AttackResult:
    """What is left after an attack."""
    kind = name.partition(",")[0]
    robust = 0.55 if kind == "fgsm" else 0.45
    return AttackResult(
        name=name,
        attack=kind,
        norm="linf",
        eps=8 / 255,
        crafted_through="twin",
        robust=figure(robust),
        success=figure(1 - robust / 0.92, 920),
        parameters={"steps": 20, "restarts": 2} if kind == "pgd" else {},
        warnings=("the loss did not rise for 3 images",) if kind == "pgd" else (),
    )


def joint() -> JointAttack:
    """One who knows the faults does more."""
    return JointAttack(
        name="pgd@ber=1e-2",
        attack="pgd",
        norm="linf",
        eps=8 / 255,
        crafted_through="twin",
        fault="ber=1e-2",
        where={"where": ["weights"]},
        trials=8,
        images=128,
        flips=49_510,
        clean=figure(0.74),
        unaware=figure(0.46, 1024),
        aware=figure(0.31, 1024),
        parameters={"steps": 20},
    )


def corruptions() -> tuple[Corruption, ...]:
    """Harder with severity, and more for one than for the other; one cell was not run."""
    return tuple(
        Corruption(
            corruption=name,
            severity=severity,
            accuracy=figure(0.92 - 0.03 * severity * (i + 1), 256),
        )
        for i, name in enumerate(("gaussian_noise", "fog", "elastic_transform", "jpeg_compression"))
        for severity in (1, 2, 3, 4, 5)
        if (i, severity) != (3, 5)
    )


def _means(cells: tuple[Corruption, ...]) -> dict[str, Figure]:
    by_name: dict[str, list[float]] = {}
    for cell in cells:
        by_name.setdefault(cell.corruption, []).append(cell.accuracy.mean)
    found = {
        f"accuracy@corruption={name}": figure(sum(means) / len(means), 256)
        for name, means in by_name.items()
    }
    mean = sum(f.mean for f in found.values()) / len(found)
    return {"accuracy@corruptions": figure(mean, 256), **found}


def _sensitivity(layer: int, bit: int) -> float:
    return min(0.004 * 2 ** (bit - 4) / (layer + 1) ** 2, 1.0) if bit > 2 else 0.0


def _layers() -> tuple[Vulnerability, ...]:
    rows = enumerate(LAYERS)
    return tuple(
        Vulnerability(
            name=name,
            locations=8 * 144 * 4**i,
            trials=40,
            sdc1=figure(sum(_sensitivity(i, b) for b in range(8)) / 8, 10_240),
        )
        for i, name in rows
    )


def _bits() -> tuple[Vulnerability, ...]:
    return tuple(
        Vulnerability(
            name=str(bit),
            locations=77_360,
            trials=30,
            sdc1=figure(sum(_sensitivity(i, bit) for i in range(6)) / 6, 7_680),
        )
        for bit in range(8)
    )


def _cells() -> tuple[Cell, ...]:
    return tuple(
        Cell(layer=name, bit=bit, trials=(i * 7 + bit * 3) % 11, sdc1=_sensitivity(i, bit))
        for i, name in enumerate(LAYERS)
        for bit in range(8)
    )
