import platform
import sys
from pathlib import Path

import pytest

from resq_deploy.export.heap import give_back

_PIECES, _BYTES = 2000, 64 * 1024  # below what malloc maps and unmaps one by one


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or sys.platform != "linux", reason="malloc_trim is glibc's"
)
def test_what_was_freed_below_something_that_lives_goes_back_to_the_system() -> None:
    pieces = [bytes([1]) * _BYTES for _ in range(_PIECES)]
    last = pieces[-1]
    del pieces
    held = _resident()

    give_back()

    assert held - _resident() > _PIECES * _BYTES / 2
    assert len(last) == _BYTES


def test_another_c_library_has_nothing_to_trim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())

    give_back()
