"""DDPM: its bound is the paper's, tight on Gaussian data, unbiased with few terms; guidance, schedule, objective."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence

from models import _random, _rows, _solvers, ddpm
from models._diffusion import PREDICTIONS, signal_and_noise, solver_table, target
from models._nn import UNet, guided
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace

SPACE = ImageSpace(width=8, height=8, channels=1, labels=("a", "b", "c"))
TINY = ddpm.Config(channels=8, multipliers=(1, 2), bound_steps=5)


def moved(space: ImageSpace = SPACE, **config: Any) -> ddpm.Model:
    """A tiny model whose weights have left their initialisation, where the output is zero."""
    torch.manual_seed(0)
    model = ddpm.Model(dataclasses.replace(TINY, **config), space)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def pictures(n: int, space: ImageSpace = SPACE, seed: int = 0) -> Tensor:
    """(n, C, H, W) on the grid k / 255, black and white among them."""
    levels = torch.randint(-40, 296, (n, *space.shape), generator=torch.Generator().manual_seed(seed))
    return levels.clamp(0, 255) / 255


def finish(model: ddpm.Model, draws: list[Draw]) -> Tensor:
    """Images of draws that all take as many steps."""
    rows = model.init(draws)
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    return model.image(rows)


# ------------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_the_schedule_goes_from_the_image_to_noise_and_keeps_the_variance(schedule: str, timesteps: int) -> None:
    alpha, sigma = signal_and_noise(schedule, timesteps)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    assert (alpha[0], sigma[0]) == (1, 0)
    assert (sigma.diff() > 0).all()
    assert alpha[-1] < 0.02


def test_the_schedules_are_the_papers() -> None:
    alpha, _ = signal_and_noise("linear", 1000)
    beta = 1 - (alpha[1:] / alpha[:-1]).square()
    torch.testing.assert_close(beta[[0, -1]], torch.tensor([1e-4, 0.02], dtype=torch.float64))
    torch.testing.assert_close(beta.diff().diff(), torch.zeros(998, dtype=torch.float64), rtol=0, atol=1e-9)
    alpha, _ = signal_and_noise("cosine", 1000)
    t = torch.arange(999, dtype=torch.float64) / 1000  # β_T is cut off at 0.999
    f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    torch.testing.assert_close(alpha[:999] ** 2, f / f[0])


@given(solver=st.sampled_from(ddpm.SOLVERS), steps=st.integers(1, 1000))
@settings(deadline=None, max_examples=40)
def test_any_number_of_steps_begins_in_pure_noise_and_ends_in_the_image(solver: str, steps: int) -> None:
    table = solver_table(solver, steps, *signal_and_noise("cosine", 1000))
    assert len(table) == steps
    assert table.isfinite().all()
    times = table[:, _solvers.TIME]
    assert times[0] == 1
    assert (times.diff() < 0).all()
    assert times[-1] == pytest.approx(1 / steps, abs=5.1e-4)
    assert table[-1, _solvers.POINT] == 0
    assert table[-1, _solvers.PREDICTION] == 1
    assert table[-1, _solvers.NOISE] == 0, "the last step is deterministic"
    assert (table[:, _solvers.NOISE] > 0).any() == (solver == "ancestral" and steps > 1)


# ----------------------------------------------------------------------------------------------------------- prediction


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_prediction_of_any_kind_gives_x0(prediction: str) -> None:
    model = moved(prediction=prediction)
    t = torch.tensor([1, 2, 500, 900])
    alpha, sigma = model.alpha[t].view(-1, 1, 1, 1), model.sigma[t].view(-1, 1, 1, 1)
    x0, noise = 2 * pictures(4) - 1, torch.randn(4, 1, 8, 8)
    x = alpha * x0 + sigma * noise
    torch.testing.assert_close(
        model._x0(target(prediction, x0, noise, alpha, sigma), x, alpha, sigma), x0, atol=1e-5, rtol=0
    )


def test_estimates_are_kept_in_the_data_s_range() -> None:
    far = torch.full((1, 1, 8, 8), 9.0)
    one = torch.ones(1, 1, 1, 1)
    assert float(moved(prediction="x0")._x0(far, far, one, one).max()) == 1
    assert float(moved(prediction="x0", clip=False)._x0(far, far, one, one).max()) == 9


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_timesteps_are_drawn_and_weighed_so_that_both_losses_keep_their_shares(prediction: str) -> None:
    """drawn · weight = (1 − share) · even + share · the bound's, whatever the drawing."""
    model = ddpm.Model(dataclasses.replace(TINY, prediction=prediction, bound_share=0.4), SPACE)
    simple = ddpm.Model(dataclasses.replace(TINY, prediction=prediction, bound_share=0.0), SPACE)
    assert model.drawn.sum() == pytest.approx(1)
    torch.testing.assert_close(simple.weight[1:], torch.ones(1000))
    torch.testing.assert_close(simple.drawn[1:], torch.full((1000,), 1e-3))
    bound = (model.drawn - 0.6e-3)[1:]  # how often t is drawn for the bound, where the loss is the squared error of ε
    snr = (model.alpha / model.sigma)[1:] ** 2
    squared = {"epsilon": 1, "x0": snr, "v": model.alpha[1:] ** 2}[prediction]
    torch.testing.assert_close((model.drawn * model.weight)[1:], 0.6e-3 + bound * squared, rtol=1e-3, atol=1e-7)


