"""What pools of workers have in common, whether these are processes here or actors of a cluster."""

from __future__ import annotations

import traceback
from typing import Any

from resq_deploy import errors
from resq_deploy.errors import CampaignError, ResqError
from resq_deploy.metrics import Logits
from resq_deploy.runtime.trials import digest

_PATIENCE = 50.0  # a trial is not given up before so many times the slowest so far


class Crew:
    """Workers that must agree on the golden logits, and how long their trials take.

    `least`: seconds that a trial is given at least; `timeout`: seconds that it is given, if not None.
    """

    _cure = "--workers 1"  # where golden logits differ

    def __init__(self, timeout: float | None, least: float) -> None:
        self._timeout, self._least = timeout, least
        self._golden: Logits | None = None
        self._engine: dict[str, Any] = {}
        self._slowest = self._typical = 0.0

    def golden(self) -> Logits:
        """Logits without faults, as the workers have them."""
        assert self._golden is not None
        return self._golden

    def _agree(self, golden: Logits) -> None:
        """Raises CampaignError where a worker's golden logits are not the others'."""
        if self._golden is None:
            self._golden = golden
        elif digest(golden) != digest(self._golden):
            raise CampaignError("two workers have different golden logits", self._cure)

    def _took(self, seconds: float, slowest: float) -> None:
        """A trial took so long, on an average of some, and the slowest of them so long."""
        self._typical += (seconds - self._typical) / (8 if self._slowest else 1)
        self._slowest = max(self._slowest, slowest)

    def _batch(self, seconds: float, most: int) -> int:
        """How many trials make so many seconds of work; 1 as long as nothing is known."""
        if not self._slowest:
            return 1
        return int(min(max(seconds / max(self._typical, 1e-6), 1), most))

    def _patience(self) -> float:
        """Seconds that one trial may take."""
        return self._timeout or max(self._least, _PATIENCE * self._slowest)


def words_of(error: Exception) -> tuple[str, str]:
    """Message and hint of an error, to be sent to the process that has to raise it again."""
    if isinstance(error, ResqError):
        return error.message, error.hint
    return traceback.format_exc(), ""


def raise_again(kind: str, text: str, hint: str) -> None:
    """The worker's error, in this process: a ResqError as it was, a bug with the worker's traceback."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, ResqError):
        raise (errors.BackendError if found is errors.MissingExtra else found)(text, hint)
    raise RuntimeError(f"in a worker: {text}")
