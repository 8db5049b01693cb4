"""Continuous flows from noise to images, whatever ODE they follow: sampling, and the likelihood by the instantaneous
change of variables (arXiv 1806.07366, theorem 1; 2011.13456, appendix D.2).

    log p(x₁) = log N(x₀; 0, start²) − ∫₀¹ tr(∂/∂x dx/ds) ds

A family gives the field dx/ds. It should be smooth in s, and s = 1 lie where the noise that is left is a fraction of an
8-bit level.

    variable        what
    trace           tr(∂ slope / ∂x), or estimates of it, vᵀ (∂ slope / ∂x) v (Hutchinson 1989; arXiv 1810.01367)
    probes          the v
    z               the image with the noise of s = 1; q(z | x) is where it lies
    more            see `models._ode`
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models import _denoising, _ode, _random
from models._diffusion import column
from models._nn import UNet
from models._ode import Trajectory
from models._protocol import (
    Denoiser,
    Density,
    Draw,
    ImageSpace,
    Likelihood,
    Localiser,
    Model,
    Range,
    Rows,
    Score,
    Spec,
    Steps,
)
from models._solvers import RK4

CONVERGED = 0.02  # bits/dim that half the steps may change a likelihood by
HALF_BIN = 1 / 255  # of an 8-bit level on the scale [−1, 1]
LAST_NOISE = 0.6 * HALF_BIN  # at s = 1: less would lose pixels that no model is sure of, more those that it is sure of
DEQUANTISATION, PROBE, NOISE = 0, 1, 2  # draws of a score's noise: of dequantisation, of traces, of what is denoised
MAX_GUIDANCE = 10.0


@dataclass(frozen=True)
class Config:
    """What all families of continuous flows can be told of the network, sampling and scoring."""

    channels: int = 24  # of the U-Net at full resolution
    multipliers: tuple[int, ...] = (1, 2, 4)  # of `channels`, at each halving of the resolution
    blocks: int = 1  # residual blocks at each resolution, on each side
    attention: tuple[int, ...] = ()  # levels with attention, 0 = full resolution; the middle always has it
    dropout: float = 0.0
    detail_periods: tuple[float, ...] = (8.0, 64.0)  # grey levels; sines of the image that show it finely
    low_noise_share: float = 0.25  # part of the training times that are drawn evenly in the logarithm of the noise
    label_dropout: float = 0.1  # how often training hides the label, so that p(x) is learnt next to p(x | y)
    guidance_scale: float = 1.5  # default of a request
    default_steps: int = 16
    score_steps: int = 24  # of a likelihood, even; half as many are taken to compare with
    probes: int = 2  # random ones a step that estimate a trace; 0: it is computed exactly, by one for each dimension


def views(x: Tensor, alpha: Tensor, sigma: Tensor, periods: Sequence[float]) -> Tensor:
    """x = α x̄ + σ ε (B, C, H, W) with sines and cosines of x / α as further channels, which show a network the grey
    levels finely (2107.00630, §C): C (1 + 2 · len(periods)) in all, float32. alpha, sigma (B,); periods in grey levels.

    Each fades as the noise drowns it, as its mean over the noise does: else a field that should be smooth would not be.
    """
    with torch.autocast(x.device.type, enabled=False):
        alpha = alpha.clamp(min=0.1)  # where all have faded
        image, noise, parts = x / column(alpha) + 1, sigma / alpha, [x]
        for period in periods:
            frequency = 255 * math.pi / period  # 255 levels make −1 … 1
            left = column(torch.exp(-0.5 * (frequency * noise).square()))
            parts += [left * (frequency * image).sin(), left * (frequency * image).cos()]
        return torch.cat(parts, dim=1)


def dequantised(x: Tensor, seed: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """z = α x̄ + σ n and log q(z | x) (B,) in nats, for images x on the grid k / 255 and x̄ = 2 x − 1.

    n is normal, but cut off where z / α would leave the bin of the pixel's level, the outermost of which are open
    ("truncated normal dequantisation", arXiv 2305.03935): so log P(x) ≥ E[log p(z) − log q(z | x)] for the p of images
    under noise. With `LAST_NOISE` that loses 0.10 bits of a pixel where p is flat; of one that p is sure of 0.14, or
    0.07 where it is black or white.
    """
    furthest = torch.full_like(x, alpha * HALF_BIN / sigma, dtype=torch.float64)
    lowest = torch.special.ndtr(-furthest).where(x > 0, 0.0)
    inside = torch.special.ndtr(furthest).where(x < 1, 1.0) - lowest
    u = _random.uniform(seed, torch.zeros_like(seed), 0, DEQUANTISATION, x.shape[1:])
    n = torch.special.ndtri(lowest + u * inside)
    log_q = -0.5 * n.square() - inside.log() - math.log(math.sqrt(2 * math.pi) * sigma)
    return (alpha * (2 * x - 1).double() + sigma * n).float(), log_q.sum(dim=(1, 2, 3))


def probes(seed: Tensor, which: Tensor, shape: Sequence[int], n: int) -> Tensor:
    """(P, B, C, H, W) vectors v with E[v vᵀ] = 1: n random signs each, a function of (seed, which) (B,); or, for n = 0,
    all the unit vectors times √D, whose products have the exact trace as their mean."""
    b, dims = len(seed), math.prod(shape)
    if n == 0:
        units = torch.eye(dims, device=seed.device) * math.sqrt(dims)
        return units.view(dims, 1, *shape).expand(dims, b, *shape)
    u = _random.uniform(seed, torch.zeros_like(seed), which, PROBE, (n, *shape))
    return torch.where(u < 0.5, -1.0, 1.0).transpose(0, 1)


def slope_and_products(
    field: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, s: Tensor, labels: Tensor, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """The field's slope (B, C, H, W) at x, and vᵀ (∂ slope / ∂x) v (P, B) for vectors v (P, B, C, H, W)."""
    with torch.inference_mode(False), torch.enable_grad():
        x, s, labels, vectors = (part.clone() for part in (x, s, labels, vectors))  # inference tensors have no graph
        slope = field(x.requires_grad_(), s, labels)
        rows = [torch.autograd.grad(slope, x, v, retain_graph=k + 1 < len(vectors))[0] for k, v in enumerate(vectors)]
    products = (torch.stack(rows) * vectors).double().flatten(2).sum(dim=2)
    return slope.detach(), products


