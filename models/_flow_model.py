"""What flows over images share as models: the density of 8-bit images, maximum likelihood, samples in one pass.

A family brings a bijection (`models._flows`) and, where its latents are not standard normal, their prior.

    x           the image, on the grid k / 255
    y           the dequantised image (k + u) / 256, u uniform on (0, 1)
    z           the latents, one tensor per scale, finest first
    log_det     log |det ∂z/∂y|

    log p(x) ≥ E_u log p(y) − D log 256,     log p(y) = log p(z) + log_det
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _protocol, _random
from models._flows import MultiScale
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

LEVELS = 256
PREPARATION = 512  # images that what depends on data at the start is set by
MAX_TEMPERATURE = 1.5
MOST_CHANNELS = 48  # of which any two are correlated
LEAST_SQUARE = 1e-6  # of a latent's channel, whose logarithm is taken


# ------------------------------------------------------------------------------------------------------ 8-bit densities


def dequantise(x: Tensor, noise: Tensor) -> Tensor:
    """y = (k + u) / 256 in (0, 1), for x on the grid k / 255 and noise u in (0, 1) of the same shape."""
    return (x * (LEVELS - 1) + noise) / LEVELS


def quantise(y: Tensor) -> Tensor:
    """The image on the grid k / 255 in whose cell y lies, float32; what is outside (0, 1) becomes black or white."""
    return (y * LEVELS).floor().clamp(0, LEVELS - 1).float() / (LEVELS - 1)


def discrete_log_prob(log_density: Tensor, dims: int, extent: float = 1.0) -> Tensor:
    """Log-density at a dequantised image -> nats of the 8-bit image, whose cell has the volume (extent / 256)^dims.

    extent: from black to white; 1 for data on [0, 1], 2 on [-1, 1]. Averaged over the noise this is a lower bound.
    """
    return log_density - dims * math.log(LEVELS / extent)


# --------------------------------------------------------------------------------------------------------------- priors


@dataclass(frozen=True)
class Prior:
    """What all numbers of all latents are alike and independently distributed as."""

    log_prob: Callable[[Sequence[Tensor]], Tensor]  # latents (B, ...) -> (B,) nats
    draw: Callable[[Tensor, Tensor, Tensor, int, Sequence[int]], Tensor]  # as `_random.normal`


def gaussian_log_prob(latents: Sequence[Tensor]) -> Tensor:
    """(B,) nats of all latents (B, ...) under a standard normal."""
    terms = [-0.5 * (z.square() + math.log(2 * math.pi)).flatten(1).sum(dim=1) for z in latents]
    return torch.stack(terms).sum(dim=0)


def logistic_log_prob(latents: Sequence[Tensor]) -> Tensor:
    """(B,) nats of all latents (B, ...) under the standard logistic, log p = −log(1 + e^z) − log(1 + e^−z)."""
    terms = [-(F.softplus(z) + F.softplus(-z)).flatten(1).sum(dim=1) for z in latents]
    return torch.stack(terms).sum(dim=0)


def logistic(seed: Tensor, sample: Tensor, tick: Tensor, draw: int, shape: Sequence[int]) -> Tensor:
    """(B, *shape) float64, standard logistic: the quantiles at `_random.uniform`."""
    return torch.logit(_random.uniform(seed, sample, tick, draw, shape).double())


GAUSSIAN = Prior(gaussian_log_prob, _random.normal)
LOGISTIC = Prior(logistic_log_prob, logistic)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class FlowRows(Rows):
    """Rows of a sample: one pass turns noise into x."""

    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    label: Tensor  # (B,), -1 without
    temperature: Tensor  # (B,)
    x: Tensor  # (B, C, H, W)


class FlowModel(_protocol.Model, OnePassDensity, Localiser):
    """A flow. Images are sampled, and scored, in one pass. It knows the labels of `space` where its `flow` has maps.

    label_dropout: share of the images that are learnt without their label, for p(x) beside p(x | label).

    Statistics of a score, which cost no further pass (the scale i is counted from the finest, 0):

        log_p_z             nats, log p(z) of all latents
        log_det             nats, log |det ∂z/∂y|; log_prob = log_p_z + log_det − D log 256
        energy_i            mean of ½ z² at scale i; half the prior's variance (½ of a normal) if z is white noise
        autocorrelation_i   mean product of a latent with its right and lower neighbour at scale i; white noise has 0

    And a feature vector. Latents are white noise over all images, not in any one of them, and what an image is like
    leaves its traces:

        moments             of each scale and channel, log of the mean square; correlation with the right and with the
                            lower neighbour; correlation with each other channel at the same place (of at most
                            MOST_CHANNELS)
    """

    def __init__(
        self,
        family: str,
        space: ImageSpace,
        flow: MultiScale,
        temperature: float,
        prior: Prior = GAUSSIAN,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.flow, self.prior, self.label_dropout = flow, prior, label_dropout
        self.spec = Spec(
            family=family,
            image=dataclasses.replace(space, labels=space.labels if flow.maps else (), captions=False),
            steps=Steps(unit="pass"),
            likelihood=Likelihood(
                kind="bound",
                dequantisation="uniform K=1",
                note="exact density of the dequantised image; on average its logarithm is a lower bound",
                heatmap_evaluations=1,
            ),
            temperature=Range(min=0.0, default=temperature, max=MAX_TEMPERATURE),
        )
        self.latent_shapes = flow.latent_shapes(space.shape)
        indices = range(len(self.latent_shapes))
        self.statistic_names = (
            "log_p_z",
            "log_det",
            *(f"energy_{i}" for i in indices),
            *(f"autocorrelation_{i}" for i in indices),
        )
        self.feature_sizes = {"moments": sum(count_moments(shape[0]) for shape in self.latent_shapes)}

    def encode(self, y: Tensor, labels: Tensor | None = None) -> tuple[tuple[Tensor, ...], Tensor]:
        """y (B, C, H, W) in (0, 1) -> latents z of every scale, finest first, and log_det (B,) in nats."""
        z, log_det = self.flow(y, labels)
        return z, log_det

    def decode(self, z: Sequence[Tensor], labels: Tensor | None = None) -> Tensor:
        """Latents -> y (B, C, H, W), which may lie outside (0, 1)."""
        return self.flow.inverse(z, labels)

    # objective

    def prepare(self, batches: Iterable[Batch]) -> None:
        """What depends on data at the start, from the first images: activations of mean 0 and variance 1."""
        x: list[Tensor] = []
        labels: list[Tensor] = []
        for batch in batches:
            x.append(batch.x)
            labels.append(batch.labels)
            if sum(map(len, x)) >= PREPARATION:
                break
        y = torch.cat(x)
        self.flow.initialise(dequantise(y, torch.rand_like(y)), torch.cat(labels))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"flow": list(self.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """The negative log-likelihood in bits/dim, with fresh dequantisation noise."""
        y, labels = dequantise(batch.x, torch.rand_like(batch.x)), batch.labels
        if self.label_dropout:
            labels = labels.masked_fill(torch.rand(len(y), device=y.device) < self.label_dropout, _protocol.UNLABELLED)
        z, log_det = self.encode(y, labels)
        dims = self.spec.image.dims
        log_prob = discrete_log_prob(self.prior.log_prob(z) + log_det, dims).mean()
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
            label=torch.tensor([d.label for d in draws], dtype=torch.int64, device=device),
            temperature=torch.tensor([d.temperature for d in draws], dtype=torch.float32, device=device),
            x=torch.full((b, *self.spec.image.shape), 0.5, device=device),
        )

    def step(self, rows: FlowRows) -> FlowRows:
        """x = f⁻¹(temperature · z), z from the prior, on the 8-bit grid.

        In float64, since the grid has steps everywhere: float32 sums, which round differently in batches of different
        size, would change one pixel in some tens of thousands by a level, depending on the row's batch mates.
        """
        temperature = rows.temperature.double()[:, None, None, None]
        z = [
            temperature * self.prior.draw(rows.seed, rows.sample, rows.tick, draw, shape)
            for draw, shape in enumerate(self.latent_shapes)
        ]
        rows.x = quantise(self.decode(z, rows.label))
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: FlowRows) -> Tensor:
        return rows.x

    # density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        z, log_det = self.encode(_dequantised(x), labels)
        log_p_z = self.prior.log_prob(z)
        statistics = {"log_p_z": log_p_z, "log_det": log_det}
        found = []
        for i, latent in enumerate(z):
            products = Products.of(latent)
            statistics[f"energy_{i}"] = products.energy
            statistics[f"autocorrelation_{i}"] = products.autocorrelation
            found.append(products.moments)
        features = {"moments": torch.cat(found, dim=1)}
        log_prob = discrete_log_prob(log_p_z + log_det, self.spec.image.dims)
        return Score(log_prob=log_prob, statistics=statistics, features=features)

    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        """The root of Σ ½ z² over the latents at the pixel's place, of every scale; those of a coarse one are shared
        evenly by the pixels that they stand for.

        Without the gradient ∂ log p/∂x: where grey levels pass a logit, it is large at every black pixel."""
        z, _ = self.encode(_dequantised(x), labels)
        total = torch.zeros_like(x[:, :1])
        for latent in z:
            energy = 0.5 * latent.square().sum(dim=1, keepdim=True)  # (B, 1, H / 2^i, W / 2^i)
            share = energy[0].numel() / total[0].numel()
            total = total + share * F.interpolate(energy, size=x.shape[2:], mode="nearest")
        return total[:, 0].sqrt()


def _dequantised(x: Tensor) -> Tensor:
    """y, with noise that is a function of the image's bytes."""
    seed = _random.image_seed(x)
    return dequantise(x, _random.uniform(seed, torch.zeros_like(seed), 0, 0, x.shape[1:]))


