from __future__ import annotations

import io
import json

import click
import pytest

from resq_deploy import console
from resq_deploy.errors import DataError, MissingExtra


def _command(error: BaseException | None = None, status: int | None = None) -> click.Command:
    @click.command()
    @console.common_options
    def command(seed: int, quiet: bool, as_json: bool) -> int | None:
        if error is not None:
            raise error
        return status

    return command


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (None, 0, ""),
        (DataError("no\nsuch data", "try digits"), 2, "error: no such data (try digits)\n"),
        (
            MissingExtra("torch", "export"),
            2,
            "error: torch is not installed (pip install 'resq-deploy[export]')\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_status(
    error: BaseException | None, status: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(_command(error), []) == status
    said = capsys.readouterr().err
    assert text in said
    assert "Traceback" not in said


def test_a_bug_keeps_its_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(_command(ZeroDivisionError("ours")), []) == 3
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert "bug in resq-deploy" in said


def test_a_requirement_that_is_not_met_is_status_1() -> None:
    assert console.run(_command(status=1), []) == 1


@pytest.mark.parametrize("args", [["--nonsense"], ["--seed", "-1"], ["surplus"]])
def test_bad_usage_is_status_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(_command(), args) == 2
    assert "Error" in capsys.readouterr().err


def test_help_is_status_0() -> None:
    assert console.run(_command(), ["--help"]) == 0


def test_progress_is_plain_lines_without_a_terminal() -> None:
    stream = io.StringIO()
    with console.Reporter(quiet=False, stream=stream).task("trials", 3, "trials") as task:
        for _ in range(3):
            task.note("accuracy 0.9")
            task.advance(1)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("trials: 3/3 trials (")
    assert lines[0].endswith("accuracy 0.9")


def test_a_quiet_reporter_warns_and_says_nothing_else() -> None:
    stream = io.StringIO()
    reporter = console.Reporter(quiet=True, stream=stream)
    reporter.log("nobody reads this")
    with reporter.task("work", 1) as task:
        task.advance(1)
    reporter.warn("but this")
    assert stream.getvalue() == "warning: but this\n"


def test_json_is_one_object_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_json({"b": 1, "a": [0.5]})
    assert json.loads(capsys.readouterr().out) == {"a": [0.5], "b": 1}
