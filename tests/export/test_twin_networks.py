"""The twin of FP32 graphs as torch exports them, against ONNX Runtime: layers that the other tests' networks lack."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torchvision
from torch import Tensor, nn

from resq_deploy.export import graph
from resq_deploy.export.twin import Twin
from tests.export.twins import artifact


class Uncommon(nn.Module):
    """Norms over groups and instances, activation functions of every kind, up and down, attention."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, 2, 1), nn.GroupNorm(4, 8), nn.PReLU(8)),
            *(nn.Conv2d(8, 16, 3, 2, 1), nn.InstanceNorm2d(16, affine=True), nn.Mish()),
            *(nn.InstanceNorm2d(16), nn.Softplus(), nn.Hardtanh(), nn.LPPool2d(2, 2, 1)),
        )
        self.up = nn.Sequential(
            *(nn.ConvTranspose2d(16, 8, 4, 2, 1), nn.ELU(), nn.LocalResponseNorm(5)),
            *(nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=4), nn.SELU(), nn.AdaptiveAvgPool2d(5)),
            *(nn.Upsample(scale_factor=2), nn.CELU(0.7), nn.Upsample(size=8, mode="bilinear")),
            *(nn.GLU(1), nn.Softsign(), nn.PixelShuffle(2), nn.Softshrink(0.01)),
        )
        self.attend = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> logarithms of probabilities."""
        x = self.up(self.down(x)).flatten(2)
        x = nn.functional.normalize(x.reshape(-1, 16, 16), dim=-1)
        x = self.attend(x, x, x)[0]
        x = torch.einsum("bij,bik->bjk", x, x)
        return torch.log_softmax(self.head(x.mean(1)), 1)


def vit() -> nn.Module:
    """Its classifier starts as zeros."""
    network: nn.Module = torchvision.models.VisionTransformer(16, 8, 1, 2, 16, 32, num_classes=3)
    nn.init.normal_(network.get_parameter("heads.head.weight"))
    return network


def swin_v2() -> nn.Module:
    from torchvision.models.swin_transformer import PatchMergingV2, SwinTransformerBlockV2

    network: nn.Module = torchvision.models.SwinTransformer(
        *([4, 4], 16, [1, 1], [2, 2], [4, 4]),
        num_classes=3,
        block=SwinTransformerBlockV2,
        downsample_layer=PatchMergingV2,
    )
    return network


def maxvit() -> nn.Module:
    network: nn.Module = torchvision.models.MaxVit(
        *((28, 28), 8, 7, [16], [1], 8, 0.0), num_classes=3
    )
    return network


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (Uncommon, 16),
        (vit, 16),
        pytest.param(swin_v2, 32, marks=pytest.mark.slow),
        pytest.param(maxvit, 28, marks=pytest.mark.slow),
    ],
)
def test_networks_equal_onnx_runtime(make: Callable[[], nn.Module], size: int) -> None:
    torch.manual_seed(0)
    module = graph.Preprocessed(make().eval(), [0.4] * 3, [0.25] * 3).eval()
    model = graph.to_onnx(module, (3, size, size), name="net")
    images = np.random.default_rng(0).random((3, 3, size, size), dtype=np.float32)
    x = torch.from_numpy(images).requires_grad_()
    y = torch.from_numpy(images).requires_grad_()
    logits, theirs = Twin(model)(x), module(y)
    wanted = artifact(model, images)
    np.testing.assert_allclose(logits.detach().numpy(), wanted, atol=1e-5 * np.abs(wanted).max())
    (gradient,) = torch.autograd.grad(logits[:, 1].sum(), x)
    (expected,) = torch.autograd.grad(theirs[:, 1].sum(), y)
    torch.testing.assert_close(
        gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())
    )
