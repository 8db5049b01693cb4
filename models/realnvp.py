"""RealNVP: a multi-scale flow of affine couplings (Dinh, Sohl-Dickstein and Bengio, arXiv 1605.08803).

What differs from the paper: activation normalisation in the place of batch normalisation, so that no image depends on
its batch mates, and a learnt linear map of the channels in the place of alternating masks (both from Glow, arXiv
1807.03039; `mixing="masks"` has the paper's); the checkerboard mask comes after a squeeze, where it is half of the
channels; log-scales are bounded, so that the inverse is stable; and the couplings' networks are three convolutions,
not a residual network.

    variable          paper
    x                 the image, on the grid k / 255
    y                 the dequantised image (k + u) / 256, u uniform on (0, 1)                    §4.1
    z                 the latents, one tensor per scale, finest first; standard normal            §3.6
    log_det           log |det ∂z/∂y|, the logit's part included                                  eq. 3

    log p(x) ≥ E_u log p(y) − D log 256,     log p(y) = Σ log N(z; 0, 1) + log_det

A half that is split off needs no prior of its own: the last coupling of its scale has just changed it, given the half
that goes on.
"""

from __future__ import annotations

from dataclasses import dataclass

from models._flow_model import FlowModel, check_sides
from models._flows import (
    ActNorm,
    AffineCoupling,
    Bijection,
    Chain,
    CouplingNetwork,
    Invertible1x1,
    Logit,
    MultiScale,
    Permute,
    Squeeze,
)
from models._protocol import ImageSpace

TEMPERATURE = 0.85  # default: at 1, which samples the density itself, a flow tears shapes; well below, all look alike


@dataclass(frozen=True)
class Config:
    """Everything that shapes the flow. A scale: a squeeze (half the sides, four times the channels), then couplings."""

    couplings: tuple[int, ...] = (8, 12)  # of each scale, finest first
    widths: tuple[int, ...] = (64, 128)  # hidden channels of the couplings' networks at each scale
    mixing: str = "1x1"  # between couplings: "1x1" a learnt linear map of the channels, "masks" the paper's alternation
    scale_bound: float = 2.0  # a coupling multiplies by exp(s) with |s| below this
    logit_alpha: float = 0.001  # α of the logit; the paper's 0.05 suits photographs, less drawings on black


# -------------------------------------------------------------------------------------------------------------- network


def scale(config: Config, channels: int, index: int) -> Chain:
    """A squeeze to `channels`, then couplings with what goes between them."""
    layers: list[Bijection] = [Squeeze()]
    n = config.couplings[index]
    for k in range(n):
        layers.append(ActNorm(channels))
        if config.mixing == "1x1":
            layers.append(Invertible1x1(channels))
        elif k > 0:  # the checkerboard masks first, then those of channels; each in turn with its complement
            layers.append(Permute((0, 2, 1, 3) if k == max(2, n // 2) else (2, 3, 0, 1)))
        half = channels // 2
        network = CouplingNetwork(half, 2 * half, config.widths[index])
        layers.append(AffineCoupling(network, config.scale_bound))
    return Chain(layers)


# ---------------------------------------------------------------------------------------------------------------- model


class Model(FlowModel):
    """A flow of standard normal latents; it knows no labels."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        _check(config, space)
        channels, scales = space.channels, []
        for i in range(len(config.couplings)):
            channels *= 4
            scales.append(scale(config, channels, i))
            channels //= 2
        super().__init__("realnvp", space, MultiScale(Logit(config.logit_alpha), scales), TEMPERATURE)
        self.config = config


def _check(config: Config, space: ImageSpace) -> None:
    if not config.couplings or min(config.couplings) < 1:
        raise ValueError(f"couplings: {config.couplings}; every scale needs at least one, and there must be a scale")
    if len(config.widths) != len(config.couplings) or min(config.widths) < 1:
        raise ValueError(
            f"widths: {config.widths}; one positive number is needed for each of {len(config.couplings)} scales"
        )
    if config.mixing not in ("1x1", "masks"):
        raise ValueError(f"mixing: {config.mixing!r}; there are '1x1' (learnt) and 'masks' (alternating)")
    if config.mixing == "masks" and min(config.couplings) < 2:
        raise ValueError(
            f"couplings: {config.couplings}; masks leave half unchanged by a single one, so at least 2 a scale"
        )
    if not 0 < config.scale_bound <= 10:
        raise ValueError(f"scale_bound: {config.scale_bound} is not in (0, 10]; e^10 apart, float32 no longer inverts")
    if not 0 < config.logit_alpha < 0.5:
        raise ValueError(f"logit_alpha: {config.logit_alpha} is not in (0, 0.5)")
    check_sides("couplings", len(config.couplings), space)
