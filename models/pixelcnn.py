"""Gated PixelCNN: an image is drawn pixel by pixel, each from a categorical distribution given all the pixels before it
(van den Oord et al., arXiv 1606.05328; the chain rule over pixels is arXiv 1601.06759's).

    log p(x | label) = Σ_i log p(x_i | x_<i, label)        i in reading order: rows from the top, each from the left

Two stacks of convolutions see what lies before a pixel, without a blind spot (§2.2): at an image row, the vertical
stack sees the rows above; the horizontal stack sees what the vertical one found, and its own row to the left.

What differs from the paper: kernels are cut to the taps that the masks leave (2×3 and 1×2), and dilated, for reach; a
gate is a · σ(b) (arXiv 1612.08083), not tanh(a) · σ(b), which learns a little faster and costs less; the vertical stack
is residual too; a pixel's place and its image's label are added to the stacks' inputs, not to every gate; levels are
embedded, not scaled. The channels of a pixel are not groups of features with masks between: the stacks see all channels
of the pixels before, and the head of a channel sees the channels before it in its own pixel. The factorisation is the
same, and as exact.

Sampling keeps what it has computed, so that a pixel costs little more than itself: `_pixelcnn_sampler`.

    B    rows: chains, images            E    numbers that stand for a level     L    layers; layer l has dilation d_l
    C    channels of the image, H × W    F    features
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _pixels, _protocol
from models._pixelcnn_sampler import PixelRows, Sampler
from models._protocol import (
    Batch,
    Draw,
    ImageSpace,
    Likelihood,
    Localiser,
    OnePassDensity,
    Range,
    Score,
    Spec,
    Steps,
)

REACH = 3  # how far the stacks' inputs look up, left and (above) right; a layer looks as far as its dilation


@dataclass(frozen=True)
class Config:
    """Everything that shapes the network."""

    features: int = 64  # F, of each stack
    dilations: tuple[int, ...] = (1, 2, 4) * 3  # of each layer, first to last
    hidden: int = 128  # units of a head, between the features and the logits
    embedding: int = 32  # E, numbers that stand for a level of a channel
    levels: int = 256  # of a channel; with fewer than 256 the images are rounded to them
    label_dropout: float = 0.1  # share of the images that are learnt without their label, for p(x) beside p(x | label)


# -------------------------------------------------------------------------------------------------------------- network


class _Gate(torch.autograd.Function):
    """F.glu over dim 1 with a vectorised backward: torch's takes ten times as long on channels-last feature maps."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return F.glu(u, dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (u,) = ctx.saved_tensors
        a, b = u.chunk(2, dim=1)
        s = b.sigmoid()
        both = torch.empty_like(u)
        to_a, to_b = both.chunk(2, dim=1)
        torch.mul(gradient, s, out=to_a)
        torch.mul(to_a, a, out=to_b).mul_(1 - s)
        return both


def gate(u: Tensor) -> Tensor:
    """(B, 2F, ...) -> (B, F, ...): the first half, let through as far as the second half says."""
    gated: Tensor = _Gate.apply(u)  # type: ignore[no-untyped-call]
    return gated


def _weight(*shape: int, gain: float = 1.0) -> nn.Parameter:
    """(..., outputs, inputs); in memory the outputs of an input lie together, as `_pixelcnn.c` reads them."""
    weight = torch.randn(shape) * (gain / math.sqrt(shape[-1]))
    return nn.Parameter(weight.mT.contiguous().mT)


