"""The codes of one activation: v = scale * (q - zero point), 8 bits, signed or unsigned."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from resq_deploy.export.halves import as_half_scales
from resq_deploy.export.twin_ops import fake_quantize
from resq_deploy.quantization import MIN_SCALE, QMAX

UMAX = 255


@dataclass(frozen=True, slots=True)
class Grid:
    """`scale`: a step, positive; `zero_point`: the code of 0; `unsigned`: codes in [0, 255], else in [-128, 127]."""

    scale: float
    zero_point: int = 0
    unsigned: bool = False

    @property
    def codes(self) -> tuple[int, int]:
        """The least and the largest code."""
        return (0, UMAX) if self.unsigned else (-QMAX - 1, QMAX)

    @property
    def ends(self) -> tuple[float, float]:
        """What a range has to reach for this grid: signed ones are as wide below 0 as above."""
        low = 0 if self.unsigned else -QMAX
        return (low - self.zero_point) * self.scale, (self.codes[1] - self.zero_point) * self.scale

    @property
    def dtype(self) -> type[np.uint8] | type[np.int8]:
        """Of its codes."""
        return np.uint8 if self.unsigned else np.int8

    def rounded(self, values: Tensor) -> Tensor:
        """Float values as the codes hold them: float32, the same shape."""
        zero = torch.tensor(float(self.zero_point)) if self.zero_point else None
        return fake_quantize(values, torch.tensor(self.scale), zero, *self.codes)

    def half(self) -> Grid:
        """With a scale that float16 holds."""
        return replace(self, scale=float(as_half_scales(np.asarray(self.scale, np.float32))))


class HasGrid(Protocol):
    """A calibrated range: all that is needed of it here."""

    @property
    def grid(self) -> Grid: ...


def over(low: float, high: float, *, unsigned: bool) -> Grid:
    """The grid over [low, high]: symmetric about 0 (max(|low|, |high|) / 127), or, unsigned, as fine as the ends allow.

    An unsigned one always has a code for 0, and is [0, high] for a tensor that a Relu made. Where neither end is 0,
    rounding the zero point moves both by up to half a step.
    """
    if not unsigned:
        return Grid(max(max(abs(low), abs(high)) / QMAX, float(MIN_SCALE)))
    low, high = min(low, 0.0), max(high, 0.0)
    scale = max((high - low) / UMAX, float(MIN_SCALE))
    return Grid(scale, min(max(round(-low / scale), 0), UMAX), unsigned=True)


def covering(grids: Iterable[Grid]) -> Grid:
    """One grid for tensors that must share it: the widest, or, unsigned, one that reaches all their ends."""
    all_of = list(grids)
    if not all_of[0].unsigned:
        return max(all_of, key=lambda grid: grid.scale)
    lows, highs = zip(*(grid.ends for grid in all_of), strict=True)
    return over(min(lows), max(highs), unsigned=True)
