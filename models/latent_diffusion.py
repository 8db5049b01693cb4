"""Latent diffusion (Rombach et al., arXiv 2112.10752), class-conditional: a diffusion of an autoencoder's codes.

Two stages in one run, parted where `autoencoder_share` of its steps are taken:

    1  an autoencoder: x -> z, h × w × c codes at 1 / 2^L of the resolution, and back. The codes are drawn from a
       Gaussian whose mean and spread the encoder gives out, lightly pulled to N(0, I) (the paper's "KL-reg."): so
       the decoder bears small errors of z, which is what a diffusion makes.
    2  a diffusion of u = (z − m) / s, the autoencoder frozen. m and s, the mean and the standard deviation of every
       channel of z, are measured as the stage begins and kept as buffers.

A critic of patches, which joins the first stage when `critic_from` of it is done, keeps the decoder from averaging
what the codes do not say (arXiv 2012.09841, §3.1): its term is weighted so that at the decoder's last layer its
gradient is `critic_weight` times the distance's.

What differs from the paper: no perceptual loss, which would bring a network trained on other images; s and m belong to
a channel, not to all; v-prediction and the cosine schedule, as `models/ddpm.py`; labels by AdaGN, not by
cross-attention.

    variable          paper
    z                 z = E(x)
    u                 z, rescaled by its component-wise standard deviation (appendix G)
    alpha, sigma      √ᾱ_t, √(1 − ᾱ_t), for t = 0 … T
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _protocol, _random, _solvers
from models._diffusion import (
    PREDICTIONS,
    SCHEDULES,
    SOLVERS,
    column,
    signal_and_noise,
    solver_table,
    stratified,
    target,
    x0_from,
)
from models._nn import UNet, at_least, guided, image_norm, zeroed
from models._protocol import Batch, Draw, ImageSpace, Range, Spec, Steps

MAX_GUIDANCE = 10.0
MAX_BALANCE = 1e4  # of the critic's term: a critic that says nothing has no gradient
MAX_LOG_STD = 4.0  # of a code, either way: beyond it exp would only lose digits
SHARPNESS = 0.01  # where the distance of pixels on [−1, 1] turns from a square into an absolute value (Charbonnier's ε)


@dataclass(frozen=True)
class Config:
    """Everything that shapes the networks, the diffusion and the objective."""

    widths: tuple[int, ...] = (32, 64)  # channels of the autoencoder at 1/2, 1/4, ... of the resolution
    code_channels: int = 8  # c
    autoencoder_blocks: int = 1  # residual blocks of the autoencoder at each resolution, on each side
    kl_weight: float = 1e-3  # of the pull to N(0, I), in nats per dimension of the image
    critic_width: int = 32  # channels of the critic at half the resolution, twice as many below
    critic_weight: float = 0.1  # 0: the critic learns, and nobody listens
    critic_from: float = 0.2  # part of the first stage after which the critic is there
    autoencoder_share: float = 0.25  # part of the steps that the first stage takes
    channels: int = 64  # of the U-Net at the codes' resolution
    multipliers: tuple[int, ...] = (1,)  # of `channels`, at each further halving
    blocks: int = 2  # residual blocks at each resolution, on each side
    attention: tuple[int, ...] = (0,)  # levels with attention, 0 = the codes' resolution; the middle always has it
    prediction: str = "v"  # "epsilon", "x0" or "v"
    schedule: str = "cosine"  # or "linear"
    timesteps: int = 1000  # T
    label_dropout: float = 0.1  # how often training hides the label, so that p(x) is learnt next to p(x | y)
    guidance_scale: float = 1.5  # default of a request
    default_steps: int = 50


# ---------------------------------------------------------------------------------------------------------- autoencoder


class Residual(nn.Module):
    """x + f(x) with two 3×3 convolutions, the identity at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = image_norm(channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.second(F.silu(self.first(F.silu(self.norm(x)))))
        return out


class Encoder(nn.Module):
    """(B, C, H, W) on the scale [−1, 1] -> (B, 2c, h, w) float32: means and log-stds of the codes."""

    def __init__(self, config: Config, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, width in pairwise((channels, *config.widths)):
            layers.append(nn.Conv2d(before, width, 3, stride=2, padding=1))
            layers += (Residual(width) for _ in range(config.autoencoder_blocks))
        self.layers = nn.Sequential(*layers, nn.SiLU(), nn.Conv2d(config.widths[-1], 2 * config.code_channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out.float()


class Decoder(nn.Module):
    """Codes (B, c, h, w) -> (B, C, H, W) float32, about on the scale [−1, 1].

    sizes: (height, width) of every resolution from the codes' to the image's, so that odd ones come back as they were.
    """

    def __init__(self, config: Config, channels: int, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        widths = (*reversed(config.widths), max(1, config.widths[0] // 2))
        self.sizes = tuple(sizes[1:])
        self.stem = nn.Conv2d(config.code_channels, widths[0], 3, padding=1)
        self.levels = nn.ModuleList(
            nn.Sequential(*(Residual(width) for _ in range(config.autoencoder_blocks))) for width in widths[:-1]
        )
        self.upsample = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths))
        self.out = nn.Conv2d(widths[-1], channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.stem(z)
        for level, upsample, size in zip(self.levels, self.upsample, self.sizes, strict=True):
            h = upsample(F.interpolate(F.silu(level(h)), size=size))
        out: Tensor = self.out(F.silu(h))
        return out.float()


class Critic(nn.Sequential):
    """(B, C, H, W) on the scale [−1, 1] -> (B, 1, H/4, W/4): how real each patch of about 15×15 pixels looks."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(channels, width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(2 * width, 1, 1, bias=False),  # the hinge loss would have real and fake cancel in it
        )
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, a=0.2)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class LatentRows(_solvers.Chain):
    """`x` is u, not an image."""

    label: Tensor  # (B,) int64, -1 without
    guidance: Tensor  # (B,)


class Model(_protocol.Model, _protocol.Autoencoder):
    """Autoencoder and critic, U-Net of the codes, the objectives of both stages, samplers."""

    training_only = ("critic",)

    alpha: Tensor  # (T + 1,) each, by t = 0 … T
    sigma: Tensor
    code_mean: Tensor  # m (c, 1, 1)
    code_scale: Tensor  # s (c, 1, 1)

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _validate(config)
        self.config = config
        sizes = [(space.height, space.width)]
        for _ in config.widths:
            sizes.insert(0, ((sizes[0][0] + 1) // 2, (sizes[0][1] + 1) // 2))
        self.code_shape = (config.code_channels, *sizes[0])
        self.encoder = Encoder(config, space.channels)
        self.decoder = Decoder(config, space.channels, sizes)
        self.critic = Critic(config.critic_width, space.channels)
        self.network = UNet(
            in_channels=config.code_channels,
            out_channels=config.code_channels,
            channels=config.channels,
            multipliers=config.multipliers,
            blocks=config.blocks,
            attention=config.attention,
            classes=space.classes,
        )
        self.path = signal_and_noise(config.schedule, config.timesteps)  # float64, as the solvers' tables want it
        for name, values in zip(("alpha", "sigma"), self.path, strict=True):
            self.register_buffer(name, values.float(), persistent=False)
        self.register_buffer("code_mean", torch.zeros(config.code_channels, 1, 1))
        self.register_buffer("code_scale", torch.ones(config.code_channels, 1, 1))
        self.spec = Spec(
            family="latent_diffusion",
            image=replace(space, captions=False),
            steps=Steps("denoising step", min=1, default=config.default_steps, max=config.timesteps),
            solvers=SOLVERS,
            guidance_scale=Range(0.0, config.guidance_scale, MAX_GUIDANCE) if space.labels else None,
            prediction=config.prediction,  # type: ignore[arg-type]
        )

    # ---- images and codes

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-std of z, each (B, c, h, w), for images x (B, C, H, W) in [0, 1]."""
        mean, log_std = self.encoder(2 * at_least(2, x) - 1)[: len(x)].chunk(2, dim=1)
        return mean, log_std.clamp(-MAX_LOG_STD, MAX_LOG_STD)

    def decode(self, z: Tensor) -> Tensor:
        """z (B, c, h, w) -> images (B, C, H, W) in [0, 1]."""
        out: Tensor = self.decoder(at_least(2, z))[: len(z)]
        return ((out + 1) / 2).clamp(0.0, 1.0)

    def reconstruct(self, x: Tensor, labels: Tensor) -> Tensor:
        return self.decode(self.posterior(x)[0])

    # ---- training

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {
            "critic": list(self.critic.parameters()),
            "autoencoder": [*self.encoder.parameters(), *self.decoder.parameters()],
            "diffusion": list(self.network.parameters()),
        }

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        boundary = int(self.config.autoencoder_share * batch.steps)
        if batch.step < boundary:
            yield from self._autoencoding(batch.x, batch.step >= int(self.config.critic_from * boundary))
            return
        with torch.no_grad():
            mean, log_std = self.posterior(batch.x)
            z = mean + log_std.exp() * torch.randn_like(mean)
            if batch.step == boundary:
                self.measure(z)
        yield self._denoising((z - self.code_mean) / self.code_scale, batch.labels)

    def _autoencoding(self, images: Tensor, criticised: bool) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """The critic's hinge loss; then the distance of the pixels on [−1, 1] (L1 with a rounded tip), the pull of the
        codes to N(0, I), and what the critic says."""
        c, x = self.config, 2 * images - 1
        mean, log_std = self.posterior(images)
        out = self.decoder(mean + log_std.exp() * torch.randn_like(mean))
        if criticised:
            real, fake = self.critic(torch.cat([x, out.detach()])).float().chunk(2)
            hinge = F.relu(1 - real).mean() + F.relu(1 + fake).mean()
            yield "critic", hinge, {"margin": (real.mean() - fake.mean()).detach()}
        distance = ((out - x).square() + SHARPNESS**2).sqrt().mean()
        kl = (0.5 * (mean.square() + (2 * log_std).exp() - 1) - log_std).sum() / x.numel()
        loss = distance + c.kl_weight * kl
        if criticised:
            doubt = -self.critic(out).float().mean()
            loss = loss + c.critic_weight * self._balance(distance, doubt) * doubt
        yield "autoencoder", loss, {"l1": distance.detach(), "kl": kl.detach()}

    def _balance(self, distance: Tensor, doubt: Tensor) -> Tensor:
        """How many times as large the distance's gradient is as the critic's, at the decoder's last layer."""
        last = self.decoder.out.weight
        near, far = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (distance, doubt))
        balance: Tensor = (near / (far + 1e-4)).clamp(max=MAX_BALANCE)
        return balance

    def measure(self, z: Tensor) -> None:
        """Keep mean and standard deviation of each channel of z (B, c, h, w)."""
        self.code_mean.copy_(z.mean(dim=(0, 2, 3))[:, None, None])
        self.code_scale.copy_(z.std(dim=(0, 2, 3))[:, None, None])

    def _denoising(self, u: Tensor, labels: Tensor) -> tuple[str, Tensor, Mapping[str, Tensor]]:
        """Squared error of the network's own prediction, t uniform (eq. 2)."""
        c, b = self.config, len(u)
        t = (stratified(b, u.device) * c.timesteps).long() + 1
        alpha, sigma, noise = column(self.alpha[t]), column(self.sigma[t]), torch.randn_like(u)
        hidden = torch.rand(b, device=u.device) < c.label_dropout
        out = self.network(alpha * u + sigma * noise, t / c.timesteps, labels.masked_fill(hidden, -1))
        loss = F.mse_loss(out, target(c.prediction, u, noise, alpha, sigma))
        return "diffusion", loss, {"mse": loss.detach()}

    # ---- sampling

    def init(self, draws: Sequence[Draw]) -> LatentRows:
        device = self.device
        tables = {key: solver_table(*key, *self.path) for key in {(d.solver or SOLVERS[0], d.steps) for d in draws}}
        return LatentRows.begin(
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], device=device),
            tables=[tables[d.solver or SOLVERS[0], d.steps] for d in draws],
            ticks=self.config.timesteps,
            memory=1,
            shape=self.code_shape,
            label=torch.tensor([d.label for d in draws], device=device),
            guidance=torch.tensor([d.guidance_scale for d in draws], dtype=torch.float32, device=device),
        )

    def step(self, rows: LatentRows) -> LatentRows:
        time, alpha, sigma = _solvers.now(rows)[:3]
        out = guided(self.network, rows.x, time, rows.label, rows.guidance)
        return _solvers.advance(rows, x0_from(self.config.prediction, out, rows.x, column(alpha), column(sigma)))

    def image(self, rows: LatentRows) -> Tensor:
        """What the latest estimate of u stands for: every solver ends at one."""
        return self.decode(self.code_mean + self.code_scale * rows.memory[0])


def _validate(config: Config) -> None:
    for name in ("code_channels", "critic_width", "channels", "blocks", "timesteps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; it must be at least 1")
    for name in ("widths", "multipliers"):
        if not getattr(config, name) or min(getattr(config, name)) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; one positive number for each resolution")
    if not all(0 <= level < len(config.multipliers) for level in config.attention):
        raise ValueError(f"attention: {config.attention}; the levels are 0 … {len(config.multipliers) - 1}")
    for name in ("autoencoder_blocks", "kl_weight", "critic_weight"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: {getattr(config, name)}; at least 0")
    for name, allowed in (("prediction", PREDICTIONS), ("schedule", SCHEDULES)):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}: {getattr(config, name)!r}; there are {', '.join(allowed)}")
    for name in ("label_dropout", "autoencoder_share", "critic_from"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)} is not in [0, 1)")
    if not 0 <= config.guidance_scale <= MAX_GUIDANCE:
        raise ValueError(f"guidance_scale: {config.guidance_scale} is not in 0 … {MAX_GUIDANCE:g}")
    if not 1 <= config.default_steps <= config.timesteps:
        raise ValueError(f"default_steps: {config.default_steps} is not in 1 … timesteps = {config.timesteps}")
