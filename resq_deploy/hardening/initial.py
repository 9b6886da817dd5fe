"""Where training starts from: a checkpoint of ours, a state_dict, or torchvision's ImageNet
weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from resq_deploy.checkpoint import Checkpoint, is_checkpoint, load_safely, load_weights
from resq_deploy.errors import ModelError

Statistics = tuple[tuple[float, ...], tuple[float, ...]]

IMAGENET = "imagenet"
PLAIN, STAGE_1, STAGE_2 = "plain", "stage I", "stage II"


@dataclass(frozen=True, slots=True)
class Start:
    """Where training starts: the preprocessing, and the phases that the weights went through
    before.
    """

    statistics: Statistics
    phases: tuple[str, ...] = ()


def start_from(init: str, arch: str, network: nn.Module, statistics: Statistics) -> Start:
    """Put weights into a network.

    `init`: `imagenet` (layers that fit: stem and classifier of a small-image network are new), or a
    file. Raises ModelError if the file is of another network.
    """
    if init == IMAGENET:
        _take_fitting(network, _imagenet(arch))
        return Start(statistics)
    body = load_safely(Path(init))
    if is_checkpoint(body):
        checkpoint = Checkpoint.parse(body, init)
        if checkpoint.arch != arch:
            raise ModelError(
                f"{init} is a checkpoint of {checkpoint.arch}, not of {arch}",
                f"harden {checkpoint.arch}, or start from another file",
            )
        load_weights(network, checkpoint.state_dict, arch)
        before = tuple(map(str, checkpoint.trained.get("phases", ())))
        return Start((checkpoint.mean, checkpoint.std), before or (PLAIN,))
    if not isinstance(body, Mapping) or not all(isinstance(v, Tensor) for v in body.values()):
        raise ModelError(f"{init} is neither a checkpoint nor a state_dict", "give one of the two")
    load_weights(network, body, arch)
    return Start(statistics, (PLAIN,))


def _imagenet(arch: str) -> Mapping[str, Tensor]:
    from torchvision import models

    name = arch.removeprefix("torchvision:")
    try:
        weights = models.get_model_weights(name).DEFAULT
        state: Mapping[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True)
    except (ValueError, OSError, RuntimeError) as error:
        raise ModelError(
            f"no ImageNet weights for {arch}: {error}", "start from a file, or from scratch"
        ) from error
    return state


def _take_fitting(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    own = network.state_dict()
    fitting = {k: v for k, v in weights.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        raise ModelError("none of the ImageNet weights fit this network", "start from scratch")
    network.load_state_dict({**own, **fitting})
