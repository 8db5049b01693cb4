"""Consistency models (Song et al., arXiv 2303.01469; improved training 2310.14189), class-conditional.

A consistency function maps every point of a trajectory of the probability-flow ODE dx/dσ = (x − D(x, σ)) / σ to where
it begins, next to the image: f(x, σ_min) = x, and f is the same all along. So one evaluation at pure noise draws an
image. It is learnt from pairs of neighbouring points, σ_min = σ_1 < … < σ_N = σ_max:

    f(x₀ + σ_{i+1} ε, σ_{i+1})  is pulled to  f(x̂, σ_i), held fixed

    distillation  x̂ = x + (σ_i − σ_{i+1}) (x − D(x, σ_{i+1})) / σ_{i+1}: one Euler step of the run's teacher D, under
                  guidance of a fixed strength, which f then has built in
    training      x̂ = x₀ + σ_i ε, the same x₀ and ε: where the run has no teacher

Both as 2310.14189 trains: no averaged copy as the target, pseudo-Huber distances, noise levels drawn from a discretised
log-normal, N doubling as training goes on. What differs from the papers: the teacher's step is Euler's where 2303.01469
takes Heun's, for half the evaluations; no dropout; distances may be weighted by 1 / |c_out|; the noise levels of a
sample of several steps are even in arctan(σ / σ_data), not searched for. With σ_data = 1 the scalings are those of
v-prediction on the cosine schedule, and the network is told that schedule's time: a student with the weights of such a
teacher begins as the teacher's D.

    variable                  papers
    least, greatest           ε or σ_min, T or σ_max
    scale                     σ_data
    c_skip, c_out, c_in       c_skip(t), c_out(t) (2303.01469, appendix C), c_in(t) (2206.00364, table 1)
    intervals                 N − 1
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models import _protocol, _random, _solvers
from models._diffusion import column, cosine_time, detailed, stratified
from models._nn import UNet
from models._protocol import Batch, Denoiser, Draw, ImageSpace, Spec, Steps

RHO = 7.0  # how noise levels crowd towards σ_min (2206.00364, eq. 5)
HUBER = 0.00054  # c / √D of the pseudo-Huber distance (2310.14189, §3.3)
WEIGHTINGS = ("interval", "output", "even")


@dataclass(frozen=True)
class Config:
    """Everything that shapes the network and the objective."""

    channels: int = 32  # of the U-Net at full resolution
    multipliers: tuple[int, ...] = (1, 2, 3)  # of `channels`, at each halving of the resolution
    blocks: int = 1  # residual blocks at each resolution, on each side
    attention: tuple[int, ...] = ()  # levels with attention, 0 = full resolution; the middle always has it
    detail_periods: tuple[float, ...] = (8.0, 64.0)  # grey levels; sines of the input that show it finely
    sigma_data: float = 1.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    intervals: tuple[int, int] = (10, 1280)  # between noise levels, at first and at last
    noise_mean: float = -1.1  # of log σ, as training draws it
    noise_std: float = 2.0
    weighting: str = "interval"  # of the distance: 1 / (σ_{i+1} − σ_i); "output": 1 / |c_out|; "even": 1
    label_dropout: float = 0.1  # how often training hides the label, so that p(x) is learnt next to p(x | y)
    guidance_scale: float = 1.5  # of the teacher
    max_steps: int = 8


def intervals_at(step: int, steps: int, first: int, last: int) -> int:
    """N(k) − 1 at step k of K: doubles from first to last in stretches of equal length (2310.14189, §3.4)."""
    stretch = max(1, steps // (int(math.log2(last // first)) + 1))
    return int(min(first * 2 ** (step // stretch), last))


def noise_levels(intervals: int, least: float, greatest: float) -> Tensor:
    """(intervals + 1,) float64, rising from least to greatest, evenly in σ^(1/ρ) (2206.00364, eq. 5)."""
    share = torch.linspace(0, 1, intervals + 1, dtype=torch.float64)
    low, high = least ** (1 / RHO), greatest ** (1 / RHO)
    levels: Tensor = (low + share * (high - low)) ** RHO
    return levels


def interval_chances(levels: Tensor, mean: float, std: float) -> Tensor:
    """(N − 1,) of each interval of the levels: what a log-normal σ gives it (2310.14189, eq. 10), up to a factor."""
    cumulative = torch.special.erf((levels.log() - mean) / (math.sqrt(2) * std))
    chances: Tensor = cumulative.diff()
    return chances


def sampling_levels(steps: int, least: float, greatest: float, scale: float) -> Tensor:
    """(steps + 1,) float64, σ at which f is evaluated, falling from greatest, and least: evenly in arctan(σ / scale)
    below the greatest."""
    share = torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    levels = scale * torch.tan(share * (math.pi / 2))
    levels[0] = greatest
    return torch.cat([levels.clamp(least, greatest), levels.new_tensor([least])])


# ---------------------------------------------------------------------------------------------------------------- model


@dataclass
class ConsistencyRows(_solvers.Chain):
    label: Tensor  # (B,) int64, -1 without


class Model(_protocol.Model):
    """A U-Net inside the scalings that make f(x, σ_min) = x, its objective, and sampling in one or several steps."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        _validate(config)
        self.config = config
        self.network = UNet(
            in_channels=space.channels * (1 + 2 * len(config.detail_periods)),
            out_channels=space.channels,
            channels=config.channels,
            multipliers=config.multipliers,
            blocks=config.blocks,
            attention=config.attention,
            classes=space.classes,
        )
        self.spec = Spec(
            family="consistency",
            image=replace(space, captions=False),
            steps=Steps("denoising step", min=1, default=1, max=config.max_steps),
        )

    def consistency(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """f(x, σ) (B, C, H, W) on the scale [−1, 1], for x (B, C, H, W) with noise sigma (B,)."""
        scale = self.config.sigma_data
        c_skip = scale**2 / ((sigma - self.config.sigma_min).square() + scale**2)
        c_out = -self._reach(sigma)  # the sign makes v of what the network gives out
        c_in = (sigma.square() + scale**2).rsqrt()
        inputs = detailed(column(c_in) * x, self.config.detail_periods)
        out: Tensor = self.network(inputs, cosine_time(sigma / scale), labels)
        return column(c_skip) * x + column(c_out) * out

    def _reach(self, sigma: Tensor) -> Tensor:
        """|c_out| (B,): how far what the network gives out can move the image."""
        scale = self.config.sigma_data
        return scale * (sigma - self.config.sigma_min) * (sigma.square() + scale**2).rsqrt()

    # ---- training

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"network": list(self.network.parameters())}

    def begin_from(self, teacher: _protocol.Model) -> None:
        """Take over the weights of the teacher's `network` that have the same name and shape. Where its last layer
        gives out more channels (a learnt variance), the first are its prediction."""
        theirs = teacher.state_dict()
        for name, mine in self.network.state_dict().items():
            given = theirs.get(f"network.{name}", mine)
            if name.startswith("out."):
                given = given[: len(mine)]
            if given.shape == mine.shape:
                mine.copy_(given)

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        c, b, device = self.config, len(batch.x), batch.x.device
        intervals = intervals_at(batch.step, batch.steps, *c.intervals)
        levels = noise_levels(intervals, c.sigma_min, c.sigma_max)
        upto = interval_chances(levels, c.noise_mean, c.noise_std).cumsum(dim=0)
        i = torch.searchsorted((upto / upto[-1]).float().to(device), stratified(b, device)).clamp(max=intervals - 1)
        lower, sigma = (part.float().to(device)[i] for part in (levels[:-1], levels[1:]))
        x0, noise = 2 * batch.x - 1, torch.randn_like(batch.x)
        hidden = torch.rand(b, device=device) < c.label_dropout
        labels = batch.labels.masked_fill(hidden, _protocol.UNLABELLED)
        x = x0 + column(sigma) * noise
        estimate = self.consistency(x, sigma, labels)  # before the target: autocast keeps the first casts of weights
        with torch.no_grad():
            below = x0 + column(lower) * noise
            if batch.teacher is not None:
                below = self._euler(batch.teacher, x, sigma, lower, labels)
            target = self.consistency(below, lower, labels)
        distance = pseudo_huber(estimate, target)
        weight = {"interval": 1 / (sigma - lower), "output": 1 / self._reach(sigma), "even": torch.ones_like(sigma)}
        metrics = {"distance": distance.detach().mean(), "intervals": torch.tensor(float(intervals))}
        yield "network", (weight[c.weighting] * distance).mean(), metrics

    def _euler(self, teacher: Denoiser, x: Tensor, sigma: Tensor, lower: Tensor, labels: Tensor) -> Tensor:
        """The teacher's ODE, one step from sigma down to lower."""
        guidance = torch.full_like(sigma, self.config.guidance_scale)
        slope = (x - teacher.denoised(x, sigma, labels, guidance)) / column(sigma)
        return x + column(lower - sigma) * slope

    # ---- sampling

    def init(self, draws: Sequence[Draw]) -> ConsistencyRows:
        device = self.device
        tables = {steps: self._table(steps) for steps in {d.steps for d in draws}}
        rows = ConsistencyRows.begin(
            seed=_random.seed_bits([d.seed for d in draws], device),
            sample=torch.tensor([d.sample for d in draws], device=device),
            tables=[tables[d.steps] for d in draws],
            ticks=self.config.max_steps,
            memory=1,
            shape=self.spec.image.shape,
            label=torch.tensor([d.label for d in draws], device=device),
        )
        rows.x.mul_(self.config.sigma_max)
        return rows

    def _table(self, steps: int) -> Tensor:
        c = self.config
        levels = sampling_levels(steps, c.sigma_min, c.sigma_max, c.sigma_data)
        return _solvers.resampling(_solvers.Path(levels, torch.ones_like(levels), levels), c.sigma_min)

    def step(self, rows: ConsistencyRows) -> ConsistencyRows:
        sigma = _solvers.now(rows)[_solvers.SIGMA]
        return _solvers.advance(rows, self.consistency(rows.x, sigma, rows.label))

    def image(self, rows: ConsistencyRows) -> Tensor:
        """The latest f(x, σ)."""
        return ((rows.memory[0] + 1) / 2).clamp(0.0, 1.0)


