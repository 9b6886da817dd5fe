"""MODEL.onnx, quantized by whatever tool -> what a bundle is made of: the artifact as it is, beside its reference.

The artifact is validated like one of ours: the same faults, attacks and figures. It is not adjusted, and nothing in
it is quantized again. What it is compared with is the network that it was made of, if that is given; else the same
weights without the rounding of activations, which is all that the file tells.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray

from resq_deploy.bundle import sha256_of
from resq_deploy.console import Reporter
from resq_deploy.errors import BackendError, ModelError
from resq_deploy.export import formats, gradients, graph, onnx_source, qdq_file
from resq_deploy.export.load import LoadedModel
from resq_deploy.export.onnx_source import Source
from resq_deploy.export.samples import Drawn
from resq_deploy.export.writing import Made
from resq_deploy.manifest import Adjustment, Reference
from resq_deploy.metrics import sqnr_db

Normal = tuple[Sequence[float] | None, Sequence[float] | None]  # mean and std

REASON = "the file was quantized already, and is taken as it is"
_IMAGES = 64  # to tell whether a file has its normalization inside


def adopt(
    file: Path,
    network: LoadedModel,
    drawn: Drawn,
    wanted: gradients.Wanted,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    opset: int | None = None,
    reporter: Reporter | None = None,
) -> Made:
    """A quantized graph and its reference. `network`: the loaded reference, or the loaded file itself.

    `mean`, `std`: what the file wants pixels normalized by; where they are not given, by nothing or as the reference
    has it, whichever gives logits closer to the reference's. Raises ModelError for a file that is no such graph, or
    that is of another shape or number of classes than the reference; AttackError as gradients.settle.
    """
    say = reporter or Reporter()
    reference: Reference = "fp32"
    if network.source is not None and network.source.quantized:
        reference = "dequantized"
        source = network.source
        int8 = qdq_file.canonical(source.model)
        fp32 = qdq_file.without_rounding(int8)
        say.warn(
            f"{file} is compared with its own weights in float arithmetic;"
            " --reference names the network that it was made of"
        )
    else:
        fp32 = network.to_onnx(opset)
        own = (mean, std) if (mean, std) != (None, None) else None
        source, int8 = _normalized(file, network, fp32, drawn.held_out.images, own, say)
    record = {k: v for k, v in drawn.record.items() if k.startswith("eval_")}
    return Made(
        fp32,
        int8,
        int8,
        qdq_file.listing(int8),
        Adjustment(applied=False, reason=REASON),
        obstacle=gradients.settle(int8, network.input_shape, wanted, say),
        mean=source.mean,
        std=source.std,
        sha256=sha256_of(file),
        calibration={"samples": 0, "by": "the tool that quantized the file", **record},
        reference=reference,
    )


def _normalized(
    file: Path,
    network: LoadedModel,
    fp32: onnx.ModelProto,
    images: NDArray[np.float32],
    own: Normal | None,
    reporter: Reporter,
) -> tuple[Source, onnx.ModelProto]:
    """The file with the preprocessing that it wants, `own` or found out, and its canonical graph."""
    _, model = formats.read(file, trust_pickle=False)
    unlike = any(network.mean) or any(s != 1 for s in network.std)
    tries: list[Normal] = [own or (None, None)]
    if own is None and unlike:
        tries.append((network.mean, network.std))
    found = []
    for mean, std in tries:
        source = onnx_source.read(file, model, input_shape=network.input_shape, mean=mean, std=std)
        if source.classes != len(network.classes):
            raise ModelError(
                f"{file} has {source.classes} outputs, its reference {len(network.classes)}",
                "give the network that it was made of",
            )
        found.append((source, qdq_file.canonical(source.model)))
    if len(found) == 1:
        return found[0]
    part = images[:_IMAGES]
    expected = graph.run(fp32, part)
    near = [sqnr_db(expected, graph.run(int8, part)) for _, int8 in found]
    outside = near[1] > near[0]
    reporter.log(
        f"{file} has its normalization {'outside' if outside else 'inside'}: SQNR of its logits is"
        f" {near[0]:.1f} dB as it is, {near[1]:.1f} dB with the reference's in front"
    )
    return found[outside]


def check_engines(int8: onnx.ModelProto, targets: Sequence[str]) -> None:
    """Raise BackendError for engines of a graph that TensorRT does not take."""
    wanted = [name for name in targets if name != "onnx"]
    if wanted and not qdq_file.is_symmetric(int8):
        raise BackendError(
            f"--target {wanted[0]}: the file has zero points or unsigned codes, and TensorRT takes neither",
            "quantize it symmetrically to signed INT8, or leave out --target",
        )
