"""Codes that cannot saturate on x86 without VNNI, and what they cost: ours, quantize_static's and NNCF's ways.

    python benchmarks/overflow.py                              resnet8; half an hour
    python benchmarks/overflow.py --arch resnet8 resnet18-narrow --page docs/overflow.md

Networks, checkpoints and calibration images are those of export.py. Each way once as it is by default and once kept
from saturating: resq-export --rules onnxruntime with --overflow-fix, quantize_static with reduce_range, NNCF with
overflow_fix (ENABLE). How an ordinary session of ONNX Runtime answers here beside one with
session.x64quantprecision=1, which is exact anywhere, and OpenVINO; times; accuracy under flips, of exact sums.
Finished files are kept. Ends with one JSON line.
"""

from __future__ import annotations

import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import export_peers as peers
from export_material import Material, Setup, arguments, checkpoint, material, ours, remembered
from export_parts import BERS, digest, flipped, interval, run

ROUNDS, BATCH = 9, 16
TITLES = {
    "ours": "ours, plain",
    "ours fixed": "ours, plain, `--overflow-fix`",
    "adjusted": "ours, stage III",
    "adjusted fixed": "ours, stage III, `--overflow-fix`",
    "static": "quantize_static, U8",
    "static fixed": "quantize_static, U8, `reduce_range`",
    "nncf": "NNCF",
    "nncf fixed": "NNCF, `overflow_fix`",
}


def main() -> None:
    """Measure every network, write the page, end with one JSON line."""
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    folder, setup = given.checkpoints.expanduser(), Setup(threads=1, seed=given.seed)
    found = {arch: kept(arch, folder, setup.of(arch)) for arch in given.arch}
    if given.page:
        given.page.write_text(page(found, setup))
    print(json.dumps(found, sort_keys=True))


def makers(m: Material, setup: Setup) -> dict[str, Callable[[], onnx.ModelProto]]:
    """What makes each file."""
    from resq_deploy.export.dialect import Dialect

    free, fixed = (Dialect("onnxruntime", overflow_fix=fix) for fix in (False, True))
    ber, images = setup.design[0], m.calibration
    return {
        "ours": lambda: ours(m, setup, None, free),
        "ours fixed": lambda: ours(m, setup, None, fixed),
        "adjusted": lambda: ours(m, setup, ber, free),
        "adjusted fixed": lambda: ours(m, setup, ber, fixed),
        "static": lambda: peers.ort_static(m.fp32, images, "minmax", unsigned=True),
        "static fixed": lambda: peers.ort_static(
            m.fp32, images, "minmax", unsigned=True, reduced=True
        ),
        "nncf": lambda: peers.nncf_ptq(m.fp32, images),
        "nncf fixed": lambda: peers.nncf_ptq(m.fp32, images, overflow_fix=True),
    }


def kept(arch: str, folder: Path, setup: Setup) -> dict[str, Any]:
    """The figures of one network: file by file, measured now or kept from before; speed is measured anew."""
    m = material(checkpoint(arch, folder, setup), setup)
    place = folder / "overflow"
    path = place / f"{arch}.json"
    found = remembered(path, [digest([m.fp32]), setup.faulty, setup.trials, setup.seed])
    exact = run(m.fp32, m.test, setup).argmax(1)
    found["fp32"] = float((exact == m.labels).mean())
    found["fp32_of_flipped"] = float((exact == m.labels)[: setup.faulty].mean())
    for name, make in makers(m, setup).items():
        file = place / f"{arch}-{name.replace(' ', '-')}.onnx"
        if name not in found["files"] or not file.is_file():
            onnx.save(make(), file)
            found["files"][name] = measured(onnx.load(file), m, exact, setup)
            path.write_text(json.dumps(found, indent=1))
        print(f"{arch}: {' '.join(row(name, found['files'][name]))}", flush=True)
    models = {name: onnx.load(place / f"{arch}-{name.replace(' ', '-')}.onnx") for name in TITLES}
    found["seconds"] = speed(models, m, setup)
    return found


def measured(model: onnx.ModelProto, m: Material, reference: Any, setup: Setup) -> dict[str, Any]:
    """Answers of sessions and of OpenVINO, and accuracy under flips."""
    from resq_deploy import saturation
    from resq_deploy.export.qdq_file import canonical

    logits = {way: answers(each, m) for way, each in ways(model, setup).items()}
    taken = canonical(model)
    trials = flipped({"file": taken}, m, setup)
    found: dict[str, Any] = {
        way: {
            "accuracy": float((values.argmax(1) == m.labels).mean()),
            "agreement": float((values.argmax(1) == reference).mean()),
        }
        for way, values in logits.items()
    }
    same = (logits["session"] == logits["exact"]).all(axis=1)
    apart = logits["openvino"].argmax(1) != logits["exact"].argmax(1)
    return {
        **found,
        "same_bits": float(same.mean()),
        "openvino_apart": float(apart.mean()),
        "saturates": saturation.could(taken),
        "flips": [[ber, *interval(shares)] for (_, ber), shares in trials.items()],
        "measured": time.strftime("%Y-%m-%d"),
    }


