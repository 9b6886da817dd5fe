"""Run a benchmark as on a CPU with VNNI and no AMX: python benchmarks/no_amx.py benchmarks/export.py --arch resnet18

Linux gives AMX tiles to processes that ask for them. Here a filter (seccomp) refuses what they ask, also in what they
start. ONNX Runtime and OpenVINO then multiply bytes with AVX512-VNNI, on the same machine. x86-64 Linux only.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import runpy
import struct
import sys

_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # of prctl
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF: load a word, jump if equal, return
_NUMBER, _FIRST_ARGUMENT = 0, 16  # offsets in seccomp_data
_ARCH_PRCTL, _PERMIT = 158, 0x1023  # ARCH_REQ_XCOMP_PERM
_REFUSED, _ALLOWED = 0x50000 | errno.EPERM, 0x7FFF0000


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("code", ctypes.c_void_p))


def refuse() -> None:
    """From now on nobody in this process, or started by it, gets AMX. Raises OSError where that cannot be arranged."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        raise OSError("only for Linux on x86-64")
    steps = (
        (_LOAD, 0, 0, _NUMBER),
        (_IF_EQUAL, 0, 3, _ARCH_PRCTL),
        (_LOAD, 0, 0, _FIRST_ARGUMENT),
        (_IF_EQUAL, 0, 1, _PERMIT),
        (_RETURN, 0, 0, _REFUSED),
        (_RETURN, 0, 0, _ALLOWED),
    )
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = _Program(len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) == 0
    if not (done and libc.prctl(_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) == 0):
        raise OSError(ctypes.get_errno(), "the kernel takes no filter")


if __name__ == "__main__":
    refuse()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
