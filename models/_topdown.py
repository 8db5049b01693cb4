"""The networks of a hierarchical VAE: latents in groups, each drawn given those above it, from coarse to fine
(ladder VAE, Sønderby et al., arXiv 1602.02282; NVAE, 2007.03898; VDVAE, Child, 2011.10650).

One stream h of features runs down the hierarchy. Each group of latents reads it and writes to it:

    p(z | z above, y) = N(μ, σ²)                       μ, σ from h
    q(z | z above, x, y) = N(μ + Δμ, (σ e^Δ)²)         Δμ, Δ from h and from the encoder's features of x (NVAE, §3.2)
    h ← h + update(h), then h ← h + write(z)

so that inference goes the same way as sampling, and a posterior says only how it differs from its prior. The code of
an image is kept whitened, u = (z − μ) / σ: whatever the groups above say, its prior is a standard normal.

    variable      paper
    code          u of all groups, flat, coarsest group first; `noise`, the ε of q, is laid out likewise
    kl            D_KL(q ‖ p) of each group given the z above it that were drawn
    log_ratio     log p(z | y) − log q(z | x, y) of all groups

Shapes: B images, w features. Level i is at 1 / 2^(i+1) of the image's resolution, rounded up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models._nn import zeroed

MOST = 5.0  # bound of |log σ| and of |Δ|


class Inference(NamedTuple):
    """What encoder and decoder say of images, at latents drawn from q: S for each of B images, R = B·S rows."""

    params: Tensor  # (R, P, H, W) of the pixels' likelihood
    code: Tensor  # (R, N)
    log_ratio: Tensor  # (R,) nats
    kl: Tensor  # (R, G) nats of every stochastic group


class Bottleneck(nn.Module):
    """Convolutions of 1×1, 3×3 and 1×1, zero at first: x (B, inputs, H, W) and, where the first reads it too, `beside`
    (B, beside, H, W) -> (B, outputs, H, W).

    On maps that are hardly larger than its kernel the 3×3 is a 1×1 too (VDVAE, table 4).
    """

    def __init__(self, inputs: int, middle: int, outputs: int, size: tuple[int, int], beside: int = 0) -> None:
        super().__init__()
        kernel = 3 if min(size) > 2 else 1
        self.narrow = nn.Conv2d(inputs, middle, 1)
        self.beside = nn.Conv2d(beside, middle, 1, bias=False) if beside else None
        self.mix = nn.Conv2d(middle, middle, kernel, padding=kernel // 2)
        self.widen = zeroed(nn.Conv2d(middle, outputs, 1))

    def forward(self, x: Tensor, beside: Tensor | None = None) -> Tensor:
        h: Tensor = self.narrow(x)
        if self.beside is not None:
            h = h + self.beside(beside)
        out: Tensor = self.widen(F.silu(self.mix(F.silu(h))))
        return out


class Group(nn.Module):
    """One group of latents: c channels at one resolution. groups: how many there are in all."""

    def __init__(self, channels: int, width: int, size: tuple[int, int], groups: int) -> None:
        super().__init__()
        self.channels, middle = channels, width // 2
        self.prior = Bottleneck(width, middle, width + 2 * channels, size)
        self.posterior = Bottleneck(width, middle, 2 * channels, size, beside=width)
        self.write = nn.Conv2d(channels, width, 1)
        with torch.no_grad():
            self.write.weight.mul_(groups**-0.5)  # else the noise of many groups would drown h (VDVAE, §3.1)

    def read(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """μ and log σ, (B, c, H, W) each, and h with its update."""
        update, gaussian = torch.split(self.prior(h), [h.shape[1], 2 * self.channels], dim=1)
        return *_mean_and_log_std(gaussian), h + update

    def differ(self, h: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
        """Δμ and Δ, (B, c, H, W) each."""
        return _mean_and_log_std(self.posterior(h, features))


def _mean_and_log_std(gaussian: Tensor) -> tuple[Tensor, Tensor]:
    mean, log_std = gaussian.float().chunk(2, dim=1)
    return mean, MOST * torch.tanh(log_std / MOST)


Choice = Callable[[int, Group, Tensor, Tensor], Tensor]  # (level, group, h, log σ) -> u (B, c, H, W)


class TopDown(nn.Module):
    """Encoder and decoder of a hierarchy.

    shape           (C, H, W) of the image; H and W are even
    classes         number of labels; 0: none
    groups          number of groups at every level, finest first
    channels        of a group at every level
    width           w
    blocks          residual blocks of the encoder at every level
    initial_bias    (P,) of the pixels' parameters
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        groups: Sequence[int],
        channels: Sequence[int],
        width: int,
        blocks: int,
        initial_bias: Tensor,
    ) -> None:
        super().__init__()
        self.classes = classes
        sides = [[math.ceil(side / 2 ** (i + 1)) for side in shape[1:]] for i in range(len(groups))]
        sizes = [(height, width) for height, width in sides]
        self.stem = nn.Conv2d(4 * shape[0], width, 3, padding=1)
        self.encoder = nn.ModuleList(
            nn.ModuleList(Bottleneck(width, width // 2, width, size) for _ in range(blocks)) for size in sizes
        )
        self.levels = nn.ModuleList(
            nn.ModuleList(Group(c, width, size, sum(groups)) for _ in range(n))
            for n, c, size in zip(groups, channels, sizes, strict=True)
        )
        # What h is told as it comes to a level: which pixel is where, and the label, of which the last is "none".
        self.places = nn.ParameterList(torch.zeros(1, width, *size) for size in sizes)
        self.labels = nn.ModuleList(nn.Embedding(classes + 1, width) for _ in sizes)
        self.last = Bottleneck(width, width // 2, width, sizes[0])
        self.head = nn.Conv2d(width, 4 * len(initial_bias), 3, padding=1)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(initial_bias.repeat_interleave(4))  # type: ignore[union-attr]
        drawn = [i for i in reversed(range(len(groups))) for _ in range(groups[i])]  # level of each group, in order
        self.parts = [channels[i] * math.prod(sizes[i]) for i in drawn]
        self.numbers = sum(self.parts)  # N of a code

    def infer(self, x: Tensor, labels: Tensor, noise: Tensor) -> Inference:
        """x (B, C, H, W), labels (B,), -1 for none, noise (B·S, N): the S rows of an image stand together."""
        samples = len(noise) // len(x)
        features = [f.repeat_interleave(samples, dim=0) for f in self.features(x)]
        parts = iter(torch.split(noise, self.parts, dim=1))
        codes: list[Tensor] = []
        ratios: list[Tensor] = []
        kls: list[Tensor] = []

        def posterior(level: int, group: Group, h: Tensor, log_std: Tensor) -> Tensor:
            mean, change = group.differ(h, features[level])
            mean, epsilon = mean * (-log_std).exp(), next(parts).view_as(mean)
            u = mean + change.exp() * epsilon
            codes.append(u.flatten(1))
            ratios.append((0.5 * (epsilon.square() - u.square()) + change).flatten(1).sum(dim=1))
            kls.append((0.5 * (mean.square() + (2 * change).exp() - 1) - change).flatten(1).sum(dim=1))
            return u

        params = self._descend(labels.repeat_interleave(samples), posterior)
        return Inference(params, torch.cat(codes, dim=1), torch.stack(ratios).sum(dim=0), torch.stack(kls, dim=1))

    def decode(self, code: Tensor, labels: Tensor) -> Tensor:
        """(B, P, H, W), the parameters of the pixels' likelihood, for codes (B, N) and labels (B,)."""
        parts = iter(torch.split(code, self.parts, dim=1))
        return self._descend(labels, lambda level, group, h, log_std: next(parts).view_as(log_std))

    def features(self, x: Tensor) -> list[Tensor]:
        """The encoder: of every level, finest first, (B, w, H, W)."""
        f = self.stem(F.pixel_unshuffle(2 * x - 1, 2).contiguous(memory_format=torch.channels_last))
        found: list[Tensor] = []
        for i, blocks in enumerate(self.encoder):
            f = F.avg_pool2d(f, 2, ceil_mode=True) if i else f
            for block in cast(Sequence[Bottleneck], blocks):
                f = f + block(f)
            found.append(f)
        return found

    def _descend(self, labels: Tensor, choose: Choice) -> Tensor:
        h: Tensor | None = None
        label = torch.where(labels < 0, self.classes, labels)
        for i in reversed(range(len(self.levels))):
            told = self.places[i] + self.labels[i](label)[:, :, None, None]
            told = told.to(self._dtype(told)).contiguous(memory_format=torch.channels_last)
            h = told if h is None else F.interpolate(h, size=told.shape[2:]) + told
            for group in cast(Sequence[Group], self.levels[i]):
                mean, log_std, h = group.read(h)
                u = choose(i, group, h, log_std)
                h = h + group.write(mean + log_std.exp() * u)
        assert h is not None
        out: Tensor = self.head(F.silu(h + self.last(h)))
        return F.pixel_shuffle(out, 2).float()

    @staticmethod
    def _dtype(x: Tensor) -> torch.dtype:
        """What h is kept in: under autocast not float32, since converting it for every layer would take a third of the
        time."""
        lower = torch.is_autocast_enabled(x.device.type)
        return torch.get_autocast_dtype(x.device.type) if lower else x.dtype
