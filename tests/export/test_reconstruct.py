"""Reconstructed weights: the statistics of what layers read, descent on the grid, and what the scales become."""

from __future__ import annotations

from itertools import product

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch.nn import functional as F

from resq_deploy import quantization
from resq_deploy.export import moments as statistics
from resq_deploy.export import reconstruct, rules
from resq_deploy.export.calibrate import Range, calibrate
from resq_deploy.export.dialect import ONNXRUNTIME, Dialect
from resq_deploy.export.moments import Layer, Window, layers, patches, second_moments
from resq_deploy.export.reconstruct import Room, descend, squared_error
from resq_deploy.saturation import Pairs, could, neighbours
from tests.export import nets

IMAGES = nets.images(48)


def problem(channels: int, inputs: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, inputs, generator=generator) @ torch.randn(
        inputs, inputs, generator=generator
    )
    return torch.randn(1, channels, inputs, generator=generator), (x.T @ x / 200)[None]


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("stride", [1, 2])
def test_patches_times_weights_are_the_convolution(groups: int, stride: int) -> None:
    weights = np.random.default_rng(0).normal(size=(8, 8 // groups, 3, 2)).astype(np.float32)
    window = Window((3, 2), (1, 0, 0, 1), (stride, stride), (1, 1))
    layer = Layer("w", "x", 0, groups, 8 // groups * 6, window)
    x = torch.randn(2, 8, 5, 6, generator=torch.Generator().manual_seed(1))
    columns = patches(layer, x, 10**6, torch.Generator().manual_seed(2))
    made = columns @ torch.from_numpy(layer.rows(weights)).transpose(1, 2)
    padded = F.pad(x, (0, 1, 1, 0))
    want = F.conv2d(padded, torch.from_numpy(weights), stride=stride, groups=groups)
    energy = want.square().sum((0, 2, 3))  # patches come in any order
    assert torch.allclose(made.square().sum(1).reshape(-1), energy, rtol=1e-4)


def test_rows_and_weights_are_inverse() -> None:
    codes = np.arange(24, dtype=np.int8).reshape(4, 6)
    for axis in (0, 1):
        layer = Layer("w", "x", axis, 1, 24 // codes.shape[axis], None)
        rows = layer.rows(codes.astype(np.float32))
        assert rows.shape == (1, codes.shape[axis], layer.inputs)
        assert np.array_equal(layer.weights(rows.astype(np.int8), codes.shape), codes)


def test_passes_change_no_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    fp32 = nets.residual()
    found = layers(fp32, rules.plan(fp32))
    assert len(found) == len(rules.plan(fp32).weights)
    at_once = dict(second_moments(fp32, found, {}, IMAGES, threads=1))
    monkeypatch.setattr(statistics, "_PASS_BYTES", 1)
    monkeypatch.setattr(statistics, "_ROWS", 10**7)  # every patch: nothing is drawn
    one_by_one = dict(second_moments(fp32, found, {}, IMAGES, threads=1))
    for layer, matrix in one_by_one.items():
        assert matrix.shape == (layer.groups, layer.inputs, layer.inputs)
        assert torch.allclose(matrix, at_once[layer], rtol=0.2, atol=0.05)


def test_descent_never_loses_to_rounding_and_finds_small_optima() -> None:
    weights, matrix = problem(channels=3, inputs=4)
    scales = weights.abs().amax(2) / 2  # codes of -2..2: few enough to try them all
    codes = descend(weights, matrix, scales, sweeps=20)
    nearest = (weights / scales[..., None]).round()
    found = squared_error(weights, matrix, scales, codes)
    assert (found <= squared_error(weights, matrix, scales, nearest) + 1e-5).all()
    grid = torch.tensor(list(product(range(-3, 4), repeat=4)), dtype=torch.float32)
    for channel in range(3):
        scale = scales[:, channel : channel + 1]
        rows = weights[:, channel : channel + 1].expand(1, len(grid), 4)
        best = squared_error(rows, matrix, scale.expand(1, len(grid)), grid[None]).min()
        assert float(found[0, channel]) <= 3 * float(best) + 1e-6


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, matrix = problem(channels=5, inputs=40)
    scales = weights.abs().amax(2) / 90
    whole = descend(weights, matrix, scales, sweeps=2)
    monkeypatch.setattr(reconstruct, "_BLOCK", 7)
    parts = descend(weights, matrix, scales, sweeps=2)
    assert (whole != parts).float().mean() < 0.02  # sums in another order
    assert whole.abs().max() <= quantization.QMAX


def test_cut_weights_are_made_up_for() -> None:
    weights, matrix = problem(channels=6, inputs=30)
    scales = 0.6 * weights.abs().amax(2) / quantization.QMAX
    codes = descend(weights, matrix, scales, sweeps=4)
    cut = (weights / scales[..., None]).round().clamp(-127, 127)
    before = squared_error(weights, matrix, scales, cut)
    assert (squared_error(weights, matrix, scales, codes) < 0.5 * before).all()


def test_pairs_fit_and_make_up_for_what_that_costs() -> None:
    weights, matrix = problem(channels=6, inputs=30)
    scales = weights.abs().amax(2) / quantization.QMAX
    pairs = Pairs(0, (neighbours(np.arange(30)[::-1]),))
    room = Room(pairs)
    nearest = room.fit((weights / scales[..., None]).round())
    codes = descend(weights, matrix, scales, sweeps=4, room=room)
    for found in (nearest, codes):
        assert pairs.fits(found[0].numpy())
    assert (
        squared_error(weights, matrix, scales, codes)
        < 0.7 * squared_error(weights, matrix, scales, nearest)
    ).all()
    assert not pairs.fits(descend(weights, matrix, scales, sweeps=4)[0].numpy())


def test_a_dialect_whose_pairs_must_fit_gets_wider_scales() -> None:
    fp32, images = nets.residual(), nets.images(48)
    ranges = calibrate(fp32, ONNXRUNTIME.plan(fp32).activations, [images], unsigned=True, threads=1)
    factors = {}
    for fix in (False, True):
        dialect = Dialect("onnxruntime", overflow_fix=fix)
        model, factors[fix] = reconstruct.reconstruct(
            fp32, ranges, images, 1e-4, dialect=dialect, threads=1
        )
        assert could(model) != fix
    assert max(factors[False].values()) <= 1
    assert np.mean([*factors[True].values()]) > np.mean([*factors[False].values()])


def graph_and_ranges() -> tuple[onnx.ModelProto, dict[str, Range]]:
    fp32 = nets.residual()
    return fp32, calibrate(fp32, rules.plan(fp32).activations, [IMAGES], threads=1)


def test_scales_fall_with_the_design_ber() -> None:
    fp32, ranges = graph_and_ranges()
    mean = []
    for ber in (1e-6, 1e-3, 1e-1):
        model, shrunk = reconstruct.reconstruct(fp32, ranges, IMAGES, ber, threads=1)
        onnx.checker.check_model(model, full_check=True)
        mean.append(float(np.mean(list(shrunk.values()))))
    assert mean[0] > mean[1] > mean[2] >= min(reconstruct.FACTORS)
    assert mean[0] > 0.95


def test_the_same_bytes_twice_and_half_scales_that_float16_holds() -> None:
    fp32, ranges = graph_and_ranges()
    once, twice = (
        reconstruct.reconstruct(fp32, ranges, IMAGES, 1e-2, dialect=Dialect(half=True), threads=1)[
            0
        ]
        for _ in range(2)
    )
    assert once.SerializeToString() == twice.SerializeToString()
    for tensor in once.graph.initializer:
        if tensor.name.endswith(".scale"):
            scale = numpy_helper.to_array(tensor)
            assert np.array_equal(scale, scale.astype(np.float16).astype(np.float32))
