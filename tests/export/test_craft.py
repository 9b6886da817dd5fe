"""White-box attacks on small torch modules: budgets, strength, determinism, refusals."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resq_deploy.budget import WHITE_BOX, Norm
from resq_deploy.bundle import Sample
from resq_deploy.errors import AttackError
from resq_deploy.export.craft import _checkpoints, craft, cross_entropy, margin, targeted_dlr

EPS = {"linf": 0.1, "l2": 0.5}
FAST: dict[str, dict[str, Any]] = {
    "fgsm": {},
    "pgd": {"steps": 8},
    "apgd": {"steps": 20},
    "apgd-t": {"steps": 20},
}


class Linear(nn.Module):
    """Logits that are linear in the pixels, so that the best attack is known."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1) - 0.5) @ self.weight.t()


class Curved(Linear):
    """Two layers with a ReLU: gradients change along the way."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.second = nn.Parameter(torch.randn(5, 32, generator=generator))
        self.first = nn.Parameter(torch.randn(32, 16, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu((x.flatten(1) - 0.5) @ self.first.t()) @ self.second.t()


def sample_of(network: nn.Module, count: int = 40) -> Sample:
    images = np.random.default_rng(0).uniform(0.2, 0.8, (count, 1, 4, 4)).astype(np.float32)
    return Sample(images, predict(network, images), np.arange(count))


def predict(network: nn.Module, images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        found: np.ndarray[Any, Any] = network(torch.from_numpy(images)).argmax(1).numpy()
    return found


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", WHITE_BOX)
def test_attacks_fool_within_the_budget_and_repeat(attack: str, norm: Norm) -> None:
    network = Curved()
    sample = sample_of(network)
    made = craft(network, sample, attack, EPS[norm], norm=norm, batch=16, **FAST[attack])
    assert made.dtype == np.float32
    assert made.min() >= 0
    assert made.max() <= 1
    delta = (made.astype(np.float64) - sample.images).reshape(len(made), -1)
    length = np.abs(delta).max(1) if norm == "linf" else np.sqrt((delta**2).sum(1))
    assert length.max() <= EPS[norm] + 1e-6
    assert (predict(network, made) == sample.labels).mean() < 0.7
    again = craft(network, sample, attack, EPS[norm], norm=norm, batch=16, **FAST[attack])
    assert np.array_equal(made, again)
    if attack in ("pgd", "apgd"):
        other = craft(network, sample, attack, EPS[norm], norm=norm, seed=1, **FAST[attack])
        assert not np.array_equal(made, other)


def test_pgd_finds_the_best_point_of_a_linear_network_with_two_classes() -> None:
    network = Linear(classes=2)
    sample = sample_of(network)
    made = craft(network, sample, "pgd", 0.1, steps=10)
    weight = network.weight.detach().numpy()
    sign = np.where(sample.labels == 0, 1, -1)[:, None, None, None]
    best = np.sign((weight[1] - weight[0]).reshape(1, 1, 4, 4))
    np.testing.assert_allclose(made, np.clip(sample.images + 0.1 * sign * best, 0, 1), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stronger_attacks_are_not_weaker(norm: Norm) -> None:
    network = Curved()
    sample = sample_of(network, 200)
    left = {
        name: (
            predict(network, craft(network, sample, name, 0.6 * EPS[norm], norm=norm, **FAST[name]))
            == sample.labels
        ).mean()
        for name in WHITE_BOX
    }
    assert left["pgd"] <= left["fgsm"]
    assert min(left["apgd"], left["apgd-t"]) <= left["pgd"] + 0.005
    assert 0 < left["pgd"] < 1


def test_restarts_help_and_leave_fooled_images_alone() -> None:
    network = Curved()
    sample = sample_of(network, 100)
    once = craft(network, sample, "pgd", 0.04, steps=2)
    often = craft(network, sample, "pgd", 0.04, steps=2, restarts=8)
    fooled = predict(network, once) != sample.labels
    assert np.array_equal(often[fooled], once[fooled])
    assert (predict(network, often) == sample.labels).sum() <= (~fooled).sum()


def test_the_best_iterate_is_kept() -> None:
    """A step far too large jumps over the maximum; the start was better than the end."""
    network = Linear(classes=2)
    sample = sample_of(network)
    made = craft(network, sample, "fgsm", 0.1)
    with torch.no_grad():
        before = margin(network(torch.from_numpy(sample.images)), torch.from_numpy(sample.labels))
        after = margin(network(torch.from_numpy(made)), torch.from_numpy(sample.labels))
    assert bool((after >= before).all())


@pytest.mark.parametrize(
    ("attack", "eps", "params", "message"),
    [
        ("pgdd", 0.1, {}, "unknown attack"),
        ("square", 0.1, {}, "needs no gradients"),
        ("pgd", 0, {}, "an eps of 0"),
        ("pgd", "9/8", {}, "an eps of 1.125"),
        ("pgd", 0.1, {"stepz": 3}, "no such parameter"),
        ("pgd", 0.1, {"steps": 0}, "at least one step"),
        ("pgd", 0.1, {"step_size": -1.0}, "a step size of -1"),
    ],
)
def test_bad_requests_are_refused(
    attack: str, eps: float | str, params: dict[str, Any], message: str
) -> None:
    with pytest.raises(AttackError, match=message):
        craft(Linear(), sample_of(Linear()), attack, eps, **params)


def test_margin_counts_what_is_not_a_number_as_fooled() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 1.0, 3.0], [torch.nan, 0.0, 0.0]])
    assert margin(logits, torch.tensor([0, 0, 1])).tolist() == [-1.0, 3.0, torch.inf]


def test_targeted_dlr_ignores_shift_and_scale() -> None:
    logits = torch.tensor([[4.0, 3.0, 1.0, 0.5, 0.0]])
    loss = targeted_dlr(torch.tensor([2]))
    wanted = (1.0 - 4.0) / (4.0 - (1.0 + 0.5) / 2)
    label = torch.tensor([0])
    for moved in (logits, logits * 100, logits + 7):
        assert float(loss(moved, label)) == pytest.approx(wanted)
    few = targeted_dlr(torch.tensor([1]))(torch.tensor([[2.0, 1.5, 0.0]]), label)
    assert float(few) == pytest.approx(-0.5)
    assert cross_entropy(logits, label).shape == (1,)


def test_checkpoints_are_those_of_the_paper() -> None:
    """p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99 of the steps (2003.01690, section 3.1)."""
    assert sorted(c for c in _checkpoints(100) if c <= 100) == [22, 41, 57, 70, 80, 87, 93, 99]


def test_a_network_of_not_a_number_is_survived() -> None:
    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :5] * torch.nan

    sample = sample_of(Linear())
    for name in WHITE_BOX:
        made = craft(Broken(), sample, name, 0.1, **FAST[name])
        assert np.isfinite(made).all()