class Network(nn.Module):
    """Pixels before -> features -> logits of a pixel's levels. Weights of all layers lie in one tensor, layer first.

    Each kernel is kept apart by what it looks at, since sampling takes some of its taps long before the others.
    """

    first_level: Tensor

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        f, e, n = config.features, space.channels * config.embedding, len(config.dilations)
        self.features, self.dilations, self.reach = f, config.dilations, REACH
        level = (torch.arange(config.levels) + 0.5) / config.levels
        waves = torch.cos(math.pi * level[:, None] * torch.arange(1, config.embedding + 1))
        self.table = nn.Parameter(waves.repeat(space.channels, 1))  # neighbouring levels start alike
        self.place = nn.Parameter(0.05 * torch.randn(space.height, space.width, 2 * f))
        self.label = nn.Embedding(space.classes + 1, 2 * f) if space.classes else None  # the last one: no label
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.05)
        half = math.sqrt(0.5)
        self.look_up = _weight(f, (2 * REACH + 1) * REACH * e, gain=math.sqrt(2))  # inputs: columns, rows, channels
        self.look_left = _weight(f, REACH * e, gain=math.sqrt(2))  # inputs: columns, channels
        self.up = _weight(n, 2 * f, 3 * f, gain=half)  # the vertical kernel's taps a dilation above; columns, features
        self.across = _weight(n, 2 * f, 3 * f, gain=half)  # and those in the row itself
        self.vertical_bias = nn.Parameter(torch.zeros(n, 2 * f))
        self.down = _weight(n, 2 * f, f, gain=half)  # from the vertical stack to the horizontal
        self.past = _weight(n, 2 * f, f, gain=half)  # the horizontal kernel's tap a dilation to the left
        self.now = _weight(n, 2 * f, f, gain=half)  # and the one at the pixel itself
        self.horizontal_bias = nn.Parameter(torch.zeros(n, 2 * f))
        self.out = _weight(n, f, f, gain=0.5)
        heads = nn.ModuleList(Head(f + c * config.embedding, config) for c in range(space.channels))
        self.heads = cast(Sequence[Head], heads)

        first_level = torch.arange(space.channels) * config.levels
        self.register_buffer("first_level", first_level, persistent=False)

    def embed(self, levels: Tensor) -> Tensor:
        """Levels (..., C) -> (..., C·E); of a pixel's first channels alone as well."""
        return F.embedding(levels + self.first_level[: levels.shape[-1]], self.table).flatten(-2)

    def by_label(self, labels: Tensor) -> Tensor:
        """(B, 2F): what labels (B,) add to the inputs of the vertical and of the horizontal stack."""
        if self.label is None:
            return self.place.new_zeros(len(labels), 2 * self.features)
        added: Tensor = self.label(labels.where(labels >= 0, self.label.num_embeddings - 1))
        return added

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Embedded images (B, H, W, C·E), labels (B,) -> features (B, H, W, F) of what is known before each pixel."""
        f, n = self.features, len(self.dilations)
        x = pixels.permute(0, 3, 1, 2)  # channels-last: (B, C·E, H, W)
        look_up = self.look_up.view(f, 2 * REACH + 1, REACH, -1).permute(0, 3, 2, 1)
        look_left = self.look_left.view(f, 1, REACH, -1).permute(0, 3, 1, 2)
        v = F.conv2d(F.pad(x, (REACH, REACH, REACH, -1)), look_up)  # (B, F, H, W)
        h = F.conv2d(F.pad(x, (REACH, -1, 0, 0)), look_left)
        base = (self.place + self.by_label(labels)[:, None, None]).to(v.dtype).permute(0, 3, 1, 2)
        v, h = v + base[:, :f], h + base[:, f:]
        layers = zip(
            self.dilations,
            torch.stack([self.up, self.across], dim=2).view(n, 2 * f, 2, 3, f).permute(0, 1, 4, 2, 3).unbind(),
            self.vertical_bias.unbind(),
            self.down[..., None, None].unbind(),
            torch.stack([self.past, self.now], dim=-1)[:, :, :, None].unbind(),
            self.horizontal_bias.unbind(),
            self.out[..., None, None].unbind(),
            strict=True,
        )
        for d, vertical, vertical_bias, down, horizontal, horizontal_bias, out in layers:
            u = F.conv2d(F.pad(v, (d, d, d, 0)), vertical, vertical_bias, dilation=d)  # (B, 2F, H, W)
            v = v + gate(u)
            u = F.conv2d(F.pad(h, (d, 0, 0, 0)), horizontal, horizontal_bias, dilation=d)
            h = h + F.conv2d(gate(u + F.conv2d(v, down)), out)
        return h.permute(0, 2, 3, 1)

    def logits(self, channel: int, features: Tensor, pixel: Tensor) -> Tensor:
        """Features (..., F) and embedded pixels, of which only the channels before are read -> (..., levels)."""
        known = channel * self.table.shape[1]
        logits: Tensor = self.heads[channel](torch.cat([features, pixel[..., :known]], dim=-1) if known else features)
        return logits


HeadTensors = tuple[Tensor, Tensor, Tensor, Tensor]  # first (inputs, hidden), its bias, last (hidden, levels), its bias


class Head(nn.Module):
    """Features -> logits of a channel's levels."""

    def __init__(self, inputs: int, config: Config) -> None:
        super().__init__()
        self.first = _weight(config.hidden, inputs)
        self.first_bias = nn.Parameter(torch.zeros(config.hidden))
        self.last = _weight(config.levels, config.hidden, gain=0.5)
        self.last_bias = nn.Parameter(torch.zeros(config.levels))

    def tensors(self) -> HeadTensors:
        return self.first.mT, self.first_bias, self.last.mT, self.last_bias

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.linear(features, self.first, self.first_bias).relu_()
        return F.linear(hidden, self.last, self.last_bias)


