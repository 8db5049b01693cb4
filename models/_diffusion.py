"""What Gaussian diffusion models share: how noise rises with time, what a network may predict, a sampler's timesteps.

    x_t = α_t x₀ + σ_t ε        α_t = √ᾱ_t,  σ_t = √(1 − ᾱ_t)  for t = 0 … T

Pixels, latent codes or anything else of shape (B, C, H, W).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from models import _solvers

SOLVERS = ("ddim", "ancestral", "dpm-solver++")
PREDICTIONS = ("epsilon", "x0", "v")
SCHEDULES = ("cosine", "linear")
MAX_BETA = 0.999  # of the cosine schedule (2102.09672, §3.2)
OFFSET = 0.008  # the cosine schedule's s


def signal_and_noise(schedule: str, timesteps: int) -> tuple[Tensor, Tensor]:
    """(alpha, sigma), each (T + 1,) float64, for t = 0 (the image) … T (noise)."""
    t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    if schedule == "cosine":
        level = torch.cos((t + OFFSET) / (1 + OFFSET) * math.pi / 2).square()
        beta = (1 - level[1:] / level[:-1]).clamp(max=MAX_BETA)
    else:  # the paper's 1e-4 … 0.02 for T = 1000, and as much noise for another T
        beta = (torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64) * 1000 / timesteps).clamp(max=MAX_BETA)
    alpha_bar = F.pad((1 - beta).cumprod(dim=0), (1, 0), value=1.0)
    return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()


def cosine_time(ratio: Tensor) -> Tensor:
    """t / T where the cosine schedule has σ_t / α_t = ratio: of any shape, 0 … 1. Closed form, without `MAX_BETA`."""
    first = math.cos(OFFSET / (1 + OFFSET) * math.pi / 2)
    return torch.acos(first * (1 + ratio.square()).rsqrt()) * ((1 + OFFSET) * 2 / math.pi) - OFFSET


def x0_from(prediction: str, out: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x̂₀ from what the network gave out at x = α x₀ + σ ε; `prediction` is one of `PREDICTIONS`."""
    if prediction == "epsilon":
        return (x - sigma * out) / alpha
    if prediction == "v":
        return alpha * x - sigma * out
    return out


def target(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What the network is to give out at x = α x₀ + σ ε."""
    if prediction == "epsilon":
        return noise
    if prediction == "v":
        return alpha * noise - sigma * x0
    return x0


def solver_table(solver: str, steps: int, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`models._solvers`' table of one of `SOLVERS`. alpha, sigma (T + 1,) float64; the network is told t / T.

    Timesteps lie evenly from T down to 0, both included ("trailing", 2305.08891, §3.3): however few steps there are,
    the first must begin at pure noise. Raises `ValueError` for an unknown solver.
    """
    timesteps = len(alpha) - 1
    t = (torch.arange(steps, -1, -1, dtype=torch.float64) * timesteps / steps).round().long()
    path = _solvers.Path(t.double() / timesteps, alpha[t], sigma[t])
    if solver == "ddim":
        return _solvers.ddim(path)
    if solver == "ancestral":
        return _solvers.ddim(path, eta=1.0)
    if solver == "dpm-solver++":
        return _solvers.dpm_solver(path)
    raise ValueError(f"solver: {solver!r}; there are {', '.join(SOLVERS)}")


def stratified(n: int, device: torch.device) -> Tensor:
    """(n,) in [0, 1), one in each n-th of it: a batch of times that covers all of them evenly (2107.00630, §I.1)."""
    times = (torch.arange(n, device=device) + torch.rand(n, device=device)) / n
    return times.clamp(max=1 - 2**-24)  # a last one just below 1 was rounded to it


def detailed(x: Tensor, periods: Sequence[float]) -> Tensor:
    """x (B, C, H, W) with sines and cosines of it as further channels, C (1 + 2 · len(periods)) in all, float32: they
    show a network the grey levels finely (2107.00630, §C). periods: in grey levels, where 255 of them make −1 … 1."""
    with torch.autocast(x.device.type, enabled=False):
        turns = [(x + 1) * (255 * math.pi / period) for period in periods]
        return torch.cat([x, *(f(angle) for angle in turns for f in (torch.sin, torch.cos))], dim=1)


def column(values: Tensor) -> Tensor:
    """(B,) -> (B, 1, 1, 1)"""
    return values[:, None, None, None]
