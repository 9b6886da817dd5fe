"""Mutations that keep JSON readable, so that fuzzing gets behind the parser."""

from __future__ import annotations

import json
import random
from typing import Any

ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2**31,
    2**63,
    10**400,
    1e308,
    -0.0,
    "",
    "..",
    "../../etc/passwd",
    "/dev/zero",
    "\0",
    "\ud800",
    "x" * 10_000,
    [],
    {},
    [[[[[]]]]],
)


def mutate_json(data: bytes, seed: int) -> bytes | None:
    """The bytes with one value, key or line of their JSON changed; None where they are no JSON."""
    choose = random.Random(seed)
    lines = data.split(b"\n")
    place = choose.randrange(len(lines)) if _is_json(lines[0]) else None
    try:
        tree = json.loads(data if place is None else lines[place])
    except (ValueError, RecursionError):
        return None
    changed = json.dumps(_mutate(tree, choose)).encode("utf-8", "replace")
    if place is None:
        return changed
    return b"\n".join([*lines[:place], changed, *lines[place + choose.randrange(2) :]])


def _mutate(tree: Any, choose: random.Random) -> Any:
    if isinstance(tree, dict) and tree and choose.random() < 0.9:
        key = choose.choice(list(tree))
        action = choose.random()
        if action < 0.1:
            return {k: v for k, v in tree.items() if k != key}
        if action < 0.2:
            return {**tree, str(choose.choice(ODD))[:99]: tree[key]}
        return {**tree, key: _mutate(tree[key], choose)}
    if isinstance(tree, list) and tree and choose.random() < 0.9:
        place = choose.randrange(len(tree))
        if choose.random() < 0.2:
            return tree[:place] + tree[place:] * 2
        return [*tree[:place], _mutate(tree[place], choose), *tree[place + 1 :]]
    if isinstance(tree, int | float) and abs(tree) < 2**63 and choose.random() < 0.5:
        return choose.choice((tree + 1, tree - 1, -tree, tree * 2, tree * 1000, tree * tree))
    return choose.choice(ODD)


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
