"""What a validation is asked to do: one frozen value, so that a journal can tell whether it belongs to it."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from resq_deploy.errors import CampaignError, DataError, FaultError
from resq_deploy.faults import KINDS
from resq_deploy.runtime.corruptions import IMAGES, SEVERITIES, parse_names
from resq_deploy.runtime.runner import PLAN_OPTIONS

_LEAST_MARGIN = 1e-6  # some 10^7 trials
_MOST_CONFIDENCE = 0.999999
DEFAULT_BER = (1e-5, 1e-4, 1e-3)
WAYS = ("auto", "live", "plan", "refit")  # of getting faults into an engine plan


@dataclass(frozen=True, slots=True)
class Settings:
    """Everything that decides the figures of one validation.

    `data`: the labelled images (None: the bundle's own sample); `samples`: how many of them each trial
    runs (None: 256). `ber`, `faults`: fault models, one campaign each. `where`, `layers`, `bits`: the
    fault space they draw from. `trials` per campaign (None: until the interval is within `margin`).
    `attacks`: names (None: all that the bundle stores). `joint`: campaigns on adversarial inputs too.
    `corruptions`: names of runtime/corruptions.py, at these `severities`, on `corruption_samples` images.
    `options`: of the backend, as `open_runner` takes them; JSON types.
    """

    backend: str = "ort"
    data: str | None = None
    samples: int | None = None
    ber: tuple[float, ...] = DEFAULT_BER
    faults: tuple[str, ...] = ("seu",)
    fault_list: str | None = None
    where: tuple[str, ...] = ("weights",)
    layers: tuple[str, ...] | None = None
    bits: tuple[int, ...] | None = None
    trials: int | None = None
    max_trials: int = 10_000
    margin: float = 0.01
    confidence: float = 0.95
    attacks: tuple[str, ...] | None = None
    eps: float | None = None
    joint: bool = False
    corruptions: tuple[str, ...] = ()
    severities: tuple[int, ...] = SEVERITIES
    corruption_samples: int = IMAGES
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.confidence <= _MOST_CONFIDENCE:
            raise CampaignError(
                f"a confidence of {self.confidence:g}",
                f"above 0 and at most {_MOST_CONFIDENCE}, such as 0.95",
            )
        if not _LEAST_MARGIN <= self.margin < 0.5:
            raise CampaignError(
                f"a margin of {self.margin:g}", f"from {_LEAST_MARGIN:g} to 0.5, such as 0.01"
            )
        if self.trials is not None and self.trials < 1:
            raise CampaignError(f"{self.trials} trials", "at least 1, or auto")
        if self.samples is not None and self.samples < 1:
            raise CampaignError(f"{self.samples} images a trial", "at least 1")
        if self.corruption_samples < 1:
            raise CampaignError(f"{self.corruption_samples} images a corruption", "at least 1")
        if not isinstance(self.options, dict):
            raise TypeError("options of a backend are names and values")
        for kind in self.where:
            if kind not in KINDS:
                raise FaultError(f"unknown kind of memory {kind!r}", f"one of: {', '.join(KINDS)}")

    @property
    def models(self) -> tuple[str, ...]:
        """The fault models in the order they run: the single ones first, then rising bit error rates."""
        return (*self.faults, *(f"ber:{p!r}" for p in sorted(self.ber)))

    def idle(self, stored: Collection[str]) -> list[str]:
        """Options that will do nothing, in sentences; `stored`: names of the attacks in the bundle."""
        names = stored if self.attacks is None else self.attacks
        said = []
        if self.eps is not None and all(name in stored for name in names):
            said.append("--eps is of square and hopskipjump, and none was asked for")
        if self.joint and not names and not stored:
            said.append("--joint has no attacks to run faults on")
        if not self.corruptions and self.severities != SEVERITIES:
            said.append("--severities is of --corruptions, and none was asked for")
        if not self.corruptions and self.corruption_samples != IMAGES:
            said.append("--corruption-samples is of --corruptions, and none was asked for")
        return said

    def with_whole_paths(self) -> Settings:
        """The same, its files by absolute paths: a replay may start in another folder."""
        data = self.data
        if data and data.lower().endswith(".npz"):
            data = str(Path(data).resolve())
        elif data and ":" in data:
            kind, _, place = data.partition(":")
            data = f"{kind}:{Path(place).resolve()}"
        listed = str(Path(self.fault_list).resolve()) if self.fault_list else None
        return replace(self, data=data, fault_list=listed)

    def as_json(self) -> dict[str, Any]:
        """JSON types only, for the report's provenance."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def parse_bits(text: str) -> tuple[int, ...]:
    """`7`, `0-6` or `0-3,7` to bit positions. Raises FaultError."""
    bits = _parse_ranges(text)
    if bits is None:
        raise FaultError(f"bits {text!r} cannot be read", "such as 7, 0-6 or 0-3,7")
    if bits[-1] > 63:
        raise FaultError(f"bits {text!r} are not a range of bit positions", "such as 0-6")
    return bits


def parse_severities(text: str) -> tuple[int, ...]:
    """`3`, `1-5` or `1,3,5` to severities of corruptions. Raises DataError."""
    found = _parse_ranges(text)
    if found is None or not set(found) <= set(SEVERITIES):
        raise DataError(f"severities {text!r} cannot be read", "1 to 5, such as 3, 1-5 or 1,3,5")
    return found


def _parse_ranges(text: str) -> tuple[int, ...] | None:
    """`0-3,7` to the numbers it means, rising; None where it cannot be read."""
    numbers = set[int]()
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,2})(?:-(\d{1,2}))?\s*", part)
        if not found or int(found[2] or found[1]) < int(found[1]):
            return None
        numbers |= set(range(int(found[1]), int(found[2] or found[1]) + 1))
    return tuple(sorted(numbers))


