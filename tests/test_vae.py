"""The VAE: likelihoods that sum to one, the closed-form KL, bounds that bound, and labels that can be left out."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import _random, _rows
from models._latents import Mixture, Normal
from models._likelihoods import LEVELS, Categorical, LogisticMixture, PixelLikelihood, pixel_likelihood
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from models.vae import MAP_DRAWS, PRIOR, SAMPLES_PER_STEP, Config, Model

SPACE = ImageSpace(8, 8, 1, labels=("a", "b", "c"))
TINY = Config(latent=3, width=8, blocks=1, hidden=16, prior_components=2, components=2, importance_samples=16)


def model(space: ImageSpace = SPACE, seed: int = 0, spread: float = 1.0, **changes: object) -> Model:
    """A tiny VAE whose every parameter is away from its start, so that nothing holds by a zero alone."""
    torch.manual_seed(seed)
    built = Model(dataclasses.replace(TINY, **changes), space).eval().requires_grad_(False)  # type: ignore[arg-type]
    for parameter in built.parameters():
        parameter.add_(0.05 * spread * torch.randn_like(parameter))
    return built


def images(n: int, space: ImageSpace = SPACE, seed: int = 0) -> Tensor:
    """Random images on the grid k / 255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, LEVELS, (n, *space.shape), generator=generator) / 255


def all_levels(channels: int = 1) -> Tensor:
    """(256, 1, 1, 1), or every image of one two-channel pixel."""
    levels = torch.arange(LEVELS) / 255
    return torch.cartesian_prod(*[levels] * channels).view(-1, channels, 1, 1)


def level_probabilities(likelihood: PixelLikelihood, params: Tensor) -> Tensor:
    """(256 or more,) probabilities of every image of one pixel; params (P,)."""
    x = all_levels(likelihood.channels)  # type: ignore[attr-defined]
    return likelihood.log_prob(params.view(1, -1, 1, 1).expand(len(x), -1, 1, 1), x).double().exp()[:, 0, 0]


# ---------------------------------------------------------------------------------------------------------- likelihoods


@settings(deadline=None, max_examples=100)
@given(data=st.data(), components=st.integers(1, 4))
def test_logistic_mixture_sums_to_one_for_any_parameters(data: st.DataObject, components: int) -> None:
    likelihood = LogisticMixture(1, components)
    numbers = st.floats(-50, 50, width=32)
    params = data.draw(st.lists(numbers, min_size=likelihood.parameters, max_size=likelihood.parameters))
    p = level_probabilities(likelihood, torch.tensor(params))
    assert p.isfinite().all()
    assert float(p.sum()) == pytest.approx(1, abs=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), scale=st.floats(0, 60))
