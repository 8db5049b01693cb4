"""The one protocol: all that training, the engine and the tests know about a model.

    Draw        what one image of a request asks for          Rows      a batch of independent chains, one per row
    Sampler     init(draws) -> Rows, step(rows) -> Rows, image(rows)
    Density     score_init(x, labels) -> Rows, score_step(rows) -> Rows, score(rows) -> Score
    Localiser   surprise(x, labels): where in an image a density is surprised
    Trainable   prepare(batches), groups(), objective(batch) -> yields (group, loss), conclude(batches)
    Denoiser    denoised(x, sigma, labels, guidance): what a student learns from
    Autoencoder reconstruct(x, labels): what its codes keep of an image
    Spec        frozen and JSON: what the model is and what a request may set

Conventions, for every family:

    x           (B, C, H, W) float32 in [0, 1]; where a likelihood is meant, on the 8-bit grid k / 255
    labels      (B,) int64 class indices; `UNLABELLED` (-1) asks for the model without a label
    log_prob    (B,) float32, nats of the whole 8-bit image: never positive when exact or a bound
    seed        (B,) int64, the bits of an unsigned 64-bit number
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

UNLABELLED = -1

JSON: TypeAlias = "bool | int | float | str | Sequence[JSON] | Mapping[str, JSON] | None"
LikelihoodKind: TypeAlias = Literal["exact", "bound", "estimate", "unnormalised"]


# ---------------------------------------------------------------------------------------------------------------- spec


@dataclass(frozen=True)
class ImageSpace:
    """What the model's images are: their shape, and the labels or captions that they come with."""

    width: int
    height: int
    channels: int
    labels: tuple[str, ...] = ()  # class names in index order; empty: no labels
    captions: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        return self.channels, self.height, self.width

    @property
    def dims(self) -> int:
        """D = C·H·W, the number that bits/dim divides by."""
        return self.channels * self.height * self.width

    @property
    def classes(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Steps:
    """How many steps a sample takes, and what a step is."""

    unit: Literal["pass", "denoising step", "pixel", "token", "Gibbs sweep", "Langevin step"]
    min: int = 1
    default: int = 1
    max: int = 1
    network_evaluations_per_step: int = 1

    @property
    def kind(self) -> Literal["one-step", "iterative"]:
        return "one-step" if self.max == 1 else "iterative"


@dataclass(frozen=True)
class Range:
    """A number that a request may set."""

    min: float
    default: float
    max: float


@dataclass(frozen=True)
class Likelihood:
    """What the number that `/score` returns is."""

    kind: LikelihoodKind
    dequantisation: str  # "none", "uniform K=1", ...: how the 8-bit grid was treated
    note: str = ""  # e.g. the S of an importance-weighted bound
    steps: int = 1  # ticks that one image's score takes
    network_evaluations_per_step: int = 1  # of a tick; a product with the network's Jacobian counts as one
    heatmap_evaluations: int = 0  # of the network, for a heat map; 0: the family is no `Localiser`


@dataclass(frozen=True)
class Spec:
    """What a model is and what a request may set: the family's half of `GET /models`."""

    family: str
    image: ImageSpace
    steps: Steps
    solvers: tuple[str, ...] = ()  # the first is the default; empty: a request cannot choose
    evaluations: Mapping[str, int] = field(default_factory=dict)  # solver -> ticks of a step, where it is more than one
    adaptive: tuple[str, ...] = ()  # solvers that choose their own steps: `steps` says how finely
    likelihood: Likelihood | None = None
    guidance_scale: Range | None = None
    temperature: Range | None = None
    top_k: int | None = None  # the most likely values of a token that a request may confine it to: 1 … top_k
    prediction: Literal["epsilon", "x0", "v"] | None = None  # what a diffusion network predicts

    def ticks(self, steps: int, solver: str | None) -> int:
        """Ticks of a sample, an adaptive solver's only about: the last step, to no noise at all, always takes one."""
        solver = solver or next(iter(self.solvers), "")
        return (steps - 1) * self.evaluations.get(solver, 1) + 1

    def accepts(self) -> dict[str, JSON]:
        """Field of a generate request -> JSON schema of what this model takes there. Other fields are refused."""
        fields: dict[str, JSON] = {
            "steps": _integer(self.steps.min, self.steps.max, self.steps.default, self.steps.unit),
        }
        if self.solvers:
            fields["solver"] = {"enum": list(self.solvers), "default": self.solvers[0]}
        if self.image.labels:
            indices: JSON = {"type": "integer", "minimum": 0, "maximum": self.image.classes - 1}
            names: JSON = {"enum": list(self.image.labels)}
            fields["label"] = {"anyOf": [indices, names]}
        if self.image.captions:
            fields["prompt"] = {"type": "string", "minLength": 1, "maxLength": 1000}
        for name in ("guidance_scale", "temperature"):
            allowed: Range | None = getattr(self, name)
            if allowed is not None:
                fields[name] = {
                    "type": "number",
                    "minimum": allowed.min,
                    "maximum": allowed.max,
                    "default": allowed.default,
                }
        if self.top_k is not None:
            fields["top_k"] = {"type": "integer", "minimum": 1, "maximum": self.top_k, "default": self.top_k}
        return fields

    def to_json(self) -> dict[str, JSON]:
        """The Spec as `model.json` and `GET /models` show it."""
        conditioning: JSON = None
        if self.image.labels:
            conditioning = {"labels": list(self.image.labels)}
        elif self.image.captions:
            conditioning = {"captions": True}
        likelihood: JSON = None
        if self.likelihood is not None:
            each, heatmap = self.likelihood.network_evaluations_per_step, self.likelihood.heatmap_evaluations
            likelihood = {
                "kind": self.likelihood.kind,
                "dequantisation": self.likelihood.dequantisation,
                "note": self.likelihood.note,
                "steps": self.likelihood.steps,
                **({"network_evaluations_per_step": each} if each > 1 else {}),
                **({"heatmap_evaluations": heatmap} if heatmap else {}),
            }
        return {
            "family": self.family,
            "image": {"width": self.image.width, "height": self.image.height, "channels": self.image.channels},
            "steps": {
                "kind": self.steps.kind,
                "unit": self.steps.unit,
                "min": self.steps.min,
                "default": self.steps.default,
                "max": self.steps.max,
                "network_evaluations_per_step": self.steps.network_evaluations_per_step,
            },
            "solvers": list(self.solvers),
            **({"evaluations": dict(self.evaluations)} if self.evaluations else {}),
            **({"adaptive": list(self.adaptive)} if self.adaptive else {}),
            "likelihood": likelihood,
            "conditioning": conditioning,
            "prediction": self.prediction,
            "accepts": self.accepts(),
        }


def _integer(low: int, high: int, default: int, unit: str) -> JSON:
    return {"type": "integer", "minimum": low, "maximum": high, "default": default, "description": unit}


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Draw:
    """What one image of a request asks for: one row. The image is a pure function of (weights, Draw)."""

    seed: int  # unsigned, 64 bits
    sample: int  # index of the image in its request
    steps: int
    solver: str | None = None
    label: int = UNLABELLED
    prompt: str | None = None
    guidance_scale: float = 1.0
    temperature: float = 1.0
    top_k: int | None = None  # None: the Spec's, which leaves every value possible


@dataclass
class Rows:
    """A batch of independent chains: a dataclass of tensors whose dim 0 is the row (`models._rows` joins and splits
    it).

    Families add their columns (x, solver coefficients, caches, ...): tensors, nested Rows, or tuples of them. Rows of
    one batch may differ in every column: nothing about a request is ever kept on the model.

    tick    (B,) int64: steps taken.
    left    (B,) int64: steps still to take, 0 = finished. `step` lowers it by one. Where the number of steps is not
            known beforehand (adaptive solvers) it is a lower bound that stays at 1 until the row is done.
    """

    tick: Tensor
    left: Tensor

    def progress(self) -> Tensor:
        """(B,) 0 … 1: the part of its way that each row has behind it. Rows that do not know how many steps are left
        say it otherwise."""
        return self.tick / (self.tick + self.left)


class Sampler(abc.ABC):
    """Draws images by taking every row one step at a time. Read-only after load: all memory is in the Rows."""

    @abc.abstractmethod
    def init(self, draws: Sequence[Draw]) -> Rows:
        """Rows at tick 0, on the model's device. The caller has checked the values against the Spec."""

    @abc.abstractmethod
    def step(self, rows: Any) -> Rows:
        """Advance every row by one step. Never given a finished row.

        May write into the tensors of `rows` where copying would cost (caches), but only so that taking the same step
        again gives the same result: the engine takes a step that raised again, row by row.
        """

    @abc.abstractmethod
    def image(self, rows: Any) -> Tensor:
        """(B, C, H, W) in [0, 1]: the finished image where left is 0, else a preview. Valid at any tick."""


# -------------------------------------------------------------------------------------------------------------- density


@dataclass
class Score:
    """What a Density says of a batch of images."""

    log_prob: Tensor | None  # (B,) nats of the 8-bit image; None where there is only an energy
    energy: Tensor | None = None  # (B,), for `unnormalised`
    stderr: Tensor | None = None  # (B,) nats, of an estimate
    per_pixel: Tensor | None = None  # (B, H, W) nats, summed over channels, where log_prob is a sum over pixels
    statistics: dict[str, Tensor] = field(default_factory=dict)  # name -> (B,)
    # name -> (B, F): what the model has made of the image on its way, for whoever knows how it is for normal images
    features: dict[str, Tensor] = field(default_factory=dict)
    # (B,) bool, of a numerical integral: whether half the steps, whose result is the statistic `coarse_log_prob`, give
    # nearly the same. None where nothing is integrated.
    converged: Tensor | None = None


class Density(abc.ABC):
    """Says how likely images are. Scoring goes step by step like sampling, so that a bound of a thousand network
    evaluations shares the device with everything else; most families need one step (`OnePassDensity`).

    Deterministic: any noise is a function of the image's own bytes. Computed in float32 at least.
    """

    @abc.abstractmethod
    def score_init(self, x: Tensor, labels: Tensor) -> Rows:
        """Rows at tick 0 for images x (B, C, H, W) on the grid k / 255 and labels (B,), -1 where there is none."""

    @abc.abstractmethod
    def score_step(self, rows: Any) -> Rows:
        """Advance every row by one step."""

    @abc.abstractmethod
    def score(self, rows: Any) -> Score:
        """The result for rows whose left is 0."""

    def log_prob(self, x: Tensor, labels: Tensor | None = None) -> Score:
        """All steps at once, for training and evaluation."""
        rows = self.score_init(x, unlabelled(x) if labels is None else labels)
        while int(rows.left.max()) > 0:
            rows = self.score_step(rows)
        return self.score(rows)


@dataclass
class PassRows(Rows):
    """Rows of a score that takes one pass."""

    x: Tensor  # (B, C, H, W)
    labels: Tensor  # (B,)
    result: Tensor  # (B, 1 + K): log_prob or energy, then K statistics
    features: Tensor  # (B, Σ F): all feature vectors, side by side
    per_pixel: Tensor  # (B, H, W); (B, 0, 0) where the family has none


class OnePassDensity(Density):
    """A Density whose score is one forward pass: a family writes `evaluate` alone."""

    statistic_names: tuple[str, ...] = ()
    feature_sizes: Mapping[str, int] = MappingProxyType({})  # name -> F
    normalised = True  # False: the number is an energy, not a log-probability
    has_pixel_terms = False

    @abc.abstractmethod
    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        """Scores x (B, C, H, W) given labels (B,). Differentiable in x where the family allows it.

        `statistics` has exactly the names in `statistic_names`, and `features` those in `feature_sizes`.
        """

    def score_init(self, x: Tensor, labels: Tensor) -> PassRows:
        b, _, h, w = x.shape
        return PassRows(
            tick=torch.zeros(b, dtype=torch.int64, device=x.device),
            left=torch.ones(b, dtype=torch.int64, device=x.device),
            x=x,
            labels=labels,
            result=x.new_full((b, 1 + len(self.statistic_names)), math.nan),
            features=x.new_full((b, sum(self.feature_sizes.values())), math.nan),
            per_pixel=x.new_zeros((b, h, w) if self.has_pixel_terms else (b, 0, 0)),
        )

    def score_step(self, rows: PassRows) -> PassRows:
        s = self.evaluate(rows.x, rows.labels)
        value = s.log_prob if self.normalised else s.energy
        assert value is not None, "evaluate returns log_prob when normalised, else energy"
        rows.result = torch.stack([value, *(s.statistics[name] for name in self.statistic_names)], dim=1)
        if self.feature_sizes:
            rows.features = torch.cat([s.features[name] for name in self.feature_sizes], dim=1)
        if s.per_pixel is not None:
            rows.per_pixel = s.per_pixel
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def score(self, rows: PassRows) -> Score:
        value, *statistics = rows.result.unbind(dim=1)
        return Score(
            log_prob=value if self.normalised else None,
            energy=None if self.normalised else value,
            per_pixel=rows.per_pixel if self.has_pixel_terms else None,
            statistics=dict(zip(self.statistic_names, statistics, strict=True)),
            features=dict(
                zip(
                    self.feature_sizes,
                    torch.split(rows.features, list(self.feature_sizes.values()), dim=1),
                    strict=True,
                )
            )
            if self.feature_sizes
            else {},
        )


@dataclass
class MapRows(Rows):
    """Rows of heat maps: one pass each."""

    x: Tensor  # (B, C, H, W)
    labels: Tensor  # (B,)
    surprise: Tensor  # (B, H, W)


class Localiser(abc.ABC):
    """A Density that also says where in an image it is surprised: what a heat map shows.

    A family writes `surprise` alone. Apart from the score, since it costs a pass of its own and few ask for it.
    """

    @abc.abstractmethod
    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, H, W) float32 of x (B, C, H, W) and labels (B,): the farther from 0, the more unexpected is the pixel.

        Its unit is the family's own: heat maps compare its size with that of normal images (`anomaly.heatmaps`). What
        is to be expected of a pixel, given what else the model knows, is best subtracted: an edge is no surprise merely
        because nobody could have said where exactly it lies. Below zero is then less than was expected, as odd as
        more. Deterministic, row by row, like a score.
        """

    def map_init(self, x: Tensor, labels: Tensor) -> MapRows:
        """Rows at tick 0, one tick from their end, for images and labels as `Density.score_init` takes them."""
        none = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        return MapRows(none, none + 1, x, labels, x.new_zeros(len(x), *x.shape[2:]))

    def map_step(self, rows: MapRows) -> MapRows:
        rows.surprise = self.surprise(rows.x, rows.labels)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows


def unlabelled(x: Tensor) -> Tensor:
    """(B,) labels that ask for the model without a label."""
    return torch.full((x.shape[0],), UNLABELLED, dtype=torch.int64, device=x.device)


def bits_per_dim(log_prob: Tensor, dims: int) -> Tensor:
    """Nats of an 8-bit image -> bits per dimension, for D = dims = C·H·W."""
    return -log_prob / (dims * math.log(2))


# --------------------------------------------------------------------------------------------------------- capabilities


class Denoiser(abc.ABC):
    """Guesses the image under any amount of noise, in terms that all families share: so that one model can learn from
    another without knowing its schedule, its scalings or what its network predicts."""

    @abc.abstractmethod
    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        """x̂₀ (B, C, H, W) on the scale [−1, 1], as E[x₀ | x, label] where the model has learnt it well.

        x = x₀ + σ ε (B, C, H, W) with x₀ on the scale [−1, 1] and ε standard normal: variance-exploding, unscaled.
        sigma (B,) > 0; labels (B,), -1 without; guidance (B,), 1 the plain conditional model. Each row has its own.
        A σ beyond what the model was trained at is treated as the nearest that was. With it, dx/dσ = (x − x̂₀) / σ is
        the probability-flow ODE (arXiv 2206.00364, eq. 1 and 3).
        """


class Autoencoder(abc.ABC):
    """A model that generates through codes of images. No sample can be expected to look better than what comes back
    from the code of a real image."""

    @abc.abstractmethod
    def reconstruct(self, x: Tensor, labels: Tensor) -> Tensor:
        """(B, C, H, W) in [0, 1]: images x (B, C, H, W), labels (B,), coded and decoded, deterministically."""


# ------------------------------------------------------------------------------------------------------------- training


@dataclass
class Batch:
    """A batch of training data, and where training stands."""

    x: Tensor  # (B, C, H, W) float32 on the grid k / 255
    labels: Tensor  # (B,) int64; -1 where the data has none
    captions: tuple[str, ...] = ()
    step: int = 0  # optimisation steps taken so far
    steps: int = 1  # the run's total: schedules and stages follow step / steps
    teacher: Denoiser | None = None  # frozen; comes with the batch, so that a student never holds or exports it


class Trainable(abc.ABC):
    """The objective sits beside the model; the loop keeps what is not the paper: optimiser, EMA, precision, ..."""

    def begin_from(self, teacher: Model) -> None:
        """Called once before `prepare` where the run names a teacher, a `Denoiser` of the same images: take over what
        weights fit. Every batch then brings the teacher. Raises `ValueError` where the family has no use for one."""
        raise ValueError("teacher: this family learns from data alone")

    def prepare(self, batches: Iterable[Batch]) -> None:
        """Called once before the first step with one pass over the training data: data-dependent initialisation, or all
        of the learning where maximum likelihood is closed. Draw only as many batches as needed.
        """
        return

    @abc.abstractmethod
    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameter groups by name; each has an optimiser of its own."""

    @abc.abstractmethod
    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """Yields (group, loss, metrics). The loop takes one optimiser step on the group before it asks for the next,
        so a generator's loss is computed after the critic's update. Randomness is torch's global generator. `metrics`
        are scalars
        to log, by name; the loop reads them now and then only."""

    def conclude(self, batches: Iterable[Batch]) -> None:
        """Called once after the last step, on the averaged weights as they will be stored, with one pass over the
        training data: what is computed from finished weights and kept as buffers (a partition function, the statistics
        of codes, ...). Not a parameter may change. Randomness is torch's global generator, seeded by the run, so that
        the result follows from the weights. Draw only as many batches as needed.
        """
        return


class Model(nn.Module, Sampler, Trainable):
    """What every family's class is. A Density too, exactly where its Spec has a likelihood."""

    spec: Spec
    training_only: tuple[str, ...] = ()  # buffers and networks that only training needs: no checkpoint holds them

    def networks(self) -> dict[str, nn.Module]:
        """By attribute, the parts that a step may call as functions of tensors, batched along dim 0: what may be run in
        another way (`models._modes`) without the family's knowing. Those that no step calls do no harm."""
        return dict(self.named_children())

    @property
    def device(self) -> torch.device:
        return next(itertools.chain(self.parameters(), self.buffers())).device
