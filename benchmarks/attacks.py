"""Attacks through the twin against attacks through FP32 gradients, all judged on the artifact, side by side in one run.

    python benchmarks/attacks.py plain.pt hard.pt          checkpoints of resq-harden (the last one is the headline)
    python benchmarks/attacks.py                           hardens both first, a few minutes each

For each network, on the same Fashion-MNIST test images at 8/255: PGD-20 (step 2/255, random start) through the twin,
through FP32 gradients, by torchattacks and by ART; images per second, in blocks whose order rotates, as medians of
ratios; accuracy of the deployed INT8 network on what they made; the Auto-PGD ensemble; how often the twin agrees with
the artifact; which part of Square's time the artifact's own inference takes. Ends with one JSON line.

Needs `pip install torchattacks`, and the extras export and attacks.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from resq_deploy.budget import Budget, check_budget, format_eps, parse_eps  # noqa: E402
from resq_deploy.bundle import Bundle, Sample  # noqa: E402
from resq_deploy.data import load  # noqa: E402
from resq_deploy.export.craft import craft  # noqa: E402
from resq_deploy.export.load import load_model  # noqa: E402
from resq_deploy.export.pipeline import export_model  # noqa: E402
from resq_deploy.export.twin import Twin  # noqa: E402
from resq_deploy.metrics import top1  # noqa: E402
from resq_deploy.runtime import blackbox  # noqa: E402
from resq_deploy.runtime.runner import Runner, open_runner  # noqa: E402
from resq_deploy.statistics import wilson  # noqa: E402

STEPS = 20
STEP_SIZE = 2 / 255
BLOCK = 100
Images = NDArray[np.float32]
Make = Callable[[Sample, int], Images]  # images, block number -> adversarial images


def main() -> None:
    """Measure each network, print a table, end with one JSON line."""
    args = _arguments()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(p) for p in args.checkpoints] or _hardened(Path(folder))
        found = {path.stem: _measure(path, Path(folder), args) for path in paths}
    headline = found[list(found)[-1]]
    keys = ("artifact_accuracy", "square_inference_share")
    line = {
        "benchmark": "attacks",
        "eps": format_eps(args.eps),
        "threads": args.threads,
        "pgd_speed_vs_torchattacks": min(f["pgd_speed_vs_torchattacks"] for f in found.values()),
        "pgd_speed_vs_art": min(f["pgd_speed_vs_art"] for f in found.values()),
        **{key: headline[key] for key in keys},
        "networks": found,
    }
    print(json.dumps(line))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoints", nargs="*")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--agreement-samples", type=int, default=10_000)
    parser.add_argument("--square-samples", type=int, default=500)
    parser.add_argument("--square-queries", type=int, default=1000)
    parser.add_argument("--apgd-steps", type=int, default=100)
    parser.add_argument("--eps", type=parse_eps, default=8 / 255)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--adjust", action="store_true", help="with stage III")
    return parser.parse_args()


def _hardened(folder: Path) -> list[Path]:
    from resq_deploy.hardening.pipeline import harden_model

    for stages, name in (("none", "plain"), ("1+2", "hard")):
        print(f"hardening {name} ...", flush=True)
        harden_model("resnet8", "fashion-mnist", stages=stages, output=folder / f"{name}.pt")  # type: ignore[arg-type]
    return [folder / "plain.pt", folder / "hard.pt"]


def _measure(path: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    target = folder / f"{path.stem}.resq"
    bundle = export_model(path, target, attacks=(), eval_samples=64, adjust=args.adjust)
    fp32 = load_model(path).module
    assert fp32 is not None
    fp32.eval().requires_grad_(False)
    data = load("fashion-mnist", "test", shape=bundle.manifest.input.shape)
    images, labels = data.batch(np.arange(args.samples))
    sample = Sample(images, labels, np.arange(args.samples))
    with open_runner(bundle, threads=args.threads) as runner:
        twin = Twin(bundle.int8).eval()
        print(
            f"\n{path.stem}: {len(sample)} images, eps {format_eps(args.eps)}, {args.threads} thread(s)"
        )
        clean = _accuracy(runner, sample.images, sample.labels)
        print(f"  accuracy of the artifact, clean                 {_percent(clean, len(sample))}")
        found: dict[str, Any] = {"clean": clean}
        found |= _pgd(runner, twin, fp32, sample, args)
        found |= _ensemble(runner, twin, sample, args)
        found |= _agreement(runner, twin, bundle, data, args)
        found |= _square(runner, sample.take(args.square_samples), args)
    best_other = min(v for k, v in found["artifact_accuracy"].items() if k != "twin")
    found["twin_at_least_as_strong"] = found["artifact_accuracy"]["twin"] <= best_other
    found["ensemble_not_above_pgd"] = (
        found["ensemble_accuracy"] <= found["artifact_accuracy"]["twin"]
    )
    return found


def _pgd(
    runner: Runner, twin: nn.Module, fp32: nn.Module, sample: Sample, args: argparse.Namespace
) -> dict[str, Any]:
    """The same PGD-20 four times over."""
    makers = {
        "twin": _ours(twin, args.eps),
        "fp32_gradients": _ours(fp32, args.eps),
        "torchattacks": _torchattacks(fp32, args.eps),
        "art": _art(fp32, sample, args.eps),
    }
    made, seconds = _interleaved(makers, sample)
    accuracy = {}
    for name, images in made.items():
        if name in ("twin", "fp32_gradients"):
            check_budget(sample.images, images, args.eps)
        accuracy[name] = _accuracy(runner, images, sample.labels)
        rate = BLOCK / statistics.median(seconds[name])
        shown = _percent(accuracy[name], len(sample))
        print(f"  PGD-20 by {name:<15} {rate:8.1f} images/s   artifact {shown}")
    ratios = {
        name: statistics.median(
            other / ours for other, ours in zip(seconds[name], seconds["twin"], strict=True)
        )
        for name in ("fp32_gradients", "torchattacks", "art")
    }
    print(
        "  speed through the twin against theirs on FP32: "
        + ", ".join(f"{name} {ratio:.2f}x" for name, ratio in ratios.items())
    )
    return {
        "artifact_accuracy": accuracy,
        "pgd_images_per_second": {k: BLOCK / statistics.median(v) for k, v in seconds.items()},
        "pgd_speed_vs_fp32": ratios["fp32_gradients"],
        "pgd_speed_vs_torchattacks": ratios["torchattacks"],
        "pgd_speed_vs_art": ratios["art"],
    }


def _interleaved(
    makers: dict[str, Make], sample: Sample
) -> tuple[dict[str, Images], dict[str, list[float]]]:
    """Each on the same blocks of images, in an order that rotates, so that a busy machine is busy for all."""
    names = list(makers)
    parts: dict[str, list[Images]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        makers[name](_rows(sample, 0, 16), 0)  # warm up
    for number, start in enumerate(range(0, len(sample), BLOCK)):
        block = _rows(sample, start, start + BLOCK)
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            begin = time.perf_counter()
            parts[name].append(makers[name](block, number))
            seconds[name].append((time.perf_counter() - begin) * BLOCK / len(block))
    return {name: np.concatenate(p) for name, p in parts.items()}, seconds


def _rows(sample: Sample, start: int, end: int) -> Sample:
    rows = slice(start, end)
    return Sample(sample.images[rows], sample.labels[rows], sample.indices[rows])


def _ours(network: nn.Module, eps: float) -> Make:
    def make(block: Sample, number: int) -> Images:
        options = {"steps": STEPS, "step_size": STEP_SIZE}
        return craft(network, block, "pgd", eps, batch=BLOCK, seed=number, **options)

    return make


def _torchattacks(network: nn.Module, eps: float) -> Make:
    import torchattacks

    attack = torchattacks.PGD(network, eps=eps, alpha=STEP_SIZE, steps=STEPS, random_start=True)

    def make(block: Sample, number: int) -> Images:
        torch.manual_seed(number)
        found: Images = attack(
            torch.from_numpy(block.images), torch.from_numpy(block.labels)
        ).numpy()
        return found

    return make


def _art(network: nn.Module, sample: Sample, eps: float) -> Make:
    from art.attacks.evasion import ProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    view = PyTorchClassifier(
        network,
        nn.CrossEntropyLoss(),
        sample.images.shape[1:],
        int(sample.labels.max()) + 1,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    attack = ProjectedGradientDescent(
        view,
        norm=np.inf,
        eps=eps,
        eps_step=STEP_SIZE,
        max_iter=STEPS,
        num_random_init=1,
        batch_size=BLOCK,
        verbose=False,
    )

    def make(block: Sample, number: int) -> Images:
        np.random.seed(number)  # noqa: NPY002 - the toolbox draws from global state
        torch.manual_seed(number)
        found: Images = attack.generate(block.images, y=block.labels)
        return found

    return make


def _ensemble(
    runner: Runner, twin: nn.Module, sample: Sample, args: argparse.Namespace
) -> dict[str, Any]:
    """APGD-CE, then APGD-T on what still stands on the artifact: worst case per image."""
    standing = top1(runner(sample.images)) == sample.labels
    left = {}
    for name in ("apgd", "apgd-t"):
        rows = np.flatnonzero(standing)
        part = Sample(sample.images[rows], sample.labels[rows], sample.indices[rows])
        if len(part):
            made = craft(twin, part, name, args.eps, steps=args.apgd_steps)
            standing[rows] &= top1(runner(made)) == part.labels
        left[name] = float(standing.mean())
        print(
            f"  after {name:<7} through the twin                  {_percent(left[name], len(sample))}"
        )
    return {"after": left, "ensemble_accuracy": float(standing.mean())}


def _agreement(
    runner: Runner, twin: nn.Module, bundle: Bundle, data: Any, args: argparse.Namespace
) -> dict[str, Any]:
    same = total = 0
    for start in range(0, min(args.agreement_samples, len(data.labels)), 500):
        end = min(start + 500, args.agreement_samples, len(data.labels))
        images, _ = data.batch(np.arange(start, end))
        with torch.no_grad():
            ours = twin(torch.from_numpy(images)).numpy()
        same += int((top1(ours) == top1(runner(images))).sum())
        total += end - start
    print(f"  top-1 of the twin is the artifact's on          {same} of {total} images")
    return {"twin_agreement": same / total, "agreement_images": total}


def _square(runner: Runner, sample: Sample, args: argparse.Namespace) -> dict[str, Any]:
    counted = blackbox.Counted(runner)
    begin = time.perf_counter()
    budget = Budget("linf", args.eps)
    made = blackbox.attack(counted, sample, "square", budget, queries=args.square_queries)
    seconds = time.perf_counter() - begin
    share = counted.seconds / seconds
    accuracy = _accuracy(runner, made, sample.labels)
    print(
        f"  Square, {args.square_queries} queries, {len(sample)} images: accuracy {accuracy:.1%}, "
        f"{counted.images / seconds:,.0f} queries/s, {share:.1%} of {seconds:.0f} s in the artifact"
    )
    return {
        "square_inference_share": share,
        "square_accuracy": accuracy,
        "square_queries_per_second": counted.images / seconds,
    }


def _accuracy(runner: Runner, images: Images, labels: NDArray[np.int64]) -> float:
    return float((top1(runner(images)) == labels).mean())


def _percent(share: float, count: int) -> str:
    found = wilson(round(share * count), count)
    return f"{share:6.1%}  [{found.low:.1%}, {found.high:.1%}]"


if __name__ == "__main__":
    main()
