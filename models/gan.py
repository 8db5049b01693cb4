"""Generative adversarial network, class-conditional: a generator G draws an image in one pass, taught by a critic D.

Two objectives, by `Config.objective`:

    hinge    E max(0, 1 − D(x)) + E max(0, 1 + D(G(z)))  against  −E D(G(z))         (arXiv 1802.05957, eq. 16 and 17)
             with R1, γ/2 E |∇ₓ D(x)|² on real images                                 (arXiv 1801.04406, eq. 9)
    wgan-gp  E D(G(z)) − E D(x)  against  −E D(G(z)), with λ E (|∇ D(x̂)| − 1)² on
             lines between real and drawn images, `n_critic` critic updates per step  (arXiv 1704.00028, algorithm 1)

The class enters the critic by projection (arXiv 1802.05637, eq. 3) and the generator through conditional normalisation,
whose gains and biases are a linear map of (z, class embedding). Options: spectral norm on every layer of the critic
(arXiv 1802.05957), one self-attention layer in each network (arXiv 1805.08318).

What differs from the papers: layer norm where they have batch norm, so an image never depends on its batch mates; the
penalty is taken every `penalty_every` steps at so many times its weight (arXiv 1912.04958, section 3.1), so the paper's
WGAN-GP has `penalty_every = 1`.

    symbol      variable            meaning
    z           z                   latent code, (B, latent), standard normal; scaled by the request's temperature
    y           labels              class
    φ           features            the critic's features, (B, channels)
    ψ, e_y      output, classes     its linear reading and its class embedding:  D(x, y) = ψ(φ(x)) + ⟨e_y, φ(x)⟩
    γ, λ        penalty             weight of R1, of the gradient penalty

Temperature is truncation by scaling: z is drawn and multiplied by it, so at 0 every seed gives the class's one central
image. A request without a label draws its label from its own noise, uniformly: the mixture over classes.

Shapes: B rows, C channels, (H, W) image; images lie in [−1, 1] between the two networks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import spectral_norm

from models import _protocol, _random
from models._protocol import Batch, Draw, ImageSpace, Range, Rows, Spec, Steps

_LATENT, _LABEL = 0, 1  # draws of a row's noise at tick 0


@dataclass(frozen=True)
class Config:
    """Widths and depths are per resolution, finest first; each further one halves height and width."""

    objective: str = "hinge"  # "hinge" (with R1) or "wgan-gp"
    latent: int = 64
    embedding: int = 32  # of the class, beside z
    generator_channels: tuple[int, ...] = (16, 64, 96)
    critic_channels: tuple[int, ...] = (16, 64, 96)
    blocks: tuple[int, ...] = (0, 0, 1)  # residual blocks at each resolution, in both networks
    attention: int = 0  # height of the feature map that a self-attention layer looks at; 0: none
    spectral_norm: bool = False
    n_critic: int = 1  # critic updates per generator update, on disjoint parts of the batch
    penalty: float = 0.3  # γ of R1 ("hinge"), λ of the gradient penalty ("wgan-gp")
    penalty_every: int = 8  # steps

    def check(self, space: ImageSpace) -> None:
        """Raises `ValueError` naming the field, its value and what would be right."""
        if space.captions:
            raise ValueError("captions: True; this family takes labels or nothing")
        if self.objective not in ("hinge", "wgan-gp"):
            raise ValueError(f'objective: "{self.objective}"; "hinge" or "wgan-gp"')
        for name in ("latent", "embedding", "n_critic", "penalty_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)}; at least 1")
        if self.penalty < 0:
            raise ValueError(f"penalty: {self.penalty}; not negative")
        levels = len(self.generator_channels)
        if levels < 2:
            raise ValueError(f"generator_channels: {self.generator_channels}; at least two resolutions")
        for name in ("critic_channels", "blocks"):
            if len(getattr(self, name)) != levels:
                raise ValueError(f"{name}: {getattr(self, name)}; {levels} numbers, as many as generator_channels")
        if min(self.generator_channels + self.critic_channels) < 1 or min(self.blocks) < 0:
            raise ValueError(
                f"generator_channels, critic_channels, blocks: {self.generator_channels}, {self.critic_channels}, "
                f"{self.blocks}; widths are at least 1, depths at least 0"
            )
        scale = 2 ** (levels - 1)
        if space.height % scale or space.width % scale:
            raise ValueError(
                f"generator_channels: {levels} resolutions halve {levels - 1} times, and the image's "
                f"{space.width}×{space.height} is not a multiple of {scale}"
            )
        heights = [space.height >> i for i in range(levels)]
        if self.attention and self.attention not in heights:
            raise ValueError(f"attention: {self.attention}; 0 or one of the heights {heights}")


# -------------------------------------------------------------------------------------------------------------- blocks


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
    """Layer norm over (C, H, W) of each row; gain and bias per channel are a linear map of the code (B, code)."""

    def __init__(self, channels: int, code: int) -> None:
        super().__init__()
        self.affine = nn.Linear(code, 2 * channels)

    def forward(self, x: Tensor, code: Tensor) -> Tensor:
        affine: Tensor = self.affine(code)[:, :, None, None]
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


class CriticBlock(nn.Module):
    """Residual block of two 3×3 convolutions, without a norm. (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.leaky_relu(x, 0.2))
        h = self.conv2(F.leaky_relu(h, 0.2))
        return (x + h) * math.sqrt(0.5)  # keeps the variance at any depth


