"""Other quantizers' files with and without stage III: what `resq-export FILE.onnx --adjust` does to them.

    python benchmarks/adjusted_files.py                        resnet8; a few minutes
    python benchmarks/adjusted_files.py --arch resnet8 resnet18 --page docs/adjusted-files.md

Networks, checkpoints and calibration images are those of export.py; the files are quantize_static's (S8 QDQ per
channel, MinMax), NNCF's and, where nvidia-modelopt[onnx] is installed, ModelOpt's, beside our own export of the same
network. Accuracy and agreement are of all test images, faults of the first --faulty of them; flips are the same ones
for every graph with as much memory, differences are taken trial by trial. Finished networks are kept. Ends with one
JSON line.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from export_material import Material, Setup, arguments, checkpoint, material, ours, remembered
from export_parts import BERS, deployed, digest, flipped, interval, run

TITLES = {
    "quantize_static": "quantize_static",
    "nncf": "NNCF",
    "modelopt": "ModelOpt",
    "ours": "ours",
    "sessions": "ours, `--rules onnxruntime`",
}


def main() -> None:
    """Measure every network, write the page, end with one JSON line."""
    parser = arguments(__doc__)
    parser.add_argument("--faulty", type=int, default=1000, help="images under faults")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder = given.checkpoints.expanduser()
    setup = replace(Setup(threads=given.threads, seed=given.seed), faulty=given.faulty)
    found = {arch: kept(arch, folder, setup.of(arch)) for arch in given.arch}
    if given.page:
        given.page.write_text(page(found, setup))
    print(json.dumps(found, sort_keys=True))


def kept(arch: str, folder: Path, setup: Setup) -> dict[str, Any]:
    """The figures of one network: file by file, measured now or kept from before."""
    m = material(checkpoint(arch, folder, setup), setup)
    path = folder / "adjusted-files" / f"{arch}.json"
    found = remembered(path, [digest([m.fp32]), setup.faulty, setup.trials, setup.seed])
    exact = run(m.fp32, m.test, setup)
    found["fp32"] = _accuracy(exact, m)
    found["fp32_of_flipped"] = _accuracy(exact[: setup.faulty], m)
    for name in quantizers():
        if name not in found["files"]:
            begun = time.perf_counter()
            found["files"][name] = measured(name, m, exact, setup)
            path.write_text(json.dumps(found, indent=1))
            print(f"{arch}, {name}: {time.perf_counter() - begun:.0f} s", flush=True)
        show(arch, name, found["files"][name])
    return found


def quantizers() -> list[str]:
    """Whose files are adjusted here."""
    there = importlib.util.find_spec("modelopt") is not None
    return ["quantize_static", "nncf", *(["modelopt"] if there else []), "ours", "sessions"]


def measured(name: str, m: Material, exact: Any, setup: Setup) -> dict[str, Any]:
    """Accuracy, agreement and accuracy under flips, as it is and adjusted, and what stage III kept."""
    before, after, told = pair(name, m, setup)
    trials = flipped({"file": before, "adjusted": after}, m, setup)
    return {
        **{
            which: clean(model, m, exact, setup)
            for which, model in (("file", before), ("adjusted", after))
        },
        **told,
        "flips": [[which, ber, *interval(shares)] for (which, ber), shares in trials.items()],
        "gains": [
            [ber, *interval(np.subtract(trials["adjusted", ber], trials["file", ber]).tolist())]
            for ber in BERS
        ],
        "measured": time.strftime("%Y-%m-%d"),
    }


def pair(
    name: str, m: Material, setup: Setup
) -> tuple[onnx.ModelProto, onnx.ModelProto, dict[str, Any]]:
    """A file as a bundle takes it in, the same adjusted, and what is told of that."""
    import export_peers as peers

    from resq_deploy.console import Reporter
    from resq_deploy.export.design import Design
    from resq_deploy.export.dialect import ONNXRUNTIME, TENSORRT
    from resq_deploy.export.qdq_file import canonical
    from resq_deploy.export.readjust import readjust

    if name in ("ours", "sessions"):
        by = ONNXRUNTIME if name == "sessions" else TENSORRT
        return ours(m, setup, None, by), ours(m, setup, setup.design[0], by), {}
    made = {
        "quantize_static": lambda: peers.ort_static(m.fp32, m.calibration, "minmax"),
        "nncf": lambda: peers.nncf_ptq(m.fp32, m.calibration),
        "modelopt": lambda: peers.modelopt_ptq(m.fp32, m.calibration),
    }[name]()
    file = canonical(made)
    begun = time.perf_counter()
    adjusted, record = readjust(
        file, m.fp32, m.calibration, design=Design(setup.design[0]), seed=setup.seed,
        threads=setup.threads, reporter=Reporter(quiet=False),
    )  # fmt: skip
    seconds = round(time.perf_counter() - begun)
    return file, adjusted, {"kept": record.measured["kept"], "seconds": seconds}


def clean(model: onnx.ModelProto, m: Material, exact: Any, setup: Setup) -> dict[str, float]:
    """Without faults."""
    from resq_deploy.metrics import agreement

    logits = deployed(model, m.test, setup)
    return {"accuracy": _accuracy(logits, m), "agreement": agreement(exact, logits)}


def _accuracy(logits: Any, m: Material) -> float:
    from resq_deploy.metrics import accuracy

    return accuracy(logits, m.labels[: len(logits)])


def show(arch: str, name: str, f: dict[str, Any]) -> None:
    """One file for the terminal."""
    print(f"{arch}, {name}: keeps {f.get('kept', 'its own stage III')}")
    for row in table_row(name, f):
        print("  " + "  ".join(row))


def table_row(name: str, f: dict[str, Any]) -> list[list[str]]:
    """Two rows of the table: the file as it is, and adjusted."""
    rows = []
    for which, title in (("file", TITLES[name]), ("adjusted", "... adjusted")):
        share = f[which]
        cells = [f"{100 * mean:.2f}" for model, _, mean, *_ in f["flips"] if model == which]
        if which == "adjusted":
            gains = (100 * np.asarray(g[1:]) for g in f["gains"])
            cells = [
                f"{cell} ({mean:+.2f} [{low:.2f}, {high:.2f}])"
                for cell, (mean, low, high) in zip(cells, gains, strict=True)
            ]
        rows.append(
            [title, f"{100 * share['accuracy']:.2f}", f"{100 * share['agreement']:.2f}", *cells]
        )
    return rows


def page(found: dict[str, Any], setup: Setup) -> str:
    """The tables as Markdown."""
    command = f"python benchmarks/adjusted_files.py --arch {' '.join(found)} --page ..."
    bers = " | ".join(f"{ber:g}" for ber in BERS)
    lines = [
        "# Other quantizers' files, adjusted",
        "",
        f"Written by `{command}` on {time.strftime('%Y-%m-%d')}"
        f" ({platform.machine()}, {os.cpu_count()} cores); no figure is typed by hand.",
        "",
        "What `resq-export FILE.onnx --adjust` does to INT8 files of other tools",
        "([stage III](stage-3.md#7-files-that-are-quantized-already)), beside our own export of the same network",
        f"without and with it: design BER {setup.design[0]:g}, {setup.calibration} calibration images. In percent:",
        f"accuracy and agreement with FP32 on {setup.test} test images of {setup.data}, then accuracy on the first",
        f"{setup.faulty} of them with every bit of every weight flipped at the rate of the column; in brackets",
        "points above the file as it is, trial by trial, with 95% intervals. By TensorRT's rules, ours by default,",
        "inner layers of fewer than 16 channels stay float: these flips do not reach them.",
        "",
    ]
    for arch, f in found.items():
        trials = " / ".join(str(setup.of(arch).trials_at(ber)) for ber in BERS)
        lines += [
            f"## {arch}",
            "",
            f"FP32 {100 * f['fp32']:.2f}, {100 * f['fp32_of_flipped']:.2f} on the images under faults;"
            f" {trials} trials.",
            "",
            f"| | accuracy | agreement | {bers} |",
            "| --- | ---: | ---: |" + " ---: |" * len(BERS),
        ]
        for name, each in f["files"].items():
            lines += ["| " + " | ".join(row) + " |" for row in table_row(name, each)]
        kept = [
            f"{TITLES[n]} {e['kept']} ({e['seconds']} s)"
            for n, e in f["files"].items()
            if "kept" in e
        ]
        lines += ["", f"Kept by the guard: {'; '.join(kept)}.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
