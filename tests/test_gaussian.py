"""Gaussians and their mixtures: against SciPy's and scikit-learn's, and by what EM promises."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.decomposition import FactorAnalysis
from sklearn.mixture import GaussianMixture
from torch import Tensor

from models import _gaussians, _mixtures, gaussian
from models._gaussians import NOISE_VARIANCE, Full, Gaussians, LowRank
from models._protocol import Batch, Draw, ImageSpace, bits_per_dim, unlabelled
from models.gaussian import Config, Model

SPACE = ImageSpace(3, 2, 1, labels=("a", "b", "c"))
D = SPACE.dims


def images(n: int, seed: int = 0, space: ImageSpace = SPACE) -> Tensor:
    """(n, C, H, W) on the grid k / 255: correlated pixels around two centres."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(space.dims, space.dims, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(n, space.dims, generator=generator) @ mix * 12
    centre = torch.where(torch.rand(n, 1, generator=generator) < 0.4, 70.0, 170.0)
    return (noise + centre).round().clamp(0, 255).view(-1, *space.shape) / 255


def labels(n: int) -> Tensor:
    return torch.arange(n) % len(SPACE.labels)


def learnt(config: Config, x: Tensor, space: ImageSpace = SPACE) -> Model:
    torch.manual_seed(0)
    model = Model(config, space)
    with torch.no_grad():
        y = labels(len(x)) if config.by_class else unlabelled(x)
        model.prepare([Batch(x[i : i + 64], y[i : i + 64]) for i in range(0, len(x), 64)])
    return model.eval()


def levels(x: Tensor) -> np.ndarray:
    return (x * 255).round().double().flatten(1).numpy()


def covariances(g: Gaussians) -> np.ndarray:
    """(K, D, D) Σ, written out."""
    if isinstance(g, LowRank):
        return (g.W @ g.W.mT + torch.diag_embed(g.psi)).numpy()
    assert isinstance(g, Full)
    return torch.linalg.inv(g.A.mT @ g.A).numpy()


def random_gaussians(form: type[Gaussians], k: int = 3, rank: int = 2) -> Gaussians:
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    mean = 128 + 30 * noise(k, D)
    if form is LowRank:
        return LowRank(mean, 20 * noise(k, D, rank), noise(k, D).exp() + 1)
    return Full(mean, (noise(k, D, D) * 0.05).tril(-1) + torch.diag_embed(0.1 + noise(k, D).square()))


FORMS = pytest.mark.parametrize("form", [Full, LowRank])
CONFIGS = pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(components=3),
        Config(components=2, rank=2),
        Config(by_class=True),
        Config(components=2, rank=1, by_class=True),
    ],
    ids=["full", "full mixture", "low rank mixture", "full by class", "low rank by class"],
)


# -------------------------------------------------------------------------------------------------------------- density


@FORMS
def test_densities_are_scipys_less_what_the_noise_costs(form: type[Gaussians]) -> None:
    g = random_gaussians(form)
    y = g.sample(torch.arange(30) % 3, torch.randn(30, g.noise_dims, dtype=torch.float64))
    for k, covariance in enumerate(covariances(g)):
        density = stats.multivariate_normal(g.mean[k].numpy(), covariance)
        inverse = np.linalg.inv(covariance)
        np.testing.assert_allclose(g.log_det[k], np.linalg.slogdet(covariance)[1], rtol=1e-9)
        np.testing.assert_allclose(g.inverse_trace[k], np.trace(inverse), rtol=1e-9)
        expected = density.logpdf(y.numpy()) - np.trace(inverse) / 24
        np.testing.assert_allclose(g.log_density(y)[:, k], expected, rtol=1e-9)
        d = y.numpy() - g.mean[k].numpy()
        np.testing.assert_allclose(g.mahalanobis(y)[:, k], np.einsum("bi,ij,bj->b", d, inverse, d), rtol=1e-8)


