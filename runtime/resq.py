"""resq: look into bundles and reports, sign and verify them. Parse, call the API, print. No logic."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.text import Text

from resq_deploy import __version__, console
from resq_deploy.runtime import tables

EPILOG = """\b
Examples:
  resq inspect model.resq
  resq verify model.resq --key release.pub
  resq report model.report
  resq replay model.report --campaign seu --trial 17
  resq plan model.resq

\b
Completion in bash (zsh and fish likewise):
  eval "$(_RESQ_COMPLETE=bash_source resq)"
"""
PATH = click.Path(path_type=Path)
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
SETTINGS = {"max_content_width": 100, "help_option_names": ["-h", "--help"]}


def show(lines: Iterable[Any]) -> None:
    """Print tables and lines to stdout."""
    out = tables.console()
    for line in lines:
        out.print(line, soft_wrap=isinstance(line, Text))


@click.group(name="resq", epilog=EPILOG, context_settings=SETTINGS)
@click.version_option(__version__, prog_name="resq")
def group() -> None:
    """Look into bundles and reports, sign and verify them.

    resq-harden, resq-export and resq-validate do the work; this shows what they left.
    """


@group.command(
    short_help="Layers, scales and the most sensitive weights of a bundle.",
    epilog="\b\nExamples:\n  resq inspect model.resq\n  resq inspect model.resq --scales",
)
@click.argument("bundle", type=PATH)
@click.option("--scales", is_flag=True, help="Every scale, and how it was chosen.")
@click.option("--all", "everything", is_flag=True, help="All layers, not the first ten.")
@JSON
def inspect(bundle: Path, scales: bool, everything: bool, as_json: bool) -> None:
    """What is in a bundle: accuracy, layers, scales, and the most sensitive weights.

    Layers are ordered by SDC-1 where resq-validate left a report beside the bundle, and by `sign flip`
    otherwise: how large one flipped sign bit is against its channel.
    """
    from resq_deploy.bundle import Bundle
    from resq_deploy.runtime import contents

    opened = Bundle.open(bundle)
    report = contents.nearby_report(opened)
    if as_json:
        console.print_json(contents.summary(opened, report))
    elif scales:
        show(tables.scales(opened))
    else:
        found = contents.layers(opened, report)
        count = len(found) if everything else 10
        show(tables.contents(opened, found, count, report is not None))


class _ShowFirst(click.Group):
    """A group whose first command, `show`, need not be named: `resq plan BUNDLE`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        asked = args and args[0] not in (*self.commands, *ctx.help_option_names)
        return super().parse_args(ctx, ["show", *args] if asked else args)


@group.group(
    cls=_ShowFirst,
    short_help="Where an engine plan keeps each weight.",
    subcommand_metavar="BUNDLE | COMMAND [ARGS]",
    epilog="\b\nExamples:\n  resq plan model.resq      the same as resq plan show model.resq\n"
    "  resq plan offset model.resq conv1.weight 17",
)
def plan() -> None:
    """Where an engine plan keeps each weight: what faults in it can reach.

    With a bundle and no command it prints the map and its coverage.
    """


@plan.command(
    "show",
    short_help="The weight map of an engine in a bundle.",
    epilog="\b\nExamples:\n  resq plan model.resq\n  resq plan show model.resq --engine tensorrt",
)
@click.argument("bundle", type=PATH)
@click.option("--engine", help="Which one.  [default: the only one]")
@JSON
def plan_show(bundle: Path, engine: str | None, as_json: bool) -> None:
    """The weight map of an engine in a bundle, checked against its plan."""
    from resq_deploy.bundle import Bundle
    from resq_deploy.runtime.contents import plan_map

    name, found = plan_map(Bundle.open(bundle), engine)
    if as_json:
        console.print_json({"engine": name, "coverage": found.coverage, **found.model_dump()})
    else:
        show(tables.plan(name, found))


