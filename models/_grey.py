"""Grey pixels as units with 256 states: the exponential family of two statistics, whether not black, and the level.

    p(x_i) ∝ e^{u_i 1[x_i > 0] + θ_i x_i},   x_i = 0, 1/255, …, 1

The levels above black are a truncated geometric distribution, so that sums over them, means and quantiles are closed
forms. A field (B, 2D) holds u (B, D), then θ (B, D); statistics lie in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 255  # above black


def statistics(x: Tensor) -> Tensor:
    """(1[x > 0], x) for x (B, D) in [0, 1] -> (B, 2D)."""
    return torch.cat([(x > 0).to(x.dtype), x], dim=1)


def log_sum_levels(theta: Tensor) -> Tensor:
    """A(θ) = log Σ_{k=1}^{255} e^{θ k / 255}, a geometric series. Any shape."""
    t = theta / LEVELS
    s = t.abs().clamp(min=1e-12)
    return torch.where(t > 0, LEVELS * t, t) + torch.log(torch.expm1(-LEVELS * s) / torch.expm1(-s))


def mean_level(theta: Tensor) -> Tensor:
    """A'(θ), the mean of k / 255 over k = 1 … 255 with weights e^{θ k / 255}. Any shape."""
    t = theta / LEVELS
    s = t.abs().clamp(min=1e-4)
    steps = 1 / torch.expm1(s) - LEVELS / torch.expm1(LEVELS * s)  # mean distance from the likelier end
    near_zero = (LEVELS - 1) / 2 - t.abs() * ((LEVELS**2 - 1) / 12)  # where the difference cancels
    steps = torch.where(t.abs() < 1e-4, near_zero, steps)
    return torch.where(t > 0, LEVELS - steps, 1 + steps) / LEVELS


def log_partition(field: Tensor) -> Tensor:
    """(B,) log Σ_x e^{u · 1[x > 0] + θ · x} over all images x."""
    u, theta = field.chunk(2, dim=1)
    return torch.nn.functional.softplus(u + log_sum_levels(theta)).sum(dim=1)


def mean(field: Tensor) -> Tensor:
    """E x (B, D) in [0, 1]."""
    u, theta = field.chunk(2, dim=1)
    return torch.sigmoid(u + log_sum_levels(theta)) * mean_level(theta)


def draw(field: Tensor, uniforms: Tensor) -> Tensor:
    """Levels k (B, D) in 0 … 255: exact, by inverting the distribution function at uniforms (B, D) on (0, 1)."""
    u, theta = field.chunk(2, dim=1)
    p = torch.sigmoid(u + log_sum_levels(theta))
    s = (theta / LEVELS).abs().clamp(min=1e-12)
    steps = torch.log1p(uniforms / p * torch.expm1(-LEVELS * s)) / -s
    steps = steps.floor().clamp(0, LEVELS - 1)  # out of range, or nan, only where the pixel is black
    return torch.where(uniforms < p, torch.where(theta > 0, LEVELS - steps, 1 + steps), 0.0)


def fit(on: Tensor, level: Tensor) -> Tensor:
    """The field (2D,) of independent pixels that are not black with probability `on` (D,), then of mean `level` (D,),
    both within (0, 1)."""
    low, high = torch.full_like(level, -1e5), torch.full_like(level, 1e5)
    for _ in range(100):  # bisection: the mean level rises with θ
        middle = (low + high) / 2
        below = mean_level(middle) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.cat([torch.logit(on) - log_sum_levels(middle), middle])
