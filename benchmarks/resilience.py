"""The RESQ table on deployed INT8 bundles: what each stage buys against faults, attacks, and both at once.

    python benchmarks/resilience.py                                   Fashion-MNIST, resnet8 and a narrow ResNet18
    python benchmarks/resilience.py --data cifar10:DIR --networks resnet18,vgg16,efficientnet_b0,swin_t

Trains, exports and validates every row for every seed. Everything it makes is kept under --work, so an interrupted run
goes on where it stopped. Writes docs/results.md, and ends with one JSON line:
{network: {row: {column: [mean, low, high]}}}, intervals over seeds (Student's t, 95%).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from resilience_page import BERS, DESIGN_BER, JOINT_BER, Network, Setup, page

ROOT = Path(__file__).resolve().parents[1]
EPS = 8 / 255
ATTACKS = ("pgd", "apgd", "apgd-t")
ROWS = ("plain PTQ", "I", "II", "I+II", "I+II+III")
# row -> (the row its weights start from, --stages), and whether stage III adjusts it
TRAINED = {
    "plain PTQ": (None, "none"),
    "I": ("plain PTQ", "1"),
    "II": ("plain PTQ", "2"),
    "I+II": ("I", "2"),
}


def parse_network(text: str, epochs: tuple[float, float, float]) -> Network:
    """`resnet18:width=16` -> a Network."""
    arch, _, rest = text.partition(":")
    pairs = dict(part.split("=", 1) for part in rest.split(",") if part)
    return Network(text, arch, {k: json.loads(v) for k, v in pairs.items()}, epochs)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument(
        "--networks", default="resnet8 resnet18:width=16", help="separated by blanks"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--epochs", default="5,2,2", help="of plain training, stage I, stage II")
    parser.add_argument("--images", type=int, default=1000, help="under faults")
    parser.add_argument("--attacked", type=int, default=500, help="under attack")
    parser.add_argument("--trials", type=int, default=20, help="fault trials a BER")
    parser.add_argument("--amp", default="bf16", choices=["off", "bf16", "fp16"])
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=ROOT / ".bench" / "resilience")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results.md")
    given = parser.parse_args()
    if given.threads:
        os.environ["OMP_NUM_THREADS"] = str(given.threads)
        import torch

        torch.set_num_threads(given.threads)
    plain, one, two = map(float, given.epochs.split(","))
    networks = [parse_network(n, (plain, one, two)) for n in given.networks.split()]
    setup = Setup(
        given.data,
        given.work,
        tuple(map(int, given.seeds.split(","))),
        given.images,
        given.attacked,
        given.trials,
        given.amp,
    )
    setup.work.mkdir(parents=True, exist_ok=True)
    # one seed of every network first, so that an early look has all rows
    measured: dict[str, dict[str, list[dict[str, float]]]] = {n.name: {} for n in networks}
    for seed in setup.seeds:
        for network in networks:
            for row in ROWS:
                figures = measure(setup, network, row, seed)
                measured[network.name].setdefault(row, []).append(figures)
                print(f"{network.name} seed {seed} {row:9} {show(figures)}", flush=True)
    table = {n: {r: summarize(runs) for r, runs in rows.items()} for n, rows in measured.items()}
    given.results.write_text(page(table, setup, networks))
    print(json.dumps(table, sort_keys=True))


def measure(setup: Setup, network: Network, row: str, seed: int) -> dict[str, float]:
    """The figures of one row and seed, from the cache if they were measured before with these settings."""
    place = setup.work / slug(f"{setup.data}-{network.name}-{seed}")
    place.mkdir(parents=True, exist_ok=True)
    kept = place / f"{slug(row)}.json"
    key = {"images": setup.images, "attacked": setup.attacked, "trials": setup.trials,
           "epochs": list(network.epochs), "amp": setup.amp, "bers": list(BERS)}  # fmt: skip
    if row.endswith("III"):
        key["design_ber"] = DESIGN_BER
    if kept.exists():
        found = json.loads(kept.read_text())
        if found["key"] == key:
            figures: dict[str, float] = found["figures"]
            return figures
    bundle = export(setup, network, row, seed, place)
    figures = validate(setup, bundle)
    kept.write_text(json.dumps({"key": key, "figures": figures}))
    return figures


def train(setup: Setup, network: Network, row: str, seed: int, place: Path) -> Path:
    """The checkpoint of a row: trained now, resumed, or there already."""
    from resq_deploy import harden_model
    from resq_deploy.console import Reporter
    from resq_deploy.hardening import Recipe

    recipe = Recipe(amp=setup.amp).with_epochs(*network.epochs)  # type: ignore[arg-type]
    path = place / f"{slug(row)}.pt"
    if path.exists() and not path.with_name(f"{path.name}.state").exists():
        return path
    before, stages = TRAINED[row]
    init = None if before is None else str(train(setup, network, before, seed, place))
    harden_model(
        network.arch,
        setup.data,
        output=path,
        stages=stages,  # type: ignore[arg-type]
        recipe=recipe,
        arch_args=network.args,
        init=init,
        seed=seed,
        resume=True,
        reporter=Reporter(quiet=False),
    )
    return path


def export(setup: Setup, network: Network, row: str, seed: int, place: Path) -> Any:
    """The deployed bundle of a row."""
    from resq_deploy import export_model
    from resq_deploy.bundle import Bundle, sha256_of

    checkpoint = train(setup, network, row.removesuffix("+III"), seed, place)
    path, note = place / f"{slug(row)}.resq", place / f"{slug(row)}.exported.json"
    key = [sha256_of(checkpoint), setup.images, setup.attacked, list(ATTACKS), EPS]
    key += [DESIGN_BER] if row.endswith("III") else []
    if note.exists() and path.exists() and json.loads(note.read_text()) == key:
        return Bundle.open(path)
    bundle = export_model(
        checkpoint,
        path,
        adjust=row.endswith("III"),
        **({"design_ber": DESIGN_BER} if row.endswith("III") else {}),
        eval=setup.data,
        eval_samples=setup.images,
        attacks=ATTACKS,
        attack_samples=setup.attacked,
        eps=EPS,
        seed=seed,
        force=True,
    )
    note.write_text(json.dumps(key))
    return bundle


def validate(setup: Setup, bundle: Any) -> dict[str, float]:
    """The deployed bundle's figures, fractions of 1; clean accuracy is over the whole test split."""
    from resq_deploy import validate_bundle
    from resq_deploy.budget import format_eps
    from resq_deploy.runtime.settings import Settings

    asked = Settings(
        samples=setup.images, ber=BERS, faults=(), trials=setup.trials, attacks=ATTACKS
    )
    apart = validate_bundle(bundle, asked)
    both = replace(asked, samples=setup.attacked, ber=(JOINT_BER,), attacks=("pgd",), joint=True)
    together = validate_bundle(bundle, both)
    eps = format_eps(EPS)
    columns = {
        "clean": clean_accuracy(setup, bundle),
        "PGD-20": apart.figures[f"robust@pgd,eps={eps}"].mean,
        "APGD": apart.figures[f"robust@worst,eps={eps}"].mean,
        "joint": together.figures[accuracy_at(JOINT_BER, f"pgd,eps={eps}")].mean,
    }
    return {**columns, **{f"BER {p:g}": apart.figures[accuracy_at(p)].mean for p in BERS}}