@plan.command(
    "locate",
    short_help="Find the weights in any plan.",
    epilog="\b\nExample:\n  resq plan locate my.plan model.int8.onnx -o my.json",
)
@click.argument("plan_file", type=PATH)
@click.argument("onnx_file", type=PATH)
@click.option("-o", "--output", type=PATH, help="Write the map here, as JSON.")
@JSON
def plan_locate(plan_file: Path, onnx_file: Path, output: Path | None, as_json: bool) -> None:
    """Find the INT8 weights of an ONNX file in any plan that was built from it."""
    from resq_deploy.runtime.contents import locate_weights

    found = locate_weights(plan_file, onnx_file)
    if output is not None:
        found.save(output)
    if as_json:
        console.print_json({"coverage": found.coverage, **found.model_dump()})
    else:
        show(tables.plan(str(plan_file), found))


@plan.command(
    "offset",
    short_help="The byte that holds one weight.",
    epilog="\b\nExample:\n  resq plan offset model.resq conv1.weight 17",
)
@click.argument("bundle", type=PATH)
@click.argument("tensor")
@click.argument("element", type=int)
@click.option("--engine", help="Which one.  [default: the only one]")
def plan_offset(bundle: Path, tensor: str, element: int, engine: str | None) -> None:
    """The byte of a plan that holds one weight; -1 where it was not located."""
    from resq_deploy.bundle import Bundle
    from resq_deploy.runtime.contents import byte_of

    click.echo(byte_of(Bundle.open(bundle), tensor, element, engine))


@group.command(
    short_help="Render a report again from its report.json.",
    epilog="\b\nExamples:\n  resq report model.report\n  resq report report.json -o out",
)
@click.argument("report", type=PATH)
@click.option("-o", "--output", type=PATH, help="Write all faces here.  [default: beside the json]")
@JSON
def report(report: Path, output: Path | None, as_json: bool) -> int:
    """Render a report again from its report.json: page, tables, JUnit.

    Exit status 1 where a requirement was not met, as resq-validate has it.
    """
    from resq_deploy.report import print_report, read_report, write_report

    found = read_report(report)
    page = write_report(found, output or (report if report.is_dir() else report.parent))
    if as_json:
        console.print_json({"met": found.met, "page": str(page)})
    else:
        print_report(found, folder=page.parent)
    return console.OK if found.met else console.REQUIREMENT_NOT_MET


@group.command(
    short_help="Run one trial again, bit for bit.",
    epilog="\b\nExamples:\n  resq replay model.report --trial 17 --campaign seu\n"
    "  resq replay model.report --trial 0 --campaign ber=1e-4",
)
@click.argument("report", type=PATH)
@click.option("--trial", type=click.IntRange(0), required=True, help="Its number, from 0.")
@click.option("--campaign", help="Such as seu or ber=1e-4.  [default: the only one]")
@click.option("--bundle", type=PATH, help="Where the bundle is now.  [default: where it was]")
@click.option("--data", help="Where the images of --data are now.  [default: where they were]")
@click.option("--fault-list", type=PATH, help="Where the fault list is now.")
@click.option("--allow-host-code", is_flag=True, help="As resq-validate has it.")
@JSON
def replay(report: Path, trial: int, campaign: str | None, as_json: bool, **given: Any) -> int:
    """Run one trial of a report's journal again, and compare the logits bit for bit.

    Exit status 1 where they are not the same.
    """
    from resq_deploy.runtime.replay import replay_trial

    said = console.Reporter(quiet=False)
    found = replay_trial(report, trial, campaign=campaign, reporter=said, **given)
    if as_json:
        console.print_json(tables.replayed_json(found))
    else:
        show(tables.replayed(campaign or "the only campaign", trial, found))
    return console.OK if found.same else console.REQUIREMENT_NOT_MET


