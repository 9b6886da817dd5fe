"""INT8 files in ordinary ONNX Runtime sessions on the CPU: how many convolutions run in integers, speed, agreement.

    python benchmarks/sessions.py                                resnet8 on Fashion-MNIST; a minute
    python benchmarks/sessions.py --arch resnet8 --speed resnet18 mobilenet_v2 --page docs/sessions.md

Peers side by side in one run: FP32, our export by TensorRT's rules and by ONNX Runtime's, quantize_static (S8 and U8
activations) and NNCF, from the same FP32 graph and calibration images. `--arch`: trained networks (those of export.py),
accuracy and agreement with FP32 are of all test images; `--speed`: any of torchvision, with random weights. Sessions
have their defaults, one thread; times are medians of interleaved rounds. On x86 without VNNI byte products saturate by
default, and `exact` is the same session with session.x64quantprecision=1. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import export_peers as peers
from export_material import Material, Setup, checkpoint, material, ours

ROUNDS = 9
BATCH = 16
TITLES = {
    "fp32": "FP32",
    "ours": "ours, `--rules tensorrt`",
    "sessions": "ours, `--rules onnxruntime`",
    "static_s8": "quantize_static, S8",
    "static_u8": "quantize_static, U8",
    "nncf": "NNCF",
}
_FLOAT, _INTEGER = ("Conv", "FusedConv"), ("QLinearConv",)


def main() -> None:
    """Measure every network, write the page, end with one JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("RESQ_CHECKPOINTS", "~/.cache/resq-deploy/benchmarks")
    parser.add_argument("--arch", nargs="*", default=["resnet8"])
    parser.add_argument("--speed", nargs="*", default=[])
    parser.add_argument("--checkpoints", type=Path, default=Path(default))
    parser.add_argument("--page", type=Path, help="a Markdown file to write the tables to")
    given = parser.parse_args()
    setup, folder = Setup(threads=1), given.checkpoints.expanduser()
    found = {}
    for arch in (*given.arch, *given.speed):
        trained = arch in given.arch
        path = checkpoint(arch, folder, setup.of(arch)) if trained else None
        found[arch] = measured(material(path, setup) if path else untrained(arch), setup)
        print(f"{arch}\n" + "\n".join(rows(found[arch])), flush=True)
    if given.page:
        given.page.write_text(page(found, setup))
    print(json.dumps(found, sort_keys=True))


def untrained(arch: str) -> Material:
    """A network of torchvision for 32x32 images, random weights behind settled normalization; noise as images."""
    import torch

    from resq_deploy import networks
    from resq_deploy.export import graph

    torch.manual_seed(0)
    network = networks.build(arch, input_shape=(3, 32, 32), classes=10, args={}).train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(16, 3, 32, 32))
    whole = graph.Preprocessed(network.eval(), (0.5,) * 3, (0.25,) * 3).eval()
    images = np.random.default_rng(0).random((32, 3, 32, 32), dtype=np.float32)
    fp32 = graph.to_onnx(whole, (3, 32, 32), name=arch)
    return Material(fp32, images, images, np.zeros(0, np.int64))


def files(m: Material, setup: Setup) -> dict[str, onnx.ModelProto]:
    """Everybody's file of one network."""
    from resq_deploy.export.dialect import ONNXRUNTIME

    return {
        "fp32": m.fp32,
        "ours": ours(m, setup, None),
        "sessions": ours(m, setup, None, ONNXRUNTIME),
        "static_s8": peers.ort_static(m.fp32, m.calibration, "minmax"),
        "static_u8": peers.ort_static(m.fp32, m.calibration, "minmax", unsigned=True),
        "nncf": peers.nncf_ptq(m.fp32, m.calibration),
    }


