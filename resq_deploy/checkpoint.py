"""A hardened network on disk: weights and all that is needed to rebuild and export them; never a
pickled object.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resq_deploy import networks
from resq_deploy.errors import ModelError

MAGIC = "resq_checkpoint"
VERSION = 1
_Shape = tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """Weights with what they belong to.

    `mean` and `std` are the preprocessing, per channel: the network sees (x - mean) / std of pixels
    x in [0, 1]. `trained` says what was trained (stages, hyperparameters, data digest), `metrics`
    what was measured: both are plain numbers, texts, lists and dicts.
    """

    arch: str
    arch_args: Mapping[str, Any]
    input_shape: _Shape
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    state_dict: Mapping[str, Tensor] = field(repr=False)
    trained: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)

    def network(self, *, asked: bool = False) -> nn.Module:
        """The network with these weights, in eval mode on the CPU, without the preprocessing.

        An own factory is imported and called, but not from the working directory, since the file
        names it; `asked`: the caller named it too, and it is looked for there.
        Raises ModelError, naming the first keys or shapes that do not fit, if the weights are
        another network's.
        """
        built = networks.build(
            self.arch,
            input_shape=self.input_shape,
            classes=len(self.classes),
            args=self.arch_args,
            asked=asked,
        )
        load_weights(built, self.state_dict, self.arch)
        return built.eval()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write atomically: the file is the old one or the whole new one. Raises ModelError if it
        cannot be written.
        """
        body = {
            MAGIC: VERSION,
            "arch": self.arch,
            "arch_args": dict(self.arch_args),
            "input_shape": list(self.input_shape),
            "classes": list(self.classes),
            "mean": list(self.mean),
            "std": list(self.std),
            "state_dict": {k: v.detach().cpu() for k, v in self.state_dict.items()},
            "trained": dict(self.trained),
            "seed": self.seed,
            "metrics": dict(self.metrics),
        }
        save_atomic(body, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read a checkpoint that `save` wrote. Never executes a pickle; raises ModelError on
        anything else.
        """
        return cls.parse(load_safely(Path(path)), str(path))

    @classmethod
    def parse(cls, body: object, name: str) -> Checkpoint:
        """A loaded object as a Checkpoint; ModelError if it is not one. `name` is for the
        message.
        """
        if not is_checkpoint(body):
            raise ModelError(
                f"{name} is not a resq-harden checkpoint",
                "make one with resq-harden, or give --arch",
            )
        assert isinstance(body, Mapping)
        if body[MAGIC] != VERSION:
            raise ModelError(
                f"{name} is a checkpoint of version {body[MAGIC]!r}, this is {VERSION}",
                "update resq-deploy, or train again",
            )
        try:
            return cls._of(body)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ModelError(f"{name} is a damaged checkpoint: {error!r}", "train again") from error

    @classmethod
    def _of(cls, body: Mapping[str, Any]) -> Checkpoint:
        channels, height, width = map(int, body["input_shape"])
        mean, std = (tuple(map(float, body[key])) for key in ("mean", "std"))
        if not len(mean) == len(std) == channels or min(std) <= 0:
            raise ValueError("mean and std must have one number per channel, std above 0")
        weights = {str(k): v for k, v in body["state_dict"].items() if isinstance(v, Tensor)}
        return cls(
            arch=str(body["arch"]),
            arch_args=dict(body["arch_args"]),
            input_shape=(channels, height, width),
            classes=tuple(map(str, body["classes"])),
            mean=mean,
            std=std,
            state_dict=weights,
            trained=dict(body["trained"]),
            seed=int(body["seed"]),
            metrics={str(k): float(v) for k, v in body["metrics"].items()},
        )


def is_checkpoint(body: object) -> bool:
    """Whether a loaded object calls itself a checkpoint of resq-harden."""
    return isinstance(body, Mapping) and MAGIC in body


def load_safely(path: Path) -> object:
    """torch.load of tensors and plain values only. Raises ModelError if the file is missing or
    holds anything else.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist", "give the path of a checkpoint")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = str(error).strip().partition("\n")[0][:160]
        raise ModelError(
            f"{path} is not a checkpoint of tensors: {first}", "it is truncated, or another format"
        ) from error


def save_atomic(body: Mapping[str, Any], path: Path) -> None:
    """torch.save beside `path`, then rename; ModelError (and no partial file) if that fails."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(dict(body), file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except (OSError, RuntimeError) as error:
        raise ModelError(
            f"cannot write {path}: {error}", "choose a place that exists and has space"
        ) from error
    finally:
        with suppress(OSError):  # where nothing can be written, nothing can be removed
            partial.unlink(missing_ok=True)


def load_weights(network: nn.Module, weights: Mapping[str, Tensor], arch: str) -> None:
    """load_state_dict that names the first mismatching keys in one ModelError."""
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in weights]
    extra = [key for key in weights if key not in wanted]
    shapes = [
        f"{k} {tuple(weights[k].shape)} for {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in weights and weights[k].shape != v.shape
    ]
    kinds = (("missing", missing), ("unexpected", extra), ("misshapen", shapes))
    said = [f"{what} {', '.join(keys[:3])}" for what, keys in kinds if keys]
    if said:
        raise ModelError(
            f"the weights are not those of {arch}: {'; '.join(said)}",
            "give the --arch and --arch-arg they were trained with",
        )
    network.load_state_dict(weights)