@FORMS
def test_the_noise_is_averaged_over_and_not_drawn(form: type[Gaussians]) -> None:
    """E_u log N(k + u; μ, Σ), by 200,000 draws of u."""
    g = random_gaussians(form, k=1)
    y = torch.full((1, D), 100.5, dtype=torch.float64)
    u = torch.rand(200_000, D, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) - 0.5
    values = stats.multivariate_normal(g.mean[0].numpy(), covariances(g)[0]).logpdf((y + u).numpy())
    assert float(g.log_density(y)) == pytest.approx(values.mean(), abs=5 * values.std() / math.sqrt(len(values)))


@FORMS
def test_residuals_are_a_pixels_distance_from_what_all_others_let_expect(form: type[Gaussians]) -> None:
    g = random_gaussians(form)
    y = torch.randn(4, g.mean.shape[1], dtype=torch.float64) * 3 + 5
    found = g.residuals(y)
    for k, covariance in enumerate(covariances(g)):
        mean = g.mean[k].numpy()
        for i in range(len(mean)):
            rest = np.delete(np.arange(len(mean)), i)
            weights = np.linalg.solve(covariance[np.ix_(rest, rest)], covariance[rest, i])
            expected = mean[i] + (y.numpy()[:, rest] - mean[rest]) @ weights
            variance = covariance[i, i] - covariance[i, rest] @ weights
            np.testing.assert_allclose(found[:, k, i], (y[:, i].numpy() - expected) ** 2 / variance, rtol=1e-6)


def test_the_score_is_a_bound_on_the_mass_in_the_cells() -> None:
    """One pixel, whose masses are known exactly: the bound is below them, and near where the Gaussian is wide."""
    space = ImageSpace(1, 1, 1)
    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.normal(120, 9, 500).round().clip(0, 255)).float().view(-1, 1, 1, 1) / 255
    model = learnt(Config(), x, space)
    every = torch.arange(256).view(-1, 1, 1, 1) / 255
    score = model.log_prob(every).log_prob
    assert score is not None
    g = model.gaussians
    deviation = float(covariances(g)[0, 0, 0]) ** 0.5
    normal = stats.norm(float(g.mean), deviation)
    k = np.arange(256)
    near = np.abs(k - 120) < 30
    masses = np.log((normal.cdf(k + 1) - normal.cdf(k))[near])
    assert (score.numpy()[near] <= masses + 1e-6).all()
    np.testing.assert_allclose(score.numpy()[near], masses, atol=6e-3)
    assert float(score.exp().sum()) <= 1.0 + 1e-6


@CONFIGS
def test_log_prob_is_the_mixtures_and_pixels_and_statistics_are_parts_of_it(config: Config) -> None:
    x = images(300)
    model = learnt(config, x)
    g = model.gaussians
    score = model.log_prob(x[:20])
    weights = model.log_weights_given(unlabelled(x[:1]))[0].exp()
    assert float(weights.sum()) == pytest.approx(1)
    terms = [
        stats.multivariate_normal(g.mean[k].numpy(), c).logpdf(levels(x[:20]) + 0.5) - np.trace(np.linalg.inv(c)) / 24
        for k, c in enumerate(covariances(g))
    ]
    expected = np.log(sum(float(w) * np.exp(term) for w, term in zip(weights, terms, strict=True)))
    assert score.log_prob is not None
    np.testing.assert_allclose(score.log_prob, expected, rtol=1e-4)
    assert tuple(score.statistics) == model.statistic_names
    if len(g.mean) == 1:
        rest = float(g.log_det + D * math.log(2 * math.pi) + NOISE_VARIANCE * g.inverse_trace)
        np.testing.assert_allclose(score.statistics["mahalanobis"], -2 * expected - rest, rtol=1e-4)
    else:
        assert (score.statistics["entropy"] >= 0).all()
        assert (score.statistics["entropy"] <= math.log(len(g.mean)) + 1e-6).all()
    assert (score.per_pixel is None) == (config.rank is not None)