def test_categorical_sums_to_one_for_any_parameters(seed: int, scale: float) -> None:
    likelihood = Categorical(1)
    params = scale * torch.randn(likelihood.parameters, generator=torch.Generator().manual_seed(seed))
    assert float(level_probabilities(likelihood, params).sum()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("likelihood", [LogisticMixture(2, 3), Categorical(2)])
def test_channels_of_a_pixel_sum_to_one_together(likelihood: PixelLikelihood) -> None:
    params = torch.randn(likelihood.parameters, generator=torch.Generator().manual_seed(1))
    assert float(level_probabilities(likelihood, params).sum()) == pytest.approx(1, abs=1e-4)


def test_channels_share_the_mixture_component() -> None:
    # Two components, one all black and one all white: a black-and-white pixel is next to impossible.
    params = torch.tensor([0.0, 0.0, -1.1, -1.1, 1.1, 1.1, -6.0, -6.0, -6.0, -6.0])
    p = level_probabilities(LogisticMixture(2, 2), params).view(LEVELS, LEVELS)
    assert float(p[0, 0]) == pytest.approx(0.5, abs=1e-3)
    assert float(p[0, 255] + p[255, 0]) < 1e-6


@pytest.mark.parametrize("log_scale", [-7.0, -4.0, -2.0, 0.0, 3.0])
def test_logistic_bins_are_differences_of_the_distribution_function(log_scale: float) -> None:
    mu, s = 0.3, math.exp(log_scale)
    edges = (torch.arange(LEVELS - 1, dtype=torch.float64) + 0.5) / 127.5 - 1
    below = torch.cat([torch.zeros(1), torch.sigmoid((edges - mu) / s), torch.ones(1)])
    p = level_probabilities(LogisticMixture(1, 1), torch.tensor([0.0, mu, log_scale]))
    torch.testing.assert_close(p, below.diff(), rtol=0, atol=1e-5)


def test_logistic_keeps_its_gradient_far_from_the_level() -> None:
    """Where the mass underflows, its logarithm still says which way to go."""
    params = torch.tensor([0.0, -1.0, -6.0]).view(1, 3, 1, 1).requires_grad_()
    log_prob = LogisticMixture(1, 1).log_prob(params, torch.full((1, 1, 1, 1), 200 / 255))
    (gradient,) = torch.autograd.grad(log_prob.sum(), params)
    assert -1000 < float(log_prob.detach()) < -100
    assert float(gradient[0, 1]) > 100


@pytest.mark.parametrize("likelihood", [LogisticMixture(1, 3), Categorical(1)])
@pytest.mark.parametrize("seed", range(3))
def test_mean_is_the_expected_level(likelihood: PixelLikelihood, seed: int) -> None:
    params = 1.5 * torch.randn(likelihood.parameters, generator=torch.Generator().manual_seed(seed))
    expected = (level_probabilities(likelihood, params) * torch.arange(LEVELS)).sum()
    assert float(likelihood.mean(params.view(1, -1, 1, 1))) * 255 == pytest.approx(float(expected), abs=0.5)


@pytest.mark.parametrize("likelihood", [LogisticMixture(1, 1), LogisticMixture(1, 3), Categorical(1)])
def test_draws_have_the_probabilities_that_log_prob_says(likelihood: PixelLikelihood) -> None:
    params = torch.randn(likelihood.parameters, generator=torch.Generator().manual_seed(2))
    side = 512  # a grid over the unit cube: the histogram is that of the distribution up to the grid's own coarseness
    axis = (torch.arange(side) + 0.5) / side
    uniforms = torch.cartesian_prod(*[axis] * likelihood.uniforms).view(-1, likelihood.uniforms, 1, 1)
    drawn = likelihood.draw(params.view(1, -1, 1, 1).expand(len(uniforms), -1, 1, 1), uniforms)
    frequencies = torch.bincount((drawn * 255).round().long().flatten(), minlength=LEVELS) / len(drawn)
    distance = 0.5 * (frequencies - level_probabilities(likelihood, params)).abs().sum()
    assert float(distance) < LEVELS / side / 2


def test_an_unknown_likelihood_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="likelihood: 'bernoulli'"):
        pixel_likelihood("bernoulli", 1, 1)


# ------------------------------------------------------------------------------------------------------------ gaussians


def normals(seed: int, rows: int = 4, dims: int = 3) -> Normal:
    generator = torch.Generator().manual_seed(seed)
    return Normal(torch.randn(rows, dims, generator=generator), 0.7 * torch.randn(rows, dims, generator=generator))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31))
