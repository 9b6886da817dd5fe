"""`pkg.module:factory` -> torch module: somebody's own network.

The factory is a class of nn.Module, or a function that takes `num_classes` (or `classes`), or
`input_shape`, or nothing. It gets those of the three that it names, and what --arch-arg gives. A
function that takes other arguments alone is not called: a checkpoint names its factory and the
arguments, and must not be able to name subprocess.run.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

from resq_deploy.errors import ModelError


def make(path: str, known: Mapping[str, Any], args: Mapping[str, Any], *, here: bool) -> nn.Module:
    """Import a factory and call it.

    `known`: what the data decide, by the names that a factory may give it. `here`: look into the
    working directory too, as `python -m` does. Raises ModelError for what cannot be imported or
    called, raises, or makes something else.
    """
    factory = _found(path, here)
    given = _arguments(path, factory, known, args)
    try:
        network = factory(**given)
    except Exception as error:  # whatever somebody's code may raise
        said = ", ".join(f"{k}={v!r}" for k, v in given.items())
        raise ModelError(
            f"{path} cannot be built with {said or 'no arguments'}: {_first_line(error)}",
            f"call {path.replace(':', '.')}({said}) in Python to see where",
        ) from error
    if not isinstance(network, nn.Module):
        raise ModelError(
            f"{path} made a {type(network).__name__}", "it must return a torch.nn.Module"
        )
    return network


def _found(path: str, here: bool) -> Callable[..., Any]:
    module = _imported(path, here)
    name = path.partition(":")[2]
    found = getattr(module, name, None)
    if found is None:
        near = get_close_matches(name, vars(module), n=3)
        guess = f"close names: {', '.join(near)}" if near else "write pkg.module:factory"
        raise ModelError(f"cannot import {path}: {module.__name__} has no {name!r}", guess)
    if not callable(found):
        raise ModelError(
            f"{path} cannot be called", "name a function or class that makes the network"
        )
    result: Callable[..., Any] = found
    return result


def _imported(path: str, here: bool) -> ModuleType:
    name = path.partition(":")[0]
    if not all(part.isidentifier() for part in name.split(".")) or name.endswith(".py"):
        cure = "write pkg.module:factory, with dots and without .py"
        raise ModelError(f"cannot import {path}: {name!r} is no module", cure)
    folder = os.getcwd()
    if here and folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = error.name or name
        if not f"{name}.".startswith(f"{missing}."):
            cure = f"install {missing}, which {name} imports"
        elif here:
            cure = f"it is neither installed nor in {folder}"
        else:
            cure = f"a file names it: if it is yours, give --arch {path} too, or set PYTHONPATH={folder}"
        raise ModelError(f"cannot import {path}: {error}", cure) from error
    except Exception as error:  # whatever somebody's code may raise
        cure = f"python -c 'import {name}' shows where"
        raise ModelError(f"cannot import {path}: {_first_line(error)}", cure) from error


def _arguments(
    path: str, factory: Callable[..., Any], known: Mapping[str, Any], args: Mapping[str, Any]
) -> dict[str, Any]:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    named = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    given = {key: value for key, value in known.items() if key in named}
    told = {"classes", "num_classes", *given} if named & {"classes", "num_classes"} else {*given}
    is_network = isinstance(factory, type) and issubclass(factory, nn.Module)
    if not (given or is_network or (isinstance(factory, FunctionType) and not args)):
        raise ModelError(
            f"{path} takes neither num_classes nor classes nor input_shape",
            "name one of them among its parameters: def make(num_classes, ...)",
        )
    return {key: value for key, value in args.items() if key not in told} | given


def _first_line(error: Exception) -> str:
    first = str(error).strip().partition("\n")[0][:160]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__
