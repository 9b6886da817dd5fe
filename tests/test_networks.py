"""Networks by name: shapes, fitted stems, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resq_deploy import networks
from resq_deploy.errors import ModelError
from resq_deploy.networks import Shape, build


def tiny(input_shape: Shape, classes: int, hidden: int = 4) -> nn.Module:
    """A factory as a user would write it."""
    size = input_shape[0] * input_shape[1] * input_shape[2]
    return nn.Sequential(nn.Flatten(), nn.Linear(size, hidden), nn.Linear(hidden, classes))


def not_a_network(input_shape: Shape, classes: int) -> int:
    """A factory that makes something else."""
    return classes


def size(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize(
    ("arch", "shape", "args", "millions"),
    [
        ("resnet8", (1, 32, 32), {}, 0.078),
        ("resnet8", (3, 32, 32), {"width": 8}, 0.02),
        ("resnet18", (3, 32, 32), {}, 11.17),
        ("resnet18", (1, 32, 32), {"width": 16}, 0.70),
        ("torchvision:resnet34", (1, 32, 32), {"width": 8}, 0.33),
        ("vgg16", (3, 32, 32), {}, 14.98),
        ("efficientnet_b0", (3, 32, 32), {}, 4.02),
        ("swin_t", (1, 32, 32), {}, 27.5),
        ("mobilenet_v3_small", (1, 32, 32), {}, 1.53),
        ("resnet18", (3, 96, 96), {}, 11.18),
        (f"{__name__}:tiny", (1, 8, 8), {"hidden": 7}, 0.0005),
    ],
)
def test_networks_have_the_shape_and_size_of_their_kind(
    arch: str, shape: Shape, args: dict[str, Any], millions: float
) -> None:
    network = build(arch, input_shape=shape, classes=10, args=args).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, *shape)).shape == (2, 10)
    assert size(network) / 1e6 == pytest.approx(millions, rel=0.1)


@pytest.mark.parametrize(
    ("arch", "side", "deepest"),
    [("resnet18", 32, 4), ("efficientnet_b0", 32, 2), ("swin_t", 32, 2), ("resnet18", 96, 3)],
)
def test_small_images_keep_some_size_to_the_end(arch: str, side: int, deepest: int) -> None:
    network = build(arch, input_shape=(3, side, side), classes=4, args={}).eval()
    sizes: list[torch.Size] = []
    last = network.get_submodule("layer4" if arch == "resnet18" else "features")
    last.register_forward_hook(lambda _m, _i, out: sizes.append(out.shape))
    with torch.no_grad():
        network(torch.zeros(1, 3, side, side))
    where = 1 if arch == "swin_t" else 2
    assert sizes[0][where] == deepest


def test_the_same_seed_draws_the_same_weights() -> None:
    drawn = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append(build("resnet8", input_shape=(1, 32, 32), classes=10, args={}).state_dict())
    assert all(torch.equal(drawn[0][key], drawn[1][key]) for key in drawn[0])


@pytest.mark.parametrize(
    ("arch", "args", "message"),
    [
        ("resnet81", {}, r"close names: .*resnet8"),
        ("xyzzy", {}, r"unknown network 'xyzzy'"),
        ("torchvision:nothing18", {}, "unknown network"),
        ("resnet8", {"depth": 3}, r"depth=3"),
        ("resnet8", {"width": 0}, "width must be"),
        ("resnet50", {"width": 8}, "take a width"),
        ("vgg16", {"width": 8}, "width"),
        ("no.such.module:f", {}, "cannot import"),
        (f"{__name__}:nothing", {}, "cannot import"),
        (f"{__name__}:__doc__", {}, "cannot be called"),
        (f"{__name__}:not_a_network", {}, "made a int"),
    ],
)
def test_what_cannot_be_built_is_refused(arch: str, args: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        build(arch, input_shape=(1, 32, 32), classes=10, args=args)


def test_shapes_that_are_none_are_refused() -> None:
    with pytest.raises(ModelError, match="CxHxW"):
        build("resnet8", input_shape=(0, 32, 32), classes=10, args={})


def test_known_names_can_be_asked_for() -> None:
    assert {"resnet8", "resnet18", "vgg16", "efficientnet_b0", "swin_t"} <= set(networks.known())
