"""Float16 of what stays float: biases of layers of any rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from resq_deploy.export import graph, halves, qdq
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.dialect import Dialect
from resq_deploy.metrics import sqnr_db
from tests.helpers import SHAPE


class Sequence(nn.Module):
    """A picture read as 16 signals of 16 samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv1d(16, 16, 3, padding=1), nn.Conv1d(16, 32, 3)
        self.fc = nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x.flatten(1, 2)))))
        logits: Tensor = self.fc(x.mean(2))
        return logits


class Volume(nn.Module):
    """A picture read as a volume of 4 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 32, 3)
        self.up = nn.ConvTranspose3d(32, 16, 2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.b(torch.relu(self.a(x.reshape(-1, 1, 4, 8, 8)))))
        logits: Tensor = self.fc(torch.relu(self.up(x)).mean((2, 3, 4)))
        return logits


@pytest.mark.parametrize("kind", [Sequence, Volume])
def test_a_bias_has_the_rank_of_its_layer(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    whole = graph.Preprocessed(kind().eval(), (0.3,), (0.25,)).eval()
    fp32 = graph.to_onnx(whole, SHAPE, name="net")
    where = Dialect(half=True).plan(fp32)
    images = torch.rand(12, *SHAPE).numpy()
    ranges = calibrate(fp32, where.activations, [images], "minmax")
    half = halves.to_fp16(qdq.quantize_graph(fp32, ranges, where=where, dialect=Dialect(half=True)))
    graph.check(half)
    assert sqnr_db(graph.run(fp32, images), graph.run(half, images)) > 20
