"""What is odd about the outputs of a runner is said before anything rests on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from resq_deploy.runtime import sanity
from resq_deploy.runtime.double import NumpyRunner


class Odd(NumpyRunner):
    """A runner whose outputs are changed after the network."""

    after: Callable[[NDArray[np.float32]], NDArray[np.float32]] = staticmethod(lambda x: x)

    def _infer(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.after(super()._infer(images))


def softmax(x: NDArray[np.float32]) -> NDArray[np.float32]:
    e = np.exp(x - x.max(1, keepdims=True))
    found: NDArray[np.float32] = e / e.sum(1, keepdims=True)
    return found


def noisy(rng: np.random.Generator) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    return lambda x: x + rng.normal(0, 1e-3, x.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (softmax, "probabilities, not logits"),
        (noisy(np.random.default_rng(0)), "two runs of the same images differ"),
        (lambda x: x * np.float32(np.nan), "not finite"),
    ],
)
def test_odd_outputs_are_doubted(after: Any, message: str) -> None:
    runner = Odd(shape=(1, 8, 8))
    sample = runner.sample(8)
    assert sanity.outputs(runner, sample) == []
    runner.after = after
    (said,) = sanity.outputs(runner, sample)
    assert message in said
