"""Generative adversarial network, told a class or a caption: a generator G draws an image in one pass, taught by a
critic D.

Three objectives, by `Config.objective`:

    hinge     E max(0, 1 − D(x)) + E max(0, 1 + D(G(z)))  against  −E D(G(z))        (arXiv 1802.05957, eq. 16 and 17)
    logistic  E log(1 + e^−D(x)) + E log(1 + e^D(G(z)))  against  E log(1 + e^−D(G(z)))           (1406.2661, §3)
              both with R1, γ/2 E |∇ₓ D(x)|² on real images                                   (1801.04406, eq. 9)
    wgan-gp   E D(G(z)) − E D(x)  against  −E D(G(z)), with λ E (|∇ D(x̂)| − 1)² on
              lines between real and drawn images, `n_critic` critic updates per step      (1704.00028, algorithm 1)

Two generators, by `Config.generator`: "residual" (`models._residual`), whose conditional normalisation takes gains and
biases from a linear map of (z, class embedding), and "style" (`models._style`), which data with captions need.

What an image is to show enters the critic by projection (1802.05637, eq. 3). Captions are taught in two further ways: a
real image with a wrong caption counts as drawn (1605.05396, algorithm 1), and both networks gain by images whose
features tell their caption among others (2101.04702, §4.1; `models._text`). One text encoder reads captions for both
networks, and learns by the critic's losses alone: what a caption means is learnt by matching it with images, as in
1605.05396 and 2101.04702 before the GAN's training and here beside it. Options: spectral norm on every layer of the
critic (1802.05957), one self-attention layer in each network of the residual kind (1805.08318).

A critic teaches a generator slowly what one pair of image and caption shows at once. So with `reconstruction` half of
the codes z come from training images, by an encoder that is learnt beside, and the generator is also to draw those
images anew: a conditional VAE whose decoder is the generator (VAE-GAN, 1512.09300, §2.3; with drawn codes as well, as
in 1711.11586, §3.3); and at first, up to `critic_from`, that alone, while the critic only learns to match real images
and captions. The encoder sees a coarse grey picture, so z tells where things lie, and mostly y what they are:

    −log p(x|z, y) + KL(q(z|x) | p(z)),  p = N(x; G(z, y), σ²),  in nats per number of the image

What differs from the papers: layer norm where they have batch norm, so an image never depends on its batch mates; the
penalty is taken every `penalty_every` steps at so many times its weight (arXiv 1912.04958, section 3.1), so the paper's
WGAN-GP has `penalty_every = 1`.

    symbol      variable            meaning
    z           z                   latent code, (B, latent), standard normal
    y           condition           class (B,), or the tokens of a caption (B, L)
    φ           features            the critic's features, (B, channels)
    ψ, e_y      output, embed       its linear reading and its embedding of y:  D(x, y) = ψ(φ(x)) + ⟨e_y, φ(x)⟩, of
                                    captions ψ(φ(x)) + 10 cos(e_y, φ(x))
    γ, λ        penalty             weight of R1, of the gradient penalty

Temperature is truncation, of z by scaling it or of the style (`models._style`). At 0 every seed gives one central image
of what was asked, but for the noise of a style generator's layers. A request without a label draws its label from its
own noise, uniformly: the mixture over classes. A request without a caption is drawn by a generator that has seen
captions hidden.

Shapes: B rows, C channels, (H, W) image; images lie in [−1, 1] between the two networks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models import _protocol, _random, _text
from models._adversarial import gradient_penalty, hinge_loss, logistic_loss, r1_penalty, wasserstein_loss
from models._captions import PADDING, Captions
from models._latents import Normal
from models._protocol import Batch, Draw, ImageSpace, Range, Rows, Spec, Steps
from models._residual import ResidualGenerator, SelfAttention
from models._style import StyleGenerator
from models._text import TextEncoder

OBJECTIVES = {"hinge": hinge_loss, "logistic": logistic_loss, "wgan-gp": wasserstein_loss}
COARSE = 4  # how many times smaller the picture is that the encoder sees
SIGMA = 0.25  # σ of p(x|z, y)
ALTERED = 8  # captions with another word that each image is told from
_LATENT, _LABEL, _NOISE = 0, 1, 2  # draws of a row's noise at tick 0; of noise, one for every layer from there


@dataclass(frozen=True)
class Config:
    """Widths and depths are per resolution, finest first; each further one halves height and width."""

    objective: str = "hinge"  # "hinge" or "logistic" (with R1), or "wgan-gp"
    latent: int = 64
    embedding: int = 32  # of the class, beside z
    generator_channels: tuple[int, ...] = (16, 64, 96)
    critic_channels: tuple[int, ...] = (16, 64, 96)
    blocks: tuple[int, ...] = (0, 0, 1)  # residual blocks at each resolution, in both networks
    attention: int = 0  # height of the feature map that a self-attention layer looks at; 0: none
    spectral_norm: bool = False
    n_critic: int = 1  # critic updates per generator update, on disjoint parts of the batch
    penalty: float = 0.3  # γ of R1, λ of the gradient penalty ("wgan-gp")
    penalty_every: int = 8  # steps
    generator: str = "residual"  # or "style", which `blocks` and `attention` do not shape
    mapping_layers: int = 2  # of the style generator
    # What follows is for captions.
    vocabulary: int = 384  # tokens
    caption_length: int = 16  # tokens of a caption that are read
    text_width: int = 64  # of the text encoder, and its number of layers
    text_layers: int = 2
    caption_dropout: float = 0.1  # how often training hides the caption
    contrast: float = 1.0  # weight of telling a caption among others, beside the adversarial losses
    features: int = 0  # of the critic, that captions are held against; 0: as many as its last channels
    # For any condition.
    reconstruction: float = 0.0  # weight of drawing training images anew; 0: no encoder
    critic_from: float = 0.0  # part of the training that is drawing anew alone, before a critic judges

    def check(self, space: ImageSpace) -> None:
        """Raises `ValueError` naming the field, its value and what would be right."""
        if self.objective not in OBJECTIVES:
            raise ValueError(f'objective: "{self.objective}"; one of {", ".join(OBJECTIVES)}')
        if self.generator not in ("residual", "style"):
            raise ValueError(f'generator: "{self.generator}"; "residual" or "style"')
        if space.captions and self.generator != "style":
            raise ValueError(f'generator: "{self.generator}"; for images with captions, "style"')
        if self.text_width < 1 or self.text_width % _text.HEADS:
            raise ValueError(f"text_width: {self.text_width}; a positive multiple of {_text.HEADS}")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout: {self.caption_dropout} is not in [0, 1]")
        for name in ("contrast", "features", "reconstruction"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)}; not negative")
        if not 0 <= self.critic_from < 1:
            raise ValueError(f"critic_from: {self.critic_from} is not in [0, 1)")
        if self.critic_from and not self.reconstruction:
            raise ValueError(f"critic_from: {self.critic_from}; 0, as without reconstruction only a critic teaches")
        if self.reconstruction and min(space.height, space.width) < COARSE:
            raise ValueError(
                f"reconstruction: {self.reconstruction}; images of {space.width}×{space.height} are too small to be "
                f"seen {COARSE} times smaller: 0"
            )
        for name in ("latent", "embedding", "n_critic", "penalty_every", "mapping_layers", "text_layers"):
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


# -------------------------------------------------------------------------------------------------------------- critic


class CriticBlock(nn.Module):
    """Residual block of two 3×3 convolutions, without a norm. (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv1(F.leaky_relu(x, 0.2))
        h = self.conv2(F.leaky_relu(h, 0.2))
        return (x + h) * math.sqrt(0.5)  # keeps the variance at any depth


class Critic(nn.Module):
    """(image in [−1, 1], y) -> logit (B,). y is a label (B,), negative where there is none, or what the text encoder
    makes of a caption (B, text_width), zero where there is none: then it reads the image alone, without projection."""

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
        # A weighted sum over positions; what is where and how often, as captions say, takes a sum over channels too.
        width = (space.captions and config.features) or widths[-1]
        self.pool = nn.Conv2d(widths[-1], width, size, groups=1 if space.captions else width)
        self.mix = nn.Linear(width, width)
        self.output = nn.Linear(width, 1)
        self.classes = nn.Embedding(space.classes, width) if space.classes else None
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(layer.weight, a=0.2, nonlinearity="leaky_relu")
        if self.classes is not None:
            nn.init.normal_(self.classes.weight, std=width**-0.5)
        self.project = nn.Linear(config.text_width, width, bias=False) if space.captions else None
        if config.spectral_norm:
            for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.Embedding)]:
                spectral_norm(layer)

    def features(self, x: Tensor) -> Tensor:
        """φ(x): (B, C, H, W) -> (B, channels)."""
        h = self.pool(self.layers(x.contiguous(memory_format=torch.channels_last)))
        return F.leaky_relu(self.mix(F.leaky_relu(h.flatten(1), 0.2)), 0.2)

    def embed(self, y: Tensor) -> Tensor | None:
        """e_y (B, channels), zero where there is no y; None where there never is one."""
        embedded: Tensor | None = None
        if self.classes is not None:
            embedded = self.classes(y.clamp(min=0)) * (y >= 0)[:, None]
        if self.project is not None:
            embedded = self.project(y)
        return embedded

    def judge(self, features: Tensor, embedded: Tensor | None) -> Tensor:
        """ψ(φ) + ⟨e_y, φ⟩, (B,). Of captions, ⟨·, ·⟩ is what `models._text.contrast` compares, whose training bounds no
        length of either."""
        logit: Tensor = self.output(features)[:, 0]
        if embedded is None:
            return logit
        if self.project is not None:
            return logit + _text.SHARPNESS * F.cosine_similarity(embedded.float(), features.float())
        return logit + (embedded * features).sum(dim=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.judge(self.features(x), self.embed(y))


# ------------------------------------------------------------------------------------------------------------- encoder


class Encoder(nn.Module):
    """Where things lie: (B, C, H, W) in [−1, 1] -> q(z|x), of (B, latent).

    It sees a grey picture, `COARSE` times smaller, and so little of what a label or a caption says: no hue and no
    outline, but how large, how many and how bright things are.
    """

    def __init__(self, space: ImageSpace, latent: int) -> None:
        super().__init__()
        hidden = 256
        self.layers = nn.Sequential(
            nn.Linear((space.height // COARSE) * (space.width // COARSE), hidden),
            *(nn.LeakyReLU(0.2), nn.Linear(hidden, hidden)),
            *(nn.LeakyReLU(0.2), nn.Linear(hidden, 2 * latent)),
        )

    def forward(self, x: Tensor) -> Normal:
        coarse = F.avg_pool2d(x.mean(dim=1, keepdim=True), COARSE)
        mean, log_std = self.layers(coarse.flatten(1)).float().chunk(2, dim=1)
        return Normal(mean, log_std.clamp(-5, 2))


# --------------------------------------------------------------------------------------------------------------- model


@dataclass
class GanRows(Rows):
    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    z: Tensor  # (B, latent)
    condition: Tensor  # (B,) labels, drawn where none was asked for, 0 where there are no classes; or (B, L) captions
    temperature: Tensor  # (B,)
    x: Tensor  # (B, C, H, W) in [0, 1]; mid-grey until the pass


class Model(_protocol.Model):
    """Generator and critic; samples by the generator alone."""

    training_only = ("critic", "encoder")

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        config.check(space)
        if space.captions:  # which say what labels would, and more
            space = dataclasses.replace(space, labels=())
        self.config = config
        self.spec = Spec(family="gan", image=space, steps=Steps(unit="pass"), temperature=Range(0.0, 1.0, 1.5))
        self.captions = Captions(config.vocabulary, config.caption_length) if space.captions else None
        self.generator = _generator(config, space)
        self.critic = Critic(config, space)
        self.encoder = Encoder(space, config.latent) if config.reconstruction else None

    @property
    def text(self) -> TextEncoder | None:
        """What reads captions, for both networks."""
        told = self.generator.told if isinstance(self.generator, StyleGenerator) else None
        return told if isinstance(told, TextEncoder) else None

    # Training

    def prepare(self, batches: Iterable[Batch]) -> None:
        """The captions' vocabulary."""
        if self.captions is not None:
            self.captions.learn(caption for batch in batches for caption in batch.captions)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        critic = [*self.critic.parameters(), *(self.text.parameters() if self.text is not None else ())]
        generator = [*self.generator.parameters(), *(self.encoder.parameters() if self.encoder is not None else ())]
        return {"critic": critic, "generator": [p for p in generator if all(p is not q for q in critic)]}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """`n_critic` critic losses, each on its part of the batch, then the generator's under the updated critic."""
        asked = self._asked(batch)
        if batch.step < int(self.config.critic_from * batch.steps):
            real = 2 * batch.x - 1
            if self.captions is not None and self.config.contrast:
                contrast = self._contrast(self.critic.features(real), asked)
                yield "critic", self.config.contrast * contrast, {"critic contrast": contrast.detach()}
            z, kl = self._codes(real, len(real))
            assert kl is not None
            yield "generator", *self._anew(self._draw(asked, z), real, kl)
            return
        due = self.config.penalty > 0 and (batch.step + 1) % self.config.penalty_every == 0
        weight = self.config.penalty * self.config.penalty_every
        parts = zip(batch.x.chunk(self.config.n_critic), asked.chunk(self.config.n_critic), strict=True)
        for x, condition in parts:
            real = 2 * x - 1
            with torch.no_grad():
                fake = self._draw(condition, self._codes(real, len(real) // 2)[0]).float()
            loss, metrics = self._critic_loss(real, fake, condition)
            if due and self.config.objective == "wgan-gp":
                penalty = gradient_penalty(self.critic, real, fake, self._read(condition))
            elif due:
                penalty = r1_penalty(self.critic, real, self._read(condition))
            if due:
                loss = loss + weight * penalty
                metrics["critic penalty"] = penalty.detach()
            yield "critic", loss, metrics

        with _constant(self.groups()["critic"]):
            loss, metrics = self._generator_loss(2 * batch.x - 1, asked)
        yield "generator", loss, metrics

    def _critic_loss(self, real: Tensor, fake: Tensor, condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        critic, loss_of = self.critic, OBJECTIVES[self.config.objective]
        features, embedded = critic.features(torch.cat([real, fake])), critic.embed(self._read(condition))
        features_real, features_fake = features.chunk(2)
        logits_real, logits_fake = (critic.judge(f, embedded).float() for f in (features_real, features_fake))
        loss = loss_of(logits_real, logits_fake)
        metrics = {"critic gap": (logits_real.mean() - logits_fake.mean()).detach()}
        if self.captions is not None:
            wrong, is_wrong = _text.wrong_captions(condition)
            logits_wrong = critic.judge(features_real, critic.embed(self._read(wrong))).float()
            loss = (loss + loss_of(logits_real, torch.where(is_wrong, logits_wrong, logits_fake))) / 2
            contrast = self._contrast(features_real, condition)
            loss = loss + self.config.contrast * contrast
            metrics |= {"critic contrast": contrast.detach()}
        return loss, metrics

    def _generator_loss(self, real: Tensor, condition: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        critic = self.critic
        metrics: dict[str, Tensor] = {}
        z, kl = self._codes(real, len(real) // 2)
        drawn = self._draw(condition, z)
        features = critic.features(drawn)
        logits = critic.judge(features, critic.embed(self._read(condition))).float()
        loss = F.softplus(-logits).mean() if self.config.objective == "logistic" else -logits.mean()
        if kl is not None:
            anew, metrics = self._anew(drawn[: len(kl)], real[: len(kl)], kl)
            loss = loss + anew
        if self.captions is not None:
            contrast = self._contrast(features, condition)
            loss = loss + self.config.contrast * contrast
            metrics |= {"generator contrast": contrast.detach()}
        return loss, metrics

    def _read(self, condition: Tensor) -> Tensor:
        """What the critic is told: labels (B,) as they are; of captions (B, L) what the text encoder makes of them."""
        if self.text is None:
            return condition
        sentence: Tensor = self.text(condition).sentence
        return sentence * _text.given(condition)[:, None]

    def _contrast(self, features: Tensor, condition: Tensor) -> Tensor:
        """How ill images are told by their captions (B, L) among others', and among their own with another word."""
        altered, says_else = _text.altered_captions(condition, ALTERED)
        told = self.critic.embed(self._read(torch.cat([condition[:, None], altered], dim=1).flatten(0, 1)))
        assert told is not None
        own, wrong = told.view(len(condition), 1 + ALTERED, -1).tensor_split([1], dim=1)
        return _text.contrast(features, own[:, 0], condition, wrong, says_else)

    def _asked(self, batch: Batch) -> Tensor:
        """What the critic is told of a batch: labels (B,), or ids of captions (B, L), now and then hidden."""
        if self.captions is None:
            return batch.labels
        ids = self.captions.encode(batch.captions or [None] * len(batch.x))
        hidden = torch.rand(len(ids), 1, device=ids.device) < self.config.caption_dropout
        return ids.masked_fill(hidden, PADDING)

    def _anew(self, drawn: Tensor, real: Tensor, kl: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of images drawn anew, each with its code's KL (B,)."""
        error = (drawn.float() - real).square().sum(dim=(1, 2, 3)) / (2 * SIGMA**2)
        anew = (error + kl).mean() / real[0].numel()
        return self.config.reconstruction * anew, {"reconstruction": anew.detach(), "KL": kl.detach().mean()}

    def _codes(self, real: Tensor, n: int) -> tuple[Tensor, Tensor | None]:
        """z (B, latent) by torch's global generator; with an encoder, those of the first n images from q(z|x), and of
        each of these its KL from p(z), in nats."""
        z = torch.randn(len(real), self.config.latent, device=real.device)
        if self.encoder is None:
            return z, None
        known, free = z.tensor_split([n])
        q = self.encoder(real[:n])
        return torch.cat([q.at(known), free]), q.kl(Normal(torch.zeros_like(known), torch.zeros_like(known)))

    def _draw(self, condition: Tensor, z: Tensor) -> Tensor:
        """Images in [−1, 1] for what a batch is told, noise from torch's global generator."""
        b, device = len(condition), condition.device
        if self.spec.image.classes:
            condition = torch.where(condition < 0, torch.randint_like(condition, self.spec.image.classes), condition)
        noise = [torch.randn(b, *shape, device=device) for shape in self.generator.noise_shapes]
        images: Tensor = self.generator(z, condition, noise)
        return images

    # Sampling

    def init(self, draws: Sequence[Draw]) -> GanRows:
        device, b = self.device, len(draws)
        seed = _random.seed_bits([d.seed for d in draws], device)
        sample = torch.tensor([d.sample for d in draws], dtype=torch.int64, device=device)
        if self.captions is not None:
            condition = self.captions.encode([d.prompt for d in draws])
        else:
            labels = torch.tensor([d.label for d in draws], dtype=torch.int64, device=device)
            word = _random.words(seed, sample, 0, _LABEL, 1)[:, 0]
            drawn = (word * self.spec.image.classes) >> 32  # uniform over the classes: a word has 32 bits
            condition = torch.where(labels < 0, drawn, labels)
        return GanRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.ones(b, dtype=torch.int64, device=device),
            seed=seed,
            sample=sample,
            z=_random.normal(seed, sample, 0, _LATENT, (self.config.latent,)),
            condition=condition,
            temperature=torch.tensor([d.temperature for d in draws], dtype=torch.float32, device=device),
            x=torch.full((b, *self.spec.image.shape), 0.5, device=device),
        )

    def step(self, rows: GanRows) -> GanRows:
        noise = [
            _random.normal(rows.seed, rows.sample, 0, _NOISE + i, shape)
            for i, shape in enumerate(self.generator.noise_shapes)
        ]
        rows.x = (self.generator(rows.z, rows.condition, noise, rows.temperature) + 1) / 2
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: GanRows) -> Tensor:
        return rows.x


def _generator(config: Config, space: ImageSpace) -> ResidualGenerator | StyleGenerator:
    channels, latent = config.generator_channels, config.latent
    if config.generator == "residual":
        return ResidualGenerator(
            space.shape, space.classes, channels, config.blocks, latent, config.embedding, config.attention
        )
    told: nn.Embedding | TextEncoder | None = None
    if space.captions:
        told = TextEncoder(config.vocabulary, config.caption_length, config.text_width, config.text_layers)
    elif space.classes:
        told = nn.Embedding(space.classes, config.embedding)
    return StyleGenerator(space.shape, channels, latent, latent, config.mapping_layers, told)


@contextmanager
def _constant(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """They are constants here: what is computed with them leaves no gradient on them."""
    changed = [p for p in parameters if p.requires_grad]
    for p in changed:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in changed:
            p.requires_grad_(True)