def measured(m: Material, setup: Setup) -> dict[str, dict[str, Any]]:
    """By file: kernels of a session, median seconds for BATCH images, accuracy and agreement where there are labels."""
    made = files(m, setup)
    runs = {
        (name, exact): peers.session(model, setup.threads, exact=exact)
        for name, model in made.items()
        for exact in (False, True)
        if not (exact and name == "fp32")
    }
    taken: dict[Any, list[float]] = {key: [] for key in runs}
    for turn in range(ROUNDS + 1):
        for key, run in runs.items():
            start = time.perf_counter()
            run(m.test[:BATCH])
            taken[key] += [time.perf_counter() - start] * (turn > 0)
    found: dict[str, dict[str, Any]] = {}
    for name, model in made.items():
        kernels = fused(model)
        found[name] = {
            "integer": sum(kernels[op] for op in _INTEGER),
            "float": sum(kernels[op] for op in _FLOAT),
        }
    for (name, exact), seconds in taken.items():
        found[name]["exact_s" if exact else "s"] = float(np.median(seconds))
    if len(m.labels):
        reference = answers(runs["fp32", False], m)
        for (name, exact), run in runs.items():
            top, which = answers(run, m), "exact_" * exact
            found[name][f"{which}accuracy"] = float((top == m.labels).mean())
            found[name][f"{which}agreement"] = float((top == reference).mean())
    return found


def answers(run: peers.Run, m: Material) -> Any:
    """Classes of all test images, as the session says."""
    parts = [run(m.test[i : i + 250])[0] for i in range(0, len(m.test), 250)]
    return np.concatenate(parts).argmax(1)


def fused(model: onnx.ModelProto) -> Counter[str]:
    """The operators of a graph as a session runs it."""
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = f"{folder}/optimized.onnx"
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(options.optimized_model_filepath).graph
    return Counter(node.op_type for node in graph.node)


def rows(f: dict[str, dict[str, Any]]) -> list[str]:
    """The table of one network, in Markdown."""
    told = "accuracy" in f["fp32"]
    head = ["| | convolutions in integers | ms an image | FP32 / this | exact: ms | FP32 / this |"]
    line = "| --- | ---: | ---: | ---: | ---: | ---: |"
    if told:
        head[0] += " accuracy | agreement | exact: accuracy | agreement |"
        line += " ---: |" * 4
    lines = [*head, line]
    base = f["fp32"]["s"]
    for name, title in TITLES.items():
        e = f[name]
        cells = [title, f"{e['integer']} of {e['integer'] + e['float']}"]
        for key in ("s", "exact_s"):
            cells += (
                [f"{1e3 * e[key] / BATCH:.2f}", f"{base / e[key]:.2f}"] if key in e else ["", ""]
            )
        if told:
            for key in ("accuracy", "agreement", "exact_accuracy", "exact_agreement"):
                cells.append(f"{100 * e[key]:.2f}" if key in e else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def page(found: dict[str, Any], setup: Setup) -> str:
    """The tables as Markdown."""
    import onnxruntime as ort

    from resq_deploy.runtime import cpu

    kind = "byte products saturate here" if cpu.saturates() else "with VNNI or its like"
    lines = [
        "# INT8 files in ordinary ONNX Runtime sessions",
        "",
        f"Written by `python benchmarks/sessions.py --arch ... --page ...` on {time.strftime('%Y-%m-%d')}"
        f" ({platform.machine()}, {kind}, one thread, ONNX Runtime {ort.__version__}); no figure is typed by hand.",
        "",
        "What a gateway gets that loads the file with `onnxruntime.InferenceSession` and nothing else",
        "([by whose rules](stage-3.md#8-by-whose-rules)): one FP32 graph, one set of calibration images, everybody's",
        f"file without adjustments for faults. Times are of batches of {BATCH}, medians of {ROUNDS} interleaved",
        "rounds. `exact`: the same session with `session.x64quantprecision=1`, which x86 without VNNI needs to add",
        "byte products without saturating. Accuracy and agreement with FP32 in percent, of all test images, as the",
        "session answers.",
        "",
    ]
    for arch, f in found.items():
        trained = f"trained on {setup.data}" if "accuracy" in f["fp32"] else "random weights"
        lines += [f"## {arch}, {trained}", "", *rows(f), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
