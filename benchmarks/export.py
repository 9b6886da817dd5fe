"""INT8 export against its peers, side by side: accuracy, accuracy under bit flips and attack, speed, time, memory.

    python benchmarks/export.py                                  resnet8, then the four networks of the paper
    python benchmarks/export.py --arch resnet8 --quick           a few minutes

On trained networks (Fashion-MNIST at 32x32): FP32; ours with and without stage III; onnxruntime's
quantize_static (S8 QDQ per channel, MinMax and entropy); NNCF's PTQ. A checkpoint is taken from
--checkpoints (or $RESQ_CHECKPOINTS) as ARCH-plain.pt, or as ARCH.pt (--arch resnet8-hard); what is
missing is trained, and kept there. Finished networks are kept too, so an interrupted run goes on where
it stopped (--fresh: measure again). Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from export_material import SPEED_BATCH, Images, Material, Setup, material, ours
from export_page import page, spread

ARCHS = ("resnet8", "resnet18", "vgg16", "efficientnet_b0", "swin_t")
BERS = (1e-3, 3e-3, 1e-2)
EPS = 8 / 255

Trials = dict[tuple[str, float], list[float]]


def main() -> None:
    """Measure every network, print tables, end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("RESQ_CHECKPOINTS", "~/.cache/resq-deploy/benchmarks")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS))
    parser.add_argument("--checkpoints", type=Path, default=Path(default))
    parser.add_argument("--results", type=Path, help="where finished networks are kept")
    parser.add_argument("--page", type=Path, help="a Markdown file to write the tables to")
    parser.add_argument("--design", type=float, nargs="+", help="design BERs, the default first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    parser.add_argument("--no-speed", action="store_true", help="leave out speed, time and memory")
    given = parser.parse_args()
    setup = Setup(threads=given.threads, seed=given.seed)
    setup = setup.quick() if given.quick else setup
    if given.design:
        setup = replace(setup, design=tuple(given.design))
    folder = given.checkpoints.expanduser()
    results = (given.results or folder / "export-benchmark").expanduser()
    results.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {setup}\n")
    found = {arch: kept(arch, folder, results, setup.of(arch), given.fresh) for arch in given.arch}
    timed: dict[str, Any] = {}
    if not given.no_speed:
        from export_speed import speed

        arch = "resnet18" if "resnet18" in given.arch else given.arch[0]
        timed = speed(arch, checkpoint(arch, folder, setup.of(arch)), setup)
    if given.page:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        given.page.write_text(page(found, timed, setup, machine))
    print(json.dumps({**found, **timed}, sort_keys=True))


def kept(arch: str, folder: Path, results: Path, setup: Setup, fresh: bool) -> dict[str, Any]:
    """The figures of one network, measured unless they are there for the same setup."""
    path = results / f"{arch}.json"
    key = json.loads(json.dumps(asdict(setup)))
    if path.is_file() and not fresh:
        before = json.loads(path.read_text())
        figures: dict[str, Any] = before["figures"]
        if before["setup"] == key and "ahead_of" in figures:  # the youngest of the figures
            print(f"{arch}: measured {figures['measured']}, kept in {path}")
            show(arch, figures)
            return figures
    measured = f"{time.strftime('%Y-%m-%d')} with {commit()}"
    figures = {"measured": measured} | measure(arch, checkpoint(arch, folder, setup), setup)
    path.write_text(json.dumps({"setup": key, "figures": figures}, indent=1))
    return figures


def commit() -> str:
    """The commit that is measured, "+" if files were changed since."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


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


def measure(arch: str, path: Path, setup: Setup) -> dict[str, Any]:
    """All figures of one network."""
    import export_peers as peers

    from resq_deploy.metrics import accuracy, agreement

    start = time.perf_counter()
    m = material(path, setup)
    exact = run(m.fp32, m.test, setup)
    plain = ours(m, setup, None)
    adjusted = {ber: ours(m, setup, ber) for ber in setup.design}
    first = adjusted[setup.design[0]]
    models = {
        f"quantize_static {way}": peers.ort_static(m.fp32, m.calibration, way)
        for way in peers.METHODS
    }
    models["nncf"] = peers.nncf_ptq(m.fp32, m.calibration)
    others = {name: run(model, m.test, setup) for name, model in models.items()}
    mine = {"plain": deployed(plain, m.test, setup), "int8": deployed(first, m.test, setup)}
    scores = {name: accuracy(logits, m.labels) for name, logits in (others | mine).items()}
    agrees = {name: agreement(exact, logits) for name, logits in (others | mine).items()}
    graphs = {"plain": plain} | {f"design {ber:g}": model for ber, model in adjusted.items()}
    trials = under_flips(graphs, m, setup)
    best = max((k for k in scores if k.startswith("quantize")), key=lambda k: scores[k])
    rivals = {"fp32": exact, "quantize_static": others[best], "nncf": others["nncf"]}
    flips = {key: interval(shares) for key, shares in trials.items()}
    chosen = f"design {setup.design[0]:g}"
    figures = {
        "fp32": accuracy(exact, m.labels),
        "fp32_of_flipped": accuracy(exact[: setup.faulty], m.labels[: setup.faulty]),
        "int8": scores["int8"],
        "int8_plain": scores["plain"],
        "agreement": agrees["int8"],
        "agreements": agrees,
        "quantize_static": max(v for k, v in scores.items() if k.startswith("quantize")),
        "quantize_static_by_method": {k: v for k, v in scores.items() if k.startswith("quantize")},
        "nncf": scores["nncf"],
        "ahead_of": {k: ahead(mine["int8"], v, m.labels) for k, v in rivals.items()},
        "int8_at_ber": {f"{b:g}": [flips["plain", b][0], flips[chosen, b][0]] for b in BERS},
        "flips": [[name, ber, *value] for (name, ber), value in flips.items()],
        "gains": gains(trials),
        "recovered": recovered(trials, accuracy(exact[: setup.faulty], m.labels[: setup.faulty])),
        **attacks(m, {"fp32": m.fp32, "plain": plain, "int8": first}, setup),
        "tensorrt_rtx": builds(first),
        "seconds": round(time.perf_counter() - start),
    }  # fmt: skip
    show(arch, figures)
    return figures


def run(model: onnx.ModelProto, images: Images, setup: Setup) -> NDArray[np.float32]:
    """Logits by stock ONNX Runtime."""
    import export_peers as peers

    session = peers.session(model, setup.threads)
    parts = [session(images[i : i + SPEED_BATCH])[0] for i in range(0, len(images), SPEED_BATCH)]
    logits: NDArray[np.float32] = np.concatenate(parts)
    return logits


def deployed(model: onnx.ModelProto, images: Images, setup: Setup) -> NDArray[np.float32]:
    """Logits by the runner that resq-validate uses."""
    from resq_deploy.runtime.ort import OrtRunner

    with OrtRunner(model, threads=setup.threads) as runner:
        return runner(images)


def ahead(
    logits: NDArray[np.float32], rival: NDArray[np.float32], labels: NDArray[np.int64]
) -> tuple[float, float, float]:
    """What accuracy is above a rival's, image by image: mean, low and high of the 95% interval."""
    from resq_deploy.metrics import top1

    right, other = (top1(x) == labels for x in (logits, rival))
    return interval((right.astype(np.float64) - other).tolist())


def under_flips(models: dict[str, onnx.ModelProto], m: Material, setup: Setup) -> Trials:
    """(graph, BER) -> accuracy of each trial; flips by the same seeds for every graph."""
    from resq_deploy.fault_models import parse, trial_rng
    from resq_deploy.memory import fault_space
    from resq_deploy.metrics import accuracy
    from resq_deploy.runtime.ort import OrtRunner

    images, labels = m.test[: setup.faulty], m.labels[: setup.faulty]
    found: Trials = {}
    for name, model in models.items():
        if name != "plain" and model == models["plain"]:
            found |= {(name, ber): found["plain", ber] for ber in BERS}
            continue
        space = fault_space(model).select(kinds=("weights",))
        with OrtRunner(model, threads=setup.threads) as runner:
            for ber in BERS:
                fault = parse(f"ber:{ber:g}")
                shares = []
                for trial in range(setup.trials_at(ber)):
                    with runner.faults(fault.sample(space, trial_rng(setup.seed, trial))):
                        shares.append(accuracy(runner(images), labels))
                found[name, ber] = shares
    return found


def gains(trials: Trials) -> list[list[Any]]:
    """[graph, BER, mean, low, high]: accuracy above that of plain INT8, trial by trial, 95%."""
    return [
        [name, ber, *interval(np.subtract(shares, trials["plain", ber]).tolist())]
        for (name, ber), shares in trials.items()
        if name != "plain"
    ]


def recovered(trials: Trials, fp32: float) -> list[list[Any]]:
    """[graph, BER, share, low, high]: of what plain INT8 loses, what a graph takes back; trial by trial, 95%."""
    lost = {ber: fp32 - float(np.mean(trials["plain", ber])) for _, ber in trials}
    return [
        [name, ber, *(round(v / lost[ber], 3) for v in gained)]
        for name, ber, *gained in gains(trials)
        if lost[ber] > 0
    ]


def interval(shares: Sequence[float]) -> tuple[float, float, float]:
    """Mean, low and high of the 95% interval."""
    mean, error = float(np.mean(shares)), float(stats.sem(shares))
    half = error * float(stats.t.ppf(0.975, len(shares) - 1))
    return mean, mean - half, mean + half


def attacks(m: Material, models: dict[str, onnx.ModelProto], setup: Setup) -> dict[str, float]:
    """Accuracy under white-box PGD-20 at 8/255, each graph attacked through itself."""
    from resq_deploy.bundle import Sample
    from resq_deploy.export.craft import craft
    from resq_deploy.export.twin import Twin
    from resq_deploy.metrics import accuracy

    count = setup.attacked
    sample = Sample(m.test[:count], m.labels[:count], np.arange(count))
    names = {"fp32": "pgd_fp32", "plain": "pgd_int8_plain", "int8": "pgd_int8"}
    found = {}
    for name, model in models.items():
        hard = craft(Twin(model), sample, "pgd", EPS, steps=20, seed=setup.seed)
        logits = run(model, hard, setup) if name == "fp32" else deployed(model, hard, setup)
        found[names[name]] = accuracy(logits, sample.labels)
    return found


def builds(model: onnx.ModelProto) -> str:
    """TensorRT-RTX's version if it builds the file, else its reason."""
    from resq_deploy.errors import ResqError
    from resq_deploy.export.engine import build_engine

    with tempfile.TemporaryDirectory() as folder:
        onnx.save(model, f"{folder}/model.onnx")
        try:
            return build_engine(f"{folder}/model.onnx", f"{folder}/model.plan", sm=("86",)).version
        except ResqError as error:
            return f"failed: {error}"


def show(arch: str, f: dict[str, Any]) -> None:
    """One network's table."""
    print(f"\n{arch}: top-1 %, FP32 {100 * f['fp32']:.2f}")
    rows = {
        **f["quantize_static_by_method"],
        "nncf": f["nncf"],
        "plain": f["int8_plain"],
        "int8": f["int8"],
    }
    for name, value in rows.items():
        print(f"  {name:28s}{100 * value:8.2f}   agreement {100 * f['agreements'][name]:.2f}")
    print(f"  PGD-20 8/255: FP32 {100 * f['pgd_fp32']:.2f}, plain {100 * f['pgd_int8_plain']:.2f}, "
          f"int8 {100 * f['pgd_int8']:.2f};  TensorRT-RTX: {f['tensorrt_rtx']}")  # fmt: skip
    for name in dict.fromkeys(name for name, *_ in f["flips"]):
        cells = [
            f"{ber:g}: {100 * mean:.2f} [{100 * low:.2f}, {100 * high:.2f}]"
            for other, ber, mean, low, high in f["flips"]
            if other == name
        ]
        print(f"  BER, {name:23s}{'   '.join(cells)}")
    for name, difference in f["ahead_of"].items():
        print(f"  accuracy {spread(difference, 2)} points above that of {name}")
    for name, ber, *gained in f["gains"]:
        print(f"  {name} at {ber:g}: {spread(gained, 2)} points over plain")
    for name, ber, *share in f["recovered"]:
        print(f"  {name} at {ber:g}: {spread(share, 0)}% of the loss recovered")
    print(f"  (FP32 on these images: {100 * f['fp32_of_flipped']:.2f})")
    print(flush=True)


if __name__ == "__main__":
    main()
