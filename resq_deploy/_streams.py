"""Standard output and error while a command runs: a reader that leaves changes neither what is done nor the status."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from resq_deploy.errors import ResqError


class Guarded:
    """A text stream that drops what cannot be written, and remembers why.

    A stream, not a rich Console: tables, click's help and JSON all pass here, and both rich and
    click would end the process with status 1, which means something else.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Characters taken, as TextIO has it."""
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """As TextIO has it."""
        self._try(self._stream.flush)

    def check(self) -> None:
        """Write what is left. Raises ResqError where something was lost that somebody waits for."""
        self.flush()
        if self._failure is not None and not isinstance(self._failure, BrokenPipeError):
            why = self._failure.strerror or str(self._failure)
            raise ResqError(f"cannot write the output: {why}", "send it where there is space")

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            # not raised here: click tries streams out, and swallows what that raises
            self._failure = self._failure or error
            self._discard()

    def _discard(self) -> None:
        """Into the null device from here on: Python flushes once more when it exits."""
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
            self._stream.flush()


@contextmanager
def guarded() -> Iterator[Guarded]:
    """sys.stdout, which is yielded, and sys.stderr guarded inside the block.

    What stderr loses is a log; only stdout is worth a `check`.
    """
    before = sys.stdout, sys.stderr
    # a stream that the caller closed is None
    out, log = (Guarded(stream or io.StringIO()) for stream in before)
    sys.stdout, sys.stderr = cast(TextIO, out), cast(TextIO, log)
    try:
        yield out
    finally:
        out.flush()
        sys.stdout, sys.stderr = before
