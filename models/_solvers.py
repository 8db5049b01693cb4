"""Diffusion and ODE solvers as tables of coefficients: a solver is data, so rows with different solvers share a batch.

Every solver here is a linear recurrence in the point where the network was evaluated and its latest predictions,

    x  <-  a x + b₀ p₀ + b₁ p₁ + … + b_h p_h + d noise,      p_j the prediction of j ticks ago

and one row of (time, α, σ, a, d, b₀ … b_h) per tick is all that tells it apart. Solvers with several evaluations a step
need nothing else: where a step began is itself a combination of the present point and the predictions since.

Two kinds of table:

    of a Gaussian path x_t = α_t x₀ + σ_t ε, where p is the network's estimate of x₀:  `ddim`, `dpm_solver`, `heun`,
                                                                                        `resampling`
    of an ODE dx/dt = v(x, t), where p is v:                                            `runge_kutta`

    variable    paper
    alpha       α_t, or √ᾱ_t of a diffusion in discrete time
    sigma       σ_t, or √(1 − ᾱ_t)
    λ           log(α_t / σ_t), half the log of the signal-to-noise ratio
    eta         η of arXiv 2010.02502: 0 is deterministic, 1 the diffusion's own posterior
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

from models import _random
from models._nn import concerned
from models._protocol import Rows

TIME, ALPHA, SIGMA, POINT, NOISE, PREDICTION = range(6)  # columns; PREDICTION + j holds b_j
INITIAL_NOISE, STEP_NOISE = 0, 1  # draws of a row's noise


# --------------------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Path:
    """The points that a sample goes through on its way from noise to data: N + 1 of them for N steps, float64.

    time    what the network is told    alpha, sigma    x_t = alpha x₀ + sigma ε; sigma falls, the last one may be 0
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor


def _table(path: Path, a: Tensor, d: Tensor, *b: Tensor) -> Tensor:
    return torch.stack([path.time[:-1], path.alpha[:-1], path.sigma[:-1], a, d, *b], dim=1)


def ddim(path: Path, eta: float = 0.0) -> Tensor:
    """(N, 6) DDIM (arXiv 2010.02502, eq. 12 and 16) for any Gaussian path; eta = 1 is ancestral sampling (2006.11239).

    With eta = 0 it is also Euler's method for the probability-flow ODE in x / α as a function of σ / α, and on a
    straight path (α = 1 − σ) Euler's method in x itself.
    """
    alpha, sigma, alpha_s, sigma_s = path.alpha[:-1], path.sigma[:-1], path.alpha[1:], path.sigma[1:]
    # q(x_s | x_t, x₀) has variance σ²_{t|s} σ_s² / σ_t², where x_t = α_{t|s} x_s + σ_{t|s} ε
    variance = (sigma.square() - (alpha / alpha_s * sigma_s).square()).clamp(min=0) * (sigma_s / sigma).square()
    d = eta * variance.sqrt()
    a = (sigma_s.square() - d.square()).clamp(min=0).sqrt() / sigma
    return _table(path, a, d, alpha_s - a * alpha)


def dpm_solver(path: Path) -> Tensor:
    """(N, 7) DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2): second order, one evaluation a step.

    The first step is of first order, and so is one that ends in σ = 0, where λ is infinite.
    """
    alpha_s, sigma_s = path.alpha[1:], path.sigma[1:]
    lambdas = path.alpha.log() - path.sigma.log()
    h = lambdas.diff()
    # D = (1 + k) x₀ − k x₀_previous with k = h / (2 h_previous)
    k = torch.zeros_like(h)
    k[1:] = h[1:] / (2 * h[:-1])
    k[sigma_s == 0] = 0.0
    a = sigma_s / path.sigma[:-1]
    b = -alpha_s * torch.expm1(-h)
    return _table(path, a, torch.zeros_like(a), b * (1 + k), -b * k)


def heun(path: Path) -> Tensor:
    """(2N, 7), or (2N − 1, 7) where the last σ is 0: Heun's method in x / α as a function of σ / α (arXiv 2206.00364,
    algorithm 1): second order, two evaluations a step, but one in a step that ends in σ = 0.

    The first tick of a step is DDIM's; with ρ = σ / α the second adds α_s (ρ_t − ρ_s) / (2 ρ_s) times (p₀ − p₁).
    """
    first = torch.nn.functional.pad(ddim(path), (0, 1))
    rho = path.sigma / path.alpha
    b = path.alpha[1:] * (rho[:-1] - rho[1:]) / (2 * rho[1:])
    there = Path(*(torch.cat([part[1:], part[-1:]]) for part in (path.time, path.alpha, path.sigma)))
    second = _table(there, torch.ones_like(b), torch.zeros_like(b), b, -b)
    both = torch.stack([first, second], dim=1).flatten(0, 1)
    return both[:-1] if path.sigma[-1] == 0 else both


def resampling(path: Path, least: float) -> Tensor:
    """(N, 6): multistep consistency sampling (arXiv 2303.01469, algorithm 1), for α = 1: every estimate of x₀ is given
    fresh noise up to the next σ. It is of an image that has noise of `least`, where σ ends."""
    nothing = torch.zeros_like(path.sigma[1:])
    return _table(path, nothing, (path.sigma[1:].square() - least**2).clamp(min=0).sqrt(), path.alpha[1:])