def test_pixel_terms_are_what_each_pixel_adds_to_those_before_it() -> None:
    """Of a mixture: differences of the log-densities of its marginals, which SciPy knows."""
    x = images(300)
    model = learnt(Config(components=3), x)
    score = model.log_prob(x[:5])
    g, weights = model.gaussians, model.log_weights_given(unlabelled(x[:1]))[0].exp()
    assert isinstance(g, Full)

    def upto(i: int) -> np.ndarray:
        total = np.zeros(5)
        for k, c in enumerate(covariances(g)):
            marginal = stats.multivariate_normal(g.mean[k, :i].numpy(), c[:i, :i])
            cost = np.trace(np.linalg.inv(c[:i, :i])) / 24
            total = total + float(weights[k]) * np.exp(marginal.logpdf(levels(x[:5])[:, :i] + 0.5) - cost)
        return np.log(total)

    assert score.per_pixel is not None
    found = score.per_pixel.flatten(1)
    np.testing.assert_allclose(found[:, 0], upto(1), rtol=1e-4)
    for i in range(1, D):
        np.testing.assert_allclose(found[:, i], upto(i + 1) - upto(i), rtol=1e-3, atol=1e-4)


def test_an_image_without_a_label_has_the_marginal_over_the_classes() -> None:
    x = images(200)
    model = learnt(Config(components=2, rank=1, by_class=True), x)
    given = torch.stack([model.log_prob(x[:9], torch.full((9,), c)).log_prob for c in range(3)])  # type: ignore[misc]
    prior = torch.tensor([67, 67, 66]) / 200
    marginal = model.log_prob(x[:9]).log_prob
    assert marginal is not None
    torch.testing.assert_close(marginal, (given + prior.log()[:, None]).logsumexp(dim=0))


def test_an_image_unlike_all_of_its_class_is_an_image_of_another() -> None:
    """A constant pixel leaves no tail; a share of labels that say nothing bounds what such an image costs."""
    x = torch.cat([torch.full((50, *SPACE.shape), grey / 255) for grey in (20, 120, 220)])
    y = torch.arange(3).repeat_interleave(50)

    def nats(label_noise: float) -> float:
        model = Model(Config(by_class=True, label_noise=label_noise), SPACE)
        with torch.no_grad():
            model.prepare([Batch(x, y)])
        score = model.log_prob(x[-1:], torch.tensor([0])).log_prob
        assert score is not None
        return float(score)

    own = 0.5 * D * math.log(12 / (2 * math.pi * math.e))  # ½ log(12 / 2πe) for each constant pixel
    assert nats(0.0) < -1e6
    assert nats(0.001) == pytest.approx(own + math.log(0.001 / 3), abs=1e-3)


def test_the_score_has_a_gradient_in_the_image() -> None:
    model = learnt(Config(), images(100))
    x = images(2, seed=5).requires_grad_()
    log_prob = model.evaluate(x, unlabelled(x)).log_prob
    assert log_prob is not None
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    g = model.gaussians
    y = x.detach().double().flatten(1) * 255 + 0.5
    expected = -255 * (y - g.mean) @ torch.from_numpy(np.linalg.inv(covariances(g)[0]))
    torch.testing.assert_close(gradient.flatten(1).double(), expected, rtol=1e-4, atol=1e-2)


# ------------------------------------------------------------------------------------------------------------- learning


def test_the_closed_form_is_the_datas_mean_and_covariance_whatever_the_batches() -> None:
    x = images(150)
    model = learnt(Config(), x)
    y = levels(x) + 0.5
    np.testing.assert_allclose(model.gaussians.mean[0], y.mean(axis=0), rtol=1e-6)
    expected = np.cov(y.T, bias=True) + np.eye(D) / 12
    np.testing.assert_allclose(covariances(model.gaussians)[0], expected, rtol=1e-4, atol=1e-2)


def test_constant_pixels_keep_the_variance_of_the_noise() -> None:
    x = torch.full((50, *SPACE.shape), 40 / 255)
    for config in (Config(), Config(components=2, rank=2), Config(components=2)):
        model = learnt(config, x)
        np.testing.assert_allclose(
            covariances(model.gaussians)[0], np.eye(D) / 12, rtol=1e-4, atol=1e-4, err_msg=str(config)
        )
        score = model.log_prob(x[:1]).log_prob
        assert score is not None
        # ½ log₂(2πe / 12): what the Gaussian form costs where the truth is a uniform cell
        assert float(bits_per_dim(score, D)) == pytest.approx(0.2546, abs=1e-3)