def test_kl_is_the_closed_form(seed: int) -> None:
    q, p = normals(seed), normals(seed + 1)
    ours = torch.distributions.Normal(q.mean, q.log_std.exp()), torch.distributions.Normal(p.mean, p.log_std.exp())
    torch.testing.assert_close(q.kl(p), torch.distributions.kl_divergence(*ours).sum(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.log_prob(p.mean), ours[0].log_prob(p.mean).sum(dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(q.kl(q), torch.zeros(4), rtol=0, atol=1e-6)


def test_kl_is_what_monte_carlo_finds() -> None:
    q, p, n = normals(3), normals(4), 20_000
    z = q.expand(n).at(torch.randn(4, n, 3, generator=torch.Generator().manual_seed(5)))
    ratio = q.expand(n).log_prob(z) - p.expand(n).log_prob(z)
    error = (ratio.mean(dim=1) - q.kl(p)).abs()
    assert (error < 5 * ratio.std(dim=1) / math.sqrt(n)).all()


def mixtures(seed: int, components: int, rows: int = 4, dims: int = 3) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    mean, log_std = torch.randn(2, rows, components, dims, generator=generator)
    return Mixture(torch.randn(rows, components, generator=generator).log_softmax(dim=1), Normal(mean, 0.5 * log_std))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31), components=st.integers(1, 4))
def test_mixture_density_is_that_of_torch(seed: int, components: int) -> None:
    p, z = mixtures(seed, components), normals(seed + 1).expand(5).at(torch.randn(4, 5, 3))
    weights = torch.distributions.Categorical(logits=p.log_weight)
    parts = torch.distributions.Normal(p.components.mean, p.components.log_std.exp())
    theirs = torch.distributions.MixtureSameFamily(weights, torch.distributions.Independent(parts, 1))
    expected = theirs.log_prob(z.transpose(0, 1)).T
    torch.testing.assert_close(p.log_prob(z), expected, rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), components=st.integers(1, 4))
def test_kl_from_a_mixture_is_bounded_from_above(seed: int, components: int) -> None:
    q, p, n = normals(seed), mixtures(seed + 1, components), 4_000
    z = q.expand(n).at(torch.randn(4, n, 3, generator=torch.Generator().manual_seed(seed)))
    ratio = q.expand(n).log_prob(z) - p.log_prob(z)
    bound = p.kl_from(q)
    assert (bound > ratio.mean(dim=1) - 6 * ratio.std(dim=1) / math.sqrt(n)).all()
    assert (bound <= (q.expand(1).kl(p.components) - p.log_weight).min(dim=1).values + 1e-4).all()
    if components == 1:
        torch.testing.assert_close(bound, q.kl(Normal(*(part[:, 0] for part in p.components))))


def test_the_bound_on_the_kl_is_tight_where_q_is_narrow() -> None:
    p, n = mixtures(6, 3), 4_000
    q = Normal(torch.zeros(4, 3), torch.full((4, 3), -5.0))
    z = q.expand(n).at(torch.randn(4, n, 3, generator=torch.Generator().manual_seed(7)))
    estimate = (q.expand(n).log_prob(z) - p.log_prob(z)).mean(dim=1)
    torch.testing.assert_close(p.kl_from(q), estimate, rtol=0, atol=0.15)  # the noise of log q alone


def test_mixture_components_are_drawn_by_their_weights() -> None:
    n = 3_000
    one = Mixture(
        torch.tensor([[0.2, 0.5, 0.3]]).log(),
        Normal(torch.tensor([[[-20.0], [0.0], [20.0]]]), torch.zeros(1, 3, 1)),
    )
    p = Mixture(one.log_weight.expand(n, -1), Normal(*(part.expand(n, -1, -1) for part in one.components)))
    z = p.at(torch.randn(n, 1, generator=torch.Generator().manual_seed(8)), ((torch.arange(n) + 0.5) / n)[:, None])
    nearest = ((z + 30) / 20).floor().flatten()
    assert [int((nearest == k).sum()) for k in range(3)] == [600, 1500, 900]
    assert float((z.flatten() - 20 * (nearest - 1)).std()) == pytest.approx(1, abs=0.05)


# --------------------------------------------------------------------------------------------------------------- bounds


GRID = torch.linspace(-15, 15, 1001)
LOG_CELL = math.log(30 / 1000)


