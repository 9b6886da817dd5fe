"""HTML and SVG from Python: everything is escaped unless this module made it."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from typing import TypeAlias

_VOID = frozenset({"br", "col", "hr", "meta"})
_CONTROL = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


class Safe(str):
    """Markup that needs no escaping, because `tag` made it."""

    __slots__ = ()


Child: TypeAlias = str | Iterable["Child"] | None


def clean(text: str) -> str:
    """Without the characters that neither XML nor a reader can bear (control characters, lone surrogates)."""
    return _CONTROL.sub("\ufffd", text)


def text(child: Child) -> Safe:
    """A child as markup: text escaped, None nothing, an iterable its parts in order."""
    if child is None:
        return Safe("")
    if isinstance(child, Safe):
        return child
    if isinstance(child, str):
        return Safe(html.escape(clean(child), quote=True))
    return Safe("".join(text(part) for part in child))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Safe:
    """One element. `class_` is `class`, `aria_label` is `aria-label`; None and False leave an attribute out."""
    parts = [f"<{name}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        plain = key.rstrip("_").replace("_", "-")
        parts.append(f" {plain}" if value is True else f' {plain}="{text(_attribute(value))}"')
    if name in _VOID:
        return Safe("".join(parts) + ">")
    return Safe("".join(parts) + f">{text(children)}</{name}>")


def _attribute(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
