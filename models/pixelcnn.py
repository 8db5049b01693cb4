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

Sampling with caches. The vertical features of an image row depend on the rows above only: they are computed for a
whole row when its first pixel is due, from the last rows that every layer keeps, and so is all that they tell the
horizontal stack. What remains of a pixel is one column of the horizontal stack, whose taps to the left are known
beforehand as well: one product for all layers. Only the taps at the pixel itself are taken layer by layer. This last
part is a hundred small products, and stands in C as well (`_pixelcnn.c`), where calling them costs nothing.

    B    rows: chains, images            E    numbers that stand for a level     L    layers; layer l has dilation d_l
    C    channels of the image, H × W    F    features
"""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _native, _pixels, _protocol, _random
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

REACH = 3  # how far the stacks' inputs look up, left and (above) right; a layer looks as far as its dilation
# A matrix library may take products of very few columns in another order of summation (MKL does for fewer than four):
# with fewer chains copies of the last fill up, so that a chain's logits are the same bits alone and in a crowd.
FEWEST = 4


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


def _windows(x: Tensor, taps: int, dilation: int) -> Tensor:
    """(..., W, K) -> (..., W, taps·K): what a centred window of that many columns sees, zeros beyond the edges."""
    margin, width = dilation * (taps // 2), x.shape[-2]
    padded = F.pad(x, (0, 0, margin, margin))
    return torch.cat([padded[..., k * dilation : k * dilation + width, :] for k in range(taps)], dim=-1)


class Network(nn.Module):
    """Pixels before -> features -> logits of a pixel's levels. Weights of all layers lie in one tensor, layer first.

    Each kernel is kept apart by what it looks at, since sampling takes some of its taps long before the others.
    """

    dilation: Tensor
    ring: Tensor
    behind: Tensor
    first_level: Tensor

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        f, e, n = config.features, space.channels * config.embedding, len(config.dilations)
        self.features, self.dilations = f, config.dilations
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

        # Where things lie in `PixelRows`: the rings of each layer, and the features a dilation to the left of a column.
        dilations = torch.tensor(config.dilations)
        constants = {
            "dilation": dilations,
            "ring": (dilations + 1).cumsum(0) - (dilations + 1),
            "behind": torch.arange(n) - n * dilations,
            "first_level": torch.arange(space.channels) * config.levels,
        }
        for name, constant in constants.items():
            self.register_buffer(name, constant, persistent=False)

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


class Head(nn.Module):
    """Features -> logits of a channel's levels."""

    def __init__(self, inputs: int, config: Config) -> None:
        super().__init__()
        self.first = _weight(config.hidden, inputs)
        self.first_bias = nn.Parameter(torch.zeros(config.hidden))
        self.last = _weight(config.levels, config.hidden, gain=0.5)
        self.last_bias = nn.Parameter(torch.zeros(config.levels))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_pixelcnn.c` takes them: matrices (inputs, outputs)."""
        return self.first.mT, self.first_bias, self.last.mT, self.last_bias

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.linear(features, self.first, self.first_bias).relu_()
        return F.linear(hidden, self.last, self.last_bias)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class PixelRows(Rows):
    """Images half drawn, and the caches of both stacks. A tick draws one pixel, all of its channels."""

    label: Tensor  # (B,)
    temperature: Tensor  # (B, 1) float64
    uniforms: Tensor  # (B, H·W, C) float64: all the randomness of the image
    levels: Tensor  # (B, H·W, C)
    # of the image rows above: vertical features, (B, Σ (d_l + 1), W, F). In layer l's ring those of image row i are at
    # i mod (d_l + 1), so that no row writes where it reads, and a tick can be taken again
    above: Tensor
    # of the image row that is being drawn, by column, after a margin of M columns of zeros
    told: Tensor  # (B, M + W, F + L·2F): from above, to the horizontal stack's input and to its gates
    pixels: Tensor  # (B, M + W, C·E): embedded
    past: Tensor  # (B, M + W, L·F): what entered each layer of the horizontal stack


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

    @property
    def _margin(self) -> int:
        return max(REACH, *self.config.dilations)

    def init(self, draws: Sequence[Draw]) -> PixelRows:
        b, (c, h, w), device = len(draws), self.spec.image.shape, self.device
        f, n, columns = self.config.features, len(self.config.dilations), self._margin + w
        seed = _random.seed_bits([draw.seed for draw in draws], device)
        sample = torch.tensor([draw.sample for draw in draws], device=device)
        temperature = torch.tensor([draw.temperature for draw in draws], dtype=torch.float64, device=device)
        return PixelRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.full((b,), h * w, device=device),
            label=torch.tensor([draw.label for draw in draws], device=device),
            temperature=temperature[:, None],
            uniforms=_random.uniform(seed, sample, 0, 0, (h * w, c)).double().contiguous(),
            levels=torch.zeros(b, h * w, c, dtype=torch.int64, device=device),
            above=torch.zeros(b, sum(self.config.dilations) + n, w, f, device=device),
            told=torch.zeros(b, columns, f + n * 2 * f, device=device),
            pixels=torch.zeros(b, columns, c * self.config.embedding, device=device),
            past=torch.zeros(b, columns, n * f, device=device),
        )

    def step(self, rows: PixelRows) -> PixelRows:
        """Draw the next pixel of every image, wherever it is."""
        ticks = rows.tick.tolist()
        first = [chain for chain, tick in enumerate(ticks) if tick % self.spec.image.width == 0]
        if first:
            self._begin_row(rows, torch.tensor(first, device=rows.tick.device))
        if not self._native_tick(rows):
            self._tick(rows, ticks)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def _native_tick(self, rows: PixelRows) -> bool:
        """The rest of a tick in C, as `_tick`; whether that could be done. Raises `FloatingPointError`."""
        native = _native.library("pixelcnn")
        if native is None:
            return False
        net, c = self.network, self.spec.image.channels
        heads = [part for head in net.heads for part in head.tensors()]
        tensors = (
            *(net.look_left.mT, net.past.mT, net.now.mT, net.out.mT, net.table),
            *(net.dilation, rows.tick, rows.temperature, rows.uniforms, rows.told, rows.pixels, rows.past, rows.levels),
        )
        if not _native.usable(*heads, *tensors):
            return False
        shape = (
            *(self.config.features, len(self.config.dilations), self.config.embedding, c),
            *(self.config.hidden, self.config.levels, REACH, self.spec.image.width, self.spec.image.height),
            *(rows.pixels.shape[1], self._margin, len(rows.tick)),
        )
        at = _native.addresses(*tensors)
        head_at = _native.addresses(*heads)
        pointers = (ctypes.c_void_p * (len(at) + 1))(*at[:5], ctypes.addressof(head_at), *at[5:])
        failed = native.tick((ctypes.c_int64 * len(shape))(*shape), pointers)
        if failed < 0:
            raise MemoryError("no memory for a tick")
        if failed:
            raise FloatingPointError(f"row {failed - 1}: the logits of a pixel are not numbers")
        return True

    def _tick(self, rows: PixelRows, ticks: list[int]) -> None:
        """What remains of a tick when the vertical stack has told what it knows: one column of the horizontal one."""
        net, f, n = self.network, self.config.features, len(self.config.dilations)
        width, margin = self.spec.image.width, self._margin
        b, columns, e = rows.pixels.shape
        together = ticks.count(ticks[0]) == b  # as after a request for several images: then a slice does for a gather
        if together:
            at = margin + ticks[0] % width
            told = rows.told[:, at]
            nearest = rows.pixels[:, at - REACH : at]
            behind = rows.past.view(b, columns * n, f).index_select(1, net.behind + at * n)
            uniforms = rows.uniforms[:, ticks[0]]
        else:
            chain = torch.arange(b, device=rows.tick.device)
            here = chain * columns + margin + rows.tick % width  # in the caches, their dims 0 and 1 taken as one
            pixel = chain * rows.levels.shape[1] + rows.tick
            told = rows.told.view(b * columns, -1).index_select(0, here)
            near = here[:, None] + torch.arange(-REACH, 0, device=here.device)
            nearest = rows.pixels.view(-1, e).index_select(0, near.flatten())
            behind = rows.past.view(-1, f).index_select(0, (here[:, None] * n + net.behind).flatten())
            uniforms = rows.uniforms.view(-1, rows.uniforms.shape[2]).index_select(0, pixel)

        told, nearest, behind = _fill(told), _fill(nearest.reshape(b, REACH * e)), _fill(behind.view(b, n, f))
        h = torch.addmm(told[:, :f], nearest, net.look_left.mT)  # (B, F)
        above = told[:, f:].view(-1, n, 2 * f)
        gates = torch.baddbmm(above.transpose(0, 1), behind.transpose(0, 1), net.past.mT)  # (L, B, 2F)
        entered = []
        for u, now, out in zip(gates.unbind(), net.now.mT.unbind(), net.out.mT.unbind(), strict=True):
            entered.append(h)
            h = torch.addmm(h, F.glu(u.addmm_(h, now), dim=1), out)
        past = torch.cat(entered, dim=1)[:b]
        levels, embedded = self._draw_pixel(h, uniforms, rows.temperature)

        if together:
            rows.past[:, at] = past
            rows.pixels[:, at] = embedded
            rows.levels[:, ticks[0]] = levels
        else:
            rows.past.view(b * columns, -1).index_copy_(0, here, past)
            rows.pixels.view(-1, e).index_copy_(0, here, embedded)
            rows.levels.view(-1, levels.shape[1]).index_copy_(0, pixel, levels)

    def _draw_pixel(self, h: Tensor, uniforms: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
        """Channel by channel, from features h (≥ B, F): levels (B, C) and what stands for them (B, C·E)."""
        net, (b, channels) = self.network, uniforms.shape
        levels = draw(net.logits(0, h, h)[:b], uniforms[:, :1], temperature)
        for c in range(1, channels):
            logits = net.logits(c, h, _fill(net.embed(levels)))[:b]
            levels = torch.cat([levels, draw(logits, uniforms[:, c : c + 1], temperature)], dim=1)
        return levels, net.embed(levels)

    def _begin_row(self, rows: PixelRows, at: Tensor) -> None:
        """The vertical stack over an image row, for the chains `at`, which are about to draw its first pixel."""
        net, f, n = self.network, self.config.features, len(self.config.dilations)
        b, (_, height, width) = len(at), self.spec.image.shape
        i = rows.tick.index_select(0, at) // width
        base = net.place.index_select(0, i) + net.by_label(rows.label.index_select(0, at))[:, None]  # (b, W, 2F)

        near = i[:, None] + torch.arange(-REACH, 0, device=i.device)  # image rows that the stack's input sees
        levels = rows.levels.view(len(rows.tick), height, width, -1)[at[:, None], near.clamp(min=0)]
        seen = net.embed(levels) * (near >= 0)[:, :, None, None]  # (b, REACH, W, C·E)
        seen = _windows(seen.transpose(1, 2).flatten(2), 2 * REACH + 1, 1)
        v = F.linear(seen, net.look_up) + base[..., :f]  # (b, W, F)

        before, place = ((i[:, None] - d) % (net.dilation + 1) + net.ring for d in (net.dilation, 0))  # (b, L)
        upper = rows.above[at[:, None], before].unbind(dim=1)
        seen = torch.stack([_windows(row, 3, d).flatten(0, 1) for row, d in zip(upper, net.dilations, strict=True)])
        gates = torch.baddbmm(net.vertical_bias[:, None], seen, net.up.mT)  # (L, b·W, 2F)
        entered, found = [], []
        for u, across, d in zip(gates.unbind(), net.across.mT.unbind(), net.dilations, strict=True):
            entered.append(v)
            v = v + F.glu(torch.addmm(u, _windows(v, 3, d).flatten(0, 1), across), dim=1).view(b, width, f)
            found.append(v)
        rows.above[at[:, None], place] = torch.stack(entered, dim=1)

        gates = torch.baddbmm(net.horizontal_bias[:, None], torch.stack(found).flatten(1, 2), net.down.mT)
        told = torch.cat([base[..., f:], gates.transpose(0, 1).reshape(b, width, n * 2 * f)], dim=2)
        rows.told[at, self._margin :] = told

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


def draw(logits: Tensor, uniforms: Tensor, temperature: Tensor) -> Tensor:
    """Levels (B, K) from the softmax of logits (B, levels) / temperature (B, 1): the quantiles at uniforms (B, K).

    Uniforms and temperature are float64, the uniforms midpoints on (0, 1) of float32's steps. In float64 the
    distribution function is monotone and ends above any of them: the level is always in range and possible.

    Logits that differ in their last bits give another level only where a uniform falls between the two values of the
    distribution function. Between the cached and the naive sampler, whose sums have another order, that befell five of
    a million pixels (float32, a trained model of 28×28 images). Between a chain alone and the same in a crowd it can be
    only where the device's matrix library lets a row of a product depend on how many there are: see FEWEST.
    """
    cumulative = (logits / temperature).softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(cumulative.contiguous(), uniforms.contiguous(), right=True)


def _fill(part: Tensor) -> Tensor:
    """(b, ...) -> (≥ FEWEST, ...): the last row repeated."""
    missing = FEWEST - len(part)
    return part if missing <= 0 else torch.cat([part, part[-1:].expand(missing, *part.shape[1:])])


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
