"""Energy-based model: a convolutional energy, learnt by contrastive divergence along Langevin chains that are replayed.

    p(x | y) ∝ e^{−E(x, y) / T},     x ← clip(x − η ∇ₓE(x, y) + σ ξ),  ξ standard normal         (Langevin, T = σ² / 2η)

Chains are kept in a replay buffer and taken up again (Du and Mordatch, arXiv 1903.02689); a small part of them begins
anew at each step. The objective is the difference of energies between data and chains, with the energies' squares to
hold their level and size (ibid., eq. 4 and §3.3). Noise, step size and the length of chains are those of short runs
(Nijkamp et al., arXiv 1904.09770): T is so low that noise breaks ties and is not to be seen.

What differs from the papers: smooth activations (SiLU), no spectral norm unless asked for. A chain begins not as white
noise, but at a Gaussian fitted to the data of its class (2109.09032, §4.2): near the data, of endless variety, and free
of any one image. The label is the index of one of the network's outputs, E(x, y) = −f_y(x), as in JEM (1912.03263), so
without a label E(x) = −τ log Σ_y e^{f_y(x) / τ}, and p(y | x) = softmax(f(x) / τ), whose cross-entropy is a further
part of the objective.

    variable      paper
    rate, noise   η, σ (on images in [−1, 1])
    softness      τ
    penalty       α, of the energies' squares
    x             images in [−1, 1] within this file
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from models import _protocol, _random
from models._nn import at_least
from models._protocol import Batch, Draw, ImageSpace, Likelihood, OnePassDensity, Rows, Score, Spec, Steps

PREPARATION = 10_000  # images that the chains' start is fitted to
_CLASS, _START, _NOISE = 0, 1, 2  # draws of a row's noise; the first two at tick 0


@dataclass(frozen=True)
class Config:
    """Everything that shapes the energy, its chains and its learning."""

    channels: tuple[int, ...] = (32, 64, 128)  # each after halving the image's sides once more
    blocks: tuple[int, ...] = (0, 1, 0)  # residual blocks at each of these
    spectral_norm: bool = False
    rate: float = 2.0  # η; the smaller, the higher the energies that move a chain, above the noise of their learning
    noise: float = 0.005  # σ
    clip: float = 0.1  # largest gradient of the energy by a pixel that a step follows
    langevin_steps: int = 20  # of each chain at each step of training
    replay: int = 5000  # chains that are kept, shared evenly by the classes
    restart: float = 0.05  # part of the chains that begin anew at each step of training
    rank: int = 40  # of the Gaussian that they begin at
    penalty: float = 0.02  # α
    classification: float = 0.1  # weight of the cross-entropy
    softness: float = 0.3  # τ
    data_noise: float = 0.01  # standard deviation of what is added to the data
    label_dropout: float = 0.1
    default_steps: int = 200


# -------------------------------------------------------------------------------------------------------------- network


class Block(nn.Module):
    """x + two convolutions. (B, C, H, W) -> the same."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.conv2(F.silu(self.conv1(F.silu(x))))
        return (x + h) * math.sqrt(0.5)  # keeps the variance at any depth


