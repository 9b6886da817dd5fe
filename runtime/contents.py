"""What is in a bundle: its layers and scales, which weights matter most, and whether all of it is what it claims."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.bundle import INT8, MANIFEST, Bundle
from resq_deploy.errors import BundleError, FaultError, IntegrityError, ResqError
from resq_deploy.memory import fault_space
from resq_deploy.onnx_file import read_onnx
from resq_deploy.report import Report, read_report
from resq_deploy.report.files import JSON
from resq_deploy.runtime import attacks, faulty
from resq_deploy.runtime.places import report_folder
from resq_deploy.runtime.plan import PlanMap, locate
from resq_deploy.signing import SIGNATURE, fingerprint


@dataclass(frozen=True, slots=True)
class Layer:
    """One INT8 weight tensor.

    `sqnr_db`: signal to quantization noise of its weights. `sign_flip`: how large one flipped sign bit (bit 7) is
    against the norm of its output channel, the mean over channels: a static guess at what a fault can do. `sdc1`:
    what a validation measured, the share of answers that one fault in this layer changed; None without a report.
    """

    tensor: str
    layer: str
    op: str
    shape: tuple[int, ...]
    scales: tuple[float, ...]
    sqnr_db: float | None
    sign_flip: float
    sdc1: float | None = None

    @property
    def size(self) -> int:
        """How many weights."""
        return int(np.prod(self.shape))


@dataclass(frozen=True, slots=True)
class Check:
    """What `verify_bundle` found. `signature`: `good`, `there, not checked` (no key was given) or `none`."""

    files: int
    size: int
    signature: str
    key: str | None
    unlisted: tuple[str, ...]
    engines: dict[str, float]
    attacks: tuple[str, ...]


def layers(bundle: Bundle, report: Report | None = None) -> tuple[Layer, ...]:
    """Every INT8 weight tensor, the most sensitive first: as measured if a report is given, else by the guess."""
    measured = _measured(report)
    entries = bundle.manifest.quantization.weights
    found = []
    for memory in fault_space(read_onnx(bundle.int8)).memories:
        entry = entries.get(memory.name)
        if memory.kind != "weights" or entry is None:
            continue
        found.append(
            Layer(
                memory.name,
                memory.layer,
                entry.op,
                tuple(memory.value.shape),
                entry.scale,
                entry.sqnr_db,
                sign_flip(memory.value, entry.axis),
                measured.get(memory.layer),
            )
        )
    return tuple(sorted(found, key=lambda x: (-(x.sdc1 or 0.0), -x.sign_flip)))


def sign_flip(codes: NDArray[Any], axis: int | None) -> float:
    """128 / ||codes of a channel||, the mean over channels; a channel of zeros counts as one of norm 1."""
    whole = codes.astype(np.float64)
    kept = 0 if axis is None else axis
    norms = np.sqrt(np.square(whole).sum(axis=tuple(i for i in range(codes.ndim) if i != kept)))
    return float(np.mean(128 / np.maximum(norms, 1.0)))


def report_of(bundle: Bundle, folders: Iterable[str | os.PathLike[str]]) -> Report | None:
    """The report of this very artifact among these folders. Raises ReportError for one that holds none."""
    for folder in folders:
        report = read_report(folder)
        if report.subject.int8_sha256 == bundle.manifest.files[INT8].sha256:
            return report
    return None


def nearby_report(bundle: Bundle) -> Report | None:
    """The report that `resq-validate` left beside a bundle, if it is of this very artifact."""
    folder = report_folder(bundle.path)
    if not (folder / JSON).is_file():
        return None
    try:
        return report_of(bundle, [folder])
    except ResqError:
        return None


def summary(bundle: Bundle, report: Report | None = None) -> dict[str, Any]:
    """Everything `resq inspect` shows, as JSON types."""
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "arch": manifest.arch,
        "input": manifest.input.model_dump(mode="json"),
        "classes": list(manifest.classes),
        "metrics": manifest.metrics.model_dump(mode="json"),
        "codes": {
            "scheme": manifest.quantization.scheme,
            "rules": manifest.quantization.rules,
            "saturates": manifest.quantization.saturates,
        },
        "adjustment": manifest.adjustment.model_dump(mode="json"),
        "layers": [asdict(layer) for layer in layers(bundle, report)],
        "activations": {
            name: scale.model_dump(mode="json")
            for name, scale in manifest.quantization.activations.items()
        },
        "float_ops": [op.model_dump(mode="json") for op in manifest.quantization.float_ops],
        "attacks": {n: a.model_dump(mode="json") for n, a in manifest.attacks.items()},
        "engines": {n: e.model_dump(mode="json") for n, e in manifest.engines.items()},
        "files": {n: f.model_dump(mode="json") for n, f in manifest.files.items()},
        "provenance": manifest.provenance.model_dump(mode="json"),
        "report": str(report_folder(bundle.path)) if report else None,
    }


def verify_bundle(path: str | os.PathLike[str], key: str | os.PathLike[str] | None = None) -> Check:
    """Read a whole bundle as a validation would, every weight map against its plan too.

    `key`: the public key that its signature must fit, which is then checked before anything else. Raises BundleError
    or IntegrityError at the first thing that is wrong.
    """
    bundle = Bundle.open(path, key=key)
    bundle.eval_sample()
    for name, attack in bundle.manifest.attacks.items():
        (faulty.stored if attack.faulty else attacks.stored)(bundle, name)
    engines = {name: _engine(bundle, name).coverage for name in bundle.manifest.engines}
    signed = (bundle.path / SIGNATURE).is_file()
    listed = {*bundle.manifest.files, MANIFEST, SIGNATURE}
    here = {p.relative_to(bundle.path).as_posix() for p in bundle.path.rglob("*") if p.is_file()}
    return Check(
        files=len(bundle.manifest.files),
        size=sum(entry.size for entry in bundle.manifest.files.values()),
        signature="good" if key is not None else "there, not checked" if signed else "none",
        key=fingerprint(key) if key is not None else None,
        unlisted=tuple(sorted(here - listed)),
        engines=engines,
        attacks=tuple(bundle.manifest.attacks),
    )


def plan_map(bundle: Bundle, name: str | None = None) -> tuple[str, PlanMap]:
    """The weight map of an engine in a bundle (None: the only one), checked against its plan."""
    names = list(bundle.manifest.engines)
    chosen = name or (names[0] if len(names) == 1 else "")
    if chosen not in names:
        several = bool(names) and not name
        found = "several engines" if several else f"no engine {name or 'at all'}"
        which = "name one with --engine" if several else "one of"
        known = f"{which}: {', '.join(names)}" if names else "resq-export --target builds one"
        raise BundleError(f"{bundle.path} has {found}", known)
    return chosen, _engine(bundle, chosen)


def byte_of(bundle: Bundle, tensor: str, element: int, engine: str | None = None) -> int:
    """The byte of an engine's plan that holds an element, -1 where it was not located. Raises FaultError."""
    _, found = plan_map(bundle, engine)
    if tensor not in found.tensors and tensor not in found.unlocated:
        near = get_close_matches(tensor, [*found.tensors, *found.unlocated], 1, 0.0)
        raise FaultError(f"no tensor {tensor!r} in this plan's map", f"such as {', '.join(near)}")
    return int(found.offset(tensor, np.array([element]))[0])


def locate_weights(plan: str | os.PathLike[str], model: str | os.PathLike[str]) -> PlanMap:
    """Where a plan file keeps the INT8 weights of the ONNX file it was built from."""
    weights = {
        m.name: m.value for m in fault_space(read_onnx(model)).memories if m.kind == "weights"
    }
    try:
        content = Path(plan).read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read the plan {plan}: {error.strerror}") from error
    return locate(content, weights)


def _engine(bundle: Bundle, name: str) -> PlanMap:
    plan = bundle.file(f"engines/{name}.plan")
    found = PlanMap.load(bundle.file(f"engines/{name}.weights.json"))
    try:
        found.check(plan.read_bytes())
    except IntegrityError as error:
        raise IntegrityError(f"{plan}: {error.message}", error.hint) from error
    return found


def _measured(report: Report | None) -> dict[str, float]:
    found = [c for c in report.campaigns if c.on == "clean" and c.layers] if report else []
    found.sort(key=lambda c: c.fault not in ("seu", "sbu"))  # single bits, where they were run
    return {v.name: v.sdc1.mean for v in found[0].layers if v.trials} if found else {}