# ---------------------------------------------------------------------------------------------------------------- model


class Model(_protocol.Model, OnePassDensity, Localiser):
    """Samples in H·W ticks with caches; scores in one pass, exactly, with the statistics of `models._pixels`."""

    statistic_names = _pixels.STATISTICS
    has_pixel_terms = True

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        pixels = space.height * space.width
        self.spec = Spec(
            family="pixelcnn",
            image=dataclasses.replace(space, captions=False),
            steps=Steps(unit="pixel", min=pixels, default=pixels, max=pixels),
            likelihood=Likelihood(
                kind="exact",
                dequantisation="none",
                note="" if config.levels == 256 else f"of the image rounded to {config.levels} levels",
                heatmap_evaluations=1,
            ),
            temperature=Range(min=0.1, default=1.0, max=2.0),
        )
        self.feature_sizes = _pixels.feature_sizes(space.height, space.width)
        self.network = Network(config, space)
        self._sampler: Sampler | None = None

    def logits(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W, levels) float32 for x (B, C, H, W), labels (B,): p(x_i | x_<i, label) of every pixel at once."""
        pixels = self.network.embed(self._levels(x))
        features = self.network(pixels, labels)
        channels = range(x.shape[1])
        return torch.stack([self.network.logits(c, features, pixels).float() for c in channels], dim=1)

    def _levels(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1] -> (B, H, W, C)"""
        return (x * (self.config.levels - 1)).round().long().permute(0, 2, 3, 1)

    # objective

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"pixelcnn": list(self.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """The negative log-likelihood, nats per dimension. Some labels are hidden."""
        hidden = torch.rand(batch.labels.shape, device=batch.labels.device) < self.config.label_dropout
        levels = self._levels(batch.x)
        pixels = self.network.embed(levels)
        features = self.network(pixels, batch.labels.masked_fill(hidden, _protocol.UNLABELLED))
        each = [
            F.cross_entropy(self.network.logits(c, features, pixels).float().flatten(0, -2), levels[..., c].flatten())
            for c in range(levels.shape[-1])
        ]
        loss = torch.stack(each).mean()
        yield "pixelcnn", loss, {"bits_per_dim": loss.detach() / math.log(2)}

    # sampler

    def init(self, draws: Sequence[Draw]) -> PixelRows:
        if self._sampler is None or not self._sampler.is_of(self.network):
            self._sampler = Sampler(self.network)
        return self._sampler.init(draws)

    def step(self, rows: PixelRows) -> PixelRows:
        """Draw the next pixel of every image, wherever it is."""
        if self._sampler is None:  # the rows of another copy of this model
            self._sampler = Sampler(self.network)
        return self._sampler.step(rows)

    def image(self, rows: PixelRows) -> Tensor:
        return _pixels.picture(rows.levels, rows.tick, self.spec.image.shape, self.config.levels)

    # density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        return _pixels.score(*self.pixel_terms(x, labels))

    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        """−log p(x_i | x_<i) − entropy of p(· | x_<i), nats."""
        return _pixels.surprise(*self.pixel_terms(x, labels))

    def pixel_terms(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x_i | x_<i, label) and the entropy of p(· | x_<i, label), both (B, H, W) nats, summed over channels.

        x (B, C, H, W), labels (B,). Differentiable in the weights; not in x, of which only the levels are read.
        """
        levels = self._levels(x)
        pixels = self.network.embed(levels)
        features = self.network(pixels, labels)
        log_prob, entropy = torch.zeros(2, *features.shape[:3], device=x.device)
        for c in range(levels.shape[-1]):
            of_channel = _pixels.terms(self.network.logits(c, features, pixels), levels[..., c])
            log_prob, entropy = log_prob + of_channel[0], entropy + of_channel[1]
        return log_prob, entropy


def _check(config: Config, space: ImageSpace) -> None:
    for name in ("features", "hidden", "embedding"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; a positive number is needed")
    if not config.dilations or min(config.dilations) < 1:
        raise ValueError(f"dilations: {config.dilations}; every layer needs a positive one, and there must be a layer")
    if not 2 <= config.levels <= 256:
        raise ValueError(f"levels: {config.levels} is not in 2 … 256, the grey levels that an 8-bit image can have")
    if not 0 <= config.label_dropout < 1:
        raise ValueError(f"label_dropout: {config.label_dropout} is not in [0, 1)")
    if min(space.shape) < 1:
        raise ValueError(f"space: an image of {space.width}×{space.height}×{space.channels} has no pixel")