# ------------------------------------------------------------------------------------------------------------- guidance


def test_guidance_is_a_line_through_the_unconditional_and_the_conditional_model() -> None:
    model = moved()
    x, t = torch.randn(5, 1, 8, 8), torch.rand(5)
    labels = torch.tensor([0, 1, 2, 1, UNLABELLED])
    scale = torch.tensor([1.0, 0.0, 3.0, 1.5, 7.0])
    conditional, unconditional = model._evaluate(x, t, labels), model._evaluate(x, t, torch.full((5,), UNLABELLED))
    assert not torch.allclose(conditional[:4], unconditional[:4], atol=1e-3)
    expected = unconditional + scale.view(-1, 1, 1, 1) * (conditional - unconditional)
    torch.testing.assert_close(guided(model._evaluate, x, t, labels, scale), expected, atol=2e-5, rtol=1e-4)


def test_only_labelled_rows_with_a_scale_are_evaluated_twice() -> None:
    seen: list[list[int]] = []

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        seen.append(labels.tolist())
        return x

    x, labels = torch.randn(5, 1, 2, 2), torch.tensor([0, UNLABELLED, 2, 1, 1])
    guided(network, x, torch.rand(5), labels, torch.tensor([1.0, 3.0, 1.0, 2.0, 1.0]))
    guided(network, x, torch.rand(5), labels, torch.tensor([1.0, 3.0, 1.0, 1.0, 1.0]))
    assert seen == [[0, -1, 2, 1, 1, -1], [0, -1, 2, 1, 1]]


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 8])
def test_guidance_of_some_rows_makes_no_batch_of_a_size_that_was_not_tried(rows: int) -> None:
    """Models are tried with all rows guided, and with none: few rows come to no other sizes than those."""
    sizes: list[int] = []

    def network(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    for some in range(rows + 1):
        scale = torch.where(torch.arange(rows) < some, 2.0, 1.0)
        guided(network, torch.randn(rows, 1, 2, 2), torch.rand(rows), torch.zeros(rows, dtype=torch.int64), scale)
    assert set(sizes) <= ({rows, 2 * rows} if rows <= 4 else {8, 12, 16})


def test_a_model_without_labels_has_no_guidance_and_no_embedding() -> None:
    model = moved(ImageSpace(8, 8, 1))
    assert model.spec.guidance_scale is None
    assert "guidance_scale" not in model.spec.accepts()
    assert not any("label" in name for name in model.state_dict())
    assert finish(model, [Draw(1, 0, 3)]).shape == (1, 1, 8, 8)


@torch.inference_mode()
def test_guidance_means_nothing_without_a_label() -> None:
    model = moved()
    weak, strong = finish(model, [Draw(1, 0, 4, guidance_scale=g) for g in (1.0, 8.0)])
    assert torch.equal(weak, strong)


# -------------------------------------------------------------------------------------------------------------- sampler


@torch.inference_mode()
@pytest.mark.parametrize("solver", ddpm.SOLVERS)
def test_the_preview_at_the_end_is_where_the_solver_arrived(solver: str) -> None:
    model = moved()
    rows = model.init([Draw(3, 0, 5, solver=solver, label=1, guidance_scale=2.0)])
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    torch.testing.assert_close(model.image(rows), (rows.x.clamp(-1, 1) + 1) / 2)


@torch.inference_mode()
def test_the_solvers_agree_where_steps_are_many() -> None:
    """DDIM and DPM-Solver++ follow the same ODE; the ancestral sampler does not."""
    model = moved()
    ends = {s: finish(model, [Draw(5, 0, 120, solver=s, label=0)]) for s in ddpm.SOLVERS}
    near = (ends["ddim"] - ends["dpm-solver++"]).abs().mean()
    far = (ends["ddim"] - ends["ancestral"]).abs().mean()
    assert near < 0.2 * far


class GaussianNetwork(nn.Module):
    """The best network for pixels that are independent Gaussians: v = α E[ε | x] − σ E[x₀ | x], and its exact error."""

    def __init__(self, model: ddpm.Model, mean: float, std: float) -> None:
        super().__init__()
        self.where = nn.Parameter(torch.zeros(1))  # a model is where its weights are
        self.alpha, self.sigma, self.greatest = model.alpha, model.sigma, model.greatest_error
        self.mean, self.std = mean, std
        self.deepest = 1

    def with_middle(self, views: Tensor, time: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self(views, time, labels), views[:, : self.deepest]

    def forward(self, views: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        x = views[:, :1]
        t = (time * (len(self.alpha) - 1)).round().long()
        alpha, sigma = self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)
        x0 = self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (x - alpha * self.mean)
        v = (alpha * x - x0) / sigma
        snr = (alpha / sigma) ** 2
        error = snr * self.std**2 / (1 + snr * self.std**2)
        part = (error / self.greatest[t].view(-1, 1, 1, 1) - ddpm.MIN_ERROR) / (1 - ddpm.MIN_ERROR)
        return torch.cat([v, torch.logit(part).expand_as(v)], dim=1)


MEAN, STD = -0.1, 0.2


def gaussian_model(**config: Any) -> ddpm.Model:
    """A model that knows Gaussian data of this mean and standard deviation on [−1, 1] perfectly."""
    model = ddpm.Model(dataclasses.replace(TINY, clip=False, **config), ImageSpace(16, 16, 1)).requires_grad_(False)
    model.network = GaussianNetwork(model, MEAN, STD)  # type: ignore[assignment]
    return model


def gaussian_pictures(n: int) -> Tensor:
    x = MEAN + STD * torch.randn(n, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    return ((x + 1) / 2 * 255).round().clamp(0, 255) / 255


@torch.inference_mode()
@pytest.mark.parametrize(("solver", "steps"), [("ddim", 200), ("dpm-solver++", 40), ("ancestral", 400)])
def test_samples_of_gaussian_data_have_its_mean_and_variance(solver: str, steps: int) -> None:
    model = gaussian_model()
    x = 2 * finish(model, [Draw(k, 0, steps, solver=solver) for k in range(32)]) - 1
    n = x.numel()
    assert float(x.mean()) == pytest.approx(MEAN, abs=5 * STD / math.sqrt(n))
    assert float(x.std()) == pytest.approx(STD, rel=0.02 + 5 / math.sqrt(2 * n))


# ---------------------------------------------------------------------------------------------------------------- bound


@given(
    mean=st.floats(-1.5, 1.5),
    log_std=st.floats(-7, 2),
)
@settings(deadline=None, max_examples=60)
def test_the_decoder_is_a_distribution_over_the_levels(mean: float, log_std: float) -> None:
    levels = torch.arange(256) / 255 * 2 - 1
    log_p = ddpm.log_bin(levels, torch.tensor(mean), torch.tensor(math.exp(log_std)))
    assert not log_p.isnan().any()
    assert (log_p <= 0).all()
    assert float(log_p.double().exp().sum()) == pytest.approx(1, abs=1e-4)


def test_the_decoder_is_the_paper_s_integral() -> None:
    """Equation 13 of 2006.11239, by the normal distribution function in float64."""
    x = torch.tensor([0, 1, 100, 254, 255], dtype=torch.float64) / 255 * 2 - 1
    gauss = Normal(torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.4, dtype=torch.float64))
    upper = torch.where(x >= 1 - 1e-9, 1.0, gauss.cdf(x + 1 / 255))
    lower = torch.where(x <= -1 + 1e-9, 0.0, gauss.cdf(x - 1 / 255))
    seen = ddpm.log_bin(x.float(), torch.tensor(0.1), torch.tensor(0.4))
    torch.testing.assert_close(seen.double(), (upper - lower).log(), rtol=1e-3, atol=0)


def test_the_decoder_does_not_underflow_far_from_its_mean() -> None:
    log_p = ddpm.log_bin(torch.tensor([1.0, 0.0, -1.0]), torch.tensor([-1.0, 0.9, 1.0]), torch.tensor(0.005))
    assert log_p.isfinite().all()
    assert (log_p < -1000).all()


def naive_bound(model: ddpm.Model, x: Tensor, labels: Tensor) -> Tensor:
    """Equation 5 of 2006.11239 in float64, every Gaussian from its mean and variance, divergences by torch."""
    T = model.config.timesteps
    alpha, sigma = (part.double() for part in signal_and_noise(model.config.schedule, T))
    alpha_bar = alpha**2
    beta = 1 - torch.cat([torch.ones(1).double(), alpha_bar[1:] / alpha_bar[:-1]])
    x0 = 2 * x.double() - 1
    seed = _random.image_seed(x)
    one = torch.ones((), dtype=torch.float64)
    total = kl_divergence(Normal(alpha[T] * x0, sigma[T]), Normal(0 * one, one)).sum(dim=(1, 2, 3))
    for t in range(1, T + 1):
        noise = _random.normal(seed, torch.zeros_like(seed), t, ddpm.BOUND_NOISE, x.shape[1:])
        x_t = alpha[t] * x0 + sigma[t] * noise
        out = model._evaluate(x_t.float(), torch.full((len(x),), t / T), labels)
        estimate = model._x0(out[:, :1], x_t.float(), alpha[t].float(), sigma[t].float()).double()
        r = model._error(out, torch.full((len(x),), t)).double()
        if t == 1:
            std = (r * beta[1] / alpha_bar[1]).sqrt()
            low, high = (x0 - estimate - 1 / 255) / std, (x0 - estimate + 1 / 255) / std
            low, high = torch.where(x0 <= -1 + 1e-6, -math.inf, low), torch.where(x0 >= 1 - 1e-6, math.inf, high)
            upper_tail = Normal(0 * one, one).cdf(-low) - Normal(0 * one, one).cdf(
                -high
            )  # loses no digits above the mean
            lower_tail = Normal(0 * one, one).cdf(high) - Normal(0 * one, one).cdf(low)
            total = total - torch.where(low > 0, upper_tail, lower_tail).log().sum(dim=(1, 2, 3))
            continue
        before, now = alpha_bar[t - 1], alpha_bar[t]
        from_x0, from_x = before.sqrt() * beta[t] / (1 - now), (1 - beta[t]).sqrt() * (1 - before) / (1 - now)
        small = (1 - before) / (1 - now) * beta[t]
        large = beta[t] / (1 - beta[t])
        variance = small + r * (large - small)  # β̃ (1 + κ r)
        q = Normal(from_x0 * x0 + from_x * x_t, small.sqrt())
        p = Normal(from_x0 * estimate + from_x * x_t, variance.sqrt())
        total = total + kl_divergence(q, p).sum(dim=(1, 2, 3))
    return total


@torch.inference_mode()
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_as_a_denoiser_it_meets_its_own_timesteps_and_moves_smoothly_between_them(
    prediction: str, schedule: str
) -> None:
    model = moved(prediction=prediction, schedule=schedule, clip=False)
    T = model.config.timesteps
    t = torch.tensor([1, 2, 40, 500, 900, T - 1])
    alpha, sigma = (part[t].float() for part in signal_and_noise(schedule, T))
    x0, labels = 2 * pictures(6) - 1, torch.tensor([0, 1, 2, 0, 1, UNLABELLED])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    column = (6, 1, 1, 1)
    x = alpha.view(column) * x0 + sigma.view(column) * noise
    out = guided(model._evaluate, x, t / T, labels, torch.full((6,), 2.0))
    expected = model._x0(out[:, :1], x, alpha.view(column), sigma.view(column))
    ratio = sigma / alpha
    seen = model.denoised(x / alpha.view(column), ratio, labels, torch.full((6,), 2.0))
    torch.testing.assert_close(seen, expected, rtol=2e-3, atol=2e-3)
    between = model._time(torch.logspace(-5, 6, 10_000))
    assert (between.diff() >= 0).all()
    assert between[0] * T == pytest.approx(1, abs=1e-4)
    assert between[-1] == 1


@torch.inference_mode()
@pytest.mark.parametrize("variance", ["learned", "small", "large"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_full_bound_is_the_paper_s(variance: str, prediction: str) -> None:
    model = moved(timesteps=12, bound_steps=12, default_steps=5, variance=variance, prediction=prediction, clip=True)
    model.network.out.weight.mul_(0.1)  # estimates so bad that naive float64 underflows would say nothing
    x, labels = (pictures(3) * 0.2 + 0.4).mul(255).round() / 255, torch.tensor([0, 2, UNLABELLED])
    score = model.log_prob(x, labels)
    assert score.log_prob is not None
    assert score.per_pixel is not None
    torch.testing.assert_close(-score.log_prob.double(), naive_bound(model, x, labels), rtol=2e-4, atol=0)
    torch.testing.assert_close(score.per_pixel.sum(dim=(1, 2)), score.log_prob)


@given(
    sizes=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=30),
    data=st.data(),
)
@settings(deadline=None, max_examples=60)
def test_chances_are_in_proportion_but_one_at_most(sizes: list[float], data: st.DataObject) -> None:
    n = data.draw(st.integers(1, len(sizes)))
    size = torch.tensor(sizes, dtype=torch.float64)
    chosen = ddpm.inclusion(size, n)
    assert chosen.sum() == pytest.approx(n)
    assert (chosen <= 1).all()
    assert (chosen > 0).all()
    free = chosen < 1
    ratio = chosen[free] / size[free]
    assert ratio.numel() == 0 or ratio.max() == pytest.approx(float(ratio.min()))
    assert ratio.numel() == 0 or (size[~free] * ratio.max() >= 1 - 1e-9).all()


@torch.inference_mode()
def test_each_term_is_met_as_often_as_it_should_be_and_none_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over evenly spaced offsets, which is the mean over a uniform one."""
    model = moved(timesteps=40, default_steps=5, bound_steps=9)
    n = 2000
    even = ((torch.arange(n) + 0.5) / n)[:, None]
    monkeypatch.setattr(_random, "uniform", lambda *_: even)
    t = model.score_init(pictures(1).expand(n, -1, -1, -1), torch.zeros(n, dtype=torch.int64)).timesteps
    assert (t[:, 0] == 1).all()
    assert (t.diff(dim=1) > 0).all()
    met = Counter(t[:, 1:].flatten().tolist())
    assert sum(model.chosen.tolist()) == pytest.approx(8, rel=1e-5)
    for step in range(2, 41):
        assert met[step] / n == pytest.approx(float(model.chosen[step]), abs=2 / n)


@torch.inference_mode()
def test_the_bound_from_few_terms_is_unbiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mean over all offsets is the full bound: the noise belongs to the image and t, so nothing else is random."""
    few = moved(timesteps=20, default_steps=5, bound_steps=5)
    full = moved(timesteps=20, default_steps=5, bound_steps=20)
    n = 500
    x = pictures(1)
    even = ((torch.arange(n) + 0.5) / n)[:, None]
    exact = full.log_prob(x).log_prob
    monkeypatch.setattr(_random, "uniform", lambda *_: even)
    estimates = few.log_prob(x.expand(n, -1, -1, -1)).log_prob
    assert exact is not None
    assert estimates is not None
    assert float(estimates.std()) > 0
    torch.testing.assert_close(estimates.mean(), exact[0], rtol=2e-3, atol=0)


@torch.inference_mode()
def test_on_gaussian_data_the_bound_is_tight() -> None:
    """Every reverse step of Gaussian data is Gaussian: with a learned variance nothing is lost at any T."""
    model = gaussian_model(timesteps=30, default_steps=5, bound_steps=30)
    x = gaussian_pictures(64)
    bound = model.log_prob(x).log_prob
    assert bound is not None
    truth = ddpm.log_bin(2 * x - 1, torch.tensor(MEAN), torch.tensor(STD)).sum(dim=(1, 2, 3))
    gap = truth - bound
    standard_error = float(gap.std()) / math.sqrt(len(gap))
    assert abs(float(gap.mean())) < 4 * standard_error + 0.01 * 256
    assert standard_error < 0.02 * 256


@torch.inference_mode()
@pytest.mark.parametrize("variance", ["small", "large"])
def test_on_gaussian_data_the_paper_s_variances_stay_below_the_truth(variance: str) -> None:
    model = gaussian_model(timesteps=30, default_steps=5, bound_steps=30, variance=variance)
    x = gaussian_pictures(64)
    bound = model.log_prob(x).log_prob
    assert bound is not None
    truth = ddpm.log_bin(2 * x - 1, torch.tensor(MEAN), torch.tensor(STD)).sum(dim=(1, 2, 3))
    assert float((truth - bound).mean()) > 0.02 * 256


@torch.inference_mode()
def test_the_standard_error_covers_the_spread_of_the_estimates() -> None:
    """Over images of one distribution whose full bounds are known: not too small, and of the right size."""
    few = gaussian_model(timesteps=100, default_steps=5, bound_steps=9)
    full = gaussian_model(timesteps=100, default_steps=5, bound_steps=100)
    x = gaussian_pictures(48)
    estimate, exact = few.log_prob(x), full.log_prob(x)
    assert estimate.log_prob is not None
    assert estimate.stderr is not None
    assert exact.log_prob is not None
    error = float((estimate.log_prob - exact.log_prob).square().mean().sqrt())
    claimed = float(estimate.stderr.square().mean().sqrt())
    assert error < 1.5 * claimed
    assert claimed < 10 * error


def test_a_term_is_smallest_where_the_expected_error_is_the_actual_one() -> None:
    kappa, e2 = torch.tensor(1.3), torch.tensor(0.4)
    r = torch.linspace(0, 1, 1001)
    terms = ddpm.term(kappa, e2, r)
    assert float(r[terms.argmin()]) == pytest.approx(0.4, abs=1e-3)
    assert float(terms[0]) == pytest.approx(0.5 * 1.3 * 0.4), "½ (SNR_{t−1} − SNR_t) (x₀ − x̂₀)²"


@torch.inference_mode()
def test_scores_know_their_labels() -> None:
    model = moved()
    x = pictures(1).expand(3, -1, -1, -1)
    scores = model.log_prob(x, torch.tensor([0, 1, UNLABELLED])).log_prob
    assert scores is not None
    assert len(set(scores.tolist())) == 3


@torch.inference_mode()
def test_rows_of_a_score_at_different_ticks_share_a_batch() -> None:
    model = moved()
    x = pictures(3)
    early = model.score_init(x[:2], torch.tensor([0, 1]))
    for _ in range(2):
        early = model.score_step(early)
    rows = _rows.cat([early, model.score_init(x[2:], torch.tensor([2]))])
    for _ in range(3):
        rows = model.score_step(rows)
    late = _rows.take(rows, [2])
    while int(late.left.max()) > 0:
        late = model.score_step(late)
    early = _rows.take(rows, [0, 1])
    together = model.score(_rows.cat([early, late])).log_prob
    torch.testing.assert_close(together, model.log_prob(x, torch.tensor([0, 1, 2])).log_prob, rtol=1e-4, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------ objective


def losses(model: ddpm.Model, batch: Batch) -> Tensor:
    ((name, loss, metrics),) = model.objective(batch)
    assert name == "network"
    assert all(not value.requires_grad and value.dim() == 0 for value in metrics.values())
    return loss


def test_training_lowers_the_loss() -> None:
    torch.manual_seed(0)
    model = ddpm.Model(TINY, SPACE)
    batch = Batch(pictures(1).expand(32, -1, -1, -1), torch.zeros(32, dtype=torch.int64))
    optimiser = torch.optim.Adam(model.groups()["network"], lr=5e-3)
    history = []
    for _ in range(40):
        loss = losses(model, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        history.append(float(loss.detach()))
    assert sum(history[-5:]) < 0.75 * sum(history[:5])


def test_pixels_that_cannot_be_told_do_not_drive_the_variance_without_end() -> None:
    """Where the squared error is expected to exceed the greatest r, the cross-entropy alone has no minimum."""
    model = ddpm.Model(TINY, SPACE)
    batch = Batch(pictures(16), torch.arange(16) % 3)
    with torch.no_grad():
        model.network.out.bias[1] = 1e6  # type: ignore[index]
    loss = losses(model, batch)
    assert 0 < float(loss.detach()) < 10
    (gradient,) = torch.autograd.grad(loss, model.network.out.bias)  # type: ignore[arg-type]
    assert gradient[1] == 0


def test_labels_that_are_hidden_teach_the_null_label_alone() -> None:
    torch.manual_seed(0)
    model = ddpm.Model(dataclasses.replace(TINY, label_dropout=0.0), SPACE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    losses(model, Batch(pictures(6), torch.tensor([1, UNLABELLED] * 3))).backward()
    gradient = model.network.conditioning.label.weight.grad  # type: ignore[union-attr]
    assert (gradient.abs().sum(dim=1) > 0).tolist() == [False, True, False, True]
    hides = ddpm.Model(dataclasses.replace(TINY, label_dropout=0.5), SPACE)
    seen = []
    hides.network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    losses(hides, Batch(pictures(1).expand(1000, -1, -1, -1), torch.ones(1000, dtype=torch.int64)))
    assert 0.4 < float((seen[0] == UNLABELLED).float().mean()) < 0.6


def test_autocast_leaves_the_objective_finite_and_near() -> None:
    model = moved().requires_grad_(True)
    batch = Batch(pictures(16), torch.arange(16) % 3)
    torch.manual_seed(1)
    exact = float(losses(model, batch).detach())
    torch.manual_seed(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = losses(model, batch)
    assert rounded.dtype == torch.float32
    assert float(rounded.detach()) == pytest.approx(exact, rel=0.02)


# ---------------------------------------------------------------------------------------------------------------- U-Net


@pytest.mark.parametrize(("height", "width"), [(8, 8), (28, 28), (7, 5), (1, 9)])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_unet_takes_images_of_any_size(height: int, width: int, channels: int) -> None:
    net = UNet(channels, 2, 4, (1, 2, 3), blocks=2, attention=(1,), classes=2)
    out = net(torch.randn(2, channels, height, width), torch.rand(2), torch.tensor([0, -1]))
    assert out.shape == (2, 2, height, width)


def test_rows_of_the_unet_do_not_see_each_other() -> None:
    net = moved(attention=(0,)).network
    x = torch.randn(3, 5, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(net(x, torch.rand(3), torch.tensor([0, 1, -1]))[1].sum(), x)
    assert gradient[1].abs().min() > 0
    assert not gradient[[0, 2]].any()


@torch.inference_mode()
def test_what_becomes_of_a_row_does_not_depend_on_how_many_there_are() -> None:
    net = moved(channels=16).network
    x, t, labels = torch.randn(8, 5, 8, 8), torch.rand(8), torch.arange(8) % 4 - 1
    everything = net(x, t, labels)
    for n in range(1, 8):
        torch.testing.assert_close(net(x[:n], t[:n], labels[:n]), everything[:n], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"channels": 0}, "channels: 0"),
        ({"multipliers": ()}, "multipliers: "),
        ({"attention": (2,)}, "attention: .* 0 … 1"),
        ({"prediction": "noise"}, "prediction: 'noise'; there are epsilon, x0, v"),
        ({"schedule": "sigmoid"}, "schedule: 'sigmoid'; there are cosine, linear"),
        ({"variance": "fixed"}, "variance: 'fixed'; there are learned, small, large"),
        ({"label_dropout": 1.0}, "label_dropout: 1.0"),
        ({"detail_periods": (0.0,)}, "detail_periods: "),
        ({"guidance_scale": -1.0}, "guidance_scale: -1.0"),
        ({"default_steps": 1001}, "default_steps: 1001"),
        ({"bound_steps": 3}, "bound_steps: 3 is not in 4 … timesteps = 1000"),
        ({"timesteps": 0}, "timesteps: 0"),
    ],
)
def test_a_config_that_cannot_work_is_refused_by_name(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        ddpm.Model(dataclasses.replace(TINY, **wrong), SPACE)


def test_an_unknown_solver_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"solver: 'euler'; there are ddim, ancestral, dpm-solver\+\+"):
        moved().init([Draw(1, 0, 5, solver="euler")])
