"""INT8 files in ordinary ONNX Runtime sessions on the CPU: how many convolutions run in integers, speed, agreement.

    python benchmarks/sessions.py                                resnet8 on Fashion-MNIST; a minute
    python benchmarks/sessions.py --arch resnet8 --speed resnet18 mobilenet_v2 --page docs/sessions.md

Peers side by side in one run: FP32, our export by TensorRT's rules and by ONNX Runtime's, quantize_static (S8 and U8
activations) and NNCF, from the same FP32 graph and calibration images. `--arch`: trained networks (those of export.py),
accuracy and agreement with FP32 are of all test images; `--speed`: any of torchvision, with random weights. Sessions
have their defaults, one thread; times are medians of interleaved rounds. On x86 without VNNI byte products saturate by
default, and `exact` is the same session with session.x64quantprecision=1. Beside them resq-validate's runner and
OpenVINO on the same file. Ends with one JSON line.
"""

from __future__ import annotations

import json
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
from export_material import Material, Setup, arguments, checkpoint, material, ours

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
PRECISE = "session.x64quantprecision"
WAYS = {"session": "session", "exact": "exact", "runner": "runner", "openvino": "OpenVINO"}
_FLOAT, _INTEGER = ("Conv", "FusedConv"), ("QLinearConv",)


def main() -> None:
    """Measure every network, write the page, end with one JSON line."""
    parser = arguments(__doc__)
    parser.add_argument("--speed", nargs="*", default=[])
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
    runs = {(n, way): run for n, model in made.items() for way, run in ways(model, setup).items()}
    taken = peers.interleaved(runs, m.test[:BATCH], ROUNDS)
    found: dict[str, dict[str, Any]] = {}
    for name, model in made.items():
        kernels = fused(model)
        found[name] = {
            "integer": sum(kernels[op] for op in _INTEGER),
            "float": sum(kernels[op] for op in _FLOAT),
        }
    for (name, way), seconds in taken.items():
        found[name][f"{way}_s"] = seconds
    if len(m.labels):
        reference = answers(runs["fp32", "session"], m)
        for (name, way), run in runs.items():
            if way in ("session", "exact"):
                top = answers(run, m)
                found[name][f"{way}_accuracy"] = float((top == m.labels).mean())
                found[name][f"{way}_agreement"] = float((top == reference).mean())
    return found


def ways(model: onnx.ModelProto, setup: Setup) -> dict[str, peers.Run]:
    """What runs a file: images -> outputs."""
    from resq_deploy.export.qdq_file import canonical
    from resq_deploy.runtime.ort import OrtRunner

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file)
        found = {
            "session": peers.session(model, setup.threads),
            "openvino": peers.openvino(file, setup.threads),
        }
    if any(node.op_type == "QuantizeLinear" for node in model.graph.node):
        try:
            found["exact"] = peers.session(model, setup.threads, exact=True)
        except (
            Exception
        ) as error:  # ONNX Runtime 1.31 does not load quantize_static's Swin-T with it
            print(f"not with {PRECISE}: {str(error)[:120]}")
        found["runner"] = OrtRunner(canonical(model), threads=setup.threads)
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
    heads = ["", "integer convolutions", *WAYS.values()]
    shares = ["session_accuracy", "session_agreement", "exact_accuracy", "exact_agreement"]
    shares = [key for key in shares if "session_accuracy" in f["fp32"]]
    heads += [key.replace("_", ": ") for key in shares]
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    base = f["fp32"]["session_s"]
    for name, title in TITLES.items():
        e = f[name]
        cells = [title, f"{e['integer']} of {e['integer'] + e['float']}"]
        for way in WAYS:
            s = e.get(f"{way}_s")
            cells.append("" if s is None else f"{1e3 * s / BATCH:.3g} ({base / s:.2f})")
        cells += [f"{100 * e[key]:.2f}" if key in e else "" for key in shares]
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
        f"file without adjustments for faults. Times are ms an image in batches of {BATCH}, medians of {ROUNDS}",
        "interleaved rounds, and in brackets how many times as fast as FP32 in a session. `exact`: the same session",
        "with `session.x64quantprecision=1`, which x86 without VNNI needs to add byte products without saturating;",
        "`runner`: what resq-validate runs. Accuracy and agreement with FP32 in percent, of all test images, as the",
        "session answers.",
        "",
    ]
    for arch, f in found.items():
        trained = (
            f"trained on {setup.data}" if "session_accuracy" in f["fp32"] else "random weights"
        )
        lines += [f"## {arch}, {trained}", "", *rows(f), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
