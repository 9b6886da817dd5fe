"""Perturbations stay in their ball and in [0, 1], and do what they are for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from resq_deploy.hardening import perturb
from resq_deploy.hardening.losses import feature_distance, lipschitz_penalty, mixed, one_hot
from resq_deploy.hardening.sampling import augmented

EPS = 8 / 255


def images(seed: int = 0, count: int = 4) -> Tensor:
    return torch.rand((count, 1, 6, 6), generator=torch.Generator().manual_seed(seed))


@given(seed=st.integers(0, 500), eps=st.floats(1e-3, 0.5))
def test_all_kinds_stay_in_their_ball(seed: int, eps: float) -> None:
    x, g = images(seed), torch.Generator().manual_seed(seed)
    weights = torch.randn(x.shape, generator=g)
    for moved in (
        perturb.uniform(x, eps, g),
        perturb.step_along(x, weights, eps, g),
        perturb.ascend(lambda z: (z * weights).sum(), x, eps, 3, g),
    ):
        assert float((moved - x).abs().max()) <= eps + 1e-6
        assert 0 <= float(moved.min()) <= float(moved.max()) <= 1


def test_ascent_reaches_the_corner_of_a_linear_loss() -> None:
    x, g = 0.2 + 0.6 * images(), torch.Generator().manual_seed(0)
    weights = torch.randn(x.shape, generator=g)
    moved = perturb.ascend(lambda z: (z * weights).sum(), x, EPS, 4, g)
    assert torch.allclose(moved, x + EPS * weights.sign(), atol=1e-6)
    single = perturb.step_along(x, weights, EPS, g)
    assert float(((single - x) * weights).sum()) > 0


def test_bit_planes_leave_the_middles_of_eight_levels() -> None:
    g = torch.Generator().manual_seed(0)
    levels = (perturb.bit_planes(images(), g) * 255).round()
    assert set(levels.flatten().tolist()) <= {16.0 + 32 * k for k in range(8)} | {0.0, 255.0}
    gap = perturb.bit_planes(images(), g) - images()
    assert float(gap.abs().max()) <= (16 + 8) / 255 + 1e-6


def test_the_same_generator_gives_the_same_noise() -> None:
    first, second = (
        perturb.uniform(images(), EPS, torch.Generator().manual_seed(5)) for _ in range(2)
    )
    assert torch.equal(first, second)


@given(scale=st.floats(0.01, 100))
def test_feature_distance_is_free_of_scale(scale: float) -> None:
    a, b = images(1), images(2)
    assert float(feature_distance([a], [a])) == 0
    same = feature_distance([scale * a], [scale * b])
    assert float(same) == pytest.approx(float(feature_distance([a], [b])), rel=1e-3)


def test_no_gradient_flows_into_targets() -> None:
    a, b = images(1).requires_grad_(), images(2).requires_grad_()
    torch.autograd.backward(feature_distance([a, a * 2], [b, b]))
    assert a.grad is not None
    assert b.grad is None


def test_orthogonal_layers_cost_nothing() -> None:
    layer, conv = nn.Linear(6, 4), nn.Conv2d(2, 3, 3)
    nn.init.orthogonal_(layer.weight)
    nn.init.orthogonal_(conv.weight)
    both = nn.Sequential(layer, conv)
    assert lipschitz_penalty(both).item() < 1e-9
    layer.weight.data *= 2
    assert lipschitz_penalty(layer).item() == pytest.approx(4 * 9.0)
    assert float(lipschitz_penalty(nn.ReLU())) == 0


def test_mixup_blends_images_and_targets_alike() -> None:
    x = torch.arange(4.0).view(4, 1, 1, 1)
    y = torch.eye(4)
    for seed in range(20):
        blend, targets = mixed(x, y, 1.0, torch.Generator().manual_seed(seed))
        assert torch.allclose(targets.sum(1), torch.ones(4))
        assert torch.allclose(targets @ torch.arange(4.0), blend.view(4), atol=1e-5)


def test_smoothed_labels_are_probabilities() -> None:
    y = one_hot(torch.tensor([2, 0]), 4, 0.2)
    assert torch.allclose(y[0], torch.tensor([0.05, 0.05, 0.85, 0.05]))


def test_augmentation_moves_but_never_invents() -> None:
    x = images(3, 16).clamp_min(0.1)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(augmented(x, "none", generator), x)
    flipped = augmented(x, "flip", generator)
    kinds = {
        (torch.equal(a, b), torch.equal(a, b.flip(2))) for a, b in zip(flipped, x, strict=True)
    }
    assert kinds == {(True, False), (False, True)}
    shifted = augmented(x, "shift", generator)
    assert shifted.shape == x.shape
    assert not torch.equal(shifted, x)
    for moved, whole in zip(shifted, x, strict=True):
        kept = moved[moved != 0]
        assert set(kept.tolist()) <= set(whole.flatten().tolist())
        assert len(kept) >= 25
