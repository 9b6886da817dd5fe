"""Weights that a flip moves less: scales below max|w| / 127, and codes that make up for what is cut.

For one output channel with float weights w, codes q in [-127, 127] and scale s, on the layer's own INT8 inputs x, the
expected squared error at its output under a bit error rate p is

    J(q, s) = (w - s q)^T H (w - s q)  +  21,845 p s^2 tr H,     H = E[x x^T]

(a flip of bit b moves a code by 2^b, and bits flip independently). The second term falls with s, the first grows where
weights no longer fit. For each channel some scales are tried, and for each of them q is found by cyclic coordinate
descent on the grid, which rounds and makes up for cut weights in one (compare QuantEase, Behdin et al., 2309.01885):

    q_i <- clip(round(q_i + ((w - s q)^T H)_i / (s H_ii)))
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import Tensor

from resq_deploy import quantization
from resq_deploy.console import Reporter
from resq_deploy.export import fold, qdq
from resq_deploy.export.dialect import TENSORRT, Dialect
from resq_deploy.export.equalize import FLIP_POWER
from resq_deploy.export.grid import HasGrid
from resq_deploy.export.halves import as_half_scales
from resq_deploy.export.moments import Layer, layers, second_moments
from resq_deploy.saturation import ROOM, Pairs, bounds_of_rows, fit_rows

Images = NDArray[np.float32]

SHARE = (
    0.3  # of the design BER that scales are chosen for: a squared error overrates rare large ones
)
FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # of max|w| / 127
WIDER = (1.6, 1.4, 1.2)  # as well, where pairs of codes have to fit
WEAKER = 0.25  # of the design BER, where answers change too often at all of it
_SWEEPS = 3  # over all inputs, once the scale is chosen
_BLOCK = 128  # inputs after which the errors of all others are brought up to date
_DAMPING = 0.01  # of the mean of H's diagonal


def reconstruct(
    fp32: onnx.ModelProto,
    ranges: Mapping[str, HasGrid],
    images: Images,
    ber: float,
    *,
    dialect: Dialect = TENSORRT,
    seed: int = 0,
    threads: int | None = None,
    reporter: Reporter | None = None,
) -> tuple[onnx.ModelProto, dict[str, float]]:
    """The INT8 graph of `fp32` with reconstructed codes, and by weight the mean factor its scales fell by.

    `images`: float32 [N, C, H, W] in [0, 1], no labels; `ber`: the design BER; `ranges`, `dialect`: as in
    quantize_graph. Layers that moments.layers does not know keep round-to-nearest codes.
    """
    where = dialect.plan(fp32)
    arrays = fold.initializers(fp32.graph)

    def weights(layer: Layer) -> NDArray[np.float32]:
        return numpy_helper.to_array(arrays[layer.weight])

    found = layers(fp32, where)
    matrices = second_moments(fp32, found, ranges, images, seed, threads)
    pairs = dialect.pairs(fp32, where)
    scales, codes, shrunk = choose(
        len(found), matrices, weights, ber, pairs=pairs, half_scales=dialect.half, reporter=reporter
    )
    model = qdq.quantize_graph(
        fp32, ranges, dialect=dialect, where=where, weight_scales=scales, codes=codes
    )
    return model, shrunk


def choose(
    count: int,
    matrices: Iterable[tuple[Layer, Tensor]],
    weights: Callable[[Layer], NDArray[np.float32]],
    ber: float,
    *,
    pairs: Mapping[str, Pairs] | None = None,
    half_scales: bool = False,
    reporter: Reporter | None = None,
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.int8]], dict[str, float]]:
    """By weight: scales, codes, and the mean factor of the scales, of max|w| / 127.

    `matrices`: `count` layers with E[x x^T], which is damped in place; `weights`: what codes are to stand for;
    `pairs`: which codes of a weight must not saturate together (saturation.py), by weight, where some must not.
    """
    scales: dict[str, NDArray[np.float32]] = {}
    codes: dict[str, NDArray[np.int8]] = {}
    shrunk: dict[str, float] = {}
    with (reporter or Reporter()).task("reconstructing", count, "layers") as task:
        for layer, moments in matrices:
            values = weights(layer)
            full = quantization.weight_scales(values, layer.axis)
            room = Room((pairs or {}).get(layer.weight))
            factors = (*WIDER, *FACTORS) if room.partners else FACTORS
            options = (np.float32(factor) * full for factor in factors)
            tried = [as_half_scales(scale) if half_scales else scale for scale in options]
            scale, code = _channels(layer, values, tried, moments, SHARE * ber, room)
            scales[layer.weight], codes[layer.weight] = scale, code
            shrunk[layer.weight] = round(float((scale / full).mean()), 3)
            task.advance(1)
    return scales, codes, shrunk


def _channels(
    layer: Layer,
    weights: NDArray[np.float32],
    tried: list[NDArray[np.float32]],
    moments: Tensor,
    ber: float,
    room: Room,
) -> tuple[NDArray[np.float32], NDArray[np.int8]]:
    """The best of the tried scales for each channel, and the codes for them, shaped as the weight; damps `moments`."""
    damped = _damp(moments)
    rows = torch.tensor(layer.rows(weights))
    scales = [torch.from_numpy(scale).reshape(layer.groups, -1) for scale in tried]
    power = FLIP_POWER * ber * damped.diagonal(dim1=1, dim2=2).sum(1)[:, None]
    costs = []
    for scale in scales:
        codes = descend(rows, damped, scale, sweeps=1, room=room)
        costs.append(squared_error(rows, damped, scale, codes) + power * scale.square())
    best = torch.stack(costs).argmin(0)
    scale = torch.stack(scales).gather(0, best[None])[0]
    codes = descend(rows, damped, scale, sweeps=_SWEEPS, room=room)
    return scale.reshape(-1).numpy(), layer.weights(codes.numpy().astype(np.int8), weights.shape)


def _damp(moments: Tensor) -> Tensor:
    """In place: the matrix of a wide layer takes 85 MB."""
    diagonal = moments.diagonal(dim1=1, dim2=2)
    diagonal += _DAMPING * diagonal.mean(1, keepdim=True).clamp_min(1e-12)
    return moments


class Room:
    """How far codes of one weight may go: to -127 and 127, and with `pairs`, as far as no two of them saturate."""

    def __init__(self, pairs: Pairs | None = None) -> None:
        self.partners = () if pairs is None else pairs.partners

    def fit(self, codes: Tensor) -> Tensor:
        """Whole numbers, float32 [..., inputs], within these ends."""
        held = codes.clamp(-quantization.QMAX, quantization.QMAX)
        return torch.from_numpy(fit_rows(held.numpy(), self.partners)) if self.partners else held

    def clamp(self, wanted: Tensor, codes: Tensor) -> Tensor:
        """Each of `wanted` as far as it may go while all others are those of `codes`."""
        if not self.partners:
            return wanted.clamp(-quantization.QMAX, quantization.QMAX)
        low, high = (torch.from_numpy(v) for v in bounds_of_rows(codes.numpy(), self.partners))
        return torch.clamp(wanted, low, high)

    def clamp_one(self, wanted: Tensor, codes: Tensor, i: int) -> Tensor:
        """The same for input `i` alone: float32 [...]."""
        held = wanted.clamp(-quantization.QMAX, quantization.QMAX)
        for partner in self.partners:
            if (j := int(partner[i])) < codes.shape[-1]:
                beside = codes[..., j]
                held = torch.clamp(held, -ROOM - beside.clamp(max=0), ROOM - beside.clamp(min=0))
        return held


ANY = Room()


def descend(
    weights: Tensor, moments: Tensor, scales: Tensor, sweeps: int, room: Room = ANY
) -> Tensor:
    """Codes with a small squared error at the output, never a larger one than rounding to nearest, where that fits.

    `weights`: float32 [groups, channels, inputs]; `moments`: E[x x^T], [groups, inputs, inputs], positive diagonal;
    `scales`: [groups, channels]. Returns whole numbers in [-127, 127], float32, shaped as the weights.
    """
    scale = scales[..., None]
    codes = room.fit((weights / scale).round())
    error = (weights - codes * scale) @ moments
    for _ in range(sweeps):
        for begin in range(0, weights.shape[-1], _BLOCK):
            block = slice(begin, begin + _BLOCK)
            before = codes[..., block].clone()
            _descend(codes, begin, error[..., block], moments[:, block, block], scales, room)
            error -= (codes[..., block] - before) * scale @ moments[:, block]
        if not _moved(codes, error, moments, scale, room):
            break
    return codes


def _moved(codes: Tensor, error: Tensor, moments: Tensor, scale: Tensor, room: Room) -> bool:
    """Whether another sweep would change a code."""
    steps = error / (scale * moments.diagonal(dim1=1, dim2=2)[:, None])
    return bool((room.clamp((codes + steps).round(), codes) != codes).any())


def _descend(
    codes: Tensor, begin: int, error: Tensor, moments: Tensor, scales: Tensor, room: Room
) -> None:
    """One sweep over some inputs, from `begin` on: `codes` change in place, `error` and `moments` are of these."""
    here = error.clone()
    diagonal = moments.diagonal(dim1=1, dim2=2)
    for i in range(here.shape[-1]):
        old = codes[..., begin + i].clone()
        new = (old + here[..., i] / (scales * diagonal[:, i, None])).round()
        codes[..., begin + i] = room.clamp_one(new, codes, begin + i)
        here -= ((codes[..., begin + i] - old) * scales)[..., None] * moments[:, i, None]


def squared_error(weights: Tensor, moments: Tensor, scales: Tensor, codes: Tensor) -> Tensor:
    """E[((w - s q)^T x)^2] of each channel: [groups, channels]."""
    rest = weights - codes * scales[..., None]
    return ((rest @ moments) * rest).sum(-1)
