"""Gaussians: one with a full covariance, the closed form of maximum likelihood; or a mixture, of full covariances or of
factor analysers (Ghahramani and Hinton 1996, "The EM algorithm for mixtures of factor analyzers"), by EM.

The oldest density of images, and the floor that every network has to beat. It may be class-conditional: then each class
has Gaussians of its own, and an image without a label has the marginal Σ_c p(c) p(x | c).

What differs from the textbook: dequantisation is neither drawn nor ignored. The Gaussian is a density of the image plus
noise that is uniform in its cell, and the score is the average of that density's logarithm over the noise, in closed
form, for a mixture by Jensen's inequality inside each component (`models._gaussians`, equations 1 and 2). This is at
most the logarithm of the mass in the cell: a bound. Nothing in it is sampled, and its maximum in the training data is
what is learnt.

    variable        meaning
    y               (B, D) float64: levels 0 … 255 plus ½, the middle of the cell
    K               Gaussians in all, those of class c at c·components … (c + 1)·components − 1
    A, W, psi       the covariances, see `models._gaussians`
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _gaussians, _mixtures, _protocol, _random
from models._flow_model import LEVELS, quantise
from models._gaussians import Full, Gaussians, LowRank, Sums, weighted_squares
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

CHUNK = 512  # images that EM looks at together
START = 10_000  # images that its start is chosen by
ROUNDS = 10  # of k-means, before EM
TINY = 1e-30  # weight of a component that has died out
CHOICE, NOISE = 0, 1  # draws of a sample's noise


@dataclass(frozen=True)
class Config:
    """Which Gaussians, and for how long EM looks for them."""

    components: int = 1  # Gaussians, of each class where `by_class`
    rank: int | None = None  # factors that the pixels of a component share; None: any covariance
    by_class: bool = False  # p(x | y) for every label y, and the labels' prior
    label_noise: float = 0.001  # share of labels that are taken to say nothing; Gaussians have no tails of their own
    iterations: int = 100  # of EM, at most; a single full covariance needs none
    tolerance: float = 1e-4  # bits/dim that an iteration has to gain for EM to go on
    temperature: float = 1.0  # default of a request: scales deviations from a component's mean


# ------------------------------------------------------------------------------------------------------------------- EM


@dataclass(frozen=True)
class Fitted:
    """What EM has found."""

    gaussians: Gaussians
    weights: Tensor  # (K,) π
    history: tuple[float, ...]  # equation 2 of `models._gaussians`, mean over the data, nats: before each M-step


def expectation_maximisation(
    start: Gaussians, weights: Tensor, parts: Callable[[], Iterable[Tensor]], iterations: int, tolerance: float
) -> Fitted:
    """EM from `start` and its weights (K,) on data that comes in parts y (B, D), any number of times. It ends after
    `iterations`, or when one gains less than `tolerance` nats an image."""
    gaussians, history = start, list[float]()
    for _ in range(iterations):
        sums: Sums | None = None
        total, count = 0.0, 0
        for y in parts():
            joint = weights.log() + gaussians.log_density(y)
            log_prob = joint.logsumexp(dim=1)
            part = gaussians.sums(y, (joint - log_prob[:, None]).exp())
            sums = part if sums is None else _gaussians.add(sums, part)
            total, count = total + float(log_prob.sum()), count + len(y)
        assert sums is not None, "there is data"
        history.append(total / count)
        gaussians, weights = gaussians.maximised(sums), sums[0] / count
        if len(history) > 1 and history[-1] - history[-2] < tolerance:
            break
    return Fitted(gaussians, weights, tuple(history))


def spread_out(y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """k centres (k, D) by k-means++ (Arthur and Vassilvitskii 2007), improved by ROUNDS of k-means, and the nearest of
    them (N,) to each of the images y (N, D). torch's global generator."""
    at = [int(torch.randint(len(y), ()))]
    distance = torch.full((len(y),), math.inf, dtype=y.dtype, device=y.device)
    for _ in range(k - 1):
        distance = torch.minimum(distance, (y - y[at[-1]]).square().sum(dim=1))
        chances = distance if bool(distance.any()) else torch.ones_like(distance)  # fewer different images than centres
        at.append(int(torch.multinomial(chances, 1)))
    centres, one = y[at], torch.ones_like(y[at])
    for _ in range(ROUNDS):
        member = F.one_hot(weighted_squares(y, centres, one).argmin(dim=1), k).to(y.dtype)
        n = member.sum(dim=0)[:, None]
        centres = torch.where(n > 0, member.mT @ y / n.clamp(min=1), centres)
    return centres, weighted_squares(y, centres, one).argmin(dim=1)


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class GaussianRows(Rows):
    """Rows of a sample: one pass turns noise into x."""

    seed: Tensor  # (B,)
    sample: Tensor  # (B,)
    label: Tensor  # (B,)
    temperature: Tensor  # (B,)
    x: Tensor  # (B, C, H, W)


