"""A generator of residual blocks whose norms are told what to draw: gains and biases are a linear map of (z, class
embedding) (conditional normalisation, arXiv 1802.05637, §4; with z, 1809.11096, §3.1).

Layer norm where the papers have batch norm, so an image never depends on its batch mates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models._nn import at_least


class SelfAttention(nn.Module):
    """x + γ · attention(x) over all positions, γ = 0 at first (arXiv 1805.08318, eq. 1–3). (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner, self.value = max(1, channels // 8), max(1, channels // 2)
        self.mix = nn.Conv2d(channels, 2 * self.inner + self.value, 1)  # f, g and h of the paper
        self.output = nn.Conv2d(self.value, channels, 1)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        f, g, v = self.mix(x).flatten(2).split([self.inner, self.inner, self.value], dim=1)  # (B, ·, HW) each
        # Written out, as the fused kernels have no second derivative, which the penalties need.
        attention = (f.transpose(1, 2) @ g).float().softmax(dim=1).to(v.dtype)  # (B, HW, HW): from i, to j
        attended: Tensor = self.output((v @ attention).view(b, self.value, h, w))
        return x + self.gamma * attended


class ConditionalNorm(nn.Module):
    """Layer norm over (C, H, W) of each row; gain and bias per channel are a linear map of the code (≥ B, code)."""

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        self.affine = nn.Linear(code, 2 * channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        affine: Tensor = self.affine(code)[: x.shape[0], :, None, None]
        gain, bias = affine.chunk(2, dim=1)  # (B, C, 1, 1) each
        normed: Tensor = F.group_norm(x, 1)
        return normed * (1 + gain) + bias


class GeneratorBlock(nn.Module):
    """Pre-activation residual block of two 3×3 convolutions with conditional norms. (B, C, H, W) -> the same."""

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = ConditionalNorm(channels, code), ConditionalNorm(channels, code)
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.relu(self.norm1(x, code)))
        h = self.conv2(F.relu(self.norm2(h, code)))
        return x + h


class GeneratorStage(nn.Module):
    """All that the generator does at one resolution. (B, channels, H, W) -> (B, target, H, W)."""

    def __init__(self, channels: int, target: int, code: int, blocks: int, attention: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(GeneratorBlock(channels, code) for _ in range(blocks))
        self.attention = SelfAttention(channels) if attention else nn.Identity()
        self.norm = ConditionalNorm(channels, code)
        self.conv = nn.Conv2d(channels, target, 3, padding=1)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, code)
        h: Tensor = self.conv(F.relu(self.norm(self.attention(x), code)))
        return h


class ResidualGenerator(nn.Module):
    """(z, y) -> image in [−1, 1], from the coarsest resolution up: a convolution and a pixel shuffle double it.

    shape               (C, H, W) of the image
    classes             number of labels; 0: none
    channels, blocks    width and residual blocks of each resolution, finest first
    latent, embedding   numbers of z and of the class
    attention           height of the feature map that a self-attention layer looks at; 0: none
    """

    noise_shapes: Sequence[tuple[int, ...]] = ()  # it adds none

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        channels: Sequence[int],
        blocks: Sequence[int],
        latent: int,
        embedding: int,
        attention: int = 0,
    ) -> None:
        super().__init__()
        colours, height, width = shape
        levels = len(channels)
        self.start_shape = (channels[-1], height >> (levels - 1), width >> (levels - 1))
        self.embedding = nn.Embedding(classes, embedding) if classes else None
        code = latent + (embedding if classes else 0)
        self.start = nn.Linear(code, math.prod(self.start_shape))
        self.stages = nn.ModuleList(
            GeneratorStage(
                channels[level],
                target=4 * channels[level - 1] if level else colours,
                code=code,
                blocks=blocks[level],
                attention=attention == height >> level,
            )
            for level in reversed(range(levels))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(
        self, z: Tensor, labels: Tensor, noise: Sequence[Tensor] = (), temperature: Tensor | None = None
    ) -> Tensor:
        """z (B, latent), labels (B,) all given where there are classes, temperature (B,) -> (B, C, H, W)."""
        z = z if temperature is None else z * temperature[:, None]
        code = z if self.embedding is None else torch.cat([z, self.embedding(labels)], dim=1)
        asked, rows = z.shape[0], at_least(2, z).shape[0]
        code = at_least(4, code)  # and two rows of maps: so an image alone comes out the same
        h = self.start(code)[:rows].view(-1, *self.start_shape).contiguous(memory_format=torch.channels_last)
        for i, stage in enumerate(self.stages):
            h = stage(F.pixel_shuffle(h, 2) if i else h, code)
        return torch.tanh(h)[:asked]
