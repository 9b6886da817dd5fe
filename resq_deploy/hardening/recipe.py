"""What is trained and how: every hyperparameter of hardening, with the defaults that
docs/hardening.md explains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from resq_deploy.errors import ModelError

Stages = Literal["none", "1", "2", "1+2"]
STAGES: tuple[Stages, ...] = ("none", "1", "2", "1+2")
PERTURBATIONS = ("fgsm", "pgd", "bitplane", "uniform")
Perturbation = Literal["fgsm", "pgd", "bitplane", "uniform"]


@dataclass(frozen=True, slots=True)
class Phase:
    """How long and how fast one stage trains.

    It lasts `epochs` passes over the training data, and at least `min_steps` steps; `lr` is the
    peak of SGD (networks with BatchNorm) per 128 examples of batch; `adam_lr` that of AdamW (all
    others).
    """

    epochs: float
    min_steps: int
    lr: float
    adam_lr: float
    schedule: Literal["one-cycle", "cosine"] = "one-cycle"


@dataclass(frozen=True, slots=True)
class Attack:
    """Stage I: features that ignore small perturbations of the input.

    `eps` in pixels of [0, 1]; `adversarial` is the weight of the cross entropy of perturbed inputs
    (that of clean inputs is 1 minus it), `consistency` that of the feature distance at `layers`
    ("auto": the classifier's input and the logits), `lipschitz` that of Defensive Quantization's
    penalty; `mixup` is the Beta parameter (0: off).
    """

    phase: Phase = Phase(epochs=6, min_steps=100, lr=0.05, adam_lr=5e-4)
    perturbations: tuple[Perturbation, ...] = ("fgsm", "bitplane")
    eps: float = 8 / 255
    steps: int = 3
    adversarial: float = 0.3
    consistency: float = 0.5
    layers: tuple[str, ...] = ("auto",)
    lipschitz: float = 0.0
    mixup: float = 0.0


@dataclass(frozen=True, slots=True)
class Fault:
    """Stage II: weights that survive bit flips in their INT8 codes.

    `ber` is the bit error rate that training ends with (it rises from 0 over the first third);
    `clip` bounds |w| to that many root mean squares of its output channel (0: off); `faulty` is the
    weight of the loss under flips (that of the fault-free quantized network is 1 minus it),
    `attacked` the share of images that are perturbed too, where stage I is kept; `sensitivity` is
    how strongly flips lean towards the channels they hurt most, 0 to 1; `reliability` how much more
    often examples are seen that flip easily (0: off); `drift` the weight of what keeps BatchNorm's
    frozen statistics true (0: off).
    """

    phase: Phase = Phase(epochs=6, min_steps=100, lr=0.01, adam_lr=2e-4)
    ber: float = 5e-3
    clip: float = 2.0
    faulty: float = 0.5
    attacked: float = 0.5
    sensitivity: float = 0.5
    reliability: float = 1.0
    drift: float = 0.1


@dataclass(frozen=True, slots=True)
class Recipe:
    """All of hardening. `amp`: off, bf16 or fp16 (fp16 needs CUDA). `ema`: decay (less in short
    phases) of the averaged weights (0: off).

    `patience`: epochs without a better joint score before a stage ends (0: never); `holdout`: how
    much of the training data is kept apart to choose by.
    """

    plain: Phase = Phase(epochs=8, min_steps=160, lr=0.1, adam_lr=1e-3)
    attack: Attack = Attack()
    fault: Fault = Fault()
    batch: int = 128
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    ema: float = 0.995
    augment: Literal["auto", "none", "flip", "shift", "shift+flip"] = "auto"
    amp: Literal["off", "bf16", "fp16"] = "off"
    patience: int = 0
    holdout: float = 0.05

    def __post_init__(self) -> None:
        _check(0 < self.attack.eps < 1, "eps", self.attack.eps, "a number between 0 and 1")
        _check(0 <= self.fault.ber <= 0.5, "the training BER", self.fault.ber, "0 to 0.5")
        _check(0 <= self.attack.adversarial <= 1, "adversarial", self.attack.adversarial, "0 to 1")
        _check(0 <= self.fault.attacked <= 1, "attacked", self.fault.attacked, "0 to 1")
        _check(0 <= self.fault.faulty <= 1, "faulty", self.fault.faulty, "0 to 1")
        _check(self.fault.drift >= 0, "drift", self.fault.drift, "0 or more")
        _check(self.batch >= 2, "the batch size", self.batch, "at least 2")
        _check(0 < self.holdout < 0.5, "the holdout", self.holdout, "between 0 and 0.5")
        _check(0 <= self.ema < 1, "the EMA decay", self.ema, "0 to below 1")
        unknown = set(self.attack.perturbations) - set(PERTURBATIONS)
        _check(not unknown, "perturbation", sorted(unknown), f"some of {', '.join(PERTURBATIONS)}")
        _check(bool(self.attack.perturbations), "perturbation", "none", "at least one")

    def with_epochs(self, plain: float | None, one: float | None, two: float | None) -> Recipe:
        """The recipe with other lengths of its three phases (None: as they are)."""
        attack = replace(self.attack, phase=_length(self.attack.phase, one))
        fault = replace(self.fault, phase=_length(self.fault.phase, two))
        return replace(self, plain=_length(self.plain, plain), attack=attack, fault=fault)

    def idle(self, stages: str) -> list[str]:
        """Changed settings of stages that will not run, in sentences. `stages`: as harden_model takes them."""
        usual, said = Recipe(), []
        first = self.attack.phase != usual.attack.phase and "1" not in stages
        if first or (self.attack != usual.attack and stages == "none"):
            said.append(f"settings of stage I are not used: stages {stages}")
        if self.fault != usual.fault and "2" not in stages:
            said.append(f"settings of stage II are not used: stages {stages}")
        return said

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and texts, for the checkpoint."""
        return _plain(asdict(self))  # type: ignore[no-any-return]

    def override(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with dotted settings changed, such as {"fault.ber": 0.02,
        "attack.phase.epochs": 3}.

        Raises ModelError for a setting that does not exist or a value of another type.
        """
        recipe = self
        for path, value in settings.items():
            recipe = _set(recipe, path.split("."), value, path)
        return recipe


def _length(phase: Phase, epochs: float | None) -> Phase:
    if epochs is None:
        return phase
    _check(epochs > 0, "epochs", epochs, "a number above 0")
    return replace(phase, epochs=epochs, min_steps=1)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def _set(node: Any, path: list[str], value: Any, full: str) -> Any:
    names = {f.name for f in fields(node)}
    if path[0] not in names:
        raise ModelError(f"no setting {full!r}", f"there are: {', '.join(sorted(names))}")
    old = getattr(node, path[0])
    if len(path) > 1:
        if not hasattr(old, "__dataclass_fields__"):
            raise ModelError(f"no setting {full!r}", f"{path[0]} is a value")
        return replace(node, **{path[0]: _set(old, path[1:], value, full)})
    return replace(node, **{path[0]: _as(old, value, full)})


def _as(old: Any, value: Any, full: str) -> Any:
    try:
        if isinstance(old, tuple):
            return tuple(value.split(",")) if isinstance(value, str) else tuple(value)
        if isinstance(old, bool | int | float | str):
            return type(old)(value)
    except (TypeError, ValueError):
        pass
    raise ModelError(f"{full} cannot be {value!r}", f"it is {old!r} by default")


def _check(ok: bool, what: str, value: object, wanted: str) -> None:
    if not ok:
        raise ModelError(f"{what} is {value}", f"it must be {wanted}")
