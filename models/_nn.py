"""Network blocks that families share: what two of them would write alike. What is a family's own is in its file."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _rows

# ---------------------------------------------------------------------------------------------------------------- U-Net


def image_norm(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Group norm of one group: each image alone, over all its channels and pixels.

    One group, because torch's CPU kernel for several takes ten times as long on channels-last feature maps.
    """
    return nn.GroupNorm(1, channels, eps=1e-6, affine=affine)


def sinusoids(t: Tensor, channels: int) -> Tensor:
    """t (B,) of order one -> (B, channels): cosines and sines of 1000 t at geometric frequencies (1706.03762, §3.5)."""
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, device=t.device, dtype=torch.float32) * (-math.log(10_000.0) / half))
    angles = 1000.0 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Conditioning(nn.Module):
    """(t, labels) -> (B, width): what every block of a U-Net is told. The last embedding is "no label"."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.width = width
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.label = nn.Embedding(classes + 1, width) if classes else None

    def forward(self, t: Tensor, labels: Tensor) -> Tensor:
        told: Tensor = self.time(sinusoids(t, self.width))
        if self.label is not None:
            told = told + self.label(labels.where(labels >= 0, self.label.num_embeddings - 1))
        return F.silu(told)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the condition scales and shifts the second norm (AdaGN, arXiv 2105.05233)."""

    def __init__(self, inputs: int, outputs: int, condition: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = image_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * outputs)
        self.norm2 = image_norm(outputs, affine=False)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.modulation(condition)[: x.shape[0], :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        out: Tensor = self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))
        return out


class Attention(nn.Module):
    """Self-attention over the pixels of a feature map, around a shortcut. (B, C, H, W) -> (B, C, H, W)"""

    def __init__(self, channels: int, head_channels: int = 32) -> None:
        super().__init__()
        most = max(1, channels // head_channels)
        self.heads = next(n for n in range(most, 0, -1) if channels % n == 0)
        self.norm = image_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zeroed(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 1).reshape(b, h * w, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, H·W, C / heads) each
        weights = torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1)
        mixed = weights @ v
        out: Tensor = x + self.out(mixed.transpose(1, 2).reshape(b, h, w, c).permute(0, 3, 1, 2))
        return out


class UNetLevel(nn.Module):
    """The blocks of one resolution on one side of the U, each followed by attention where the level has it."""

    def __init__(self, inputs: list[int], outputs: int, condition: int, attention: bool, dropout: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(i, outputs, condition, dropout) for i in inputs)
        self.attention = nn.ModuleList(Attention(outputs) if attention else nn.Identity() for _ in inputs)

    def forward(self, h: Tensor, condition: Tensor, twins: Sequence[Tensor] = ()) -> list[Tensor]:
        """Every block's output. twins: going up, the outputs of this level going down; the last comes first."""
        outputs = []
        for i, (block, attention) in enumerate(zip(self.blocks, self.attention, strict=True)):
            h = attention(block(torch.cat([h, twins[-1 - i]], dim=1) if twins else h, condition))
            outputs.append(h)
        return outputs


