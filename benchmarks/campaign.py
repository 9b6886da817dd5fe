"""Fault campaigns at the speed of inference: ResNet18 at 32x32, 256 images a trial.

    python benchmarks/campaign.py                       everything, about ten minutes on 2 cores
    python benchmarks/campaign.py --bundle model.resq   with trained weights, from a bundle of ResNet18
    python benchmarks/campaign.py --long 0              without the long campaign on resnet8

Sides, taken in turns, medians compared:
  ours        OrtRunner on the deployed file (TensorRT's Q/DQ rules), and on quantize_static's file
  ort s8      quantize_static (S8 activations, S8 weights, QDQ, per channel) in stock ONNX Runtime
  products    the network's multiply-accumulates alone, as one integer matrix product in ONNX Runtime
  openvino    the same INT8 files, the fastest of one or two streams and of three batches
  ber         each bit flipped with probability 1e-4, 256 images a trial
  seu         one bit a trial, suffix runs in blocks; against full INT8 runs without any injection cost
  shared      SEU trials in blocks against one by one, on one thread, resnet8 and ResNet18
  pytorchfi   one weight a trial in torch, float32 (`pip install pytorchfi`; without the package its
              own way is followed: copy the model, set one weight, run all images)
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import campaign_peers as peers
from campaign_peers import THREADS, Images, Side
from peak import peak_bytes

from resq_deploy.fault_models import parse, trial_rng
from resq_deploy.runtime.ort import OrtRunner
from resq_deploy.runtime.suffix import SuffixEngine
from resq_deploy.runtime.trials import Job, Row, run_trial, run_trials

IMAGES = 256


def pictures(count: int, seed: int = 0) -> Images:
    """Smooth random colour images in [0, 1], float32 [count, 3, 32, 32]."""
    coarse = np.random.default_rng(seed).random((count, 3, 8, 8), dtype=np.float32)
    fine = np.repeat(np.repeat(coarse, 4, axis=2), 4, axis=3)
    return np.ascontiguousarray((fine + np.roll(fine, 2, 2) + np.roll(fine, 2, 3)) / 3)


def deployed(fp32: onnx.ModelProto, images: Images) -> onnx.ModelProto:
    """The INT8 graph as the exporter writes it."""
    from resq_deploy.export.calibrate import calibrate
    from resq_deploy.export.qdq import quantize_graph
    from resq_deploy.export.rules import plan

    return quantize_graph(fp32, calibrate(fp32, plan(fp32).activations, np.split(images, 4)))


def float_graph(name: str, images: Images) -> onnx.ModelProto:
    """A network with random weights as FP32 ONNX."""
    from resq_deploy.export.graph import Preprocessed, to_onnx

    wrapped = Preprocessed(peers.network(name, images), [0.5] * 3, [0.25] * 3)
    return to_onnx(wrapped, (3, 32, 32), name=name)


def files(
    folder: Path, bundle: str | None
) -> tuple[tuple[Path, Path, Path], Images, tuple[Any, Images]]:
    """The FP32 file, the deployed one, quantize_static's; the images to run; the torch network with what it is fed."""
    fp32, int8, s8 = (folder / f"{name}.onnx" for name in ("fp32", "int8", "s8"))
    if bundle:
        from resq_deploy.bundle import Bundle

        opened = Bundle.open(bundle)
        fp32, int8, images = opened.fp32, opened.int8, opened.eval_sample().images[:IMAGES]
        net, prepared = peers.trained(opened)
        batch = prepared(images)
    else:
        images = pictures(IMAGES)
        net, batch = peers.network("resnet18", images), (images - 0.5) / 0.25
        graph = float_graph("resnet18", images)
        onnx.save(graph, fp32)
        onnx.save(deployed(graph, images[:64]), int8)
    peers.stock_s8(fp32, s8, images)
    images = np.ascontiguousarray(images)
    return (fp32, int8, s8), images, (net, np.ascontiguousarray(batch, np.float32))


