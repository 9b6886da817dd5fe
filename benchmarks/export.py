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
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from scipy import stats

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

ARCHS = ("resnet8", "resnet18", "vgg16", "efficientnet_b0", "swin_t")
BERS = (1e-3, 3e-3, 1e-2)
EPS = 8 / 255
SPEED_BATCH = 64

Images = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Setup:
    """What is measured, and how much of it."""

    calibration: int = 512
    test: int = 2000
    faulty: int = 1000
    trials: int = 30
    attacked: int = 256
    design: tuple[float, ...] = (1e-3, 1e-2)
    threads: int = 2
    epochs: float = 5
    seed: int = 0
    data: str = "fashion-mnist"

    def quick(self) -> Setup:
        """A tenth of it."""
        return Setup(256, 1000, 500, 30, 64, (1e-2,), self.threads, 1, self.seed, self.data)


def main() -> None:
    """Measure every network, print tables, end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("RESQ_CHECKPOINTS", "~/.cache/resq-deploy/benchmarks")
    parser.add_argument("--arch", nargs="+", default=list(ARCHS))
    parser.add_argument("--checkpoints", type=Path, default=Path(default))
    parser.add_argument("--results", type=Path, help="where finished networks are kept")
    parser.add_argument("--design", type=float, nargs="+", help="design BERs, the default first")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    parser.add_argument("--no-speed", action="store_true", help="leave out speed, time and memory")
    parser.add_argument("--export-only", nargs=2, metavar=("FP32", "NPZ"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    setup = Setup(threads=given.threads, seed=given.seed)
    setup = setup.quick() if given.quick else setup
    if given.design:
        setup = Setup(**{**asdict(setup), "design": tuple(given.design)})
    if given.export_only:
        print(json.dumps(timed_export(*given.export_only, setup)))
        return
    folder = given.checkpoints.expanduser()
    results = (given.results or folder / "export-benchmark").expanduser()
    results.mkdir(parents=True, exist_ok=True)
    print(f"{platform.machine()}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}, {setup}\n")
    found = {arch: kept(arch, folder, results, setup, given.fresh) for arch in given.arch}
    line: dict[str, Any] = dict(found)
    if not given.no_speed:
        arch = "resnet18" if "resnet18" in given.arch else given.arch[0]
        line |= speed(arch, checkpoint(arch, folder, setup), setup)
    print(json.dumps(line, sort_keys=True))


def kept(arch: str, folder: Path, results: Path, setup: Setup, fresh: bool) -> dict[str, Any]:
    """The figures of one network, measured unless they are there for the same setup."""
    path = results / f"{arch}.json"
    key = json.loads(json.dumps(asdict(setup)))
    if path.is_file() and not fresh:
        before = json.loads(path.read_text())
        if before["setup"] == key:
            print(f"{arch}: measured {before['date']}, kept in {path}")
            show(arch, before["figures"])
            figures: dict[str, Any] = before["figures"]
            return figures
    figures = measure(arch, checkpoint(arch, folder, setup), setup)
    date = time.strftime("%Y-%m-%d")
    path.write_text(json.dumps({"setup": key, "date": date, "figures": figures}, indent=1))
    return figures


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


@dataclass(frozen=True, slots=True, eq=False)
class Material:
    """One network, its FP32 graph, images to calibrate on and to test on."""

    fp32: onnx.ModelProto
    calibration: Images
    test: Images
    labels: NDArray[np.int64]


def material(path: Path, setup: Setup) -> Material:
    """Load, export to FP32 ONNX, draw the images."""
    from resq_deploy import data
    from resq_deploy.export import graph
    from resq_deploy.export.load import load_model

    loaded = load_model(path)
    fp32 = graph.to_onnx(loaded.module, loaded.input_shape, name=loaded.arch)
    spec, shape = str(loaded.trained.get("data", setup.data)), loaded.input_shape
    train = data.load(spec, "train", shape=shape).take(setup.calibration, setup.seed)
    test = data.load(spec, "test", shape=shape).take(setup.test, setup.seed)
    calibration, _ = train.batch(np.arange(len(train)))
    images, labels = test.batch(np.arange(len(test)))
    return Material(fp32, calibration, images, labels)


def ours(m: Material, setup: Setup, ber: float | None) -> onnx.ModelProto:
    """Our INT8 graph: plain (None), or adjusted at a design BER."""
    from resq_deploy.console import Reporter
    from resq_deploy.export import qdq
    from resq_deploy.export.adjust import adjust
    from resq_deploy.export.calibrate import calibrate

    ranges = calibrate(
        m.fp32, qdq.activation_tensors(m.fp32), (m.calibration,), threads=setup.threads
    )
    plain = qdq.quantize_graph(m.fp32, ranges)
    if ber is None:
        return plain
    say = Reporter(quiet=False)
    made = adjust(
        plain, m.fp32, m.calibration, ranges=ranges, design_ber=ber, seed=setup.seed,
        threads=setup.threads, reporter=say,
    )  # fmt: skip
    return made.model


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
    flips = under_flips(graphs, m, setup)
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
        "int8_at_ber": {f"{b:g}": [flips["plain", b][0], flips[chosen, b][0]] for b in BERS},
        "flips": [[name, ber, *value] for (name, ber), value in flips.items()],
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


def under_flips(
    models: dict[str, onnx.ModelProto], m: Material, setup: Setup
) -> dict[tuple[str, float], tuple[float, float, float]]:
    """(graph, BER) -> mean accuracy and its 95% interval (Student's t over trials); the same flips for every graph."""
    from resq_deploy.fault_models import parse, trial_rng
    from resq_deploy.memory import fault_space
    from resq_deploy.metrics import accuracy
    from resq_deploy.runtime.ort import OrtRunner

    images, labels = m.test[: setup.faulty], m.labels[: setup.faulty]
    found = {}
    for name, model in models.items():
        space = fault_space(model).select(kinds=("weights",))
        with OrtRunner(model, threads=setup.threads) as runner:
            for ber in BERS:
                fault = parse(f"ber:{ber:g}")
                shares = []
                for trial in range(setup.trials):
                    with runner.faults(fault.sample(space, trial_rng(setup.seed, trial))):
                        shares.append(accuracy(runner(images), labels))
                found[name, ber] = interval(shares)
    return found


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


def timed_export(fp32: str, images: str, setup: Setup) -> dict[str, float]:
    """Seconds of our calibration and quantization, with and without stage III, and the process's peak memory."""
    model, calibration = onnx.load(fp32), np.load(images)["x"]
    m = Material(model, calibration, calibration[:0], np.zeros(0, np.int64))
    start = time.perf_counter()
    ours(m, setup, None)
    plain = time.perf_counter() - start
    start = time.perf_counter()
    ours(m, setup, setup.design[0])
    adjusted = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"plain_s": plain, "adjusted_s": adjusted, "peak_mib": peak}


