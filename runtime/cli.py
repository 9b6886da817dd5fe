"""resq-validate: parse, call the API, print. No logic."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from resq_deploy import console
from resq_deploy.runtime import settings as s
from resq_deploy.runtime.corruptions import IMAGES
from resq_deploy.runtime.places import report_folder
from resq_deploy.runtime.runner import BACKENDS

EPILOG = """\b
Examples:
  resq-validate model.resq
  resq-validate model.resq --ber 1e-4 --trials 100 --require 'accuracy@ber=1e-4 >= 0.85'
  resq-validate model.resq --faults seu,mbu:4 --bits 7 --layers 'layer4.*'
  resq-validate model.resq --attack pgd,square --eps 8/255 --joint -o evidence
  resq-validate model.resq --corruptions weather,blur --severities 1,3,5
  resq-validate model.resq --backend tensorrt --injection plan
"""


@click.command(
    name="resq-validate",
    epilog=EPILOG,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--backend", default="ort", show_default=True, type=click.Choice(list(BACKENDS)))
@click.option("--engine", help="Which engine plan, where the bundle has several for the backend.")
@click.option(
    "--injection",
    type=click.Choice(list(s.WAYS)),
    help="How faults get into an engine plan.  [default: auto]",
)
@click.option(
    "--allow-host-code",
    is_flag=True,
    help="Load a version-compatible plan, and run the code it brings.",
)
@click.option("--data", help="Labelled images to use instead of the bundle's own sample.")
@click.option("--samples", type=int, help="Images of each fault trial.  [default: 256]")
@click.option(
    "--ber",
    default=",".join(f"{p:g}" for p in s.DEFAULT_BER),
    show_default=True,
    help="Bit error rates.",
)
@click.option(
    "--faults", default="seu", show_default=True, help="Fault models: seu, mbu:4, stuck-at-1, ..."
)
@click.option(
    "--fault-list",
    type=click.Path(path_type=Path),
    help="JSON lines: tensor, element, bit[, trial].",
)
@click.option(
    "--where",
    default="weights",
    show_default=True,
    help="weights, bias, scales, zero-points, float.",
)
@click.option("--layers", help="Only layers or tensors that match these globs.")
@click.option("--bits", help="Only these bit positions: 7, 0-6.  [default: all]")
@click.option(
    "--trials",
    default="auto",
    show_default=True,
    help="Trials of each campaign, or auto: until within --margin.",
)
@click.option(
    "--margin",
    default=0.01,
    show_default=True,
    help="Half width of an interval at which auto stops.",
)
@click.option("--confidence", default=0.95, show_default=True, help="Of every interval.")
@click.option(
    "--attack",
    "attacks",
    help="Stored attacks to replay, or black boxes to run; none: no attack.  [default: all stored]",
)
@click.option("--eps", help="Budget of black-box attacks, in pixels of [0, 1]: 8/255.")
@click.option("--joint", is_flag=True, help="Faults on adversarial inputs too.")
@click.option(
    "--corruptions", help="Common corruptions: all, noise, blur, weather, digital, fog, ..."
)
@click.option("--severities", default="1-5", show_default=True, help="Of corruptions: 1-5, or 3,5.")
@click.option(
    "--corruption-samples",
    type=int,
    default=IMAGES,
    show_default=True,
    help="Images of each corruption.",
)
@click.option(
    "--require",
    "require",
    multiple=True,
    help="A condition: 'accuracy@ber=1e-4 >= 0.85'. Repeatable.",
)
@click.option(
    "--workers", default="auto", show_default=True, help="Worker processes, auto, or ray[:ADDRESS]."
)
@click.option("--resume", is_flag=True, help="Go on with the campaigns of an interrupted run.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Report folder.  [default: BUNDLE's name + .report]",
)
@click.option(
    "--key", type=click.Path(path_type=Path), help="Public key: refuse an unsigned bundle."
)
@click.option("--force", is_flag=True, help="Replace an earlier report.")
@console.common_options
def command(
    bundle: Path, require: tuple[str, ...], quiet: bool, as_json: bool, **given: Any
) -> int:
    """Flip bits in a deployed bundle, attack it, and write a report.

    Every fault lands in the bytes that the engine loads, every attack goes through the arithmetic
    that it runs. Exit status: 0 done, 1 a requirement was not met, 2 bad input.
    """
    from resq_deploy.report import print_report
    from resq_deploy.runtime.validate import validate_bundle

    report = validate_bundle(
        bundle,
        s.from_text(
            **{
                k: v
                for k, v in given.items()
                if k not in ("output", "resume", "force", "workers", "key")
            }
        ),
        output=given["output"] or report_folder(bundle),
        require=require,
        workers=given["workers"],
        resume=given["resume"],
        force=given["force"],
        reporter=console.Reporter(quiet=quiet),
        command=("resq-validate", *sys.argv[1:]),
        key=given["key"],
    )
    if as_json:
        console.print_json(report.model_dump(mode="json"))
    else:
        print_report(report, folder=given["output"] or report_folder(bundle))
    return console.OK if report.met else console.REQUIREMENT_NOT_MET


def main() -> None:
    """Entry point of `resq-validate`."""
    sys.exit(console.run(command, prog_name="resq-validate"))
