"""Variational autoencoder (Kingma and Welling, arXiv 1312.6114; Rezende et al., arXiv 1401.4082), class-conditional.

What differs from the papers: the decoder's likelihood is one of 8-bit pixels (a mixture of discretised logistics, or
256-way categorical), never a Bernoulli on grey levels; the prior of each class is a learnt mixture of Gaussians, since
one Gaussian leaves holes between the codes of images, from which bad samples come; and images are scored with the
importance-weighted bound (Burda et al., arXiv 1509.00519), which is at least the ELBO on average. A sample shows the
decoder's expected image, as users of a VAE expect: a draw from the likelihood, which the solver "draw" shows, adds
pixel noise that is independent given z.

    variable      paper
    z             z, the latent code
    q             q_φ(z | x, y), the encoder's Gaussian
    p             p(z | y), the prior: Σ_k π_k N(m_k, s_k²)
    params        the decoder's output, from which `likelihood` gives log p_θ(x | z, y)
    kl            D_KL(q ‖ p), closed form for one component, a closed upper bound for several
    log_w         log w = log p_θ(x | z, y) + log p(z | y) − log q_φ(z | x, y)       S of them, eq. 8 of 1509.00519
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _protocol, _random
from models._likelihoods import pixel_likelihood
from models._nn import zeroed
from models._protocol import Batch, Draw, ImageSpace, Likelihood, Range, Rows, Score, Spec, Steps

SAMPLES_PER_STEP = (
    8  # importance samples that a step of scoring draws for each image: few enough to share the device fairly
)
PRIOR, PIXELS, COMPONENT = 0, 1, 2  # draws of a row's noise


@dataclass(frozen=True)
class Config:
    """Everything that shapes the network and the objective."""

    latent: int = 64  # dimensions of z
    width: int = 64  # channels at a quarter of the image's resolution; half of them at half
    blocks: int = 2  # residual blocks at a quarter of the resolution, in the encoder and in the decoder
    hidden: int = 512  # width of the dense layers next to z
    prior_components: int = 1  # Gaussians in the prior of each class
    likelihood: str = "logistic"  # or "categorical"
    components: int = 5  # of the logistic mixture
    label_dropout: float = 0.1  # how often training hides the label, so that p(x) is learnt next to p(x | y)
    label_in_encoder: bool = True  # q(z | x, y) rather than q(z | x)
    kl_warmup: float = 0.1  # part of training over which the weight of the KL term rises from 0 to 1
    importance_samples: int = 64  # S of the bound that `score` returns


# ------------------------------------------------------------------------------------------------------------ gaussians


class Normal(NamedTuple):
    """Diagonal Gaussians: mean and log-std (..., latent)."""

    mean: Tensor
    log_std: Tensor

    def at(self, noise: Tensor) -> Tensor:
        """z = mean + std · noise (the reparametrisation)."""
        return self.mean + self.log_std.exp() * noise

    def log_prob(self, z: Tensor) -> Tensor:
        """(...,) nats."""
        standard = (z - self.mean) * (-self.log_std).exp()
        return -(0.5 * standard.square() + self.log_std + 0.5 * math.log(2 * math.pi)).sum(dim=-1)

    def kl(self, other: Normal) -> Tensor:
        """(...,) D_KL(self ‖ other) in nats, closed form."""
        ratio = self.log_std - other.log_std
        distance = (self.mean - other.mean) * (-other.log_std).exp()
        return (0.5 * ((2 * ratio).exp() + distance.square() - 1) - ratio).sum(dim=-1)

    def expand(self, n: int) -> Normal:
        """(B, latent) -> (B, n, latent), every row n times."""
        return Normal(self.mean[:, None].expand(-1, n, -1), self.log_std[:, None].expand(-1, n, -1))


class Mixture(NamedTuple):
    """Mixtures of K diagonal Gaussians, one for each row."""

    log_weight: Tensor  # (B, K)
    components: Normal  # (B, K, latent)

    def log_prob(self, z: Tensor) -> Tensor:
        """(B, n) nats of z (B, n, latent)."""
        each = Normal(*(part[:, None] for part in self.components)).log_prob(z[:, :, None])  # (B, n, K)
        return torch.logsumexp(self.log_weight[:, None] + each, dim=2)

    def kl_from(self, q: Normal) -> Tensor:
        """(B,) −log Σ_k π_k exp(−D_KL(q ‖ p_k)) ≥ D_KL(q ‖ self), in nats: equal for one component, and close where q
        is narrow beside the components (Hershey and Olsen 2007, "Approximating the Kullback Leibler divergence between
        Gaussian mixture models")."""
        return -torch.logsumexp(self.log_weight - q.expand(1).kl(self.components), dim=1)

    def at(self, noise: Tensor, uniform: Tensor) -> Tensor:
        """(B, latent): the component that uniform (B, 1) falls into, at the noise (B, latent)."""
        chosen = (uniform > self.log_weight.exp().cumsum(dim=1)[:, :-1]).sum(dim=1)
        row = torch.arange(len(chosen), device=chosen.device)
        return Normal(self.components.mean[row, chosen], self.components.log_std[row, chosen]).at(noise)


# -------------------------------------------------------------------------------------------------------------- network


class Residual(nn.Module):
    """x + f(x) with two 3×3 convolutions, the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.silu(self.first(F.silu(x))))
        return out


class Encoder(nn.Module):
    """(B, C, H, W) and label features (B, E) -> (B, 2·latent), mean and log-std of q."""

    def __init__(self, config: Config, space: ImageSpace, label_features: int) -> None:
        super().__init__()
        w = config.width
        self.features = nn.Sequential(
            nn.Conv2d(space.channels, w // 2, 5, stride=2, padding=2),
            nn.SiLU(),
            nn.Conv2d(w // 2, w, 3, stride=2, padding=1),
            *(Residual(w) for _ in range(config.blocks)),
            nn.SiLU(),
            nn.Flatten(),
        )
        self.hidden = nn.Linear(w * (space.height // 4) * (space.width // 4) + label_features, config.hidden)
        self.out = nn.Linear(config.hidden, 2 * config.latent)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        features = self.features(2 * x - 1)
        out: Tensor = self.out(F.silu(self.hidden(torch.cat([features, labels.to(features.dtype)], dim=1))))
        return out


class Decoder(nn.Module):
    """z (B, latent) and label features (B, E) -> (B, P, H, W), the parameters of the pixels' likelihood."""

    def __init__(self, config: Config, space: ImageSpace, label_features: int, initial_bias: Tensor) -> None:
        super().__init__()
        w, height, width = config.width, space.height // 4, space.width // 4
        self.dense = nn.Sequential(
            nn.Linear(config.latent + label_features, config.hidden),
            nn.SiLU(),
            nn.Linear(config.hidden, w * height * width),
            nn.Unflatten(1, (w, height, width)),
        )
        self.upsample = nn.Sequential(
            *(Residual(w) for _ in range(config.blocks)),
            nn.SiLU(),
            nn.Conv2d(w, 4 * (w // 2), 1),
            nn.PixelShuffle(2),
            Residual(w // 2),
            nn.SiLU(),
        )
        self.head = nn.Conv2d(w // 2, 4 * len(initial_bias), 3, padding=1)
        with torch.no_grad():
            self.head.weight.mul_(0.1)
            self.head.bias.copy_(initial_bias.repeat_interleave(4))  # type: ignore[union-attr]

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        x = self.upsample(self.dense(torch.cat([z, labels], dim=1)))
        return F.pixel_shuffle(self.head(x), 2)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class VAERows(Rows):
    """Rows of a sample: before the pass only what was asked, after it the image."""

    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    label: Tensor  # (B,)
    temperature: Tensor  # (B,)
    drawn: Tensor  # (B,) bool: the image is a draw from the pixels' likelihood, not its mean
    x: Tensor  # (B, C, H, W)


@dataclass
class BoundRows(Rows):
    """Rows of a score: SAMPLES_PER_STEP importance samples a step."""

    seed: Tensor  # (B,) from the image's bytes
    x: Tensor  # (B, C, H, W)
    label: Tensor  # (B,)
    log_w: Tensor  # (B,) log Σ w so far
    reconstruction: Tensor  # (B,) Σ log p(x | z) so far
    kl: Tensor  # (B,)
    drawn: Tensor  # (B,) int64: importance samples so far


class Model(_protocol.Model, _protocol.Density, _protocol.Autoencoder):
    """A VAE. A sample is one pass of the decoder; a score is an importance-weighted bound."""

    prior_logits: Tensor

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        self.spec = Spec(
            family="vae",
            image=space,
            steps=Steps(unit="pass"),
            solvers=("mean", "draw"),
            likelihood=Likelihood(
                kind="bound",
                dequantisation="none",
                note=f"importance-weighted, S={config.importance_samples}",
                steps=math.ceil(config.importance_samples / SAMPLES_PER_STEP),
            ),
            temperature=Range(min=0.0, default=1.0, max=2.0),
        )
        self.likelihood = pixel_likelihood(config.likelihood, space.channels, config.components)
        e = min(16, config.hidden) if space.labels else 0
        rows = space.classes + 1  # one for each class and a last one for "no label"
        if space.labels:
            self.label_features = nn.Embedding(rows, e)
        k, d = config.prior_components, config.latent
        if k > 1:
            self.prior_logits = nn.Parameter(torch.zeros(rows, k))
        else:  # the weight of an only component is 1: nothing to learn
            self.register_buffer("prior_logits", torch.zeros(rows, k), persistent=False)
        # Means apart, that components may come to differ; near enough for each to get its share of the codes.
        self.prior_mean = nn.Parameter(0.25 * torch.randn(rows, k, d) if k > 1 else torch.zeros(rows, k, d))
        self.prior_log_std = nn.Parameter(torch.zeros(rows, k, d))
        self.encoder = Encoder(config, space, e if config.label_in_encoder else 0)
        self.decoder = Decoder(config, space, e, self.likelihood.initial_bias())

    # q, p and the decoder

    def encode(self, x: Tensor, labels: Tensor) -> Normal:
        """q(z | x, y) for x (B, C, H, W) and labels (B,), -1 for none: (mean, log_std), each (B, latent)."""
        features = self._features(labels) if self.config.label_in_encoder else x.new_zeros(len(x), 0)
        mean, log_std = self.encoder(x, features).float().chunk(2, dim=1)
        return Normal(mean, log_std.clamp(-10.0, 10.0))

    def prior(self, labels: Tensor) -> Mixture:
        """p(z | y) for labels (B,), -1 for none."""
        y = self._index(labels)
        return Mixture(self.prior_logits[y].log_softmax(dim=1), Normal(self.prior_mean[y], self.prior_log_std[y]))

    def decode(self, z: Tensor, labels: Tensor) -> Tensor:
        """(B, P, H, W), the parameters of `self.likelihood`, for z (B, latent) and labels (B,)."""
        out: Tensor = self.decoder(z, self._features(labels))
        return out.float()

    def reconstruct(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]: the expected image at the mean of q(z | x, y)."""
        return self.likelihood.mean(self.decode(self.encode(x, labels).mean, labels))

    def _index(self, labels: Tensor) -> Tensor:
        return torch.where(labels < 0, self.spec.image.classes, labels)

    def _features(self, labels: Tensor) -> Tensor:
        if not self.spec.image.labels:
            return torch.zeros(len(labels), 0, device=labels.device)
        features: Tensor = self.label_features(self._index(labels))
        return features

    # objective

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"vae": list(self.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """The negative ELBO in bits/dim, one z an image. The KL term's weight rises over the first part of training,
        lest the decoder learns to do without z before z says anything (arXiv 1511.06349, §3.1)."""
        x = batch.x
        hidden = torch.rand(len(x), device=x.device) < self.config.label_dropout
        labels = batch.labels.masked_fill(hidden, _protocol.UNLABELLED)
        q = self.encode(x, labels)
        z = q.at(torch.randn_like(q.mean))
        log_px = self.likelihood.log_prob(self.decode(z, labels), x).sum(dim=(1, 2)).mean()
        kl = self.prior(labels).kl_from(q).mean()
        warmup = self.config.kl_warmup * batch.steps
        weight = min(1.0, (batch.step + 1) / warmup) if warmup > 0 else 1.0
        bits = 1 / (self.spec.image.dims * math.log(2))
        metrics = {
            "bits_per_dim": ((kl - log_px) * bits).detach(),
            "reconstruction": -log_px.detach(),
            "kl": kl.detach(),
        }
        yield "vae", (weight * kl - log_px) * bits, metrics

    # sampler

    def init(self, draws: Sequence[Draw]) -> VAERows:
        device, b = self.device, len(draws)
        return VAERows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.ones(b, dtype=torch.int64, device=device),
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], device=device),
            label=torch.tensor([d.label for d in draws], device=device),
            temperature=torch.tensor([d.temperature for d in draws], device=device),
            drawn=torch.tensor([d.solver == "draw" for d in draws], device=device),
            x=torch.full((b, *self.spec.image.shape), 0.5, device=device),
        )

    def step(self, rows: VAERows) -> VAERows:
        """z from the prior, its noise scaled by the temperature; then the pixels' mean, or a draw of each."""
        noise = _random.normal(rows.seed, rows.sample, rows.tick, PRIOR, (self.config.latent,))
        uniform = _random.uniform(rows.seed, rows.sample, rows.tick, COMPONENT, (1,))
        z = self.prior(rows.label).at(rows.temperature[:, None] * noise, uniform)
        params = self.decode(z, rows.label)
        rows.x = self.likelihood.mean(params)
        if rows.drawn.any():
            shape = (self.likelihood.uniforms, *rows.x.shape[2:])
            uniforms = _random.uniform(rows.seed, rows.sample, rows.tick, PIXELS, shape)
            rows.x = torch.where(rows.drawn[:, None, None, None], self.likelihood.draw(params, uniforms), rows.x)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: VAERows) -> Tensor:
        return rows.x

    # density

    def score_init(self, x: Tensor, labels: Tensor) -> BoundRows:
        b = len(x)
        return BoundRows(
            tick=torch.zeros(b, dtype=torch.int64, device=x.device),
            left=torch.full((b,), self.spec.likelihood.steps if self.spec.likelihood else 0, device=x.device),
            seed=_random.image_seed(x),
            x=x,
            label=labels,
            log_w=x.new_full((b,), -math.inf),
            reconstruction=x.new_zeros(b),
            kl=x.new_zeros(b),
            drawn=torch.zeros(b, dtype=torch.int64, device=x.device),
        )

    def score_step(self, rows: BoundRows) -> BoundRows:
        """SAMPLES_PER_STEP more importance samples of every image (as many as are missing, at the last step)."""
        s, b = SAMPLES_PER_STEP, len(rows.x)
        q, p = self.encode(rows.x, rows.label), self.prior(rows.label)
        noise = _random.normal(rows.seed, torch.zeros_like(rows.seed), rows.tick, PRIOR, (s * self.config.latent,))
        z = q.expand(s).at(noise.view(b, s, -1))  # (B, s, latent)
        params = self.decode(z.flatten(0, 1), rows.label.repeat_interleave(s))
        log_px = self.likelihood.log_prob(params, rows.x.repeat_interleave(s, dim=0)).sum(dim=(1, 2)).view(b, s)
        log_w = log_px + p.log_prob(z) - q.expand(s).log_prob(z)  # (B, s)
        surplus = rows.drawn[:, None] + torch.arange(s, device=z.device) >= self.config.importance_samples
        rows.log_w = torch.logaddexp(rows.log_w, log_w.masked_fill(surplus, -math.inf).logsumexp(dim=1))
        rows.reconstruction = rows.reconstruction + log_px.masked_fill(surplus, 0.0).sum(dim=1)
        rows.kl = p.kl_from(q)
        rows.drawn = (rows.drawn + s).clamp(max=self.config.importance_samples)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def score(self, rows: BoundRows) -> Score:
        """log (1/S) Σ w. The statistics are the two terms of the negative ELBO, −E_q log p(x | z) and the KL."""
        return Score(
            log_prob=rows.log_w - rows.drawn.to(rows.log_w.dtype).log(),
            statistics={"reconstruction_nats": -rows.reconstruction / rows.drawn, "kl_nats": rows.kl},
        )


def _check(config: Config, space: ImageSpace) -> None:
    """Raises `ValueError` that names the field, its value and what would be right."""
    for name in ("latent", "hidden", "prior_components", "components", "importance_samples"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; at least 1")
    if config.width < 2 or config.width % 2:
        raise ValueError(
            f"width: {config.width}; an even number of channels, since half of them go to half the resolution"
        )
    if config.blocks < 0:
        raise ValueError(f"blocks: {config.blocks}; at least 0")
    for name in ("label_dropout", "kl_warmup"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: {getattr(config, name)} is not in [0, 1]")
    if space.height % 4 or space.width % 4 or not space.height or not space.width:
        raise ValueError(f"image: {space.width}×{space.height}; width and height must be multiples of 4")
