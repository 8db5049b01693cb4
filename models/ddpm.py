"""Denoising diffusion probabilistic models (Ho, Jain and Abbeel, arXiv 2006.11239), class-conditional.

What differs from the paper: the cosine schedule (arXiv 2102.09672) is the default; the network may predict ε, x₀ or v
(2202.00512); labels with classifier-free guidance (2207.12598); solvers of any number of steps (`models._solvers`); the
reverse process may learn its variance per pixel, in the form below, which tightens the bound. No solver uses it.

The forward process q and the reverse process p_θ, for t = 1 … T and an image x₀ in [−1, 1]:

    x_t = α_t x₀ + σ_t ε                                  α_t = √ᾱ_t,  σ_t = √(1 − ᾱ_t)
    p_θ(x_{t−1} | x_t) = N(μ̃_t(x_t, x̂₀), β̃_t (1 + κ_t r))    κ_t = SNR_{t−1} / SNR_t − 1
    p_θ(x₀ | x₁) = N(x̂₀, r σ₁² / α₁²), in bins of the 8-bit grid, the outer ones open (eq. 13)

where x̂₀ is the network's estimate and r the squared error of ε that is expected at a pixel. r = 0 gives the paper's β̃_t
and r = 1 its β_t (over 1 − β_t); a learned r is a second output of the network. With e² = SNR_t (x₀ − x̂₀)², the actual
squared error of ε, the terms of the bound (eq. 5) are sums over pixels of

    L_{t−1} = ½ [log(1 + κ_t r) + (1 + κ_t e²) / (1 + κ_t r) − 1]

    variable            paper
    alpha, sigma        √ᾱ_t, √(1 − ᾱ_t), for t = 0 … T
    kappa               κ_t
    x0, noise           x₀, ε         x    x_t
    error               r
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _denoising, _random, _solvers
from models._diffusion import (
    PREDICTIONS,
    SCHEDULES,
    SOLVERS,
    column,
    detailed,
    signal_and_noise,
    solver_table,
    stratified,
    target,
    x0_from,
)
from models._nn import UNet, guided
from models._protocol import (
    Batch,
    Denoiser,
    Density,
    Draw,
    ImageSpace,
    Likelihood,
    Localiser,
    Range,
    Rows,
    Score,
    Spec,
    Steps,
)
from models._protocol import Model as BaseModel

MIN_ERROR = 0.01  # least r as a part of the greatest: to the 8-bit grid a tenth of the last noise is a point mass
UNKNOWN = (0.02, 0.3)  # variances of a pixel whose neighbours tell much, and of one whose neighbours tell little
MAX_LOGIT = 8.0  # of r in training: halfway between two levels E[e² | x_t] exceeds 1, and logits would grow without end
VARIANCE_WEIGHT = 0.1  # of the loss that r is learnt from: it shapes the same layers as the prediction
MAX_GUIDANCE = 10.0
OFFSET, BOUND_NOISE = 0, 1  # draws of a score's noise


@dataclass(frozen=True)
class Config:
    """Everything that shapes the network, the diffusion and the objective."""

    channels: int = 32  # of the U-Net at full resolution
    multipliers: tuple[int, ...] = (1, 2, 3)  # of `channels`, at each halving of the resolution
    blocks: int = 1  # residual blocks at each resolution, on each side
    attention: tuple[int, ...] = ()  # levels with attention, 0 = full resolution; the middle always has it
    dropout: float = 0.0
    detail_periods: tuple[float, ...] = (
        8.0,
        64.0,
    )  # grey levels; sines of the image that show it finely (2107.00630, §C)
    prediction: str = "v"  # "epsilon", "x0" or "v"
    schedule: str = "cosine"  # or "linear"
    timesteps: int = 1000  # T
    variance: str = "learned"  # or "small" (β̃_t), "large" (β_t)
    clip: bool = True  # keep estimates of x₀ in the data's range
    bound_share: float = 0.25  # part of the training timesteps that are drawn as the bound weighs them
    label_dropout: float = 0.1  # how often training hides the label, so that p(x) is learnt next to p(x | y)
    guidance_scale: float = 1.5  # default of a request
    default_steps: int = 50
    bound_steps: int = 21  # network evaluations of a score, 2 … timesteps; `timesteps` leaves no term out


def expected_terms(kappa: Tensor, snr: Tensor) -> Tensor:
    """How large the terms L_{t−1} are about, up to a factor: those of pixels of the variances `UNKNOWN`, each alone.

    A score looks at terms, and training draws timesteps, in this proportion; it biases neither.
    """
    error = sum(0.5 * snr * v / (1 + snr * v) for v in UNKNOWN)
    return torch.log1p(kappa * error)


def inclusion(size: Tensor, n: int) -> Tensor:
    """Probabilities in proportion to size, but 1 at most, that sum to n: of each term to be among n chosen ones."""
    chosen = torch.zeros_like(size)
    certain = torch.zeros_like(size, dtype=torch.bool)
    while True:
        rest = size.masked_fill(certain, 0.0)
        chosen = torch.where(certain, 1.0, rest * ((n - int(certain.sum())) / rest.sum().clamp(min=1e-300)))
        if not (chosen > 1).any():
            return chosen
        certain |= chosen >= 1


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class DDPMRows(_solvers.Chain):
    label: Tensor  # (B,) int64, -1 without
    guidance: Tensor  # (B,)


@dataclass
class BoundRows(Rows):
    """Images whose bound is being summed: L₀ at tick 0, then one term at each tick; after them one probe at each."""

    seed: Tensor  # (B,) of the image's bytes
    x0: Tensor  # (B, C, H, W) in [−1, 1]
    label: Tensor  # (B,)
    timesteps: Tensor  # (B, ticks) int64; the first is 1
    per_pixel: Tensor  # (B, H, W) nats so far
    reconstruction: Tensor  # (B,) L₀ in nats
    latest: Tensor  # (B, 2) the latest two terms, each over the probability of its choice; nan before there are any
    bends: Tensor  # (B,) sum of the squared second differences of such terms
    denoising_error: Tensor  # (B,) so far
    errors: Tensor  # (B, probes, 4), see `models._denoising`
    features: Tensor  # (B, F), see there


class Model(BaseModel, Density, Denoiser, Localiser):
    """U-Net, forward process, objective, samplers and bound."""

    alpha: Tensor  # (T + 1,) each, by t = 0 … T
    sigma: Tensor
    kappa: Tensor  # from t = 2
    greatest_error: Tensor  # r of the best estimate that is linear in the pixel alone: no network need do worse
    chosen: Tensor  # probability that a score looks at t, from t = 2
    drawn: Tensor  # probability that training draws t, from t = 1
    weight: Tensor  # of the squared error of a prediction at t

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _validate(config)
        self.config = config
        self.channels = space.channels
        self.network = UNet(
            in_channels=space.channels * (1 + 2 * len(config.detail_periods)),
            out_channels=space.channels * (2 if config.variance == "learned" else 1),
            channels=config.channels,
            multipliers=config.multipliers,
            blocks=config.blocks,
            attention=config.attention,
            classes=space.classes,
            dropout=config.dropout,
        )
        self._lay_schedule()
        self.probes = _denoising.Probes(space.classes)
        self.spec = Spec(
            family="ddpm",
            image=replace(space, captions=False),
            steps=Steps("denoising step", min=1, default=config.default_steps, max=config.timesteps),
            solvers=SOLVERS,
            likelihood=Likelihood(
                kind="bound",
                dequantisation="none",
                note=f"variational bound, {config.bound_steps} of its {config.timesteps} terms sampled without bias",
                steps=config.bound_steps + self.probes.count,
                heatmap_evaluations=len(_denoising.MAP_SIGMAS),
            ),
            guidance_scale=Range(0.0, config.guidance_scale, MAX_GUIDANCE) if space.labels else None,
            prediction=config.prediction,  # type: ignore[arg-type]
        )

    def _lay_schedule(self) -> None:
        c = self.config
        alpha, sigma = self.path = signal_and_noise(c.schedule, c.timesteps)  # float64, as the solvers' tables want it
        snr = (alpha[1:] / sigma[1:]).square()  # t = 1 … T
        kappa = snr[:-1] / snr[1:] - 1  # t = 2 … T
        terms = expected_terms(kappa, snr[1:])
        by_terms = torch.cat([terms[:1], terms])  # L₀ counts like its neighbour
        by_terms = c.bound_share * by_terms / by_terms.sum()
        evenly = (1 - c.bound_share) / c.timesteps
        # squared error of ε -> squared error of what the network predicts
        to_epsilon = {"epsilon": torch.ones_like(snr), "x0": snr, "v": alpha[1:].square()}[c.prediction]
        constants = {
            "alpha": alpha,
            "sigma": sigma,
            "kappa": F.pad(kappa, (2, 0)),
            "greatest_error": F.pad(snr / (1 + snr), (1, 0)),
            "chosen": F.pad(inclusion(terms, c.bound_steps - 1), (2, 0)),
            "drawn": F.pad(evenly + by_terms, (1, 0)),
            "weight": F.pad((evenly + by_terms * to_epsilon) / (evenly + by_terms), (1, 0)),
        }
        for name, value in constants.items():
            self.register_buffer(name, value.float(), persistent=False)

    # ---- network

    def _evaluate(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        """x_t (B, C, H, W), t / T (B,), labels (B,) -> (B, C or 2C, H, W) float32: the prediction, and logits of r."""
        out: Tensor = self.network(detailed(x, self.config.detail_periods), time, labels)
        return out

    def _evaluate_with_middle(self, x: Tensor, time: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.with_middle(detailed(x, self.config.detail_periods), time, labels)

    def _x0(self, prediction: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """x̂₀ (B, C, H, W) from the network's prediction at x = α x₀ + σ ε."""
        x0 = x0_from(self.config.prediction, prediction, x, alpha, sigma)
        return x0.clamp(-1.0, 1.0) if self.config.clip else x0

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        """The network's x̂₀ at x / √(1 + σ²), which has this model's α and σ, at the time where σ_t / α_t = σ."""
        alpha = (1 + sigma.square()).rsqrt()
        here = column(alpha) * x
        out = guided(self._evaluate, here, self._time(sigma), labels, guidance)
        return self._x0(out[:, : self.channels], here, column(alpha), column(alpha * sigma))

    def _time(self, ratio: Tensor) -> Tensor:
        """t / T where σ_t / α_t = ratio (B,): t in 1 … T, in between by its logarithm."""
        known, asked = (self.sigma[1:] / self.alpha[1:]).log(), ratio.log()
        t = torch.searchsorted(known, asked).clamp(1, self.config.timesteps - 1)  # of the timestep below
        share = (asked - known[t - 1]) / (known[t] - known[t - 1])
        return (t + share.clamp(0, 1)) / self.config.timesteps

    # ---- training

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"network": list(self.network.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        """L_simple (eq. 14) of the network's own prediction, where a part of the timesteps is drawn as the bound weighs
        them, and a cross-entropy from which r is learnt: its minimum is at r = E[e² | x_t]."""
        b, device = len(batch.x), batch.x.device
        x0, noise = 2 * batch.x - 1, torch.randn_like(batch.x)
        t = torch.searchsorted(self.drawn.cumsum(dim=0), stratified(b, device)).clamp(1, self.config.timesteps)
        hidden = torch.rand(b, device=device) < self.config.label_dropout
        alpha, sigma = column(self.alpha[t]), column(self.sigma[t])
        x = alpha * x0 + sigma * noise
        out = self._evaluate(x, t / self.config.timesteps, batch.labels.masked_fill(hidden, -1))
        prediction = out[:, : self.channels]
        squared = (prediction - target(self.config.prediction, x0, noise, alpha, sigma)).square()
        loss = (self.weight[t] * squared.mean(dim=(1, 2, 3))).mean()
        metrics = {"mse": loss.detach()}
        if self.config.variance == "learned":
            estimate = self._x0(prediction.detach(), x, alpha, sigma)
            e2 = (alpha / sigma * (x0 - estimate)).square()
            part = e2 / column(self.greatest_error[t])
            metrics["epsilon_mse"] = e2.mean()
            logits = out[:, self.channels :].clamp(max=MAX_LOGIT)
            loss = loss + VARIANCE_WEIGHT * F.binary_cross_entropy_with_logits(logits, part)
        yield "network", loss, metrics

    # ---- sampling

    def init(self, draws: Sequence[Draw]) -> DDPMRows:
        device = self.device
        tables = {key: solver_table(*key, *self.path) for key in {(d.solver or SOLVERS[0], d.steps) for d in draws}}
        return DDPMRows.begin(
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], device=device),
            tables=[tables[d.solver or SOLVERS[0], d.steps] for d in draws],
            ticks=self.config.timesteps,
            memory=1,
            shape=self.spec.image.shape,
            label=torch.tensor([d.label for d in draws], device=device),
            guidance=torch.tensor([d.guidance_scale for d in draws], dtype=torch.float32, device=device),
        )

    def step(self, rows: DDPMRows) -> DDPMRows:
        time, alpha, sigma = _solvers.now(rows)[:3]
        out = guided(self._evaluate, rows.x, time, rows.label, rows.guidance)
        x0 = self._x0(out[:, : self.channels], rows.x, column(alpha), column(sigma))
        return _solvers.advance(rows, x0)

    def image(self, rows: DDPMRows) -> Tensor:
        """The latest x̂₀, at which every solver ends."""
        return ((rows.memory[0] + 1) / 2).clamp(0.0, 1.0)

    # ---- density

    def score_init(self, x: Tensor, labels: Tensor) -> BoundRows:
        b, device, terms = len(x), x.device, self.config.bound_steps - 1
        seed, x0 = _random.image_seed(x), 2 * x - 1
        # Systematic sampling: t is met with probability chosen[t], and never twice.
        offset = _random.uniform(seed, torch.zeros_like(seed), 0, OFFSET, (1,)).double()
        upto = self.chosen[2:].double().cumsum(dim=0)
        at = torch.searchsorted(upto / upto[-1] * terms, torch.arange(terms, device=device) + offset)
        prior = 0.5 * ((self.alpha[-1] * x0).square() + self.sigma[-1].square() - 1) - self.sigma[-1].log()  # L_T
        nothing = x0.new_zeros(b)
        return BoundRows(
            tick=torch.zeros_like(seed),
            left=torch.full_like(seed, self.config.bound_steps + self.probes.count),
            seed=seed,
            x0=x0,
            label=labels,
            timesteps=F.pad(at + 2, (1, 0), value=1).clamp(max=self.config.timesteps),
            per_pixel=prior.sum(dim=1),
            reconstruction=nothing,
            latest=x0.new_full((b, 2), math.nan),
            bends=nothing.clone(),
            denoising_error=nothing.clone(),
            errors=self.probes.begin(x),
            features=_denoising.no_features(x, self.network.deepest),
        )

    def score_step(self, rows: BoundRows) -> BoundRows:
        terms, last = self.config.bound_steps, self.config.timesteps
        bound = rows.tick < terms  # else a probe
        t = rows.timesteps.gather(1, rows.tick.clamp(max=terms - 1)[:, None])[:, 0]
        asked = self.probes.at(rows.tick - terms, rows.label)
        shrunk = (1 + asked.sigma.square()).rsqrt()
        alpha = column(torch.where(bound, self.alpha[t], shrunk))
        sigma = column(torch.where(bound, self.sigma[t], shrunk * asked.sigma))
        time = torch.where(bound, t / last, self._time(asked.sigma))
        which = torch.where(bound, t, last + 1 + asked.which)
        noise = _random.normal(rows.seed, torch.zeros_like(rows.seed), which, BOUND_NOISE, rows.x0.shape[1:])
        noise = noise * column(torch.where(bound, 1.0, asked.noise / asked.sigma))
        x = alpha * rows.x0 + sigma * noise
        out, middle = self._evaluate_with_middle(x, time, torch.where(bound, rows.label, asked.label))
        x0 = self._x0(out[:, : self.channels], x, alpha, sigma)
        rows.errors = self.probes.note(rows.errors, rows.tick - terms, x0 - rows.x0)
        rows.features = _denoising.note_features(rows.features, rows.tick - terms, middle)
        self._add_term(rows, bound, t, out, x0)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def _add_term(self, rows: BoundRows, bound: Tensor, t: Tensor, out: Tensor, x0: Tensor) -> None:
        """Of the rows that are at a term of the bound (B,) bool, from what the network gave out at t."""
        alpha, sigma = column(self.alpha[t]), column(self.sigma[t])
        error = self._error(out, t)
        first = t == 1
        nats = torch.where(
            column(first),
            -log_bin(rows.x0, x0, error.sqrt() * sigma / alpha),
            term(column(self.kappa[t]), (alpha / sigma * (rows.x0 - x0)).square(), error),
        ).sum(dim=1)  # (B, H, W)
        nats = nats / torch.where(first, 1.0, self.chosen[t])[:, None, None]
        total = nats.sum(dim=(1, 2))
        noisier = self.alpha < self.sigma
        mse = (rows.x0 - x0).square().mean(dim=(1, 2, 3)) / (self.chosen[t] * noisier.sum())
        rows.per_pixel = torch.where(bound[:, None, None], rows.per_pixel + nats, rows.per_pixel)
        rows.reconstruction = torch.where(first & bound, total, rows.reconstruction)
        one_ago, two_ago = rows.latest.unbind(dim=1)
        bend = (total - 2 * one_ago + two_ago).square().nan_to_num(0.0)
        rows.bends = torch.where(bound, rows.bends + bend, rows.bends)
        latest = torch.stack([torch.where(first, math.nan, total), one_ago], dim=1)
        rows.latest = torch.where(bound[:, None], latest, rows.latest)
        rows.denoising_error = rows.denoising_error + torch.where(bound & noisier[t], mse, 0.0)

    def _error(self, out: Tensor, t: Tensor) -> Tensor:
        """r (B, C, H, W)."""
        if self.config.variance == "learned":
            part = MIN_ERROR + (1 - MIN_ERROR) * torch.sigmoid(out[:, self.channels :])
            return part * column(self.greatest_error[t])
        # The paper's decoder has the variance σ₁² whichever of the two the other steps have.
        return torch.ones_like(out) * column(torch.where(t == 1, 1.0, float(self.config.variance == "large")))

    def score(self, rows: BoundRows) -> Score:
        """The bound. `stderr` is that of the choice of terms and of their noise, without that of L₀: from second
        differences of the terms, which leave out that they fall with t.

        Statistics: `reconstruction`, L₀ in nats; `denoising_error`, the mean squared error of x̂₀ on the scale [−1, 1]
        over the timesteps that have more noise than signal; and those of `models._denoising`, as its features.
        """
        terms = self.config.bound_steps - 1
        return Score(
            log_prob=-rows.per_pixel.sum(dim=(1, 2)),
            stderr=(rows.bends * terms / (6 * (terms - 2))).sqrt(),
            per_pixel=-rows.per_pixel,
            statistics={
                "reconstruction": rows.reconstruction,
                "denoising_error": rows.denoising_error,
                **self.probes.statistics(rows.errors, self.spec.image.dims),
            },
            features={"middle": rows.features},
        )

    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        return _denoising.surprise(self.denoised, x, labels)