def exact_log_prob(vae: Model, x: Tensor, labels: Tensor, without: tuple[int, int] | None = None) -> Tensor:
    """(B,) log ∫ p(z | y) p(x | z, y) dz by quadrature over a one-dimensional z; of all pixels, or all but one."""
    values = []
    for image, label in zip(x.split(1), labels.split(1), strict=True):
        log_px = vae.likelihood.log_prob(
            vae.decode(GRID[:, None], label.expand(len(GRID))), image.expand(len(GRID), -1, -1, -1)
        )
        if without is not None:
            log_px[:, *without] = 0
        log_joint = log_px.sum(dim=(1, 2)) + vae.prior(label).log_prob(GRID[None, :, None])[0]
        values.append(log_joint.double().logsumexp(0) + LOG_CELL)
    return torch.stack(values)


def bounds(spread: float, *s: int) -> tuple[Tensor, list[Tensor], Tensor]:
    """A model with one latent dimension, where the integral over z is within reach: the exact log p(x), the bound at
    each S, and the ELBO, (24,) each."""
    space = ImageSpace(4, 4, 1, labels=("a", "b"))
    x, labels = images(24, space), torch.arange(24) % 3 - 1
    scores = [model(space, spread=spread, latent=1, importance_samples=n).log_prob(x, labels) for n in s]
    elbo = -(scores[-1].statistics["reconstruction_nats"] + scores[-1].statistics["kl_nats"])
    exact = exact_log_prob(model(space, spread=spread, latent=1), x, labels)
    return exact, [score.log_prob for score in scores if score.log_prob is not None], elbo


def test_bounds_climb_with_s_and_stay_below_the_truth() -> None:
    exact, weighted, elbo = bounds(6.0, 1, 4, 16, 512)  # an encoder far off, so that there is much to climb
    means = [float(values.mean()) for values in weighted]
    assert means == sorted(means)
    assert float(elbo.mean()) < means[1]
    assert means[-1] <= float(exact.mean())
    assert (elbo < exact).all()


def test_the_bound_reaches_the_truth_where_the_encoder_is_close() -> None:
    exact, (single, weighted), elbo = bounds(2.0, 1, 512)
    torch.testing.assert_close(weighted, exact, check_dtype=False, rtol=0, atol=0.1)
    assert (elbo < exact - 0.03).all(), "the toy must leave the ELBO a gap, or it tests nothing"
    assert float((single - exact).abs().max()) > 0.1


def test_one_sample_of_the_bound_is_an_elbo_on_average() -> None:
    x, labels = images(400), torch.zeros(400, dtype=torch.int64)
    single = model(importance_samples=1, spread=2.0, prior_components=1).log_prob(x, labels).log_prob
    many = model(importance_samples=64, spread=2.0, prior_components=1).log_prob(x, labels)
    elbo = -(many.statistics["reconstruction_nats"] + many.statistics["kl_nats"])
    assert single is not None
    assert many.log_prob is not None
    difference = single - elbo
    assert float(difference.mean().abs()) < 4 * float(difference.std()) / math.sqrt(len(x))
    assert float((many.log_prob - elbo).min()) > -0.5
    assert float((many.log_prob - elbo).mean()) > 0


def test_the_marginal_of_one_pixel_sums_out() -> None:
    """Σ over a pixel's 256 levels of p(x) is p of the other pixels: the whole model is a distribution."""
    space = ImageSpace(4, 4, 1)
    vae = model(space, latent=1, spread=4.0)
    x = images(1, space).expand(LEVELS, -1, -1, -1).clone()
    x[:, 0, 1, 2] = torch.arange(LEVELS) / 255
    none = torch.full((LEVELS,), UNLABELLED)
    total = exact_log_prob(vae, x, none).logsumexp(0)
    others = exact_log_prob(vae, x[:1], none[:1], without=(1, 2))
    assert float(total) == pytest.approx(float(others), abs=1e-3)


