"""What the site takes from the program itself: the help of each command, the fault models, and the JSON schemas."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from typing import Any

import click

COMMANDS = {
    "resq-harden": "resq_deploy.hardening.cli",
    "resq-export": "resq_deploy.export.cli",
    "resq-validate": "resq_deploy.runtime.cli",
    "resq": "resq_deploy.runtime.resq",
}
SCHEMAS = ("manifest", "report", "weights")
_MARK = re.compile(r"^<!-- (help|models): ?(.*?) ?-->$", re.MULTILINE)


def command(name: str) -> click.Command:
    """The click command of an entry point."""
    module = importlib.import_module(COMMANDS[name])
    found = getattr(module, "command", None) or getattr(module, "group", None)
    found = found or getattr(module, "main", None)
    if not isinstance(found, click.Command):
        found = next(v for v in vars(module).values() if isinstance(v, click.Command))
    return found


def helps(name: str) -> Iterator[tuple[str, str]]:
    """(words, help text) of a command and everything below it."""
    yield from _helps(command(name), name, None)


def _helps(
    found: click.Command, words: str, above: click.Context | None
) -> Iterator[tuple[str, str]]:
    # click keeps the first help option that a command shows, so it has to be the command's own
    names = found.context_settings.get("help_option_names")
    context = click.Context(
        found,
        info_name=words.split()[-1],
        parent=above,
        terminal_width=96,
        help_option_names=names,
    )
    yield words, found.get_help(context)
    for name in getattr(found, "commands", {}):
        yield from _helps(found.commands[name], f"{words} {name}", context)  # type: ignore[attr-defined]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace `<!-- help: resq -->` and `<!-- models: -->`."""
    return _MARK.sub(_filled, markdown)


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Publish the JSON schemas beside the reference."""
    from mkdocs.structure.files import File

    from resq_deploy.runtime.schemas import schema_of

    for which in SCHEMAS:
        text = json.dumps(schema_of(which), indent=1, sort_keys=True) + "\n"
        files.append(File.generated(config, f"reference/{which}.schema.json", content=text))
    return files


def _filled(found: re.Match[str]) -> str:
    if found[1] == "models":
        return _models()
    parts = [f"## {words}\n\n```text\n{text}\n```" for words, text in helps(found[2])]
    return "\n\n".join(parts)


def _models() -> str:
    from resq_deploy.fault_models import usage

    rows = [f"| `{form}` | {meaning} |" for form, meaning in usage()]
    return "\n".join(["| Fault model | One trial |", "| --- | --- |", *rows])
