"""The first and the last layer are INT8 whatever is done to pixels before them and to logits behind them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from resq_deploy.export import graph, rules
from tests.helpers import SHAPE, Attention

Step = Callable[[Tensor], Tensor]


class Ended(nn.Module):
    """Thin ends, 1 -> 16 -> 4 channels, and a thin layer 16 -> 8 between them, with something before and behind."""

    def __init__(self, before: Step, behind: Step) -> None:
        super().__init__()
        self.before, self.behind = before, behind
        self.first, self.wide = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
        self.thin, self.last = nn.Conv2d(16, 8, 1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.wide(torch.relu(self.first(self.before(x)))))
        return self.behind(self.last(torch.relu(self.thin(x)).mean((2, 3))))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s, self.b = nn.Parameter(torch.rand(1, 1, 1)), nn.Parameter(torch.rand(1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.s + self.b


def norm() -> nn.Module:
    """BatchNorm with statistics of its own: nothing that an exporter drops."""
    made = nn.BatchNorm2d(1)
    nn.init.constant_(made.weight, 1.5)
    return made


def same(x: Tensor) -> Tensor:
    return x


def planned(module: nn.Module) -> rules.Plan:
    whole = graph.Preprocessed(module.eval(), (0.3,), (0.25,)).eval()
    return rules.plan(graph.to_onnx(whole, SHAPE, name="net"))


@pytest.mark.parametrize(
    "before",
    [
        lambda x: 2 * x - 1,
        lambda x: 1 - x,
        lambda x: x.clamp(0, 1) ** 0.5,
        lambda x: (x - x.mean((2, 3), keepdim=True)) / 0.2,
        lambda x: nn.functional.interpolate(x, scale_factor=2.0),
        Scale(),
        norm(),
    ],
)
def test_the_first_layer(before: Step) -> None:
    assert {w.node for w in planned(Ended(before, same)).weights} == {"first", "wide", "last"}


@pytest.mark.parametrize(
    "behind",
    [
        lambda x: x / 0.5,
        lambda x: 4 * x,
        lambda x: torch.softmax(x, -1),
        lambda x: torch.log_softmax(x, -1),
        lambda x: x - x.mean(1, keepdim=True),
        lambda x: (x[:, None] * 1.5).squeeze(1),
    ],
)
def test_the_last_layer(behind: Step) -> None:
    assert {w.node for w in planned(Ended(same, behind)).weights} == {"first", "wide", "last"}


def test_a_classifier_of_tokens() -> None:
    class Tokens(Attention):
        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2) + self.place
            logits: Tensor = self.head(self.norm1(x)).mean(1)
            return logits

    assert {w.node for w in planned(Tokens()).weights} == {"patch", "head"}


def test_what_is_done_to_pixels_has_its_own_reason() -> None:
    told = {
        op.op: op.reason for op in planned(Ended(lambda x: 2 * x + 1, lambda x: 4 * x)).float_ops
    }
    assert told["Add"] == told["Div"] == "pixels are normalized in float"
    assert told["Conv"] == "thin: 16 -> 8 channels, below 16"