def pseudo_huber(a: Tensor, b: Tensor) -> Tensor:
    """(B,) √(‖a − b‖² + c²) − c, with c as 2310.14189 has it for the number of dimensions."""
    c = HUBER * math.sqrt(a[0].numel())
    squared: Tensor = (a - b).square().sum(dim=(1, 2, 3))
    return (squared + c**2).sqrt() - c


def _validate(config: Config) -> None:
    for name in ("channels", "blocks", "max_steps"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; it must be at least 1")
    if not config.multipliers or min(config.multipliers) < 1:
        raise ValueError(f"multipliers: {config.multipliers}; one positive number for each resolution")
    if not all(0 <= level < len(config.multipliers) for level in config.attention):
        raise ValueError(f"attention: {config.attention}; the levels are 0 … {len(config.multipliers) - 1}")
    if min(config.detail_periods, default=1.0) <= 0:
        raise ValueError(f"detail_periods: {config.detail_periods}; periods are positive, in grey levels")
    for name in ("sigma_data", "noise_std"):
        if not getattr(config, name) > 0:
            raise ValueError(f"{name}: {getattr(config, name)}; it must be above 0")
    if not 0 < config.sigma_min < config.sigma_max:
        raise ValueError(f"sigma_min, sigma_max: {config.sigma_min}, {config.sigma_max}; 0 < sigma_min < sigma_max")
    if not 1 <= config.intervals[0] <= config.intervals[1]:
        raise ValueError(f"intervals: {config.intervals}; at least 1, and at last no fewer than at first")
    if config.weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: {config.weighting!r}; there are {', '.join(WEIGHTINGS)}")
    if not 0 <= config.label_dropout < 1:
        raise ValueError(f"label_dropout: {config.label_dropout} is not in [0, 1)")
    if config.guidance_scale < 0:
        raise ValueError(f"guidance_scale: {config.guidance_scale}; at least 0")
