"""Channels in another order: the same function, in weights of which fewer pairs share a range."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from resq_deploy import networks, quantization, saturation
from resq_deploy.export import fold, graph
from resq_deploy.export.dialect import Dialect
from resq_deploy.export.pairing import match, paired
from tests.export import nets
from tests.export.sessions import KINDS, arrays, pixels
from tests.helpers import exported

FIX = Dialect("onnxruntime", overflow_fix=True)
FREE = Dialect("onnxruntime")


def changed(before: onnx.ModelProto, after: onnx.ModelProto) -> set[str]:
    old, new = arrays(before), arrays(after)
    assert list(old) == list(new)
    return {name for name in old if not np.array_equal(old[name], new[name])}


def widths(model: onnx.ModelProto) -> dict[str, float]:
    """By how much pairs widen the scales of each layer."""
    held = arrays(model)
    found = {}
    for name, pairs in FIX.pairs(model, FIX.plan(model)).items():
        wide = saturation.weight_scales(held[name], pairs.axis, pairs)
        found[name] = float((wide / quantization.weight_scales(held[name], pairs.axis)).mean())
    return found


def whole(module: nn.Module, shape: tuple[int, int, int]) -> onnx.ModelProto:
    """Pixels -> logits, in one graph."""
    channels = shape[0]
    network = graph.Preprocessed(module.eval(), (0.5,) * channels, (0.25,) * channels).eval()
    return graph.to_onnx(network, shape, name="net")


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.__name__)
def test_it_is_the_same_network(kind: Any) -> None:
    before = FREE.prepared(exported(kind)[1])
    after = FIX.prepared(exported(kind)[1])
    assert [n.SerializeToString() for n in after.graph.node] == [
        n.SerializeToString() for n in before.graph.node
    ]
    a, b = (graph.run(model, pixels()) for model in (before, after))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    assert changed(before, after)
    old, new = arrays(before), arrays(after)
    for name in changed(before, after):
        assert np.array_equal(np.sort(old[name], axis=None), np.sort(new[name], axis=None))
    assert FREE.paired(before) is before


def test_a_large_network() -> None:
    name = "efficientnet_b0"
    torch.manual_seed(0)
    module = networks.build(name, input_shape=(3, 32, 32), classes=10, args={})
    fp32 = FREE.prepared(whole(module, (3, 32, 32)))
    made = FIX.paired(fp32)
    x = np.random.default_rng(0).random((2, 3, 32, 32), dtype=np.float32)
    a, b = (graph.run(model, x) for model in (fp32, made))
    assert np.abs(a - b).max() <= 1e-4 * np.abs(a).max()
    before, after = widths(fp32), widths(made)
    better = [layer for layer in before if after[layer] < before[layer] - 0.01]
    assert len(better) >= 60
    assert np.mean([*after.values()]) < np.mean([*before.values()]) - 0.1


class Shuffled(nn.Module):
    """Two layers with channels between them that something else depends on the order of."""

    gain: Tensor

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b = nn.Conv2d(1, 16, 3), nn.Conv2d(16, 16, 3)
        self.register_buffer("gain", torch.linspace(0.5, 2, 16).reshape(1, 16, 1, 1))
        self.c = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.fc = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels -> logits."""
        x = torch.relu(self.a(x))
        if self.way == "shuffle":
            n, c, h, w = x.shape
            x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        elif self.way == "groups":
            x = self.c(x)
        elif self.way == "pooled across":
            x = x * x.mean(1, keepdim=True)
        elif self.way == "scaled":
            x = x * self.gain
        elif self.way == "both":
            x = x * torch.sigmoid(self.gain * x.mean((2, 3), keepdim=True))
        logits: Tensor = self.fc(torch.relu(self.b(x)).mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("way", "moves"),
    [
        ("plain", True),
        ("scaled", True),
        ("both", True),
        ("shuffle", False),
        ("groups", False),
        ("pooled across", False),
    ],
)
def test_what_depends_on_the_order_stays(way: str, moves: bool) -> None:
    torch.manual_seed(1)
    fp32 = FREE.prepared(whole(Shuffled(way), (1, 12, 12)))
    made = FIX.paired(fp32)
    x = nets.images(8)
    a, b = (graph.run(model, x) for model in (fp32, made))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()
    assert ("a.weight" in changed(fp32, made)) == moves
    assert "fc.weight" in changed(fp32, made)


