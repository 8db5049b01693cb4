"""Flow matching (Lipman, Chen, Ben-Hamu, Nickel and Le, arXiv 2210.02747) along the optimal-transport path,
class-conditional.

A network learns the velocity that carries noise x₀ ~ N(0, 1) at t = 0 to an image x₁ in [−1, 1] at t = 1, straight:

    x_t = t x₁ + σ_t x₀,    σ_t = 1 − (1 − σ_min) t                              (eq. 20 and 22)
    L = E ‖v_θ(x_t, t) − (x₁ − (1 − σ_min) x₀)‖²                                 (eq. 23)

What differs from the paper: a part of the times is drawn so that the low noise, on which the likelihood depends, is
met often enough; labels with classifier-free guidance (2207.12598); the noises of a batch may be paired with the images
of least squared distance (mini-batch optimal transport, 2302.00482, §3.2), within each class, so that the noise still
says nothing about the label; steps begin evenly in s, where σ_t = (1 − s (1 − σ_min^⅓))³, which gives low noise its
share of them; images are dequantised by the path's own last noise, cut off at the bins
(`models._continuous_flow`).

    variable    paper
    noise       x₀              image   x₁
    sigma       σ_t             least   σ_min
    velocity    v_θ             s       1 − σ_t^⅓, scaled to 0 … 1; the network is told it instead of t
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from models import _continuous_flow
from models._assignment import least_cost_pairs
from models._continuous_flow import HALF_BIN, LAST_NOISE, Flow, views
from models._diffusion import column, stratified
from models._nn import guided
from models._protocol import Batch, ImageSpace

COUPLINGS = ("independent", "optimal transport")
SOLVERS = ("midpoint", "euler", "heun", "rk4", "bogacki-shampine")
MAX_STEPS = 250


@dataclass(frozen=True)
class Config(_continuous_flow.Config):
    """The path and the objective, and what `_continuous_flow.Config` has."""

    sigma_min: float = LAST_NOISE  # the noise that is left at t = 1
    coupling: str = "independent"  # or "optimal transport"


class Model(Flow):
    """The path and the objective; network, samplers and likelihood are `Flow`'s."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        _validate(config)
        super().__init__(
            "flow_matching",
            config,
            space,
            start=1.0,
            end=(1.0, config.sigma_min),
            solvers=SOLVERS,
            max_steps=MAX_STEPS,
            evaluations={},
        )
        self.config = config

    # ---- path

    def _sigma(self, s: Tensor) -> Tensor:
        """σ_t where the way is at s."""
        return (1 - s * (1 - math.cbrt(self.config.sigma_min))) ** 3

    def _t(self, sigma: Tensor) -> Tensor:
        return (1 - sigma) / (1 - self.config.sigma_min)

    def way(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(t, dt/ds)"""
        sigma, least = self._sigma(s), self.config.sigma_min
        return self._t(sigma), 3 * sigma ** (2 / 3) * (1 - math.cbrt(least)) / (1 - least)

    def back(self, u: Tensor) -> Tensor:
        """s where t is u."""
        sigma, least = 1 - (1 - self.config.sigma_min) * u, self.config.sigma_min
        return (1 - sigma ** (1 / 3)) / (1 - math.cbrt(least))

    def _velocity(self, x: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        """v_θ (B, C, H, W) at x_t (B, C, H, W)."""
        out: Tensor = self.network(self._shown(x, s), s, labels)
        return out

    def _shown(self, x: Tensor, s: Tensor) -> Tensor:
        """What the network sees of x_t."""
        sigma = self._sigma(s)
        return views(x, self._t(sigma), sigma, self.detail_periods)

    def _image(self, x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
        """x̂₁, from the velocity at x_t: eq. 20 and 23 solved for x₁."""
        return column(sigma) * velocity + (1 - self.config.sigma_min) * x

    def field(self, x: Tensor, s: Tensor, labels: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        velocity = guided(self._velocity, x, s, labels, guidance)
        return column(self.way(s)[1]) * velocity, self._image(x, velocity, self._sigma(s))

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        """x̂₁ at t x, which lies on the path where σ_t / t = sigma."""
        here, s, there = self._on_the_path(x, sigma)
        return self._image(here, guided(self._velocity, here, s, labels, guidance), there)

    def probed(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        here, s, there = self._on_the_path(x, sigma)
        velocity, middle = self.network.with_middle(self._shown(here, s), s, labels)
        return self._image(here, velocity, there), middle

    def _on_the_path(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(t x, s, σ_t) where σ_t / t = sigma."""
        least = self.config.sigma_min
        t = (1 / (sigma + 1 - least)).clamp(max=1.0)
        return column(t) * x, self.back(t), 1 - (1 - least) * t

    # ---- training

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """Conditional flow matching (eq. 23)."""
        b, device, least = len(batch.x), batch.x.device, self.config.sigma_min
        image, noise = 2 * batch.x - 1, torch.randn_like(batch.x)
        if self.config.coupling == "optimal transport":
            noise = noise[self._pairs(image, noise, batch.labels)]
        low = round(self.config.low_noise_share * b)
        sigma = torch.cat([least ** stratified(low, device), 1 - (1 - least) * stratified(b - low, device)])
        hidden = torch.rand(b, device=device) < self.config.label_dropout
        t = self._t(sigma)
        x = column(t) * image + column(sigma) * noise
        velocity = self._velocity(x, self.back(t), batch.labels.masked_fill(hidden, -1))
        loss = (velocity - (image - (1 - least) * noise)).square().mean()
        yield "network", loss, {"mse": loss.detach()}

    @staticmethod
    def _pairs(image: Tensor, noise: Tensor, labels: Tensor) -> Tensor:
        """(B,) of each image the noise that it is paired with, one of those that fell to images of its class."""
        cost = torch.cdist(image.flatten(1).float(), noise.flatten(1).float()).square()
        pairs = torch.empty_like(labels)
        for label in torch.unique(labels):
            members = (labels == label).nonzero()[:, 0]
            pairs[members] = members[least_cost_pairs(cost[members][:, members])]
        return pairs


def _validate(config: Config) -> None:
    if config.coupling not in COUPLINGS:
        raise ValueError(f"coupling: {config.coupling!r}; there are {', '.join(COUPLINGS)}")
    if not 0 < config.sigma_min <= HALF_BIN:
        raise ValueError(f"sigma_min: {config.sigma_min} is not in 0 … {HALF_BIN:.4f}, half an 8-bit level")
