"""One trial on some images: from its first faulty layer on, as long as an image differs from the golden run."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from resq_deploy.runtime.channels import ChannelKernel, Channels
from resq_deploy.runtime.golden import GoldenRun, Rows, Span, rows_differ
from resq_deploy.runtime.runner import Logits
from resq_deploy.runtime.segments import Tensors
from resq_deploy.runtime.stages import in_parts


@dataclass(frozen=True, slots=True)
class Trial:
    """A trial made ready: parameters, faulty segments, and for these the channels or a session."""

    arrays: dict[str, NDArray[Any]]
    faulty: tuple[int, ...]
    channels: dict[int, Channels] = field(default_factory=dict)
    sessions: dict[int, ort.InferenceSession] = field(default_factory=dict)

    def next(self, k: int) -> int | None:
        """The first faulty segment from k on."""
        return next((f for f in self.faulty if f >= k), None)


class SingleRun:
    """One trial on the images of one span; `layer_images` counts images times layers."""

    def __init__(
        self, golden: GoldenRun, kernels: dict[int, ChannelKernel], trial: Trial, span: Span
    ) -> None:
        self._golden, self._kernels, self._trial = golden, kernels, trial
        self._everyone: Rows = np.arange(*span)
        self._rows: Rows = self._everyone  # images under way
        self._live: Tensors = {}  # those of their tensors that may not be the golden ones
        self.layer_images = 0

    def logits(self) -> Logits:
        """Logits of all images of the span."""
        golden, trial = self._golden, self._trial
        k = golden.start(trial.faulty[0])
        while k < len(golden.segments):
            if not len(self._rows):
                following = trial.next(k)
                if following is None:
                    break
                self._rows, self._live, k = self._everyone, {}, golden.start(following)
            if k in trial.faulty and len(self._rows) < len(self._everyone):
                self._rejoin()
            self._step(k)
            k += 1
        logits: Logits = golden.at(golden.output, self._everyone).copy()
        if golden.output in self._live:
            logits[self._rows - self._everyone[0]] = self._live[golden.output]
        return logits

    def _rejoin(self) -> None:
        """All images go on, those that were dropped with their golden tensors."""
        for name, value in self._live.items():
            full = self._golden.at(name, self._everyone).copy()
            full[self._rows - self._everyone[0]] = value
            self._live[name] = full
        self._rows = self._everyone

    def _step(self, k: int) -> None:
        """Run segment k, then keep the images and tensors that differ from the golden ones."""
        golden, trial = self._golden, self._trial
        self.layer_images += len(self._rows)
        inputs = golden.inputs(k, self._live, self._rows)
        following = trial.next(k + 1)
        drop = not golden.whole and (following is None or following in golden.kept)
        if k in trial.channels and not self._live:
            self._step_channels(k, inputs, drop)
            return
        session = trial.sessions.get(k) or golden.sessions[k]
        made = in_parts(golden.segments[k], session, inputs, golden.parts[k])
        self._live = golden.crossing(self._live | made, k)
        if golden.compares(k):
            rows = self._rows
            self._keep({n: rows_differ(v, golden.at(n, rows)) for n, v in self._live.items()}, drop)

    def _step_channels(self, k: int, inputs: Tensors, drop: bool) -> None:
        golden, kernel, channels = self._golden, self._kernels[k], self._trial.channels[k]
        some = kernel.run(inputs, channels, kernel.params(self._trial.arrays, channels))
        want = {n: golden.at(n, self._rows) for n in some}
        self._live = dict(some)
        self._keep({n: rows_differ(v, want[n][..., channels]) for n, v in some.items()}, drop)
        for name, value in self._live.items():
            full = golden.at(name, self._rows).copy()
            full[..., channels] = value
            self._live[name] = full

    def _keep(self, masks: dict[str, NDArray[np.bool_]], drop: bool) -> None:
        """Go on with the images that differ (all of them, unless `drop`) and the tensors that do."""
        mask = np.zeros(len(self._rows), bool)
        for different in masks.values():
            mask |= different
        if not mask.any() and (drop or self._golden.whole):
            self._rows, self._live = self._rows[:0], {}
            return
        self._live = {n: v for n, v in self._live.items() if masks[n].any()}
        if drop and not mask.all():
            self._rows = self._rows[mask]
            self._live = {n: v[mask] for n, v in self._live.items()}
