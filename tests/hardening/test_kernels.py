"""With which kernels a network is trained, and that training survives them."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import nn

from resq_deploy import networks
from resq_deploy.hardening.kernels import sound_kernels

SHAPE = (1, 16, 16)


@pytest.mark.parametrize(("width", "enabled"), [(4, False), (8, True)])
def test_thin_shortcuts_are_trained_without_onednn(width: int, enabled: bool) -> None:
    network = networks.build("resnet8", input_shape=SHAPE, classes=3, args={"width": width})
    library: Any = torch.backends.mkldnn
    with sound_kernels(network):
        assert library.enabled is enabled
    assert library.enabled is True


def test_what_is_not_strided_or_not_1x1_does_not_matter() -> None:
    library: Any = torch.backends.mkldnn
    layers = [nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(3, 8, 1), nn.Linear(4, 4)]
    for more, enabled in (([], True), ([nn.Conv2d(3, 8, 1, stride=2)], False)):
        with sound_kernels(nn.Sequential(*layers, *more)):
            assert library.enabled is enabled


@pytest.mark.parametrize("inputs", [1, 4, 7, 8])
def test_backward_keeps_to_its_memory(inputs: int) -> None:
    """In a process of its own, since what writes past its memory ends it."""
    code = f"""
import torch
from torch import nn
from resq_deploy.hardening.kernels import sound_kernels
torch.set_num_threads(1)
layer = nn.Conv2d({inputs}, 8, 1, stride=2).to(memory_format=torch.channels_last)
with sound_kernels(layer):
    for _ in range(60):
        x = torch.randn(16, {inputs}, 16, 16).contiguous(memory_format=torch.channels_last)
        layer(x.requires_grad_()).square().mean().backward()
        other = [torch.randn(n) for n in range(1, 400, 7)]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