# ------------------------------------------------------------------------------------------------------------ networks


class Generator(nn.Module):
    """(z, y) -> image in [−1, 1], from the coarsest resolution up: a convolution and a pixel shuffle double it."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        widths, levels = config.generator_channels, len(config.generator_channels)
        self.start_shape = (widths[-1], space.height >> (levels - 1), space.width >> (levels - 1))
        self.embedding = nn.Embedding(space.classes, config.embedding) if space.classes else None
        code = config.latent + (config.embedding if space.classes else 0)
        self.start = nn.Linear(code, math.prod(self.start_shape))
        self.stages = nn.ModuleList(
            GeneratorStage(
                widths[level],
                target=4 * widths[level - 1] if level else space.channels,
                code=code,
                blocks=config.blocks[level],
                attention=config.attention == space.height >> level,
            )
            for level in reversed(range(levels))
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        """z (B, latent), labels (B,) all given where there are classes -> (B, C, H, W)."""
        code = z if self.embedding is None else torch.cat([z, self.embedding(labels)], dim=1)
        h = self.start(code).view(-1, *self.start_shape).contiguous(memory_format=torch.channels_last)
        for i, stage in enumerate(self.stages):
            h = stage(F.pixel_shuffle(h, 2) if i else h, code)
        return torch.tanh(h)


class Critic(nn.Module):
    """(image in [−1, 1], y) -> logit (B,). A label of −1 reads the image alone: no projection."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        widths, levels = config.critic_channels, len(config.critic_channels)
        layers: list[nn.Module] = [nn.Conv2d(space.channels, widths[0], 3, padding=1)]
        for level in range(levels):
            if level:
                layers += [nn.LeakyReLU(0.2), nn.Conv2d(widths[level - 1], widths[level], 4, stride=2, padding=1)]
            layers += [CriticBlock(widths[level]) for _ in range(config.blocks[level])]
            if config.attention == space.height >> level:
                layers.append(SelfAttention(widths[level]))
        self.layers = nn.Sequential(*layers, nn.LeakyReLU(0.2))
        size = (space.height >> (levels - 1), space.width >> (levels - 1))
        self.pool = nn.Conv2d(widths[-1], widths[-1], size, groups=widths[-1])  # a weighted sum over positions
        self.mix = nn.Linear(widths[-1], widths[-1])
        self.output = nn.Linear(widths[-1], 1)
        self.classes = nn.Embedding(space.classes, widths[-1]) if space.classes else None
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.2, nonlinearity="leaky_relu")
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=widths[-1] ** -0.5)
        if config.spectral_norm:
            for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]:
                spectral_norm(layer)

    def features(self, x: Tensor) -> Tensor:
        """φ(x): (B, C, H, W) -> (B, channels)."""
        h = self.pool(self.layers(x.contiguous(memory_format=torch.channels_last)))
        return F.leaky_relu(self.mix(F.leaky_relu(h.flatten(1), 0.2)), 0.2)

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        features = self.features(x)
        logit: Tensor = self.output(features)[:, 0]
        if self.classes is not None:
            projection = (self.classes(labels.clamp(min=0)) * features).sum(dim=1)
            logit = logit + projection * (labels >= 0)
        return logit


# ---------------------------------------------------------------------------------------------------------- objectives

CriticFunction = Callable[[Tensor, Tensor], Tensor]  # (x, labels) -> logits (B,)


def gradient_norm_squared(critic: CriticFunction, x: Tensor, labels: Tensor) -> Tensor:
    """(B,) |∇ₓ D(x, y)|², itself differentiable; in the precision of x and the weights, whatever the autocast."""
    with torch.autocast(x.device.type, enabled=False):
        x = x.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(critic(x, labels).sum(), x, create_graph=True)
        return gradient.square().sum(dim=(1, 2, 3))


def r1_penalty(critic: CriticFunction, real: Tensor, labels: Tensor) -> Tensor:
    """R1: ½ E |∇ₓ D(x)|² over real images (arXiv 1801.04406, eq. 9, without γ)."""
    return gradient_norm_squared(critic, real, labels).mean() / 2


