#!/usr/bin/env python3
"""Print what a package and some of its extras need, one requirement a line: requirements.py pyproject.toml EXTRA ..."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any


def read(path: str) -> dict[str, Any]:
    """The [project] table. Python 3.10, which JetPack 6 has, brings tomli only inside pip."""
    try:
        import tomllib
    except ModuleNotFoundError:
        from pip._vendor import tomli as tomllib  # type: ignore[no-redef]
    project: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8"))["project"]
    return project


def needs(project: dict[str, Any], extras: list[str]) -> list[str]:
    """Requirements of the package with extras; extras that name the package itself are opened up."""
    own = re.compile(re.escape(project["name"]) + r"\[([^]]+)\]")
    found = list(project["dependencies"])
    waiting, seen = list(extras), set[str]()
    while waiting:
        extra = waiting.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        for requirement in project["optional-dependencies"][extra]:
            match = own.fullmatch(requirement)
            if match:
                waiting += [name.strip() for name in match[1].split(",")]
            else:
                found.append(requirement)
    return list(dict.fromkeys(found))


if __name__ == "__main__":
    sys.stdout.write("\n".join(needs(read(sys.argv[1]), sys.argv[2:])) + "\n")
