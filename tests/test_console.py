from __future__ import annotations

import io
import json
from types import SimpleNamespace

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
        (
            ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"),
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


def clock(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> None:
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=iter(seconds).__next__))


def lines_of(seconds: tuple[float, ...], total: float | None, mp: pytest.MonkeyPatch) -> list[str]:
    """What is said of a task that moves on at these times, after a start at 0."""
    clock(mp, 0.0, *seconds)
    stream = io.StringIO()
    with console.Reporter(quiet=False, stream=stream).task("trials", total, "trials") as task:
        for _ in seconds:
            task.note("accuracy 0.9")
            task.advance(1)
    return stream.getvalue().splitlines()


def test_progress_is_plain_lines_without_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of((5.0, 12.0, 15.0), 3, monkeypatch) == [
        "trials: 2/3 trials (0.2/s, 6 s left) accuracy 0.9",
        "trials: 3/3 trials (0.2/s) accuracy 0.9",
    ]
    assert lines_of((11.0,), None, monkeypatch) == ["trials: 1 trials (0.1/s) accuracy 0.9"]


def test_no_rate_of_what_took_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lines_of((1e-5, 2e-5), 2, monkeypatch) == ["trials: 2/2 trials accuracy 0.9"]


def test_no_rate_on_a_terminal_either() -> None:
    task = SimpleNamespace(speed=312_272.3, elapsed=4e-5)
    assert str(console._RateColumn().render(task)) == ""
    task.elapsed = 4.0
    assert str(console._RateColumn().render(task)) == "312,272.3/s"


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