@dataclass(frozen=True)
class Products:
    """What statistics and moments of latents z (B, C, H, W) are made of: sums of the products of two of them."""

    z: Tensor
    square: Tensor  # (B, C) of a latent with itself, and the others likewise
    right: Tensor  # with its right neighbour
    lower: Tensor

    @classmethod
    def of(cls, z: Tensor) -> Products:
        return cls(
            z,
            z.square().sum(dim=(2, 3)),
            (z[..., 1:] * z[..., :-1]).sum(dim=(2, 3)),
            (z[..., 1:, :] * z[..., :-1, :]).sum(dim=(2, 3)),
        )

    @property
    def energy(self) -> Tensor:
        """(B,) mean of ½ z²."""
        return self.square.sum(dim=1) * (0.5 / self.z[0].numel())

    @property
    def autocorrelation(self) -> Tensor:
        """(B,) mean product of two neighbours, in a row or in a column; 0 where there are none."""
        _, c, h, w = self.z.shape
        return (self.right + self.lower).sum(dim=1) / max(1, c * (h * (w - 1) + (h - 1) * w))

    @property
    def moments(self) -> Tensor:
        """(B, `count_moments`): logs of the channels' mean squares, then correlations: with the right neighbour, with
        the lower one, of two channels at a place; 0 where there is none to correlate with."""
        _, c, h, w = self.z.shape
        square = self.square / (h * w) + LEAST_SQUARE
        right, lower = self.right / max(1, h * (w - 1)), self.lower / max(1, (h - 1) * w)
        found = [square.log(), right / square, lower / square]
        if c <= MOST_CHANNELS:
            one, other = torch.triu_indices(c, c, offset=1, device=self.z.device)
            flat, root = self.z.flatten(2), square.sqrt()  # (B, C, H·W)
            between = flat @ flat.transpose(1, 2) / (root[:, :, None] * root[:, None])
            found.append(between[:, one, other] / (h * w))
        return torch.cat(found, dim=1)


def count_moments(channels: int) -> int:
    """Of the latents of a scale."""
    return 3 * channels + (channels * (channels - 1) // 2 if channels <= MOST_CHANNELS else 0)


def check_sides(field: str, scales: int, space: ImageSpace) -> None:
    """Raise `ValueError` for images whose sides cannot be halved at each of so many scales, as `field` asks for."""
    side = 2**scales
    if space.height % side or space.width % side or min(space.shape) < 1:
        raise ValueError(
            f"{field}: {scales} scales halve the image as often, so its sides must be multiples of {side}; "
            f"it is {space.width}×{space.height}"
        )
