"""What training minimizes beside the cross entropy."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_TINY = 1e-6


def feature_distance(features: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared distance of features relative to the size of their targets, averaged over layers and
    examples.

    mean_l mean_b ||f_l - t_l||^2 / (mean_b ||t_l||^2): BPFC's consistency (eq. 4) made free of
    scale, so that one weight fits every layer and a network gains nothing by shrinking its logits.
    No gradient flows into the targets.
    """
    parts = []
    for feature, target in zip(features, targets, strict=True):
        wanted = target.detach().float().flatten(1)
        gap = (feature.float().flatten(1) - wanted).square().sum(1).mean()
        parts.append(gap / (wanted.square().sum(1).mean() + _TINY))
    return torch.stack(parts).mean()


def statistics_drift(inputs: Sequence[tuple[nn.Module, Tensor]]) -> Tensor:
    """How far BatchNorms' running statistics are from what they read: the mean over layers and channels of

        KL(N(m, v) || N(m_r, v_r)) = (v / v_r + (m - m_r)^2 / v_r - 1 - ln(v / v_r)) / 2

    m, v of the batch, m_r, v_r running (Gaussian KL divergence; nats). 0 without a BatchNorm.
    """
    terms = []
    for norm, value in inputs:
        x = value.float().transpose(0, 1).flatten(1)
        running = norm.running_var.float() + _TINY  # type: ignore[operator]
        ratio = (x.var(1, unbiased=False) + _TINY) / running
        shift = (x.mean(1) - norm.running_mean.float()).square() / running  # type: ignore[operator]
        terms.append((ratio + shift - 1 - ratio.log()).mean() / 2)
    return torch.stack(terms).mean() if terms else torch.zeros(())


def lipschitz_penalty(network: nn.Module) -> Tensor:
    """Sum over layers of ||W^T W - I||_F^2 (Defensive Quantization: Lin et al., ICLR 2019,
    1904.08444, eq. 7).

    A convolution [O, I, kh, kw] is the matrix [O, I kh kw]; the smaller of the two Gram matrices
    is taken.
    """
    terms = []
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            matrix = module.weight.float().flatten(1)
            gram = matrix @ matrix.T if len(matrix) <= matrix.shape[1] else matrix.T @ matrix
            terms.append((gram - torch.eye(len(gram), device=gram.device)).square().sum())
    return torch.stack(terms).sum() if terms else torch.zeros(())


def mixed(
    images: Tensor, targets: Tensor, alpha: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mixup (Zhang et al., ICLR 2018, 1710.09412): one Beta(alpha, alpha) share of another example
    of the batch.

    `targets` are class probabilities [B, classes].
    """
    first, second = (
        torch._standard_gamma(torch.tensor([alpha]), generator=generator) for _ in range(2)
    )
    share = float(first / (first + second).clamp_min(_TINY))
    other = torch.randperm(len(images), generator=generator).to(images.device)
    blend = images.lerp(images[other], 1 - share)
    return blend, targets.lerp(targets[other], 1 - share)


def one_hot(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Class probabilities float32 [B, classes] with label smoothing."""
    hard = functional.one_hot(labels, classes).float()
    return hard * (1 - smoothing) + smoothing / classes
