"""What can go wrong that a user can mend.

    ResqError                 one line that says what is wrong, and a hint that says what to do; exit status 2
      ModelError              a model file cannot be loaded, or is not the network it is said to be
      DataError               a data set is unknown, missing, empty, misshapen or not finite
      BundleError             a bundle cannot be read or written
        IntegrityError        ... because a file in it is missing or was changed
      FaultError              a fault model, fault list or fault location that does not exist
      AttackError             an attack, or a budget, that does not exist
      BackendError            a runtime that is not installed, has no device, or refuses the file
        MissingExtra          ... because an optional dependency is not installed
        ExecutionError        ... or fails at what it was given to run: with faults in memory, an outcome
          EngineLost          ... and does not answer as before, now that memory is golden again
      CampaignError           a campaign that cannot run, or a journal that belongs to another one
      RequirementError        a `--require` expression that cannot be read
      ReportError             a report that cannot be read or written

A requirement that was read and not met is a result, not an error. Anything that is not a ResqError is a bug of ours.
"""

from __future__ import annotations


class ResqError(Exception):
    """Base of every error a user can mend: `message` says what is wrong, `hint` what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.hint = " ".join(hint.split())

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class ModelError(ResqError):
    """A model file cannot be loaded, or is not the network it is said to be."""


class DataError(ResqError):
    """A data set is unknown, missing, empty, misshapen or not finite."""


class BundleError(ResqError):
    """A bundle cannot be read or written."""


class IntegrityError(BundleError):
    """A file in a bundle is missing, or is not what the manifest says."""


class FaultError(ResqError):
    """A fault model, fault list or fault location that does not exist."""


class AttackError(ResqError):
    """An attack or an attack budget that does not exist."""


class BackendError(ResqError):
    """A runtime that is not installed, has no device, or refuses the file."""


class MissingExtra(BackendError):
    """An optional dependency is not installed; the message names the extra that brings it."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed", f"pip install 'resq-deploy[{extra}]'")
        self.package = package
        self.extra = extra


class ExecutionError(BackendError):
    """A runtime that was there refused or failed at what it was given: with faults in it, that is an outcome."""


class EngineLost(ExecutionError):
    """An engine that failed under faults and no longer answers as it did: no later trial can be run on it.

    The worker process that holds it ends, and is replaced.
    """


class CampaignError(ResqError):
    """A campaign that cannot run, or a journal that belongs to another campaign."""


class RequirementError(ResqError):
    """A requirement that cannot be read."""


class ReportError(ResqError):
    """A report that cannot be read or written."""
