"""A test double of the real seam: a small INT8 classifier in numpy that is a Runner like any other.

For tests of whatever sits on top of a Runner, yours too: it needs no bundle, opens in a millisecond,
and its weight memory can be flipped like that of an engine.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from resq_deploy.bundle import Bundle, Sample
from resq_deploy.errors import BackendError
from resq_deploy.faults import FaultSpace, Flips, Memory, flip_bits
from resq_deploy.metrics import top1
from resq_deploy.quantization import quantize, weight_scales
from resq_deploy.runtime.runner import Images, Logits, Runner

_ACTIVATION = np.float32(1 / 127)  # scale of the INT8 activations


class NumpyRunner(Runner):
    """Two linear layers, `fc1` and `fc2`, with INT8 weights per output channel, float bias, ReLU between.

    `shape`: (C, H, W) of the images; the same `seed` gives the same weights. Sums are exact integers, so
    logits are the same bits on every machine with the same numpy.
    """

    backend: ClassVar[str] = "numpy"

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 4, 4),
        hidden: int = 16,
        classes: int = 10,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        self._live: dict[str, NDArray[Any]] = {}
        memories = [
            *self._layer("fc1", hidden, int(np.prod(shape)), rng),
            *self._layer("fc2", classes, hidden, rng),
        ]
        super().__init__(FaultSpace(memories), shape, classes)

    @classmethod
    def open(cls, bundle: Bundle, **options: Any) -> NumpyRunner:
        """A double with a bundle's input shape and number of classes; it does not run the bundle's graph."""
        manifest = bundle.manifest
        return cls(manifest.input.shape, classes=len(manifest.classes), **options)

    def sample(self, count: int, seed: int = 0, right: float = 0.9) -> Sample:
        """Random images with labels, of which the golden network has about the share `right` right."""
        rng = np.random.default_rng(seed)
        images = (rng.integers(0, 256, (count, *self.shape)) / 255).astype(np.float32)
        wrong = rng.random(count) >= right
        labels = (top1(self(images)) + wrong * rng.integers(1, self.classes, count)) % self.classes
        return Sample(images, labels.astype(np.int64), np.arange(count))

    def _layer(
        self, name: str, outputs: int, inputs: int, rng: np.random.Generator
    ) -> Iterator[Memory]:
        weights = rng.normal(0, inputs**-0.5, (outputs, inputs)).astype(np.float32)
        scales = weight_scales(weights)
        bias = rng.normal(0, 0.1, outputs).astype(np.float32)
        for part, kind, value in (
            ("weight", "weights", quantize(weights, scales)),
            ("weight.scale", "scales", scales),
            ("bias", "bias", bias),
        ):
            self._live[f"{name}.{part}"] = value
            golden = value.copy()
            golden.flags.writeable = False
            yield Memory(f"{name}.{part}", name, kind, golden)  # type: ignore[arg-type]

    def _infer(self, images: Images) -> Logits:
        with np.errstate(all="ignore"):
            hidden = self._linear("fc1", images.reshape(len(images), -1) - np.float32(0.5))
            return self._linear("fc2", np.maximum(hidden, 0))

    def _linear(self, name: str, x: NDArray[np.float32]) -> NDArray[np.float32]:
        codes = np.clip(np.rint(np.nan_to_num(x / _ACTIVATION)), -128, 127).astype(np.int32)
        sums = codes @ self._live[f"{name}.weight"].T.astype(np.int32)
        scale = self._live[f"{name}.weight.scale"] * _ACTIVATION
        found: NDArray[np.float32] = sums.astype(np.float32) * scale + self._live[f"{name}.bias"]
        return found

    @contextmanager
    def _inject(self, flips: Flips) -> Iterator[None]:
        for name, part in flips.items():
            flip_bits(self._live[name], part)
            if self._is_golden(name):
                raise BackendError(f"{name} did not change")
        try:
            yield
        finally:
            for name, part in flips.items():
                flip_bits(self._live[name], part)
                if not self._is_golden(name):
                    raise BackendError(f"{name} is not back to what it was")

    def _is_golden(self, name: str) -> bool:
        return self._live[name].tobytes() == self.space.by_name[name].value.tobytes()