def speed(arch: str, path: Path, setup: Setup) -> dict[str, Any]:
    """Images/s against stock ONNX Runtime and OpenVINO, export time against quantize_static, peak memory."""
    import export_peers as peers

    from resq_deploy.runtime.ort import OrtRunner

    m = material(path, setup)
    plain, stock = ours(m, setup, None), peers.ort_static(m.fp32, m.calibration, "minmax")
    images = m.test[:SPEED_BATCH]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(plain, file)
        onnx.save(m.fp32, f"{folder}/fp32.onnx")
        np.savez(f"{folder}/images.npz", x=m.calibration)
        with OrtRunner(plain, threads=setup.threads) as runner:
            rate = rates({
                "ours": lambda: runner(images),
                "quantize_static S8 in ONNX Runtime": partial(peers.session(stock, setup.threads), images),
                "our file in stock ONNX Runtime": partial(peers.session(plain, setup.threads), images),
                "our file in OpenVINO": partial(peers.openvino(file, setup.threads), images),
                "FP32 in ONNX Runtime": partial(peers.session(m.fp32, setup.threads), images),
            })  # fmt: skip
        start = time.perf_counter()
        peers.ort_static(m.fp32, m.calibration, "entropy")
        static = time.perf_counter() - start
        command = [sys.executable, "-W", "ignore", __file__, "--threads", str(setup.threads),
                   "--design", str(setup.design[0]),
                   "--export-only", f"{folder}/fp32.onnx", f"{folder}/images.npz"]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        times = json.loads(done.stdout.strip().splitlines()[-1])
    for name, value in rate.items():
        print(f"{arch:18s}{name:40s}{value:10.0f} images/s")
    print(
        f"{arch:18s}export, {len(m.calibration)} images: quantize_static entropy {static:.1f} s,"
        f" ours {times['plain_s']:.1f} s, with stage III {times['adjusted_s']:.1f} s,"
        f" peak {times['peak_mib']:.0f} MiB"
    )
    return {
        "speed_arch": arch,
        "images_per_s": rate,
        "speed_vs_ort_s8": rate["ours"] / rate["quantize_static S8 in ONNX Runtime"],
        "speed_vs_openvino": rate["ours"] / rate["our file in OpenVINO"],
        "time_vs_quantize_static": times["plain_s"] / static,
        "time_vs_quantize_static_adjusted": times["adjusted_s"] / static,
        "peak_mib": times["peak_mib"],
    }


def rates(runs: dict[str, Callable[[], Any]], rounds: int = 9) -> dict[str, float]:
    """Images/s of each, the median of interleaved rounds."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, call in runs.items():
            start = time.perf_counter()
            call()
            if turn >= 2:
                taken[name].append(time.perf_counter() - start)
    return {name: SPEED_BATCH / float(np.median(seconds)) for name, seconds in taken.items()}


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
    print(f"  (FP32 on these images: {100 * f['fp32_of_flipped']:.2f})")
    print(flush=True)


if __name__ == "__main__":
    main()