@group.command(
    short_help="Put bundles beside each other: faults against attacks.",
    epilog="\b\nExample:\n  resq compare plain.resq stage1.resq stage2.resq",
)
@click.argument("bundles", type=PATH, nargs=-1, required=True)
@click.option(
    "--report",
    "reports",
    type=PATH,
    multiple=True,
    help="Where resq-validate -o put one; repeatable.",
)
@click.option("-o", "--output", type=PATH, help="A page to write: curves and differences, HTML.")
@click.option("--force", is_flag=True, help="Replace the page.")
@JSON
def compare(
    bundles: tuple[Path, ...],
    reports: tuple[Path, ...],
    output: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Compare the reports of two or more bundles, each with the one before it.

    A bundle's report is the one that lies beside it, or that of --report which is of this very artifact.
    """
    from resq_deploy.runtime.compare import Subject
    from resq_deploy.runtime.compare import compare as compare_all
    from resq_deploy.runtime.comparison_page import check_free, write_page

    if output is not None:
        check_free(output, force=force)
    found = compare_all([Subject.of(path, reports=reports) for path in bundles])
    if output is not None:
        write_page(found, output)
    if as_json:
        console.print_json(tables.comparison_json(found))
    else:
        show(tables.compared(found))
        if output is not None:
            click.echo(f"page: {output}")


@group.command(
    short_help="Check a bundle, and its signature.",
    epilog="\b\nExamples:\n  resq verify model.resq\n  resq verify model.resq --key release.pub",
)
@click.argument("bundle", type=PATH)
@click.option("--key", type=PATH, help="Public key (PEM) that the signature must fit.")
@JSON
def verify(bundle: Path, key: Path | None, as_json: bool) -> None:
    """Check a bundle: signature first, then every hash, graph, sample and weight map.

    Exit status 2 at the first thing that is wrong. Without --key a bundle can be whole and still be a
    forgery: whoever changes a file can change the manifest with it.
    """
    from resq_deploy.runtime.contents import verify_bundle

    found = verify_bundle(bundle, key)
    if as_json:
        console.print_json(asdict(found))
    else:
        show(tables.check(bundle, found))


@group.command(
    short_help="Make an Ed25519 key pair.",
    epilog="\b\nExample:\n  resq keygen release     writes release and release.pub",
)
@click.argument("path", type=PATH)
@click.option("--passphrase", is_flag=True, help="Ask for a passphrase that locks the key.")
def keygen(path: Path, passphrase: bool) -> None:
    """Make an Ed25519 key pair (PEM): PATH, which stays secret, and PATH.pub."""
    from resq_deploy.signing import fingerprint, generate_key

    secret = (
        click.prompt("Passphrase", hide_input=True, confirmation_prompt=True) if passphrase else ""
    )
    private, public = generate_key(path, secret.encode() or None)
    click.echo(f"{private}\n{public}\nsha256 of the public key: {fingerprint(public)}")


@group.command(
    short_help="Sign a bundle.", epilog="\b\nExample:\n  resq sign model.resq --key release"
)
@click.argument("bundle", type=PATH)
@click.option("--key", type=PATH, required=True, help="Private key (PEM), from resq keygen.")
@click.option("--passphrase", is_flag=True, help="Ask for the passphrase of the key.")
def sign(bundle: Path, key: Path, passphrase: bool) -> None:
    """Sign a bundle: an Ed25519 signature over manifest.json, which holds the hash of every file."""
    from resq_deploy.signing import sign_bundle

    secret = click.prompt("Passphrase", hide_input=True) if passphrase else ""
    click.echo(sign_bundle(bundle, key, secret.encode() or None))


@group.command(
    short_help="JSON schema of a manifest, report or weight map.",
    epilog="\b\nExample:\n  resq schema report > report.schema.json",
)
@click.argument("which", type=click.Choice(["manifest", "report", "weights"]))
def schema(which: str) -> None:
    """The JSON schema of manifest.json, report.json or engines/NAME.weights.json."""
    from resq_deploy.runtime.schemas import schema_of

    click.echo(json.dumps(schema_of(which), indent=1, sort_keys=True))


def main() -> None:
    """Entry point of `resq`."""
    sys.exit(console.run(group, prog_name="resq"))