class UNet(nn.Module):
    """U-Net of residual blocks, conditioned on a time and a label (arXiv 2006.11239, appendix B; 2105.05233).

    Level i works at 1 / 2^i of the image's resolution (rounded up: any size goes) with channels · multipliers[i]
    channels. Going down, every block's output is kept and given to its twin going up.

    in_channels, out_channels    of the image that comes in and of what goes out; the output begins at zero
    channels, multipliers        width of each level
    blocks                       residual blocks of each level, on each side
    attention                    levels whose blocks are each followed by attention; the middle has it always
    classes                      number of labels; 0: none
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int = 1,
        attention: tuple[int, ...] = (),
        classes: int = 0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        widths = [channels * m for m in multipliers]
        condition = 4 * channels
        self.deepest = widths[-1]  # channels of the coarsest level
        self.conditioning = Conditioning(condition, classes)
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            UNetLevel([w] * blocks, w, condition, i in attention, dropout) for i, w in enumerate(widths)
        )
        self.downsample = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in pairwise(widths))
        self.middle = ResidualBlock(widths[-1], widths[-1], condition, dropout)
        self.middle_attention = Attention(widths[-1])
        self.up = nn.ModuleList(
            UNetLevel([2 * w] * blocks, w, condition, i in attention, dropout) for i, w in enumerate(widths)
        )
        self.upsample = nn.ModuleList(nn.Conv2d(b, a, 1) for a, b in pairwise(widths))
        self.out_norm = image_norm(widths[0])
        self.out = zeroed(nn.Conv2d(widths[0], out_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """x (B, in_channels, H, W), t (B,) of order one, labels (B,), -1: none -> (B, out_channels, H, W) float32."""
        return self.with_middle(x, t, labels)[0]

    def with_middle(self, x: Tensor, t: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`; and what the coarsest level ends with, before the way up: (B, channels · multipliers[-1], H',
        W'), the most abstract that the network knows of the image."""
        asked, x = x.shape[0], at_least(2, x)
        told = self.conditioning(at_least(4, t), at_least(4, labels))
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 is coarser than the last noise of an image
            h = self.stem(x.contiguous(memory_format=torch.channels_last))
        if torch.is_autocast_enabled(x.device.type):
            h = h.to(torch.get_autocast_dtype(x.device.type))
        kept: list[list[Tensor]] = []
        for i, level in enumerate(self.down):
            kept.append(level(self.downsample[i - 1](h) if i else h, told))
            h = kept[-1][-1]
        h = middle = self.middle_attention(self.middle(h, told))
        for i, level in reversed(list(enumerate(self.up))):
            h = level(h, told, kept[i])[-1]
            if i:
                h = F.interpolate(self.upsample[i - 1](h), size=kept[i - 1][-1].shape[-2:])
        h = F.silu(self.out_norm(h))
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = self.out(h.float())
        return out[:asked], middle[:asked]


def at_least(rows: int, x: Tensor) -> Tensor:
    """x with its last row repeated until there are so many.

    On CPUs, convolutions of one row and matrix products of fewer than four have kernels of their own that round
    otherwise, and what becomes of a row must not depend on how many others there are.
    """
    missing = rows - x.shape[0]  # not len(x), which would make an exported network one for a single batch size
    return x if missing <= 0 else torch.cat([x, x[-1:].expand(missing, *x.shape[1:])])


def zeroed(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with weights and bias of zero: a residual branch that begins as the identity."""
    nn.init.zeros_(layer.weight)
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)
    return layer


# ------------------------------------------------------------------------------------------------------------- guidance


def concerned(mask: Tensor) -> Tensor:
    """Indices of the rows where mask (B,) holds; of all rows where one would have to wait for a device to know."""
    return mask.nonzero()[:, 0] if mask.device.type == "cpu" else torch.arange(len(mask), device=mask.device)


def guided(
    network: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, t: Tensor, labels: Tensor, scale: Tensor
) -> Tensor:
    """Classifier-free guidance per row (arXiv 2207.12598): out_u + scale · (out_c − out_u), in one call of the network.

    scale (B,): 1 is the plain conditional model, 0 the model without a label, more than 1 goes beyond the condition; it
    means nothing to a row without a label. The batch is [all rows; without a label once more the `concerned` rows];
    where the first part is of a size that floats do not depend on, so is the second, filled up with its last row.
    """
    twice = concerned((labels >= 0) & (scale != 1))
    if len(twice) == 0:
        return network(x, t, labels)
    if len(x) % _rows.ROW_MULTIPLE == 0 or len(x) < _rows.ROW_MULTIPLE:
        twice = _rows.filled(twice, min(_rows.ROW_MULTIPLE, len(x)))
    both = network(torch.cat([x, x[twice]]), torch.cat([t, t[twice]]), torch.cat([labels, torch.full_like(twice, -1)]))
    conditional, unconditional = both[: len(x)], both[len(x) :]
    strength = scale[twice].view(-1, *(1,) * (x.dim() - 1))
    return conditional.index_copy(0, twice, torch.lerp(unconditional, conditional[twice], strength))
