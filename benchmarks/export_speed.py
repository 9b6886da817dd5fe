"""What the INT8 export costs and gives in time: images/s, seconds of an export, peak memory. Part of export.py."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # timed_export runs as a script

import export_peers as peers
import numpy as np
import onnx
from export_material import SPEED_BATCH, Material, Setup, material, ours
from peak import peak_bytes


def timed_export(fp32: str, images: str, setup: Setup) -> dict[str, float]:
    """Seconds of our calibration and quantization, with and without stage III, and the process's peak memory."""
    model, calibration = onnx.load(fp32), np.load(images)["x"]
    m = Material(model, calibration, calibration[:0], np.zeros(0, np.int64))
    start = time.perf_counter()
    ours(m, setup, None)
    plain, first = time.perf_counter() - start, peak_bytes()
    start = time.perf_counter()
    ours(m, setup, setup.design[0])
    adjusted = time.perf_counter() - start
    peaks = {"peak_plain_mib": first / 2**20, "peak_mib": peak_bytes() / 2**20}
    return {"plain_s": plain, "adjusted_s": adjusted, **peaks}


def speed(arch: str, path: Path, setup: Setup) -> dict[str, Any]:
    """Images/s against stock ONNX Runtime and OpenVINO, export time against quantize_static, peak memory."""
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
        command = [sys.executable, "-W", "ignore", __file__, f"{folder}/fp32.onnx", f"{folder}/images.npz",
                   str(setup.threads), str(setup.design[0])]  # fmt: skip
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        times = json.loads(done.stdout.strip().splitlines()[-1])
    for name, value in rate.items():
        print(f"{arch:18s}{name:40s}{value:10.0f} images/s")
    print(
        f"{arch:18s}export, {len(m.calibration)} images: quantize_static entropy {static:.1f} s,"
        f" ours {times['plain_s']:.1f} s, with stage III {times['adjusted_s']:.1f} s,"
        f" peak {times['peak_plain_mib']:.0f} and {times['peak_mib']:.0f} MiB"
    )
    return {
        "speed_arch": arch,
        "threads": setup.threads,
        "images_per_s": rate,
        "speed_vs_ort_s8": rate["ours"] / rate["quantize_static S8 in ONNX Runtime"],
        "speed_vs_openvino": rate["ours"] / rate["our file in OpenVINO"],
        "quantize_static_s": static,
        "plain_s": times["plain_s"],
        "adjusted_s": times["adjusted_s"],
        "time_vs_quantize_static": times["plain_s"] / static,
        "time_vs_quantize_static_adjusted": times["adjusted_s"] / static,
        "peak_plain_mib": times["peak_plain_mib"],
        "peak_mib": times["peak_mib"],
    }


def products() -> str:
    """What multiplies bytes here: AMX, VNNI or AVX2 (others than x86 have no name)."""
    from resq_deploy.runtime import cpu

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return platform.machine()
    return "AMX" if cpu.has_tiles() else "AVX2" if cpu.saturates() else "VNNI"


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


if __name__ == "__main__":
    fp32, images, threads, ber = sys.argv[1:]
    setup = Setup(threads=int(threads), design=(float(ber),))
    print(json.dumps(timed_export(fp32, images, setup)))
