"""Runner: what a backend is. Checks and fault bookkeeping are here; a backend adds `_infer`, `_inject`."""

from __future__ import annotations

import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.bundle import Bundle
from resq_deploy.errors import BackendError, DataError, FaultError
from resq_deploy.faults import FaultSpace, Flips
from resq_deploy.runtime.closing import Closing

# Loaded on first use, so that a device needs only the runtime it has.
BACKENDS = {
    "ort": "resq_deploy.runtime.ort:OrtRunner",
    "tensorrt": "resq_deploy.runtime.trt:TrtRunner",
    "tensorrt-rtx": "resq_deploy.runtime.trt:TrtRtxRunner",
}
PLAN_OPTIONS = ("engine", "injection", "allow_host_code")  # of those that run a plan

Images = NDArray[np.float32]
Logits = NDArray[np.float32]


class Runner(Closing, ABC):
    """A deployed network that can be run, and whose weight memory can be flipped.

        with open_runner(bundle) as r:
            logits = r(images)                 # float32 [B, C, H, W] in [0, 1] -> float32 [B, classes]
            with r.faults(flips):
                logits = r(images)             # weight memory changed inside the block only

    `space` is the whole weight memory of the deployed INT8 graph; `shape` is (C, H, W).
    """

    backend: ClassVar[str]

    def __init__(self, space: FaultSpace, shape: tuple[int, int, int], classes: int) -> None:
        self.space = space
        self.shape = shape
        self.classes = classes
        self._occupied = False

    @classmethod
    def check(cls, bundle: Bundle, **options: Any) -> None:
        """Refuse what `open` would refuse, with nothing loaded. Raises BackendError."""

    @classmethod
    @abstractmethod
    def open(cls, bundle: Bundle, **options: Any) -> Runner:
        """Load a bundle's artifact. Raises BackendError where the runtime is missing or refuses it."""

    def __call__(self, images: Images) -> Logits:
        """Logits, float32 [B, classes], of images float32 [B, C, H, W] in [0, 1]. Raises DataError on another shape."""
        if images.ndim != 4 or images.shape[1:] != self.shape:
            want = "x".join(map(str, self.shape))
            raise DataError(
                f"images of shape {images.shape} given, [B, C, H, W] with {want} expected"
            )
        if images.shape[0] == 0:
            return np.zeros((0, self.classes), dtype=np.float32)
        return self._infer(np.ascontiguousarray(images, dtype=np.float32))

    @contextmanager
    def faults(self, flips: Flips) -> Iterator[None]:
        """Weight memory with these bits flipped, inside the block only; restored however the block ends.

        Raises FaultError for addresses this runner does not have, and BackendError where memory did
        not change, or was not back afterwards. Blocks do not nest.
        """
        if self._occupied:
            raise FaultError("faults() blocks do not nest", "merge the fault lists into one trial")
        for name in flips:
            if name not in self.space.by_name:
                raise FaultError(f"no tensor {name!r} in this bundle")
        if missing := self.unreachable(flips):
            raise BackendError(
                f"{self.backend} cannot reach {missing} of the {flips.count} bits to be flipped"
            )
        self._occupied = True
        try:
            with self._inject(flips):
                yield
        finally:
            self._occupied = False

    def unreachable(self, flips: Flips) -> int:
        """How many of these bits this backend cannot change (a plan's weight that was not located). 0: all can be."""
        return 0

    @property
    def info(self) -> dict[str, Any]:
        """What ran, for the report: library version, threads, way of injection, ... JSON types only."""
        return {"backend": self.backend}

    @property
    def identity(self) -> dict[str, Any]:
        """What of it decides the figures, next to the INT8 graph: a journal goes on only with the same. JSON types."""
        return {}

    @abstractmethod
    def _infer(self, images: Images) -> Logits:
        """Logits of checked, contiguous images with B >= 1."""

    @abstractmethod
    def _inject(self, flips: Flips) -> AbstractContextManager[None]:
        """A context in which the flips are in the memory that runs, and after which golden memory is back, checked."""


def open_runner(
    source: Bundle | str | os.PathLike[str], backend: str = "ort", **options: Any
) -> Runner:
    """Open a bundle (or the path of one, verified first) on a backend: `ort`, `tensorrt`, `tensorrt-rtx`.

    `options` go to the backend: `threads` and `exact` to `ort`; `engine` (a plan's name), `injection` (auto, live,
    plan, refit) and `allow_host_code` to those that run a plan. Raises BundleError, IntegrityError or BackendError.
    """
    chosen = _runner(backend, options)
    bundle = source if isinstance(source, Bundle) else Bundle.open(source)
    return chosen.open(bundle, **options)


def check_options(bundle: Bundle, backend: str, options: Mapping[str, Any]) -> None:
    """Refuse what `open_runner` would refuse before it loads anything. Raises BackendError."""
    _runner(backend, options).check(bundle, **options)


def _runner(backend: str, options: Iterable[str]) -> type[Runner]:
    """The class of a backend, if it may have these options."""
    if backend not in BACKENDS:
        raise BackendError(f"unknown backend {backend!r}", f"one of: {', '.join(BACKENDS)}")
    for_plans = [name for name in PLAN_OPTIONS if name in options]
    if backend == "ort" and for_plans:
        raise BackendError(
            f"--{for_plans[0].replace('_', '-')} is for engine plans; ort runs the graph itself",
            "leave it out, or run a plan: --backend tensorrt, or tensorrt-rtx",
        )
    module, _, name = BACKENDS[backend].partition(":")
    found: type[Runner] = getattr(importlib.import_module(module), name)
    return found
