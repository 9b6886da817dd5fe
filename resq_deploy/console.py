"""What all commands share: exit status, one-line errors, progress, logs on stderr, `--json` on stdout."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from resq_deploy import __version__
from resq_deploy._streams import guarded
from resq_deploy.errors import MissingExtra, ResqError

OK = 0
REQUIREMENT_NOT_MET = 1
BAD_INPUT = 2
BUG = 3
INTERRUPTED = 130

_EXTRAS = dict.fromkeys(("torch", "torchvision", "onnxscript", "onnx_ir"), "export")
_PLAIN_SECONDS = 10.0  # between two lines of progress where there is no terminal
_RATED_SECONDS = 1.0  # a rate over less is noise


class _RateColumn(TextColumn):
    def __init__(self) -> None:
        super().__init__("{task.speed}")

    def render(self, task: Any) -> Any:
        from rich.text import Text

        known = task.speed and (task.elapsed or 0) >= _RATED_SECONDS
        return Text(f"{task.speed:,.1f}/s" if known else "", style="progress.data.speed")


@dataclass
class Task:
    """One running piece of work. `advance` moves it on; `note` is shown beside the bar."""

    advance: Callable[[float], None]
    note: Callable[[str], None]


class Reporter:
    """Where the library tells a person how far it is: a bar with rate and ETA on a terminal, plain lines otherwise.

    The library takes a Reporter and never prints by itself. `Reporter(quiet=True)` (the default of every API call) says
    nothing.
    """

    def __init__(self, *, quiet: bool = True, stream: TextIO | None = None) -> None:
        self.quiet = quiet
        self._console = Console(file=stream or sys.stderr, highlight=False, soft_wrap=True)

    def log(self, message: str) -> None:
        """One line on stderr, unless quiet."""
        if not self.quiet:
            self._console.print(message, markup=False)

    def warn(self, message: str) -> None:
        """One line on stderr, also when quiet: something the user has to know."""
        self._console.print(f"warning: {message}", markup=False)

    @contextmanager
    def task(self, title: str, total: float | None, unit: str = "") -> Iterator[Task]:
        """Progress of one loop of `total` steps (None: unknown)."""
        if self.quiet:
            yield Task(lambda _: None, lambda _: None)
        elif self._console.is_terminal:
            with self._bar(title, total) as task:
                yield task
        else:
            yield self._lines(title, total, unit)

    @contextmanager
    def _bar(self, title: str, total: float | None) -> Iterator[Task]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=self._console, transient=False) as progress:
            job = progress.add_task(title, total=total, note="")
            yield Task(
                lambda step: progress.advance(job, step),
                lambda text: progress.update(job, note=text),
            )

    def _lines(self, title: str, total: float | None, unit: str) -> Task:
        start = last = time.monotonic()
        done, text = 0.0, ""

        def advance(step: float) -> None:
            nonlocal done, last
            done += step
            now = time.monotonic()
            finished = total is not None and done >= total
            if now - last < _PLAIN_SECONDS and not finished:
                return
            last = now
            passed = now - start
            said = [f"{done:g}" if total is None else f"{done:g}/{total:g}", unit]
            if passed >= _RATED_SECONDS and done:
                ahead = 0 if total is None or finished else passed * (total - done) / done
                left = f", {ahead:.0f} s left" if ahead else ""
                said.append(f"({done / passed:,.1f}/s{left})")
            self.log(f"{title}: {' '.join(part for part in (*said, text) if part)}")

        def note(message: str) -> None:
            nonlocal text
            text = message

        return Task(advance, note)


def print_json(value: Mapping[str, Any]) -> None:
    """One JSON object on stdout: what `--json` promises."""
    sys.stdout.write(json.dumps(value, sort_keys=True, allow_nan=False) + "\n")


def shape(text: str) -> tuple[int, int, int]:
    """`3x32x32` -> (3, 32, 32), as the type of an option; click.BadParameter for anything else."""
    try:
        channels, height, width = map(int, text.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not CxHxW, such as 3x32x32") from None
    if min(channels, height, width) < 1:
        raise click.BadParameter(f"{text!r}: each size must be at least 1")
    return channels, height, width


def common_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--json`, `--quiet`, `--seed` and `--version`, which every command has."""
    for option in (
        click.version_option(__version__),
        click.option(
            "--seed",
            default=0,
            show_default=True,
            type=click.IntRange(0, 2**63 - 1),
            help="Of every random choice.",
        ),
        click.option("--quiet", is_flag=True, help="No progress, no logs."),
        click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout."),
    ):
        command = option(command)
    return command


def run(command: click.Command, args: list[str] | None = None, prog_name: str | None = None) -> int:
    """Run a click command and return its exit status: 0 done, 1 a requirement was not met, 2 bad input, 3 our bug,
    130 interrupted.

    The command's return value is its status (None: 0), whether or not anybody reads its output to the end. A ResqError
    or a missing package of an extra becomes one line on stderr; any other exception is a bug of ours and keeps its
    traceback.
    """
    with guarded() as out:
        try:
            status = command.main(args, prog_name=prog_name, standalone_mode=False)
            out.check()
            return int(status or OK)
        except ResqError as error:
            sys.stderr.write(f"error: {error}\n")
            return BAD_INPUT
        except click.ClickException as error:
            error.show()
            return BAD_INPUT
        except (click.Abort, KeyboardInterrupt):
            sys.stderr.write("interrupted\n")
            return INTERRUPTED
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in _EXTRAS:
                return _bug()
            sys.stderr.write(f"error: {MissingExtra(package, _EXTRAS[package])}\n")
            return BAD_INPUT
        except SystemExit:
            if sys.stdout is out:
                raise
            return _bug()  # click took another pipe that broke for stdout, and replaced it
        except Exception:
            return _bug()


def _bug() -> int:
    import traceback

    traceback.print_exc()
    sys.stderr.write("This is a bug in resq-deploy, please report it with the lines above.\n")
    return BUG
