"""Commands whose output nobody reads to the end, or that cannot be written at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resq_deploy import console
from resq_deploy.report import write_report
from tests.bundles import write_bundle
from tests.report import example
from tests.test_console import _command

CALL = "import sys; from resq_deploy.runtime.{} import main; main()"


def gone() -> int:
    """The end of a pipe that has no reader."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def call(module: str, *args: str | Path, **streams: int) -> tuple[int, str]:
    """Status and what was said on stderr."""
    command = [sys.executable, "-c", CALL.format(module), *map(str, args)]
    kept = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    done = subprocess.run(command, text=True, check=False, timeout=120, **kept)  # type: ignore[call-overload]
    return done.returncode, done.stderr or ""


@pytest.mark.parametrize(
    "args", ["inspect BUNDLE", "inspect BUNDLE --json", "plan offset BUNDLE w_8 0"]
)
def test_a_reader_that_leaves_is_nothing(tmp_path: Path, args: str) -> None:
    bundle = write_bundle(tmp_path / "net.resq").path
    given = args.replace("BUNDLE", str(bundle)).split()
    assert call("resq", *given, stdout=gone()) == (console.OK, "")


@pytest.mark.parametrize("args", [["schema", "report"], ["--help"], ["--version"]])
def test_what_click_prints_is_no_exception(args: list[str]) -> None:
    assert call("resq", *args, stdout=gone()) == (console.OK, "")


@pytest.mark.parametrize("json", [[], ["--json"]])
@pytest.mark.parametrize("met", [True, False])
def test_the_status_is_the_commands_own(tmp_path: Path, met: bool, json: list[str]) -> None:
    report = example.report()
    first = report.requirements[0]
    changed = report.model_copy(update={"requirements": (first.model_copy(update={"met": met}),)})
    write_report(changed, tmp_path / "r")
    want = console.OK if met else console.REQUIREMENT_NOT_MET
    assert call("resq", "report", tmp_path / "r", *json, stdout=gone()) == (want, "")


def test_an_error_nobody_reads_keeps_its_status(tmp_path: Path) -> None:
    status, _ = call("cli", tmp_path / "none.resq", stderr=gone())
    assert status == console.BAD_INPUT


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("args", [["schema", "report"], ["inspect"], ["inspect", "--json"]])
def test_a_full_disk_is_one_line(tmp_path: Path, args: list[str]) -> None:
    bundle = [write_bundle(tmp_path / "net.resq").path] if args[0] == "inspect" else []
    with open("/dev/full", "w") as full:
        status, said = call("resq", *args, *bundle, stdout=full.fileno())
    assert status == console.BAD_INPUT
    want = "error: cannot write the output: No space left on device (send it where there is space)"
    assert said == f"{want}\n"


def test_streams_the_caller_closed_are_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert console.run(_command(), ["--help"]) == console.OK
    assert console.run(_command(), ["--nonsense"]) == console.BAD_INPUT


def test_a_pipe_that_breaks_elsewhere_is_a_bug(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.run(_command(BrokenPipeError(32, "a worker is gone")), []) == console.BUG
    assert "bug in resq-deploy" in capsys.readouterr().err
