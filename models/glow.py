"""Glow: a multi-scale flow whose step is activation normalisation, an invertible 1×1 convolution and an affine coupling
(Kingma and Dhariwal, arXiv 1807.03039), class-conditional.

What differs from the paper: labels reach the couplings too, not the prior alone, as learnt maps beside their input,
which also tell them the place in the image; log-scales are bounded, s = bound · tanh(raw / bound), in the place of
s = log σ(raw + 2); a squeeze puts the checkerboard's colours into different halves of the channels; grey levels go
through a logit. Before a half leaves, the channels are mixed once more: else the last coupling, which has changed that
half given the other, would already be all that the learnt Gaussian can be.

    variable            paper
    x                   the image, on the grid k / 255
    y                   the dequantised image (k + u) / 256, u uniform on (0, 1)                     eq. 1 and 2
    z                   latents, one tensor per scale, finest first; each number standard normal
    log_det             log |det ∂z/∂y|                                                              eq. 6 and 7
    couplings           K of each scale; their number is L                                           Figure 2

    log p(x | label) ≥ E_u log p(y | label) − D log 256,     log p(y | label) = log N(z; 0, 1) + log_det

The half h_b that leaves a scale has a learnt Gaussian given the half h_a that goes on, and so has what arrives at the
end, given the label:

    p(h_b | h_a, label) = N(μ, σ²)     ⟺     z = (h_b − μ) / σ is standard normal

which is an affine coupling. So it is written as one, every latent is standard normal, and a temperature τ turns each of
these Gaussians into N(μ, τ² σ²).
"""

from __future__ import annotations

from dataclasses import dataclass

from models._flow_model import FlowModel, check_sides
from models._flows import (
    ActNorm,
    AffineCoupling,
    AffineGiven,
    Bijection,
    Chain,
    CouplingNetwork,
    Head,
    Invertible1x1,
    LabelMaps,
    Logit,
    MultiScale,
    Squeeze,
)
from models._nn import zeroed
from models._protocol import ImageSpace

TEMPERATURE = 0.85  # default: at 1, which samples the density itself, shapes tear; well below, they look alike


@dataclass(frozen=True)
class Config:
    """Everything that shapes the flow. A scale: a squeeze (half the sides, four times the channels), then steps."""

    couplings: tuple[int, ...] = (8, 12)  # steps of each scale, finest first
    widths: tuple[int, ...] = (64, 128)  # hidden channels of the couplings' networks at each scale
    maps: int = 8  # channels that tell the couplings of a scale the label and the place
    scale_bound: float = 2.0  # a coupling multiplies by exp(s) with |s| below this
    logit_alpha: float = 0.001  # grey levels pass logit(α + (1 − 2α) y)
    label_dropout: float = 0.1  # share of the images that are learnt without their label, for p(x) beside p(x | label)


def scale(config: Config, channels: int, index: int) -> Chain:
    """A squeeze to `channels`, the steps, and the Gaussian of what becomes latents here."""
    layers: list[Bijection] = [Squeeze()]
    half = channels // 2
    for _ in range(config.couplings[index]):
        network = CouplingNetwork(half + config.maps, 2 * half, config.widths[index])
        layers += [ActNorm(channels), Invertible1x1(channels), AffineCoupling(network, config.scale_bound)]
    layers += [ActNorm(channels), Invertible1x1(channels)]
    if index + 1 < len(config.couplings):
        layers.append(AffineCoupling(zeroed(Head(half + config.maps, 2 * half, 3, padding=1)), config.scale_bound))
    else:
        layers.append(AffineGiven(zeroed(Head(config.maps, 2 * channels, 1)), config.scale_bound))
    return Chain(layers)


class Model(FlowModel):
    """A class-conditional flow of standard normal latents."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        _check(config, space)
        (channels, height, width), scales, maps = space.shape, [], []
        for i in range(len(config.couplings)):
            channels, height, width = 4 * channels, height // 2, width // 2
            scales.append(scale(config, channels, i))
            maps.append(LabelMaps(space.classes, config.maps, height, width))
            channels //= 2
        flow = MultiScale(Logit(config.logit_alpha), scales, maps)
        super().__init__("glow", space, flow, TEMPERATURE, label_dropout=config.label_dropout if space.labels else 0.0)
        self.config = config


def _check(config: Config, space: ImageSpace) -> None:
    if not config.couplings or min(config.couplings) < 1:
        raise ValueError(f"couplings: {config.couplings}; every scale needs at least one, and there must be a scale")
    if len(config.widths) != len(config.couplings) or min(config.widths) < 1:
        raise ValueError(
            f"widths: {config.widths}; one positive number is needed for each of {len(config.couplings)} scales"
        )
    if config.maps < 1:
        raise ValueError(f"maps: {config.maps}; the last Gaussian reads them, so there must be at least one channel")
    if not 0 < config.scale_bound <= 10:
        raise ValueError(f"scale_bound: {config.scale_bound} is not in (0, 10]; e^10 apart, float32 no longer inverts")
    if not 0 < config.logit_alpha < 0.5:
        raise ValueError(f"logit_alpha: {config.logit_alpha} is not in (0, 0.5)")
    if not 0 <= config.label_dropout < 1:
        raise ValueError(f"label_dropout: {config.label_dropout} is not in [0, 1)")
    check_sides("couplings", len(config.couplings), space)