def test_a_weight_that_two_layers_share_stays() -> None:
    model = nets.residual()
    nodes = {n.name: n for n in model.graph.node}
    pairs = FIX.pairs(model, FIX.plan(model))
    assert changed(model, paired(model, pairs)) >= {"stem.weight", "conv1.weight", "conv1.bias"}
    nodes["conv1"].input[1] = "conv1.weight"
    extra = onnx.helper.make_node(
        "Conv", ["relu.out", "conv1.weight"], ["extra"], name="extra", pads=[1] * 4
    )
    again = onnx.helper.make_node("Add", ["extra", "conv1.out"], ["both"], name="both")
    where = [n.name for n in model.graph.node].index("relu1")
    nodes["relu1"].input[0] = "both"
    fold.replace(
        model.graph.node, [*model.graph.node[:where], extra, again, *model.graph.node[where:]]
    )
    onnx.checker.check_model(model, full_check=True)
    assert not changed(model, paired(model, pairs)) & {"stem.weight", "conv1.weight", "conv1.bias"}


def test_a_depthwise_layer_over_tokens_stays() -> None:
    """[N, tokens, channels]: what one product makes on the last axis, the next layer reads on the second."""
    rng = np.random.default_rng(0)
    weights = {
        "a": rng.normal(size=(16, 16)),
        "d": rng.normal(size=(16, 1, 3)),
        "c": rng.normal(size=(16, 16, 1)),
    }
    nodes = [
        onnx.helper.make_node("MatMul", ["input", "a"], ["x"], name="a"),
        onnx.helper.make_node("Conv", ["x", "d"], ["y"], name="d", group=16, pads=[1, 1]),
        onnx.helper.make_node("Conv", ["y", "c"], ["logits"], name="c"),
    ]
    kinds = [onnx.helper.make_tensor_value_info(n, 1, ["n", 16, 16]) for n in ("input", "logits")]
    tensors = [numpy_helper.from_array(v.astype(np.float32), n) for n, v in weights.items()]
    body = onnx.helper.make_graph(nodes, "g", kinds[:1], kinds[1:], tensors)
    model = onnx.helper.make_model(
        body, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
    )
    pairs = FIX.pairs(model, FIX.plan(model))
    pairs |= {"c": saturation.Pairs(0, saturation.of_window(16, 1))}
    made = paired(model, pairs)
    assert changed(model, made) <= {"d", "c"}
    x = rng.random((2, 16, 16), dtype=np.float32)
    a, b = (graph.run(m, x) for m in (model, made))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_an_order_that_changes_answers_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.residual()
    monkeypatch.setattr(graph, "apart", lambda *_: 0.5)
    assert changed(model, paired(model, FIX.pairs(model, FIX.plan(model)))) == set()


def test_only_layers_with_pairs_are_looked_at() -> None:
    model = nets.residual()
    assert changed(model, paired(model, {})) == set()


def test_flattened_channels_move_as_blocks() -> None:
    model = nets.chain()  # [24, 6, 6] -> 864 inputs of the last layer
    held = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    pairs = FIX.pairs(model, FIX.plan(model))
    made = paired(model, pairs)
    assert "conv2.weight" in changed(model, made)
    assert np.array_equal(held["fc.weight"], arrays(made)["fc.weight"])  # its pairs stay together
    x = nets.images(8)
    a, b = (graph.run(m, x) for m in (model, made))
    assert np.abs(a - b).max() <= 1e-5 * np.abs(a).max()


def test_matching() -> None:
    rng = np.random.default_rng(0)
    half = np.square(rng.random((8, 8)))
    cost = half + half.T
    np.fill_diagonal(cost, 0)

    def price(order: Any) -> float:
        return float(cost[order[::2], order[1::2]].sum())

    best = min(price(np.array(p)) for p in permutations(range(8)))
    found = match(cost)
    assert sorted(found) == list(range(8))
    assert price(found) <= 1.2 * best
    assert price(found) < price(np.arange(8))
    assert np.array_equal(match(np.zeros((6, 6))), np.arange(6))
    four = match(cost[:4, :4])
    assert price(four) == min(price(np.array(p)) for p in permutations(range(4)))
