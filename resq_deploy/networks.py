"""An architecture's name -> torch module, its stem fitted to small images where the literature
does so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from resq_deploy._factories import make
from resq_deploy.errors import MissingExtra, ModelError

Shape = tuple[int, int, int]

SMALL_SIDE = 64  # images up to this side get a stem that does not shrink them at once
_PREFIX = "torchvision:"
_RESNET8_WIDTH = 16


def build(
    arch: str, *, input_shape: Shape, classes: int, args: Mapping[str, Any], asked: bool = True
) -> nn.Module:
    """A network with random weights: float32 [B, C, H, W] (preprocessed) -> logits [B, classes].

    `arch`: `resnet8`, a torchvision classification model with or without `torchvision:`, or
    `pkg.module:factory` (see _factories.py). `args` may repeat `num_classes`, which the data
    decide. `asked`: whether a person named `arch`, not a file. Weights are drawn from torch's
    global generator: seed it first. Raises ModelError for an unknown name, or arguments the network
    does not take.
    """
    if len(input_shape) != 3 or min(input_shape) < 1 or classes < 1:
        raise ModelError(
            f"input shape {input_shape} with {classes} classes", "write the shape as CxHxW"
        )
    name = arch.removeprefix(_PREFIX)
    known_by_data = {"input_shape": input_shape, "classes": classes, "num_classes": classes}
    _check_repeated(arch, known_by_data, args)
    if ":" in name:
        return make(name, known_by_data, args, here=asked)
    own = {k: v for k, v in args.items() if k not in known_by_data}
    try:
        if name == "resnet8":
            return ResNet8(input_shape, classes, **own)
        return _torchvision(name, input_shape, classes, own)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{k}={v!r}" for k, v in args.items()) or "no arguments"
        raise ModelError(
            f"{arch} cannot be built with {given}: {error}", "see --arch-arg"
        ) from error


def _check_repeated(arch: str, known: Mapping[str, Any], args: Mapping[str, Any]) -> None:
    for key in known.keys() & args.keys():
        given = tuple(args[key]) if isinstance(args[key], list) else args[key]
        if given != known[key]:
            raise ModelError(
                f"{arch} with {key}={given}, where data or weights have {known[key]}",
                f"leave {key} out, or choose others",
            )


def known() -> tuple[str, ...]:
    """The names that `build` knows without an import path."""
    from torchvision import models

    return ("resnet8", *models.list_models(module=models))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection (He et al., CVPR 2016, 1512.03385)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.relu2 = nn.ReLU()
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, inputs, H, W] -> [B, outputs, H / stride, W / stride]."""
        y = self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x)))))
        out: Tensor = self.relu2(y + self.downsample(x))
        return out


