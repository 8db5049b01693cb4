"""ODE solvers over rows, also such that choose their own steps: each row its own, beside others with fixed ones.

The way is measured in s, 0 at the noise and 1 at the data. How a family's own time depends on s is its own business.

    variable        what
    s               (B,) in [0, 1]
    slope           dx/ds (B, C, H, W)
    estimate        x̂₀ (B, C, H, W): the image that the network sees in x, in [−1, 1] where it is a good one
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import _random, _solvers
from models._diffusion import column
from models._nn import concerned
from models._protocol import Draw
from models._solvers import BOGACKI_SHAMPINE, EULER, HEUN, MIDPOINT, PREDICTION, RK4, TIME, Chain

METHODS = {"midpoint": MIDPOINT, "euler": EULER, "heun": HEUN, "rk4": RK4, "bogacki-shampine": BOGACKI_SHAMPINE}
ADAPTIVE = ("bogacki-shampine",)
MEMORY = 3  # earlier slopes that a row keeps: none of the methods looks further back
SAFETY, SHRINK, GROW = 0.9, 0.2, 5.0  # of a step's size after an error was seen
SHORTEST = 8  # an adaptive solver's steps are at least a so-manieth of what a fixed one's would be


# -------------------------------------------------------------------------------------------------------------- solvers


def evaluations(solvers: Sequence[str]) -> dict[str, int]:
    """Network evaluations of a step, for the Spec: those of `METHODS` that take more than one."""
    stages = {name: len(METHODS[name].nodes) - (name in ADAPTIVE) for name in solvers if name in METHODS}
    return {name: n for name, n in stages.items() if n > 1}


def points(steps: int) -> Tensor:
    """(steps,) float64, s = 0, 1 / steps, …: where steps begin. From the last one, an evaluation leads to the image."""
    return torch.arange(steps, dtype=torch.float64) / steps


def solver_table(
    solver: str, steps: int, way: Callable[[Tensor], tuple[Tensor, Tensor]], back: Callable[[Tensor], Tensor]
) -> Tensor:
    """(ticks, columns) of `models._solvers`, for one of `METHODS`. Raises `ValueError` for another.

    way: s -> (u, du/ds), and back: u -> s. Steps begin at `points`, but are taken in the variable u, in which the way
    of a single image is straight: so few steps leave no noise in what the network is sure of. Adaptive ones go in s.
    """
    if solver not in METHODS:
        raise ValueError(f"solver: {solver!r}; there are {', '.join(METHODS)}")
    method = METHODS[solver]
    if solver in ADAPTIVE:
        return _solvers.runge_kutta(torch.tensor([0.0, 1.0], dtype=torch.float64), method)
    table = _solvers.runge_kutta(way(points(steps))[0], method)
    table[:, TIME] = back(table[:, TIME])
    ds_du = 1 / way(table[:, TIME])[1]
    for j in range(len(method.nodes)):  # b_j stands with the slope of j ticks ago
        table[j:, PREDICTION + j] *= ds_du[: max(0, len(table) - j)]
    return ended(table, points(steps)[-1])


def ended(ticks: Tensor, time: Tensor) -> Tensor:
    """A table with one more tick, which stays at its x: it is there for its estimate, the image."""
    last = ticks.new_zeros(1, ticks.shape[1])
    last[0, TIME], last[0, _solvers.POINT] = time, 1.0
    return torch.cat([ticks, last])


@dataclass
class Trajectory(Chain):
    """Rows on their way, and of rows whose solver is adaptive, how they go on.

    Their error per unit of s is held below `tolerance`, as the root of its mean square over the image relative to
    1 + |x|, as long as no step has to be shorter than 1 / (SHORTEST · steps).
    """

    label: Tensor  # (B,) int64, -1 without
    guidance: Tensor  # (B,)
    estimate: Tensor  # (B, C, H, W) the latest: the preview, and in the end the image
    stage: Tensor  # (B,) int64: the tick of its table that the row is at
    begun: Tensor  # (B,) s where the present step began
    start: Tensor  # (B, C, H, W) x there
    size: Tensor  # (B,) of the present step; 0: not adaptive
    tolerance: Tensor  # (B,)

    def progress(self) -> Tensor:
        return torch.where(self.size > 0, self.begun, self.tick / (self.tick + self.left))


def begin(
    draws: Sequence[Draw],
    tables: Sequence[Tensor],
    adaptive: Sequence[bool],
    ticks: int,
    shape: Sequence[int],
    start: float,
    device: torch.device,
) -> Trajectory:
    """Rows at s = 0, at noise of standard deviation `start`. tables: of adaptive rows, the step that they repeat."""
    seed = _random.seed_bits([d.seed for d in draws], device)
    numbers = torch.zeros(len(draws), device=device)
    sizes = torch.tensor([1 / d.steps if a else 0.0 for d, a in zip(draws, adaptive, strict=True)], device=device)
    rows = Trajectory.begin(
        seed=seed,
        sample=torch.tensor([d.sample for d in draws], device=device),
        tables=tables,
        ticks=ticks,
        memory=MEMORY,
        shape=shape,
        label=torch.tensor([d.label for d in draws], device=device),
        guidance=torch.tensor([d.guidance_scale for d in draws], dtype=torch.float32, device=device),
        estimate=torch.zeros(len(draws), *shape, device=device),
        stage=torch.zeros_like(seed),
        begun=numbers,
        start=numbers,
        size=sizes,
        tolerance=sizes.square(),
    )
    rows.x = rows.start = rows.x * start
    rows.left = torch.where(sizes > 0, 1, rows.left)
    return rows


def present(rows: Trajectory) -> tuple[Tensor, Tensor]:
    """(s, coefficients): (B,) where the network is to be evaluated, (columns, B) of the tick to take there."""
    coefficients = _solvers.entries(rows.table, rows.stage)
    scale = torch.where(rows.size > 0, rows.size, 1.0)
    s = rows.begun + scale * coefficients[TIME]
    return s, torch.cat([coefficients[:PREDICTION], coefficients[PREDICTION:] * scale])


def advance(rows: Trajectory, slope: Tensor, estimate: Tensor) -> Trajectory:
    """Take one tick with what the network says of x at the present s. Writes into `rows`."""
    slopes = (slope, *rows.memory)  # newest first
    rows.x = _solvers.moved(rows, slope, present(rows)[1])
    rows.memory, rows.estimate = slopes[:-1], estimate
    rows.tick, rows.stage = rows.tick + 1, rows.stage + 1
    rows.left = torch.where(rows.size > 0, rows.left, rows.left - 1)
    whole = (rows.size > 0) & (rows.stage == len(BOGACKI_SHAMPINE.nodes))
    return _judge(rows, slopes, whole) if len(concerned(whole)) else rows


def _judge(rows: Trajectory, slopes: Sequence[Tensor], whole: Tensor) -> Trajectory:
    """Accept or repeat the steps of the rows that have taken a whole one, and choose the size of the next.

    The error is per unit of s, so that those of all steps add up to at most the tolerance; it goes with the square of
    the step's size. The last stage's slope is the next step's first, or the first one is again.
    """
    shortest = rows.tolerance.sqrt() / SHORTEST
    error = sum(e * k for e, k in zip(BOGACKI_SHAMPINE.error, reversed(slopes), strict=True))
    relative = (error / (1 + rows.x.abs())).square().mean(dim=tuple(range(1, rows.x.dim()))).sqrt()
    ratio = relative / rows.tolerance.clamp(min=1e-12)
    # A step that is not finite is taken as it is: the row's image tells.
    accepted = whole & ((ratio <= 1) | (rows.size <= shortest * 1.001) | ~ratio.isfinite())
    begun = torch.where(accepted, rows.begun + rows.size, rows.begun)
    start = torch.where(column(accepted), rows.x, rows.start)
    first = torch.where(column(accepted), slopes[0], slopes[-1])
    factor = (SAFETY * ratio.clamp(min=1e-8).rsqrt()).nan_to_num(1.0).clamp(SHRINK, GROW)
    size = torch.minimum((rows.size * factor).maximum(shortest), 1 - begun)
    done = accepted & (begun >= 1 - 1e-6)
    size = torch.where(done, rows.size, size)
    again = column(whole)
    rows.x = torch.where(again, start + column(BOGACKI_SHAMPINE.weights[1][0] * size) * first, rows.x)
    rows.memory = (torch.where(again, first, rows.memory[0]), *rows.memory[1:])
    rows.start, rows.begun = torch.where(again, start, rows.start), torch.where(whole, begun, rows.begun)
    rows.size = torch.where(whole, size, rows.size)
    rows.stage = torch.where(whole, 1, rows.stage)
    rows.left = torch.where(done, 0, rows.left)
    return rows
