"""MODEL.pt -> a network that takes pixels, without running anybody's pickle.

checkpoint    of resq-harden: carries its architecture, shape, classes and preprocessing
state dict    tensors by name; needs an architecture to put them in
TorchScript   torch.jit.save
exported      torch.export.save, .pt2
ONNX          a float graph, .onnx; one that is quantized already is taken as it is (adopt.py)
pickle        a pickled module: loading it runs its author's code, so only if it is trusted
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from resq_deploy import networks
from resq_deploy.bundle import sha256_of
from resq_deploy.checkpoint import Checkpoint, load_weights
from resq_deploy.errors import ModelError
from resq_deploy.export import formats, graph, onnx_source
from resq_deploy.export.formats import Form
from resq_deploy.export.graph import Preprocessed, quiet
from resq_deploy.export.onnx_source import Source

Shape = tuple[int, int, int]

_SAVE_IN_FLOAT32 = "save the network in float32: call its .float() before it is traced or saved"
_TYPES = re.compile(r"\b(dtype|Half|Double|BFloat16|b?float16|float64)\b")


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModel:
    """A network ready to be exported.

    `module`: float32 pixels in [0, 1], [B, C, H, W] -> logits [B, classes], preprocessing inside, eval
    mode; None where the file is a graph, `source`. `classes`: names, `0`, `1`, ... where the file has none.
    `trained`, `metrics`: what the file says about its training.
    """

    module: Preprocessed | None
    form: Form
    arch: str
    input_shape: Shape
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    sha256: str
    trained: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    source: Source | None = None

    def to_onnx(self, opset: int | None = None) -> onnx.ModelProto:
        """The FP32 graph that exports start from; `opset`: 17 to 21. Raises ModelError."""
        if self.source is not None:
            return onnx_source.to_fp32(self.source, name=self.arch, opset=opset)
        assert self.module is not None
        return graph.to_onnx(self.module, self.input_shape, name=self.arch, opset=opset)


def load_model(
    path: str | os.PathLike[str],
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    input_shape: Shape | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    trust_pickle: bool = False,
    default_shape: Callable[[], Shape] | None = None,
    default_classes: Callable[[Shape], int] | None = None,
) -> LoadedModel:
    """Read a model file in any form. What is given wins over what the file says, but for a checkpoint's network.

    `arch`, `arch_args`: needed for a state dict (see networks.build). `input_shape` (C, H, W): needed
    unless the file is a checkpoint or `default_shape` knows one. `mean`, `std`: preprocessing per
    channel, or one number for all; default: the file's, else none. `classes`: names; default: the
    file's, else as many as there are logits: a state dict's network is built with as many as
    `default_classes` says of images of its shape, or as its last matrix has rows.
    Raises ModelError for a file that is missing, damaged or no model, for a pickled module that is not
    trusted, for weights of another architecture or type, and for an input shape that the network refuses.
    A graph with Q/DQ is loaded too (form `Q/DQ`), and is no network to start from: adopt.py takes it as it is.
    """
    file = formats.path_of(path)
    form, content = formats.read(file, trust_pickle)
    _check_arch(file, form, content, arch, arch_args or {})
    if isinstance(content, Checkpoint):
        return _of_checkpoint(file, content, input_shape, mean, std, classes, arch is not None)
    if form in ("ONNX", "Q/DQ"):
        if input_shape is None and default_shape is not None and onnx_source.is_open(content):
            input_shape = default_shape()
        return of_graph(file, content, input_shape, mean, std, classes)
    if input_shape is None and default_shape is None:
        raise ModelError(
            f"{file} does not say what images it takes", "give --input-shape, for example 3x32x32"
        )
    shape = input_shape or (default_shape() if default_shape else (0, 0, 0))
    network: nn.Module = content
    if form == "state dict":
        counts = _counts(content, shape, classes, default_classes)
        network = _fill(file, content, arch, arch_args or {}, shape, counts)
    elif form == "TorchScript":
        network = _converted(file, formats.in_float32(content), shape)
    elif form == "pickle":
        network = formats.in_float32(content)
    elif other := formats.other_type(content):
        raise ModelError(f"{file} holds parameters in {other}", _SAVE_IN_FLOAT32)
    means, stds = graph.per_channel(mean, 0.0, shape), graph.per_channel(std, 1.0, shape)
    module = Preprocessed(network, means, stds)
    logits = try_out(module, shape, None if classes is None else len(classes))
    names = tuple(classes) if classes is not None else tuple(map(str, range(logits)))
    return LoadedModel(
        module, form, arch or form.lower(), shape, names, means, stds, sha256_of(file)
    )


def of_graph(
    file: Path,
    model: onnx.ModelProto,
    input_shape: Shape | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    classes: Sequence[str] | None,
) -> LoadedModel:
    """A network that is an ONNX graph, with or without Q/DQ. Raises ModelError."""
    source = onnx_source.read(file, model, input_shape=input_shape, mean=mean, std=std)
    if classes is not None and len(classes) != source.classes:
        raise ModelError(
            f"the network has {source.classes} outputs for {len(classes)} classes",
            "choose the data it was trained on",
        )
    return LoadedModel(
        None,
        "Q/DQ" if source.quantized else "ONNX",
        file.stem,
        source.shape,
        tuple(classes) if classes is not None else tuple(map(str, range(source.classes))),
        source.mean,
        source.std,
        sha256_of(file),
        source=source,
    )


def _check_arch(
    file: Path, form: Form, content: Any, arch: str | None, args: Mapping[str, Any]
) -> None:
    """Raise ModelError for an architecture that the file has no use for, or that is not its own."""
    if isinstance(content, Checkpoint):
        told, own = (a.removeprefix("torchvision:") for a in (arch or content.arch, content.arch))
        if told != own or not args.items() <= content.arch_args.items():
            given = ", ".join((told, *(f"{k}={v}" for k, v in args.items())))
            known = ", ".join((own, *(f"{k}={v}" for k, v in content.arch_args.items())))
            raise ModelError(
                f"{file} is a checkpoint of {known}, not of {given}",
                "leave out --arch and --arch-arg: the checkpoint knows them",
            )
    elif args and form != "state dict":
        raise ModelError(
            f"{file} is a network already ({form}), with nothing to build", "leave out --arch-arg"
        )


def try_out(module: nn.Module, shape: Shape, classes: int | None) -> int:
    """Run two images of a shape, then three; how many logits come out.

    Raises ModelError where the network refuses the shape or the batch, does not give one row of finite
    logits per image, or has another number of classes.
    """
    _run(module, shape, 2)
    logits = _run(module, shape, 3)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 3:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"the network makes {found} of three images", "it must give logits, [batch, classes]"
        )
    if not torch.isfinite(logits).all():
        raise ModelError("the network makes logits that are not finite", "check the checkpoint")
    if classes is not None and logits.shape[1] != classes:
        raise ModelError(
            f"the network has {logits.shape[1]} outputs for {classes} classes",
            "choose the data it was trained on",
        )
    return int(logits.shape[1])


def _run(module: nn.Module, shape: Shape, count: int) -> Any:
    pixels = torch.linspace(0, 1, count * shape[0] * shape[1] * shape[2])
    try:
        with torch.no_grad():
            return module(pixels.reshape(count, *shape))
    except Exception as error:  # whatever a network's forward may raise
        size = "x".join(map(str, shape))
        first = str(error).strip().partition("\n")[0][:160]
        raise ModelError(
            f"the network does not run on {count} images of {size}: {first}",
            _cure(
                error,
                "give the --input-shape it was trained with; an exported program needs a dynamic batch",
            ),
        ) from error


def _cure(error: Exception, usual: str) -> str:
    """What to do about a network that does not run: another type of number says so in torch's message."""
    return _SAVE_IN_FLOAT32 if _TYPES.search(str(error)) else usual