def parse_trials(text: str) -> int | None:
    """`auto` (None) or a number of trials. Raises CampaignError."""
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise CampaignError(f"{text!r} trials", "a number from 1 on, or auto")
    return int(text)


def parse_rates(text: str) -> tuple[float, ...]:
    """`1e-5,1e-4` to bit error rates, each in (0, 1). Raises FaultError. An empty text is no rate."""
    rates = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        try:
            rate = float(part)
        except ValueError:
            rate = float("nan")
        if not 0 < rate < 1:
            raise FaultError(f"a bit error rate of {part!r}", "between 0 and 1, such as 1e-4")
        rates.append(rate)
    return tuple(rates)


def parse_list(text: str) -> tuple[str, ...]:
    """A comma list to its parts, without empty ones."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def parse_attacks(text: str | None) -> tuple[str, ...] | None:
    """Names of attacks; `none` or nothing between the commas: no attack; None: all that are stored."""
    return None if text is None else () if text.strip() == "none" else parse_list(text)


def from_text(**given: Any) -> Settings:
    """Settings from a command line's texts. Raises FaultError, CampaignError or AttackError."""
    from resq_deploy.budget import parse_eps

    return Settings(
        backend=given["backend"],
        data=given["data"],
        samples=given["samples"],
        ber=parse_rates(given["ber"]),
        faults=parse_list(given["faults"]),
        fault_list=str(given["fault_list"]) if given["fault_list"] else None,
        where=parse_list(given["where"]),
        layers=parse_list(given["layers"]) if given["layers"] else None,
        bits=parse_bits(given["bits"]) if given["bits"] else None,
        trials=parse_trials(given["trials"]),
        margin=given["margin"],
        confidence=given["confidence"],
        attacks=parse_attacks(given["attacks"]),
        eps=parse_eps(given["eps"]) if given["eps"] else None,
        joint=given["joint"],
        corruptions=parse_names(given["corruptions"] or ""),
        severities=parse_severities(given["severities"]),
        corruption_samples=given["corruption_samples"],
        seed=given["seed"],
        options={name: given[name] for name in PLAN_OPTIONS if given.get(name)},
    )
