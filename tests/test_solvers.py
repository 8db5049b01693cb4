"""Solvers as tables: exact on the path, of the order that the papers promise, independent of what shares the batch."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import _random, _rows, _solvers
from models._solvers import ALPHA, NOISE, POINT, PREDICTION, SIGMA, TIME, Chain, Path

F64 = torch.float64
MEAN, STD = 0.3, 0.6  # of the Gaussian data that closed forms are for


# ---------------------------------------------------------------------------------------------------------------- paths


def cosine(times: Tensor) -> Path:
    return Path(times, torch.cos(times * math.pi / 2), torch.sin(times * math.pi / 2))


def straight(times: Tensor) -> Path:
    return Path(times, 1 - times, times)


def exploding(times: Tensor) -> Path:
    """Variance exploding: noise from 0 to 20."""
    return Path(times, torch.ones_like(times), 20 * times**2)


def downwards(steps: int, first: float = 0.98, last: float = 0.0) -> Tensor:
    return torch.linspace(first, last, steps + 1, dtype=F64)


PATHS = {"cosine": cosine, "straight": straight, "exploding": exploding}
DETERMINISTIC = {"ddim": _solvers.ddim, "dpm-solver++": _solvers.dpm_solver, "heun": _solvers.heun}
paths = pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)


# --------------------------------------------------------------------------------------------------------------- chains


def chain(table: Tensor, x: Tensor, memory: int = 3) -> Chain:
    """Rows in float64, all of them with the same table and seeds of their own."""
    b = len(x)
    full = torch.zeros(b, len(table), PREDICTION + 1 + memory, dtype=F64)
    full[:, :, : table.shape[1]] = table
    return Chain(
        tick=torch.zeros(b, dtype=torch.int64),
        left=torch.full((b,), len(table)),
        seed=torch.arange(b),
        sample=torch.zeros(b, dtype=torch.int64),
        x=x,
        memory=tuple(torch.zeros_like(x) for _ in range(memory)),
        table=full,
    )


def solve(table: Tensor, x: Tensor, predict: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """x at the end; predict(x, coefficients now) as a network would."""
    rows = chain(table, x)
    while int(rows.left.max()) > 0:
        rows = _solvers.advance(rows, predict(rows.x, _solvers.now(rows)[:, :, None, None, None]))
    return rows.x


def best_x0(x: Tensor, now: Tensor) -> Tensor:
    """E[x₀ | x_t] of Gaussian data."""
    alpha, sigma = now[ALPHA], now[SIGMA]
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


def flow(path: Path, x: Tensor) -> Tensor:
    """The exact solution of the probability-flow ODE of Gaussian data, from the first point of the path to its last."""
    spread = (path.alpha**2 * STD**2 + path.sigma**2).sqrt()
    return path.alpha[-1] * MEAN + spread[-1] / spread[0] * (x - path.alpha[0] * MEAN)


def slope(error: Callable[[int], float], few: int, many: int) -> float:
    """Order of accuracy: how fast the error falls with the number of steps, in logarithms."""
    return math.log(error(few) / error(many)) / math.log(many / few)


# ---------------------------------------------------------------------------------------------------------------- tests


@given(
    path=st.sampled_from(sorted(PATHS)),
    solver=st.sampled_from(sorted(DETERMINISTIC)),
    steps=st.integers(1, 12),
    last=st.sampled_from([0.0, 0.05]),
)
@settings(deadline=None, max_examples=60)
def test_with_the_true_x0_every_tick_of_a_deterministic_solver_stays_on_the_path(
    path: str, solver: str, steps: int, last: float
) -> None:
    points = PATHS[path](downwards(steps, last=last))
    table = DETERMINISTIC[solver](points)
    x0, noise = torch.tensor(0.7, dtype=F64).view(1, 1, 1, 1), torch.tensor(-1.3, dtype=F64).view(1, 1, 1, 1)
    rows = chain(table, points.alpha[0] * x0 + points.sigma[0] * noise)
    while int(rows.left[0]) > 0:
        rows = _solvers.advance(rows, x0)
        at = int(rows.tick[0])
        alpha, sigma = table[at, [ALPHA, SIGMA]] if at < len(table) else (points.alpha[-1], points.sigma[-1])
        torch.testing.assert_close(rows.x, alpha * x0 + sigma * noise)


@given(path=st.sampled_from(sorted(PATHS)), steps=st.integers(1, 50), eta=st.floats(0, 1))
@settings(deadline=None, max_examples=60)
def test_with_the_true_x0_ddim_keeps_the_mean_and_the_variance_for_every_eta(path: str, steps: int, eta: float) -> None:
    """2010.02502, lemma 1: x_s given x₀ has mean α_s x₀ and variance σ_s²."""
    points = PATHS[path](downwards(steps))
    table = _solvers.ddim(points, eta)
    torch.testing.assert_close(table[:, PREDICTION] + table[:, POINT] * points.alpha[:-1], points.alpha[1:])
    variance = (table[:, POINT] * points.sigma[:-1]) ** 2 + table[:, NOISE] ** 2
    torch.testing.assert_close(variance, points.sigma[1:] ** 2)


def test_ddim_with_eta_one_on_the_full_grid_is_ancestral_sampling() -> None:
    """Against equations 6 and 7 of 2006.11239 in their own symbols."""
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=F64)
    alpha_bar = torch.cat([torch.ones(1, dtype=F64), (1 - beta).cumprod(0)])
    t = torch.arange(1000, -1, -1)
    points = Path(t / 1000, alpha_bar[t].sqrt(), (1 - alpha_bar[t]).sqrt())
    table = _solvers.ddim(points, eta=1.0).flip(0)  # t = 1 … 1000
    before, now = alpha_bar[:-1], alpha_bar[1:]
    torch.testing.assert_close(table[:, PREDICTION], before.sqrt() * beta / (1 - now))
    torch.testing.assert_close(table[:, POINT], (1 - beta).sqrt() * (1 - before) / (1 - now))
    torch.testing.assert_close(table[:, NOISE] ** 2, (1 - before) / (1 - now) * beta)


@paths
@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm-solver++", 2), ("heun", 2)])
def test_order_of_accuracy_on_gaussian_data(path: Callable[[Tensor], Path], solver: str, order: int) -> None:
    x = torch.tensor([-1.5, 0.4, 2.0], dtype=F64).view(3, 1, 1, 1)

    def error(steps: int) -> float:
        # ends above σ = 0, where DPM-Solver++ is of second order to the last; its variable λ evenly spaced
        points = path(downwards(4000, last=0.1))
        lambdas = points.alpha.log() - points.sigma.log()
        even = torch.linspace(float(lambdas[0]), float(lambdas[-1]), steps + 1, dtype=F64)
        times = torch.stack([_bisect(path, float(value)) for value in even])
        points = path(times)
        return float((solve(DETERMINISTIC[solver](points), x, best_x0) - flow(points, x)).abs().max())

    assert slope(error, 40, 80) == pytest.approx(order, abs=0.25)


def _bisect(path: Callable[[Tensor], Path], target: float) -> Tensor:
    """The time at which λ is `target`."""
    low, high = torch.tensor(1e-6, dtype=F64), torch.tensor(1 - 1e-6, dtype=F64)
    for _ in range(60):
        middle = (low + high) / 2
        point = path(middle)
        low, high = (middle, high) if float(point.alpha.log() - point.sigma.log()) > target else (low, middle)
    return low


@pytest.mark.parametrize(
    ("method", "order"),
    [(_solvers.EULER, 1), (_solvers.MIDPOINT, 2), (_solvers.HEUN, 2), (_solvers.RK4, 4)],
    ids=["euler", "midpoint", "heun", "rk4"],
)
def test_order_of_accuracy_of_runge_kutta(method: _solvers.Tableau, order: int) -> None:
    """dx/dt = −2 t x, from t = 0 to 1: x = x(0) exp(−t²)."""
    x = torch.tensor([1.0, -2.0], dtype=F64).view(2, 1, 1, 1)

    def error(steps: int) -> float:
        table = _solvers.runge_kutta(torch.linspace(0, 1, steps + 1, dtype=F64), method)
        assert len(table) == steps * len(method.nodes)
        return float((solve(table, x, lambda x, now: -2 * now[TIME] * x) - x * math.exp(-1)).abs().max())

    assert slope(error, 20, 40) == pytest.approx(order, abs=0.2)


def test_on_a_straight_path_ddim_is_eulers_method_for_the_velocity() -> None:
    times = downwards(7, first=1.0)
    x = torch.randn(4, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(0))

    def velocity(x: Tensor, now: Tensor) -> Tensor:  # ε − x₀
        coefficients = torch.stack([now[TIME], 1 - now[TIME], now[TIME]])
        return (x - best_x0(x, coefficients)) / now[TIME]

    by_velocity = solve(_solvers.runge_kutta(times, _solvers.EULER), x, velocity)
    torch.testing.assert_close(solve(_solvers.ddim(straight(times)), x, best_x0), by_velocity)


def test_ancestral_sampling_ends_in_the_data_s_mean_and_variance() -> None:
    """Closed form: the denoiser of Gaussian data is affine, so mean and variance follow a recurrence."""
    points = cosine(downwards(1000, first=0.999))
    mean, variance = torch.tensor(0.0, dtype=F64), torch.tensor(1.0, dtype=F64)
    for row in _solvers.ddim(points, eta=1.0):
        gain = best_x0(torch.ones((), dtype=F64), row) - best_x0(torch.zeros((), dtype=F64), row)
        offset = best_x0(torch.zeros((), dtype=F64), row)
        factor = row[POINT] + row[PREDICTION] * gain
        mean, variance = factor * mean + row[PREDICTION] * offset, factor**2 * variance + row[NOISE] ** 2
    assert float(mean) == pytest.approx(MEAN, abs=2e-3)
    assert float(variance) == pytest.approx(STD**2, rel=0.02)


def test_the_noise_of_ancestral_sampling_has_the_variance_that_the_table_says() -> None:
    points = cosine(downwards(20))
    table = _solvers.ddim(points, eta=1.0)
    x = torch.zeros(64, 1, 16, 16, dtype=F64)
    end = solve(table[:1], x, lambda x, now: torch.zeros_like(x))
    n = end.numel()
    assert abs(float(end.mean())) < 5 * float(table[0, NOISE]) / math.sqrt(n)
    assert float(end.var()) == pytest.approx(float(table[0, NOISE]) ** 2, rel=5 * math.sqrt(2 / n))


@paths
@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_a_path_to_the_data_ends_in_the_last_prediction_itself(
    path: Callable[[Tensor], Path], solver: str, steps: int
) -> None:
    table = DETERMINISTIC[solver](path(downwards(steps)))
    last = torch.zeros(table.shape[1] - POINT, dtype=F64)
    last[PREDICTION - POINT] = 1.0
    torch.testing.assert_close(table[-1, POINT:], last, rtol=0, atol=0)


def test_no_signal_at_all_in_the_first_point_is_no_trouble() -> None:
    """A schedule with zero terminal SNR (2305.08891): λ is −∞ there."""
    points = cosine(downwards(5, first=1.0))
    points.alpha[0] = 0.0
    for table in (_solvers.ddim(points), _solvers.ddim(points, 1.0), _solvers.dpm_solver(points)):
        assert table.isfinite().all()


def begin(solvers: list[tuple[str, int]], seed: int = 0) -> Chain:
    """One row for each (solver, steps)."""
    makers: dict[str, Callable[[Path], Tensor]] = {**DETERMINISTIC, "ancestral": lambda path: _solvers.ddim(path, 1.0)}
    return Chain.begin(
        seed=torch.arange(seed, seed + len(solvers)),
        sample=torch.zeros(len(solvers), dtype=torch.int64),
        tables=[makers[name](cosine(downwards(steps))) for name, steps in solvers],
        ticks=40,
        memory=1,
        shape=(1, 4, 4),
    )


def finish(rows: Chain) -> Tensor:
    ends = [torch.empty(0)] * len(rows.x)
    index = list(range(len(rows.x)))
    while index:
        rows = _solvers.advance(rows, best_x0(rows.x, _solvers.now(rows)[:, :, None, None, None]))
        for i, left in zip(index, rows.left.tolist(), strict=True):
            if left == 0:
                ends[i] = rows.x[index.index(i)].clone()
        keep = [k for k, left in enumerate(rows.left.tolist()) if left > 0]
        index, rows = [index[k] for k in keep], _rows.take(rows, keep)
    return torch.stack(ends)


@given(
    st.lists(
        st.tuples(st.sampled_from(["ddim", "ancestral", "dpm-solver++", "heun"]), st.integers(1, 20)),
        min_size=2,
        max_size=5,
    )
)
@settings(deadline=None, max_examples=25)
def test_rows_with_different_solvers_and_steps_share_a_batch_and_do_not_notice(solvers: list[tuple[str, int]]) -> None:
    together = finish(begin(solvers))
    for i, one in enumerate(solvers):
        assert torch.equal(finish(begin([one], seed=i))[0], together[i])


def test_only_rows_with_noise_pay_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = begin([("ddim", 5), ("ancestral", 5), ("dpm-solver++", 3), ("ancestral", 4)])
    asked: list[list[int]] = []
    normal = _random.normal

    def recorded(seed: Tensor, *rest: object) -> Tensor:
        asked.append(seed.tolist())
        return normal(seed, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(_random, "normal", recorded)
    _solvers.advance(rows, torch.zeros_like(rows.x))
    assert asked == [[1, 3]]
    asked.clear()
    _solvers.advance(_rows.take(begin([("ddim", 5), ("dpm-solver++", 2)]), [0, 1]), torch.zeros(2, 1, 4, 4))
    assert len(asked) == 1, "the beginning draws noise, the step does not"
