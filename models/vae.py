"""Variational autoencoder (Kingma and Welling, arXiv 1312.6114; Rezende et al., arXiv 1401.4082), class-conditional.

Two kinds, by `Config.groups`:

    flat            one latent vector under a mixture of Gaussians that belongs to the class
    hierarchical    groups of latents from coarse to fine, each under a prior given those above (`models._topdown`)

What differs from the papers: the decoder's likelihood is one of 8-bit pixels (a mixture of discretised logistics, or
256-way categorical), never a Bernoulli on grey levels; the flat kind's prior of each class is a learnt mixture, since
one Gaussian leaves holes between the codes of images, from which bad samples come; and images are scored with the
importance-weighted bound (Burda et al., arXiv 1509.00519), which is at least the ELBO on average. A sample shows the
decoder's expected image, as users of a VAE expect: a draw from the likelihood, which the solver "draw" shows, adds
pixel noise that is independent given z.

    variable      paper
    z             z, the latents                           code    (B, N) what stands for z: z itself, or z whitened
    q             q_φ(z | x, y), the encoder's Gaussian
    p             p(z | y), the prior
    params        the decoder's output, from which `likelihood` gives log p_θ(x | z, y)
    kl            D_KL(q ‖ p) of each group of latents: closed form, an upper bound where p is a mixture
    log_w         log w = log p_θ(x | z, y) + log p(z | y) − log q_φ(z | x, y)       S of them, eq. 8 of 1509.00519
"""

from __future__ import annotations

import abc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _protocol, _random
from models._latents import Mixture, Normal
from models._likelihoods import pixel_likelihood
from models._nn import zeroed
from models._pixels import tiles
from models._protocol import Batch, Draw, ImageSpace, Likelihood, Range, Rows, Score, Spec, Steps
from models._topdown import Inference, TopDown

SAMPLES_PER_STEP = (
    8  # importance samples that a step of scoring draws for each image: few enough to share the device fairly
)
PRIOR, PIXELS, COMPONENT = 0, 1, 2  # draws of a row's noise
MAP_DRAWS = 16  # of pixels, that say what a heat map's pixel is expected to cost
TILE = 4  # pixels, a side of it


@dataclass(frozen=True)
class Config:
    """Everything that shapes the network and the objective. What one kind has no use for, it ignores."""

    latent: int = 64  # flat: dimensions of z
    width: int = 64  # channels at a quarter of the image's resolution, half of them at half; hierarchical: everywhere
    blocks: int = 2  # residual blocks, flat: at a quarter of the resolution in both networks; else: encoder, each level
    hidden: int = 512  # flat: width of the dense layers next to z
    prior_components: int = 1  # flat: Gaussians in the prior of each class
    likelihood: str = "logistic"  # or "categorical"
    components: int = 5  # of the logistic mixture
    label_dropout: float = 0.1  # how often training hides the label, so that p(x) is learnt next to p(x | y)
    label_in_encoder: bool = True  # flat: q(z | x, y) rather than q(z | x)
    kl_warmup: float = 0.1  # part of training over which the weight of the KL term rises from 0 to 1
    importance_samples: int = 64  # S of the bound that `score` returns
    groups: tuple[int, ...] = ()  # of latents at 1/2, 1/4, 1/8 … of the resolution, rounded up; none: the flat kind
    group_channels: tuple[int, ...] = ()  # of the latents at each of these levels
    free_bits: float = 0.0  # nats: a group's KL below this costs as much as this (arXiv 1606.04934, eq. 15)


# -------------------------------------------------------------------------------------------------- networks, flat kind


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


# --------------------------------------------------------------------------------------------------------------- models


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
    kl: Tensor  # (B, G) Σ of the KL of each group so far
    pixels: Tensor  # (B, H, W) Σ log p(x_i | z) so far
    code_square: Tensor  # (B,) Σ mean square of the code so far
    drawn: Tensor  # (B,) int64: importance samples so far