class Network(nn.Module):
    """x (B, C, H, W) -> f (B, max(1, classes)), by strided convolutions and residual blocks."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for (inputs, outputs), blocks in zip(pairwise((space.channels, *config.channels)), config.blocks, strict=True):
            layers += [nn.SiLU()] if layers else []
            layers += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), *(Block(outputs) for _ in range(blocks))]
        self.layers = nn.Sequential(*layers, nn.SiLU())
        halvings = len(config.channels)
        size = config.channels[-1] * (space.height >> halvings) * (space.width >> halvings)
        self.output = nn.Linear(size, max(1, space.classes))
        if config.spectral_norm:
            for layer in [m for m in self.modules() if isinstance(m, nn.Conv2d | nn.Linear)]:
                spectral_norm(layer)

    def forward(self, x: Tensor) -> Tensor:
        asked, x = len(x), at_least(4, x).contiguous(memory_format=torch.channels_last)
        out: Tensor = self.output(self.layers(x).flatten(1))
        return out[:asked].float()


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class LangevinRows(Rows):
    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    label: Tensor  # (B,), -1 without
    x: Tensor  # (B, C, H, W) in [−1, 1]


class Model(_protocol.Model, OnePassDensity, _protocol.Localiser):
    """The energy, its chains and its learning.

    Metrics of training that tell whether it is stable: `energy_gap` (of chains over data; near 0 where they are alike),
    `energy_std` (of the data's), `gradient_norm` (of the energy by the image at the chains), `restarts` (part of the
    chains that began anew).

    Statistics of a score:

        gradient_norm    of the energy by the image: small where the energy is at rest, as at a mode
        class_entropy    nats, of p(y | x), where there are labels
        class_spread     standard deviation of E(x, y) over the labels y, where there are some
    """

    normalised = False
    training_only = ("replay",)

    mean: Tensor  # (classes, D) of the Gaussians that chains begin at
    basis: Tensor  # (rank, D) principal components of the data, orthonormal
    factor: Tensor  # (classes, rank, rank) lower triangular: covariance in that basis
    replay: Tensor  # (replay, C, H, W) uint8: where chains stand; the i-th is of class i mod classes

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        self.conditions = max(1, space.classes)
        self.spec = Spec(
            family="ebm",
            image=dataclasses.replace(space, captions=False),
            steps=Steps("Langevin step", default=config.default_steps, max=max(2000, config.default_steps)),
            likelihood=Likelihood(
                kind="unnormalised",
                dequantisation="none",
                note="the energy E itself, whose zero and unit are arbitrary",
                heatmap_evaluations=2,  # forwards and backwards
            ),
        )
        self.statistic_names = ("gradient_norm", *(("class_entropy", "class_spread") if space.labels else ()))
        self.network = Network(config, space)
        rank = min(config.rank, space.dims)
        self.register_buffer("mean", torch.zeros(self.conditions, space.dims))
        self.register_buffer("basis", torch.eye(rank, space.dims))
        self.register_buffer("factor", torch.eye(rank).expand(self.conditions, -1, -1).clone())
        kept = config.replay // self.conditions * self.conditions
        self.register_buffer("replay", torch.zeros(kept, *space.shape, dtype=torch.uint8))

    # ---- energy

    def energy(self, x: Tensor, labels: Tensor) -> Tensor:
        """E(x, y) (B,) float32; where the label is −1, E(x)."""
        return self._energy(self.network(x), labels)

    def _energy(self, f: Tensor, labels: Tensor) -> Tensor:
        tau = self.config.softness
        given = f.gather(1, labels.clamp(min=0)[:, None])[:, 0]
        return -torch.where(labels < 0, tau * (f / tau).logsumexp(dim=1), given)

    def gradient(self, x: Tensor, labels: Tensor) -> Tensor:
        """∇ₓE (B, C, H, W), under any grad mode."""
        with torch.inference_mode(False), torch.enable_grad():
            x = x.detach().clone().requires_grad_()  # clones, because autograd refuses tensors of inference mode
            (gradient,) = torch.autograd.grad(self.energy(x, labels.clone()).sum(), x)
        return gradient

    def follow(self, x: Tensor, gradient: Tensor, noise: Tensor) -> Tensor:
        """A Langevin step from x, given the gradient there and standard normal noise."""
        c = self.config
        return (x - c.rate * gradient.clamp(-c.clip, c.clip) + c.noise * noise).clamp(-1.0, 1.0)

    def start(self, labels: Tensor, noise: Tensor) -> Tensor:
        """Chains' beginnings (B, C, H, W): the Gaussian of the class y (B,), from standard normal noise (B, rank)."""
        at = torch.einsum("bij,bj->bi", self.factor[labels], noise) @ self.basis
        return (self.mean[labels] + at).clamp(-1.0, 1.0).view(-1, *self.spec.image.shape)

    # ---- training

    def prepare(self, batches: Iterable[Batch]) -> None:
        """The Gaussian of every class, in the principal components of all; and the first chains, drawn from them."""
        x, labels = [], []
        for batch in batches:
            x.append(2 * batch.x.flatten(1).double() - 1)
            labels.append(self._conditions(batch.labels))
            if sum(map(len, x)) >= PREPARATION:
                break
        images, classes = torch.cat(x), torch.cat(labels)
        rank = len(self.basis)
        self.basis.copy_(torch.linalg.eigh(images.T.cov())[1][:, -rank:].T)
        for y in range(self.conditions):
            mine = images[classes == y] if (classes == y).sum() > 1 else images
            self.mean[y] = mine.mean(dim=0)
            covariance = (mine @ self.basis.double().T).T.cov().reshape(rank, rank)
            self.factor[y] = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(rank, device=images.device))
        own = torch.arange(len(self.replay), device=images.device) % self.conditions
        self.replay.copy_(_to_bytes(self.start(own, torch.randn(len(own), rank, device=images.device))))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"energy": list(self.network.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """Contrastive divergence from replayed chains, each of the label of an image of the batch."""
        c, b = self.config, len(batch.x)
        labels = batch.labels.masked_fill(torch.rand(b, device=batch.x.device) < c.label_dropout, -1)
        data = 2 * batch.x - 1 + c.data_noise * torch.randn_like(batch.x)
        chains, metrics = self._run_chains(labels, self._conditions(batch.labels))
        f = self.network(torch.cat([data, chains]))
        real, fake = self._energy(f, labels.repeat(2)).chunk(2)
        loss = real.mean() - fake.mean() + c.penalty * (real.square().mean() + fake.square().mean())
        if self.spec.image.classes:
            loss = loss + c.classification * F.cross_entropy(f[:b] / c.softness, batch.labels, ignore_index=-1)
        metrics |= {"energy_gap": (fake.mean() - real.mean()).detach(), "energy_std": real.detach().std()}
        yield "energy", loss, metrics

    @torch.no_grad()
    def _run_chains(self, labels: Tensor, classes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Chains (B, C, H, W) of the labels after as many steps as the config says, taken from the replay buffer and
        put back. classes: whose chains they are, in 0 … classes − 1; −1: any."""
        c, b, device = self.config, len(labels), labels.device
        drawn = torch.randint(self.conditions, (b,), device=device)
        classes = torch.where(classes < 0, drawn, classes)
        each = len(self.replay) // self.conditions
        index = classes + self.conditions * torch.randperm(max(each, b), device=device)[:b].remainder(each)
        anew = torch.rand(b, device=device) < c.restart
        x = 2 * self.replay[index].float() / 255 - 1
        x = torch.where(
            anew[:, None, None, None], self.start(classes, torch.randn(b, len(self.basis), device=device)), x
        )
        gradient = torch.zeros_like(x)
        for _ in range(c.langevin_steps):
            gradient = self.gradient(x, labels)
            x = self.follow(x, gradient, torch.randn_like(x))
        self.replay[index] = _to_bytes(x)
        return x, {"gradient_norm": gradient.flatten(1).norm(dim=1).mean(), "restarts": anew.float().mean()}

    def _conditions(self, labels: Tensor) -> Tensor:
        """Labels, -1 where missing; 0 for all where there are no classes."""
        return labels if self.spec.image.classes else torch.zeros_like(labels)

    # ---- sampler

    def init(self, draws: Sequence[Draw]) -> LangevinRows:
        device, b = self.device, len(draws)
        seed = _random.seed_bits([d.seed for d in draws], device)
        sample = torch.tensor([d.sample for d in draws], dtype=torch.int64, device=device)
        label = torch.tensor([d.label for d in draws], device=device)
        drawn = (_random.words(seed, sample, 0, _CLASS, 1)[:, 0] * self.conditions) >> 32  # a word has 32 bits
        begin = torch.where(label < 0, drawn, label) if self.spec.image.classes else torch.zeros_like(label)
        return LangevinRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.tensor([d.steps for d in draws], device=device),
            seed=seed,
            sample=sample,
            label=label if self.spec.image.classes else begin,
            x=self.start(begin, _random.normal(seed, sample, 0, _START, (len(self.basis),))),
        )

    def step(self, rows: LangevinRows) -> LangevinRows:
        noise = _random.normal(rows.seed, rows.sample, rows.tick, _NOISE, rows.x.shape[1:])
        rows.x = self.follow(rows.x, self.gradient(rows.x, rows.label), noise)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: LangevinRows) -> Tensor:
        return (rows.x + 1) / 2

    # ---- density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        """The energy; without a label, of the image alone."""
        x, labels = 2 * x - 1, self._given(labels)
        f = self.network(x)
        statistics = {"gradient_norm": self.gradient(x, labels).flatten(1).norm(dim=1)}
        if self.spec.image.labels:
            statistics["class_entropy"] = torch.special.entr((f / self.config.softness).softmax(dim=1)).sum(dim=1)
            statistics["class_spread"] = f.std(dim=1, unbiased=False)
        return Score(log_prob=None, energy=self._energy(f, labels), statistics=statistics)

    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        """|∂E/∂x|, summed over channels."""
        return self.gradient(2 * x - 1, self._given(labels)).abs().sum(dim=1)

    def _given(self, labels: Tensor) -> Tensor:
        return labels if self.spec.image.classes else torch.zeros_like(labels)


def _to_bytes(x: Tensor) -> Tensor:
    """[−1, 1] -> uint8, rounded up or down at random, so that no chain is held by the grid."""
    return ((x + 1) * 127.5 + torch.rand_like(x)).clamp(0, 255).to(torch.uint8)


def _check(config: Config, space: ImageSpace) -> None:
    if not config.channels or min(config.channels) < 1:
        raise ValueError(f"channels: {config.channels}; at least one resolution, of at least one channel each")
    if len(config.blocks) != len(config.channels) or min(config.blocks) < 0:
        raise ValueError(f"blocks: {config.blocks}; {len(config.channels)} numbers, as many as channels, none negative")
    if min(space.height, space.width) >> len(config.channels) < 1:
        raise ValueError(
            f"channels: {len(config.channels)} halvings leave nothing of an image of {space.width}×{space.height}"
        )
    for name in ("rate", "clip", "softness"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: {getattr(config, name)}; above 0")
    for name in ("noise", "penalty", "classification", "data_noise"):
        if getattr(config, name) < 0:
            raise ValueError(f"{name}: {getattr(config, name)}; not negative")
    for name in ("langevin_steps", "rank", "default_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; at least 1")
    for name in ("restart", "label_dropout"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}: {getattr(config, name)} is not in [0, 1]")
    if config.replay < max(1, space.classes):
        raise ValueError(f"replay: {config.replay}; at least one chain for each of {max(1, space.classes)} classes")