class ResNet8(nn.Module):
    """A stem of `width` channels and three residual blocks of stride 2, up to 4 x `width` channels.

    For images of about 32x32 with 1 or 3 channels; 78,042 parameters at width 16 and 10 classes.
    """

    def __init__(self, input_shape: Shape, classes: int, width: int = _RESNET8_WIDTH) -> None:
        super().__init__()
        if width < 1:
            raise ValueError("width must be at least 1")
        self.conv1 = nn.Conv2d(input_shape[0], width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = BasicBlock(width, width, 2)
        self.layer2 = BasicBlock(width, 2 * width, 2)
        self.layer3 = BasicBlock(2 * width, 4 * width, 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """float32 [B, C, H, W] -> logits [B, classes]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.fc(torch.flatten(self.avgpool(x), 1))
        return logits


def _torchvision(name: str, shape: Shape, classes: int, args: dict[str, Any]) -> nn.Module:
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingExtra("torchvision", "harden") from error
    if name not in models.list_models(module=models):
        near = get_close_matches(name, known(), n=3)
        guess = f"close names: {', '.join(near)}" if near else "try resnet8 or resnet18"
        raise ModelError(f"unknown network {name!r}", f"{guess}; or write pkg.module:factory")
    small = max(shape[1:]) <= SMALL_SIDE
    family = next((f for f in _FAMILIES if name.startswith(f)), "")
    if "width" in args and family != "resnet":
        raise ValueError("only resnets take a width")
    make = _FAMILIES.get(family, _plain) if small else _plain
    network = make(name, classes, args)
    _fit_channels(network, shape[0])
    return network


def _plain(name: str, classes: int, args: dict[str, Any]) -> nn.Module:
    from torchvision import models

    width = args.pop("width", None)
    if width is not None:
        return _narrow_resnet(name, classes, int(width), args)
    network: nn.Module = models.get_model(name, weights=None, num_classes=classes, **args)
    return network


def _narrow_resnet(name: str, classes: int, width: int, args: dict[str, Any]) -> nn.Module:
    """Another base width: the four stages have width, 2x, 4x and 8x channels."""
    from torchvision.models.resnet import BasicBlock as Block
    from torchvision.models.resnet import ResNet

    layers = {"resnet18": [2, 2, 2, 2], "resnet34": [3, 4, 6, 3]}.get(name)
    if layers is None:
        raise ValueError("only resnet18 and resnet34 take a width")
    if width < 1:
        raise ValueError("width must be at least 1")
    if width == 64:
        return _plain(name, classes, args)
    network: Any = ResNet(Block, layers, num_classes=classes, **args)
    network.inplanes = width
    network.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
    network.bn1 = nn.BatchNorm2d(width)
    for stage, blocks in enumerate(layers):
        stride = 1 if stage == 0 else 2
        made = network._make_layer(Block, width << stage, blocks, stride=stride)
        setattr(network, f"layer{stage + 1}", made)
    network.fc = nn.Linear(width << 3, classes)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    narrow: nn.Module = network
    return narrow


def _small_resnet(name: str, classes: int, args: dict[str, Any]) -> nn.Module:
    """3x3 stem of stride 1 and no max-pool, as on CIFAR (He et al. 2016, section 4.2)."""
    network: Any = _plain(name, classes, args)
    width = network.conv1.out_channels
    network.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    made: nn.Module = network
    return made


def _small_vgg(name: str, classes: int, args: dict[str, Any]) -> nn.Module:
    """Five pools leave 1x1 of 32x32: no 7x7 pooling, and a classifier of one hidden layer (Liu &
    Deng, ACPR 2015).
    """
    dropout = float(args.pop("dropout", 0.5))
    network: Any = _plain(name, classes, args)
    network.avgpool = nn.AdaptiveAvgPool2d(1)
    network.classifier = nn.Sequential(
        nn.Linear(512, 512), nn.ReLU(), nn.Dropout(dropout), nn.Linear(512, classes)
    )
    made: nn.Module = network
    return made


def _small_efficientnet(name: str, classes: int, args: dict[str, Any]) -> nn.Module:
    """The stem keeps the image's size: stride 1 instead of 2."""
    network: Any = _plain(name, classes, args)
    network.features[0][0].stride = (1, 1)
    made: nn.Module = network
    return made


def _small_swin(name: str, classes: int, args: dict[str, Any]) -> nn.Module:
    """Patches of 2x2 and windows of 4x4, so that 32x32 becomes stages of 16, 8, 4 and 2."""
    from torchvision.models import swin_transformer as swin

    sizes = {
        "swin_t": (96, [2, 2, 6, 2], [3, 6, 12, 24], 0.2),
        "swin_s": (96, [2, 2, 18, 2], [3, 6, 12, 24], 0.3),
        "swin_b": (128, [2, 2, 18, 2], [4, 8, 16, 32], 0.5),
    }
    if name not in sizes:
        return _plain(name, classes, args)
    width, depths, heads, drop = sizes[name]
    options = {"patch_size": [2, 2], "window_size": [4, 4], "stochastic_depth_prob": drop} | args
    network: nn.Module = swin.SwinTransformer(
        embed_dim=width, depths=depths, num_heads=heads, num_classes=classes, **options
    )
    return network


def _fit_channels(network: nn.Module, channels: int) -> None:
    """Give the first convolution as many input channels as the images have."""
    for path, module in network.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels == channels:
                return
            parent, _, leaf = path.rpartition(".")
            setattr(network.get_submodule(parent), leaf, _with_inputs(module, channels))
            return


def _with_inputs(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    made = nn.Conv2d(
        channels,
        conv.out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
    )
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    if made.bias is not None:
        nn.init.zeros_(made.bias)
    return made


_FAMILIES: Mapping[str, Callable[[str, int, dict[str, Any]], nn.Module]] = {
    "resnet": _small_resnet,
    "vgg": _small_vgg,
    "efficientnet": _small_efficientnet,
    "swin": _small_swin,
}
