"""Engines for a bundle that exists: a device builds the plan that it will run. No torch."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from resq_deploy.bundle import INT8, MANIFEST, Bundle, BundleWriter, sha256_of
from resq_deploy.console import Reporter
from resq_deploy.errors import BackendError, BundleError, IntegrityError, ResqError
from resq_deploy.export.engine import add_requested
from resq_deploy.export.engine_options import (
    BATCH,
    Batch,
    EngineOptions,
    Request,
    requests,
)
from resq_deploy.signing import SIGNATURE


def add_engines(
    bundle: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    targets: Sequence[str],
    batch: Batch = BATCH,
    sm: Sequence[str | int] = (),
    options: EngineOptions | None = None,
    force: bool = False,
    reporter: Reporter | None = None,
) -> Bundle:
    """Build engines from a bundle's INT8 graph, and add plan, weight map and manifest entry to it.

    `output`: a new bundle with all that the old one holds; default: the bundle itself, replaced in one step once
    the engines are built. Every other file, and every other entry of the manifest, stays as it is. A plan of the
    same name is replaced only with `force`, as is an `output` that exists. A signature does not survive: what was
    signed has changed, and a warning says so.
    Raises BundleError or IntegrityError for the bundle, BackendError or MissingExtra for the engines; the bundle
    is as it was then.
    """
    say = reporter or Reporter()
    source = Bundle.open(Path(bundle).resolve())
    wanted = requests(targets, batch, sm, options or EngineOptions())
    _check(source, wanted, force)
    target = source.path if output is None else Path(output)
    in_place = target.resolve() == source.path
    if in_place:
        _refuse_strangers(source)
    signed = (source.path / SIGNATURE).exists()
    with BundleWriter(target, force=force or in_place) as writer:
        _copy(source, writer.dir, [f"engines/{request.backend}." for request in wanted])
        built = add_requested(writer.dir, writer.dir / INT8, wanted, say)
        entries = source.manifest.model_dump(exclude={"files"})
        made = writer.finish({**entries, "engines": {**source.manifest.engines, **built}})
    if signed:
        say.warn(
            f"{source.path.name} was signed, {made.path} is not: its content changed."
            f" Sign it: resq sign {made.path} --key KEY"
        )
    return made


def complete(
    made: Bundle,
    *,
    targets: Sequence[str],
    batch: Batch,
    sm: Sequence[str | int],
    options: EngineOptions,
    reporter: Reporter,
) -> Bundle:
    """`add_engines` for a bundle that was just written, as it is where `targets` has no engine.

    Raises BackendError that says that the bundle is there, and how to try again.
    """
    engines = [name for name in dict.fromkeys(targets) if name != "onnx"]
    if not engines:
        return made
    try:
        added = add_engines(
            made.path, targets=targets, batch=batch, sm=sm, options=options, reporter=reporter
        )
    except ResqError as error:
        again = " ".join(("resq-export", str(made.path), *(f"--target {e}" for e in engines)))
        raise BackendError(
            f"{made.path} is finished, but for its engines: {error.message}",
            f"{error.hint}; then {again}" if error.hint else again,
        ) from error
    return Bundle(made.path, added.manifest)


def _check(source: Bundle, wanted: Sequence[Request], force: bool) -> None:
    if not wanted:
        raise BackendError(
            f"{source.path} is a bundle already, and no engine is asked for",
            "name one: --target tensorrt, or --target tensorrt-rtx",
        )
    if source.manifest.quantization.scheme != "int8-symmetric-qdq":
        raise BackendError(
            f"{source.path} has zero points or unsigned codes, and TensorRT takes neither",
            "export the network again by --rules tensorrt, or quantize it symmetrically to signed INT8",
        )
    for request in wanted:
        if request.backend in source.manifest.engines and not force:
            raise BundleError(
                f"{source.path} has a {request.backend} plan already", "replace it with --force"
            )


def _refuse_strangers(source: Bundle) -> None:
    """A bundle that is replaced takes its folder with it: nothing may be in there that is not its own."""
    known = {*source.manifest.files, MANIFEST, SIGNATURE}
    there = sorted(p for p in source.path.rglob("*") if p.is_symlink() or not p.is_dir())
    for path in there:
        if path.relative_to(source.path).as_posix() not in known:
            raise BundleError(
                f"{path} is not in the bundle's manifest, and would be lost",
                "move it away, or write another bundle with -o",
            )


def _copy(source: Bundle, folder: Path, replaced: Sequence[str]) -> None:
    """Every file that the manifest lists, but the plans and maps that are replaced."""
    for name, entry in source.manifest.files.items():
        if name.startswith(tuple(replaced)):
            continue
        copy = folder / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            shutil.copyfile(source.file(name), copy)
        except OSError as error:
            raise BundleError(
                f"cannot copy {name}: {error.strerror}", "choose another -o"
            ) from error
        if sha256_of(copy) != entry.sha256:
            raise IntegrityError(
                f"{source.path / name} changed while it was copied", "copy the bundle again"
            )
