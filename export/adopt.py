"""MODEL.onnx, quantized by whatever tool -> what a bundle is made of: the artifact as it is, beside its reference.

The artifact is validated like one of ours: the same faults, attacks and figures. Nothing in it is quantized again, and
its weights are adapted to bit flips only where that is asked for (readjust.py). What it is compared with is the network
that it was made of, if that is given; else the same weights without the rounding of activations, which is all that
the file tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy import saturation
from resq_deploy.bundle import sha256_of
from resq_deploy.console import Reporter
from resq_deploy.errors import BackendError, ModelError
from resq_deploy.export import (
    coded,
    formats,
    gradients,
    graph,
    onnx_ends,
    onnx_source,
    qdq_file,
    samples,
)
from resq_deploy.export.design import Design
from resq_deploy.export.load import LoadedModel
from resq_deploy.export.onnx_source import Source
from resq_deploy.export.readjust import readjust
from resq_deploy.export.samples import Drawn
from resq_deploy.export.stage import EPS
from resq_deploy.export.writing import Made
from resq_deploy.manifest import Adjustment, Reference
from resq_deploy.memory import fault_space
from resq_deploy.metrics import sqnr_db

Normal = tuple[Sequence[float] | None, Sequence[float] | None]  # mean and std

REASON = "the file was quantized already, and is taken as it is"
FITTED = "the file was quantized already, and codes are changed only where two could saturate"
_PER_CHANNEL = 13  # the opset from which a DequantizeLinear has an axis
_IMAGES = 64  # to tell whether a file has its normalization inside
_NOTHING: Normal = (None, None)
_BARE = 2  # place of the pair whose reference has its normalization inside, and the file not


def adopt(
    file: Path,
    network: LoadedModel,
    drawn: Drawn,
    wanted: gradients.Wanted,
    *,
    told: Normal | None = None,
    bare: LoadedModel | None = None,
    design: Design | None = None,
    overflow_fix: bool = False,
    eps: float = EPS,
    seed: int = 0,
    reporter: Reporter | None = None,
) -> Made:
    """A quantized graph and its reference. `network`: the loaded reference, or the loaded file itself.

    `design`: what stage III adjusts its weights to, None to leave them; `eps`, `seed`: as in readjust. `overflow_fix`:
    first its codes become such that none saturate together on x86 without VNNI (coded.fitting).

    `told`: mean and std as the user gave them. A reference that is a checkpoint knows its own, so they are the file's;
    of any other, `network` has them in front and `bare` has not, and which of file and reference wants them is found
    out: what gives the closest logits. Raises ModelError for a file that is no such graph, or that is of another shape
    or number of classes than the reference, or that has no weight which a `design` could change; AttackError as
    gradients.settle.
    """
    say = reporter or Reporter()
    reference: Reference = "fp32"
    if network.source is not None and network.source.quantized:
        reference = "dequantized"
        source = network.source
        int8 = _canonical(file, source)
        fp32 = qdq_file.without_rounding(int8)
        say.warn(
            f"{file} is compared with its own weights in float arithmetic;"
            " --reference names the network that it was made of"
        )
    else:
        pairs = _pairs(network, bare, told)
        source, int8, fp32 = _closest(file, pairs, drawn.held_out.images, say)
    if onnx_ends.gives_probabilities(int8.graph):
        say.warn(
            f"{file} quantizes its Softmax: answers can tie, and gradients of them are small;"
            " leave the Softmax out of what is quantized where you can"
        )
    why = gradients.settle(int8, network.input_shape, wanted, say)
    record = Adjustment(applied=False, reason=REASON)
    if overflow_fix or design is not None:
        _check_opset(file, int8)
    if overflow_fix:
        taken, int8 = int8, _fitted(file, int8, say)
        record = record if int8 is taken else Adjustment(applied=False, reason=FITTED)
    seen = {k: v for k, v in drawn.record.items() if k.startswith("eval_")}
    seen |= {"samples": 0, "by": "the tool that quantized the file"}
    if design is not None:
        _check_adjustable(file, int8)
        lack = why or _obstacle(fp32, network.input_shape, say)
        changed = f"; {FITTED}" if record.reason == FITTED else ""
        record = Adjustment(applied=False, reason=lack and f"{lack}{changed}")
        if lack is None:
            seen = {**drawn.record, "by": "the tool that quantized the file; these are stage III's"}
            images = samples.as_sample(drawn.calibration).images
            int8, record = readjust(
                int8, fp32, images, design=design, eps=eps, seed=seed, reporter=say
            )
    return Made(
        fp32,
        int8,
        int8,
        qdq_file.listing(int8),
        record,
        obstacle=why,
        mean=source.mean,
        std=source.std,
        sha256=sha256_of(file),
        calibration=seen,
        reference=reference,
    )


def _pairs(
    network: LoadedModel, bare: LoadedModel | None, told: Normal | None
) -> list[tuple[LoadedModel, Normal]]:
    """The references that may be meant, each with a preprocessing that the file may want; the likeliest first."""
    own: Normal = (network.mean, network.std)
    if told is not None and bare is None:
        return [(network, told)]
    if not any(network.mean) and all(s == 1 for s in network.std):
        return [(network, _NOTHING)]
    return [(network, _NOTHING), (network, own), *([] if bare is None else [(bare, own)])]


def _closest(
    file: Path,
    pairs: Sequence[tuple[LoadedModel, Normal]],
    images: NDArray[np.float32],
    reporter: Reporter,
) -> tuple[Source, onnx.ModelProto, onnx.ModelProto]:
    """Of these pairs the one whose logits are closest: the file, its canonical graph, and the reference."""
    _, model = formats.read(file, trust_pickle=False)
    found, part, exported = [], images[:_IMAGES], dict[int, onnx.ModelProto]()
    for network, (mean, std) in pairs:
        source = onnx_source.read(file, model, input_shape=network.input_shape, mean=mean, std=std)
        if source.classes != len(network.classes):
            raise ModelError(
                f"{file} has {source.classes} outputs, its reference {len(network.classes)}",
                "give the network that it was made of",
            )
        int8 = _canonical(file, source)
        if id(network) not in exported:
            exported[id(network)] = network.to_onnx()
            onnx_ends.end_alike(exported[id(network)], int8, cut=source.cut)
        fp32 = exported[id(network)]
        near = sqnr_db(graph.run(fp32, part), graph.run(int8, part)) if len(pairs) > 1 else 0.0
        found.append((near, source, int8, fp32))
    best = max(range(len(found)), key=lambda i: found[i][0])
    if len(found) > 1:
        told = ", ".join(f"{near:.1f} dB" for near, *_ in found)
        reporter.log(
            f"{file} has its normalization {'outside' if best else 'inside'}"
            f"{', its reference inside' * (best == _BARE)}: SQNR of its logits is {told}, as it is,"
            f" with the reference's in front{', with the file alone normalized' * (len(found) > _BARE)}"
        )
    return found[best][1:]


def _canonical(file: Path, source: Source) -> onnx.ModelProto:
    """The graph that is deployed, held against the one that was read."""
    int8 = qdq_file.canonical(source.model)
    images = graph.noise(source.shape)
    apart = graph.apart(*(graph.run(m, images, optimize=False) for m in (source.model, int8)))
    if not apart <= graph.PARITY:
        raise ModelError(
            f"{file} with its constants folded differs from itself by {apart:.3g}",
            "fold them before: onnxruntime's quant_pre_process, or onnxsim",
        )
    return int8


def _fitted(file: Path, int8: onnx.ModelProto, say: Reporter) -> onnx.ModelProto:
    """The graph with codes that do not saturate, after a warning where some weights cannot be changed."""
    made = coded.fitting(int8)
    if saturation.could(made):
        say.warn(
            f"{file} can still saturate on x86 without VNNI: some of its weights are shared, or not behind a"
            " DequantizeLinear of their own, and stay as they are"
        )
    return made


def _check_opset(file: Path, int8: onnx.ModelProto) -> None:
    """Raise ModelError for a graph that cannot have a scale for each channel."""
    version = next((o.version for o in int8.opset_import if not o.domain), 0)
    if version < _PER_CHANNEL:
        raise ModelError(
            f"{file} is of opset {version}, in which a weight has one scale for all its channels",
            f"quantize it with opset {_PER_CHANNEL} or newer",
        )


def _check_adjustable(file: Path, int8: onnx.ModelProto) -> None:
    """Raise ModelError for a graph without a weight that stage III could change."""
    weights = fault_space(int8).select(kinds=("weights",)).memories
    if not any(memory.value.dtype == np.int8 for memory in weights):
        raise ModelError(
            f"{file} has no signed INT8 weights, and stage III changes no others",
            "quantize its weights to INT8, or leave out --adjust",
        )


def _obstacle(fp32: onnx.ModelProto, shape: tuple[int, int, int], say: Reporter) -> str | None:
    """Why the reference cannot teach, after a warning."""
    why = gradients.obstacle(fp32, shape)
    if why is not None:
        say.warn(f"{why}: stage III is left out, and the file is taken as it is")
    return why


def check_engines(int8: onnx.ModelProto, targets: Sequence[str]) -> None:
    """Raise BackendError for engines of a graph that TensorRT does not take."""
    wanted = [name for name in targets if name != "onnx"]
    if wanted and not qdq_file.is_symmetric(int8):
        raise BackendError(
            f"--target {wanted[0]}: the file has zero points or unsigned codes, and TensorRT takes neither",
            "quantize it symmetrically to signed INT8, or leave out --target",
        )
