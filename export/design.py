"""What stage III is asked to design a graph for, and what that may cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.errors import DataError

DESIGN_BER = 1e-3
REDUNDANCY = 0.1
EFFORT = 1.0
LEAST = 16  # calibration images: fewer cannot be split into learning and held-out ones


@dataclass(frozen=True, slots=True)
class Design:
    """Bit flips of the weights at `ber`, met with copies of inputs and with learning.

    `ber`: probability that a bit is flipped; `redundancy`: the share of the network's work that channel splitting may
    add, 0 for none; `effort`: how much distillation may take, 1 for some minutes on two cores, 0 for none.
    Raises DataError for a bit error rate outside (0, 1), and for what is negative or infinite.
    """

    ber: float = DESIGN_BER
    redundancy: float = REDUNDANCY
    effort: float = EFFORT

    def __post_init__(self) -> None:
        if not 0 < self.ber < 1:
            raise DataError(f"a design BER of {self.ber}", "give a rate between 0 and 1, as 1e-3")
        if not 0 <= self.redundancy < np.inf:
            raise DataError(f"a redundancy of {self.redundancy}", "give a share, as 0.1")
        if not 0 <= self.effort < np.inf:
            raise DataError(f"an effort of {self.effort}", "1 is the usual one; 0 for none")
