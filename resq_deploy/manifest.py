"""manifest.json: what a bundle says about itself. Outside data, so pydantic reads it; every number is checked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from resq_deploy import strict_json
from resq_deploy.errors import BundleError

SCHEMA_VERSION = 1

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
Reference = Literal["fp32", "dequantized"]


class Strict(BaseModel):
    """Unknown keys, NaN and infinities are refused; values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Input(Strict):
    """What the artifact eats: float32 pixels in [0, 1], [B, C, H, W].

    Preprocessing, (x - mean) / std per channel, is inside the graph.
    """

    name: str
    shape: tuple[int, int, int]
    dtype: Literal["float32"] = "float32"
    range: tuple[float, float] = (0.0, 1.0)
    mean: tuple[float, ...]
    std: tuple[Positive, ...]

    @model_validator(mode="after")
    def _channels(self) -> Input:
        if min(self.shape) < 1 or len(self.mean) != self.shape[0] or len(self.std) != self.shape[0]:
            raise ValueError("shape, mean and std do not fit together")
        return self


class WeightScale(Strict):
    """How one INT8 initializer was quantized. `axis` is None for one scale per tensor."""

    layer: str
    op: str
    shape: tuple[int, ...]
    axis: int | None
    scale: tuple[Positive, ...]
    sqnr_db: float | None = None


class ActivationScale(Strict):
    """How one activation tensor was quantized: the range that was chosen, by which method, and what it costs.

    `zero_point`: the code of 0; None where each channel has its own.
    """

    scale: Positive
    zero_point: int | None = 0
    low: float
    high: float
    method: str
    sqnr_db: float | None = None


class FloatOp(Strict):
    """A node with weights that stays in high precision, and why."""

    node: str
    op: str
    reason: str


class Quantization(Strict):
    """Which codes the graph has.

    `int8-symmetric-qdq`: in [-128, 127], zero point 0, which is what exports write by TensorRT's rules;
    `int8-qdq`: with zero points or unsigned codes, by ONNX Runtime's rules or in a file that another tool quantized.
    `rules`: by whose an export was written; None for a file that was taken as it is. `saturates`: whether products of
    its weights could saturate in 16 bits, as x86 without VNNI adds them up (saturation.py); None: not looked at.
    """

    scheme: Literal["int8-symmetric-qdq", "int8-qdq"] = "int8-symmetric-qdq"
    rules: Literal["tensorrt", "onnxruntime"] | None = None
    saturates: bool | None = None
    weights: dict[str, WeightScale]
    activations: dict[str, ActivationScale]
    float_ops: tuple[FloatOp, ...] = ()
    high_precision: Literal["fp32", "fp16"] = "fp32"


class Metrics(Strict):
    """FP32 against INT8 on the held-out sample.

    `reference`: what model.fp32.onnx is, the network itself, or (`dequantized`) the INT8 graph without its rounding.
    """

    samples: int = Field(ge=1)
    fp32_accuracy: Share
    int8_accuracy: Share
    agreement: Share
    sqnr_db: dict[str, float]
    reference: Reference = "fp32"

    @property
    def exact(self) -> str:
        """What INT8 is held against, for a heading: `FP32`, `dequantized`."""
        return "FP32" if self.reference == "fp32" else self.reference


class Adjustment(Strict):
    """What stage III did (`steps`, in order) and what a measurement says it gained.

    `reason`: why it could not run, where it was wanted.
    """

    applied: bool
    reason: str | None = None
    design_ber: float | None = Field(default=None, gt=0.0, lt=1.0)
    steps: tuple[dict[str, Any], ...] = ()
    measured: dict[str, Any] = {}


class FaultyMemory(Strict):
    """The faults that inputs were crafted against: trials 0 to `trials` - 1 of a fault model and a seed.

    `flips`: 16 hex digits of the sha256 of each trial's flips, so that a replay knows that it has the same.
    """

    model: str
    where: tuple[str, ...] = ("weights",)
    seed: int = Field(ge=0)
    trials: int = Field(ge=1)
    flips: tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")], ...]

    @model_validator(mode="after")
    def _each(self) -> FaultyMemory:
        if len(self.flips) != self.trials:
            raise ValueError("not one digest of flips for each trial")
        return self


class Attack(Strict):
    """One stored set of adversarial inputs: attacks/NAME.npz.

    `faulty`: crafted anew against each of these faults, trial after trial on the same images; None: against golden
    memory.
    """

    attack: str
    norm: Literal["linf", "l2"]
    eps: float = Field(gt=0.0)
    parameters: dict[str, Any] = {}
    crafted_through: Literal["fp32", "twin", "artifact", "external"]
    model_sha256: Sha256
    samples: int = Field(ge=1)
    transfer: dict[str, float] = {}
    faulty: FaultyMemory | None = None


class Engine(Strict):
    """One plan: engines/NAME.plan, with its weight map, and what it was built for.

    `coverage`: share of the INT8 weights' bytes that the map has; `unlocated`: tensor -> why it is not in it.
    """

    backend: Literal["tensorrt", "tensorrt-rtx"]
    version: str
    built_for: dict[str, Any]
    coverage: Share | None = None
    unlocated: dict[str, str] = {}


class FileEntry(Strict):
    """What a file must be before anything reads it."""

    sha256: Sha256
    size: int = Field(ge=0)


class Provenance(Strict):
    """Where the bundle came from."""

    versions: dict[str, str]
    command: tuple[str, ...]
    seed: int
    model_sha256: Sha256
    calibration: dict[str, Any]
    training: dict[str, Any] = {}


class Manifest(Strict):
    """The whole of manifest.json."""

    schema_version: Literal[1] = 1
    name: str
    arch: str
    input: Input
    classes: tuple[str, ...] = Field(min_length=2)
    quantization: Quantization
    adjustment: Adjustment
    metrics: Metrics
    attacks: dict[str, Attack] = {}
    engines: dict[str, Engine] = {}
    files: dict[str, FileEntry]
    provenance: Provenance


def parse_manifest(content: bytes, path: Path) -> Manifest:
    """The manifest that these bytes are; `path` is named in errors. Raises BundleError."""
    try:
        raw = strict_json.loads(content)
    except ValueError as error:
        raise BundleError(f"{path} is not JSON", "export the model again") from error
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if version != SCHEMA_VERSION:
        raise BundleError(
            f"{path} has schema version {repr(version)[:40]}, this program reads {SCHEMA_VERSION}",
            "upgrade resq-deploy",
        )
    try:
        return Manifest.model_validate(raw)
    except (ValidationError, RecursionError) as error:
        said = _first(error) if isinstance(error, ValidationError) else "it is nested too deeply"
        raise BundleError(f"{path}: {said}", "export the model again") from error


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))[:200]}: {first['msg']}"
