"""No two tensors of an exported graph have one name, whatever a network calls its parameters."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from resq_deploy.errors import ModelError
from resq_deploy.export import fold, graph, halves, qdq, rules
from resq_deploy.export.calibrate import calibrate
from resq_deploy.export.dialect import Dialect
from resq_deploy.export.grid import Grid
from resq_deploy.metrics import sqnr_db
from tests.export import nets
from tests.helpers import SHAPE, exported


class Affine(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Scaled(nn.Module):
    """Its parameter `input.scale` is called like the scale of `input`, which a convolution reads as INT8."""

    def __init__(self) -> None:
        super().__init__()
        self.input = Affine()
        self.left, self.right = (nn.Conv2d(1, 16, 3, padding=1) for _ in range(2))
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.left(self.input(x))) + torch.relu(self.right(x))
        logits: Tensor = self.fc(y.mean((2, 3)))
        return logits


class Ends(nn.Module):
    """Parameters that are called like the graph's input and output."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.rand(SHAPE))
        self.logits = nn.Parameter(torch.rand(3))
        self.conv, self.fc = nn.Conv2d(1, 16, 3), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x * self.input)).mean((2, 3))
        logits: Tensor = self.fc(y) * self.logits
        return logits


class Shifted(nn.Conv2d):
    """A convolution that is a module with a sum of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[:, :1]


class Summing(nn.Module):
    """Nodes `mix` and `mix.add`; the halves of `mix` are a convolution and an addition too."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.fc = Shifted(1, 16, 3, padding=1), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.fc(torch.relu(self.mix(x)).mean((2, 3)))
        return logits


def plain(kind: type[nn.Module]) -> onnx.ModelProto:
    """FP32 without preprocessing, so that layers read `input` itself."""
    torch.manual_seed(0)
    return graph.to_onnx(graph.Preprocessed(kind().eval(), (0.0,), (1.0,)), SHAPE, name="net")


@pytest.mark.parametrize(
    ("kind", "renamed"),
    [(Scaled, {"input.scale_1"}), (Ends, {"input_1", "logits_1"}), (Summing, set())],
)
def test_parameters_called_like_other_tensors_get_a_number(
    kind: type[nn.Module], renamed: set[str]
) -> None:
    fp32 = plain(kind)
    names = {t.name for t in fp32.graph.initializer}
    assert names >= renamed
    assert {n for n in names if not n.startswith(("input", "logits"))} == {
        f"{n}.{part}" for n, m in kind().named_children() if n != "input" for part in parts(m)
    }
    images = np.random.default_rng(0).random((16, *SHAPE), dtype=np.float32)
    where = rules.plan(fp32)
    ranges = calibrate(fp32, where.activations, [images], "minmax")
    for half in (False, True):
        int8 = qdq.quantize_graph(fp32, ranges, dialect=Dialect(half=half))
        made = halves.to_fp16(int8) if half else int8
        graph.check(made)
        assert sqnr_db(graph.run(fp32, images), graph.run(made, images)) > 20
        assert len({node.name for node in made.graph.node}) == len(made.graph.node)


def parts(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def test_a_module_called_input_keeps_its_name() -> None:
    class Stem(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.logits = nn.Conv2d(1, 16, 3), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.logits(torch.relu(self.input(x)).mean((2, 3)))
            return logits

    model = exported(Stem)[1]
    names = {t.name for t in model.graph.initializer}
    assert {"input.weight", "input.bias", "logits.weight", "logits.bias"} <= names


def test_quantization_refuses_a_name_that_it_needs() -> None:
    fp32 = nets.residual()
    fp32.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.float32), "input.scale"))
    fp32.graph.node.insert(
        0, helper.make_node("Mul", ["input", "input.scale"], ["louder"], name="louder")
    )
    with pytest.raises(ModelError, match=r"input\.scale already"):
        qdq.quantize_graph(fp32, dict.fromkeys(rules.plan(fp32).activations, nets.Fixed(Grid(0.1))))


def test_a_duplicate_is_not_dropped_and_fails_the_check() -> None:
    twice = nets.residual()
    twice.graph.initializer.append(numpy_helper.from_array(np.zeros(16, np.float32), "stem.bias"))
    fold.drop_unused(twice.graph)
    assert [t.name for t in twice.graph.initializer].count("stem.bias") == 2
    with pytest.raises(ModelError, match=r"2 tensors named stem\.bias"):
        graph.check(twice)
