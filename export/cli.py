"""resq-export: parse, call export_model, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from resq_deploy.bundle import FP32, INT8, Bundle
from resq_deploy.console import Reporter, common_options, print_json, run, shape
from resq_deploy.export.engine_flags import (
    EPILOG,
    add_to_bundle,
    engine_options,
    is_given,
    take_engine_options,
)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        message = f"{text!r} is not a list of numbers, such as 0.49,0.48,0.45"
        raise click.BadParameter(message) from None


def _batch(text: str) -> tuple[int, int, int]:
    try:
        low, best, high = map(int, text.split(":"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not MIN:OPT:MAX, such as 1:8:64") from None
    if not 1 <= low <= best <= high:
        raise click.BadParameter(f"{text!r}: 1 <= MIN <= OPT <= MAX must hold")
    return low, best, high


def _words(text: str) -> tuple[str, ...]:
    words = tuple(word.strip() for word in text.split(",") if word.strip())
    return () if words == ("none",) else words


def _pair(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise click.BadParameter(f"{text!r} is not K=V, such as width=16")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


class _Recorded(click.Command):
    """A command that remembers its command line."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        ctx.meta["resq_deploy.command"] = (ctx.info_name or "resq-export", *args)
        return super().parse_args(ctx, args)


@click.command(
    "resq-export",
    cls=_Recorded,
    epilog=EPILOG,
    context_settings={"max_content_width": 100, "help_option_names": ["-h", "--help"]},
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="OUT.resq; default: beside MODEL."
)
@click.option(
    "--reference",
    type=click.Path(path_type=Path),
    help="Of a quantized .onnx: the network it was made of, in any form that MODEL may have.",
)
@click.option("--arch", help="Of a state_dict: resnet8, torchvision:resnet18, pkg.module:factory.")
@click.option(
    "--arch-arg", type=_pair, metavar="K=V", multiple=True, help="Of the network: width=16."
)
@click.option(
    "--input-shape", type=shape, metavar="CxHxW", help="3x32x32; a checkpoint knows its own."
)
@click.option(
    "--mean",
    type=_numbers,
    metavar="NUMBERS",
    help="One a channel, or one for all; of pixels in [0, 1].",
)
@click.option("--std", type=_numbers, metavar="NUMBERS", help="As --mean.")
@click.option("--calib", metavar="DATA", help="Calibration data; default: what it was trained on.")
@click.option("--calib-samples", type=click.IntRange(1), default=512, show_default=True)
@click.option("--eval", metavar="DATA", help="Held-out data; default: the test split of --calib.")
@click.option("--eval-samples", type=click.IntRange(1), default=2000, show_default=True)
@click.option(
    "--batch",
    type=_batch,
    metavar="MIN:OPT:MAX",
    default="1:8:64",
    show_default=True,
    help="Of engines.",
)
@click.option(
    "--target",
    "targets",
    type=click.Choice(["onnx", "tensorrt", "tensorrt-rtx"]),
    multiple=True,
    default=["onnx"],
    show_default=True,
    help="Engines to build; may be given again.",
)
@click.option(
    "--sm",
    type=_words,
    metavar="LIST",
    default="",
    help="Compute capabilities: 86,89 (TensorRT-RTX).",
)
@click.option(
    "--rules",
    type=click.Choice(["tensorrt", "onnxruntime"]),
    default="tensorrt",
    show_default=True,
    help="By whose to quantize; by onnxruntime's an ordinary session runs in integers.",
)
@click.option(
    "--overflow-fix/--no-overflow-fix",
    default=False,
    show_default="--no-overflow-fix",
    help="Codes that give the same answers on x86 without VNNI, whose sums of 16 bits saturate.",
)
@click.option(
    "--high-precision",
    type=click.Choice(["fp32", "fp16"]),
    default="fp32",
    show_default=True,
    help="Of what stays float.",
)
@click.option("--design-ber", type=float, default=1e-3, show_default=True, help="Of stage III.")
@click.option(
    "--adjust/--no-adjust",
    default=None,
    show_default="--adjust, but for a quantized .onnx",
    help="Run stage III; in a quantized .onnx it changes codes and scales of weights.",
)
@click.option(
    "--redundancy",
    type=click.FloatRange(0),
    default=None,
    show_default="0.1; 0.2 up to 25 million multiply-accumulates",
    help="Share of the network's work that stage III may add by splitting; 0: none.",
)
@click.option(
    "--effort",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    help="Of stage III's learning; 1: some minutes on two cores, 0: none.",
)
@click.option("--opset", type=int, help="17 to 21; default 20, or what an ONNX file has.")
@click.option("--trust-pickle", is_flag=True, help="Unpickle MODEL: runs the code in it.")
@click.option(
    "--attack",
    "attacks",
    type=_words,
    metavar="LIST",
    default="fgsm,pgd",
    show_default=True,
    help="Or none.",
)
@click.option("--eps", default="8/255", show_default=True, help="L-inf, in pixels of [0, 1].")
@click.option("--attack-samples", type=click.IntRange(1), default=256, show_default=True)
@click.option(
    "--attack-faulty",
    type=_words,
    metavar="LIST",
    default="",
    help="Bit error rates under which to attack by PGD, or NAME@BER: 1e-3,apgd@1e-2.",
)
@click.option(
    "--faulty-trials",
    type=click.IntRange(2, 10_000),
    default=8,
    show_default=True,
    help="Draws of faults, each attacked anew.",
)
@click.option("--force", is_flag=True, help="Overwrite the bundle, or a plan in it.")
@engine_options
@common_options
@click.pass_context
def export(
    ctx: click.Context,
    /,
    model: Path,
    arch_arg: tuple[tuple[str, Any], ...],
    quiet: bool,
    as_json: bool,
    **options: Any,
) -> int:
    """Turn MODEL into an INT8 bundle that can be deployed and validated (RESQ stage III).

    MODEL: a checkpoint of resq-harden, a state_dict with --arch, a TorchScript archive, a
    torch.export .pt2, or a float .onnx. An .onnx that any tool quantized (Q/DQ) is taken as it
    is, or with --adjust its weights are adapted to bit flips. Or a bundle, to which the engines of
    --target are added.
    """
    say, engine = Reporter(quiet=quiet), take_engine_options(options)
    if model.is_dir():
        bundle = add_to_bundle(ctx, model, engine, options, say)
    else:
        bundle = _export(
            ctx, model, arch_args=dict(arch_arg), engine=engine, reporter=say, **options
        )
    if as_json:
        print_json(summary(bundle))
    elif not quiet:
        show(bundle)
    return 0