class VAE(_protocol.Model, _protocol.Density, _protocol.Autoencoder, _protocol.Localiser):
    """Objective, sampler and bound of either kind. A sample is one pass of the decoder.

    numbers         N of a code
    group_count     G: how many terms the KL has
    """

    numbers: int
    group_count: int

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        self.spec = Spec(
            family="vae",
            image=replace(space, captions=False),
            steps=Steps(unit="pass"),
            solvers=("mean", "draw"),
            likelihood=Likelihood(
                kind="bound",
                dequantisation="none",
                note=f"importance-weighted, S={config.importance_samples}",
                steps=math.ceil(config.importance_samples / SAMPLES_PER_STEP),
                heatmap_evaluations=1,
            ),
            temperature=Range(min=0.0, default=1.0, max=2.0),
        )
        self.likelihood = pixel_likelihood(config.likelihood, space.channels, config.components)

    # q, p and the decoder

    @abc.abstractmethod
    def infer(self, x: Tensor, labels: Tensor, noise: Tensor) -> Inference:
        """Everything that a bound is made of, for x (B, C, H, W), labels (B,), -1 for none, and S standard normals of
        q for each image, noise (B·S, N), those of an image one after the other."""

    @abc.abstractmethod
    def code(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, N): where q(z | x, y) has its mean."""

    @abc.abstractmethod
    def draw_code(self, labels: Tensor, noise: Tensor, uniform: Tensor) -> Tensor:
        """(B, N): of p(z | y), from standard normals (B, N), scaled by a temperature, and uniforms (B, 1)."""

    @abc.abstractmethod
    def decode(self, code: Tensor, labels: Tensor) -> Tensor:
        """(B, P, H, W), the parameters of `self.likelihood`, for codes (B, N) and labels (B,)."""

    def reconstruct(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]: the expected image at the image's code."""
        return self.likelihood.mean(self.decode(self.code(x, labels), labels))

    def interpolate(self, x_a: Tensor, x_b: Tensor, n: int, labels: Tensor) -> Tensor:
        """(B, n, C, H, W) in [0, 1]: expected images along the line from the code of x_a to that of x_b, both included.

        Raises `ValueError` for n < 2.
        """
        if n < 2:
            raise ValueError(f"n: {n}; the two ends alone are 2 images")
        share = torch.linspace(0, 1, n, device=x_a.device)[:, None]
        line = torch.lerp(self.code(x_a, labels)[:, None], self.code(x_b, labels)[:, None], share)  # (B, n, N)
        images = self.likelihood.mean(self.decode(line.flatten(0, 1), labels.repeat_interleave(n)))
        return images.view(-1, n, *images.shape[1:])

    # objective

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"vae": list(self.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """The negative ELBO in bits/dim, one z an image. The KL term's weight rises over the first part of training,
        lest the decoder learns to do without z before z says anything (arXiv 1511.06349, §3.1)."""
        x = batch.x
        hidden = torch.rand(len(x), device=x.device) < self.config.label_dropout
        labels = batch.labels.masked_fill(hidden, _protocol.UNLABELLED)
        params, _, _, kl = self.infer(x, labels, torch.randn(len(x), self.numbers, device=x.device))
        log_px = self.likelihood.log_prob(params, x).sum(dim=(1, 2)).mean()
        kl = kl.mean(dim=0)  # (G,)
        warmup = self.config.kl_warmup * batch.steps
        weight = min(1.0, (batch.step + 1) / warmup) if warmup > 0 else 1.0
        bits = 1 / (self.spec.image.dims * math.log(2))
        metrics = {
            "bits_per_dim": ((kl.sum() - log_px) * bits).detach(),
            "reconstruction": -log_px.detach(),
            "kl": kl.sum().detach(),
        }
        if self.group_count > 1:
            metrics |= {f"kl_{k}": value for k, value in enumerate(kl.detach())}
        yield "vae", (weight * kl.clamp(min=self.config.free_bits).sum() - log_px) * bits, metrics

    # sampler

    def init(self, draws: Sequence[Draw]) -> VAERows:
        device, b = self.device, len(draws)
        return VAERows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.ones(b, dtype=torch.int64, device=device),
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], device=device),
            label=torch.tensor([d.label for d in draws], device=device),
            temperature=torch.tensor([d.temperature for d in draws], dtype=torch.float32, device=device),
            drawn=torch.tensor([d.solver == "draw" for d in draws], device=device),
            x=torch.full((b, *self.spec.image.shape), 0.5, device=device),
        )

    def step(self, rows: VAERows) -> VAERows:
        """z from the prior, its noise scaled by the temperature; then the pixels' mean, or a draw of each."""
        noise = _random.normal(rows.seed, rows.sample, rows.tick, PRIOR, (self.numbers,))
        uniform = _random.uniform(rows.seed, rows.sample, rows.tick, COMPONENT, (1,))
        code = self.draw_code(rows.label, rows.temperature[:, None] * noise, uniform)
        params = self.decode(code, rows.label)
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
            kl=x.new_zeros(b, self.group_count),
            pixels=x.new_zeros(b, *x.shape[2:]),
            code_square=x.new_zeros(b),
            drawn=torch.zeros(b, dtype=torch.int64, device=x.device),
        )

    def score_step(self, rows: BoundRows) -> BoundRows:
        """SAMPLES_PER_STEP more importance samples of every image (as many as are missing, at the last step)."""
        s, b = SAMPLES_PER_STEP, len(rows.x)
        noise = _random.normal(rows.seed, torch.zeros_like(rows.seed), rows.tick, PRIOR, (s * self.numbers,))
        params, code, log_ratio, kl = self.infer(rows.x, rows.label, noise.view(b * s, -1))
        pixels = self.likelihood.log_prob(params, rows.x.repeat_interleave(s, dim=0))
        pixels = pixels.view(b, s, *pixels.shape[1:])
        log_px = pixels.sum(dim=(2, 3))
        log_w = log_px + log_ratio.view(b, s)
        surplus = rows.drawn[:, None] + torch.arange(s, device=log_w.device) >= self.config.importance_samples
        rows.log_w = torch.logaddexp(rows.log_w, log_w.masked_fill(surplus, -math.inf).logsumexp(dim=1))
        rows.reconstruction = rows.reconstruction + log_px.masked_fill(surplus, 0.0).sum(dim=1)
        rows.kl = rows.kl + kl.view(b, s, -1).masked_fill(surplus[:, :, None], 0.0).sum(dim=1)
        rows.pixels = rows.pixels + pixels.masked_fill(surplus[:, :, None, None], 0.0).sum(dim=1)
        square = code.view(b, s, -1).square().mean(dim=2)
        rows.code_square = rows.code_square + square.masked_fill(surplus, 0.0).sum(dim=1)
        rows.drawn = (rows.drawn + s).clamp(max=self.config.importance_samples)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def score(self, rows: BoundRows) -> Score:
        """log (1/S) Σ w. The statistics are the two terms of the negative ELBO, −E_q log p(x | z) and the KL; what each
        group of a hierarchy adds to the KL, coarsest first; the largest part of the former in a tile of TILE × TILE
        pixels; and the mean square of the code's numbers, of which a draw from a standard normal prior has 1."""
        kl = rows.kl / rows.drawn[:, None]
        statistics = {
            "reconstruction_nats": -rows.reconstruction / rows.drawn,
            "kl_nats": kl.sum(dim=1),
            "worst_tile_nats": tiles(-rows.pixels / rows.drawn[:, None, None], TILE).amax(dim=(1, 2)),
            "code_square": rows.code_square / rows.drawn,
        }
        if self.group_count > 1:
            statistics |= {f"kl_nats_{k}": group for k, group in enumerate(kl.unbind(dim=1))}
        return Score(log_prob=rows.log_w - rows.drawn.to(rows.log_w.dtype).log(), statistics=statistics)

    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        """−log p(x_i | z) at the image's code, less what draws from p(· | z) cost in the mean: nats."""
        params, seed = self.decode(self.code(x, labels), labels), _random.image_seed(x)
        none, expected = torch.zeros_like(seed), torch.zeros_like(x[:, 0])
        for k in range(MAP_DRAWS):
            uniforms = _random.uniform(seed, none, k, PIXELS, (self.likelihood.uniforms, *x.shape[2:]))
            expected -= self.likelihood.log_prob(params, self.likelihood.draw(params, uniforms)) / MAP_DRAWS
        return -self.likelihood.log_prob(params, x) - expected


