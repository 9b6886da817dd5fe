"""Several trials at once: what they have in common is computed once, and what follows in one go.

A trial whose fault lies in one layer changes some of its channels. Trials of the same layer share the
preparation of that layer's input: the faulty channels of all of them are computed by one run of one
kernel. Behind it every layer is fault-free, so the images of all trials that still differ from the
golden ones go on together, each a row (trial, image) of its own; a row leaves once it is bit-identical
to the golden row of its image.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from resq_deploy.runtime.channels import ChannelKernel, Channels
from resq_deploy.runtime.golden import GoldenRun, Rows, Span, rows_differ
from resq_deploy.runtime.segments import Tensors
from resq_deploy.runtime.stages import in_parts, parts_of

ROWS_BYTES = 2**24  # of tensors that the rows under way may take, if none of them is masked


@dataclass(frozen=True, slots=True)
class Share:
    """A trial with its fault in segment `k` alone: the channels it changes, and their parameters."""

    trial: int
    k: int
    channels: Channels
    params: Tensors


@dataclass(slots=True)
class _Under:
    """Rows under way: image and trial of each, and those of their tensors that are not golden."""

    images: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    trials: Rows = field(default_factory=lambda: np.zeros(0, np.int64))
    live: Tensors = field(default_factory=dict)


def groups(golden: GoldenRun, shares: Iterable[Share]) -> list[list[Share]]:
    """Trials in the order of their layers, in groups whose rows fit the memory."""
    begin, end = golden.spans[0]
    most = max(1, ROWS_BYTES // max(1, golden.row_bytes * (end - begin)))
    ordered = sorted(shares, key=lambda s: (s.k, s.trial))
    return [ordered[i : i + most] for i in range(0, len(ordered), most)]


class SharedRun:
    """One group of trials on the images of one span; `layer_images` counts rows times layers."""

    def __init__(
        self,
        golden: GoldenRun,
        kernels: dict[int, ChannelKernel],
        shares: Sequence[Share],
        span: Span,
    ) -> None:
        self._golden, self._kernels = golden, kernels
        self._starting = {k: list(some) for k, some in groupby(shares, key=lambda s: s.k)}
        self._everyone: Rows = np.arange(*span)
        self.layer_images = 0

    def logits(self) -> tuple[Rows, Rows, NDArray[np.float32] | None]:
        """Trial, image and logits of every row that differs from the golden one at the end."""
        golden, under = self._golden, _Under()
        for k in range(min(self._starting), len(golden.segments)):
            if len(under.images):
                self._step(k, under)
            if k in self._starting:
                self._join(under, self._begin(k, self._starting[k]))
        return under.trials, under.images, under.live.get(golden.output)

    def _step(self, k: int, under: _Under) -> None:
        """Run segment k, fault-free, and keep the rows and tensors that differ from golden ones."""
        golden = self._golden
        self.layer_images += len(under.images)
        inputs = golden.inputs(k, under.live, under.images)
        made = in_parts(golden.segments[k], golden.sessions[k], inputs, golden.parts[k])
        under.live = golden.crossing(under.live | made, k)
        if not golden.compares(k):
            return
        masks = {n: rows_differ(v, golden.at(n, under.images)) for n, v in under.live.items()}
        mask = np.logical_or.reduce([np.zeros(len(under.images), bool), *masks.values()])
        under.live = {n: v for n, v in under.live.items() if masks[n].any()}
        if not mask.all():
            under.images, under.trials = under.images[mask], under.trials[mask]
            under.live = {n: v[mask] for n, v in under.live.items()}

    def _begin(self, k: int, shares: Sequence[Share]) -> _Under:
        """Compute the faulty channels of segment k for all its trials; the rows that differ."""
        self.layer_images += len(self._everyone) * len(shares)
        channels = np.concatenate([s.channels for s in shares])
        bounds = [0, *np.cumsum([len(s.channels) for s in shares]).tolist()]
        some = self._faulty(k, shares, channels)
        differ = np.zeros((len(self._everyone), len(channels)), bool)
        for name, value in some.items():
            differ |= _channels_differ(value, self._span(name)[..., channels])
        rows = [np.flatnonzero(differ[:, a:b].any(axis=1)) for a, b in pairwise(bounds)]
        where = np.concatenate(rows)
        trials = np.repeat([s.trial for s in shares], [len(r) for r in rows])
        live = {}
        for name, value in some.items():
            full, at = self._span(name)[where], 0
            for share, own, (a, b) in zip(shares, rows, pairwise(bounds), strict=True):
                full[at : at + len(own)][..., share.channels] = value[own][..., a:b]
                at += len(own)
            live[name] = full
        return _Under(self._everyone[where], trials, live)

    def _faulty(self, k: int, shares: Sequence[Share], channels: Channels) -> Tensors:
        kernel, golden = self._kernels[k], self._golden
        params = kernel.joined([s.params for s in shares])
        inputs = golden.inputs(k, {}, self._everyone)
        parts = [kernel.run(p, channels, params) for p in parts_of(inputs, golden.parts[k])]
        return {name: np.concatenate([p[name] for p in parts]) for name in parts[0]}

    def _span(self, name: str) -> NDArray[Any]:
        return self._golden.at(name, self._everyone)

    def _join(self, under: _Under, more: _Under) -> None:
        """Rows that begin here go on with those under way."""
        if not len(more.images):
            return
        if not len(under.images):
            under.images, under.trials, under.live = more.images, more.trials, more.live
            return
        names = dict.fromkeys((*under.live, *more.live))
        under.live = {n: np.concatenate([self._rows(p, n) for p in (under, more)]) for n in names}
        under.images = np.concatenate([under.images, more.images])
        under.trials = np.concatenate([under.trials, more.trials])

    def _rows(self, part: _Under, name: str) -> NDArray[Any]:
        return part.live[name] if name in part.live else self._golden.at(name, part.images)


def _channels_differ(a: NDArray[Any], b: NDArray[Any]) -> NDArray[np.bool_]:
    """[rows, channels]: where two tensors with the channels last differ in any bit."""
    kind = f"u{a.dtype.itemsize}"
    different = np.ascontiguousarray(a).view(kind) != np.ascontiguousarray(b).view(kind)
    return np.asarray(different.reshape(len(a), -1, a.shape[-1]).any(axis=1))
