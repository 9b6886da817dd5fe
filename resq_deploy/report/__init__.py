"""The report of a validation: its model, and the faces it has (JSON, CSV, JUnit, HTML, terminal)."""

from resq_deploy.errors import ReportError
from resq_deploy.report.files import read_report, write_report
from resq_deploy.report.model import Report
from resq_deploy.report.terminal import print_report

__all__ = ["Report", "ReportError", "print_report", "read_report", "write_report"]