class Model(_protocol.Model, OnePassDensity, Localiser):
    """Gaussians of images. Learnt in `prepare`; sampled, and scored, in one pass.

    Statistics of a score, which cost no further pass, averaged over the Gaussians by their responsibilities (given the
    label, where there is one):

        mahalanobis     squared distance from the mean, in standard deviations; D is to be expected
        factors         low rank: Σ E[z | x]², the part of it inside the space of the factors (Hotelling's T²)
        log_det         several Gaussians: log det Σ, nats
        entropy         several Gaussians: of the responsibilities, nats

    With full covariances the score has terms for pixels: log p(x_i | x_<i), channel after channel, row after row.
    """

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _check(config, space)
        self.config = config
        kept = space.labels if config.by_class else ()
        self.spec = Spec(
            family="gaussian",
            image=dataclasses.replace(space, labels=kept, captions=False),
            steps=Steps(unit="pass"),
            likelihood=Likelihood(
                kind="bound",
                dequantisation="uniform, averaged in closed form",
                note="mean log-density over the pixel's cell: at most the logarithm of the mass in it",
                heatmap_evaluations=1,
            ),
            temperature=Range(min=0.0, default=config.temperature, max=1.5),
        )
        classes, dims = max(1, len(kept)), space.dims
        k = classes * config.components

        self.form: type[Gaussians] = Full if config.rank is None else LowRank
        self.log_prior = _kept(classes)
        self.log_weights = _kept(classes, config.components)
        self.mean = _kept(k, dims)
        shapes = self.form.parameters(k, dims, config.rank or 0)
        self.covariance = nn.ParameterDict({name: _kept(*shape) for name, shape in shapes.items()})
        self.has_pixel_terms = config.rank is None
        self.statistic_names = (
            "mahalanobis",
            *(("factors",) if config.rank is not None else ()),
            *(("log_det", "entropy") if k > 1 else ()),
        )

    @property
    def gaussians(self) -> Gaussians:
        """What the parameters stand for."""
        return self.form.from_parameters(self.mean.double(), dict(self.covariance.items()))

    def log_weights_given(self, labels: Tensor) -> Tensor:
        """(B, K) log probabilities of the Gaussians given labels (B,), float64."""
        by_class = _mixtures.given(self.log_prior.double().log_softmax(dim=0), labels, self.config.label_noise)
        within = self.log_weights.double().log_softmax(dim=1)
        return (by_class[:, :, None] + within).flatten(1)

    # learning

    def prepare(self, batches: Iterable[Batch]) -> None:
        """All of the learning. A single Gaussian (of each class) is learnt from sums in one pass, whatever the size of
        the data; a mixture keeps the images, a byte a pixel. Raises `ValueError` for a class without images."""
        if self.config.components == 1 and self.config.rank is None:
            self._in_closed_form(batches)
        else:
            self._by_expectation_maximisation(batches)

    def _in_closed_form(self, batches: Iterable[Batch]) -> None:
        classes, dims = self.mean.shape
        start = Full.standard(classes, dims, self.device)
        parts = (start.sums(_centres(b.x), F.one_hot(self._classes(b), classes).double()) for b in batches)
        sums = functools.reduce(_gaussians.add, parts)
        _require_images(sums[0])
        self._keep(sums[0], torch.ones_like(self.log_weights), start.maximised(sums))

    def _by_expectation_maximisation(self, batches: Iterable[Batch]) -> None:
        pixels, classes = [], []
        for batch in batches:
            pixels.append((batch.x * (LEVELS - 1)).round().to(torch.uint8).flatten(1))
            classes.append(self._classes(batch))
        images, index = torch.cat(pixels), torch.cat(classes)
        counts = torch.bincount(index, minlength=len(self.log_prior))
        _require_images(counts)
        fitted = [self._fit(images[index == c]) for c in range(len(counts))]
        gaussians = _gaussians.concatenated([fit.gaussians for fit in fitted])
        self._keep(counts, torch.stack([fit.weights for fit in fitted]), gaussians)

    def _fit(self, images: Tensor) -> Fitted:
        """A mixture of `components` Gaussians for images (N, D) uint8, N ≥ 1."""

        def parts() -> Iterator[Tensor]:
            for part in torch.split(images, CHUNK):
                yield part.double() + 0.5

        k, rank = self.config.components, self.config.rank
        y = images[:START].double() + 0.5
        centres, nearest = spread_out(y, k)
        member = F.one_hot(nearest, k).double()
        if rank is None:
            standard = Full.standard(k, y.shape[1], y.device)
            start: Gaussians = standard.maximised(standard.sums(y, member))
        else:
            start = LowRank.around(y, centres, nearest, rank)
        nats = self.config.tolerance * y.shape[1] * math.log(2)
        return expectation_maximisation(start, member.mean(dim=0), parts, self.config.iterations, nats)

    def _classes(self, batch: Batch) -> Tensor:
        """(B,) which of the classes that the model tells apart; without `by_class` there is one."""
        if not self.config.by_class:
            return torch.zeros_like(batch.labels)
        if bool((batch.labels < 0).any()):
            raise ValueError("by_class: some images have no label, and each class is learnt from its own images")
        return batch.labels

    def _keep(self, counts: Tensor, weights: Tensor, gaussians: Gaussians) -> None:
        """Numbers of images by class (C,), weights of components (C, components), and the Gaussians."""
        self.log_prior.copy_(counts.log())
        self.log_weights.copy_(weights.clamp(min=TINY).log())
        self.mean.copy_(gaussians.mean)
        for name, value in gaussians.to_parameters().items():
            self.covariance[name].copy_(value)

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """None: no gradient is taken."""
        return {}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        yield from ()

    # sampler

    def init(self, draws: Sequence[Draw]) -> GaussianRows:
        device, b = self.device, len(draws)
        return GaussianRows(
            tick=torch.zeros(b, dtype=torch.int64, device=device),
            left=torch.ones(b, dtype=torch.int64, device=device),
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], dtype=torch.int64, device=device),
            label=torch.tensor([d.label for d in draws], dtype=torch.int64, device=device),
            temperature=torch.tensor([d.temperature for d in draws], dtype=torch.float64, device=device),
            x=torch.full((b, *self.spec.image.shape), 0.5, device=device),
        )

    def step(self, rows: GaussianRows) -> GaussianRows:
        """A Gaussian by its weight, then an image of it, on the 8-bit grid. In float64, like the density: the grid has
        steps everywhere, and where on one of them float32 sums come to lie may depend on the batch."""
        gaussians = self.gaussians
        choice = _random.uniform(rows.seed, rows.sample, rows.tick, CHOICE, (1,))[:, 0]
        component = _mixtures.choose(self.log_weights_given(rows.label), choice)
        noise = _random.normal(rows.seed, rows.sample, rows.tick, NOISE, (gaussians.noise_dims,)).double()
        y = gaussians.sample(component, rows.temperature[:, None] * noise)
        rows.x = quantise(y.view(rows.x.shape) / LEVELS)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: GaussianRows) -> Tensor:
        return rows.x

    # density

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        y, gaussians, weights = _centres(x), self.gaussians, self.log_weights_given(labels)
        per_pixel = None
        if isinstance(gaussians, Full):
            terms = gaussians.terms(y)
            per_pixel = _mixtures.chain_rule(weights, terms).view(x.shape).sum(dim=1).float()
            joint = weights + terms.sum(dim=2)
        else:
            joint = weights + gaussians.log_density(y)
        log_prob = joint.logsumexp(dim=1)
        r = (joint - log_prob[:, None]).exp()
        found = {"mahalanobis": gaussians.mahalanobis(y), "log_det": gaussians.log_det.expand_as(r)}
        if isinstance(gaussians, LowRank):
            found["factors"] = gaussians.factors(y).square().sum(dim=2)
        statistics = {name: (r * value).sum(dim=1) for name, value in found.items()}
        statistics["entropy"] = torch.special.entr(r).sum(dim=1)
        return Score(
            log_prob=log_prob.float(),
            per_pixel=per_pixel,
            statistics={name: statistics[name].float() for name in self.statistic_names},
        )

    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        """A pixel's distance from what all others let expect, in standard deviations: the root of its mean square over
        the Gaussians by their responsibilities, summed over channels."""
        y, gaussians = _centres(x), self.gaussians
        r = (self.log_weights_given(labels) + gaussians.log_density(y)).softmax(dim=1)
        found = torch.einsum("bk,bkd->bd", r, gaussians.residuals(y))
        return found.view(x.shape).sum(dim=1).sqrt().float()


