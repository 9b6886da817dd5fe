"""Flags of resq-export that concern engines, and what a command line may say of a bundle that exists."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from resq_deploy.bundle import Bundle
from resq_deploy.console import Reporter
from resq_deploy.errors import BundleError
from resq_deploy.export.engine_options import EngineOptions

EPILOG = """\b
Examples:
  resq-export model.pt
  resq-export model.pt --target tensorrt-rtx --sm 86,89 --batch 1:8:32
  resq-export weights.pt --arch torchvision:resnet18 --calib cifar10:DIR

\b
On the device, where no torch is needed, add a plan to a bundle:
  resq-export model.resq --target tensorrt
  resq-export model.resq --target tensorrt -o with-plan.resq --timing-cache timing.cache
"""

_OF_BUNDLES = {"model", "output", "batch", "targets", "sm", "force", "quiet", "as_json"}
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}


def _size(text: str) -> int:
    found = re.fullmatch(r"(\d+)([kmg]?)(i?b)?", text.strip().lower())
    if not found:
        raise click.BadParameter(f"{text!r} is not a size, such as 512M or 2G")
    return int(found[1]) * _UNITS[found[2]]


def engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that become EngineOptions."""
    for option in (
        click.option("--refit", is_flag=True, help="A plan whose weights can be replaced later."),
        click.option("--hardware-compatible", is_flag=True, help="TensorRT: for Ampere and later."),
        click.option(
            "--version-compatible", is_flag=True, help="TensorRT: for later versions, too."
        ),
        click.option(
            "--timing-cache",
            type=click.Path(path_type=Path, dir_okay=False),
            help="TensorRT: read, and updated.",
        ),
        click.option(
            "--optimization-level", type=click.IntRange(0, 5), help="Of the engine builder."
        ),
        click.option("--workspace", type=_size, metavar="SIZE", help="Of the engine builder: 2G."),
    ):
        command = option(command)
    return command


def take_engine_options(options: dict[str, Any]) -> EngineOptions:
    """The EngineOptions among a command's options, which are taken out."""
    names = EngineOptions.__dataclass_fields__
    return EngineOptions(**{name: options.pop(name) for name in names})


def add_to_bundle(
    ctx: click.Context, bundle: Path, engine: EngineOptions, options: dict[str, Any], say: Reporter
) -> Bundle:
    """Build engines into a bundle. Raises BundleError for flags that make no sense there."""
    from resq_deploy.export.on_device import add_engines

    allowed = {*_OF_BUNDLES, *EngineOptions.__dataclass_fields__}
    given = [p for p in ctx.command.params if is_given(ctx, p.name) and p.name not in allowed]
    if given:
        flags = ", ".join(p.opts[0] for p in given)
        raise BundleError(
            f"{bundle} is a bundle already: {flags} can no longer be chosen",
            "give --target and what engines take, or export the model again",
        )
    return add_engines(
        bundle,
        options["output"],
        targets=options["targets"],
        batch=options["batch"],
        sm=options["sm"],
        options=engine,
        force=options["force"],
        reporter=say,
    )


def is_given(ctx: click.Context, name: str | None) -> bool:
    """Whether the user gave this parameter, rather than its default."""
    defaults = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    return ctx.get_parameter_source(name or "") not in (None, *defaults)
