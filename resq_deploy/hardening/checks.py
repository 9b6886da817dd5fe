"""What is looked at before training, because it would fail only after hours of it."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile

import torch
from torch import Tensor, nn

from resq_deploy.errors import ModelError
from resq_deploy.hardening.recipe import Recipe

_PROBE = 4096  # bytes: a full disk takes an empty file


def chosen_device(device: str, recipe: Recipe) -> str:
    """`device` (auto, cpu, cuda, cuda:N) as torch names it; ModelError where training cannot run on it."""
    name = device
    if device == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"unknown device {device!r}", "auto, cpu, cuda or cuda:1") from error
    if found.type not in ("cpu", "cuda"):
        raise ModelError(f"training does not run on {found.type}", "use --device auto, cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ModelError("no CUDA device is available", "train with --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ModelError(f"there is no CUDA device {found.index}", f"their number is {count}")
    if recipe.amp == "fp16" and found.type != "cuda":
        raise ModelError("fp16 needs a CUDA device", "use --amp bf16, or off")
    return name


def check_writable(output: Path) -> None:
    """Make the folder of `output`, and see that a file can be written there; ModelError if not."""
    if output.is_dir():
        raise ModelError(f"{output} is a directory", "name a file")
    if output.parent.exists() and not output.parent.is_dir():
        raise ModelError(f"{output.parent} is not a directory", "choose another place")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=output.parent) as probe:
            probe.write(bytes(_PROBE))
    except OSError as error:
        raise ModelError(
            f"cannot write {output}: {error.strerror or error}",
            "choose a place that can be written and has space",
        ) from error


def check_fits(network: nn.Module, arch: str, shape: tuple[int, int, int], classes: int) -> None:
    """Run two images through a network; ModelError unless it gives [2, classes]."""
    network.eval()
    try:
        with torch.no_grad():
            logits = network(torch.zeros(2, *shape))
    except Exception as error:  # whatever a network's forward may raise
        size = "x".join(map(str, shape))
        first = str(error).strip().partition("\n")[0][:160]
        raise ModelError(
            f"{arch} does not run on images of {size}: {first}",
            "choose data, an --input-shape or --arch-arg that fit it",
        ) from error
    network.train()
    made = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if made != (2, classes):
        raise ModelError(
            f"{arch} makes {made} of two images of {classes} classes",
            "it must give logits, [batch, classes]; a factory learns their number as num_classes",
        )
