"""The budget of an attack: a norm and an eps in pixels of [0, 1]; how it is read, projected onto, and checked.

No torch here: a device checks stored adversarial inputs with the function that crafting checked them with.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from resq_deploy.errors import AttackError

Norm = Literal["linf", "l2"]
NORMS: tuple[Norm, ...] = get_args(Norm)

WHITE_BOX = ("fgsm", "pgd", "apgd", "apgd-t")
BLACK_BOX = ("square", "hopskipjump")
ATTACKS = (*WHITE_BOX, *BLACK_BOX)

_ROUNDING = 2.0**-22  # x + delta of two float32 in [0, 1] is off by less than this
_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*"


@dataclass(frozen=True, slots=True)
class Budget:
    """How far a pixel (`linf`) or a whole image (`l2`, Euclidean) may move; `eps` in (0, 1], L2 in (0, inf)."""

    norm: Norm
    eps: float

    def __post_init__(self) -> None:
        if self.norm not in NORMS:
            raise AttackError(f"unknown norm {self.norm!r}", f"one of: {', '.join(NORMS)}")
        _check_eps(self.eps, self.norm)

    def distance(
        self, clean: NDArray[np.float32], moved: NDArray[np.float32]
    ) -> NDArray[np.float64]:
        """How far each image moved: two arrays [N, ...] of pixels -> float64 [N], in this norm."""
        delta = (moved.astype(np.float64) - clean).reshape(len(clean), -1)
        if self.norm == "linf":
            largest: NDArray[np.float64] = np.abs(delta).max(axis=1, initial=0.0)
            return largest
        length: NDArray[np.float64] = np.sqrt(np.square(delta).sum(axis=1))
        return length

    def slack(self, size: int) -> float:
        """What float32 rounding may add to a distance of images of `size` pixels."""
        return _ROUNDING if self.norm == "linf" else _ROUNDING * math.sqrt(size)

    def __str__(self) -> str:
        return f"{self.norm} {format_eps(self.eps)}"


def parse_eps(text: str | float, norm: Norm = "linf") -> float:
    """`8/255`, `0.03` or `1e-2` to a float in (0, 1] (L2: any above 0). Raises AttackError."""
    if isinstance(text, (int, float)):
        return _check_eps(float(text), norm)
    found = re.fullmatch(rf"{_NUMBER}(?:/{_NUMBER})?", text)
    if not found or (found[2] is not None and float(found[2]) == 0):
        raise AttackError(f"an eps of {text!r} cannot be read", "such as 8/255 or 0.03")
    return _check_eps(float(found[1]) / float(found[2] or 1), norm)


def _check_eps(eps: float, norm: str) -> float:
    highest = 1.0 if norm == "linf" else math.inf
    if not 0 < eps <= highest or math.isinf(eps):
        limit = "above 0 and at most 1" if norm == "linf" else "above 0"
        raise AttackError(f"an eps of {eps:g}", f"{limit}, in pixels of [0, 1]: such as 8/255")
    return eps


def format_eps(eps: float) -> str:
    """A budget as people write it: `8/255` where it is a whole number of 8-bit steps, else a decimal."""
    steps = eps * 255
    if steps >= 1 and abs(steps - round(steps)) < 1e-4 and eps <= 1:
        return f"{round(steps)}/255"
    return f"{eps:g}"


def parse_attack(name: str) -> str:
    """The attack of this name. Raises AttackError, with the known ones, where there is none."""
    plain = name.strip().lower().replace("_", "-")
    plain = {"apgd-ce": "apgd", "apgd-dlr-t": "apgd-t"}.get(plain, plain)
    if plain not in ATTACKS:
        raise AttackError(f"unknown attack {name!r}", f"one of: {', '.join(ATTACKS)}")
    return plain


def check_budget(
    clean: NDArray[np.float32], moved: NDArray[np.float32], eps: float, norm: Norm = "linf"
) -> None:
    """Raise AttackError unless every image is in [0, 1] and within eps of its original, up to float32 rounding.

    Both [N, C, H, W] in the same order. The error names the first image that is not.
    """
    budget = Budget(norm, eps)
    if clean.shape != moved.shape:
        raise AttackError(
            f"adversarial inputs of shape {moved.shape} for images of shape {clean.shape}"
        )
    if moved.size == 0:
        return
    if not np.isfinite(moved).all() or moved.min() < 0 or moved.max() > 1:
        raise AttackError("adversarial inputs have pixels outside [0, 1]", "craft them again")
    far = budget.distance(clean, moved)
    over = np.flatnonzero(far > eps + budget.slack(moved[0].size))
    if over.size:
        worst = int(over[0])
        raise AttackError(
            f"{over.size} of {len(far)} adversarial inputs exceed {budget}: image {worst} moved {far[worst]:.6g}",
            "craft them again",
        )