def fitted(form: type[Gaussians], y: Tensor, k: int, iterations: int = 200, tolerance: float = -1.0) -> gaussian.Fitted:
    torch.manual_seed(0)
    centres, nearest = gaussian.spread_out(y, k)
    member = torch.nn.functional.one_hot(nearest, k).double()
    if form is LowRank:
        start: Gaussians = LowRank.around(y, centres, nearest, 2)
    else:
        standard = Full.standard(k, y.shape[1], y.device)
        start = standard.maximised(standard.sums(y, member))
    parts = torch.split(y, 1000)
    return gaussian.expectation_maximisation(start, member.mean(dim=0), lambda: parts, iterations, tolerance)


@FORMS
def test_em_never_goes_down(form: type[Gaussians]) -> None:
    y = images(400).double().flatten(1) * 255 + 0.5
    history = fitted(form, y, 3, iterations=60).history
    steps = [after - before for before, after in itertools.pairwise(history)]
    assert len(history) == 60
    assert min(steps) > -1e-9
    assert history[-1] - history[0] > 0.03


@FORMS
def test_em_ends_where_it_no_longer_gains(form: type[Gaussians]) -> None:
    y = images(200).double().flatten(1) * 255 + 0.5
    history = fitted(form, y, 3, tolerance=1e-3).history
    assert 2 < len(history) < 200
    assert history[-1] - history[-2] < 1e-3 <= history[-2] - history[-3]


def test_em_recovers_a_known_mixture() -> None:
    rng = np.random.default_rng(0)
    means = np.array([[60.0, 60, 60, 60, 60, 60], [180, 60, 180, 60, 180, 60]])
    factors = rng.normal(0, 8, (2, D, 2))
    which = (rng.random(3000) < 0.3).astype(int)
    z, e = rng.normal(size=(3000, 2)), rng.normal(0, 3, (3000, D))
    y = means[which] + np.einsum("nij,nj->ni", factors[which], z) + e
    truth = factors @ factors.transpose(0, 2, 1) + 9 * np.eye(D)
    for form in (Full, LowRank):
        found = fitted(form, torch.from_numpy(np.floor(y) + 0.5), 2, tolerance=1e-5)
        order = found.weights.argsort(descending=True)
        np.testing.assert_allclose(found.weights[order], [0.7, 0.3], atol=0.03)
        np.testing.assert_allclose(found.gaussians.mean[order], means, atol=1.5)
        np.testing.assert_allclose(covariances(found.gaussians)[order.numpy()], truth, atol=0.15 * truth.max())


def test_the_mixture_of_full_covariances_is_scikit_learns() -> None:
    """scikit-learn's EM adds V to the diagonals too, but leaves the noise out of the responsibilities: with components
    far wider than a level that is no difference."""
    y = images(600).double().flatten(1) * 255 + 0.5
    mine = fitted(Full, y, 2, tolerance=1e-9)
    theirs = GaussianMixture(2, reg_covar=NOISE_VARIANCE, tol=1e-12, max_iter=500, means_init=mine.gaussians.mean)
    theirs.fit(y.numpy())
    np.testing.assert_allclose(mine.weights, theirs.weights_, atol=2e-3)
    joint = mine.weights.log() + mine.gaussians.log_density(y)
    np.testing.assert_allclose(joint.logsumexp(dim=1), theirs.score_samples(y.numpy()), rtol=1e-3)
    as_ours = torch.from_numpy(theirs.precisions_cholesky_).mT
    same = Full(torch.from_numpy(theirs.means_), as_ours)
    exact = same.log_density(y) + NOISE_VARIANCE / 2 * same.inverse_trace + torch.from_numpy(theirs.weights_).log()
    np.testing.assert_allclose(exact.logsumexp(dim=1), theirs.score_samples(y.numpy()), rtol=1e-6)


