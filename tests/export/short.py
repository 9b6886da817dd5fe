"""Stage III in seconds: fewer steps of learning, and fewer trials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from resq_deploy.export import stage

_MORE = stage._MORE


@contextmanager
def few_steps(trials: bool = False) -> Iterator[None]:
    """30 steps; `trials`: a small network is measured in as few trials as a large one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "_STEPS", (30, 30))
        patch.setattr(stage, "_MORE", 1 if trials else _MORE)
        yield
