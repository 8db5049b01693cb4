"""Bijections of image-shaped tensors, the parts that flows share (NICE, RealNVP, Glow).

A bijection f maps x to z with log |det ∂z/∂x|, and back. Layers compute in the dtype of their input, whatever that of
their parameters. Autocast reaches the networks inside couplings alone: what they answer decides which map a coupling
is, not how exactly it and its log-determinant are computed.

    x, z        (B, C, H, W)
    log_det     (B,) nats
    given       (B, K, H, W) what the networks of couplings are told besides x, at x's own resolution; or None

Sources: NICE (arXiv 1410.8516), RealNVP (1605.08803), Glow (1807.03039).
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models._nn import at_least
from models._protocol import unlabelled


class Bijection(nn.Module, abc.ABC):
    """An invertible map: `forward(x) -> (z, log_det)`, `inverse(z) -> x`. For every `given` it is another map."""

    @abc.abstractmethod
    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> z, and log |det ∂z/∂x| (B,) in nats."""

    @abc.abstractmethod
    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        """z -> the x that `forward` maps to it."""

    def initialise(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        """Set what depends on the first batch of data, and return z, which is what the next layer sees of it."""
        z: Tensor = self(x, given)[0]
        return z


class Chain(Bijection):
    """Bijections one after the other; their log-determinants add up."""

    def __init__(self, layers: Sequence[Bijection]) -> None:
        super().__init__()
        self.layers: Sequence[Bijection] = nn.ModuleList(layers)  # type: ignore[assignment]

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_det = x.new_zeros(x.shape[0])
        for layer in self.layers:
            x, term = layer(x, given)
            log_det = log_det + term
        return x, log_det

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.inverse(z, given)
        return z

    def initialise(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer.initialise(x, given)
        return x


# -------------------------------------------------------------------------------------------------------- linear layers


class ActNorm(Bijection):
    """A shift and a scale per channel that give the first batch mean 0 and variance 1 (1807.03039, §3.1)."""

    initialised: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale.to(x.dtype)
        z = (x + self.shift.to(x.dtype)) * log_scale.exp()
        return z, (log_scale.sum() * x[0, 0].numel()).expand(x.shape[0])

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        return z * torch.exp(-self.log_scale.to(z.dtype)) - self.shift.to(z.dtype)

    @torch.no_grad()
    def initialise(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        if not self.initialised:  # a trained layer stays as it is
            std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
            self.shift.copy_(-mean)
            self.log_scale.copy_(-(std + 1e-6).log())
            self.initialised.fill_(True)
        return super().initialise(x, given)


class Invertible1x1(Bijection):
    """A learnt linear map of the channels, W = P L (U + diag(sign · exp(log_diagonal))), P fixed (1807.03039, eq. 10).

    Through its LU factors W can't become singular, and its log-determinant is a sum. It starts as a random rotation.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation, _ = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64))
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.lower = nn.Parameter(lower.tril(-1).float())
        self.upper = nn.Parameter(upper.triu(1).float())
        self.log_diagonal = nn.Parameter(diagonal.abs().log().float())
        self.register_buffer("permutation", permutation.float())
        self.register_buffer("sign", diagonal.sign().float())

    def factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """P, L and the whole upper factor of W, each (C, C)."""
        permutation, sign = self.permutation.to(dtype), self.sign.to(dtype)
        lower = self.lower.to(dtype).tril(-1) + torch.eye(len(sign), dtype=dtype, device=sign.device)
        upper = self.upper.to(dtype).triu(1) + torch.diag(sign * self.log_diagonal.to(dtype).exp())
        return permutation, lower, upper

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, enabled=False):
            permutation, lower, upper = self.factors(x.dtype)
            z = F.conv2d(x, (permutation @ lower @ upper)[:, :, None, None])
            return z, (self.log_diagonal.to(x.dtype).sum() * x[0, 0].numel()).expand(x.shape[0])

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        with torch.autocast(z.device.type, enabled=False):
            permutation, lower, upper = self.factors(z.dtype)
            inverse = torch.linalg.solve_triangular(lower, permutation.T, upper=False, unitriangular=True)
            inverse = torch.linalg.solve_triangular(upper, inverse, upper=True)
            return F.conv2d(z, inverse[:, :, None, None])


class DiagonalScale(Bijection):
    """z = x · exp(log_scale), a factor for every number of the image (1410.8516, §3.3).

    It is set so that the first batch has variance 1 at each; numbers that hardly move count as if their standard
    deviation were `LEAST`.
    """

    LEAST = 1e-4

    initialised: Tensor

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1, *shape))
        self.register_buffer("initialised", torch.tensor(False))

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale = self.log_scale.to(x.dtype)
        return x * log_scale.exp(), log_scale.sum().expand(x.shape[0])

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        return z * torch.exp(-self.log_scale.to(z.dtype))

    @torch.no_grad()
    def initialise(self, x: Tensor, given: Tensor | None = None) -> Tensor:
        if not self.initialised:
            self.log_scale.copy_(-x.std(dim=0, keepdim=True).clamp(min=self.LEAST).log())
            self.initialised.fill_(True)
        return super().initialise(x, given)


class Permute(Bijection):
    """Quarters of the channels in another order: after a `Squeeze`, another mask for the coupling that follows."""

    def __init__(self, order: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        quarters = x.chunk(4, dim=1)
        return torch.cat([quarters[i] for i in self.order], dim=1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        quarters = z.chunk(4, dim=1)
        return torch.cat([quarters[self.order.index(i)] for i in range(4)], dim=1)


class Squeeze(Bijection):
    """(B, C, H, W) -> (B, 4C, H/2, W/2): 2×2 neighbours become channels, the checkerboard's black squares first.

    The quarters of the channels are the pixels (0, 0), (1, 1), (0, 1), (1, 0) of each square, so that a coupling of
    halves right after it has the checkerboard mask of 1605.08803, Figure 3, at a quarter of the cost.
    """

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        quarters = [x[:, :, 0::2, 0::2], x[:, :, 1::2, 1::2], x[:, :, 0::2, 1::2], x[:, :, 1::2, 0::2]]
        return torch.cat(quarters, dim=1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        top_left, bottom_right, top_right, bottom_left = z.chunk(4, dim=1)
        top = torch.stack([top_left, top_right], dim=-1).flatten(-2)  # (B, C, H/2, W)
        bottom = torch.stack([bottom_left, bottom_right], dim=-1).flatten(-2)
        return torch.stack([top, bottom], dim=-2).flatten(-3, -2)


# ---------------------------------------------------------------------------------------------------- non-linear layers


class Logit(Bijection):
    """logit(α + (1 − 2α) x) for x in [0, 1]: widens the edges of the grey scale (1605.08803, §4.1)."""

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        p = self.alpha + (1 - 2 * self.alpha) * x
        log_p, log_q = p.log(), torch.log1p(-p)
        return log_p - log_q, (math.log(1 - 2 * self.alpha) - log_p - log_q).sum(dim=(1, 2, 3))

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        return (torch.sigmoid(z) - self.alpha) / (1 - 2 * self.alpha)


class AffineCoupling(Bijection):
    """Half of the channels passes; the other is scaled and shifted by what a network reads from the first:

        z_b = x_b · exp(s(x_a)) + t(x_a),    s = bound · tanh(raw / bound)                  (1605.08803, eq. 7 and 8)

    so that |s| < bound. `network` maps x_a, with what is given behind it, to raw and t, one behind the other in the
    channels. Of an odd number of channels x_a has one more.
    """

    def __init__(self, network: nn.Module, bound: float) -> None:
        super().__init__()
        self.network = network
        self.bound = bound

    def scale_and_shift(self, kept: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """s (the log-scale) and t, functions of the half that passes."""
        return bounded(self.network(joined(kept, given)).to(kept.dtype), self.bound)

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = halves(x)
        log_scale, shift = self.scale_and_shift(kept, given)
        return torch.cat([kept, changed * log_scale.exp() + shift], dim=1), log_scale.sum(dim=(1, 2, 3))

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        kept, changed = halves(z)
        log_scale, shift = self.scale_and_shift(kept, given)
        return torch.cat([kept, (changed - shift) * torch.exp(-log_scale)], dim=1)


class AffineGiven(Bijection):
    """All channels are scaled and shifted by what a network reads from `given` alone: an affine coupling with nothing
    kept. z is standard normal where x is a Gaussian whose mean and variance depend on what is given."""

    def __init__(self, network: nn.Module, bound: float) -> None:
        super().__init__()
        self.network = network
        self.bound = bound

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        log_scale, shift = bounded(self.network(given).to(x.dtype), self.bound)
        return x * log_scale.exp() + shift, log_scale.sum(dim=(1, 2, 3))

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        log_scale, shift = bounded(self.network(given).to(z.dtype), self.bound)
        return (z - shift) * torch.exp(-log_scale)


class AdditiveCoupling(Bijection):
    """Half of the channels passes; to the other is added what a network reads from the first (1410.8516, §3.2):

        z_b = x_b + m(x_a)

    Volumes stay as they are. Of an odd number of channels x_a has one more.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, given: Tensor | None = None) -> tuple[Tensor, Tensor]:
        kept, changed = halves(x)
        shift = self.network(joined(kept, given)).to(x.dtype)
        return torch.cat([kept, changed + shift], dim=1), x.new_zeros(x.shape[0])

    def inverse(self, z: Tensor, given: Tensor | None = None) -> Tensor:
        kept, changed = halves(z)
        return torch.cat([kept, changed - self.network(joined(kept, given)).to(z.dtype)], dim=1)


def bounded(out: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """A network's output (B, 2C, H, W) -> log-scales between −bound and bound, and shifts, (B, C, H, W) each."""
    raw, shift = out.chunk(2, dim=1)
    return bound * torch.tanh(raw / bound), shift


def joined(kept: Tensor, given: Tensor | None) -> Tensor:
    """What a coupling's network reads."""
    return kept if given is None else torch.cat([kept, given], dim=1)


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two halves of the channels; of an odd number the first has one more."""
    changed = x.shape[1] // 2
    return x[:, : x.shape[1] - changed], x[:, x.shape[1] - changed :]


# ------------------------------------------------------------------------------------------------ networks of couplings


class Convolution(nn.Conv2d):
    """A convolution in the dtype of its input: the same weights sample in float64."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        z: Tensor = self._conv_forward(x, self.weight.to(x.dtype), bias)
        return z


class Head(Convolution):
    """The last convolution of a network, to few channels. On CPUs such a one rounds otherwise where a row is alone, and
    one of 1×1 where rows are few and channels come first. Here it does not, so that batches of any size give the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(at_least(2, x).contiguous(memory_format=torch.channels_last))
        return z[: x.shape[0]]


class Linear(nn.Linear):
    """A linear layer in the dtype of its input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class CouplingNetwork(nn.Module):
    """3×3, 1×1 and 3×3 convolutions (1807.03039, §B). The last starts at zero, and so the coupling as the identity."""

    def __init__(self, channels_in: int, channels_out: int, width: int) -> None:
        super().__init__()
        self.first = Convolution(channels_in, width, 3, padding=1)
        self.second = Convolution(width, width, 1)
        self.last = Head(width, channels_out, 3, padding=1)
        for parameter in self.last.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        # In place: a convolution's gradient needs its input alone, and memory traffic is what such small layers cost.
        h = F.relu_(self.first(x.contiguous(memory_format=torch.channels_last)))
        out: Tensor = self.last(F.relu_(self.second(h)))
        return out


class DenseNetwork(nn.Module):
    """Fully connected layers over a half image (C, H, W), with rectifiers between (1410.8516, §5). The last starts at
    zero, and so the coupling as the identity."""

    def __init__(self, shape: tuple[int, int, int], width: int, hidden: int) -> None:
        super().__init__()
        sizes = [math.prod(shape), *[width] * hidden, math.prod(shape)]
        self.layers = nn.ModuleList(Linear(a, b) for a, b in pairwise(sizes))
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        h = at_least(4, x.flatten(1))
        for layer in self.layers[:-1]:
            h = F.relu_(layer(h))
        out: Tensor = self.layers[-1](h)
        return out[: x.shape[0]].view_as(x)


# ---------------------------------------------------------------------------------------------------------- multi-scale


class LabelMaps(nn.Module):
    """A learnt map of K channels for each label, and one for none: (B,) labels -> (B, K, H, W).

    It tells networks of convolutions, which see the same everywhere, also where they are.
    """

    def __init__(self, classes: int, channels: int, height: int, width: int) -> None:
        super().__init__()
        self.maps = nn.Parameter(0.05 * torch.randn(classes + 1, channels, height, width))

    def forward(self, labels: Tensor) -> Tensor:
        return self.maps[labels]  # label −1 is the last one


class MultiScale(nn.Module):
    """A flow over several scales: after each but the last, half of the channels leave as latents (1605.08803, §3.6).

    maps: at each scale, what its couplings are given; of a flow that knows no labels none.
    """

    def __init__(self, entrance: Bijection, scales: Sequence[Bijection], maps: Sequence[LabelMaps] = ()) -> None:
        super().__init__()
        self.entrance = entrance
        self.scales: Sequence[Bijection] = nn.ModuleList(scales)  # type: ignore[assignment]
        self.maps: Sequence[LabelMaps] = nn.ModuleList(maps)  # type: ignore[assignment]

    def given(self, x: Tensor, labels: Tensor | None) -> list[Tensor | None]:
        """What the couplings of each scale are told of labels (B,); None: no row has one."""
        if not self.maps:
            return [None] * len(self.scales)
        labels = unlabelled(x) if labels is None else labels
        return [maps(labels).to(x.dtype) for maps in self.maps]

    def forward(self, x: Tensor, labels: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """x (B, C, H, W), labels (B,) -> the latents of every scale, finest first, and log |det ∂z/∂x| (B,) in nats."""
        h, log_det = self.entrance(x)
        latents: list[Tensor] = []
        for scale, given in zip(self.scales, self.given(x, labels), strict=True):
            if scale is not self.scales[0]:
                h, finished = halves(h)
                latents.append(finished)
            h, term = scale(h, given)
            log_det = log_det + term
        return (*latents, h), log_det

    def inverse(self, latents: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """The x whose latents these are."""
        *finished, h = latents
        for scale, given in reversed(list(zip(self.scales, self.given(h, labels), strict=True))):
            h = scale.inverse(h, given)
            if finished:
                h = torch.cat([h, finished.pop()], dim=1)
        return self.entrance.inverse(h)

    @torch.no_grad()
    def initialise(self, x: Tensor, labels: Tensor | None = None) -> None:
        """Set what depends on the first batch of data, layer after layer."""
        h = self.entrance.initialise(x)
        for scale, given in zip(self.scales, self.given(x, labels), strict=True):
            h, _ = halves(scale.initialise(h, given))

    def latent_shapes(self, shape: tuple[int, int, int]) -> tuple[tuple[int, int, int], ...]:
        """(C, H, W) of every scale's latents, for images of that shape."""
        c, h, w = shape
        shapes: list[tuple[int, int, int]] = []
        for _ in self.scales[1:]:
            c, h, w = 4 * c, h // 2, w // 2
            shapes.append((c // 2, h, w))
            c -= c // 2
        return (*shapes, (4 * c, h // 2, w // 2))
