"""export_model(): the whole way from MODEL.pt to a bundle, readable top to bottom."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from resq_deploy.budget import parse_eps
from resq_deploy.bundle import Bundle, Sample, check_free
from resq_deploy.console import Reporter
from resq_deploy.export import (
    asked,
    describe,
    footprint,
    formats,
    gradients,
    graph,
    halves,
    joint,
    qdq,
    samples,
    writing,
)
from resq_deploy.export.adjust import adjust as stage3
from resq_deploy.export.adopt import adopt, check_engines
from resq_deploy.export.calibrate import Range, calibrate
from resq_deploy.export.craft import craft, white_box
from resq_deploy.export.design import DESIGN_BER, EFFORT, Design
from resq_deploy.export.dialect import Dialect, Rules
from resq_deploy.export.engine_options import BATCH, EngineOptions, requests
from resq_deploy.export.formats import path_of
from resq_deploy.export.load import LoadedModel, load_model
from resq_deploy.export.on_device import complete
from resq_deploy.export.samples import Drawn, Source
from resq_deploy.export.twin import Twin
from resq_deploy.export.writing import Made
from resq_deploy.manifest import Adjustment
from resq_deploy.metrics import top1

Shape = tuple[int, int, int]
Images = NDArray[np.float32]
Target = Literal["onnx", "tensorrt", "tensorrt-rtx"]
HighPrecision = Literal["fp32", "fp16"]

CALIB_SAMPLES = 512
EVAL_SAMPLES = 2000
ATTACKS = ("fgsm", "pgd")
ATTACK_SAMPLES = 256
CALIB_ATTACKED = 128
EPS = 8 / 255


def export_model(
    model: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    reference: str | os.PathLike[str] | None = None,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    input_shape: Shape | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    calib: Source | None = None,
    calib_samples: int = CALIB_SAMPLES,
    eval: Source | None = None,
    eval_samples: int = EVAL_SAMPLES,
    batch: tuple[int, int, int] = BATCH,
    targets: Sequence[Target] = ("onnx",),
    sm: Sequence[str] = (),
    engine: EngineOptions | None = None,
    rules: Rules = "tensorrt",
    overflow_fix: bool = False,
    high_precision: HighPrecision = "fp32",
    design_ber: float = DESIGN_BER,
    adjust: bool | None = None,
    redundancy: float | None = None,
    effort: float = EFFORT,
    opset: int | None = None,
    trust_pickle: bool = False,
    attacks: Sequence[str] | None = None,
    eps: float | str = EPS,
    attack_samples: int = ATTACK_SAMPLES,
    attack_faulty: Sequence[str | float] = (),
    faulty_trials: int = joint.TRIALS,
    seed: int = 0,
    force: bool = False,
    reporter: Reporter | None = None,
    command: Sequence[str] = (),
) -> Bundle:
    """Turn a trained network into an INT8 bundle that can be deployed and validated.

    `model`: a file in any form of load.py; an ONNX graph with Q/DQ, from whatever quantizer, is taken as it is
    (adopt.py), and compared with the network it was made of, `reference`.
    `output`: the bundle to write (default: beside the model, `.resq`).
    `calib`, `eval`: data sets (see data.load) or Datasets; default: what a checkpoint says it was trained on.
    Ranges come from the train split of `calib`, figures from the test split of `eval`; no image is in both.
    `targets`: which engines to build beside the ONNX files, for batches `batch` (min, opt, max) and, with
    TensorRT-RTX, compute capabilities `sm`; `engine`: how they are built.
    `rules`: by whose the graph is written (dialect.py): `onnxruntime` is for ordinary sessions of ONNX Runtime, which
    then run in integers, and for no engine. `overflow_fix`: weights keep to codes whose products do not saturate on x86
    without VNNI (saturation.py). `high_precision`: type of what stays float.
    `adjust`: whether stage III adapts codes, scales and biases to bit flips at `design_ber`, with a `redundancy` and
    an `effort` as in design.py; None: unless the file is quantized already, whose codes and scales of weights it would
    change (readjust.py).
    `attacks`: crafted within `eps` (L-inf, pixels of [0, 1]) on the first `attack_samples` of the held-out sample;
    None: fgsm and pgd. `attack_faulty`: bit error rates (`1e-3`, or `apgd@1e-3`) at which
    inputs are crafted anew for each of `faulty_trials` draws of faults, on the first 128 of those images.
    Where the twin lacks an operator of the network, stage III and attacks by default are left out with a warning, and
    attacks that are named raise AttackError.
    `command`: what the manifest names as the command line.
    The same arguments and seed give the same model.int8.onnx, byte for byte.
    Raises a ResqError (ModelError, DataError, BundleError, ...); nothing is left at `output` then. Only where an
    engine cannot be built (BackendError), the bundle is finished, without engines: see on_device.add_engines.
    """
    say = reporter or Reporter()
    file = path_of(model)
    target = Path(output) if output is not None else file.with_suffix(".resq")
    check_free(target, force=force)
    builder = engine or EngineOptions()
    design = Design(design_ber, redundancy, effort)
    taken = formats.is_quantized(file)
    adjusts = not taken if adjust is None else adjust
    asked.check_taken(file, taken, adjusts, reference, design, high_precision, opset)
    faulty = [joint.FaultyAttack.parse(str(text)) for text in attack_faulty]
    asked.check_attacks(attacks or (), eps, faulty, faulty_trials)
    asked.check_precision(high_precision, opset)
    asked.check_rules(rules, taken, targets, high_precision)
    asked.check_design(design, adjusts)
    requests(targets, batch, sm, builder)
    asked.check_calibration(calib_samples, adjusts)
    plain = map(white_box, ATTACKS if attacks is None else attacks)
    crafts = tuple(dict.fromkeys((*plain, *(f.attack for f in faulty))))
    judge = eval if eval is not None else calib
    load = partial(
        load_model,
        model if reference is None else reference,
        arch=arch,
        arch_args=arch_args,
        input_shape=input_shape,
        trust_pickle=trust_pickle,
        default_shape=None if calib is None else lambda: samples.shape_of(calib),
        default_classes=None if judge is None else lambda shape: samples.classes_of(judge, shape),
    )
    loaded, bare = load(mean=mean, std=std), None
    if reference is not None and (mean is not None or std is not None):
        bare = load()
        if loaded.form == "checkpoint":  # it knows its own: what is said is the file's
            loaded, bare = bare, None
    drawn = samples.draw(loaded, calib, calib_samples, eval, eval_samples, seed=seed, reporter=say)
    asked.check_classes(drawn.classes)
    asked.check_calibration(len(drawn.calibration), adjusts)
    say.log(
        f"{file if reference is None else reference}: {loaded.form}, {loaded.arch}, {len(drawn.classes)} classes"
    )
    named = [*(f"--attack {n}" for n in attacks or ()), *["--attack-faulty"] * bool(faulty)]
    wanted = gradients.Wanted(named, bool(crafts), adjusts)
    if taken:
        told = None if mean is None and std is None else (mean, std)
        made = adopt(
            file,
            loaded,
            drawn,
            wanted,
            told=told,
            bare=bare,
            design=design if adjusts else None,
            overflow_fix=overflow_fix,
            eps=parse_eps(eps),
            seed=seed,
            reporter=say,
        )
        check_engines(made.int8, targets)
    else:
        made = _quantized(
            loaded,
            drawn,
            wanted,
            Dialect(rules, half=high_precision == "fp16", overflow_fix=overflow_fix),
            design if adjusts else None,
            parse_eps(eps),
            opset,
            seed,
            say,
        )
    metrics = describe.compare(made.fp32, made.deployed, drawn.held_out, made.reference)
    for said in (
        describe.guesses(
            metrics,
            len(drawn.classes),
            told=mean is not None or std is not None,
            known=loaded.form == "checkpoint",
        ),
        describe.doubts(metrics, made.quantization["activations"]),
    ):
        if said:
            say.warn(said)

    bundle = writing.write(
        target,
        made,
        drawn.held_out,
        writing.Exposure(
            () if made.obstacle else crafts,
            tuple(faulty),
            eps,
            attack_samples,
            faulty_trials,
            seed,
        ),
        {
            "arch": loaded.arch,
            "input": writing.input_of(loaded.input_shape, made),
            "classes": drawn.classes,
            "metrics": metrics,
            "provenance": writing.provenance_of(loaded, made, command, seed),
        },
        force=force,
        reporter=say,
    )
    return complete(bundle, targets=targets, batch=batch, sm=sm, options=builder, reporter=say)


def _quantized(
    loaded: LoadedModel,
    drawn: Drawn,
    wanted: gradients.Wanted,
    dialect: Dialect,
    design: Design | None,
    eps: float,
    opset: int | None,
    seed: int,
    reporter: Reporter,
) -> Made:
    """Calibrate, place Q/DQ, adjust to a design, and turn what stays float into the type asked for."""
    reporter.log("making an ONNX graph of the network")
    if dialect.half and opset is None and loaded.source is not None:
        opset = max(graph.opset_of(loaded.source.model), halves.LOWEST_OPSET)
    fp32 = dialect.prepared(loaded.to_onnx(opset))
    why = gradients.settle(fp32, loaded.input_shape, wanted, reporter)
    adjusts = design is not None and why is None
    plan, clean = dialect.plan(fp32), samples.batches(drawn.calibration)
    images = samples.as_sample(drawn.calibration, None if adjusts else CALIB_ATTACKED)
    size = footprint.gradient_batch(fp32)
    own = None if drawn.labelled else lambda part: top1(graph.run(fp32, part))
    network = loaded.module if loaded.module is not None or why else Twin(fp32).eval()
    attacked = [] if network is None else _attacked(network, images, own, eps, size, seed, reporter)
    ranges: Mapping[str, Range] = calibrate(
        fp32,
        plan.activations,
        clean,
        adversarial=attacked,
        unsigned=dialect.unsigned,
        reporter=reporter,
        count=len(drawn.calibration),
    )
    int8 = qdq.quantize_graph(fp32, ranges, dialect=dialect, where=plan)
    source = fp32
    record = Adjustment(applied=False, reason=why if design is not None else None)
    if design is not None and why is None:
        found = stage3(
            int8,
            fp32,
            images.images,
            ranges=ranges,
            design=design,
            eps=eps,
            dialect=dialect,
            seed=seed,
            reporter=reporter,
        )
        int8, source, ranges, record = found.model, found.fp32, found.ranges, found.record
        plan = dialect.plan(source)
    int8 = qdq.finish(int8, dialect)
    deployed = halves.to_fp16(int8) if dialect.half else int8
    graph.check(deployed)
    listed = describe.quantization_of(source, deployed, plan, ranges, dialect)
    return Made(
        fp32,
        int8,
        deployed,
        listed,
        record,
        obstacle=why,
        mean=loaded.mean,
        std=loaded.std,
        sha256=loaded.sha256,
        calibration=drawn.record,
    )


def _attacked(
    network: nn.Module,
    sample: Sample,
    labels: Callable[[Images], NDArray[np.int64]] | None,
    eps: float,
    batch: int,
    seed: int,
    reporter: Reporter,
) -> list[Images]:
    """FGSM versions of some calibration images: ranges must not clip what an attacker can send.

    `labels`: what to take for their labels, where they have none of their own.
    """
    part = sample.take(CALIB_ATTACKED)
    if labels is not None:
        part = replace(part, labels=labels(part.images))
    return [craft(network, part, "fgsm", eps, batch=batch, seed=seed, reporter=reporter)]
