"""Which examples a step sees: shuffled epochs, with more of those that flip easily."""

from __future__ import annotations

import torch
from torch import Tensor

_DECAY = 0.7


class Sampler:
    """Batches of indices, a function of (seed, epoch) and of the scores alone, so that training
    can be resumed exactly.

    Reliability-aware: an example's score is a running mean of how often it was wrong under
    perturbation or faults; it is drawn with weight 1 + strength * score. With strength 0 an epoch
    is a permutation.
    """

    def __init__(self, examples: int, batch: int, seed: int, strength: float) -> None:
        self.batch, self.seed, self.strength = min(batch, examples), seed, strength
        self.scores = torch.zeros(examples)

    @property
    def steps(self) -> int:
        """Steps in an epoch: the last batch is left out if it is smaller."""
        return len(self.scores) // self.batch

    def epoch(self, number: int) -> Tensor:
        """Indices int64 [steps, batch] of one epoch."""
        generator = torch.Generator().manual_seed(derive(self.seed, 1, number))
        count = len(self.scores)
        if self.strength > 0 and bool(self.scores.any()):
            weights = 1 + self.strength * self.scores
            order = torch.multinomial(weights, count, replacement=True, generator=generator)
        else:
            order = torch.randperm(count, generator=generator)
        return order[: self.steps * self.batch].view(self.steps, self.batch)

    def learn(self, indices: Tensor, survived: Tensor) -> None:
        """Take in which examples were right."""
        fresh = (~survived).float()
        self.scores[indices] = _DECAY * self.scores[indices] + (1 - _DECAY) * fresh


def derive(*parts: int) -> int:
    """A seed from numbers: well mixed (splitmix64), the same everywhere, below 2^63."""
    state = 0
    for part in parts:
        state = (state ^ (part + 0x9E3779B97F4A7C15)) % 2**64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state % 2**63


def augmented(images: Tensor, how: str, generator: torch.Generator) -> Tensor:
    """Random horizontal flips and shifts (up to an eighth of the side, zeros moved in) of a batch
    [B, C, H, W].
    """
    out = images
    if "flip" in how:
        chosen = torch.rand((len(out), 1, 1, 1), generator=generator).to(out.device) < 0.5
        out = torch.where(chosen, out.flip(3), out)
    if "shift" in how:
        out = _shifted(out, generator)
    return out


def _shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    count, _, height, width = images.shape
    pad = max(1, min(height, width) // 8)
    padded = torch.nn.functional.pad(images, (pad,) * 4)
    offset = torch.randint(2 * pad + 1, (2, count), generator=generator).to(images.device)
    rows = offset[0][:, None] + torch.arange(height, device=images.device)
    columns = offset[1][:, None] + torch.arange(width, device=images.device)
    which = torch.arange(count, device=images.device)[:, None, None]
    moved = padded[which, :, rows[:, :, None], columns[:, None, :]]
    return moved.permute(0, 3, 1, 2).contiguous()


def augmentation(spec: str, how: str) -> str:
    """`auto`: flips and shifts as the literature uses them for this data set; digits and signs are
    never mirrored.
    """
    if how != "auto":
        return how
    name = spec.partition(":")[0]
    return {"cifar10": "shift+flip", "cifar100": "shift+flip", "fashion-mnist": "flip"}.get(
        name, "none" if name == "digits" else "shift"
    )
