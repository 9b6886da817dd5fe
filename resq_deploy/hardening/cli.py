"""resq-harden: parse, call harden_model, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from resq_deploy.console import Reporter, common_options, print_json, run, shape
from resq_deploy.errors import ModelError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("arch")
@click.option("--data", required=True, help="digits, fashion-mnist, cifar10:DIR, ..., FILE.npz.")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="MODEL.pt",
)
@click.option(
    "--stages",
    default="1+2",
    show_default=True,
    type=click.Choice(["none", "1", "2", "1+2"]),
    help="none: plain training; 1: bear attacks; 2: bear bit flips.",
)
@click.option("--arch-arg", multiple=True, metavar="K=V", help="Of the network: width=16.")
@click.option(
    "--input-shape",
    type=shape,
    metavar="CxHxW",
    help="3x64x64; an imagefolder has none of its own.",
)
@click.option("--init", metavar="FILE|imagenet", help="Start from a checkpoint or torchvision's.")
@click.option("--epochs", type=float, help="Passes of plain training.")
@click.option("--epochs-1", type=float, help="Passes of stage I.")
@click.option("--epochs-2", type=float, help="Passes of stage II.")
@click.option(
    "--set", "settings", multiple=True, metavar="K=V", help="Of the recipe: fault.ber=0.02."
)
@click.option("--batch", type=click.IntRange(2), help="Examples a step.")
@click.option("--amp", type=click.Choice(["off", "bf16", "fp16"]), help="Mixed precision.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1.")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--log-dir", type=click.Path(file_okay=False), help="Event files for TensorBoard.")
@click.option("--resume", is_flag=True, help="Go on where an interrupted run stopped.")
@click.option("--force", is_flag=True, help="Overwrite MODEL.pt.")
@common_options
def harden(
    arch: str,
    data: str,
    output: Path,
    stages: Any,
    arch_arg: tuple[str, ...],
    settings: tuple[str, ...],
    threads: int | None,
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Train ARCH on DATA so that it bears attacks and bit flips (RESQ stages I and II).

    ARCH: resnet8, a torchvision model, or pkg.module:factory. Several GPUs: torchrun
    --nproc-per-node N -m resq_deploy.hardening.cli ARCH ...
    """
    from resq_deploy.hardening import harden_model

    _check_output(output, options.pop("force"), options["resume"])
    if threads is not None:
        _use_threads(threads)
    checkpoint = harden_model(
        arch,
        data,
        output=output,
        stages=stages,
        recipe=_recipe(settings, options),
        arch_args=_pairs(arch_arg),
        reporter=Reporter(quiet=quiet),
        **options,
    )
    summary = {"output": str(output), "arch": arch, **checkpoint.metrics}
    if as_json:
        print_json(summary)
    elif not quiet:
        sys.stderr.write(f"{output}: next, resq-export {output}\n")
    return 0


def _recipe(settings: tuple[str, ...], options: dict[str, Any]) -> Any:
    from resq_deploy.hardening import Recipe

    epochs = [options.pop(key) for key in ("epochs", "epochs_1", "epochs_2")]
    own = {key: options.pop(key) for key in ("batch", "amp")}
    chosen = {key: value for key, value in own.items() if value is not None}
    return Recipe().with_epochs(*epochs).override({**chosen, **_pairs(settings)})


def _pairs(given: tuple[str, ...]) -> dict[str, Any]:
    pairs = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ModelError(f"{text!r} is not K=V", "write for example width=16")
        try:
            pairs[key] = json.loads(value)
        except ValueError:
            pairs[key] = value
    return pairs


def _check_output(output: Path, force: bool, resume: bool) -> None:
    if output.exists() and not (force or resume):
        raise ModelError(f"{output} exists", "choose another name, or give --force")


def _use_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def main() -> None:
    """Entry point."""
    sys.exit(run(harden, prog_name="resq-harden"))


if __name__ == "__main__":
    main()