def golden_rates(
    fp32: Path, int8: Path, s8: Path, images: Images, rounds: int
) -> tuple[dict[str, float], OrtRunner]:
    """Golden throughput of all sides on both files."""
    ours = OrtRunner(onnx.load(int8), threads=THREADS)
    ours_s8 = OrtRunner(onnx.load(s8), threads=THREADS)
    sides: dict[str, Side] = {
        "ours, deployed file": lambda: len(ours(images)),
        "ours, quantize_static file": lambda: len(ours_s8(images)),
        "integer products alone": peers.products(fp32),
    }
    for label, path in (("deployed", int8), ("quantize_static", s8)):
        for who, make in (("ort", peers.stock_ort), ("openvino", peers.openvino)):
            setting, side = peers.best(make(path, images))
            print(f"{who} on the {label} file is fastest at: {setting}", flush=True)
            sides[f"{who}, {label} file"] = side
    return peers.in_turns(sides, rounds), ours


def trials(engine: SuffixEngine, word: str, count: int, seed: int) -> Iterator[Any]:
    """The flips of a campaign on the INT8 weights."""
    space = engine.runner.space.select(kinds=["weights"])
    model = parse(word)
    for trial in range(count):
        yield model.sample(space, trial_rng(seed, trial))


def faulty_rates(
    runner: OrtRunner, images: Images, seu: int, ber: int
) -> tuple[dict[str, float], SuffixEngine]:
    """Seconds of one golden run, one BER trial, one SEU trial of a block, one full run with its injection."""
    engine = SuffixEngine(runner, images)
    spent: dict[str, list[float]] = {"golden": [], "ber": [], "seu": [], "full": []}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        result = work()
        spent[name].append(time.perf_counter() - began)
        return result

    def full(flips: Any) -> Any:
        with runner.faults(flips):
            return runner(images)

    singles = list(trials(engine, "seu", seu, seed=1))
    block = max(1, seu // ber)
    for turn, flips in enumerate(trials(engine, "ber:1e-4", ber, seed=2)):
        timed("golden", partial(runner, images))
        timed("ber", partial(engine.run, flips))
        some = singles[turn * block : (turn + 1) * block]
        got = timed("seu", partial(engine.run_many, some))
        spent["seu"][-1] /= len(some)
        want = timed("full", partial(full, some[0]))
        if got[0].tobytes() != want.tobytes():
            raise SystemExit("a suffix run differs from the full run")
    means = {name: statistics.mean(found) for name, found in spent.items()}
    middle = {name: statistics.median(spent[name]) for name in ("golden", "ber", "full")}
    return {**means, **middle}, engine


def sharing(file: Path, images: Images, count: int, rounds: int) -> float:
    """SEU trials/s in blocks over trials/s one by one, on one thread; both give the same rows."""
    runner = OrtRunner(onnx.load(file), threads=1)
    engine = SuffixEngine(runner, images)
    golden = engine.golden()
    labels = golden.argmax(1).astype(np.int64)
    job = Job(parse("seu"), runner.space.select(kinds=["weights"]), 0, labels)
    block, spent = list(range(count)), (list[float](), list[float]())
    rows = (list[Row](), list[Row]())
    ways: tuple[Callable[[], Any], ...] = (
        lambda: [run_trial(engine, golden, job, trial) for trial in block],
        lambda: [r for some in run_trials(engine, golden, job, block) for r in some],
    )
    for _ in range(rounds):
        for way, seconds, found in zip(ways, spent, rows, strict=True):
            began = time.perf_counter()
            found[:] = [replace(row, seconds=0.0) for row in way()]
            seconds.append(time.perf_counter() - began)
    if rows[0] != rows[1]:
        raise SystemExit("a block gives other rows than single trials")
    single, together = (statistics.median(seconds) for seconds in spent)
    print(
        f"{len(images):4d} images, {file.stem}: {single / count * 1e3:.2f} ms a trial alone,",
        end=" ",
    )
    print(f"{together / count * 1e3:.2f} ms in blocks of {count}", flush=True)
    return single / together


def shared(int8: Path, images: Images, rounds: int) -> dict[str, float]:
    """What blocks gain: resnet8 on 16, 64 and 256 images, and ResNet18 on all."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        small, own = Path(folder) / "resnet8.onnx", pictures(256)
        onnx.save(deployed(float_graph("resnet8", own), own[:64]), small)
        for count in (16, 64, 256):
            key = f"seu_shared_vs_single_resnet8_{count}"
            found[key] = sharing(small, own[:count], max(64, 4096 // count), rounds)
    found["seu_shared_vs_single_resnet18"] = sharing(int8, images, 16, max(1, rounds // 2))
    return {"seu_shared_vs_single": found["seu_shared_vs_single_resnet8_16"], **found}


def long_campaign(count: int, file: str) -> None:
    """In a process of its own, without torch: SEU trials, then peak memory and seconds as JSON."""
    from resq_deploy.runtime.campaign import Inline, Rule, run_campaign

    runner = OrtRunner(onnx.load(file), threads=1)
    engine = SuffixEngine(runner, pictures(16))
    labels = engine.golden().argmax(1).astype(np.int64)
    job = Job(parse("seu"), runner.space.select(kinds=["weights"]), 0, labels)
    began = time.perf_counter()
    run_campaign(Inline(engine), job, rule=Rule(trials=count))
    seconds = time.perf_counter() - began
    print(json.dumps({"trials": count, "seconds": seconds, "peak": peak_bytes()}))


def memory(long: int) -> dict[str, float]:
    """Peak memory and time of `long` trials over those of 1,000."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        file, images = f"{folder}/resnet8.onnx", pictures(64)
        onnx.save(deployed(float_graph("resnet8", images), images), file)
        for count in (1000, long):
            command = [sys.executable, __file__, "--child", str(count), file]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            peak, each = found[-1]["peak"] / 2**20, found[-1]["seconds"] / count * 1e3
            print(f"resnet8, {count} SEU trials: {peak:.0f} MiB, {each:.2f} ms each", flush=True)
    short, big = found
    linear = (big["seconds"] / long) / (short["seconds"] / 1000)
    return {"memory_ratio": big["peak"] / short["peak"], "time_per_trial_ratio": linear}


def report(
    rates: Mapping[str, float], cost: Mapping[str, float], torch_s: float
) -> dict[str, float]:
    """Print what was measured; the ratios."""
    for name, rate in rates.items():
        print(f"golden      {name:32s} {rate:8.1f} images/s")
    for name, seconds in cost.items():
        print(f"a trial     {name:32s} {seconds * 1e3:8.1f} ms")
    mine = rates["ours, deployed file"]
    return {
        "golden_images_per_s": mine,
        "golden_vs_ort_s8": mine / rates["ort, quantize_static file"],
        "golden_vs_ort_same_file": mine / rates["ort, deployed file"],
        "golden_vs_products": mine / rates["integer products alone"],
        "products_vs_ort_s8": rates["integer products alone"] / rates["ort, quantize_static file"],
        "golden_vs_openvino": mine / rates["openvino, deployed file"],
        "s8_file_vs_openvino": rates["ours, quantize_static file"]
        / rates["openvino, quantize_static file"],
        "s8_file_vs_ort": rates["ours, quantize_static file"] / rates["ort, quantize_static file"],
        "ber_vs_golden": cost["golden"] / cost["ber"],
        "seu_trials_per_s": 1 / cost["seu"],
        "seu_vs_full": cost["golden"] / cost["seu"],
        "seu_vs_pytorchfi": torch_s / cost["seu"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", help="a bundle of ResNet18 at 32x32")
    parser.add_argument("--rounds", type=int, default=7, help="turns each side takes")
    parser.add_argument("--seu", type=int, default=240, help="SEU trials")
    parser.add_argument("--ber", type=int, default=8, help="BER trials")
    parser.add_argument("--pytorchfi", type=int, default=3, help="trials in torch")
    parser.add_argument("--long", type=int, default=100_000, help="SEU trials on resnet8, 0: none")
    parser.add_argument("--shared", type=int, default=1, help="0: not what blocks of trials gain")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    if args.child:
        return long_campaign(int(args.child[0]), args.child[1])
    with tempfile.TemporaryDirectory() as folder:
        graphs, images, (net, batch) = files(Path(folder), args.bundle)
        rates, runner = golden_rates(*graphs, images, args.rounds)
        cost, engine = faulty_rates(runner, images, args.seu, args.ber)
        gains = shared(graphs[1], images, args.rounds) if args.shared else {}
    name, seconds = peers.pytorchfi(net, batch, args.pytorchfi)
    ratios = report(rates, {**cost, f"torch, {name}": seconds}, seconds)
    print(f"suffix runs: {engine.info['bytes'] / 2**20:.0f} MiB of golden tensors, {engine.work}")
    extra = memory(args.long) if args.long else {}
    print(json.dumps({k: round(v, 3) for k, v in {**ratios, **gains, **extra}.items()}))
    return None


if __name__ == "__main__":
    main()
