"""A causal transformer over pixels: an image is drawn pixel by pixel, each from a categorical distribution given all
that were drawn before (Image Transformer, arXiv 1802.05751; Sparse Transformers, arXiv 1904.10509).

    log p(x | label) = Σ_i log p(x_i | x_<i, label)        i in reading order: rows from the top, each from the left

All positions learn at once: position i is given what lies before pixel i, and is asked for its level. A layer sees part
of what lies before, in one of three patterns (1904.10509, §4.2): "near", the last pixels; "column", the pixels above;
"all". A few layers of the first two reach every pixel before, at a fraction of the price.

What differs from the papers: a position's input is not the one pixel before it but a patch, the pixels up to REACH rows
above and columns to the left (the transformer's part is then what a convolution of that size leaves to be learnt); how
far back a pixel lies is told by a learnt bias for each lag rather than by attention to learnt positions; labels are
added to the inputs. The channels of a pixel are one position: the head of a channel sees the channels before it in its
own pixel. Levels are embedded in a table that begins as waves, so that neighbouring levels begin alike.

Sampling keeps keys and values in a cache (`models._transformer`), each chain at its own pixel.

    B    rows: chains, images            E    numbers that stand for a level     D    width
    C    channels of the image, H × W    N    neighbours that an input sees
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _pixels, _protocol, _random
from models._codes import choose
from models._protocol import (
    Batch,
    Draw,
    ImageSpace,
    Likelihood,
    Localiser,
    OnePassDensity,
    Range,
    Rows,
    Score,
    Spec,
    Steps,
)
from models._transformer import Cache, Pattern, Transformer

REACH = 3  # how far an input looks up, left and (above) right


@dataclass(frozen=True)
class Config:
    """Everything that shapes the network."""

    width: int = 128  # D
    heads: int = 2
    hidden: int = 256  # units of a layer's perceptron, and of a head's
    layers: tuple[str, ...] = ("near", "column", "near", "column", "near")  # what each sees; "all" there is too
    near: int = 65  # positions that a layer of pattern "near" sees, its own included
    embedding: int = 16  # E, numbers that stand for a level of a channel
    levels: int = 256  # of a channel; with fewer than 256 the images are rounded to them
    label_dropout: float = 0.1  # share of the images that are learnt without their label, for p(x) beside p(x | label)


# -------------------------------------------------------------------------------------------------------------- network


class Network(nn.Module):
    """Pixels before -> features -> logits of a pixel's levels."""

    first_level: Tensor
    neighbours: Tensor

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        d, e, (channels, h, w) = config.width, config.embedding, space.shape
        level = (torch.arange(config.levels) + 0.5) / config.levels
        waves = torch.cos(math.pi * level[:, None] * torch.arange(1, e + 1))
        self.table = nn.Parameter(waves.repeat(channels, 1))
        taps = (2 * REACH + 1) * REACH + REACH  # N
        self.look = nn.Parameter(torch.randn(d, taps * channels * e) * math.sqrt(2 / (taps * channels * e)))
        self.row = nn.Parameter(0.1 * torch.randn(h, d))
        self.column = nn.Parameter(0.1 * torch.randn(w, d))
        self.label = nn.Embedding(space.classes + 1, d) if space.classes else None  # the last one: no label
        if self.label is not None:
            nn.init.normal_(self.label.weight, std=0.1)
        sees = {"near": Pattern(config.near), "column": Pattern(h, stride=w), "all": Pattern(h * w)}
        patterns = [sees[name] for name in config.layers]
        self.transformer = Transformer(d, config.heads, config.hidden, patterns, h * w)
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(d + c * e, config.hidden), nn.GELU(), nn.Linear(config.hidden, config.levels))
            for c in range(channels)
        )
        self.register_buffer("first_level", torch.arange(channels) * config.levels, persistent=False)
        self.register_buffer("neighbours", _neighbours(h, w), persistent=False)

    def embed(self, levels: Tensor) -> Tensor:
        """Levels (..., C) -> (..., C·E); of a pixel's first channels alone as well."""
        return F.embedding(levels + self.first_level[: levels.shape[-1]], self.table).flatten(-2)

    def by_place(self, at: Tensor) -> Tensor:
        """(B, D): what inputs at pixels `at` (B,) are told of where they are."""
        return self.row.index_select(0, at // len(self.column)) + self.column.index_select(0, at % len(self.column))

    def by_label(self, labels: Tensor) -> Tensor:
        """(B, D): what the inputs of images with these labels (B,) are told of them."""
        if self.label is None:
            return self.row.new_zeros(len(labels), self.row.shape[1])
        told: Tensor = self.label(labels.where(labels >= 0, self.label.num_embeddings - 1))
        return told

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Embedded images (B, H, W, C·E), labels (B,) -> features (B, H, W, D) of what is known before each pixel."""
        b, h, w, e = pixels.shape
        x = pixels.permute(0, 3, 1, 2)  # channels-last: (B, C·E, H, W)
        above = (2 * REACH + 1) * REACH * e
        up = self.look[:, :above].view(-1, REACH, 2 * REACH + 1, e).permute(0, 3, 1, 2)
        left = self.look[:, above:].view(-1, 1, REACH, e).permute(0, 3, 1, 2)
        seen = F.conv2d(F.pad(x, (REACH, REACH, REACH, -1)), up) + F.conv2d(F.pad(x, (REACH, -1, 0, 0)), left)
        seen = seen.permute(0, 2, 3, 1).flatten(1, 2)
        told = self.by_place(torch.arange(h * w, device=labels.device)) + self.by_label(labels)[:, None]
        features: Tensor = self.transformer(seen + told.to(seen.dtype))
        return features.view(b, h, w, -1)

    def logits(self, channel: int, features: Tensor, pixel: Tensor) -> Tensor:
        """Features (..., D) and embedded pixels, of which only the channels before are read -> (..., levels)."""
        known = channel * self.table.shape[1]
        logits: Tensor = self.heads[channel](torch.cat([features, pixel[..., :known]], dim=-1) if known else features)
        return logits


def _neighbours(height: int, width: int) -> Tensor:
    """(H·W, N) index of each pixel that an input sees, row by row from the top; H·W where it is beyond the edge."""
    above = [(i, j) for i in range(-REACH, 0) for j in range(-REACH, REACH + 1)]
    offsets = torch.tensor(above + [(0, j) for j in range(-REACH, 0)])  # (N, 2)
    at = torch.arange(height * width)
    i, j = (at[:, None] // width + offsets[:, 0]), (at[:, None] % width + offsets[:, 1])
    return torch.where((i >= 0) & (j >= 0) & (j < width), i * width + j, height * width)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class PixelRows(Rows):
    """Images half drawn, and what the transformer keeps of them. A tick draws one pixel, all of its channels."""

    label: Tensor  # (B,)
    added: Tensor  # (B, D): by the label, to the inputs
    temperature: Tensor  # (B, 1) float64
    top_k: Tensor  # (B,)
    uniforms: Tensor  # (B, H·W, C) float64: all the randomness of the image
    levels: Tensor  # (B, H·W, C)
    pixels: Tensor  # (B, H·W + 1, C·E): embedded; the last one stands for all that is beyond the edge
    cache: Cache


class Model(_protocol.Model, OnePassDensity, Localiser):
    """Samples in H·W ticks with a cache; scores in one pass, exactly, with the statistics of `models._pixels`."""

    statistic_names = _pixels.STATISTICS
    has_pixel_terms = True

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        pixels = space.height * space.width
        self.spec = Spec(
            family="pixel_transformer",
            image=dataclasses.replace(space, captions=False),
            steps=Steps(unit="pixel", min=pixels, default=pixels, max=pixels),
            likelihood=Likelihood(
                kind="exact",
                dequantisation="none",
                note="" if config.levels == 256 else f"of the image rounded to {config.levels} levels",
                heatmap_evaluations=1,
            ),
            temperature=Range(min=0.1, default=1.0, max=2.0),
            top_k=config.levels,
        )
        self.feature_sizes = _pixels.feature_sizes(space.height, space.width)
        self.network = Network(config, space)

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
        return {"transformer": list(self.parameters())}

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
        yield "transformer", loss, {"bits_per_dim": loss.detach() / math.log(2)}

    # sampler

    def init(self, draws: Sequence[Draw]) -> PixelRows:
        b, (c, h, w), device = len(draws), self.spec.image.shape, self.device
        seed = _random.seed_bits([draw.seed for draw in draws], device)
        sample = torch.tensor([draw.sample for draw in draws], device=device)
        label = torch.tensor([draw.label for draw in draws], device=device)
        top_k = [self.config.levels if draw.top_k is None else draw.top_k for draw in draws]
        return PixelRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.full((b,), h * w, device=device),
            label=label,
            added=self.network.by_label(label),
            temperature=torch.tensor([[draw.temperature] for draw in draws], dtype=torch.float64, device=device),
            top_k=torch.tensor(top_k, device=device),
            uniforms=_random.uniform(seed, sample, 0, 0, (h * w, c)).double().contiguous(),
            levels=torch.zeros(b, h * w, c, dtype=torch.int64, device=device),
            pixels=torch.zeros(b, h * w + 1, c * self.config.embedding, device=device),
            cache=self.network.transformer.cache(b),
        )

    def step(self, rows: PixelRows) -> PixelRows:
        """Draw the next pixel of every image, wherever it is."""
        net, (b, pixels, channels), e = self.network, rows.levels.shape, rows.pixels.shape[2]
        image = torch.arange(b, device=rows.tick.device)
        at = image * pixels + rows.tick  # in `levels` and `uniforms`, their dims 0 and 1 taken as one
        begin = image * (pixels + 1)  # of each image in `pixels`, taken likewise
        neighbours = net.neighbours.index_select(0, rows.tick) + begin[:, None]
        seen = rows.pixels.view(-1, e).index_select(0, neighbours.flatten()).view(b, -1)  # (B, N·C·E)
        h = torch.addmm(net.by_place(rows.tick) + rows.added, seen, net.look.mT)
        features = net.transformer.step(h, rows.cache, rows.tick)
        uniforms = rows.uniforms.view(-1, channels).index_select(0, at)
        drawn = rows.levels.new_empty(b, 0)
        for c in range(channels):
            logits = net.logits(c, features, net.embed(drawn) if c else features)
            drawn = torch.cat([drawn, choose(logits, uniforms.narrow(1, c, 1), rows.temperature, rows.top_k)], dim=1)
        rows.levels.view(-1, channels).index_copy_(0, at, drawn)
        rows.pixels.view(-1, e).index_copy_(0, begin + rows.tick, net.embed(drawn))
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

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
        terms = [_pixels.terms(self.network.logits(c, features, pixels), levels[..., c]) for c in range(x.shape[1])]
        log_prob, entropy = (torch.stack(part).sum(dim=0) for part in zip(*terms, strict=True))
        return log_prob, entropy


def _check(config: Config, space: ImageSpace) -> None:
    """What `Transformer` does not check itself."""
    for name in ("near", "embedding"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; a positive number is needed")
    if not config.layers or not set(config.layers) <= {"near", "column", "all"}:
        raise ValueError(f'layers: {config.layers}; one name at least, each "near", "column" or "all"')
    if not 2 <= config.levels <= 256:
        raise ValueError(f"levels: {config.levels} is not in 2 … 256, the grey levels that an 8-bit image can have")
    if not 0 <= config.label_dropout < 1:
        raise ValueError(f"label_dropout: {config.label_dropout} is not in [0, 1)")
    if min(space.shape) < 1:
        raise ValueError(f"space: an image of {space.width}×{space.height}×{space.channels} has no pixel")
