"""What this machine gives: cores, memory, and processes that do not run the caller's script again."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

_SHARE_OF_MEMORY = 0.7  # of what is free may be taken by more workers


def cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def room_for(count: int, size: int, meminfo: str = "/proc/meminfo") -> bool:
    """Whether so many processes of `size` bytes fit into memory that is free; True where nobody can tell."""
    try:
        with open(meminfo, encoding="ascii") as lines:
            sizes = {
                name: int(rest.split()[0]) for name, _, rest in (x.partition(":") for x in lines)
            }
        return count * size < _SHARE_OF_MEMORY * sizes["MemAvailable"] * 1024
    except (OSError, ValueError, IndexError, KeyError):
        return True


def resident(pid: int) -> int:
    """Bytes of memory that a process occupies, 0 where the system does not tell."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text("ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        return 0


@contextlib.contextmanager
def without_main(factory: object) -> Iterator[None]:
    """Start a process without importing the caller's script in it, so that scripts need no `__main__` guard.

    Where the script itself defines the factory, there is no way around importing it.
    """
    main = sys.modules["__main__"]
    if "__main__" in (getattr(factory, "__module__", ""), type(factory).__module__):
        yield
        return
    file, spec = main.__dict__.pop("__file__", None), main.__spec__
    try:
        main.__spec__ = None
        yield
    finally:
        main.__spec__ = spec
        if file is not None:
            main.__file__ = file