@final
class Flat(VAE):
    """One latent vector. Its code is z."""

    prior_logits: Tensor

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__(config, space)
        self.numbers, self.group_count = config.latent, 1
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

    def encode(self, x: Tensor, labels: Tensor) -> Normal:
        """q(z | x, y) for x (B, C, H, W) and labels (B,), -1 for none: (mean, log_std), each (B, latent)."""
        features = self._features(labels) if self.config.label_in_encoder else x.new_zeros(len(x), 0)
        mean, log_std = self.encoder(x, features).float().chunk(2, dim=1)
        return Normal(mean, log_std.clamp(-10.0, 10.0))

    def prior(self, labels: Tensor) -> Mixture:
        """p(z | y) for labels (B,), -1 for none."""
        y = self._index(labels)
        return Mixture(self.prior_logits[y].log_softmax(dim=1), Normal(self.prior_mean[y], self.prior_log_std[y]))

    def infer(self, x: Tensor, labels: Tensor, noise: Tensor) -> Inference:
        s = len(noise) // len(x)
        q, p = self.encode(x, labels), self.prior(labels)
        z = q.expand(s).at(noise.view(len(x), s, -1))  # (B, S, latent)
        log_ratio = p.log_prob(z) - q.expand(s).log_prob(z)
        code = z.flatten(0, 1)
        params = self.decode(code, labels.repeat_interleave(s))
        return Inference(params, code, log_ratio.flatten(), p.kl_from(q).repeat_interleave(s)[:, None])

    def code(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.encode(x, labels).mean

    def draw_code(self, labels: Tensor, noise: Tensor, uniform: Tensor) -> Tensor:
        return self.prior(labels).at(noise, uniform)

    def decode(self, code: Tensor, labels: Tensor) -> Tensor:
        out: Tensor = self.decoder(code, self._features(labels))
        return out.float()

    def _index(self, labels: Tensor) -> Tensor:
        return torch.where(labels < 0, self.spec.image.classes, labels)

    def _features(self, labels: Tensor) -> Tensor:
        if not self.spec.image.labels:
            return torch.zeros(len(labels), 0, device=labels.device)
        features: Tensor = self.label_features(self._index(labels))
        return features


@final
class Hierarchical(VAE):
    """Groups of latents from coarse to fine. Its code is whitened, so a draw of the prior is noise and no more."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__(config, space)
        self.top_down = TopDown(
            space.shape,
            space.classes,
            config.groups,
            config.group_channels,
            config.width,
            config.blocks,
            self.likelihood.initial_bias(),
        )
        self.numbers, self.group_count = self.top_down.numbers, sum(config.groups)

    def infer(self, x: Tensor, labels: Tensor, noise: Tensor) -> Inference:
        return self.top_down.infer(x, labels, noise)

    def code(self, x: Tensor, labels: Tensor) -> Tensor:
        """Each group at the mean of q given the means of those above it."""
        return self.top_down.infer(x, labels, x.new_zeros(len(x), self.numbers)).code

    def draw_code(self, labels: Tensor, noise: Tensor, uniform: Tensor) -> Tensor:
        return noise

    def decode(self, code: Tensor, labels: Tensor) -> Tensor:
        return self.top_down.decode(code, labels)


def Model(config: Config, space: ImageSpace) -> VAE:
    """The VAE that the config describes. Raises `ValueError` for a config or an image space that it does not allow."""
    return Hierarchical(config, space) if config.groups else Flat(config, space)


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
    if len(config.group_channels) != len(config.groups) or min(config.group_channels, default=1) < 1:
        raise ValueError(
            f"group_channels: {config.group_channels}; one positive number for each of the {len(config.groups)} levels "
            "of groups"
        )
    if config.groups and (min(config.groups) < 0 or config.groups[-1] < 1):
        raise ValueError(
            f"groups: {config.groups}; none is negative, and the coarsest level, the last, has one at least"
        )
    if config.free_bits < 0:
        raise ValueError(f"free_bits: {config.free_bits}; not negative")
    for name in ("label_dropout", "kl_warmup"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: {getattr(config, name)} is not in [0, 1]")
    multiple = 2 if config.groups else 4
    if space.height % multiple or space.width % multiple or not space.height or not space.width:
        raise ValueError(f"image: {space.width}×{space.height}; width and height must be multiples of {multiple}")
