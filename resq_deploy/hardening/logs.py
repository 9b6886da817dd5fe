"""Scalars for TensorBoard."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from resq_deploy.errors import MissingExtra
from resq_deploy.hardening.checks import check_writable

Log = Callable[[str, float, int], None]


@contextmanager
def scalars(log_dir: str | os.PathLike[str] | None) -> Iterator[Log]:
    """A function (tag, value, step) that writes event files into `log_dir`, or does nothing if that is None.

    Raises ModelError for a folder that cannot be written, MissingExtra without tensorboard.
    """
    if log_dir is None:
        yield lambda _tag, _value, _step: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("tensorboard", "harden") from error
    check_writable(Path(log_dir) / "events")
    writer = SummaryWriter(os.fspath(log_dir))
    try:
        yield lambda tag, value, step: writer.add_scalar(tag, value, step)
    finally:
        writer.close()
