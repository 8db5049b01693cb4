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
beforehand as well: one product for all layers. Only the taps at the pixel itself are taken layer by layer.

    B    rows: chains, images            E    numbers that stand for a level     L    layers; layer l has dilation d_l
    C    channels of the image, H × W    F    features
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _protocol, _random
from models._protocol import Batch, Draw, ImageSpace, Likelihood, OnePassDensity, Range, Rows, Score, Spec, Steps

REACH = 3  # how far the stacks' inputs look up, left and (above) right; a layer looks as far as its dilation
NOT_YET = 0.5  # what a preview shows where no pixel has been drawn


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
    """(..., outputs, inputs)"""
    return nn.Parameter(torch.randn(shape) * (gain / math.sqrt(shape[-1])))


def _kernel(weight: Tensor, rows: int, columns: int) -> Tensor:
    """A convolution's kernel (outputs, inputs, rows, columns) out of weight (outputs, columns · rows · inputs)."""
    return weight.view(len(weight), columns, rows, -1).permute(0, 3, 2, 1)


def _windows(x: Tensor, taps: int, dilation: int) -> Tensor:
    """(B, W, K) -> (B, W, taps·K): what a centred window of that many columns sees, zeros beyond the edges."""
    margin = dilation * (taps // 2)
    padded = F.pad(x, (0, 0, margin, margin))
    return torch.cat([padded[:, k * dilation :][:, : x.shape[1]] for k in range(taps)], dim=2)


class Network(nn.Module):
    """Pixels before -> features -> logits of a pixel's levels. Weights of all layers lie in one tensor, layer first."""

    slots: Tensor
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
        self.above = _weight(f, (2 * REACH + 1) * REACH * e, gain=math.sqrt(2))  # inputs: columns, rows, channels
        self.left = _weight(f, REACH * e, gain=math.sqrt(2))  # inputs: columns, channels
        self.vertical = _weight(n, 2 * f, 3 * 2 * f)  # inputs: columns, rows, features
        self.vertical_bias = nn.Parameter(torch.zeros(n, 2 * f))
        self.down = _weight(n, 2 * f, f, gain=math.sqrt(0.5))  # from the vertical stack to the horizontal
        self.past = _weight(n, 2 * f, f, gain=math.sqrt(0.5))  # the horizontal kernel's tap to the left
        self.now = _weight(n, 2 * f, f, gain=math.sqrt(0.5))  # and the one at the pixel itself
        self.horizontal_bias = nn.Parameter(torch.zeros(n, 2 * f))
        self.out = _weight(n, f, f, gain=0.5)
        self.heads = nn.ModuleList(_head(f + c * config.embedding, config) for c in range(space.channels))
        self.register_buffer("first_level", torch.arange(space.channels) * config.levels, persistent=False)
        # In a row of `PixelRows.past`: where each layer keeps column 0, and the column a dilation before it.
        margin = max(config.dilations)
        slots = torch.arange(n) * (margin + space.width) + margin
        self.register_buffer("slots", slots, persistent=False)
        self.register_buffer("behind", slots - torch.tensor(config.dilations), persistent=False)

    def embed(self, levels: Tensor) -> Tensor:
        """Levels (..., C) -> (..., C·E)."""
        return F.embedding(levels + self.first_level, self.table).flatten(-2)

    def told(self, labels: Tensor) -> Tensor:
        """(B, 2F): what labels (B,) add to the inputs of the vertical and of the horizontal stack."""
        if self.label is None:
            return self.place.new_zeros(len(labels), 2 * self.features)
        told: Tensor = self.label(labels.where(labels >= 0, self.label.num_embeddings - 1))
        return told

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        """Embedded images (B, H, W, C·E), labels (B,) -> features (B, H, W, F) of what is known before each pixel."""
        f = self.features
        x = pixels.permute(0, 3, 1, 2)  # channels-last: (B, C·E, H, W)
        v = F.conv2d(F.pad(x, (REACH, REACH, REACH, -1)), _kernel(self.above, REACH, 2 * REACH + 1))
        h = F.conv2d(F.pad(x, (REACH, -1, 0, 0)), _kernel(self.left, 1, REACH))
        base = (self.place + self.told(labels)[:, None, None]).to(v.dtype).permute(0, 3, 1, 2)
        v, h = v + base[:, :f], h + base[:, f:]
        beside = torch.cat([self.past, self.now], dim=2)
        weights = (self.vertical, self.vertical_bias, self.down, beside, self.horizontal_bias, self.out)
        layers = zip(*(weight.unbind() for weight in weights), strict=True)
        for d, (above, v_bias, down, left, h_bias, out) in zip(self.dilations, layers, strict=True):
            v = v + gate(F.conv2d(F.pad(v, (d, d, d, 0)), _kernel(above, 2, 3), v_bias, dilation=d))
            u = F.conv2d(v, _kernel(down, 1, 1)) + F.conv2d(
                F.pad(h, (d, 0, 0, 0)), _kernel(left, 1, 2), h_bias, dilation=d
            )
            h = h + F.conv2d(gate(u), _kernel(out, 1, 1))
        return h.permute(0, 2, 3, 1)

    def logits(self, channel: int, features: Tensor, pixel: Tensor) -> Tensor:
        """Features (..., F) and embedded pixels, of which only the channels before are read -> (..., levels)."""
        known = channel * self.table.shape[1]
        logits: Tensor = self.heads[channel](torch.cat([features, pixel[..., :known]], dim=-1) if known else features)
        return logits


def _head(inputs: int, config: Config) -> nn.Sequential:
    last = nn.Linear(config.hidden, config.levels)
    nn.init.normal_(last.weight, std=0.5 / math.sqrt(config.hidden))
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, config.hidden), nn.ReLU(), last)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class PixelRows(Rows):
    """Images half drawn, and the caches of both stacks. A tick draws one pixel, all of its channels."""

    label: Tensor  # (B,)
    temperature: Tensor  # (B,) float64
    uniforms: Tensor  # (B, H·W, C): all the randomness of the image
    levels: Tensor  # (B, H·W, C)
    rows: Tensor  # (B, REACH, W, C·E): embedded pixels of the image rows above
    row: Tensor  # (B, REACH + W, C·E): of the row that is being drawn, after a margin of zeros
    above: tuple[Tensor, ...]  # per layer (B, d_l + 1, W, F): vertical features of image row i at i mod (d_l + 1)
    below: Tensor  # (B, W, F + L·2F): what the row's features start from and what its gates are told from above
    past: Tensor  # (B, L, max d + W, F): horizontal features of the row that is being drawn, after a margin of zeros