def accuracy_at(ber: float, on: str = "clean") -> str:
    """How a report names accuracy at a bit error rate."""
    from resq_deploy.runtime.evidence import campaign_names

    return campaign_names(f"ber:{ber:g}", on)["accuracy"]


def clean_accuracy(setup: Setup, bundle: Any) -> float:
    """Accuracy of the deployed INT8 network on every test image."""
    from resq_deploy import open_runner
    from resq_deploy.data import load
    from resq_deploy.metrics import top1

    test = load(setup.data, "test")
    with open_runner(bundle) as runner:
        right = sum(int((top1(runner(x)) == y).sum()) for x, y in test.batches(500))
    return right / len(test)


def summarize(runs: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """[mean, low, high] of each column over seeds, Student's t at 95% (one seed: no interval to give)."""
    from scipy import stats

    summary = {}
    for column in runs[0]:
        values = np.array([run[column] for run in runs])
        mean, half = float(values.mean()), 0.0
        if len(values) > 1:
            spread = float(values.std(ddof=1)) / math.sqrt(len(values))
            half = float(stats.t.ppf(0.975, len(values) - 1)) * spread
        summary[column] = [
            round(v, 4) for v in (mean, max(0.0, mean - half), min(1.0, mean + half))
        ]
    return summary


def show(figures: Mapping[str, float]) -> str:
    """One line for the terminal."""
    return "  ".join(f"{name} {100 * value:.1f}" for name, value in figures.items())


def slug(text: str) -> str:
    """A text as a file name."""
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)


if __name__ == "__main__":
    main()
