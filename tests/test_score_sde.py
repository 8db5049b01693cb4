"""Score SDEs: kernels against the SDEs themselves, solvers' order and their final distribution, the probability-flow
ODE's likelihood in closed form, for data whose score is known."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models import _random, _rows, score_sde
from models._continuous_flow import LAST_NOISE, dequantised
from models._protocol import Draw, ImageSpace, Rows, bits_per_dim, unlabelled
from models._solvers import NOISE, POINT, PREDICTION, TIME
from models.score_sde import Config, Model, sde_of

SPACE = ImageSpace(width=2, height=2, channels=1)
MEAN, STD = 0.1, 0.25  # of the Gaussian data, on the scale [−1, 1]
SMALL: dict[str, Any] = {"channels": 4, "multipliers": (1,), "detail_periods": ()}
KINDS = ("vp", "sub-vp", "ve")
kinds = pytest.mark.parametrize("kind", KINDS)


def gaussian_model(kind: str = "vp", **config: Any) -> Model:
    """A model whose network is exact for independent pixels of N(MEAN, STD²)."""
    model = Model(Config(sde=kind, **(SMALL | config)), SPACE).eval().requires_grad_(False)

    def velocity(x: Tensor, ratio: Tensor, labels: Tensor) -> Tensor:
        ratio = ratio[:, None, None, None]
        whitened = (x - MEAN) / (STD**2 + ratio**2)
        x0, noise = MEAN + STD**2 * whitened, ratio * whitened
        return (noise - ratio * x0) / (1 + ratio**2).sqrt()

    model._velocity = velocity  # type: ignore[method-assign]
    return model


def law(model: Model, s: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of x."""
    alpha, sigma = model.sde.kernel(model.sde.time(model.way(torch.tensor(s, dtype=torch.float64))[0]))
    return alpha * MEAN, (alpha**2 * STD**2 + sigma**2).sqrt()


def flow(model: Model, x: Tensor, s: float) -> Tensor:
    """Where the exact probability-flow ODE takes x from s = 0: each quantile stays a quantile."""
    (m0, s0), (m1, s1) = law(model, 0.0), law(model, s)
    return m1 + s1 / s0 * (x - m0)


def in_float64(rows: Rows) -> Any:
    return _rows._map(lambda part: part.double() if part.is_floating_point() else part, rows)


def finish(model: Model, rows: Any) -> Any:
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    return rows


# ------------------------------------------------------------------------------------------------------------------ SDE


@kinds
def test_the_kernel_is_what_the_sde_makes_of_a_point(kind: str) -> None:
    """Mean and variance of Euler–Maruyama in 20,000 steps, which are recurrences, from little noise to t = ½ and 1."""
    sde = sde_of(Config(sde=kind))
    begin = sde.time(torch.tensor(LAST_NOISE, dtype=torch.float64))
    alpha, sigma = sde.kernel(begin)
    for end in (0.5, 1.0):
        t = begin + (end - begin) * torch.linspace(0, 1, 20_001, dtype=torch.float64)
        step = t.diff()
        f, g2 = sde.coefficients(t[:-1])
        factor = 1 + f * step
        onwards = factor.flip(0).cumprod(0).flip(0)  # from each step's beginning to the end
        mean = alpha * onwards[0]
        after = torch.cat([onwards[1:], torch.ones(1, dtype=torch.float64)])
        variance = sigma**2 * onwards[0] ** 2 + (after**2 * g2 * step).sum()
        there = sde.kernel(t[-1])
        torch.testing.assert_close(mean, there[0], rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(variance.sqrt(), there[1], rtol=2e-3, atol=1e-6)


@kinds
def test_simulated_paths_have_the_kernel_s_mean_and_variance(kind: str) -> None:
    sde, x0, n, steps = sde_of(Config(sde=kind)), 0.7, 20_000, 300
    generator = torch.Generator().manual_seed(0)
    end = 0.4
    begin = sde.time(torch.tensor(LAST_NOISE, dtype=torch.float64))
    alpha, sigma = sde.kernel(begin)
    x = alpha * x0 + sigma * torch.randn(n, dtype=torch.float64, generator=generator)
    times = begin + (end - begin) * torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    for now, then in itertools.pairwise(times):
        middle = (now + then) / 2  # of second order in mean and variance
        f, g2 = sde.coefficients(middle)
        noise = torch.randn(n, dtype=torch.float64, generator=generator)
        x = x * torch.exp(f * (then - now)) + (g2 * (then - now)).sqrt() * noise
    alpha, sigma = sde.kernel(times[-1])
    assert float(x.mean()) == pytest.approx(float(alpha * x0), abs=5 * float(sigma) / math.sqrt(n))
    assert float(x.std()) == pytest.approx(float(sigma), rel=5 / math.sqrt(2 * n) + 2e-3)


@kinds
def test_time_is_the_inverse_of_the_ratio_which_rises(kind: str) -> None:
    sde = sde_of(Config(sde=kind))
    t = torch.linspace(0.01, 1, 50, dtype=torch.float64)
    alpha, sigma = sde.kernel(t)
    torch.testing.assert_close(sde.time(sigma / alpha), t)
    assert ((sigma / alpha).diff() > 0).all()


@kinds
def test_drift_and_dispersion_are_the_kernel_s_derivatives(kind: str) -> None:
    """f = d log α / dt, g² = dσ² / dt − 2 f σ²."""
    sde = sde_of(Config(sde=kind))
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64, requires_grad=True)
    alpha, sigma = sde.kernel(t)
    f, g2 = sde.coefficients(t)
    if kind != "ve":
        (log_rate,) = torch.autograd.grad(alpha.log().sum(), t, retain_graph=True)
        torch.testing.assert_close(f, log_rate)
    (rate,) = torch.autograd.grad(sigma.square().sum(), t)
    torch.testing.assert_close(g2, rate - 2 * f * sigma.square())


