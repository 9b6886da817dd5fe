"""resq-deploy: prove that a quantized network survives adversarial inputs and bit flips after deployment.

    harden_model    a network trained to survive both (RESQ stages I and II)      resq-harden
    export_model    that network as calibrated, adjusted INT8 (stage III)         resq-export
    validate_bundle flips bits in, and attacks, the deployed artifact itself      resq-validate

Everything is loaded on first use: importing this package needs neither torch nor a runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resq_deploy.bundle import Bundle, Sample
    from resq_deploy.console import Reporter
    from resq_deploy.errors import ResqError
    from resq_deploy.export.pipeline import export_model
    from resq_deploy.faults import Fault, FaultSpace, Flips
    from resq_deploy.hardening import harden_model
    from resq_deploy.memory import fault_space
    from resq_deploy.report.files import read_report, write_report
    from resq_deploy.report.model import Campaign, Figure, Report
    from resq_deploy.runtime.runner import Runner, open_runner
    from resq_deploy.runtime.settings import Settings
    from resq_deploy.runtime.validate import validate_bundle

__version__ = "0.1.0"

_HOME = {
    "Bundle": "resq_deploy.bundle",
    "Campaign": "resq_deploy.report.model",
    "Fault": "resq_deploy.faults",
    "FaultSpace": "resq_deploy.faults",
    "Figure": "resq_deploy.report.model",
    "Flips": "resq_deploy.faults",
    "Report": "resq_deploy.report.model",
    "Reporter": "resq_deploy.console",
    "ResqError": "resq_deploy.errors",
    "Runner": "resq_deploy.runtime.runner",
    "Sample": "resq_deploy.bundle",
    "Settings": "resq_deploy.runtime.settings",
    "export_model": "resq_deploy.export.pipeline",
    "fault_space": "resq_deploy.memory",
    "harden_model": "resq_deploy.hardening",
    "open_runner": "resq_deploy.runtime.runner",
    "read_report": "resq_deploy.report.files",
    "validate_bundle": "resq_deploy.runtime.validate",
    "write_report": "resq_deploy.report.files",
}

__all__ = [
    "Bundle",
    "Campaign",
    "Fault",
    "FaultSpace",
    "Figure",
    "Flips",
    "Report",
    "Reporter",
    "ResqError",
    "Runner",
    "Sample",
    "Settings",
    "__version__",
    "export_model",
    "fault_space",
    "harden_model",
    "open_runner",
    "read_report",
    "validate_bundle",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
