"""From what was run to what is reported: names of figures, and the report's parts."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import numpy as np

from resq_deploy import __version__
from resq_deploy.bundle import INT8, MANIFEST, Bundle, sha256_of
from resq_deploy.errors import CampaignError
from resq_deploy.fault_models import FaultModel
from resq_deploy.faults import FaultSpace
from resq_deploy.report.by_image import ByImage
from resq_deploy.report.model import Campaign, Cell, Figure, Subject, Vulnerability
from resq_deploy.runtime.figures import CampaignResult
from resq_deploy.statistics import Estimate

SHARES = ("accuracy", "masked", "sdc1", "sdc5", "critical", "due")
STOCK = "agreement@stock"  # with an ordinary session (stock.py)


def fault_label(model: str) -> str:
    """A fault model's name as figures carry it: `ber:0.0001` -> `ber=1e-4`, `mbu:4` as it is."""
    word, _, argument = model.partition(":")
    return f"ber={rate_text(float(argument))}" if word == "ber" else model


def rate_text(rate: float) -> str:
    """A rate as people write it: 0.0001 -> `1e-4`, 0.0025 -> `2.5e-3`."""
    mantissa, _, exponent = f"{rate:.6e}".partition("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def campaign_names(model: str, on: str = "clean") -> dict[str, str]:
    """Share -> name of the figure, for a campaign on clean images or on those of the attack `on`."""
    label = fault_label(model)
    if on == "clean":
        return {share: f"{share}@{label}" for share in SHARES}
    return {s: f"{'robust' if s == 'accuracy' else s}@{on}@{label}" for s in SHARES}


def figure_names(
    models: Iterable[FaultModel],
    attacked: Sequence[str],
    *,
    joint: bool = False,
    backend: str = "ort",
) -> tuple[str, ...]:
    """Names of all figures that a validation will have, in the order of the report."""
    names = [
        "accuracy",
        *([STOCK] if backend == "ort" else []),
        *(f"{share}@{label}" for label in attacked for share in ("robust", "success")),
    ]
    for on in ("clean", *(attacked if joint else ())):
        for model in models:
            names += campaign_names(model.name, on).values()
    return tuple(names)


def figure(estimate: Estimate) -> Figure:
    """An estimate as the report has it."""
    return Figure(**asdict(estimate))


def campaign(result: CampaignResult, on: str) -> Campaign:
    """A campaign as the report has it."""
    return Campaign(
        fault=fault_label(result.fault),
        where=result.where,
        on=on,
        locations=result.locations,
        trials=result.trials,
        images=result.images,
        flips=result.flips,
        unreachable=result.unreachable,
        **{share: figure(getattr(result, share)) for share in SHARES},
        accuracy_quantiles=result.accuracy_quantiles,
        layers=_rows(result.layers),
        bits=_rows(result.bits),
        cells=tuple(
            Cell(layer=c.layer, bit=c.bit, trials=c.trials, sdc1=c.sdc1) for c in result.cells
        ),
        stopped=result.stopped,
        seconds=result.seconds,
        images_per_second=result.images_per_second,
        execution={
            **result.execution,
            "golden_accuracy": result.golden_accuracy,
            "failed": result.failed,
            "missed": result.missed,
            "digest": result.digest,
        },
    )


def by_image(result: CampaignResult, images: str) -> ByImage | None:
    """How often each image of a campaign was right, None for fewer than two trials; `images`: images.images_key's."""
    if result.spread is None:
        return None
    right = np.array(result.right)
    return ByImage.of(images, right, result.trials, result.spread, result.by_trial)


def _rows(found: Iterable[Any]) -> tuple[Vulnerability, ...]:
    return tuple(
        Vulnerability(name=v.name, locations=v.locations, trials=v.trials, sdc1=figure(v.sdc1))
        for v in found
    )


def subject(bundle: Bundle, space: FaultSpace) -> Subject:
    """The artifact, by its hashes and sizes."""
    weights = [m for m in space.memories if m.kind == "weights"]
    return Subject(
        name=bundle.manifest.name,
        arch=bundle.manifest.arch,
        int8_sha256=bundle.manifest.files[INT8].sha256,
        manifest_sha256=sha256_of(bundle.path / MANIFEST),
        schema_version=bundle.manifest.schema_version,
        input_shape=bundle.manifest.input.shape,
        classes=len(bundle.manifest.classes),
        weights=sum(m.value.size for m in weights),
        weight_bits=sum(m.value.size * m.width for m in weights),
    )


def not_covered(
    bundle: Bundle, whole: FaultSpace, space: FaultSpace, ran: Mapping[str, Any]
) -> tuple[str, ...]:
    """What this validation did not look at, in sentences a reader of the report needs; `ran`: the runner's info."""
    said = []
    inside = {m.name for m in space.memories}
    left: dict[str, int] = {}
    for m in whole.memories:
        if m.name not in inside:
            left[m.kind] = left.get(m.kind, 0) + m.value.size * m.width
    if left:
        bits = ", ".join(f"{kind} {count:,} bits" for kind, count in left.items())
        said.append(f"Weight memory without faults: {bits}. --where {','.join(left)} adds it.")
    reasons: dict[str, list[str]] = {}
    for op in bundle.manifest.quantization.float_ops:
        reasons.setdefault(op.reason, []).append(f"{op.node} ({op.op})")
    said += [f"In high precision: {_some(nodes)}: {reason}." for reason, nodes in reasons.items()]
    for name, engine in bundle.manifest.engines.items():
        covered = "not mapped" if engine.coverage is None else f"{engine.coverage:.2%} mapped"
        if name != ran.get("plan"):
            said.append(f"The engine {name} ({engine.backend}, {covered}) was not run here.")
        elif ran["coverage"] < 1:
            said.append(_out_of_reach(name, ran))
    said.append("Activations, instructions and control logic: faults are in weight memory only.")
    return tuple(said)


def _out_of_reach(name: str, ran: Mapping[str, Any]) -> str:
    """Of the plan that was run: which weights its faults cannot be in."""
    lost = f"{1 - ran['coverage']:.2%} of the weights of the engine {name}"
    missing = f" Not located in the plan: {_some(ran['unlocated'])}." if ran["unlocated"] else ""
    return f"Out of reach of faults ({ran['injection']}): {lost}.{missing}"


def not_attacked(bundle: Bundle, *, joint: bool) -> tuple[str, ...]:
    """Whether an attacker who knows which bits flipped was looked at."""
    stored = [name for name, a in bundle.manifest.attacks.items() if a.faulty is not None]
    if stored and not joint:
        return (f"Attacks that know the faults: {_some(stored)} are stored; --joint runs them.",)
    if joint and not stored:
        return (
            "Attacks that know which bits flipped: the inputs were crafted for memory without faults. "
            "resq-export --attack-faulty crafts others.",
        )
    return ()


def _some(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def provenance(
    settings: Mapping[str, Any], command: Iterable[str], bundle: Bundle
) -> dict[str, Any]:
    """What it takes to run this validation again."""
    return {
        "time": finished(),
        "resq_deploy": __version__,
        "numpy": np.__version__,
        "command": list(command),
        "settings": dict(settings),
        "export": {
            "command": list(bundle.manifest.provenance.command),
            "versions": bundle.manifest.provenance.versions,
            "seed": bundle.manifest.provenance.seed,
        },
    }


def finished() -> str:
    """When a validation ended, UTC, `2030-01-01T00:00:00Z`; SOURCE_DATE_EPOCH where a build sets it."""
    try:
        now = float(os.environ.get("SOURCE_DATE_EPOCH") or time.time())
        return datetime.fromtimestamp(now, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (ValueError, OverflowError, OSError) as error:
        raise CampaignError(
            "SOURCE_DATE_EPOCH is no time", "seconds since 1970, or unset"
        ) from error
