"""A bundle is written: graphs, held-out sample, adversarial inputs, and the manifest that accounts for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx

from resq_deploy.budget import parse_eps
from resq_deploy.bundle import EVAL, FP32, INT8, Bundle, BundleWriter, Sample, compact, sha256_of
from resq_deploy.console import Reporter
from resq_deploy.export import describe, footprint, joint
from resq_deploy.export.craft import craft, parameters_of, zero_gradients
from resq_deploy.export.load import LoadedModel
from resq_deploy.export.twin import Twin
from resq_deploy.manifest import Adjustment, Reference


@dataclass(frozen=True, slots=True, eq=False)
class Made:
    """What a bundle is about, and the manifest's account of it.

    `deployed` is `int8`, its float part perhaps in another type. `obstacle`: why there are no gradients of it. `mean`,
    `std`: the preprocessing inside. `sha256`: of the file that it was made of. `reference`: what
    `fp32` is.
    """

    fp32: onnx.ModelProto
    int8: onnx.ModelProto
    deployed: onnx.ModelProto
    quantization: Mapping[str, Any]
    record: Adjustment
    obstacle: str | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    calibration: Mapping[str, Any]
    reference: Reference = "fp32"


@dataclass(frozen=True, slots=True)
class Exposure:
    """What adversarial inputs to craft: `attacks` and, for each of `trials` draws of faults, `faulty`.

    Within `eps` (L-inf, pixels of [0, 1]), on the first `samples` images of the held-out sample.
    """

    attacks: tuple[str, ...]
    faulty: tuple[joint.FaultyAttack, ...]
    eps: float | str
    samples: int
    trials: int
    seed: int


def write(
    target: Path,
    made: Made,
    held_out: Sample,
    exposure: Exposure,
    entries: Mapping[str, Any],
    *,
    force: bool,
    reporter: Reporter,
) -> Bundle:
    """Write a bundle to `target`; `entries`: of the manifest, what `made` does not know.

    Raises BundleError where it cannot be written; nothing is left there then.
    """
    with BundleWriter(target, force=force) as writer:
        _save(made.fp32, writer.dir / FP32)
        _save(made.deployed, writer.dir / INT8)
        _save_sample(writer, EVAL, held_out)
        exposed = held_out.take(exposure.samples)
        crafted = dict(_attacks(writer, made, exposed, exposure, reporter))
        for name, moved, account in joint.sets(
            made.int8,
            made.deployed,
            exposed,
            exposure.faulty,
            exposure.eps,
            exposure.trials,
            exposure.seed,
            reporter,
        ):
            _save_sample(writer, f"attacks/{name}.npz", moved)
            crafted[name] = account | {"model_sha256": sha256_of(writer.dir / INT8)}
        name = target.name.removesuffix(".resq") or "model"
        own = {"quantization": made.quantization, "adjustment": made.record, "attacks": crafted}
        return writer.finish({"name": name, **entries, **own})


def input_of(shape: tuple[int, int, int], made: Made) -> dict[str, Any]:
    """The manifest's account of what the artifact eats."""
    name = made.deployed.graph.input[0].name
    return {"name": name, "shape": shape, "mean": made.mean, "std": made.std}


def provenance_of(
    loaded: LoadedModel, made: Made, command: Sequence[str], seed: int
) -> dict[str, Any]:
    """The manifest's account of where a bundle comes from."""
    return {
        "versions": describe.versions(),
        "command": tuple(command),
        "seed": seed,
        "model_sha256": made.sha256,
        "calibration": made.calibration,
        "training": {**loaded.trained, "metrics": dict(loaded.metrics)},
    }


def _attacks(
    writer: BundleWriter, made: Made, sample: Sample, asked: Exposure, reporter: Reporter
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Craft through the twin of the INT8 graph, store, and measure how far the inputs carry over."""
    if not asked.attacks:
        return
    int8, eps = made.int8, asked.eps
    twin, size = Twin(int8).eval(), footprint.gradient_batch(int8)
    flat = zero_gradients(twin, sample, size)
    for name in asked.attacks:
        images = craft(twin, sample, name, eps, batch=size, seed=asked.seed, reporter=reporter)
        _save_sample(writer, f"attacks/{name}.npz", Sample(images, sample.labels, sample.indices))
        yield (
            name,
            {
                "attack": name,
                "norm": "linf",
                "eps": parse_eps(eps),
                "parameters": asdict(parameters_of(name, {})),
                "crafted_through": "twin",
                "model_sha256": sha256_of(writer.dir / INT8),
                "samples": len(sample),
                "transfer": {
                    "int8": describe.attack_success(int8, sample, images),
                    "fp32": describe.attack_success(made.fp32, sample, images),
                    "zero_gradients": flat,
                },
            },
        )


def _save(model: onnx.ModelProto, path: Path) -> None:
    path.write_bytes(model.SerializeToString(deterministic=True))


def _save_sample(writer: BundleWriter, name: str, sample: Sample) -> None:
    writer.save_npz(name, x=compact(sample.images), y=sample.labels, index=sample.indices)
