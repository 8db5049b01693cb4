"""NICE: additive couplings and one scale per dimension (Dinh, Krueger and Bengio, arXiv 1410.8516).

What differs from the paper: the two parts that couplings alternate between are the checkerboard's colours; a coupling's
network may be convolutional, in the place of fully connected; the diagonal scale is set by the first images; and grey
levels may go through a logit first, as later flows have it (arXiv 1605.08803, §4.1). Additive couplings move a pixel by
as much as they like but never by a factor, so that all images have their detail at the same scale; the logit widens the
dark and the light end, where real images are the least noisy.

    variable          paper
    x                 the image, on the grid k / 255
    y                 the dequantised image (k + u) / 256, u uniform on (0, 1)                      §5
    network           m, of the coupling layer y_2 = x_2 + m(x_1)                                   §3.2
    log_scale         log S_ii, log |det ∂z/∂y| but for the logit's part                            §3.3
    z                 h, factorial: standard logistic or standard normal                            §3.4

    log p(x) ≥ E_u log p(y) − D log 256,     log p(y) = Σ log p(z_d) + Σ log S_dd + the logit's log-determinant
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from models._flow_model import GAUSSIAN, LOGISTIC, FlowModel, check_sides
from models._flows import (
    AdditiveCoupling,
    Bijection,
    Chain,
    CouplingNetwork,
    DenseNetwork,
    DiagonalScale,
    Logit,
    MultiScale,
    Permute,
    Squeeze,
)
from models._protocol import ImageSpace

PRIORS = {"logistic": LOGISTIC, "gaussian": GAUSSIAN}
TEMPERATURE = 1.0  # default: below 1 there is less grain, but garments turn dark and alike as well


@dataclass(frozen=True)
class Config:
    """Everything that shapes the flow."""

    couplings: tuple[str, ...] = ("dense",) * 4  # the network of each, from the image on: "dense" or "convolutional"
    units: int = 160  # of a dense network's hidden layers
    hidden: int = 2  # hidden layers of a dense network
    channels: int = 64  # of a convolutional network's two hidden layers
    prior: str = "logistic"  # or "gaussian"
    logit_alpha: float = 0.001  # grey levels pass logit(α + (1 − 2α) y); 0: they stay as they are, as in the paper


class Model(FlowModel):
    """Additive couplings, whose unchanged half is the other one each time, and a diagonal scale; it knows no labels."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        _check(config, space)
        channels, height, width = 4 * space.channels, space.height // 2, space.width // 2
        half = (channels // 2, height, width)
        layers: list[Bijection] = [Squeeze()]
        for kind in config.couplings:
            network: nn.Module = (
                DenseNetwork(half, config.units, config.hidden)
                if kind == "dense"
                else CouplingNetwork(half[0], half[0], config.channels)
            )
            layers += [AdditiveCoupling(network), Permute((2, 3, 0, 1))]
        layers.append(DiagonalScale((channels, height, width)))
        entrance = Logit(config.logit_alpha) if config.logit_alpha else Chain(())
        super().__init__("nice", space, MultiScale(entrance, [Chain(layers)]), TEMPERATURE, PRIORS[config.prior])
        self.config = config


def _check(config: Config, space: ImageSpace) -> None:
    if len(config.couplings) < 2:
        raise ValueError(f"couplings: {config.couplings}; at least 2, since each leaves half of the image as it is")
    for kind in config.couplings:
        if kind not in ("dense", "convolutional"):
            raise ValueError(f"couplings: {kind!r}; there are 'dense' and 'convolutional'")
    for name in ("units", "hidden", "channels"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; a positive number is needed")
    if config.prior not in PRIORS:
        raise ValueError(f"prior: {config.prior!r}; there are {', '.join(map(repr, PRIORS))}")
    if not 0 <= config.logit_alpha < 0.5:
        raise ValueError(f"logit_alpha: {config.logit_alpha} is not in [0, 0.5); 0 is no logit")
    check_sides("space", 1, space)
