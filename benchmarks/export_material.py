"""What the export benchmark works on: networks, images, how much of everything. Part of export.py."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray

if TYPE_CHECKING:
    from resq_deploy.export.dialect import Dialect

SPEED_BATCH = 64

Images = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured, and how much of it."""

    calibration: int = 512
    test: int = 10_000
    faulty: int = 1000
    trials: int = 30
    rare: float = 10  # times as many trials where flips are rare, at most
    deep: int = 2000  # trials at the design BER, whose images go round all of `test`
    attacked: int = 1000
    few: int = 256  # as many under attack in a large network
    design: tuple[float, ...] = (1e-3, 1e-2)
    threads: int = 2
    epochs: float = 5
    seed: int = 0
    data: str = "fashion-mnist"

    def quick(self) -> Setup:
        """A tenth of it, or less."""
        return replace(self.large(), test=2000, faulty=256, deep=30, attacked=128)

    def large(self) -> Setup:
        """Less of what is slow, for networks that take a second for what resnet8 does in ten milliseconds."""
        return replace(self, rare=1, deep=200, attacked=self.few, design=self.design[:1], epochs=1)

    def of(self, arch: str) -> Setup:
        """How much of it for this network."""
        return self if arch.startswith("resnet8") else self.large()

    def trials_at(self, ber: float) -> int:
        """Trials at a BER: rare flips need more of them, all harm at 1e-3 comes from one trial in ten."""
        return round(self.trials * max(1.0, min(self.rare, 1e-2 / ber)))


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """One network, its FP32 graph, images to calibrate on and to test on."""

    fp32: onnx.ModelProto
    calibration: Images
    test: Images
    labels: NDArray[np.int64]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every benchmark of exports is asked: which trained networks, and where their figures go."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("RESQ_CHECKPOINTS", "~/.cache/resq-deploy/benchmarks")
    parser.add_argument("--arch", nargs="*", default=["resnet8"])
    parser.add_argument("--checkpoints", type=Path, default=Path(default))
    parser.add_argument("--page", type=Path, help="a Markdown file to write the tables to")
    return parser


def remembered(path: Path, key: list[Any]) -> dict[str, Any]:
    """Figures of files that were measured before under the same key, else none: {key, files}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found if found.get("key") == key else {"key": key, "files": {}}


def checkpoint(arch: str, folder: Path, setup: Setup) -> Path:
    """ARCH.pt, else ARCH-plain.pt, which is trained where it is missing."""
    if (folder / f"{arch}.pt").is_file():
        return folder / f"{arch}.pt"
    path = folder / f"{arch}-plain.pt"
    if not path.is_file():
        from resq_deploy.console import Reporter
        from resq_deploy.hardening.pipeline import harden_model
        from resq_deploy.hardening.recipe import Recipe

        folder.mkdir(parents=True, exist_ok=True)
        print(f"training {arch} for {setup.epochs:g} epochs -> {path}", flush=True)
        harden_model(
            arch,
            setup.data,
            output=path,
            stages="none",
            recipe=Recipe().with_epochs(setup.epochs, None, None),
            seed=setup.seed,
            resume=path.with_name(path.name + ".state").exists(),
            reporter=Reporter(quiet=False),
        )
    return path


def material(path: Path, setup: Setup) -> Material:
    """Load, export to FP32 ONNX, draw the images."""
    from resq_deploy import data
    from resq_deploy.export.load import load_model

    loaded = load_model(path)
    fp32 = loaded.to_onnx()
    spec, shape = str(loaded.trained.get("data", setup.data)), loaded.input_shape
    train = data.load(spec, "train", shape=shape).take(setup.calibration, setup.seed)
    test = data.load(spec, "test", shape=shape).take(setup.test, setup.seed)
    calibration, _ = train.batch(np.arange(len(train)))
    images, labels = test.batch(np.arange(len(test)))
    return Material(fp32, calibration, images, labels)


def ours(
    m: Material, setup: Setup, ber: float | None, dialect: Dialect | None = None
) -> onnx.ModelProto:
    """Our INT8 graph: plain (None), or adjusted at a design BER; `dialect`: TensorRT's rules by default."""
    from resq_deploy.console import Reporter
    from resq_deploy.export import qdq
    from resq_deploy.export.adjust import adjust
    from resq_deploy.export.calibrate import calibrate
    from resq_deploy.export.design import Design
    from resq_deploy.export.dialect import TENSORRT

    dialect = dialect or TENSORRT
    fp32 = dialect.prepared(m.fp32)
    ranges = calibrate(
        fp32, dialect.plan(fp32).activations, (m.calibration,), unsigned=dialect.unsigned,
        threads=setup.threads,
    )  # fmt: skip
    plain = qdq.quantize_graph(fp32, ranges, dialect=dialect)
    if ber is None:
        return qdq.finish(plain, dialect)
    say = Reporter(quiet=False)
    made = adjust(
        plain, fp32, m.calibration, ranges=ranges, design=Design(ber), dialect=dialect,
        seed=setup.seed, threads=setup.threads, reporter=say,
    )  # fmt: skip
    return qdq.finish(made.model, dialect)
