"""INT8 export against its peers, side by side: accuracy, accuracy under bit flips and attack, speed, time, memory.

    python benchmarks/export.py                                  resnet8, then the four networks of the paper
    python benchmarks/export.py --arch resnet8 --quick           a few minutes

On trained networks (Fashion-MNIST at 32x32): FP32; ours with and without stage III; onnxruntime's
quantize_static (S8 QDQ per channel, MinMax and entropy); NNCF's PTQ; ModelOpt's, where nvidia-modelopt[onnx]
is installed. A checkpoint is taken from
--checkpoints (or $RESQ_CHECKPOINTS) as ARCH-plain.pt, or as ARCH.pt (--arch resnet8-hard); what is
missing is trained, and kept there. Finished parts (accuracy, flips, the design BER on all images, attacks,
other quantizers' files under flips) of each network are kept too, as long as they are about the same
graphs, so an interrupted run goes on where it stopped (--fresh: measure again). Those of the documentation's page
are in benchmarks/results: with --results benchmarks/results --threads 1 --no-speed --page FILE it is written anew, in a
second. Ends with one JSON line.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import export_parts as parts
from export_material import Setup, checkpoint, material
from export_page import above_peers, page, spread
from export_parts import Graphs
from export_rounds import at_design

ARCHS = ("resnet8", "resnet18", "vgg16", "efficientnet_b0", "swin_t")
PARTS = {
    "accuracy": parts.accuracies,
    "flips": parts.under_flips,
    "rounds": at_design,
    "attacks": parts.under_attack,
    "peers": parts.peers_under_flips,
    "modelopt": parts.modelopt,
}
OTHERS = frozenset({"peers", "modelopt"})  # parts without a graph of ours
PGD = {"FP32": "pgd_fp32", "plain": "pgd_int8_plain", "int8": "pgd_int8"}


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
    parser.add_argument("--attacked", type=int, help="images under attack, in large networks too")
    parser.add_argument("--deep", type=int, help="trials at the design BER, where none are kept")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="measure again what was kept")
    parser.add_argument("--no-speed", action="store_true", help="leave out speed, time and memory")
    given = parser.parse_args()
    setup = Setup(threads=given.threads, seed=given.seed)
    setup = setup.quick() if given.quick else setup
    if given.attacked:
        setup = replace(setup, attacked=given.attacked, few=given.attacked)
    if given.design:
        setup = replace(setup, design=tuple(given.design))
    folder = given.checkpoints.expanduser()
    results = (given.results or folder / "export-benchmark").expanduser()
    results.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}, {time.strftime('%Y-%m-%d')}, {setup}\n")
    setups = {arch: setup.of(arch) for arch in given.arch}
    if given.deep:
        setups = {arch: replace(own, deep=given.deep) for arch, own in setups.items()}
    found = {arch: kept(arch, folder, results, setups[arch], given.fresh) for arch in given.arch}
    timed: dict[str, Any] = {}
    if not given.no_speed:
        arch = "resnet18" if "resnet18" in given.arch else given.arch[0]
        timed = timing(arch, checkpoint(arch, folder, setup.of(arch)), setup, results)
    if given.page:
        given.page.write_text(page(found, timings(results), setup))
    print(json.dumps({**found, **timed}, sort_keys=True))


def timings(results: Path) -> dict[str, Any]:
    """Speed, time and memory as they were measured last, by what the CPU multiplied bytes with."""
    path = results / "speed.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found


def timing(arch: str, path: Path, setup: Setup, results: Path) -> dict[str, Any]:
    """Measure speed, time and memory, and keep them."""
    from export_speed import products, speed

    timed = speed(arch, path, setup)
    timed["measured"] = f"{time.strftime('%Y-%m-%d')} with {commit()}, {machine()}"
    found = {**timings(results), products(): timed}
    (results / "speed.json").write_text(json.dumps(found, indent=1) + "\n")
    return timed


def machine() -> str:
    """What measures."""
    return f"{platform.machine()}, {os.cpu_count()} cores"


def kept(arch: str, folder: Path, results: Path, setup: Setup, fresh: bool) -> dict[str, Any]:
    """The figures of one network; a part is measured unless it is there for the same setup and the same graph."""
    path = results / f"{arch}.json"
    found: dict[str, Any] = {}
    if path.is_file() and not fresh:
        before = json.loads(path.read_text())
        found = {
            part: before[part]
            for part in PARTS
            if before.get(part, {}).get("setup") == needs(part, setup)
        }
    missing = [part for part in wanted() if part not in found]
    if missing:
        graphs = Graphs(material(checkpoint(arch, folder, setup), setup), setup)
        whole = all(part in found for part in PARTS if part not in OTHERS)
        found = {
            part: old
            for part, old in found.items()
            if (whole and part not in OTHERS) or old["graph"] == graph_of(part, graphs)
        }
    for part in [part for part in wanted() if part not in found]:
        start = time.perf_counter()
        figures = PARTS[part](graphs)
        print(f"{arch}: {part} measured in {time.perf_counter() - start:.0f} s", flush=True)
        measured = f"{time.strftime('%Y-%m-%d')} with {commit()}, {machine()}"
        found[part] = {
            "setup": needs(part, setup),
            "graph": graph_of(part, graphs),
            "measured": measured,
            "figures": figures,
        }
        path.write_text(json.dumps(found, indent=1) + "\n")
    when = {"measured": list(dict.fromkeys(found[part]["measured"] for part in found))}
    merged = when | {
        name: value for part in found.values() for name, value in part["figures"].items()
    }
    show(arch, merged)
    return merged


def needs(part: str, setup: Setup) -> dict[str, Any]:
    """What of the setup the figures of a part depend on, as JSON reads it back."""
    flips = ("faulty", "trials", "rare")
    own = {
        "accuracy": (),
        "flips": flips,
        "rounds": ("faulty",),  # how many trials is said beside them
        "attacks": ("attacked",),
        "peers": flips,
        "modelopt": flips,
    }
    every = ("calibration", "test", "threads", "epochs", "seed", "data")
    ours = () if part in OTHERS else ("design",)
    given = asdict(setup)
    found: dict[str, Any] = json.loads(
        json.dumps({name: given[name] for name in (*every, *ours, *own[part])})
    )
    return found


def wanted() -> list[str]:
    """The parts that can be measured here: ModelOpt's only where it is installed."""
    there = importlib.util.find_spec("modelopt") is not None
    return [part for part in PARTS if part != "modelopt" or there]


