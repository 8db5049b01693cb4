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

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import _protocol, _random
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
    dequantise,
    discrete_log_prob,
    gaussian_log_prob,
    quantise,
)
from models._protocol import Batch, Draw, ImageSpace, Likelihood, OnePassDensity, Range, Rows, Score, Spec, Steps

PREPARATION = 512  # images that the activation normalisation is set by
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


@dataclass
class FlowRows(Rows):
    """Rows of a sample: one pass turns noise into x."""

    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    temperature: Tensor  # (B,)
    x: Tensor  # (B, C, H, W)


class Model(_protocol.Model, OnePassDensity):
    """A flow. Images are sampled, and scored, in one pass; it knows no labels.

    Statistics of a score, which cost no further pass (the scale i is counted from the finest, 0):

        log_p_z             nats, Σ log N(z; 0, 1) over all latents
        log_det             nats, log |det ∂z/∂y|; log_prob = log_p_z + log_det − D log 256
        energy_i            mean of ½ z² at scale i; white noise has ½
        autocorrelation_i   mean product of a latent with its right and lower neighbour at scale i; white noise has 0
    """

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        self.spec = Spec(
            family="realnvp",
            image=dataclasses.replace(space, labels=(), captions=False),
            steps=Steps(unit="pass"),
            likelihood=Likelihood(
                kind="bound",
                dequantisation="uniform K=1",
                note="exact density of the dequantised image; on average its logarithm is a lower bound",
            ),
            temperature=Range(min=0.0, default=TEMPERATURE, max=1.5),
        )
        channels, scales = space.channels, []
        for i in range(len(config.couplings)):
            channels *= 4
            scales.append(scale(config, channels, i))
            channels //= 2
        self.flow = MultiScale(Logit(config.logit_alpha), scales)
        self.latent_shapes = self.flow.latent_shapes(space.shape)
        indices = range(len(scales))
        self.statistic_names = (
            "log_p_z",
            "log_det",
            *(f"energy_{i}" for i in indices),
            *(f"autocorrelation_{i}" for i in indices),
        )

    def encode(self, y: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """y (B, C, H, W) in (0, 1) -> latents z of every scale, finest first, and log_det (B,) in nats."""
        z, log_det = self.flow(y)
        return z, log_det

    def decode(self, z: Sequence[Tensor]) -> Tensor:
        """Latents -> y (B, C, H, W), which may lie outside (0, 1) by the logit's α."""
        return self.flow.inverse(z)

    # objective

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Activation normalisation from the first images: every layer's output starts with mean 0 and variance 1."""
        x: list[Tensor] = []
        for batch in batches:
            x.append(batch.x)
            if sum(map(len, x)) >= PREPARATION:
                break
        y = torch.cat(x)
        self.flow.initialise(dequantise(y, torch.rand_like(y)))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"flow": list(self.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """The negative log-likelihood in bits/dim, with fresh dequantisation noise (eq. 2 and 3)."""
        z, log_det = self.encode(dequantise(batch.x, torch.rand_like(batch.x)))
        dims = self.spec.image.dims
        log_prob = discrete_log_prob(gaussian_log_prob(z) + log_det, dims).mean()
        loss = -log_prob / (dims * math.log(2))
        metrics = {"bits_per_dim": loss.detach(), "log_det": log_det.detach().mean()}
        yield "flow", loss, metrics

    # sampler

    def init(self, draws: Sequence[Draw]) -> FlowRows:
        device, b = self.device, len(draws)
        return FlowRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.ones(b, dtype=torch.int64, device=device),
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], dtype=torch.int64, device=device),
            temperature=torch.tensor([d.temperature for d in draws], dtype=torch.float32, device=device),
            x=torch.full((b, *self.spec.image.shape), 0.5, device=device),
        )

    def step(self, rows: FlowRows) -> FlowRows:
        """x = f⁻¹(temperature · z), z standard normal, on the 8-bit grid.

        In float64, since the grid has steps everywhere: float32 sums, which round differently in batches of different
        size, would change one pixel in some tens of thousands by a level, depending on the row's batch mates.
        """
        temperature = rows.temperature.double()[:, None, None, None]
        z = [
            temperature * _random.normal(rows.seed, rows.sample, rows.tick, draw, shape)
            for draw, shape in enumerate(self.latent_shapes)
        ]
        rows.x = quantise(self.decode(z))
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: FlowRows) -> Tensor:
        return rows.x

    # density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        seed = _random.image_seed(x)
        noise = _random.uniform(seed, torch.zeros_like(seed), 0, 0, x.shape[1:])
        z, log_det = self.encode(dequantise(x, noise))
        log_p_z = gaussian_log_prob(z)
        statistics = {"log_p_z": log_p_z, "log_det": log_det}
        for i, latent in enumerate(z):
            statistics[f"energy_{i}"] = 0.5 * latent.square().mean(dim=(1, 2, 3))
            statistics[f"autocorrelation_{i}"] = neighbour_correlation(latent)
        return Score(log_prob=discrete_log_prob(log_p_z + log_det, self.spec.image.dims), statistics=statistics)


def neighbour_correlation(z: Tensor) -> Tensor:
    """(B,) mean product of two neighbours of z (B, C, H, W), in a row or in a column; 0 where there are none."""
    right, lower = z[..., 1:] * z[..., :-1], z[..., 1:, :] * z[..., :-1, :]
    pairs = right[0].numel() + lower[0].numel()
    return (right.sum(dim=(1, 2, 3)) + lower.sum(dim=(1, 2, 3))) / max(1, pairs)


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
    side = 2 ** len(config.couplings)
    if space.height % side or space.width % side or min(space.shape) < 1:
        raise ValueError(
            f"couplings: {len(config.couplings)} scales halve the image as often, so its sides must be multiples of "
            f"{side}; it is {space.width}×{space.height}"
        )
