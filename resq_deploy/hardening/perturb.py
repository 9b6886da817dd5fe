"""Small changes of images, in pixels of [0, 1]: bit planes, noise, and steps along the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[[Tensor], Tensor]

_BIT_PLANES = 5


def uniform(images: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """Noise U(-eps, eps) on every pixel."""
    return (images + eps * noise_like(images, generator)).clamp(0, 1)


def bit_planes(images: Tensor, generator: torch.Generator, k: int = _BIT_PLANES) -> Tensor:
    """The k lowest of 8 bit planes replaced by their middle, after noise (BPFC: Addepalli et al.,
    CVPR 2020, eq. 1-3).

    t = x + n, n ~ U(-1, 1) * 2^min(k-2, 3), in 0..255; q = clamp(t - t mod 2^k + 2^(k-1), 0, 255).
    """
    noisy = 255 * images + 2 ** min(k - 2, 3) * noise_like(images, generator)
    coarse = noisy - noisy.remainder(2**k) + 2 ** (k - 1)
    planes: Tensor = coarse.clamp(0, 255) / 255
    return planes


def step_along(images: Tensor, gradient: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """One step of a random length up to 1.25 eps along the gradient's sign, from a random start,
    inside the eps ball.

    A single step of one fixed length invites catastrophic overfitting (Wong et al., ICLR 2020,
    2001.03994).
    """
    start = eps * noise_like(images, generator)
    length = 1.25 * eps * torch.rand((len(images), 1, 1, 1), generator=generator).to(images.device)
    return within(images, images + start + 2 * length * gradient.sign(), eps)


def ascend(
    loss: Loss, images: Tensor, eps: float, steps: int, generator: torch.Generator
) -> Tensor:
    """Projected gradient ascent of `loss` in the L-inf ball (Madry et al., ICLR 2018), from a
    random start.
    """
    moved = uniform(images, eps, generator)
    stride = min(eps, 2.5 * eps / steps)
    for _ in range(steps):
        moved = moved.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(loss(moved), moved)
        moved = within(images, moved.detach() + stride * gradient.sign(), eps)
    return moved.detach()


def within(images: Tensor, moved: Tensor, eps: float) -> Tensor:
    """The nearest images in the L-inf ball around `images` and in [0, 1]."""
    return torch.min(torch.max(moved, images - eps), images + eps).clamp(0, 1)


def noise_like(images: Tensor, generator: torch.Generator) -> Tensor:
    """U(-1, 1) of the images' shape, drawn on the CPU so that it is the same on every device."""
    return (2 * torch.rand(images.shape, generator=generator) - 1).to(images.device)
