"""Peak memory of a program. Part of campaign.py and export.py."""

from __future__ import annotations

from pathlib import Path


def peak_bytes() -> int:
    """Peak resident memory of this program; ru_maxrss would still know the process that started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