def test_a_single_low_rank_gaussian_is_scikit_learns_factor_analysis() -> None:
    rng = np.random.default_rng(3)
    y = 128 + rng.normal(size=(500, 2)) @ rng.normal(0, 15, (2, D)) + rng.normal(0, 1, (500, D)) * np.arange(4, 10)
    theirs = FactorAnalysis(2, tol=1e-7, max_iter=2000, svd_method="lapack").fit(y)
    mine = fitted(LowRank, torch.from_numpy(y), 1, iterations=600, tolerance=1e-7)
    np.testing.assert_allclose(
        covariances(mine.gaussians)[0], theirs.get_covariance() + np.eye(D) / 12, rtol=0.02, atol=1.0
    )
    np.testing.assert_allclose(mine.history[-1], theirs.score(y), rtol=1e-3)


def test_k_means_plus_plus_finds_clusters_that_are_apart() -> None:
    rng = np.random.default_rng(1)
    truth = np.array([[10.0, 10], [200, 10], [10, 200], [200, 200], [100, 100]])
    y = torch.from_numpy(np.repeat(truth, 40, axis=0) + rng.normal(0, 2, (200, 2)))
    torch.manual_seed(0)
    centres, nearest = gaussian.spread_out(y, 5)
    assert torch.bincount(nearest).tolist() == [40] * 5
    for centre in truth:
        assert (centres - torch.from_numpy(centre)).norm(dim=1).min() < 2


def test_more_components_than_different_images_do_no_harm() -> None:
    x = images(2).repeat(10, 1, 1, 1)
    for rank in (None, 2):
        model = learnt(Config(components=4, rank=rank), x)
        score = model.log_prob(x[:4])
        assert score.log_prob is not None
        assert score.log_prob.isfinite().all()
        assert all(value.isfinite().all() for value in score.statistics.values())


@pytest.mark.parametrize("changes", [{}, {"components": 2, "rank": 1}])
def test_a_model_by_class_needs_images_of_every_class(changes: dict[str, int]) -> None:
    model, x = Model(Config(by_class=True, **changes), SPACE), images(10)  # type: ignore[arg-type]
    with torch.no_grad(), pytest.raises(ValueError, match="by_class: class 2 has no image"):
        model.prepare([Batch(x, torch.arange(10) % 2)])
    with torch.no_grad(), pytest.raises(ValueError, match="by_class: some images have no label"):
        model.prepare([Batch(x, torch.arange(10) - 1)])


# ------------------------------------------------------------------------------------------------------------- sampling


def drawn(model: Model, n: int, temperature: float = 1.0, label: int = -1) -> np.ndarray:
    draws = [Draw(seed=3, sample=i, steps=1, temperature=temperature, label=label) for i in range(n)]
    with torch.inference_mode():
        return levels(model.image(model.step(model.init(draws))))


