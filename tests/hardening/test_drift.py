"""BatchNorm's frozen statistics and the weights behind them: what the drift measures, and what it holds."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from resq_deploy.hardening.losses import statistics_drift
from resq_deploy.hardening.model import NormInputs, frozen_statistics


def norm(mean: float, var: float) -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3)
    nn.init.constant_(layer.running_mean, mean)  # type: ignore[arg-type]
    nn.init.constant_(layer.running_var, var)  # type: ignore[arg-type]
    return layer


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (0.0, 3.0), (-1.0, 0.2)])
def test_it_is_the_divergence_of_two_normal_distributions(mean: float, std: float) -> None:
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * std + mean
    got = statistics_drift([(norm(0.2, 1.5), x)])
    seen = torch.distributions.Normal(mean, std)
    want = torch.distributions.kl_divergence(seen, torch.distributions.Normal(0.2, 1.5**0.5))
    assert float(got) == pytest.approx(float(want), rel=0.05, abs=0.01)


def test_no_batchnorm_no_drift() -> None:
    assert float(statistics_drift([])) == 0.0


def test_inputs_are_caught_where_asked_for_and_nowhere_else() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 3, 3), norm(0, 1), nn.ReLU(), nn.Conv2d(3, 3, 1), norm(0, 1)
    )
    watch = NormInputs(network)
    x = torch.randn(4, 1, 8, 8)
    with watch.caught() as read, frozen_statistics(network):
        network(x)
    network(x)
    assert [layer for layer, _ in read] == [network[1], network[4]]
    assert torch.equal(read[0][1], network[0](x))
    watch.close()
    with watch.caught() as read:
        network(x)
    assert not read


def test_weights_that_grow_are_pulled_back() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 3, 3, bias=False)
    network = nn.Sequential(conv, norm(0, 1))
    x = torch.randn(32, 1, 8, 8)
    with torch.no_grad():
        conv.weight.mul_(20)
    watch = NormInputs(network)
    optimizer = torch.optim.Adam(conv.parameters(), lr=0.1)
    drifts = []
    for _ in range(200):
        with frozen_statistics(network), watch.caught() as read:
            out = network(x)
        drift = statistics_drift(read)
        optimizer.zero_grad()
        # the task likes large outputs
        torch.autograd.backward(drift - 1e-3 * functional.softplus(out).mean())
        optimizer.step()
        drifts.append(float(drift.detach()))
    assert drifts[-1] < 0.2 < drifts[0]