def gradient_penalty(critic: CriticFunction, real: Tensor, fake: Tensor, labels: Tensor) -> Tensor:
    """E (|∇ D(x̂)| − 1)², x̂ uniform between a real and a drawn image (arXiv 1704.00028, eq. 3, without λ)."""
    epsilon = torch.rand(real.shape[0], 1, 1, 1, device=real.device)
    norm = gradient_norm_squared(critic, torch.lerp(fake, real, epsilon), labels).clamp(min=1e-12).sqrt()
    return (norm - 1).square().mean()


def hinge_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's hinge loss on its logits (arXiv 1802.05957, eq. 16)."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def wasserstein_loss(real: Tensor, fake: Tensor) -> Tensor:
    """The critic's estimate of the Wasserstein-1 distance, negated (arXiv 1704.00028, eq. 2)."""
    return fake.mean() - real.mean()


# --------------------------------------------------------------------------------------------------------------- model


@dataclass
class GanRows(Rows):
    z: Tensor  # (B, latent), scaled by the temperature
    labels: Tensor  # (B,), drawn where none was asked for; 0 where the model has no classes
    x: Tensor  # (B, C, H, W) in [0, 1]; mid-grey until the pass


class Model(_protocol.Model):
    """Generator and critic; samples by the generator alone."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        config.check(space)
        self.config = config
        self.spec = Spec(family="gan", image=space, steps=Steps(unit="pass"), temperature=Range(0.0, 1.0, 1.5))
        self.generator = Generator(config, space)
        self.critic = Critic(config, space)

    # Training

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"critic": list(self.critic.parameters()), "generator": list(self.generator.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """`n_critic` critic losses, each on its part of the batch, then the generator's under the updated critic."""
        due = self.config.penalty > 0 and (batch.step + 1) % self.config.penalty_every == 0
        weight = self.config.penalty * self.config.penalty_every
        parts = zip(batch.x.chunk(self.config.n_critic), batch.labels.chunk(self.config.n_critic), strict=True)
        for x, labels in parts:
            real = 2 * x - 1
            with torch.no_grad():
                fake = self._draw(labels).float()
            logits_real, logits_fake = self.critic(torch.cat([real, fake]), labels.repeat(2)).float().chunk(2)
            metrics = {"critic gap": (logits_real.mean() - logits_fake.mean()).detach()}
            if self.config.objective == "hinge":
                loss = hinge_loss(logits_real, logits_fake)
                penalty = r1_penalty(self.critic, real, labels) if due else None
            else:
                loss = wasserstein_loss(logits_real, logits_fake)
                penalty = gradient_penalty(self.critic, real, fake, labels) if due else None
            if penalty is not None:
                loss = loss + weight * penalty
                metrics["critic penalty"] = penalty.detach()
            yield "critic", loss, metrics

        # The critic's weights are constants here: the generator's loss leaves no gradient on them.
        constants = {name: p.detach() for name, p in self.critic.named_parameters()}
        logits = functional_call(self.critic, constants, (self._draw(batch.labels), batch.labels))
        yield "generator", -logits.float().mean(), {}

    def _draw(self, labels: Tensor) -> Tensor:
        """Images in [−1, 1] for the labels of a batch, from torch's global generator."""
        z = torch.randn(labels.shape[0], self.config.latent, device=labels.device)
        if self.spec.image.classes:
            labels = torch.where(labels < 0, torch.randint_like(labels, self.spec.image.classes), labels)
        images: Tensor = self.generator(z, labels)
        return images

    # Sampling

    def init(self, draws: Sequence[Draw]) -> GanRows:
        device, b = self.device, len(draws)
        seed = _random.seed_bits([d.seed for d in draws], device)
        sample = torch.tensor([d.sample for d in draws], dtype=torch.int64, device=device)
        temperature = torch.tensor([d.temperature for d in draws], dtype=torch.float32, device=device)
        labels = torch.tensor([d.label for d in draws], dtype=torch.int64, device=device)
        word = _random.words(seed, sample, 0, _LABEL, 1)[:, 0]
        drawn = (word * self.spec.image.classes) >> 32  # uniform over the classes: a word has 32 bits
        return GanRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.ones(b, dtype=torch.int64, device=device),
            z=_random.normal(seed, sample, 0, _LATENT, (self.config.latent,)) * temperature[:, None],
            labels=torch.where(labels < 0, drawn, labels),
            x=torch.full((b, *self.spec.image.shape), 0.5, device=device),
        )

    def step(self, rows: GanRows) -> GanRows:
        rows.x = (self.generator(rows.z, rows.labels) + 1) / 2
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: GanRows) -> Tensor:
        return rows.x
