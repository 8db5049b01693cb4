"""Distributions of latent codes: diagonal Gaussians and mixtures of them. All numbers are in nats."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Normal(NamedTuple):
    """Diagonal Gaussians: mean and log-std (..., latent)."""

    mean: Tensor
    log_std: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """z = mean + std · noise (the reparametrisation)."""
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """(...,) nats."""
        standard = (z - self.mean) * (-self.log_std).exp()
        return -(0.5 * standard.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def kl(self, other: Normal) -> Tensor:
        """(...,) D_KL(self ‖ other) in nats, closed form."""
        ratio = self.log_std - other.log_std
        distance = (self.mean - other.mean) * (-other.log_std).exp()
        return (0.5 * ((2 * ratio).exp() + distance.square() - 1) - ratio).sum(dim=-1)

    def expand(self, n: int) -> Normal:
        """(B, latent) -> (B, n, latent), every row n times."""
        return Normal(self.mean[:, None].expand(-1, n, -1), self.log_std[:, None].expand(-1, n, -1))


class Mixture(NamedTuple):
    """Mixtures of K diagonal Gaussians, one for each row."""

    log_weight: Tensor  # (B, K)
    components: Normal  # (B, K, latent)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B, n) nats of z (B, n, latent)."""
        each = Normal(*(part[:, None] for part in self.components)).log_prob(z[:, :, None])  # (B, n, K)
        return torch.logsumexp(self.log_weight[:, None] + each, dim=2)

    def kl_from(self, q: Normal) -> Tensor:
        """(B,) −log Σ_k π_k exp(−D_KL(q ‖ p_k)) ≥ D_KL(q ‖ self), in nats: equal for one component, and close where q
        is narrow beside the components (Hershey and Olsen 2007, "Approximating the Kullback Leibler divergence between
        Gaussian mixture models")."""
        return -torch.logsumexp(self.log_weight - q.expand(1).kl(self.components), dim=1)

    def at(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """(B, latent): the component that uniform (B, 1) falls into, at the noise (B, latent)."""
        chosen = (uniform > self.log_weight.exp().cumsum(dim=1)[:, :-1]).sum(dim=1)
        row = torch.arange(len(chosen), device=chosen.device)
        return Normal(self.components.mean[row, chosen], self.components.log_std[row, chosen]).at(noise)