class Model(_protocol.Model, OnePassDensity):
    """Samples in H·W ticks with caches; scores in one pass, exactly.

    Statistics of a score, which cost no further pass. The surprise of a pixel is −log p_i less what was to be expected,
    the entropy of p(· | x_<i); over images that the model itself draws, surprises have mean zero and are uncorrelated.

        entropy            nats, Σ_i entropy of p(x_i | x_<i): the -log_prob to be expected
        worst_tile         nats, largest surprise of a tile of TILE × TILE pixels
        autocorrelation    nats², mean product of a pixel's surprise with its right and lower neighbour's
    """

    TILE = 4

    statistic_names = ("entropy", "worst_tile", "autocorrelation")
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
            ),
            temperature=Range(min=0.1, default=1.0, max=2.0),
        )
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

    def init(self, draws: Sequence[Draw]) -> PixelRows:
        b, (c, h, w), device = len(draws), self.spec.image.shape, self.device
        f, d = self.config.features, self.config.dilations
        e = c * self.config.embedding
        seed = _random.seed_bits([draw.seed for draw in draws], device)
        sample = torch.tensor([draw.sample for draw in draws], device=device)
        return PixelRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.full((b,), h * w, device=device),
            label=torch.tensor([draw.label for draw in draws], device=device),
            temperature=torch.tensor([draw.temperature for draw in draws], dtype=torch.float64, device=device),
            uniforms=_random.uniform(seed, sample, 0, 0, (h * w, c)),
            levels=torch.zeros(b, h * w, c, dtype=torch.int64, device=device),
            rows=torch.zeros(b, REACH, w, e, device=device),
            row=torch.zeros(b, REACH + w, e, device=device),
            above=tuple(torch.zeros(b, layer + 1, w, f, device=device) for layer in d),
            below=torch.zeros(b, w, f + len(d) * 2 * f, device=device),
            past=torch.zeros(b, len(d), max(d) + w, f, device=device),
        )

    def step(self, rows: PixelRows) -> PixelRows:
        """Draw the next pixel of every image; wherever they stand."""
        net, f, n = self.network, self.config.features, len(self.config.dilations)
        b, width = rows.below.shape[:2]
        column = rows.tick % width
        first = (column == 0).nonzero().flatten()
        if len(first) > 0:
            self._begin_row(rows, first)

        chain = torch.arange(b, device=column.device)
        here = chain * (REACH + width) + column
        window = (here[:, None] + torch.arange(REACH, device=column.device)).flatten()
        beside = rows.row.view(-1, rows.row.shape[2]).index_select(0, window).view(b, -1)  # (B, REACH·C·E)
        below = rows.below.view(b * width, -1).index_select(0, chain * width + column)
        h = torch.addmm(below[:, :f], beside, net.left.mT)  # (B, F)

        past = rows.past.view(-1, f)
        in_past = (chain * (past.shape[0] // b) + column)[:, None]
        behind = past.index_select(0, (in_past + net.behind).flatten()).view(b, n, f)
        gates = torch.baddbmm(below[:, f:].view(b, n, 2 * f).transpose(0, 1), behind.transpose(0, 1), net.past.mT)
        seen = []
        for u, now, out in zip(gates.unbind(), net.now.mT.unbind(), net.out.mT.unbind(), strict=True):
            seen.append(h)
            h = torch.addmm(h, F.glu(torch.addmm(u, h, now), dim=1), out)
        past.index_copy_(0, (in_past + net.slots).flatten(), torch.stack(seen, dim=1).view(-1, f))

        pixel = h.new_empty(b, 0)
        uniforms = rows.uniforms[chain, rows.tick]
        levels = []
        for c in range(uniforms.shape[1]):
            level = draw(net.logits(c, h, pixel), uniforms[:, c], rows.temperature)
            pixel = torch.cat([pixel, F.embedding(level + c * self.config.levels, net.table)], dim=1)
            levels.append(level)
        rows.levels[chain, rows.tick] = torch.stack(levels, dim=1)
        rows.row.view(-1, rows.row.shape[2]).index_copy_(0, here + REACH, pixel)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def _begin_row(self, rows: PixelRows, at: Tensor) -> None:
        """The vertical stack over an image row, for the chains `at`, which are about to draw its first pixel."""
        net, f = self.network, self.config.features
        i = rows.tick[at] // rows.below.shape[1]
        inputs = torch.cat([rows.rows[at, 1:], rows.row[at, None, REACH:]], dim=1)  # (b, REACH, W, C·E)
        rows.rows = rows.rows.index_copy(0, at, inputs)  # not in place: a step may be taken again
        base = net.place[i] + net.told(rows.label[at])[:, None]  # (b, W, 2F)
        seen = _windows(inputs.transpose(1, 2).flatten(2), 2 * REACH + 1, 1)
        v = F.linear(seen, net.above) + base[..., :f]  # (b, W, F)
        found = []
        for cache, d, weight, bias in zip(rows.above, net.dilations, net.vertical, net.vertical_bias, strict=True):
            both = torch.cat([cache[at, (i - d) % (d + 1)], v], dim=2)  # (b, W, 2F): image rows i − d and i
            cache[at, i % (d + 1)] = v
            v = v + F.glu(F.linear(_windows(both, 3, d), weight, bias))
            found.append(v)
        gates = torch.einsum("lbwf,lgf->bwlg", torch.stack(found), net.down) + net.horizontal_bias
        rows.below[at] = torch.cat([base[..., f:], gates.flatten(2)], dim=2)

    def image(self, rows: PixelRows) -> Tensor:
        c, h, w = self.spec.image.shape
        top = self.config.levels - 1
        grid = rows.levels.to(torch.float32) if top == 255 else (rows.levels * (255 / top)).round()
        drawn = torch.arange(h * w, device=rows.tick.device) < rows.tick[:, None]
        x = torch.where(drawn[:, :, None], grid / 255, NOT_YET)
        return x.view(-1, h, w, c).permute(0, 3, 1, 2)

    # density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        log_prob, entropy = self.pixel_terms(x, labels)
        surprise = -log_prob - entropy
        return Score(
            log_prob=log_prob.sum(dim=(1, 2)),
            per_pixel=log_prob,
            statistics={
                "entropy": entropy.sum(dim=(1, 2)),
                "worst_tile": _tiles(surprise, self.TILE).amax(dim=(1, 2)),
                "autocorrelation": _neighbour_product(surprise),
            },
        )

    def pixel_terms(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x_i | x_<i, label) and the entropy of p(· | x_<i, label), both (B, H, W) nats, summed over channels.

        x (B, C, H, W), labels (B,). Differentiable in the weights; not in x, of which only the levels are read.
        """
        levels = self._levels(x)
        pixels = self.network.embed(levels)
        features = self.network(pixels, labels)
        log_prob, entropy = torch.zeros(2, *features.shape[:3], device=x.device)
        for c in range(levels.shape[-1]):
            log_probs = self.network.logits(c, features, pixels).float().log_softmax(dim=-1)  # (B, H, W, levels)
            log_prob = log_prob + log_probs.gather(-1, levels[..., c, None])[..., 0]
            entropy = entropy - (log_probs.exp() * log_probs).sum(dim=-1)
        return log_prob, entropy


def draw(logits: Tensor, uniforms: Tensor, temperature: Tensor) -> Tensor:
    """Levels (B,) from the softmax of logits (B, levels) / temperature (B,): the quantiles at uniforms (B,).

    In float64 the distribution function is monotone and ends above what a uniform on (0, 1) asks for: the level is
    always in range and possible. Logits that differ in their last bits, as float32 products of other batch sizes may,
    give another level only where the uniform falls between the two values of the distribution function.
    """
    cumulative = (logits.double() / temperature[:, None]).softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(cumulative, uniforms.double()[:, None] * cumulative[:, -1:], right=True)[:, 0]


def _tiles(terms: Tensor, size: int) -> Tensor:
    """Sums of terms (B, H, W) over tiles of size × size; those at the right and lower edge may be cut."""
    return F.avg_pool2d(terms[:, None], size, ceil_mode=True, divisor_override=1)[:, 0]


def _neighbour_product(terms: Tensor) -> Tensor:
    """(B,) mean over terms (B, H, W) of a value times its right or lower neighbour; 0 for a single pixel."""
    right, lower = terms[..., 1:] * terms[..., :-1], terms[:, 1:] * terms[:, :-1]
    pairs = right[0].numel() + lower[0].numel()
    return (right.sum(dim=(1, 2)) + lower.sum(dim=(1, 2))) / max(1, pairs)


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
