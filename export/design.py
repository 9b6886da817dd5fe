"""What stage III is asked to design a graph for, and what that may cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from resq_deploy.errors import DataError

DESIGN_BER = 1e-3
SMALL = 2.5e7  # multiply-accumulates per image, up to which a network is small
REDUNDANCY = 0.1  # of the work of a network
REDUNDANCY_SMALL = 0.2  # ... of a small one
EFFORT = 1.0
LEAST = 16  # calibration images: fewer cannot be split into learning and held-out ones


@dataclass(frozen=True, slots=True)
class Design:
    """Bit flips of the weights at `ber`, met with copies of inputs and with learning.

    `ber`: probability that a bit is flipped; `redundancy`: the share of the network's work that channel splitting may
    add, 0 for none, None: a tenth, and a fifth in networks of up to 25 million multiply-accumulates an image, in which
    one flip does more harm; `effort`: how much distillation may take, 1 for some minutes on two cores, 0 for none.
    Raises DataError for a bit error rate outside (0, 1), and for what is negative or infinite.
    """

    ber: float = DESIGN_BER
    redundancy: float | None = None
    effort: float = EFFORT

    def __post_init__(self) -> None:
        if not 0 < self.ber < 1:
            raise DataError(f"a design BER of {self.ber}", "give a rate between 0 and 1, as 1e-3")
        if self.redundancy is not None and not 0 <= self.redundancy < np.inf:
            raise DataError(f"a redundancy of {self.redundancy}", "give a share, as 0.1")
        if not 0 <= self.effort < np.inf:
            raise DataError(f"an effort of {self.effort}", "1 is the usual one; 0 for none")

    def share(self, work: float) -> float:
        """The share of the network's work that splitting may add; `work`: multiply-accumulates per image."""
        if self.redundancy is not None:
            return self.redundancy
        return REDUNDANCY_SMALL if work <= SMALL else REDUNDANCY
