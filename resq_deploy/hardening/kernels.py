"""Which of torch's kernels a network can be trained with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_LEAST = 8  # input channels


@contextmanager
def sound_kernels(network: nn.Module) -> Iterator[None]:
    """A block in which backward passes of this network are right: without oneDNN where that is not sound.

    A strided 1x1 convolution with fewer than 8 input channels, in channels_last: on x86 with AVX2 and no AVX-512, its
    backward pass in torch 2.14 writes past its memory, and the process is aborted, or hangs.
    """
    convolutions = (m for m in network.modules() if isinstance(m, nn.Conv2d))
    thin = any(
        m.kernel_size == (1, 1) and m.stride != (1, 1) and m.in_channels < _LEAST
        for m in convolutions
    )
    library: Any = torch.backends.mkldnn  # its own flags() warns of TF32
    before = library.enabled
    try:
        library.enabled = before and not thin
        yield
    finally:
        library.enabled = before
