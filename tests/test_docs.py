"""The docs: their Python runs, their command lines are read by the commands, their workflow is a workflow."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import click
import pytest
import yaml  # type: ignore[import-untyped]

import resq_deploy
from resq_deploy import __version__, console, requirements, signing
from resq_deploy.report import write_report
from tests.bundles import write_bundle
from tests.report import example

STATUSES = ("OK", "REQUIREMENT_NOT_MET", "BAD_INPUT", "BUG", "INTERRUPTED")
DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted([*DOCS.glob("how-to/*.md"), DOCS / "index.md", DOCS / "tutorial.md"])
_BLOCK = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def blocks(page: Path, language: str) -> Iterator[str]:
    """Fenced blocks of a page, but those marked `no-run`."""
    for found in _BLOCK.finditer(page.read_text(encoding="utf-8")):
        if found[1] == language and "no-run" not in found[2]:
            yield found[3]


def command_lines() -> Iterator[str]:
    workflow = yaml.safe_load((DOCS / "ci-example.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["validate"]["steps"]
    scripts = [step["run"] for step in steps if "run" in step]
    scripts += [block for page in PAGES for block in blocks(page, "sh")]
    for script in scripts:
        for line in script.replace("\\\n", " ").splitlines():
            if line.split() and line.split()[0] in hooks().COMMANDS:
                yield " ".join(line.split())


def parse(
    command: click.Command, name: str, args: list[str], above: click.Context | None = None
) -> None:
    """Read arguments as the command would, and go down into its subcommands."""
    context = command.make_context(name, args, parent=above)
    if isinstance(command, click.Group):
        below, found, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        assert found is not None
        parse(found, str(below), rest, context)


@pytest.mark.parametrize("line", sorted(set(command_lines())))
def test_a_command_line_is_read(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model.pt", "weights.pt"):
        Path(name).write_bytes(b"")
    name, *args = shlex.split(line, comments=True)
    parse(hooks().command(name), name, args)
    for option, value in pairwise(args):
        if option == "--require":
            requirements.parse(value)


def test_there_are_command_lines() -> None:
    assert len(set(command_lines())) > 15


@pytest.mark.parametrize(
    "page", [p for p in PAGES if list(blocks(p, "python"))], ids=lambda p: p.stem
)
def test_python_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_bundle(Path("model.resq"))
    signing.generate_key("release")
    signing.sign_bundle("model.resq", "release")
    names: dict[str, Any] = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


def test_the_workflow_publishes_what_it_writes() -> None:
    workflow = yaml.safe_load((DOCS / "ci-example.yml").read_text(encoding="utf-8"))
    text = (DOCS / "ci-example.yml").read_text(encoding="utf-8")
    assert True in workflow  # YAML 1.1 reads the key `on` as true
    assert "report/junit.xml" in text
    assert "-o report" in text
    always = [s for s in workflow["jobs"]["validate"]["steps"] if s.get("if") == "always()"]
    assert len(always) == 2


def test_figure_names_of_the_docs_are_read() -> None:
    text = (DOCS / "reference" / "figures.md").read_text(encoding="utf-8")
    names = re.findall(r"^\| `([^|`]+)`", text, flags=re.MULTILINE)
    assert len(names) > 8
    for name in names:
        assert requirements.parse(f"{name} >= 0.5").figure == name


@pytest.mark.parametrize("name", sorted(hooks().COMMANDS))
def test_the_reference_shows_every_command(name: str) -> None:
    shown = dict(hooks().helps(name))
    assert name in shown
    assert all("Usage: " in text for text in shown.values())
    page = (DOCS / "reference" / "commands.md").read_text(encoding="utf-8")
    assert f"<!-- help: {name} -->" in page
    assert "```text" in hooks().on_page_markdown(page)


@pytest.mark.parametrize("flag", ["-h", "--help", "--version"])
@pytest.mark.parametrize("name", sorted(hooks().COMMANDS))
def test_every_command_says_what_it_is(
    name: str, flag: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert console.run(hooks().command(name), [flag], prog_name=name) == console.OK
    said = capsys.readouterr().out
    assert said.startswith(f"{name}, version {__version__}" if "v" in flag else f"Usage: {name}")


@pytest.mark.parametrize("page", ["../README.md", "reference/commands.md", "design.md"])
def test_every_exit_status_is_listed(page: str) -> None:
    said = " ".join((DOCS / page).read_text(encoding="utf-8").split())
    listed = re.search(r"[Ee]xit status(?: of every command)?\W+0 done[^.]*", said)
    assert listed is not None
    for status in STATUSES:
        assert re.search(rf"\b{getattr(console, status)} ", listed[0])


def test_the_api_is_imported_from_where_the_page_says() -> None:
    page = (DOCS / "reference" / "api.md").read_text(encoding="utf-8")
    first, *others = re.split(r"^## ", page, flags=re.MULTILINE)
    shown = re.findall(r"^::: (\S+)", first, flags=re.MULTILINE)
    assert {path.rpartition(".")[2] for path in shown} == {*resq_deploy.__all__} - {"__version__"}
    for section in others:
        said = re.findall(r"`(resq_deploy[.\w]*)`", section.partition(":::")[0])
        for path in re.findall(r"^::: (\S+)", section, flags=re.MULTILINE):
            name = path.rpartition(".")[2]
            assert path in said or any(hasattr(importlib.import_module(m), name) for m in said)


def test_every_file_of_a_report_is_listed(tmp_path: Path) -> None:
    write_report(example.report(), tmp_path)
    page = (DOCS / "reference" / "files.md").read_text(encoding="utf-8")
    assert {*os.listdir(tmp_path)} <= {*re.findall(r"[\w.]+", page)}


def test_the_fault_models_are_listed() -> None:
    page = (DOCS / "explanation" / "fault-model.md").read_text(encoding="utf-8")
    assert "| `seu` |" in hooks().on_page_markdown(page)
