"""Equalization: the same function, less expected noise, and hands off what must not be scaled."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from resq_deploy import quantization
from resq_deploy.export import graph
from resq_deploy.export.calibrate import Probe
from resq_deploy.export.equalize import FLIP_POWER, Moments, equalize, groups, tensors
from tests.export import nets


def moments(model: onnx.ModelProto) -> dict[str, Moments]:
    names = tensors(groups(model))
    found = {name: Moments() for name in names}
    for _, values in Probe(model, names, 1).run(nets.images(24)):
        for name in names:
            found[name].add(values[name])
    return found


def values(model: onnx.ModelProto, tensor: str) -> NDArray[np.float32]:
    parts = [v[tensor] for _, v in Probe(model, [tensor], 1).run(nets.images(24))]
    return np.concatenate(parts)


def names(model: onnx.ModelProto) -> list[tuple[set[str], set[str]]]:
    return [({n.name for n in g.producers}, {n.name for n in g.consumers}) for g in groups(model)]


@pytest.mark.parametrize("ber", [1e-3, 1e-2])
@pytest.mark.parametrize("make", [nets.residual, nets.chain])
def test_the_function_stays_and_every_group_gains(make: object, ber: float) -> None:
    model: onnx.ModelProto = make()  # type: ignore[operator]
    made, record = equalize(model, moments(model), ber)
    before, after = values(model, "logits"), values(made, "logits")
    np.testing.assert_allclose(after, before, atol=1e-4 * np.abs(before).max())
    assert "fc" in {r["into"] for r in record}
    assert all(r["gain_db"] > 0.05 for r in record)
    assert not np.array_equal(nets.arrays(made)["fc.weight"], nets.arrays(model)["fc.weight"])
    graph.check(made)


def test_residual_branches_and_the_pool_behind_them_share_one_group() -> None:
    assert ({"conv2", "skip"}, {"fc"}) in names(nets.residual())
    assert ({"stem"}, {"conv1", "skip"}) in names(nets.residual())


def test_what_saturates_or_bends_ends_a_group() -> None:
    found = names(nets.chain())
    assert ({"conv1"}, {"deep"}) in found
    assert ({"conv2"}, {"fc"}) in found
    assert not any("deep" in made for made, _ in found)


def test_input_and_output_are_never_scaled() -> None:
    for model in (nets.residual(), nets.chain()):
        tied = set().union(*(g.tensors for g in groups(model)))
        assert not tied & {"input", "logits"}


@pytest.mark.parametrize("layer", ["conv1", "conv2", "fc"])
def test_the_noise_that_flips_make_falls(layer: str) -> None:
    model = nets.residual()
    made, _ = equalize(model, moments(model), 1e-2)
    assert noise_into(made, layer) / signal(made, layer) < noise_into(model, layer) / signal(
        model, layer
    )


def noise_into(model: onnx.ModelProto, layer: str) -> float:
    """BER sum 4^b sum s^2 sum E[x^2], from its definition, per tap."""
    node = next(n for n in model.graph.node if n.name == layer)
    x = values(model, node.input[0])
    power = np.square(x).mean(axis=(0, *range(2, x.ndim))).sum()
    scales = quantization.weight_scales(nets.arrays(model)[node.input[1]])
    return float(FLIP_POWER * 1e-2 * np.square(scales).sum() * power)


def signal(model: onnx.ModelProto, layer: str) -> float:
    """The layer's output power as the sum over inputs, as if they were independent."""
    node = next(n for n in model.graph.node if n.name == layer)
    x = values(model, node.input[0])
    power = np.square(x).mean(axis=(0, *range(2, x.ndim)))
    weight = nets.arrays(model)[node.input[1]]
    return float((np.square(weight.reshape(*weight.shape[:2], -1)).sum(axis=(0, 2)) * power).sum())


def test_the_power_of_a_flip_is_what_flips_do() -> None:
    codes = np.arange(-128, 128).astype(np.int8)
    masks = (2 ** np.arange(8)).astype(np.uint8)
    flipped = (codes.view(np.uint8)[:, None] ^ masks).view(np.int8)
    squares = np.square(flipped.astype(np.int64) - codes.astype(np.int64)[:, None])
    assert (squares.sum(axis=1) == FLIP_POWER).all()


def test_moments_are_those_of_all_batches_together() -> None:
    sample = np.random.default_rng(0).standard_normal((10, 3, 4, 4)).astype(np.float32)
    seen = Moments()
    seen.add(sample[:3])
    seen.add(sample[3:])
    np.testing.assert_allclose(seen.power(), np.square(sample).mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(seen.mean(), sample.mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_array_equal(seen.high, sample.max(axis=(0, 2, 3)))
    np.testing.assert_array_equal(seen.low, sample.min(axis=(0, 2, 3)))


def test_a_network_without_groups_comes_back_unchanged() -> None:
    node = helper.make_node("Gemm", ["input", "w"], ["logits"], transB=1)
    weight = numpy_helper.from_array(np.eye(4, dtype=np.float32), "w")
    ends = [
        helper.make_tensor_value_info(n, TensorProto.FLOAT, ["b", 4]) for n in ("input", "logits")
    ]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [weight]))
    made, record = equalize(model, {}, 1e-2)
    assert record == []
    assert nets.arrays(made)["w"].tobytes() == nets.arrays(model)["w"].tobytes()
