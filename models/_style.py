"""A generator that is steered by styles (StyleGAN2, Karras et al., arXiv 1912.04958).

A mapping network turns a latent code, and what the image is to show, into a style w, which scales the input channels
of every convolution; at each resolution the layers add noise of their own and an image of that resolution, and the
images are summed up (skip connections, §4.1). Given a caption, feature maps below the full resolution also look at
its words (GigaGAN, arXiv 2303.05511, §3.2).

What differs from the paper: no style mixing and no path length regularisation; bilinear upsampling with no further
filter; weights as they are in place of equalised learning rates; truncation goes towards the mean style of what the
image is to show, not of all images; given captions, the first feature map is a constant plus a linear map of the style;
and a tanh keeps the image in [−1, 1].

    symbol      variable        meaning
    z, w        z, w            latent code (B, latent), style (B, width)
    s           s               scales of a convolution's input channels, an affine map of w
    σ           demodulation    1 / σ_j = (Σ s_i² w_ijk²)^−½                                            eq. 3
    ψ           temperature     w̄ + ψ (w − w̄), the truncation of 1812.04948, §B
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _random
from models._text import Text, TextAttention, TextEncoder

MEAN_OF = 64  # latent codes that the mean style is taken over


class ModulatedConv(nn.Module):
    """A convolution whose weights are scaled by a style for each row: (B, inputs, H, W) -> (B, outputs, H, W).

    Scaling the weights' input channels is scaling the input; demodulation, which divides the weights of each output by
    their norm, is scaling the output. So rows of all styles share one convolution.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, width: int, demodulate: bool = True) -> None:
        super().__init__()
        self.demodulate = demodulate
        self.weight = nn.Parameter(torch.randn(outputs, inputs, kernel, kernel) / math.sqrt(inputs * kernel**2))
        self.affine = nn.Linear(width, inputs)
        nn.init.normal_(self.affine.weight, std=width**-0.5)
        nn.init.ones_(self.affine.bias)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        s = self.affine(w)  # (B, inputs)
        y = F.conv2d(x * s[:, :, None, None].to(x.dtype), self.weight, padding=self.weight.shape[2] // 2)
        if self.demodulate:
            y = y * self.demodulation(s)[:, :, None, None].to(y.dtype)
        return y

    def demodulation(self, s: Tensor) -> Tensor:
        """(B, outputs) float32: one over the norm of each output's weights."""
        with torch.autocast(s.device.type, enabled=False):
            return torch.rsqrt(s.float().square() @ self.weight.square().sum(dim=(2, 3)).T + 1e-8)


class StyledLayer(nn.Module):
    """A modulated 3×3 convolution, noise (B, 1, H, W) at a learnt strength, bias, leaky ReLU of unit gain."""

    def __init__(self, inputs: int, outputs: int, width: int) -> None:
        super().__init__()
        self.conv = ModulatedConv(inputs, outputs, 3, width)
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor) -> Tensor:
        x = self.conv(x, w)
        x = x + (self.strength * noise).to(x.dtype) + self.bias[:, None, None].to(x.dtype)
        return F.leaky_relu(x, 0.2) * math.sqrt(2)


class StyledStage(nn.Module):
    """All that happens at one resolution: layers, a look at the caption, and what is added to the image."""

    def __init__(self, inputs: int, channels: int, layers: int, colours: int, width: int, text: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(StyledLayer(c, channels, width) for c in [inputs, *[channels] * (layers - 1)])
        self.words = TextAttention(channels, text) if text else None
        self.to_image = ModulatedConv(channels, colours, 1, width, demodulate=False)
        self.bias = nn.Parameter(torch.zeros(colours))

    def forward(self, x: Tensor, w: Tensor, noise: Sequence[Tensor], text: Text | None) -> tuple[Tensor, Tensor]:
        """The features, and this resolution's part of the image (B, colours, H, W) float32."""
        for i, (layer, own) in enumerate(zip(self.layers, noise, strict=True)):
            x = layer(x, w, own)
            if i == 0 and self.words is not None and text is not None:
                x = self.words(x, text)
        return x, self.to_image(x, w).float() + self.bias[:, None, None]


class Mapping(nn.Module):
    """(z, what the image is to show) -> w: a perceptron; z comes normalised to the length √latent."""

    def __init__(self, latent: int, told: int, width: int, layers: int) -> None:
        super().__init__()
        widths = [latent + told, *[width] * layers]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, a=0.2, nonlinearity="leaky_relu")  # type: ignore[arg-type]

    def forward(self, z: Tensor, told: Tensor) -> Tensor:
        w = torch.cat([z * torch.rsqrt(z.square().mean(dim=-1, keepdim=True) + 1e-8), told.to(z.dtype)], dim=-1)
        for layer in self.layers:
            w = F.leaky_relu(layer(w), 0.2)
        return w