def graph_of(part: str, graphs: Graphs) -> str:
    """Which graph the figures of a part are about: ours, or the network."""
    return graphs.source if part in OTHERS else graphs.digest


def commit() -> str:
    """The commit that is measured, "+" if files were changed since."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "no commit"


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
    shares = (f"{who} {100 * f[key]:.2f}" for who, key in PGD.items())
    above = spread(f["pgd_ahead_of_fp32"]["int8"], 2)
    print(f"  PGD-20 8/255: {', '.join(shares)}: {above} points above FP32")
    print(f"  TensorRT-RTX: {f['tensorrt_rtx']}")
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
    r = f["rounds"]
    share = f"{spread(r['recovered'], 0)}%" if r["recovered"] else "no share told"
    print(
        f"  on all test images at {r['ber']:g}: plain loses {spread(r['lost'], 2)}, {share} recovered"
    )
    if "modelopt" in f:
        print(
            f"  ModelOpt: {100 * f['modelopt']:.2f}, agreement {100 * f['modelopt_agreement']:.2f}"
        )
    for name, ber, *share in (*f["peer_flips"], *f.get("modelopt_flips", ())):
        print(
            f"  {name} at {ber:g}: {100 * share[0]:.2f}%; ours above: {spread(above_peers(f)[name, ber], 2)}"
        )
    print(f"  (FP32 on these images: {100 * f['fp32_of_flipped']:.2f})")
    print(flush=True)


if __name__ == "__main__":
    main()
