"""Training by several processes, as torchrun starts them: gradients averaged, everything else the
same everywhere.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn


@dataclass(frozen=True, slots=True)
class World:
    """This process among `size`: rank 0 reports, evaluates and saves."""

    rank: int
    size: int
    device: torch.device

    @property
    def leads(self) -> bool:
        """Whether this process reports and saves."""
        return self.rank == 0

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean of every gradient over the processes, in one message."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if self.size == 1 or not grads:
            return
        flat = torch.cat([g.reshape(-1) for g in grads])
        distributed.all_reduce(flat)
        flat /= self.size
        for grad, part in zip(grads, torch.split(flat, [g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Rank 0's values into everybody's tensors."""
        if self.size > 1:
            for tensor in tensors:
                distributed.broadcast(tensor, src=0)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def agreed(self, value: float) -> float:
        """Rank 0's number."""
        if self.size == 1:
            return value
        box = torch.tensor([value], dtype=torch.float64, device=self.device)
        distributed.broadcast(box, src=0)
        return float(box)


@contextmanager
def world(device: str) -> Iterator[World]:
    """The processes of this run: those of torchrun (RANK, WORLD_SIZE, LOCAL_RANK), or this one
    alone.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if size == 1:
        yield World(0, 1, torch.device(device))
        return
    cuda = device.startswith("cuda")
    here = torch.device("cuda", local) if cuda else torch.device(device)
    if cuda:
        torch.cuda.set_device(here)
    distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield World(distributed.get_rank(), size, here)
    finally:
        distributed.destroy_process_group()