def _centres(x: Tensor) -> Tensor:
    """Images x (B, C, H, W) on the grid k / 255 -> y = k + ½ (B, D) float64."""
    return x.double().flatten(1) * (LEVELS - 1) + 0.5


def _require_images(counts: Tensor) -> None:
    if bool((counts == 0).any()):
        raise ValueError(f"by_class: class {int(counts.argmin())} has no image to learn from")


def _kept(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape), requires_grad=False)


def _check(config: Config, space: ImageSpace) -> None:
    if config.components < 1:
        raise ValueError(f"components: {config.components}; at least 1")
    if config.rank is not None and not 1 <= config.rank < space.dims:
        raise ValueError(f"rank: {config.rank} is not in 1 … {space.dims - 1}; None for any covariance")
    if config.by_class and not space.labels:
        raise ValueError("by_class: True, but the images have no labels")
    if not 0 <= config.label_noise < 1:
        raise ValueError(f"label_noise: {config.label_noise} is not in [0, 1)")
    if config.iterations < 1:
        raise ValueError(f"iterations: {config.iterations}; at least 1")
    if not config.tolerance >= 0:
        raise ValueError(f"tolerance: {config.tolerance}; 0 bits/dim or more")
    if not 0 <= config.temperature <= 1.5:
        raise ValueError(f"temperature: {config.temperature} is not in [0, 1.5]")