@dataclass(frozen=True)
class Tableau:
    """An explicit Runge–Kutta method: `weights[i]` lead from the beginning of a step to stage i at `nodes[i]`, the last
    ones to its end. `error` are those of an embedded pair: its end minus that of the method of lower order."""

    nodes: tuple[float, ...]
    weights: tuple[tuple[float, ...], ...]
    error: tuple[float, ...] = ()


EULER = Tableau((0.0,), ((), (1.0,)))
MIDPOINT = Tableau((0.0, 1 / 2), ((), (1 / 2,), (0.0, 1.0)))
HEUN = Tableau((0.0, 1.0), ((), (1.0,), (1 / 2, 1 / 2)))
RK4 = Tableau((0.0, 1 / 2, 1 / 2, 1.0), ((), (1 / 2,), (0.0, 1 / 2), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)))
# 3(2) pair of Bogacki and Shampine (1989). The last stage lies at the end of the step: it is the first of the next.
BOGACKI_SHAMPINE = Tableau(
    (0.0, 1 / 2, 3 / 4, 1.0),
    ((), (1 / 2,), (0.0, 3 / 4), (2 / 9, 1 / 3, 4 / 9), (2 / 9, 1 / 3, 4 / 9, 0.0)),
    error=(-5 / 72, 1 / 12, 1 / 9, -1 / 8),
)


def runge_kutta(times: Tensor, method: Tableau) -> Tensor:
    """(N S, 5 + S) for dx/dt = v(x, t) over the N intervals of `times` (N + 1,), S stages each.

    A tick goes from the point of one stage to the point of the next. The predictions are v; α and σ are not used.
    """
    stages = len(method.nodes)
    h = times.diff()
    ticks = []
    for i, node in enumerate(method.nodes):
        tick = h.new_zeros(len(h), PREDICTION + stages)
        tick[:, TIME] = times[:-1] + node * h
        tick[:, POINT] = 1.0
        here, there = (*method.weights[i], 0.0), method.weights[i + 1]
        for j in range(i + 1):
            tick[:, PREDICTION + i - j] = (there[j] - here[j]) * h
        ticks.append(tick)
    return torch.stack(ticks, dim=1).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------- rows

C = TypeVar("C", bound="Chain")


@dataclass
class Chain(Rows):
    """Rows on their way from noise to data.

    seed, sample    (B,) int64, whose the noise is
    x               (B, C, H, W) the point where the network is to be evaluated
    memory          the latest predictions, newest first, (B, C, H, W) each: as many as the family's solvers look back
    table           (B, ticks, columns) float32, each row's solver, filled up with zeros to a common length
    """

    seed: Tensor
    sample: Tensor
    x: Tensor
    memory: tuple[Tensor, ...]
    table: Tensor

    @classmethod
    def begin(
        cls,
        seed: Tensor,
        sample: Tensor,
        tables: Sequence[Tensor],
        ticks: int,
        memory: int,
        shape: Sequence[int],
        **columns: Tensor,
    ) -> Self:
        """Rows at tick 0, standard normal noise. A family whose first σ is not 1 scales `x`.

        ticks, memory: the most that any row of this family needs, so that all its rows can share a batch. memory ≥ 1:
        the newest prediction is kept in any case, as the preview. columns: what a family adds.
        """
        device = seed.device
        table = torch.zeros(len(tables), ticks, PREDICTION + 1 + memory)
        for row, one in zip(table, tables, strict=True):
            row[: one.shape[0], : one.shape[1]] = one
        x = _random.normal(seed, sample, 0, INITIAL_NOISE, shape)
        return cls(
            tick=torch.zeros_like(seed),
            left=torch.tensor([len(one) for one in tables], device=device),
            seed=seed,
            sample=sample,
            x=x,
            memory=tuple(torch.zeros_like(x) for _ in range(memory)),
            table=table.to(device),
            **columns,
        )


def entries(table: Tensor, at: Tensor) -> Tensor:
    """(columns, B): the coefficients of each row's own table (B, ticks, columns) at its place `at` (B,)."""
    return table.gather(1, at.view(-1, 1, 1).expand(-1, 1, table.shape[2]))[:, 0].T


def now(rows: Chain) -> Tensor:
    """(columns, B): the coefficients of each row's present tick, by column: `time, alpha, sigma = now(rows)[:3]`."""
    return entries(rows.table, rows.tick)


def advance(rows: C, prediction: Tensor) -> C:
    """Take one tick with the network's prediction at (x, now). Writes into `rows`."""
    rows.x, rows.memory = moved(rows, prediction, now(rows)), (prediction, *rows.memory)[:-1]
    rows.tick, rows.left = rows.tick + 1, rows.left - 1
    return rows


def moved(rows: Chain, prediction: Tensor, coefficients: Tensor) -> Tensor:
    """The next x, by coefficients (columns, B)."""
    coefficients = coefficients.view(-1, len(rows.x), *(1,) * (rows.x.dim() - 1))
    x = coefficients[POINT] * rows.x
    for b, p in zip(coefficients[PREDICTION:], (prediction, *rows.memory), strict=True):
        x.addcmul_(b, p)
    d = coefficients[NOISE]
    noisy = concerned(d.flatten() != 0)  # deterministic rows do not pay for noise
    if len(noisy):
        noise = _random.normal(rows.seed[noisy], rows.sample[noisy], rows.tick[noisy], STEP_NOISE, x.shape[1:])
        x.index_add_(0, noisy, d[noisy] * noise)
    return x
