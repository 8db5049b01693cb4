"""A learnt distribution of latent codes, given what an image is to show: a flow of affine couplings (RealNVP, arXiv
1605.08803, §3.2), conditional as in 1907.02392, §3.1.

    variable    meaning
    z           (B, latent) codes
    epsilon     (B, latent) standard normal
    told        (B, ·) what is known of the image
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

BOUND = 2.0  # of the logarithm of a coupling's scale


class Coupling(nn.Module):
    """Scales and shifts one half of the numbers by what the other half and `told` say; every second one, the other way
    round. Volume is kept where its network says nothing, as at first."""

    def __init__(self, latent: int, told: int, width: int, odd: bool) -> None:
        super().__init__()
        self.odd, self.kept = odd, (latent + (not odd)) // 2
        changed = latent - self.kept
        self.layers = nn.Sequential(
            nn.Linear(self.kept + told, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 2 * changed),
        )
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def parts(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Those that stay as they are, and those that are changed."""
        first, second = z[:, ::2], z[:, 1::2]
        return (second, first) if self.odd else (first, second)

    def whole(self, kept: Tensor, changed: Tensor) -> Tensor:
        first, second = (changed, kept) if self.odd else (kept, changed)
        z = torch.empty(len(kept), first.shape[1] + second.shape[1], dtype=kept.dtype, device=kept.device)
        z[:, ::2], z[:, 1::2] = first, second
        return z

    def scale(self, kept: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Log scale and shift."""
        log_scale, shift = self.layers(torch.cat([kept, told], dim=1)).float().chunk(2, dim=1)
        return BOUND * torch.tanh(log_scale / BOUND), shift


class CodePrior(nn.Module):
    """p(z | told)."""

    def __init__(self, latent: int, told: int, width: int = 128, couplings: int = 8) -> None:
        super().__init__()
        layers = nn.ModuleList(Coupling(latent, told, width, odd=k % 2 == 1) for k in range(couplings))
        self.couplings: Sequence[Coupling] = layers  # type: ignore[assignment]

    def forward(self, epsilon: Tensor, told: Tensor) -> Tensor:
        """The code that a standard normal epsilon stands for."""
        z = epsilon
        for coupling in self.couplings:
            kept, changed = coupling.parts(z)
            log_scale, shift = coupling.scale(kept, told)
            z = coupling.whole(kept, changed * log_scale.exp() + shift)
        return z

    def log_prob(self, z: Tensor, told: Tensor) -> Tensor:
        """(B,) nats."""
        log_det = torch.zeros(len(z), device=z.device)
        for coupling in reversed(self.couplings):
            kept, changed = coupling.parts(z)
            log_scale, shift = coupling.scale(kept, told)
            z = coupling.whole(kept, (changed - shift) * (-log_scale).exp())
            log_det = log_det - log_scale.sum(dim=1)
        return log_det - 0.5 * (z.square() + math.log(2 * math.pi)).sum(dim=1)