def _of_checkpoint(
    file: Path,
    checkpoint: Checkpoint,
    input_shape: Shape | None,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    classes: Sequence[str] | None,
    asked: bool,
) -> LoadedModel:
    shape = input_shape or checkpoint.input_shape
    if shape[0] != checkpoint.input_shape[0]:
        raise ModelError(
            f"{file} takes images of {checkpoint.input_shape[0]} channels, not {shape[0]}",
            "leave out --input-shape: the checkpoint knows it",
        )
    means = checkpoint.mean if mean is None else graph.per_channel(mean, 0.0, shape)
    stds = checkpoint.std if std is None else graph.per_channel(std, 1.0, shape)
    names = checkpoint.classes if classes is None else tuple(classes)
    module = Preprocessed(checkpoint.network(asked=asked), means, stds)
    try_out(module, shape, len(names))
    return LoadedModel(
        module,
        "checkpoint",
        checkpoint.arch,
        shape,
        names,
        means,
        stds,
        sha256_of(file),
        {**checkpoint.trained, "arch_args": dict(checkpoint.arch_args), "seed": checkpoint.seed},
        checkpoint.metrics,
    )


def _counts(
    weights: Mapping[str, Tensor],
    shape: Shape,
    classes: Sequence[str] | None,
    default: Callable[[Shape], int] | None,
) -> tuple[int, ...]:
    """How many classes a state dict's network may have, the likeliest first."""
    if classes is not None:
        return (len(classes),)
    told = () if default is None else (default(shape),)
    return tuple(dict.fromkeys((*told, _outputs(weights))))


def _fill(
    file: Path,
    weights: Mapping[str, Tensor],
    arch: str | None,
    arch_args: Mapping[str, Any],
    shape: Shape,
    counts: Sequence[int],
) -> nn.Module:
    """The network that a state dict belongs to, with the first of `counts` classes that fits."""
    if arch is None:
        some = ", ".join(list(weights)[:3])
        raise ModelError(
            f"{file} holds weights only ({some}, ...)",
            "name their network: --arch torchvision:resnet18, --arch resnet8, or --arch pkg.module:factory",
        )
    refused: ModelError | None = None
    for count in counts:
        network = networks.build(arch, input_shape=shape, classes=count, args=arch_args)
        try:
            load_weights(network, weights, arch)
        except ModelError as error:
            refused = refused or error
        else:
            return network.eval()
    assert refused is not None
    raise refused


def _outputs(weights: Mapping[str, Tensor]) -> int:
    """Classes of a classifier: output channels of its last layer."""
    layers = [tensor for name, tensor in weights.items() if tensor.ndim in (2, 4)]
    return int(layers[-1].shape[0]) if layers else 1


def _converted(file: Path, script: Any, shape: Shape) -> nn.Module:
    """A TorchScript module as a torch.export program, which is what the ONNX exporter takes."""
    with quiet():
        try:
            from torch._export.converter import TS2EPConverter

            example = (torch.zeros(2, *shape),)
            return TS2EPConverter(script, example).convert().module()
        except Exception as error:  # torch raises many kinds, none of them documented
            first = str(error).strip().partition("\n")[0][:160]
            raise ModelError(
                f"the TorchScript in {file} cannot be converted: {first}",
                _cure(
                    error,
                    "check --input-shape, or save the network with torch.export.save or as a state_dict",
                ),
            ) from error
