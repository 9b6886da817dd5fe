"""Calibration at the size that networks are deployed at: seconds and peak memory, beside quantize_static's.

    python benchmarks/export_large.py                     resnet18 at 224 x 224, 128 images
    python benchmarks/export_large.py --arch resnet50 --images 32

Each runs in a process of its own that starts with the FP32 graph and the images: calibration and quantization without
stage III, against onnxruntime.quantization.quantize_static with entropy ranges. Weights are torchvision's
initial ones, with normalizations that know the images: what they compute is nothing, what it costs is the same,
but that ranges which are good enough at once are not searched. "ours, searched" searches them all the same: it is the
longest that calibration can take. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from export_material import Material, Setup, ours
from export_peers import ort_static
from peak import peak_bytes

WAYS = ("ours", "ours, searched", "quantize_static entropy")


def main() -> None:
    """Make the network, run each way in turn, print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)  # a way, and where its input lies
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(*given.one, given.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), given.arch, given.size, given.images)
        seconds: dict[str, list[float]] = {way: [] for way in WAYS}
        peaks = dict.fromkeys(WAYS, 0.0)
        for _ in range(given.rounds):
            for way in WAYS:
                found = apart(way, folder, given.threads)
                seconds[way].append(found["s"])
                peaks[way] = max(peaks[way], found["peak_mib"])
    medians = {way: float(np.median(taken)) for way, taken in seconds.items()}
    peer = medians[WAYS[-1]]
    title = f"{given.arch}, {given.images} images of {given.size} x {given.size}"
    print(f"{title}, {given.threads} threads, median of {given.rounds}")
    for way in WAYS:
        print(
            f"{way:26s}{medians[way]:8.1f} s{medians[way] / peer:7.2f}x{peaks[way]:8.0f} MiB at most"
        )
    line = {"network": title, "seconds": seconds, "peak_mib": peaks}
    ratios = {way: medians[way] / peer for way in WAYS[:-1]}
    print(json.dumps(line | {"time_vs_quantize_static": ratios}))


def prepare(folder: Path, arch: str, size: int, count: int) -> None:
    """model.onnx and images.npy: the network in FP32, and what it is calibrated on."""
    import torch
    import torchvision

    from resq_deploy import data
    from resq_deploy.export.load import load_model

    torch.manual_seed(0)
    shape = (3, size, size)
    small, _ = data.load("fashion-mnist", "train").take(count, 0).batch(np.arange(count))
    wide = torch.nn.functional.interpolate(torch.from_numpy(small), (size, size), mode="bilinear")
    images = np.ascontiguousarray(wide.expand(-1, *shape).numpy())
    network = torchvision.models.get_model(arch, weights=None, num_classes=10).train()
    with torch.no_grad():
        for start in range(0, min(count, 64), 16):
            network(torch.from_numpy(images[start : start + 16]))
    torch.save(network.state_dict(), folder / "model.pt")
    loaded = load_model(folder / "model.pt", arch=f"torchvision:{arch}", input_shape=shape)
    onnx.save(loaded.to_onnx(), folder / "model.onnx")
    np.save(folder / "images.npy", images)


def apart(way: str, folder: str, threads: int) -> dict[str, Any]:
    """One way in a process of its own."""
    command = [sys.executable, "-W", "ignore", __file__, "--threads", str(threads), "--one", way, folder]  # fmt: skip
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def measured(way: str, folder: str, threads: int) -> dict[str, float]:
    """Seconds of calibration and quantization, and the peak memory of this process."""
    from resq_deploy.export import ranges

    fp32, images = onnx.load(f"{folder}/model.onnx"), np.load(f"{folder}/images.npy")
    if way == "ours, searched":
        ranges.GOOD_ENOUGH = -1.0
    start = time.perf_counter()
    if way == WAYS[-1]:
        ort_static(fp32, images, "entropy", batch=1)
    else:
        no_test = images[:0]
        ours(Material(fp32, images, no_test, np.zeros(0, np.int64)), Setup(threads=threads), None)
    return {"s": time.perf_counter() - start, "peak_mib": peak_bytes() / 2**20}


if __name__ == "__main__":
    main()