def _export(ctx: click.Context, model: Path, **options: Any) -> Bundle:
    from resq_deploy.export.pipeline import export_model

    if not is_given(ctx, "attacks"):
        options["attacks"] = None
    return export_model(model, command=ctx.meta["resq_deploy.command"], **options)


def summary(bundle: Bundle) -> dict[str, Any]:
    """What `--json` prints."""
    manifest = bundle.manifest
    return {
        "bundle": str(bundle.path),
        "arch": manifest.arch,
        **manifest.metrics.model_dump(),
        "int8_bytes": manifest.files[INT8].size,
        "fp32_bytes": manifest.files[FP32].size,
        "int8_tensors": len(manifest.quantization.weights),
        "float_ops": [op.model_dump() for op in manifest.quantization.float_ops],
        "adjustment": manifest.adjustment.model_dump(),
        "attacks": {name: dict(a.transfer) for name, a in manifest.attacks.items()},
        "engines": {name: e.model_dump() for name, e in manifest.engines.items()},
    }


def show(bundle: Bundle) -> None:
    """The same for people, on stdout."""
    manifest, metrics = bundle.manifest, bundle.manifest.metrics
    table = Table(title=f"{bundle.path}  {manifest.arch}", title_justify="left")
    for heading in ("", metrics.exact, "INT8"):
        table.add_column(heading, justify="right" if heading else "left")
    label = f"accuracy on {metrics.samples} held-out images"
    table.add_row(label, f"{metrics.fp32_accuracy:.2%}", f"{metrics.int8_accuracy:.2%}")
    table.add_row(f"same top-1 as {metrics.exact}", "", f"{metrics.agreement:.2%}")
    for name, decibel in metrics.sqnr_db.items():
        table.add_row(f"SQNR of {name}", "", f"{decibel:.1f} dB")
    faulty = [
        manifest.adjustment.measured.get(key, {}).get("faulty") for key in ("plain", "adjusted")
    ]
    if manifest.adjustment.applied and None not in faulty:
        table.add_row(f"worth under flips, {_bers(bundle)}", "", f"{faulty[1]:.2%}")
        table.add_row("... without stage III", "", f"{faulty[0]:.2%}")
    for name, attack in manifest.attacks.items():
        rates = [_rate(attack.transfer.get(key)) for key in ("fp32", "int8")]
        table.add_row(f"{name} succeeds (eps {attack.eps * 255:.3g}/255)", *rates)
    sizes = [f"{manifest.files[name].size / 1e6:.2f} MB" for name in (FP32, INT8)]
    table.add_row("size", *sizes)
    for name, engine in manifest.engines.items():
        mapped = "" if engine.coverage is None else f"{engine.coverage:.2%} mapped"
        table.add_row(f"{name} {engine.version}: weights", "", mapped)
    console = Console(file=sys.stdout, highlight=False)
    console.print(table)
    console.print(_stays_float(bundle))


def _bers(bundle: Bundle) -> str:
    bers = bundle.manifest.adjustment.measured.get("bers", ())
    return f"BER {min(bers):g} to {max(bers):g}" if bers else "BER"


def _rate(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _stays_float(bundle: Bundle) -> str:
    reasons: dict[str, dict[str, int]] = {}
    for op in bundle.manifest.quantization.float_ops:
        counts = reasons.setdefault(op.reason, {})
        counts[op.op] = counts.get(op.op, 0) + 1
    lines = [
        f"  {', '.join(f'{n} {op}' for op, n in counts.items())}: {reason}"
        for reason, counts in reasons.items()
    ]
    return "\n".join(["stays float:", *lines]) if lines else "nothing stays float"


def main(args: list[str] | None = None) -> None:
    """The resq-export command."""
    sys.exit(run(export, args, prog_name="resq-export"))


if __name__ == "__main__":
    main()