def test_samples_beyond_s_do_not_count() -> None:
    """S need not be a multiple of the samples per step: the noise of the first S is the same whatever S is."""
    s = SAMPLES_PER_STEP + 3
    vae, x = model(importance_samples=s), images(2)
    labels = torch.tensor([0, UNLABELLED])
    assert vae.spec.likelihood is not None
    assert vae.spec.likelihood.steps == 2
    rows = vae.score_init(x, labels)
    parts = []
    for n in (SAMPLES_PER_STEP, s):
        rows = vae.score_step(rows)
        parts.append(vae.score(rows))
        assert rows.drawn.tolist() == [n, n]
    first = model(importance_samples=SAMPLES_PER_STEP).log_prob(x, labels)
    torch.testing.assert_close(parts[0].log_prob, first.log_prob)
    assert not torch.equal(rows.log_w, vae.score_step(vae.score_init(x, labels)).log_w)


def test_a_score_depends_on_the_image_alone() -> None:
    """Alone, in a crowd, and joining one that is under way: the same number."""
    vae, x, labels = model(), images(5), torch.tensor([0, 1, 2, UNLABELLED, 0])
    together = vae.log_prob(x, labels)
    alone = vae.log_prob(x[3:4], labels[3:4])
    assert together.log_prob is not None
    torch.testing.assert_close(alone.log_prob, together.log_prob[3:4], rtol=1e-5, atol=1e-4)
    early = vae.score_step(vae.score_init(x[:3], labels[:3]))
    mixed = vae.score_step(_rows.cat([vae.score_init(x[3:], labels[3:]), early]))
    assert mixed.tick.tolist() == [1, 1, 2, 2, 2]
    torch.testing.assert_close(
        vae.score(_rows.take(mixed, [2, 3, 4])).log_prob, together.log_prob[:3], rtol=1e-5, atol=1e-4
    )
    twice = vae.log_prob(x, labels)
    torch.testing.assert_close(twice.log_prob, together.log_prob, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------- sampler and labels


def sample(vae: Model, *draws: Draw) -> Tensor:
    return vae.image(vae.step(vae.init(draws)))


def test_temperature_and_solver_are_columns_of_a_row() -> None:
    vae = model(spread=3.0)
    draws = [Draw(7, 0, 1, solver, label=1, temperature=t) for solver in ("mean", "draw") for t in (0.0, 0.5, 1.0)]
    crowd = sample(vae, *draws)
    for i, draw in enumerate(draws):
        assert torch.equal((sample(vae, draw) * 255).round(), (crowd[i : i + 1] * 255).round())
    assert len({image.numpy().tobytes() for image in crowd}) == len(draws)
    levels = crowd[3:] * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)


def test_at_temperature_zero_only_the_component_matters() -> None:
    vae = model(spread=3.0, prior_components=1)
    cold = sample(vae, *[Draw(seed, 0, 1, label=label, temperature=0.0) for label in (0, 1) for seed in (1, 2)])
    torch.testing.assert_close(cold[0], cold[1])
    torch.testing.assert_close(cold[2], cold[3])
    assert float((cold[0] - cold[2]).abs().max()) > 1e-3
    many = sample(model(spread=3.0), *[Draw(seed, 0, 1, label=1, temperature=0.0) for seed in range(20)])
    assert len({image.numpy().tobytes() for image in (many * 255).round()}) == TINY.prior_components


def test_the_mean_image_is_the_mean_of_draws() -> None:
    vae = model(spread=2.0)
    z, labels = torch.randn(1, 3, generator=torch.Generator().manual_seed(1)), torch.tensor([2])
    params = vae.decode(z, labels)
    uniforms = torch.rand(4000, vae.likelihood.uniforms, 8, 8, generator=torch.Generator().manual_seed(2))
    drawn = vae.likelihood.draw(params.expand(4000, -1, -1, -1), uniforms)
    error = (drawn.mean(dim=0) - vae.likelihood.mean(params)[0]).abs()
    assert (error < 5 * drawn.std(dim=0) / math.sqrt(4000) + 0.5 / 255).all()


def test_no_label_is_a_distribution_of_its_own() -> None:
    vae, x = model(spread=3.0), images(4)
    by_label = torch.stack([vae.log_prob(x, torch.full((4,), y)).log_prob for y in (UNLABELLED, 0, 1, 2)])
    assert (by_label.diff(dim=0).abs() > 1e-3).all()
    torch.testing.assert_close(vae.log_prob(x).log_prob, by_label[0])