# -------------------------------------------------------------------------------------------------------------- solvers


@kinds
@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2)])
def test_order_of_accuracy_of_the_probability_flow_ode(kind: str, solver: str, order: int) -> None:
    model = gaussian_model(kind)

    def error(steps: int) -> float:
        rows = in_float64(model.init([Draw(k, 0, steps, solver) for k in range(3)]))
        noise = rows.x.clone()
        return float((finish(model, rows).x - flow(model, noise, 1 - 1 / steps)).abs().max())

    assert math.log(error(80) / error(160), 2) == pytest.approx(order, abs=0.3)


@kinds
def test_an_adaptive_solver_s_error_follows_its_tolerance(kind: str) -> None:
    model = gaussian_model(kind)
    errors = []
    for steps in (8, 32, 128):
        rows = in_float64(model.init([Draw(1, 0, steps, "bogacki-shampine")]))
        there = flow(model, rows.x.clone(), 1.0)
        _, exact = model.field(there, torch.ones(1, dtype=torch.float64), unlabelled(there), torch.ones(1))
        errors.append(float((finish(model, rows).estimate - exact).abs().max()) * steps**2)
    assert max(errors) < 5
    assert errors[2] * 128**-2 < errors[0] * 8**-2 / 20


def moments(model: Model, ticks: Tensor, mean: Tensor, std: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of x after the ticks: the field is affine, so they follow recurrences."""
    variance = std**2

    def slope(x: float, s: Tensor) -> Tensor:
        point = torch.full((1, 1, 1, 1), x, dtype=torch.float64)
        return model.field(point, s.view(1), unlabelled(point), torch.ones(1))[0].squeeze()

    for tick in ticks:
        offset = slope(0.0, tick[TIME])
        gain = slope(1.0, tick[TIME]) - offset
        factor = tick[POINT] + tick[PREDICTION] * gain
        mean, variance = factor * mean + tick[PREDICTION] * offset, factor**2 * variance + tick[NOISE] ** 2
    return float(mean), float(variance.sqrt())


@kinds
def test_euler_maruyama_is_of_weak_order_one(kind: str) -> None:
    model = gaussian_model(kind)

    def error(steps: int) -> float:
        table = model.solver_table("euler-maruyama", steps)
        return abs(moments(model, table[:-1], *law(model, 0.0))[1] - float(law(model, 1 - 1 / steps)[1]))

    assert math.log(error(400) / error(800), 2) == pytest.approx(1, abs=0.25)


@kinds
def test_the_corrector_leads_a_wrong_law_to_the_right_one_up_to_the_size_of_its_step(kind: str) -> None:
    model, steps = gaussian_model(kind), 10
    corrector = model.solver_table("predictor-corrector", steps)[9]  # at the end of the fifth step
    assert float(corrector[TIME]) == pytest.approx(5 / steps)
    mean, std = law(model, 5 / steps)
    found = moments(model, corrector.expand(300, -1), mean + 0.3, 1.5 * std)
    assert found[0] == pytest.approx(float(mean), abs=1e-3)
    assert found[1] == pytest.approx(float(std), rel=0.02)


@kinds
def test_predictor_and_corrector_together_end_near_the_data(kind: str) -> None:
    model = gaussian_model(kind)
    mean, std = moments(model, model.solver_table("predictor-corrector", 400)[:-1], *law(model, 0.0))
    assert mean == pytest.approx(MEAN, abs=0.01)
    assert std == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("vp", solver) for solver in score_sde.SOLVERS] + [("sub-vp", "heun"), ("ve", "heun"), ("ve", "euler-maruyama")],
)
def test_samples_have_the_data_s_mean_and_variance(kind: str, solver: str) -> None:
    model = gaussian_model(kind)
    n, steps = (300, 300) if solver in ("euler", "euler-maruyama", "predictor-corrector") else (600, 30)
    rows = model.init([Draw(3, k, steps, solver) for k in range(n)])
    finished = []
    while len(rows.left):
        rows = model.step(rows)
        done, left = ((rows.left == 0).nonzero()[:, 0], (rows.left > 0).nonzero()[:, 0])
        if len(done):
            finished.append(model.image(_rows.take(rows, done)))
            rows = _rows.take(rows, left)
    x = 2 * torch.cat(finished) - 1
    assert len(x) == n
    assert float(x.mean()) == pytest.approx(MEAN, abs=5 * STD / math.sqrt(4 * n) + 0.005)
    assert float(x.std()) == pytest.approx(STD, rel=4 / math.sqrt(2 * 4 * n) + 0.03)


def test_ticks_are_what_the_spec_says() -> None:
    model = gaussian_model()
    for solver in score_sde.SOLVERS:
        if solver not in model.spec.adaptive:
            for steps in (1, 2, 7):
                assert len(model.solver_table(solver, steps)) == model.spec.ticks(steps, solver)
    with pytest.raises(ValueError, match="solver: 'leapfrog'"):
        model.solver_table("leapfrog", 5)


# ----------------------------------------------------------------------------------------------------------- likelihood


@kinds
def test_the_likelihood_of_gaussian_data_in_closed_form(kind: str) -> None:
    """Within 10⁻³ bits/dim. The model's prior is N(0, σ₁²), not quite what the data become: the exact flow, which is
    affine, takes it back to the image."""
    model = gaussian_model(kind, probes=0, score_steps=32)
    generator = torch.Generator().manual_seed(0)
    x = ((MEAN + STD * torch.randn(20, *SPACE.shape, generator=generator) + 1) / 2 * 255).round().clamp(0, 255) / 255
    score = model.log_prob(x)
    z, log_q = dequantised(x, _random.image_seed(x), *model.end)
    (m0, s0), (m1, s1) = law(model, 0.0), law(model, 1.0)
    noise = m0 + s0 / s1 * (z.double() - m1)
    density = torch.distributions.Normal(0.0, model.start).log_prob(noise) + (s0 / s1).log()
    expected = density.sum(dim=(1, 2, 3)) - log_q
    assert score.log_prob is not None
    difference = bits_per_dim(score.log_prob.double() - expected, SPACE.dims).abs()
    assert float(difference.max()) < 1e-3
    assert score.converged is not None
    assert score.converged.all()


# ------------------------------------------------------------------------------------------------------------- training


@kinds
def test_the_objective_s_velocity_leads_to_the_image_and_its_slope_is_the_sde_s_ode(kind: str) -> None:
    """dx/ds = (f x − ½ g² s) dt/ds, with the score −ε / σ of one image (eq. 13)."""
    model = Model(Config(sde=kind, **SMALL), SPACE)
    x0, noise = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    s = torch.linspace(0, 1, 5, dtype=torch.float64)
    ratio = model.way(s)[0][:, None, None, None]
    model._velocity = lambda *at: (noise - ratio * x0) / (1 + ratio**2).sqrt()  # type: ignore[method-assign]
    alpha, sigma = (part[:, None, None, None] for part in model.sde.kernel(model.sde.time(model.way(s)[0])))
    slope, estimate = model.field(alpha * x0 + sigma * noise, s, torch.full((5,), -1), torch.ones(5))
    torch.testing.assert_close(estimate, x0, rtol=1e-6, atol=1e-6)

    t = model.sde.time(model.way(s)[0])
    h = 1e-6
    dt_ds = (model.sde.time(model.way(s + h)[0]) - model.sde.time(model.way(s - h)[0])) / (2 * h)
    f, g2 = (part[:, None, None, None] for part in model.sde.coefficients(t))
    expected = (f * (alpha * x0 + sigma * noise) + 0.5 * g2 * noise / sigma) * dt_ds[:, None, None, None]
    torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"sde": "brownian"}, "sde"),
        ({"beta": (20.0, 0.1)}, "beta"),
        ({"sigma_max": 0.5}, "sigma_max"),
        ({"corrector_snr": 0.0}, "corrector_snr"),
        ({"default_steps": 1001}, "default_steps"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        Model(Config(**config), SPACE)
