"""Bit flips in the INT8 codes of weights, differentiable: the torch face of
resq_deploy.quantization.

The codes are those that resq-export writes, q = clip(round_half_even(w / s), -127, 127) with s =
max|w| / 127 per output channel. Folding a BatchNorm into its convolution scales whole output
channels, so it changes s and not the codes (a negative factor changes their sign).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from resq_deploy.quantization import MIN_SCALE, QMAX

BITS = 8
_TINY = 1e-30
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def weights(network: nn.Module) -> Iterator[tuple[str, Tensor, int]]:
    """(name, parameter, output axis) of every weight that is deployed as INT8: convolutions,
    linear layers, attention.
    """
    for path, module in network.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(module, _WEIGHTED):
            axis = 1 if isinstance(module, _TRANSPOSED) else 0
            yield f"{prefix}weight", module.weight, axis
        elif isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
            yield f"{prefix}in_proj_weight", module.in_proj_weight, 0


def quantized(weight: Tensor, axis: int = 0) -> tuple[Tensor, Tensor]:
    """INT8 codes, and their scales float32 shaped to broadcast over the weight. No gradient."""
    with torch.no_grad():
        others = [dim for dim in range(weight.ndim) if dim != axis]
        peak = weight.abs().amax(dim=others, keepdim=True)
        scale = (peak / QMAX).clamp_min(float(MIN_SCALE))
        return (weight / scale).round().clamp(-QMAX, QMAX).to(torch.int8), scale


def straight_through(weight: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """codes * scale in the forward pass, the weight itself in the backward pass (Bengio et al.
    2013, 1308.3432).
    """
    return weight + (codes * scale - weight).detach()


def random_addresses(bits: int, rate: float, generator: torch.Generator) -> Tensor:
    """The positions in [0, bits) of independent flips of probability `rate`: int64, ascending.

    Gaps between flips are geometric, so the cost is that of the flips, not of the bits.
    """
    if rate <= 0 or bits == 0:
        return torch.empty(0, dtype=torch.int64)
    expected = bits * rate
    count = int(expected + 8 * math.sqrt(expected) + 16)
    places = torch.empty(0, dtype=torch.int64)
    last = -1
    while last < bits:
        uniform = torch.rand(count, generator=generator, dtype=torch.float64)
        gaps = (torch.log1p(-uniform) / math.log1p(-rate)).floor().to(torch.int64) + 1
        places = torch.cat([places, last + gaps.cumsum(0)])
        last = int(places[-1])
    return places[places < bits]


def flip(
    codes: Tensor, ber: float, generator: torch.Generator, tilt: Tensor | None = None
) -> Tensor:
    """A copy of INT8 codes with each bit flipped with probability `ber`, times `tilt` per code if
    given.

    `generator` is one of the CPU on every device, so that flips do not depend on where training
    runs.
    """
    strongest = 1.0 if tilt is None else float(tilt.max())
    rate = min(ber * strongest, 0.5)
    places = random_addresses(codes.numel() * BITS, rate, generator)
    if tilt is not None and len(places):
        keep = torch.rand(len(places), generator=generator)
        share = tilt.expand_as(codes).reshape(-1).cpu()[places // BITS]
        places = places[keep < share * (ber / rate)]
    mask = torch.zeros(codes.numel(), dtype=torch.int64)
    mask.index_add_(0, places // BITS, torch.ones_like(places) << (places % BITS))
    return codes ^ mask.to(torch.uint8).view(torch.int8).reshape(codes.shape).to(codes.device)


def faulty_weights(
    network: nn.Module,
    ber: float,
    generator: torch.Generator,
    tilts: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Every INT8 weight by name, quantized, with fresh flips; straight-through gradients. `ber` 0:
    without flips.
    """
    made = {}
    for name, weight, axis in weights(network):
        codes, scale = quantized(weight, axis)
        if ber > 0:
            codes = flip(codes, ber, generator, None if tilts is None else tilts.get(name))
        made[name] = straight_through(weight, codes, scale)
    return made


@torch.no_grad()
def clip_weights(network: nn.Module, bound: float) -> None:
    """Clamp each weight to `bound` root mean squares of its output channel, in place; 0: do nothing.

    RandBET (Stutz et al., MLSys 2021) clips to one +-w_max for the whole network. A flip's error is
    a share of the channel's max|w|, its harm is relative to the channel's typical weight, so what
    counts is their ratio; bounding that needs no w_max to tune. The channel then gets its size back,
    so that clipping does not shrink it step after step.
    """
    if bound <= 0:
        return
    for _, weight, axis in weights(network):
        others = [dim for dim in range(weight.ndim) if dim != axis]
        if weight.numel() == weight.shape[axis]:
            continue  # one weight a channel: nothing to compare it with
        before = weight.square().mean(dim=others, keepdim=True).sqrt()
        weight.clamp_(-bound * before, bound * before)
        after = weight.square().mean(dim=others, keepdim=True).sqrt()
        weight.mul_(before / after.clamp_min(_TINY))


class Sensitivity:
    """How much flips in each output channel raise the loss, to first order, averaged over training.

    E[(dL/dw * e)^2] summed over a channel, e the error of a random flip: its variance is that of
    the channel's scale squared, so s_c = scale_c^2 * sum(grad^2). The tilt is (s_c / its
    mean)^strength, bounded to [1/4, 4] and normalized so that the BER of the whole network stays
    what it is.
    """

    def __init__(self, network: nn.Module, strength: float, decay: float = 0.95) -> None:
        self.strength, self.decay = strength, decay
        self.scores = {name: torch.zeros_like(self._peak(w, a)) for name, w, a in weights(network)}

    @staticmethod
    def _peak(weight: Tensor, axis: int) -> Tensor:
        others = [dim for dim in range(weight.ndim) if dim != axis]
        return weight.detach().abs().amax(dim=others, keepdim=True)

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Take in the gradients that the parameters hold now."""
        for name, weight, axis in weights(network):
            if weight.grad is not None:
                others = [dim for dim in range(weight.ndim) if dim != axis]
                energy = weight.grad.square().sum(dim=others, keepdim=True)
                fresh = energy * self._peak(weight, axis).square()
                self.scores[name].lerp_(fresh, 1 - self.decay)

    def tilts(self, network: nn.Module) -> dict[str, Tensor] | None:
        """Factor of the flip probability per output channel, by weight name; None: every bit
        alike.
        """
        mean = torch.cat([s.reshape(-1) for s in self.scores.values()]).mean()
        if self.strength <= 0 or not bool(mean > 0):
            return None
        raw = {n: (s / mean).pow(self.strength).clamp(0.25, 4.0) for n, s in self.scores.items()}
        sizes = {name: weight.numel() for name, weight, _ in weights(network)}
        total = sum(float(raw[n].mean()) * size for n, size in sizes.items())
        return {n: value * (sum(sizes.values()) / total) for n, value in raw.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, by weight name."""
        return self.scores

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages saved before."""
        for name, value in state.items():
            self.scores[name].copy_(value)