def test_a_model_without_labels_has_no_embedding_and_one_prior() -> None:
    vae = model(ImageSpace(8, 8, 1))
    assert not [name for name in vae.state_dict() if "label" in name]
    assert vae.prior_mean.shape == (1, 2, 3)


def test_one_component_begins_as_the_standard_gaussian() -> None:
    prior = Model(dataclasses.replace(TINY, prior_components=1), SPACE).prior(torch.tensor([0, UNLABELLED]))
    z = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(1))
    standard = torch.distributions.Normal(0, 1).log_prob(z).sum(dim=2)
    torch.testing.assert_close(prior.log_prob(z), standard)


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_label_dropout_says_which_labels_are_learnt(dropout: float) -> None:
    vae = model(label_dropout=dropout).requires_grad_(True)
    ((_, loss, _),) = vae.objective(Batch(images(8), torch.tensor([0, 1] * 4), step=5, steps=10))
    loss.backward()
    for table in (vae.label_features.weight, vae.prior_logits, vae.prior_mean, vae.prior_log_std):
        assert table.grad is not None
        touched = table.grad.flatten(1).abs().sum(dim=1) > 0
        assert touched.tolist() == ([False, False, False, True] if dropout else [True, True, False, False])


def test_the_encoder_can_be_left_without_the_label() -> None:
    x, labels = images(2), torch.tensor([0, 1])
    blind, told = model(label_in_encoder=False), model()
    assert torch.equal(blind.encode(x, labels).mean, blind.encode(x, labels.flip(0)).mean)
    assert not torch.equal(told.encode(x, labels).mean, told.encode(x, labels.flip(0)).mean)


# ------------------------------------------------------------------------------------------------------------- training


def test_the_weight_of_the_kl_term_warms_up() -> None:
    vae, x, labels = model(kl_warmup=0.5), images(8), torch.zeros(8, dtype=torch.int64)
    bits = 1 / (64 * math.log(2))
    for step, weight in ((0, 0.02), (24, 0.5), (49, 1.0), (99, 1.0)):
        ((name, loss, metrics),) = vae.objective(Batch(x, labels, step=step, steps=100))
        assert name == "vae"
        expected = (metrics["reconstruction"] + weight * metrics["kl"]) * bits
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(metrics["bits_per_dim"], (metrics["reconstruction"] + metrics["kl"]) * bits)


def blobs(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Digits-like toy: a soft blob whose place is continuous and whose size is its label, with a little noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 3, (n,), generator=generator)
    centre = 2 + 3 * torch.rand(n, 2, 1, 1, generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))
    distance = (grid - centre).square().sum(dim=1)
    bright = torch.exp(-distance / (1 + 2 * labels[:, None, None])) + 0.02 * torch.rand(n, 8, 8, generator=generator)
    return (bright.clamp(0, 1) * 255).round()[:, None] / 255, labels


