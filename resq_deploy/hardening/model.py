"""The network as training sees it: pixels in, logits and chosen features out, with weights put in
place for one pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from resq_deploy.errors import ModelError

_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Pixels(nn.Module):
    """(x - mean) / std before a network: float32 pixels [B, C, H, W] in [0, 1] -> logits [B,
    classes].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of pixels."""
        logits: Tensor = self.network((images - self.mean) / self.std)
        return logits


class Probe:
    """Runs a model and catches the features at `layers` on the way (names of modules; "auto": the
    classifier's input).

    The logits are always the last feature. Raises ModelError for a layer that does not exist.
    """

    def __init__(self, model: Pixels, layers: Sequence[str]) -> None:
        self.model = model
        self._caught: list[Tensor] = []
        self._handles = [self._hook(name) for name in layers]

    def _hook(self, name: str) -> Any:
        if name == "auto":
            last = [m for m in self.model.modules() if isinstance(m, nn.Linear)]
            if not last:
                raise ModelError("no linear layer to take features at", "name layers yourself")
            return last[-1].register_forward_pre_hook(lambda _, args: self._catch(args[0]))
        known = dict(self.model.network.named_modules())
        if name not in known:
            raise ModelError(
                f"the network has no layer {name!r}", f"some: {', '.join(list(known)[1:8])}"
            )
        return known[name].register_forward_hook(lambda _m, _i, out: self._catch(out))

    def _catch(self, value: object) -> None:
        if isinstance(value, Tensor):
            self._caught.append(value)

    def __call__(
        self, images: Tensor, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """(logits, features); `weights` replace the parameters of the same names for this pass
        only.
        """
        self._caught = []
        if weights:
            named = {f"network.{name}": value for name, value in weights.items()}
            logits = functional_call(self.model, named, (images,))
        else:
            logits = self.model(images)
        return logits, [*self._caught, logits]

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


@contextmanager
def frozen_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm by its running statistics, which stay as they are: how the deployed network
    computes.

    With the statistics of the batch a network would adapt to its own faults, which it cannot once
    deployed.
    """
    norms = [m for m in model.modules() if isinstance(m, _BATCHNORM) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


class NormInputs:
    """Catches what each BatchNorm reads, in passes that ask for it."""

    def __init__(self, model: nn.Module) -> None:
        self._caught: list[tuple[nn.Module, Tensor]] | None = None
        norms = [m for m in model.modules() if isinstance(m, _BATCHNORM)]
        self._handles = [norm.register_forward_pre_hook(self._hook) for norm in norms]

    def _hook(self, norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._caught is not None:
            self._caught.append((norm, args[0]))

    @contextmanager
    def caught(self) -> Iterator[list[tuple[nn.Module, Tensor]]]:
        """(BatchNorm, its input) of the passes within, in order."""
        found: list[tuple[nn.Module, Tensor]] = []
        self._caught = found
        try:
            yield found
        finally:
            self._caught = None

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()


def has_batchnorm(network: nn.Module) -> bool:
    """Whether any layer normalizes over the batch."""
    return any(isinstance(m, _BATCHNORM) for m in network.modules())