def term(kappa: Tensor, e2: Tensor, r: Tensor) -> Tensor:
    """L_{t−1} of each pixel in nats: D_KL(q(x_{t−1} | x_t, x₀) ‖ p_θ(x_{t−1} | x_t)), see the top of the file."""
    ratio = 1 + kappa * r
    return 0.5 * (ratio.log() + (1 + kappa * e2) / ratio - 1)


def log_bin(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log-probability, in nats, of the 8-bit level of x in [−1, 1] under a Gaussian; the outer bins are open (eq. 13).

    log(Φ(u) − Φ(l)), on the side where Φ is small, so that it neither cancels nor underflows.
    """
    half = 1 / 255
    lower = torch.where(x <= -1 + half, -math.inf, (x - mean - half) / std)
    upper = torch.where(x >= 1 - half, math.inf, (x - mean + half) / std)
    flip = lower > 0
    lower, upper = torch.where(flip, -upper, lower), torch.where(flip, -lower, upper)
    log_upper = torch.special.log_ndtr(upper)
    inside: Tensor = log_upper + (-torch.expm1(torch.special.log_ndtr(lower) - log_upper)).log()
    return inside


def _validate(config: Config) -> None:
    for name in ("channels", "blocks", "timesteps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; it must be at least 1")
    if not config.multipliers or min(config.multipliers) < 1:
        raise ValueError(f"multipliers: {config.multipliers}; one positive number for each resolution")
    if not all(0 <= level < len(config.multipliers) for level in config.attention):
        raise ValueError(f"attention: {config.attention}; the levels are 0 … {len(config.multipliers) - 1}")
    if min(config.detail_periods, default=1.0) <= 0:
        raise ValueError(f"detail_periods: {config.detail_periods}; periods are positive, in grey levels")
    for name, allowed in (
        ("prediction", PREDICTIONS),
        ("schedule", SCHEDULES),
        ("variance", ("learned", "small", "large")),
    ):
        if getattr(config, name) not in allowed:
            raise ValueError(f"{name}: {getattr(config, name)!r}; there are {', '.join(allowed)}")
    for name in ("dropout", "bound_share", "label_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)} is not in [0, 1)")
    if not 0 <= config.guidance_scale <= MAX_GUIDANCE:
        raise ValueError(f"guidance_scale: {config.guidance_scale} is not in 0 … {MAX_GUIDANCE:g}")
    if not 1 <= config.default_steps <= config.timesteps:
        raise ValueError(f"default_steps: {config.default_steps} is not in 1 … timesteps = {config.timesteps}")
    if not 4 <= config.bound_steps <= config.timesteps:
        raise ValueError(f"bound_steps: {config.bound_steps} is not in 4 … timesteps = {config.timesteps}")
