"""Likelihoods of 8-bit pixels: what a decoder's output means. Each is a distribution over the 256 levels: it sums to
one.

A network ends in `parameters` channels per pixel; a likelihood turns them into nats of an 8-bit image, into the image
to show (the mean), or into a draw. All arithmetic is float32 whatever the autocast.

    params      (B, P, H, W)    the network's output, P = `parameters`
    x           (B, C, H, W)    on the grid k / 255
    uniforms    (B, U, H, W)    on the open interval (0, 1), U = `uniforms`: all the randomness of a draw
"""

from __future__ import annotations

import abc
import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.nn import functional as F

LEVELS = 256
HALF_BIN = 0.5


class PixelLikelihood(abc.ABC):
    """p(x | params) of 8-bit pixels that are independent of each other given the parameters."""

    @property
    @abc.abstractmethod
    def parameters(self) -> int:
        """P, channels per pixel that the network has to put out."""

    @property
    @abc.abstractmethod
    def uniforms(self) -> int:
        """U, uniform random numbers per pixel that a draw takes."""

    @abc.abstractmethod
    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        """(B, H, W) nats, summed over channels."""

    @abc.abstractmethod
    def mean(self, params: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]: the expected image."""

    @abc.abstractmethod
    def draw(self, params: Tensor, uniforms: Tensor) -> Tensor:
        """(B, C, H, W) on the grid k / 255, by inverting the distribution function at the uniforms."""

    @abc.abstractmethod
    def initial_bias(self) -> Tensor:
        """(P,) a bias for the last layer from which learning starts well: broad, and unlike between components."""


@final
@dataclass(frozen=True)
class LogisticMixture(PixelLikelihood):
    """A mixture of discretised logistics (PixelCNN++, arXiv 1701.05517, eq. 2). A pixel's channels share the component.

    A level v takes the mass of the logistic between v − ½ and v + ½; levels 0 and 255 take all that lies beyond them.
    With a = (v + ½ − μ) / s and b = (v − ½ − μ) / s the mass has a form that neither cancels nor underflows,

        log(σ(a) − σ(b)) = log σ(a) + log σ(−b) + log(1 − e^(b − a)),   b − a = −1 / s

    where the last term does not depend on v, so no approximation for narrow logistics is needed.

    params, in order: K mixture logits, K·C means μ on the scale where black is −1 and white is 1, K·C log-scales in
    those units.
    """

    channels: int
    components: int = 5

    # From a ninth of a level, a point mass, to a thousand times the range, where only black and white are left.
    LOG_SCALE = (-7.0, 7.0)

    @property
    def parameters(self) -> int:
        return self.components * (1 + 2 * self.channels)

    @property
    def uniforms(self) -> int:
        return 1 + self.channels

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log-weights (B, K, 1, H, W); μ and s (B, K, C, H, W) in units of levels, 0 … 255."""
        k, c = self.components, self.channels
        b, _, h, w = params.shape
        logits, mean, log_scale = torch.split(params.float(), [k, k * c, k * c], dim=1)
        half_range = (LEVELS - 1) / 2
        mu = (mean + 1.0) * half_range
        s = log_scale.clamp(*self.LOG_SCALE).exp() * half_range
        return logits.log_softmax(dim=1)[:, :, None], mu.view(b, k, c, h, w), s.view(b, k, c, h, w)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        log_weight, mu, s = self._split(params)
        v = (x.float() * (LEVELS - 1)).round()[:, None]  # (B, 1, C, H, W)
        inverse = s.reciprocal()
        centred = (v - mu) * inverse
        below = F.logsigmoid(centred + HALF_BIN * inverse)  # log σ(a)
        above = F.logsigmoid(HALF_BIN * inverse - centred)  # log σ(−b)
        width = torch.log(-torch.expm1(-inverse))
        lowest, highest = v == 0, v == LEVELS - 1
        term = torch.where(lowest, below, torch.where(highest, above, below + above + width))
        return torch.logsumexp(log_weight[:, :, 0] + term.sum(dim=2), dim=1)

    def mean(self, params: Tensor) -> Tensor:
        """The mean of the logistics clipped to 0 … 255, ∫ P(X > t) dt: within half a level of the discretised one."""
        log_weight, mu, s = self._split(params)
        expected = s * (F.softplus(mu / s) - F.softplus((mu - (LEVELS - 1)) / s))
        return (log_weight.exp() * expected).sum(dim=1).div(LEVELS - 1).clamp(0.0, 1.0)

    def draw(self, params: Tensor, uniforms: Tensor) -> Tensor:
        log_weight, mu, s = self._split(params)
        cumulative = log_weight[:, :, 0].exp().cumsum(dim=1)[:, :-1]
        chosen = (uniforms[:, :1] > cumulative).sum(dim=1)[:, None, None]  # (B, 1, 1, H, W)
        chosen = chosen.expand(-1, 1, self.channels, -1, -1)
        mu, s = mu.gather(1, chosen)[:, 0], s.gather(1, chosen)[:, 0]
        return (mu + s * torch.logit(uniforms[:, 1:])).round().clamp(0, LEVELS - 1) / (LEVELS - 1)

    def initial_bias(self) -> Tensor:
        k, c = self.components, self.channels
        # Centres spread over the range, black first: identical components would learn identical things for long.
        means = torch.linspace(-1.0, 1.0, k) if k > 1 else torch.zeros(1)
        return torch.cat([torch.zeros(k), means.repeat_interleave(c), torch.full((k * c,), math.log(0.25))])


@final
@dataclass(frozen=True)
class Categorical(PixelLikelihood):
    """256 logits per channel: any distribution of a pixel. params: C·256 logits, a channel's levels together."""

    channels: int

    @property
    def parameters(self) -> int:
        return self.channels * LEVELS

    @property
    def uniforms(self) -> int:
        return self.channels

    def _log_probs(self, params: Tensor) -> Tensor:
        """(B, C, 256, H, W)"""
        b, _, h, w = params.shape
        return params.float().view(b, self.channels, LEVELS, h, w).log_softmax(dim=2)

    def log_prob(self, params: Tensor, x: Tensor) -> Tensor:
        v = (x.float() * (LEVELS - 1)).round().long()[:, :, None]
        return self._log_probs(params).gather(2, v)[:, :, 0].sum(dim=1)

    def mean(self, params: Tensor) -> Tensor:
        levels = torch.arange(LEVELS, device=params.device, dtype=torch.float32) / (LEVELS - 1)
        return (self._log_probs(params).exp() * levels[:, None, None]).sum(dim=2).clamp(0.0, 1.0)

    def draw(self, params: Tensor, uniforms: Tensor) -> Tensor:
        cumulative = self._log_probs(params).exp().cumsum(dim=2)[:, :, :-1]
        return (uniforms[:, :, None] > cumulative).sum(dim=2).float() / (LEVELS - 1)

    def initial_bias(self) -> Tensor:
        return torch.zeros(self.parameters)


def pixel_likelihood(name: str, channels: int, components: int) -> PixelLikelihood:
    """The likelihood of that name. Raises `ValueError` for another."""
    if name == "logistic":
        return LogisticMixture(channels, components)
    if name == "categorical":
        return Categorical(channels)
    raise ValueError(
        f"likelihood: {name!r}; there are 'logistic' (a mixture of discretised logistics) and 'categorical'"
    )
