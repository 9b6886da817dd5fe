"""What tests of several modules build: small data, small networks, checkpoints, pickles that bite."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from resq_deploy import networks
from resq_deploy.checkpoint import Checkpoint
from resq_deploy.data import Dataset
from resq_deploy.export import graph

SHAPE = (1, 16, 16)
CLASSES = ("blank", "stripe", "block")


def images(count: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Noisy pictures of three kinds, uint8 [N, 1, 16, 16], and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    x = rng.integers(0, 60, (count, *SHAPE))
    x[labels == 1, :, :, ::4] += 180
    x[labels == 2, :, 4:12, 4:12] += 180
    return x.astype(np.uint8), labels.astype(np.int64)


def dataset(count: int = 96, seed: int = 0) -> Dataset:
    """The same as a Dataset in memory."""
    x, y = images(count, seed)
    return Dataset.from_arrays(f"pictures-{seed}", x, y, CLASSES)


def save_npz(path: Path, **changes: Any) -> str:
    """A FILE.npz with a train and a test split; `changes` replace arrays."""
    x, y = images(96, 0)
    x_test, y_test = images(60, 1)
    arrays = {"x_train": x, "y_train": y, "x_test": x_test, "y_test": y_test, "classes": CLASSES}
    np.savez(path, **{**arrays, **changes})
    return str(path)


def checkpoint(seed: int = 0, **changes: Any) -> Checkpoint:
    """A resnet8 of width 16 with BatchNorm statistics that are not the default ones."""
    torch.manual_seed(seed)
    network = networks.build("resnet8", input_shape=SHAPE, classes=3, args={"width": 16})
    unsettle(network)
    fields: dict[str, Any] = {
        "arch": "resnet8",
        "arch_args": {"width": 16},
        "input_shape": SHAPE,
        "classes": CLASSES,
        "mean": (0.3,),
        "std": (0.25,),
        "state_dict": network.state_dict(),
        "trained": {"stages": "none"},
        "seed": seed,
        "metrics": {"clean": 0.5},
    }
    return Checkpoint(**{**fields, **changes})


def unsettle(network: nn.Module) -> nn.Module:
    """Give normalization layers statistics and parameters as training leaves them; eval mode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return network.eval()


def save_exported(path: Path, *, fixed: bool = False) -> None:
    """checkpoint() as a .pt2; `fixed`: for batches of two only."""
    batch = None if fixed else ({0: torch.export.Dim("batch")},)
    x = torch.rand(2, *SHAPE)
    program = torch.export.export(checkpoint().network(), (x,), dynamic_shapes=batch)
    with path.open("wb") as file:
        torch.export.save(program, file)


class Bomb:
    """Unpickling it creates a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


class Residual(nn.Module):
    """Stem, a residual block with a projection, a second one without, pool, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.relu = nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.a = nn.Conv2d(16, 32, 3, padding=1)
        self.b = nn.Conv2d(32, 32, 3, padding=1)
        self.skip = nn.Conv2d(16, 32, 1)
        self.c = nn.Conv2d(32, 32, 3, padding=1)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> logits."""
        x = self.pool(self.relu(self.norm(self.stem(x))))
        x = self.relu(self.b(self.relu(self.a(x))) + self.skip(x))
        x = self.relu(self.c(x) + x)
        logits: Tensor = self.fc(self.average(x).flatten(1))
        return logits


class Gated(nn.Module):
    """SiLU, a depthwise convolution, thin squeeze-excitation, hard swish, GroupNorm, Dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.SiLU())
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.squeeze = nn.Conv2d(32, 8, 1)
        self.excite = nn.Conv2d(8, 32, 1)
        self.project = nn.Conv2d(32, 32, 1)
        self.group = nn.GroupNorm(4, 32)
        self.swish = nn.Hardswish()
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> logits."""
        x = self.stem(x)
        y = self.depthwise(x)
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        y = self.swish(self.group(self.project(y * gate) + x))
        logits: Tensor = self.fc(self.drop(y.mean((2, 3))))
        return logits


class Attention(nn.Module):
    """Patches, LayerNorm, self-attention with a residual stream, GELU, class logits."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 32, 4, 4)
        self.place = nn.Parameter(torch.randn(1, 16, 32))
        self.norm1 = nn.LayerNorm(32)
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 32)
        self.norm2 = nn.LayerNorm(32)
        self.mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> logits."""
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        weights = torch.softmax(q @ k.transpose(1, 2) / 32**0.5, -1)
        x = x + self.proj(weights @ v)
        x = x + self.mlp(self.norm2(x))
        logits: Tensor = self.head(x.mean(1))
        return logits


class Branches(nn.Module):
    """Two branches concatenated, shuffled, pooled; a concatenation whose sum is BatchNorm that cannot be folded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.left = nn.Conv2d(16, 16, 1)
        self.right = nn.Conv2d(16, 16, 3, padding=1)
        self.mix = nn.Conv2d(32, 32, 1)
        self.norm = nn.BatchNorm2d(48)
        self.last = nn.Conv2d(48, 16, 1)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> logits."""
        x = torch.relu(self.stem(x))
        y = torch.cat([torch.relu(self.left(x)), torch.relu(self.right(x))], 1)
        y = y.reshape(-1, 2, 16, 16, 16).transpose(1, 2).reshape(-1, 32, 16, 16)
        y = torch.relu(self.mix(nn.functional.max_pool2d(y, 2)))
        y = torch.cat([y, nn.functional.avg_pool2d(x, 2)], 1)
        y = torch.relu(self.last(torch.relu(self.norm(y))))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


ZOO = (Residual, Gated, Attention, Branches)


_MADE: dict[tuple[str, int | None], tuple[nn.Module, onnx.ModelProto]] = {}


def exported(kind: type[nn.Module], opset: int | None = None) -> tuple[nn.Module, onnx.ModelProto]:
    """A network of the zoo and its FP32 graph, made once; do not change either."""
    key = kind.__qualname__, opset
    if key not in _MADE:
        torch.manual_seed(0)
        module = graph.Preprocessed(unsettle(kind()), (0.3,), (0.25,)).eval()
        _MADE[key] = module, graph.to_onnx(module, SHAPE, name="net", opset=opset)
    return _MADE[key]