class StyleGenerator(nn.Module):
    """(z, condition, noise) -> image in [−1, 1].

    shape           (C, H, W) of the image
    channels        at each resolution, finest first
    latent, width   numbers of z and of w
    layers          of the mapping network
    told            what embeds the condition: labels by an `nn.Embedding`, ids of captions by a `TextEncoder`, which
                    no gradient reaches from here
    noise_shapes    (1, H, W) of what each layer adds, in order
    """

    centres: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        channels: Sequence[int],
        latent: int,
        width: int,
        layers: int,
        told: nn.Embedding | TextEncoder | None,
    ) -> None:
        super().__init__()
        colours, height, wide = shape
        levels = len(channels)
        self.told = told
        text = told.token.embedding_dim if isinstance(told, TextEncoder) else 0
        self.mapping = Mapping(
            latent, text or (told.embedding_dim if isinstance(told, nn.Embedding) else 0), width, layers
        )
        self.start = nn.Parameter(torch.randn(1, channels[-1], height >> (levels - 1), wide >> (levels - 1)))
        # Styles scale channels, which says little of what lies where: the layout of a described scene is a map.
        self.layout = nn.Linear(width, self.start.numel()) if text else None
        self.stages = nn.ModuleList(
            StyledStage(
                channels[min(level + 1, levels - 1)],
                channels[level],
                layers=1 if level == levels - 1 else 2,
                colours=colours,
                width=width,
                text=text if level else 0,
            )
            for level in reversed(range(levels))
        )
        self.layers_at = [1, *[2] * (levels - 1)]
        self.noise_shapes = [
            (1, height >> level, wide >> level)
            for level, n in zip(reversed(range(levels)), self.layers_at, strict=True)
            for _ in range(n)
        ]
        zero = torch.zeros(MEAN_OF, dtype=torch.int64)
        centres = _random.normal(zero, torch.arange(MEAN_OF), 0, 0, (latent,))
        self.register_buffer("centres", centres, persistent=False)

    def forward(
        self, z: Tensor, condition: Tensor, noise: Sequence[Tensor], temperature: Tensor | None = None
    ) -> Tensor:
        """z (B, latent), condition labels (B,) or ids (B, L), noise by `noise_shapes` (B, 1, H, W) each, temperature
        (B,), which truncates styles -> (B, C, H, W)."""
        vector, text = self._look_up(condition, z)
        w = self.mapping(z, vector)
        if temperature is not None:
            psi = temperature[:, None].to(w.dtype)  # styles are less than float32 under autocast
            w = torch.where(psi == 1, w, torch.lerp(self._mean_style(vector), w, psi))
        x = self.start.expand(len(z), -1, -1, -1)
        if self.layout is not None:
            x = x + self.layout(w).float().view_as(x)
        x = x.contiguous(memory_format=torch.channels_last)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        image: Tensor | None = None
        rest = list(noise)
        for stage, layers in zip(self.stages, self.layers_at, strict=True):
            x = x if image is None else _doubled(x)
            x, part = stage(x, w, rest[:layers], text)
            image, rest = part if image is None else _doubled(image) + part, rest[layers:]
        assert image is not None
        return torch.tanh(image)

    def mean_style(self, condition: Tensor) -> Tensor:
        """(B, width): w̄ of conditions (B, ...), the mean over the same latent codes for all."""
        return self._mean_style(self._look_up(condition, self.centres[:1].expand(len(condition), -1))[0])

    def _mean_style(self, vector: Tensor) -> Tensor:
        b, k = len(vector), len(self.centres)
        each: Tensor = self.mapping(self.centres.expand(b, -1, -1), vector[:, None].expand(-1, k, -1))
        return each.mean(dim=1)

    def _look_up(self, condition: Tensor, z: Tensor) -> tuple[Tensor, Text | None]:
        """What the mapping is told (B, ·), and the caption's words where there is one."""
        if self.told is None:
            return z.new_zeros(len(z), 0), None
        if isinstance(self.told, TextEncoder):
            with torch.no_grad():  # it is learnt by the critic
                text: Text = self.told(condition)
            return text.sentence, text
        vector: Tensor = self.told(condition)
        return vector, None


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