@pytest.mark.parametrize("config", [Config(), Config(components=1, rank=2)], ids=["full", "low rank"])
def test_samples_have_the_mean_and_the_covariance(config: Config) -> None:
    """To what 20,000 draws can tell, where clipping does not matter."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(D, D, generator=generator) * 6
    x = (torch.randn(500, D, generator=generator) @ mix + 128).round().clamp(0, 255).view(-1, *SPACE.shape) / 255
    model = learnt(config, x)
    samples = drawn(model, 20_000)
    truth, mean = covariances(model.gaussians)[0], model.gaussians.mean[0].numpy()
    deviation = np.sqrt(truth.diagonal())
    np.testing.assert_allclose((samples.mean(axis=0) + 0.5 - mean) / deviation, 0, atol=0.03)
    found = np.cov(samples.T)
    np.testing.assert_allclose(
        found / np.outer(deviation, deviation), truth / np.outer(deviation, deviation), atol=0.04
    )


def test_components_and_classes_are_drawn_by_their_weights() -> None:
    dark, light = torch.full((30, *SPACE.shape), 20 / 255), torch.full((90, *SPACE.shape), 220 / 255)
    x = torch.cat([dark, light])
    model = learnt(Config(components=2, rank=1), x)
    assert (drawn(model, 4000).mean(axis=1) < 128).mean() == pytest.approx(0.25, abs=0.03)
    by_class = Model(Config(by_class=True), SPACE)
    with torch.no_grad():
        by_class.prepare([Batch(x, torch.cat([torch.zeros(30), torch.ones(60), torch.full((30,), 2)]).long())])
    assert (drawn(by_class, 4000).mean(axis=1) < 128).mean() == pytest.approx(0.25, abs=0.03)
    assert (drawn(by_class, 300, label=0) < 128).all(axis=1).mean() > 0.98
    assert (drawn(by_class, 300, label=1) > 128).all(axis=1).mean() > 0.98


def test_temperature_scales_the_deviation_from_the_mean() -> None:
    model = learnt(Config(), images(300))
    mean = model.gaussians.mean[0].numpy()
    np.testing.assert_array_equal(drawn(model, 3, temperature=0.0), np.floor(mean)[None].repeat(3, axis=0))
    narrow, wide = (drawn(model, 2000, temperature=t).std(axis=0) for t in (0.2, 0.4))
    np.testing.assert_allclose(wide / narrow, 2, atol=0.1)


# -------------------------------------------------------------------------------------------------------- shared pieces


def test_labels_are_evidence_and_those_that_say_nothing_leave_the_prior() -> None:
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    found = _mixtures.given(prior, torch.tensor([-1, 2]))
    torch.testing.assert_close(found[0], prior)
    torch.testing.assert_close(found[1].exp(), torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    noisy = _mixtures.given(prior, torch.tensor([-1, 0, 1, 2]), noise=0.1).exp()
    torch.testing.assert_close(noisy[0], prior.exp())
    torch.testing.assert_close(noisy[1], torch.tensor([0.95, 0.03, 0.02], dtype=torch.float64))
    torch.testing.assert_close(prior.exp() @ noisy[1:], prior.exp())


def test_choices_are_quantiles_and_never_impossible() -> None:
    weights = torch.tensor([0.0, 0.25, 0.0, 0.75, 0.0]).log()
    u = (torch.arange(1000) + 0.5) / 1000
    chosen = _mixtures.choose(weights.expand(1000, -1), u)
    assert torch.bincount(chosen, minlength=5).tolist() == [0, 250, 0, 750, 0]
    ends = torch.tensor([2.0**-24, 1 - 2.0**-24])
    assert _mixtures.choose(weights.expand(2, -1), ends).tolist() == [1, 3]


def test_the_chain_rule_of_a_mixture_sums_to_its_density() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = -torch.rand(4, 3, 7, dtype=torch.float64, generator=generator)
    weights = torch.rand(4, 3, dtype=torch.float64, generator=generator).log_softmax(dim=1)
    parts = _mixtures.chain_rule(weights, terms)
    torch.testing.assert_close(parts.sum(dim=1), (weights + terms.sum(dim=2)).logsumexp(dim=1))
    alone = torch.tensor([[0.0, -torch.inf, -torch.inf]], dtype=torch.float64)
    torch.testing.assert_close(_mixtures.chain_rule(alone, terms[:1])[0], terms[0, 0])


def test_what_is_kept_of_a_covariance_gives_it_back() -> None:
    for form in (Full, LowRank):
        g = random_gaussians(form)
        again = form.from_parameters(g.mean, g.to_parameters())
        np.testing.assert_allclose(covariances(again), covariances(g), rtol=1e-12)
        shapes = form.parameters(3, D, 2)
        assert {name: tuple(value.shape) for name, value in g.to_parameters().items()} == shapes
        joined = _gaussians.concatenated([g, again])
        assert joined.mean.shape == (6, D)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"components": 0}, "components: 0"),
        ({"rank": 0}, "rank: 0"),
        ({"rank": 6}, "rank: 6 is not in 1 … 5"),
        ({"label_noise": 1.0}, "label_noise: 1.0"),
        ({"iterations": 0}, "iterations: 0"),
        ({"tolerance": -0.1}, "tolerance: -0.1"),
        ({"temperature": 2.0}, "temperature: 2.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(Config(**changes), SPACE)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="by_class"):
        Model(Config(by_class=True), ImageSpace(2, 2, 1))