@dataclass
class LikelihoodRows(Rows):
    """Images on their way from data to noise: first in half the steps, and then in all of them."""

    seed: Tensor  # (B,) of the image's bytes
    label: Tensor  # (B,)
    image: Tensor  # (B, C, H, W) in [−1, 1]
    errors: Tensor  # (B, P, 4) of the image denoised, see `models._denoising`
    features: Tensor  # (B, F), see there
    data: Tensor  # (B, C, H, W) z, where the way begins
    x: Tensor  # (B, C, H, W) where it has come to
    log_q: Tensor  # (B,) float64 nats of z given the image
    log_det: Tensor  # (B,) float64 nats, of the way so far
    variance: Tensor  # (B,) float64, of `log_det`, by the difference of the probes
    coarse: Tensor  # (B,) float64 log-probability in half the steps, nan while it is on its way


class Flow(Model, Density, Denoiser, Localiser):
    """A model whose samples follow dx/ds. A family gives the field, its ends and the objective.

    A score takes `score_steps` steps of RK4 after half as many to compare with. The probes are drawn anew in every step
    of the coarser way; the finer one has the same, so that the two differ by their steps alone.
    """

    def __init__(
        self,
        family: str,
        config: Config,
        space: ImageSpace,
        *,
        start: float,
        end: tuple[float, float],
        solvers: tuple[str, ...],
        max_steps: int,
        evaluations: dict[str, int],
    ) -> None:
        """start: standard deviation of x at s = 0; end: (α, σ) at s = 1. solvers, and the `evaluations` of a step of
        those that are none of `_ode.METHODS`. Raises `ValueError` for a config that does not fit itself or the images.
        """
        super().__init__()
        _validate(config, max_steps)
        self.start, self.end, self.score_steps, self.probes = start, end, config.score_steps, config.probes
        self.detail_periods = config.detail_periods
        self.network = UNet(
            in_channels=space.channels * (1 + 2 * len(config.detail_periods)),
            out_channels=space.channels,
            channels=config.channels,
            multipliers=config.multipliers,
            blocks=config.blocks,
            attention=config.attention,
            classes=space.classes,
            dropout=config.dropout,
        )
        self.denoising = _denoising.Probes(space.classes)
        score_ticks = self.score_steps // 2 + self.score_steps
        trace = f"trace by {config.probes} Hutchinson probes a step" if config.probes else "exact trace"
        self.spec = Spec(
            family=family,
            image=replace(space, captions=False),
            steps=Steps("denoising step", min=1, default=config.default_steps, max=max_steps),
            solvers=solvers,
            evaluations=_ode.evaluations(solvers) | evaluations,
            adaptive=tuple(solver for solver in solvers if solver in _ode.ADAPTIVE),
            likelihood=Likelihood(
                kind="estimate",
                dequantisation="truncated normal K=1",
                note=f"ODE in {self.score_steps} steps of RK4 beside {self.score_steps // 2}; {trace}",
                steps=score_ticks,
                network_evaluations_per_step=len(RK4.nodes) * (1 + (config.probes or space.dims))
                + _denoising.per_tick(self.denoising, score_ticks),
                heatmap_evaluations=len(_denoising.MAP_SIGMAS),
            ),
            guidance_scale=Range(0.0, config.guidance_scale, MAX_GUIDANCE) if space.labels else None,
        )

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"network": list(self.network.parameters())}

    @abc.abstractmethod
    def field(self, x: Tensor, s: Tensor, labels: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        """(slope, estimate) at x (B, C, H, W) and s, labels, guidance (B,): 1 is the plain conditional model."""

    @abc.abstractmethod
    def probed(self, x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """As `denoised` without guidance; and what the coarsest level of the network ends with, (B, K, H', W')."""

    @abc.abstractmethod
    def way(self, s: Tensor) -> tuple[Tensor, Tensor]:
        """(u, du/ds), of any shape: the family's own variable, in which a single image's way is straight."""

    @abc.abstractmethod
    def back(self, u: Tensor) -> Tensor:
        """s where the variable is u."""

    # ---- sampling

    def init(self, draws: Sequence[Draw]) -> Trajectory:
        spec = self.spec
        asked = [(d.solver or spec.solvers[0], d.steps) for d in draws]
        tables = {key: self.solver_table(*key) for key in set(asked)}
        return _ode.begin(
            draws,
            tables=[tables[key] for key in asked],
            adaptive=[solver in spec.adaptive for solver, _ in asked],
            ticks=max(spec.ticks(spec.steps.max, solver) for solver in spec.solvers if solver not in spec.adaptive),
            shape=spec.image.shape,
            start=self.start,
            device=self.device,
        )

    def solver_table(self, solver: str, steps: int) -> Tensor:
        """(ticks, columns); of an adaptive solver, one step of size 1, which its rows scale and repeat."""
        return _ode.solver_table(solver, steps, self.way, self.back)

    def step(self, rows: Trajectory) -> Trajectory:
        s, _ = _ode.present(rows)
        return _ode.advance(rows, *self.field(rows.x, s, rows.label, rows.guidance))

    def image(self, rows: Trajectory) -> Tensor:
        """The latest estimate, at which every solver ends."""
        return ((rows.estimate + 1) / 2).clamp(0.0, 1.0)

    # ---- density

    def score_init(self, x: Tensor, labels: Tensor) -> LikelihoodRows:
        seed = _random.image_seed(x)
        z, log_q = dequantised(x, seed, *self.end)
        return LikelihoodRows(
            tick=torch.zeros_like(seed),
            left=torch.full_like(seed, self.score_steps // 2 + self.score_steps),
            seed=seed,
            label=labels,
            image=2 * x - 1,
            errors=self.denoising.begin(x),
            features=_denoising.no_features(x, self.network.deepest),
            data=z,
            x=z,
            log_q=log_q,
            log_det=torch.zeros_like(log_q),
            variance=torch.zeros_like(log_q),
            coarse=torch.full_like(log_q, math.nan),
        )

    def score_step(self, rows: LikelihoodRows) -> LikelihoodRows:
        each = _denoising.per_tick(self.denoising, self.score_steps // 2 + self.score_steps)
        image = rows.image, rows.seed, rows.label
        rows.errors, rows.features = _denoising.probe(
            self.denoising, self.probed, rows.errors, rows.features, rows.tick, each, image, NOISE
        )
        half = self.score_steps // 2
        coarse = rows.tick < half
        at = torch.where(coarse, rows.tick, rows.tick - half)
        h = -torch.where(coarse, 1 / half, 1 / self.score_steps)
        vectors = probes(rows.seed, torch.where(coarse, at, at // 2), rows.x.shape[1:], self.probes)
        slopes: list[Tensor] = []
        products: list[Tensor] = []
        for node, weights in zip(RK4.nodes, RK4.weights, strict=False):
            x = rows.x + column(h) * _weighted(weights, slopes) if slopes else rows.x
            slope, product = slope_and_products(self._plain_slope, x, 1 + (at + node) * h, rows.label, vectors)
            slopes.append(slope)
            products.append(product)
        x = rows.x + column(h) * _weighted(RK4.weights[-1], slopes)
        trace = h * _weighted(RK4.weights[-1], products)  # (P, B)
        log_det = rows.log_det + trace.mean(dim=0)
        variance = rows.variance + trace.var(dim=0) / len(trace)
        turn = rows.tick == half - 1
        rows.coarse = torch.where(turn, self._log_prob(x, log_det, rows.log_q), rows.coarse)
        rows.x = torch.where(column(turn), rows.data, x)
        rows.log_det = torch.where(turn, 0.0, log_det)
        rows.variance = torch.where(turn, 0.0, variance)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def _plain_slope(self, x: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        return self.field(x, s, labels, torch.ones_like(s))[0]

    def _log_prob(self, x: Tensor, log_det: Tensor, log_q: Tensor) -> Tensor:
        """(B,) float64 nats of the image, whose z was found at x in the noise."""
        return self._log_prior(x) + log_det - log_q

    def _log_prior(self, x: Tensor) -> Tensor:
        scaled = x.double() / self.start
        return (-0.5 * scaled.square() - math.log(math.sqrt(2 * math.pi) * self.start)).sum(dim=(1, 2, 3))

    def score(self, rows: LikelihoodRows) -> Score:
        """`converged` where half the steps change the result by at most `CONVERGED` bits/dim, and it is possible at
        all: no probability of an 8-bit image exceeds one. `stderr` is that of the probes.

        Statistics: `coarse_log_prob`, the result in half the steps; `log_prior` and `log_det`, the parts of log p(z);
        and those of `models._denoising`, as its features.
        """
        result = self._log_prob(rows.x, rows.log_det, rows.log_q)
        allowed = CONVERGED * self.spec.image.dims * math.log(2)
        return Score(
            log_prob=result.float(),
            stderr=rows.variance.sqrt().float() if self.probes else None,
            statistics={
                "coarse_log_prob": rows.coarse.float(),
                "log_prior": self._log_prior(rows.x).float(),
                "log_det": rows.log_det.float(),
                **self.denoising.statistics(rows.errors, self.spec.image.dims),
            },
            features={"middle": rows.features},
            converged=((result - rows.coarse).abs() <= allowed) & (result <= 0),
        )

    def surprise(self, x: Tensor, labels: Tensor) -> Tensor:
        return _denoising.surprise(self.denoised, x, labels)


def _weighted(weights: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    total = torch.zeros_like(parts[0])
    for w, part in zip(weights, parts, strict=True):
        total = total + w * part
    return total


def _validate(config: Config, max_steps: int) -> None:
    for name in ("channels", "blocks"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)}; it must be at least 1")
    if not config.multipliers or min(config.multipliers) < 1:
        raise ValueError(f"multipliers: {config.multipliers}; one positive number for each resolution")
    if not all(0 <= level < len(config.multipliers) for level in config.attention):
        raise ValueError(f"attention: {config.attention}; the levels are 0 … {len(config.multipliers) - 1}")
    if min(config.detail_periods, default=1.0) <= 0:
        raise ValueError(f"detail_periods: {config.detail_periods}; periods are positive, in grey levels")
    for name in ("dropout", "low_noise_share", "label_dropout"):
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name}: {getattr(config, name)} is not in [0, 1)")
    if not 0 <= config.guidance_scale <= MAX_GUIDANCE:
        raise ValueError(f"guidance_scale: {config.guidance_scale} is not in 0 … {MAX_GUIDANCE:g}")
    if not 1 <= config.default_steps <= max_steps:
        raise ValueError(f"default_steps: {config.default_steps} is not in 1 … {max_steps}")
    if config.score_steps < 2 or config.score_steps % 2:
        raise ValueError(
            f"score_steps: {config.score_steps}; an even number, since half of it is taken to compare with"
        )
    if config.probes < 0 or config.probes == 1:
        raise ValueError(
            f"probes: {config.probes}; two or more, whose difference is the error, or 0 for an exact trace"
        )
