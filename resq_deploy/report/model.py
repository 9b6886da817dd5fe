"""The report: everything one validation found, as data. JSON, CSV, JUnit, HTML and the terminal table are faces of it.

Figures are named as requirements name them: `accuracy`, `accuracy@ber=1e-4`, `sdc1@seu`, `robust@pgd,eps=8/255`,
`robust@pgd,eps=8/255@ber=1e-4`, `robust@pgd,eps=8/255,aware@ber=1e-4`, `accuracy@corruption=fog,severity=3`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from resq_deploy.report.by_image import ByImage

REPORT_VERSION = 1


Share = Annotated[float, Field(ge=-1e-9, le=1 + 1e-9)]  # in [0, 1], but for what rounding adds


class Strict(BaseModel):
    """Unknown keys, NaN and infinities are refused; values cannot be changed."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Figure(Strict):
    """A measured share in [0, 1] with its interval.

    `n`: what was counted (images, trials); `method`: how the interval is made.
    """

    mean: Share
    low: Share
    high: Share
    confidence: float = Field(gt=0.0, lt=1.0)
    method: str
    n: int = Field(ge=0)


class Vulnerability(Strict):
    """How often faults in one layer, or at one bit position, changed what the network says."""

    name: str
    locations: int
    trials: int = Field(ge=0)
    sdc1: Figure


class Cell(Strict):
    """Faults at one bit position of one layer: `trials` hit it; a share `sdc1` of (trial, image) pairs changed."""

    layer: str
    bit: int = Field(ge=0)
    trials: int = Field(ge=0)
    sdc1: float = Field(ge=0.0, le=1.0)


class Campaign(Strict):
    """One fault campaign. Shares are over all (trial, image) pairs; `accuracy_quantiles` over trials."""

    fault: str
    where: dict[str, Any]
    on: str = "clean"
    locations: int
    trials: int = Field(ge=0)
    images: int = Field(ge=0)
    flips: int = Field(ge=0)
    unreachable: int = Field(default=0, ge=0)
    accuracy: Figure
    accuracy_quantiles: dict[str, Share]
    masked: Figure
    sdc1: Figure
    sdc5: Figure
    critical: Figure
    due: Figure
    layers: tuple[Vulnerability, ...] = ()
    bits: tuple[Vulnerability, ...] = ()
    cells: tuple[Cell, ...] = ()
    stopped: str
    seconds: float
    images_per_second: float
    execution: dict[str, Any] = {}


class AttackResult(Strict):
    """Adversarial inputs run through the artifact. `success` is among images that were right before the attack."""

    name: str
    attack: str
    norm: str
    eps: float = Field(ge=0.0, le=1e6)
    crafted_through: str
    robust: Figure
    success: Figure
    parameters: dict[str, Any] = {}
    warnings: tuple[str, ...] = ()


class JointAttack(Strict):
    """An attacker who knows which bits flipped: inputs crafted anew for each faulty network, run with the same faults.

    Three shares of the same images and trials that are right on the faulty artifact: `clean` unattacked, `unaware`
    under inputs crafted for golden memory, `aware` under those crafted for these very faults. `flips`: bits that were
    flipped, over all trials; `unreachable`: bits of the faults that the engine cannot reach; `failed`: trials in which
    the engine gave no answer, so that every image counts as wrong.
    """

    name: str
    attack: str
    norm: str
    eps: float = Field(ge=0.0, le=1e6)
    crafted_through: str
    fault: str
    where: dict[str, Any]
    trials: int = Field(ge=0)
    images: int = Field(ge=0)
    flips: int = Field(ge=0)
    unreachable: int = Field(default=0, ge=0)
    failed: int = Field(default=0, ge=0)
    clean: Figure
    unaware: Figure | None
    aware: Figure
    parameters: dict[str, Any] = {}


class Corruption(Strict):
    """Accuracy on a common corruption (ImageNet-C's, 1903.12261) at one of its severities, 1 to 5."""

    corruption: str
    severity: int = Field(ge=1, le=5)
    accuracy: Figure


class Requirement(Strict):
    """One `--require` expression and what became of it.

    `value` is what was compared with `threshold`: the mean of `measured`, or one end of its interval.
    `certain`: the whole interval is on the same side of the threshold.
    """

    expression: str
    figure: str
    value: Share
    met: bool
    compared: Literal["mean", "low", "high"] = "mean"
    operator: Literal[">=", "<=", ">", "<"] = ">="
    threshold: Share | None = None
    measured: Figure | None = None
    certain: bool = True


class Subject(Strict):
    """The artifact that was validated."""

    name: str
    arch: str
    int8_sha256: str
    manifest_sha256: str
    schema_version: int
    input_shape: tuple[int, int, int]
    classes: int
    weights: int
    weight_bits: int


class Report(Strict):
    """Everything one `resq-validate` found. `by_image`: by name of figure; empty in reports of earlier versions."""

    report_version: Literal[1] = 1
    subject: Subject
    runner: dict[str, Any]
    data: dict[str, Any]
    accuracy: Figure
    campaigns: tuple[Campaign, ...] = ()
    attacks: tuple[AttackResult, ...] = ()
    joint: tuple[JointAttack, ...] = ()
    corruptions: tuple[Corruption, ...] = ()
    figures: dict[str, Figure]
    by_image: dict[str, ByImage] = {}
    requirements: tuple[Requirement, ...] = ()
    not_covered: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    provenance: dict[str, Any]

    @model_validator(mode="after")
    def _agree(self) -> Report:
        for name, each in self.by_image.items():
            if name not in self.figures or abs(each.mean - self.figures[name].mean) > 1e-9:
                raise ValueError(f"by_image of {name} is not of this figure")
        return self

    @property
    def met(self) -> bool:
        """Whether every requirement was met (true where there is none)."""
        return all(requirement.met for requirement in self.requirements)
