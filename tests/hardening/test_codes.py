"""The quantizer is the project's, flips are what they say, gradients pass straight through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resq_deploy import quantization
from resq_deploy.hardening import codes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2), nn.Flatten(), nn.LazyLinear(5)
    )


def built() -> nn.Sequential:
    made = network()
    made(torch.zeros(1, 3, 8, 8))
    return made


@given(
    shape=st.sampled_from([(4, 3, 3, 3), (5, 7), (1, 1), (6, 1, 3, 3)]),
    axis=st.integers(0, 1),
    seed=st.integers(0, 1000),
    size=st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 1e4]),
)
def test_codes_are_those_of_the_exporter(
    shape: tuple[int, ...], axis: int, seed: int, size: float
) -> None:
    weight = torch.randn(shape, generator=generator(seed)) * size
    found, scale = codes.quantized(weight, axis)
    scales = quantization.weight_scales(weight.numpy(), axis)
    assert np.array_equal(scale.reshape(-1).numpy(), scales)
    assert np.array_equal(found.numpy(), quantization.quantize(weight.numpy(), scales, axis))
    assert int(found.abs().max()) <= 127


def test_halves_round_to_even() -> None:
    found, _ = codes.quantized(torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5]]))
    assert found.tolist() == [[127, 0, 2, 2, 0, -2]]


@given(bits=st.integers(0, 5000), rate=st.floats(1e-5, 0.5), seed=st.integers(0, 100))
def test_addresses_are_ascending_distinct_and_inside(bits: int, rate: float, seed: int) -> None:
    places = codes.random_addresses(bits, rate, generator(seed))
    assert bool((places.diff() > 0).all())
    assert len(places) == 0 or (int(places[0]) >= 0 and int(places[-1]) < bits)
    assert torch.equal(places, codes.random_addresses(bits, rate, generator(seed)))


@pytest.mark.parametrize("rate", [1e-3, 1e-2, 0.3])
def test_every_bit_flips_with_the_rate(rate: float) -> None:
    bits, rounds = 64, 3000
    counts = torch.zeros(bits)
    for seed in range(rounds):
        counts[codes.random_addresses(bits, rate, generator(seed))] += 1
    spread = (rate * (1 - rate) / rounds) ** 0.5
    assert float((counts / rounds - rate).abs().max()) < 5 * spread
    assert float((counts / rounds).mean()) == pytest.approx(rate, abs=5 * spread / bits**0.5)


def test_flips_reach_every_bit_and_nothing_else() -> None:
    zeros = torch.zeros((50, 40), dtype=torch.int8)
    found = codes.flip(zeros, 0.01, generator())
    changed = np.unpackbits(found.numpy().view(np.uint8).reshape(-1, 1), axis=1)
    assert (changed.sum(0) > 0).all()
    assert changed.sum() == pytest.approx(2000 * 8 * 0.01, rel=0.3)
    assert not zeros.any()
    assert torch.equal(found, codes.flip(zeros, 0.01, generator()))
    assert torch.equal(codes.flip(zeros, 0.0, generator()), zeros)


def test_flipping_the_sign_bit_of_a_code_is_twos_complement() -> None:
    start = torch.tensor([5, -127, 0, 127], dtype=torch.int8)
    seen = {int(v) for s in range(400) for v in codes.flip(start, 0.05, generator(s))[:1]}
    assert {5 ^ (1 << bit) for bit in range(7)} | {5 - 128} <= seen


def test_a_tilt_moves_flips_between_channels() -> None:
    zeros = torch.zeros((2, 20_000), dtype=torch.int8)
    found = codes.flip(zeros, 0.01, generator(), torch.tensor([[0.5], [1.5]]))
    counts = np.unpackbits(found.numpy().view(np.uint8), axis=1).sum(1)
    assert counts[0] == pytest.approx(800, rel=0.15)
    assert counts[1] == pytest.approx(2400, rel=0.15)


def test_all_weight_matrices_are_found_with_their_axis() -> None:
    found = {name: axis for name, _, axis in codes.weights(built())}
    assert found == {"0.weight": 0, "2.weight": 1, "4.weight": 0}
    attention = {n: a for n, _, a in codes.weights(nn.MultiheadAttention(8, 2))}
    assert attention == {"in_proj_weight": 0, "out_proj.weight": 0}


def test_gradients_pass_straight_through() -> None:
    made = built()
    faulty = codes.faulty_weights(made, 0.05, generator())
    clean = codes.faulty_weights(made, 0.0, generator())
    assert any(not torch.equal(faulty[k], clean[k]) for k in faulty)
    torch.autograd.backward([value.sum() for value in faulty.values()])
    for name, weight, _ in codes.weights(made):
        assert weight.grad is not None, name
        assert torch.equal(weight.grad, torch.ones_like(weight))


def test_faulty_weights_are_codes_times_scale() -> None:
    made = built()
    value = codes.faulty_weights(made, 0.02, generator())["0.weight"]
    _, scale = codes.quantized(made.get_parameter("0.weight"))
    steps = (value / scale).detach()
    assert float((steps - steps.round()).abs().max()) < 1e-3
    assert float(steps.abs().max()) <= 128.001


@settings(max_examples=25)
@given(bound=st.floats(1.0, 4.0), seed=st.integers(0, 50))
def test_clipping_bounds_each_channel_by_its_own_size(bound: float, seed: int) -> None:
    torch.manual_seed(seed)
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4))
    weight = made.get_parameter("0.weight")
    before = weight.detach().clone()
    size = before.square().mean((1, 2, 3), keepdim=True).sqrt()
    for _ in range(40):
        codes.clip_weights(made, bound)
    after = weight.detach().clone()
    assert torch.allclose(after.square().mean((1, 2, 3), keepdim=True).sqrt(), size)
    assert bool((after.abs() <= 1.05 * bound * size).all())
    assert torch.equal(after.sign(), before.sign())
    codes.clip_weights(made, 0.0)
    assert torch.equal(weight, after)


def test_clipping_leaves_single_weights_alone() -> None:
    made = nn.Conv2d(4, 4, 1, groups=4)
    before = made.weight.detach().clone()
    codes.clip_weights(made, 0.5)
    assert torch.equal(made.weight, before)


def test_sensitivity_finds_the_channel_that_matters() -> None:
    made = nn.Linear(6, 3)
    sensitivity = codes.Sensitivity(made, strength=1.0)
    assert sensitivity.tilts(made) is None
    torch.autograd.backward((made(torch.ones(4, 6))[:, 1] ** 2).sum())
    sensitivity.update(made)
    tilts = sensitivity.tilts(made)
    assert tilts is not None
    values = tilts["weight"].reshape(-1)
    assert int(values.argmax()) == 1
    assert float(values.mean()) == pytest.approx(1.0)
    assert codes.Sensitivity(made, strength=0.0).tilts(made) is None
    other = codes.Sensitivity(made, strength=1.0)
    other.load_state_dict(sensitivity.state_dict())
    again = other.tilts(made)
    assert again is not None
    assert torch.equal(again["weight"], tilts["weight"])
