"""Flow matching and what continuous flows share, on data whose velocity is known: solvers' order, the likelihood in
closed form, traces, dequantisation, pairs; and adaptive rows through the engine."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from models import _continuous_flow, _ode, _random, _rows, flow_matching
from models._assignment import least_cost_pairs
from models._continuous_flow import HALF_BIN, dequantised, probes, slope_and_products, views
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace, Rows, bits_per_dim, unlabelled
from service.engine import Engine
from service.messages import Completed, Generate, Message, Progress

SPACE = ImageSpace(width=2, height=2, channels=1)
MEAN, STD = 0.1, 0.25  # of the Gaussian data, on the scale [−1, 1]
SMALL: dict[str, Any] = {"channels": 4, "multipliers": (1,), "detail_periods": ()}


def gaussian_model(std: float = STD, **config: Any) -> flow_matching.Model:
    """A model whose network is exact for independent pixels of N(MEAN, std²)."""
    model = flow_matching.Model(flow_matching.Config(**(SMALL | config)), SPACE).eval().requires_grad_(False)
    least = model.config.sigma_min

    def velocity(x: Tensor, s: Tensor, labels: Tensor) -> Tensor:
        sigma = model._sigma(s)[:, None, None, None]
        t = model._t(sigma)
        whitened = (x - t * MEAN) / (t**2 * std**2 + sigma**2)
        return MEAN + t * std**2 * whitened - (1 - least) * sigma * whitened

    model._velocity = velocity  # type: ignore[method-assign]
    return model


def flow(model: flow_matching.Model, x: Tensor, s: Tensor) -> Tensor:
    """Where the exact ODE takes x from s = 0: each quantile stays a quantile."""
    sigma = model._sigma(s.double())
    t = model._t(sigma)
    return t * MEAN + (t**2 * STD**2 + sigma**2).sqrt() * x


def in_float64(rows: Rows) -> Any:
    return _rows._map(lambda part: part.double() if part.is_floating_point() else part, rows)


def solve(model: Any, solver: str, steps: int, n: int = 3) -> tuple[_ode.Trajectory, Tensor]:
    """Rows at the end, in float64, and the noise that they began with."""
    rows = in_float64(model.init([Draw(k, 0, steps, solver) for k in range(n)]))
    noise = rows.x.clone()
    while int(rows.left.max()) > 0:
        rows = _rows.take(rows, (rows.left > 0).nonzero()[:, 0]) if int(rows.left.min()) == 0 else rows
        rows = model.step(rows)
    return rows, noise


# -------------------------------------------------------------------------------------------------------------- solvers


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("midpoint", 3), ("heun", 2), ("rk4", 4)])
def test_order_of_accuracy(solver: str, order: int) -> None:
    """Of the way to the middle. Midpoint is of second order (`test_solvers`), but not for Gaussian data on a straight
    path: x less its mean is the root of a quadratic in t, for which the leading error, a multiple of
    x d³x/dt³ + 3 (dx/dt) d²x/dt², is zero."""
    model = gaussian_model()

    def error(steps: int) -> float:
        rows = in_float64(model.init([Draw(k, 0, steps, solver) for k in range(3)]))
        noise = rows.x.clone()
        for _ in range(steps // 2 * model.spec.evaluations.get(solver, 1)):
            rows = model.step(rows)
        return float((rows.x - flow(model, noise, torch.tensor(0.5))).abs().max())

    few, many = (10, 20) if order == 4 else (40, 80)
    assert math.log(error(few) / error(many), 2) == pytest.approx(order, abs=0.35)


@pytest.mark.parametrize("solver", flow_matching.SOLVERS)
def test_ticks_are_what_the_spec_says(solver: str) -> None:
    model = gaussian_model()
    rows, _ = solve(model, solver, 5, n=1)
    if solver in model.spec.adaptive:
        assert 1 < int(rows.tick[0]) < 3 * _ode.SHORTEST * 5
    else:
        assert int(rows.tick[0]) == model.spec.ticks(5, solver)


def test_an_adaptive_solver_s_error_follows_its_tolerance() -> None:
    """At N steps the tolerance is N⁻². The final estimate is compared with that of the exact end."""
    model = gaussian_model()
    errors, ticks = [], []
    for steps in (4, 8, 16, 32, 64):
        rows, noise = solve(model, "bogacki-shampine", steps, n=1)
        there = flow(model, noise, torch.tensor(1.0))
        _, exact = model.field(there, torch.ones(1, dtype=torch.float64), unlabelled(there), torch.ones(1))
        errors.append(float((rows.estimate - exact).abs().max()) * steps**2)
        ticks.append(int(rows.tick[0]))
    assert max(errors) < 2
    assert errors[-1] * 64**-2 < errors[0] * 4**-2 / 50
    assert ticks == sorted(set(ticks))
    assert ticks[-1] < model.spec.ticks(64, "bogacki-shampine"), "this field is smooth"


def test_an_adaptive_row_repeats_steps_that_were_too_long_and_no_step_is_shorter_than_allowed() -> None:
    """A field with a sudden turn at s = ½."""
    model = gaussian_model()
    begun: list[float] = []

    def field(x: Tensor, s: Tensor, labels: Tensor, guidance: Tensor) -> tuple[Tensor, Tensor]:
        slope = 1e3 * torch.exp(-((s - 0.5) ** 2) / 0.01)[:, None, None, None].expand_as(x)
        return slope, x

    model.field = field  # type: ignore[method-assign]
    rows = in_float64(model.init([Draw(0, 0, 10, "bogacki-shampine")]))
    start = rows.x.clone()
    while int(rows.left[0]):
        rows = model.step(rows)
        begun.append(float(rows.begun[0]))
        assert 0 <= float(rows.progress()[0]) <= 1
    accepted = sorted(set(begun))
    assert (len(begun) - 1) / 3 > len(accepted), "some were repeated"
    assert min(b - a for a, b in itertools.pairwise(accepted[:-1])) >= 1 / (10 * _ode.SHORTEST) * 0.99
    assert float((rows.estimate - start).mean()) == pytest.approx(1e3 * math.sqrt(math.pi * 0.01), rel=0.05)


def test_adaptive_rows_do_not_notice_their_batch_mates() -> None:
    model = gaussian_model()
    asked = [Draw(7, 0, 12, "bogacki-shampine"), Draw(8, 0, 30, "bogacki-shampine"), Draw(9, 1, 3, "rk4")]
    alone = []
    for draw in asked:
        rows = model.init([draw])
        while int(rows.left[0]):
            rows = model.step(rows)
        alone.append((rows.estimate[0], int(rows.tick[0])))
    rows, index = model.init(asked), list(range(3))
    while index:
        rows = model.step(rows)
        for i, left in enumerate(rows.left.tolist()):
            if left == 0:
                assert torch.equal(rows.estimate[i], alone[index[i]][0])
                assert int(rows.tick[i]) == alone[index[i]][1]
        keep = [i for i, left in enumerate(rows.left.tolist()) if left > 0]
        index, rows = [index[i] for i in keep], _rows.take(rows, keep)


@pytest.mark.parametrize("solver", flow_matching.SOLVERS)
def test_samples_have_the_data_s_mean_and_variance(solver: str) -> None:
    model = gaussian_model()
    n, steps = (200, 250) if solver == "euler" else (800, 16)
    rows = model.init([Draw(3, k, steps, solver) for k in range(n)])
    finished = []
    while len(rows.left):
        rows = model.step(rows)
        finished.append(model.image(_rows.take(rows, (rows.left == 0).nonzero()[:, 0])))
        rows = _rows.take(rows, (rows.left > 0).nonzero()[:, 0])
    x = 2 * torch.cat(finished) - 1
    assert len(x) == n
    assert float(x.mean()) == pytest.approx(MEAN, abs=5 * STD / math.sqrt(4 * n))
    assert float(x.std()) == pytest.approx(STD, rel=4 / math.sqrt(2 * 4 * n) + 0.015)


# ----------------------------------------------------------------------------------------------------------- likelihood


def grid(n: int, space: ImageSpace = SPACE) -> Tensor:
    """Images of the Gaussian data, in 8 bits."""
    x = MEAN + STD * torch.randn(n, *space.shape, generator=torch.Generator().manual_seed(0))
    return ((x.clamp(-1, 1) + 1) / 2 * 255).round() / 255


@pytest.mark.parametrize("n_probes", [0, 2])
def test_the_likelihood_of_gaussian_data_in_closed_form(n_probes: int) -> None:
    """Within 10⁻³ bits/dim; random probes are exact too where pixels are independent."""
    model, x = gaussian_model(probes=n_probes), grid(20)
    score = model.log_prob(x)
    z, log_q = dequantised(x, _random.image_seed(x), *model.end)
    density = torch.distributions.Normal(MEAN, math.hypot(STD, model.config.sigma_min))
    expected = density.log_prob(z.double()).sum(dim=(1, 2, 3)) - log_q
    assert score.log_prob is not None
    difference = bits_per_dim(score.log_prob.double() - expected, SPACE.dims).abs()
    assert float(difference.max()) < 1e-3
    assert score.converged is not None
    assert score.converged.all()


def test_the_likelihood_is_nearly_the_probability_of_the_levels() -> None:
    """A bound of the mass in the bins in expectation, and not far below it."""
    model, x = gaussian_model(probes=0), grid(200)
    centre = 2 * x.double() - 1
    normal = torch.distributions.Normal(MEAN, STD)
    mass = (normal.cdf(centre + HALF_BIN) - normal.cdf(centre - HALF_BIN)).log().sum(dim=(1, 2, 3))
    log_prob = model.log_prob(x).log_prob
    assert log_prob is not None
    gap = float(bits_per_dim(log_prob - mass, SPACE.dims).mean())
    assert gap == pytest.approx(0.099, abs=0.04), "what the normal in place of a flat density loses"


def test_too_few_steps_do_not_converge_and_say_so() -> None:
    x = grid(4)
    narrow = gaussian_model(std=0.002, score_steps=2, probes=0).log_prob(
        (x * 0 + (1 + MEAN) / 2).mul(255).round() / 255
    )
    assert narrow.converged is not None
    assert not narrow.converged.any()
    enough = gaussian_model(std=0.1, score_steps=32, probes=0).log_prob(x).converged
    assert enough is not None
    assert enough.all()


def test_a_probability_above_one_has_not_converged() -> None:
    model = gaussian_model(probes=0)
    model.field = lambda x, s, labels, guidance: (20 * x, x)  # type: ignore[method-assign]
    model.start = 1e-9
    score = model.log_prob(grid(2))
    assert score.log_prob is not None
    assert score.converged is not None
    assert (score.log_prob > 0).any() or not score.converged.any()
    assert not score.converged[score.log_prob > 0].any()


@pytest.fixture(scope="module")
def trained_a_little() -> flow_matching.Model:
    """A network with a Jacobian of its own."""
    torch.manual_seed(1)
    space = ImageSpace(width=4, height=4, channels=1, labels=("a", "b"))
    config = flow_matching.Config(channels=8, multipliers=(1, 2), detail_periods=(64.0,), score_steps=4, probes=4)
    model = flow_matching.Model(config, space)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def test_hutchinson_is_unbiased_against_the_exact_trace_and_its_standard_error_is_right(
    trained_a_little: flow_matching.Model,
) -> None:
    model, n = trained_a_little, 160
    x = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255

    def whole_way(rows: _continuous_flow.LikelihoodRows) -> _continuous_flow.LikelihoodRows:
        while int(rows.left.max()) > 0:
            rows = model.score_step(rows)
        return rows

    rows = _rows.take(model.score_init(x, torch.tensor([1])), [0] * n)
    rows.seed = torch.arange(n)  # the same point, probes of their own
    estimated = whole_way(rows)
    model.probes = 0
    exact = whole_way(model.score_init(x, torch.tensor([1])))
    model.probes = 4
    spread = float(estimated.log_det.std())
    assert spread > 0
    assert float(estimated.log_det.mean() - exact.log_det) == pytest.approx(0, abs=4 * spread / math.sqrt(n))
    assert float(estimated.variance.mean().sqrt()) == pytest.approx(spread, rel=0.2)


def test_the_exact_trace_is_autograd_s() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 4))
    layer = layer.double().requires_grad_(False)
    x = torch.randn(3, 1, 2, 2, dtype=torch.float64)
    vectors = probes(torch.arange(3), torch.zeros(3, dtype=torch.int64), (1, 2, 2), 0).double()
    slope, products = slope_and_products(lambda x, s, y: layer(x).view_as(x), x, torch.zeros(3), unlabelled(x), vectors)
    torch.testing.assert_close(slope, layer(x).view_as(x))
    for k in range(3):
        jacobian = torch.autograd.functional.jacobian(layer, x[k : k + 1]).view(4, 4)
        torch.testing.assert_close(products.mean(dim=0)[k], jacobian.trace())


def test_dequantisation_stays_in_the_bin_and_its_density_is_one() -> None:
    """E_q[1 / q] is the volume of where q lies: the bin."""
    x = torch.full((4000, 1, 1, 1), 100 / 255)
    alpha, sigma = 0.9, 0.002
    z, log_q = dequantised(x, torch.arange(4000), alpha, sigma)
    assert ((z / alpha - (2 * x - 1)).abs() <= HALF_BIN * 1.0001).all()
    outer, _ = dequantised(torch.zeros(4000, 1, 1, 1), torch.arange(4000), alpha, sigma)
    assert ((outer / alpha + 1) <= HALF_BIN * 1.0001).all()
    assert ((outer / alpha + 1) < -HALF_BIN * 1.0001).any(), "the outermost bins are open"
    volume = torch.exp(-log_q).mean()
    assert float(volume) == pytest.approx(2 * alpha * HALF_BIN, rel=0.05)


def test_probes_have_unit_covariance_and_are_those_of_their_seed() -> None:
    seeds, which = torch.arange(2000), torch.zeros(2000, dtype=torch.int64)
    v = probes(seeds, which, (1, 2, 2), 2)
    flat = v.flatten(2)
    covariance = torch.einsum("pbi,pbj->ij", flat, flat) / 4000
    torch.testing.assert_close(covariance, torch.eye(4), rtol=0, atol=0.1)
    assert torch.equal(probes(seeds[5:6], which[5:6], (1, 2, 2), 2), v[:, 5:6])
    assert not torch.equal(probes(seeds, which + 1, (1, 2, 2), 2), v)


def test_sines_fade_as_their_mean_over_the_noise() -> None:
    x, rho = torch.full((200_000, 1, 1, 1), 0.3), 0.02
    noisy = x + rho * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    clean = torch.zeros(len(x))
    shown = views(x, torch.ones(len(x)), clean + rho, (64.0,))[0, :, 0, 0]
    mean = views(noisy, torch.ones(len(x)), clean, (64.0,)).mean(dim=0)[:, 0, 0]
    torch.testing.assert_close(shown, mean, rtol=0, atol=0.01)


# ------------------------------------------------------------------------------------------------------------- training


def test_the_objective_s_velocity_is_the_path_s_and_leads_to_the_image() -> None:
    model = flow_matching.Model(flow_matching.Config(**SMALL), SPACE)
    least = model.config.sigma_min
    image, noise = torch.randn(2, 5, 1, 2, 2, dtype=torch.float64)
    s = torch.linspace(0, 1, 5, dtype=torch.float64)
    velocity = image - (1 - least) * noise

    def x(s: Tensor) -> Tensor:
        sigma = model._sigma(s)[:, None, None, None]
        return model._t(sigma) * image + sigma * noise

    torch.testing.assert_close(model._image(x(s), velocity, model._sigma(s)), image)
    torch.testing.assert_close(model.back(model.way(s)[0]), s)
    model._velocity = lambda *at: velocity  # type: ignore[method-assign]
    slope, _ = model.field(x(s), s, torch.full((5,), -1), torch.ones(5))
    h = 1e-6
    torch.testing.assert_close(slope, (x(s + h) - x(s - h)) / (2 * h), rtol=1e-6, atol=1e-6)


def test_the_denoiser_is_the_field_s_estimate_at_the_same_noise(trained_a_little: flow_matching.Model) -> None:
    model = trained_a_little
    s = torch.tensor([0.2, 0.5, 0.9, 1.0])
    sigma = model._sigma(s)
    t = model._t(sigma)
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    labels, guidance = torch.tensor([0, 1, -1, 1]), torch.tensor([1.0, 2.0, 1.0, 0.5])
    _, estimate = model.field(x, s, labels, guidance)
    denoised = model.denoised(x / t[:, None, None, None], sigma / t, labels, guidance)
    torch.testing.assert_close(denoised, estimate, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("n", [2, 3, 6])
def test_pairs_are_those_of_least_cost(n: int) -> None:
    for seed in range(10):
        cost = torch.rand(n, n, generator=torch.Generator().manual_seed(seed))
        pairs = least_cost_pairs(cost)
        assert sorted(pairs.tolist()) == list(range(n))
        total = float(cost[torch.arange(n), pairs].sum())
        best = min(sum(float(cost[i, j]) for i, j in enumerate(p)) for p in itertools.permutations(range(n)))
        assert total <= best + n * 0.01 * float(cost.std()) + 1e-6


def test_pairs_of_many_and_of_equal_ones() -> None:
    cost = torch.rand(64, 64, generator=torch.Generator().manual_seed(0))
    pairs = least_cost_pairs(cost)
    assert sorted(pairs.tolist()) == list(range(64))
    assert float(cost[torch.arange(64), pairs].mean()) < 0.05
    assert sorted(least_cost_pairs(torch.ones(5, 5)).tolist()) == list(range(5))
    assert least_cost_pairs(torch.ones(1, 1)).tolist() == [0]


def test_optimal_transport_pairs_within_a_class_and_shortens_the_way() -> None:
    torch.manual_seed(0)
    image, noise, labels = torch.rand(30, 1, 2, 2), torch.randn(30, 1, 2, 2), torch.arange(30) % 3
    pairs = flow_matching.Model._pairs(image, noise, labels)
    assert sorted(pairs.tolist()) == list(range(30))
    assert torch.equal(labels[pairs], labels)
    assert float((image - noise[pairs]).square().sum()) < float((image - noise).square().sum())
    model = flow_matching.Model(flow_matching.Config(**SMALL, coupling="optimal transport"), SPACE)
    _, loss, _ = next(model.objective(Batch(image, torch.full((30,), UNLABELLED))))
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"coupling": "greedy"}, "coupling"),
        ({"sigma_min": 0.0}, "sigma_min"),
        ({"sigma_min": 0.1}, "sigma_min"),
        ({"score_steps": 5}, "score_steps"),
        ({"probes": 1}, "probes"),
        ({"default_steps": 251}, "default_steps"),
        ({"low_noise_share": 1.0}, "low_noise_share"),
        ({"multipliers": ()}, "multipliers"),
        ({"attention": (3,)}, "attention"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"detail_periods": (0.0,)}, "detail_periods"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(config: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"^{named}: "):
        flow_matching.Model(flow_matching.Config(**config), SPACE)


# -------------------------------------------------------------------------------------------------------------- serving


def serve(
    model: flow_matching.Model, tasks: dict[str, Generate], warmed_up: Callable[[], object] = lambda: None
) -> dict[str, list[Message]]:
    """What is told of each task. `warmed_up` is called before the first: how much warming up takes is chance."""
    told: dict[str, list[Message]] = {}
    engine = Engine(lambda job, message, final: told.setdefault(job, []).append(message), max_rows=8)
    engine.put("m", "1", model)
    warmed_up()
    for job, task in tasks.items():
        engine.submit(job, "m", task)
    while engine.step():
        pass
    return told


def counted(model: flow_matching.Model) -> Callable[[], int]:
    """Evaluations of the field per row since, in a batch that is never filled up."""
    field, count = model.field, [0]

    def counting(x: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        count[0] += 1
        return field(x, *rest)

    model.field = counting  # type: ignore[method-assign]
    return lambda: count[0]


def test_network_evaluations_of_adaptive_rows_are_those_that_were_taken() -> None:
    model = gaussian_model()
    told = serve(model, {"a": Generate(1, 0, 20, "bogacki-shampine"), "b": Generate(2, 5, 7, "rk4")})
    completed = {job: messages[-1] for job, messages in told.items()}
    assert isinstance(completed["a"], Completed)
    assert isinstance(completed["b"], Completed)
    assert completed["b"].network_evaluations == 2 * model.spec.ticks(7, "rk4") == 2 * 25
    evaluations, before = counted(model), []
    serve(model, {"a": Generate(1, 0, 20, "bogacki-shampine")}, warmed_up=lambda: before.append(evaluations()))
    assert evaluations() - before[0] == completed["a"].network_evaluations


def test_progress_of_an_adaptive_job_rises_to_its_steps() -> None:
    told = serve(gaussian_model(), {"a": Generate(2, 0, 20, "bogacki-shampine", preview_every=2)})["a"]
    steps = [m.step for m in told if isinstance(m, Progress)]
    assert steps == sorted(set(steps))
    assert len(steps) > 4
    assert steps[0] > 0
    assert steps[-1] <= 20