def ways(model: onnx.ModelProto, setup: Setup) -> dict[str, peers.Run]:
    """What runs a file: images -> outputs."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        onnx.save(model, file)
        return {
            "session": peers.session(model, setup.threads),
            "exact": peers.session(model, setup.threads, exact=True),
            "openvino": peers.openvino(file, setup.threads),
        }


def answers(one: peers.Run, m: Material) -> Any:
    """Logits of all test images."""
    return np.concatenate([one(m.test[i : i + 250])[0] for i in range(0, len(m.test), 250)])


def speed(
    models: dict[str, onnx.ModelProto], m: Material, setup: Setup
) -> dict[str, dict[str, float]]:
    """Median seconds for BATCH images, by file and way."""
    runs = {(name, way): r for name, f in models.items() for way, r in ways(f, setup).items()}
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    for (name, way), seconds in peers.interleaved(runs, m.test[:BATCH], ROUNDS).items():
        found[name][way] = seconds
    return found


def row(name: str, f: dict[str, Any]) -> list[str]:
    """One file in the table."""
    shares = [f"{100 * f[way]['accuracy']:.2f}" for way in ("session", "exact")]
    agreed = [f"{100 * f['exact']['agreement']:.2f}", f"{100 * f['same_bits']:.1f}"]
    apart = f"{100 * f['openvino_apart']:.2f}"
    flips = [
        f"{100 * mean:.2f} [{100 * low:.2f}, {100 * high:.2f}]" for _, mean, low, high in f["flips"]
    ]
    can = "yes" if f["saturates"] else "no"
    return [TITLES[name], can, *shares, *agreed, apart, *flips]


def page(found: dict[str, Any], setup: Setup) -> str:
    """The tables as Markdown."""
    import onnxruntime as ort

    from resq_deploy.runtime import cpu

    kind = (
        "byte products saturate here" if cpu.saturates() else "byte products do not saturate here"
    )
    lines = [
        "# Codes that cannot saturate",
        "",
        f"Written by `python benchmarks/overflow.py --arch {' '.join(found)} --page ...` on {time.strftime('%Y-%m-%d')}"
        f" ({platform.machine()}, {kind}, one thread, ONNX Runtime {ort.__version__}); no figure is typed by hand.",
        "",
        "On x86 without VNNI a session adds two byte products in 16 bits, and they can saturate",
        "([how codes are kept from it](stage-3.md#9-codes-that-cannot-saturate)). One FP32 graph, one set of",
        f"{setup.calibration} calibration images. In percent: accuracy on {setup.test} test images of {setup.data}",
        "in a session as it is by default and in one with `session.x64quantprecision=1` (`exact`), its agreement",
        "with FP32, how many images got the same logits from both, to the last bit, and how many OpenVINO classifies",
        f"otherwise than the exact session; then accuracy on the first {setup.faulty} images with every bit of",
        "every weight flipped at the rate of the column (exact sums, 95% intervals).",
        "",
    ]
    heads = ["", "could saturate", "session", "exact", "agreement", "same bits", "OpenVINO apart"]
    heads += [f"{ber:g}" for ber in BERS]
    for arch, f in found.items():
        trials = " / ".join(str(setup.of(arch).trials_at(ber)) for ber in BERS)
        lines += [
            f"## {arch}",
            "",
            f"FP32 {100 * f['fp32']:.2f}, {100 * f['fp32_of_flipped']:.2f} on the images under faults;"
            f" {trials} trials.",
            "",
            f"| {' | '.join(heads)} |",
            "| --- | --- |" + " ---: |" * (len(heads) - 2),
            *("| " + " | ".join(row(name, each)) + " |" for name, each in f["files"].items()),
            "",
            f"Milliseconds an image, batches of {BATCH}, medians of {ROUNDS} interleaved rounds:",
            "",
            "| | session | exact | OpenVINO |",
            "| --- | ---: | ---: | ---: |",
            *(
                f"| {TITLES[name]} | {' | '.join(f'{1e3 * s / BATCH:.3g}' for s in taken.values())} |"
                for name, taken in f["seconds"].items()
            ),
            "",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