def test_a_few_steps_of_training_teach_it() -> None:
    torch.manual_seed(0)
    vae = Model(dataclasses.replace(TINY, latent=8, width=16, hidden=64), SPACE)
    (group,) = vae.groups().values()
    optimiser = torch.optim.Adam(group, lr=4e-3)
    held_out, labels = blobs(128, seed=1)
    with torch.no_grad():
        before = vae.log_prob(held_out, labels).log_prob
    x, y = blobs(2048, seed=2)
    steps = 200
    for step in range(steps):
        at = torch.randint(0, len(x), (32,))
        ((_, loss, _),) = vae.objective(Batch(x[at], y[at], step=step, steps=steps))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    vae.requires_grad_(False).eval()
    after = vae.log_prob(held_out, labels).log_prob
    assert before is not None
    assert after is not None
    assert float(after.mean()) > float(before.mean()) + 64 * math.log(2), "a bit per pixel"
    class_means = torch.stack([x[y == k].mean(dim=0) for k in range(3)])
    mean_image = (held_out - class_means[labels]).square().mean()
    reconstruction = (held_out - vae.reconstruct(held_out, labels)).square().mean()
    assert float(reconstruction) < 0.6 * float(mean_image), "z must carry what the label does not say"
    wrong = vae.log_prob(held_out, (labels + 1) % 3).log_prob
    assert wrong is not None
    assert float(after.mean()) > float(wrong.mean()), "the label is listened to"


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": 0}, "latent: 0"),
        ({"width": 7}, "width: 7"),
        ({"blocks": -1}, "blocks: -1"),
        ({"components": 0}, "components: 0"),
        ({"prior_components": 0}, "prior_components: 0"),
        ({"importance_samples": 0}, "importance_samples: 0"),
        ({"label_dropout": 1.5}, "label_dropout: 1.5"),
        ({"kl_warmup": -0.1}, "kl_warmup: -0.1"),
        ({"likelihood": "bernoulli"}, "likelihood: 'bernoulli'"),
    ],
)
def test_a_wrong_config_is_refused_by_field_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(dataclasses.replace(TINY, **change), SPACE)  # type: ignore[arg-type]


def test_an_image_that_cannot_be_halved_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="image: 10×8; width and height must be multiples of 4"):
        Model(TINY, ImageSpace(10, 8, 1))


@pytest.mark.parametrize("space", [ImageSpace(12, 8, 3), ImageSpace(28, 28, 1), ImageSpace(32, 32, 3, labels=("a",))])
@pytest.mark.parametrize("likelihood", ["logistic", "categorical"])
def test_other_sizes_and_colours_work(space: ImageSpace, likelihood: str) -> None:
    vae = model(space, likelihood=likelihood)
    x = images(2, space)
    score = vae.log_prob(x)
    assert score.log_prob is not None
    assert score.log_prob.shape == (2,)
    assert (score.log_prob < 0).all()
    assert vae.reconstruct(x, torch.full((2,), UNLABELLED)).shape == x.shape
    assert sample(vae, Draw(1, 0, 1), Draw(1, 1, 1, "draw")).shape == x.shape


@torch.inference_mode()
def test_what_a_pixel_costs_is_compared_with_what_it_was_expected_to_cost() -> None:
    """−log p less the entropy, here summed over all levels; there it is estimated from draws, without bias."""
    m, x = model(), images(40)
    labels = torch.full((40,), UNLABELLED)
    params = m.decode(m.code(x, labels), labels)
    each = torch.stack([m.likelihood.log_prob(params, torch.full_like(x, k / 255)) for k in range(LEVELS)])
    entropy = torch.special.entr(each.exp()).sum(dim=0)
    error = m.surprise(x, labels) - (-m.likelihood.log_prob(params, x) - entropy)
    assert abs(float(error.mean())) < 4 * float(error.std()) / math.sqrt(error.numel())
    variance = (each.exp() * each.square()).sum(dim=0) - entropy.square()  # of −log p
    assert float(error.std()) == pytest.approx(math.sqrt(float(variance.mean()) / MAP_DRAWS), rel=0.1)


@torch.inference_mode()
def test_the_statistics_are_means_over_importance_samples() -> None:
    m, x = model(importance_samples=8), images(3)
    found = m.log_prob(x).statistics
    rows = m.score_step(m.score_init(x, torch.full((3,), UNLABELLED)))
    torch.testing.assert_close(-rows.pixels.sum(dim=(1, 2)) / 8, found["reconstruction_nats"])
    noise = _random.normal(rows.seed, torch.zeros_like(rows.seed), 0, PRIOR, (8 * m.numbers,)).view(24, -1)
    code = m.infer(x, torch.full((3,), UNLABELLED), noise).code
    torch.testing.assert_close(code.view(3, 8, -1).square().mean(dim=(1, 2)), found["code_square"])
