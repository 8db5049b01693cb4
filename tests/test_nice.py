"""NICE: volumes that additive couplings keep, the diagonal scale, both priors, and the constants of the 8-bit grid."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from flow_toys import DIGIT, grey, images, jacobian, jacobian_log_det, noise, perturbed
from torch import Tensor

from models import _random
from models._flow_model import (
    GAUSSIAN,
    LEVELS,
    LOGISTIC,
    dequantise,
    discrete_log_prob,
    gaussian_log_prob,
    logistic_log_prob,
    quantise,
)
from models._flows import (
    AdditiveCoupling,
    Bijection,
    Chain,
    CouplingNetwork,
    DenseNetwork,
    DiagonalScale,
    Invertible1x1,
    Logit,
)
from models._protocol import Batch, Draw, ImageSpace, bits_per_dim, unlabelled
from models.nice import Config, Model

TINY = Config(couplings=("convolutional", "dense", "dense"), units=6, hidden=1, channels=6, logit_alpha=0.05)
BOTH = pytest.mark.parametrize("prior", ["logistic", "gaussian"])


def tiny(config: Config = TINY, space: ImageSpace = DIGIT, by: float = 0.2) -> Model:
    torch.manual_seed(0)
    return perturbed(Model(config, space), by)


# --------------------------------------------------------------------------------------------------------------- layers

LAYERS: dict[str, Callable[[], Bijection]] = {
    "dense": lambda: AdditiveCoupling(DenseNetwork((2, 2, 4), 5, 2)),
    "convolutional": lambda: AdditiveCoupling(CouplingNetwork(2, 2, 5)),
    "scale": lambda: DiagonalScale((4, 2, 4)),
    "chain": lambda: Chain([AdditiveCoupling(DenseNetwork((2, 2, 4), 5, 1)), DiagonalScale((4, 2, 4))]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_inverts_and_its_log_det_is_autograds(name: str) -> None:
    torch.manual_seed(1)
    layer = perturbed(LAYERS[name]())
    x = noise(2, 4, 2, 4)
    z, log_det = layer(x)
    assert z.dtype == log_det.dtype == torch.float64
    torch.testing.assert_close(layer.inverse(z), x, rtol=0, atol=1e-12)
    for i in range(2):
        expected = jacobian_log_det(lambda v: layer(v)[0], x[i : i + 1])
        assert float(log_det[i]) == pytest.approx(expected, abs=1e-9)


def test_additive_coupling_keeps_volumes_passes_one_half_and_starts_as_the_identity() -> None:
    x = noise(2, 5, 3, 3)  # of an odd number of channels the larger half passes
    layer = AdditiveCoupling(CouplingNetwork(3, 2, 4))
    assert torch.equal(layer(x)[0], x)
    z, log_det = perturbed(layer)(x)
    assert torch.equal(log_det, torch.zeros(2, dtype=torch.float64))
    assert torch.equal(z[:, :3], x[:, :3])
    assert not torch.isclose(z[:, 3:], x[:, 3:]).any()
    assert jacobian_log_det(lambda v: layer(v)[0], x[:1]) == pytest.approx(0.0, abs=1e-12)


def test_diagonal_scale_gives_the_first_batch_variance_1_and_is_set_once() -> None:
    spread = 10.0 ** torch.linspace(-3, 3, 24, dtype=torch.float64).view(4, 2, 3)
    layer, x = DiagonalScale((4, 2, 3)), noise(256, 4, 2, 3) * spread
    z = layer.initialise(x)
    torch.testing.assert_close(z.var(dim=0), torch.ones(4, 2, 3, dtype=torch.float64), rtol=1e-4, atol=0)
    before = layer.log_scale.clone()
    layer.initialise(noise(256, 4, 2, 3, seed=1))
    assert torch.equal(layer.log_scale, before)
    assert DiagonalScale((1, 2, 2)).initialise(torch.zeros(8, 1, 2, 2)).isfinite().all()


# --------------------------------------------------------------------------------------------------------------- priors


def test_logistic_prior_is_the_logistic_distribution() -> None:
    z = torch.linspace(-30, 30, 13, dtype=torch.float64)
    base = torch.distributions.Uniform(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    expected = torch.distributions.TransformedDistribution(base, [torch.distributions.SigmoidTransform().inv])
    torch.testing.assert_close(logistic_log_prob([z[:, None]]), expected.log_prob(z))
    density = logistic_log_prob([torch.linspace(-60, 60, 100_001, dtype=torch.float64)[:, None]]).exp()
    assert float(density.sum() * 120 / 100_000) == pytest.approx(1.0, abs=1e-9)


def test_logistic_noise_has_its_quantiles_and_is_the_rows_own() -> None:
    seed, zero = torch.arange(4), torch.zeros(4, dtype=torch.int64)
    z = LOGISTIC.draw(seed, zero, zero, 0, (100, 50))
    assert z.dtype == torch.float64
    assert z.isfinite().all()
    for p in (0.1, 0.5, 0.9):  # 20,000 numbers: five standard errors of a share are at most 0.018
        assert float((z < math.log(p / (1 - p))).double().mean()) == pytest.approx(p, abs=0.018)
    assert torch.equal(LOGISTIC.draw(seed[2:3], zero[:1], zero[:1], 0, (100, 50))[0], z[2])


def test_both_priors_hold_latents_of_several_scales_together() -> None:
    parts = [noise(3, 2, 4, 4), noise(3, 8, 1, 1)]
    whole = torch.cat([part.flatten(1) for part in parts], dim=1)
    for prior in (GAUSSIAN, LOGISTIC):
        torch.testing.assert_close(prior.log_prob(parts), prior.log_prob([whole]))


# ----------------------------------------------------------------------------------------------------------- whole flow


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("space", [ImageSpace(4, 4, 1), ImageSpace(4, 2, 3)], ids=str)
def test_flow_inverts_and_its_log_det_is_autograds(alpha: float, space: ImageSpace) -> None:
    model = tiny(Config(TINY.couplings, units=6, hidden=2, channels=6, logit_alpha=alpha), space)
    y = noise(1, *space.shape)
    z, log_det = model.encode(y)
    assert tuple(latent.shape[1:] for latent in z) == model.latent_shapes
    torch.testing.assert_close(model.decode(z), y, rtol=0, atol=1e-10)
    assert float(log_det) == pytest.approx(jacobian_log_det(lambda v: model.encode(v)[0][0], y), abs=1e-8)


def test_flow_inverts_in_float32_and_its_latents_are_found_again() -> None:
    model, y = tiny(), noise(16, *DIGIT.shape)
    (z,), log_det = model.encode(y.float())
    assert log_det.dtype == torch.float32
    torch.testing.assert_close(model.decode([z]), y.float(), rtol=0, atol=1e-4)
    zero = torch.zeros(3, dtype=torch.int64)
    latent = LOGISTIC.draw(torch.arange(3), zero, zero, 0, z.shape[1:])
    (again,), _ = model.encode(model.decode([latent]))
    torch.testing.assert_close(again, latent, rtol=0, atol=1e-7)


def test_all_images_have_one_log_det_but_for_the_logit() -> None:
    """Volumes change by the diagonal scale alone, which is what NICE cannot help."""
    y = noise(8, *DIGIT.shape)
    for alpha in (0.0, 0.05):
        model = tiny(Config(TINY.couplings, units=6, hidden=1, channels=6, logit_alpha=alpha))
        scales = [layer.log_scale for layer in model.modules() if isinstance(layer, DiagonalScale)]
        _, log_det = model.encode(y)
        own = Logit(alpha)(y)[1] if alpha else torch.zeros(8, dtype=torch.float64)
        torch.testing.assert_close(log_det - own, scales[0].double().sum().expand(8))


@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_two_couplings_change_each_half_given_the_other(kind: str) -> None:
    model = tiny(Config((kind, kind), units=6, channels=6), ImageSpace(4, 4, 1))
    rows = jacobian(lambda v: model.encode(v)[0][0], noise(1, 1, 4, 4))
    assert ((rows != 0).sum(dim=1) > 1).all()


@BOTH
def test_density_of_two_numbers_integrates_to_one(prior: str) -> None:
    """Couplings and the scale on one pixel of two channels: by a sum over a grid that holds all but 1e-4 of it."""
    torch.manual_seed(0)
    first, second = (AdditiveCoupling(DenseNetwork((1, 1, 1), 8, 2)) for _ in range(2))
    layer = perturbed(Chain([first, Invertible1x1(2), second, DiagonalScale((2, 1, 1))]))
    axis = torch.linspace(-20, 20, 241, dtype=torch.float64)
    z, log_det = layer(torch.cartesian_prod(axis, axis)[:, :, None, None])
    log_prob = {"logistic": logistic_log_prob, "gaussian": gaussian_log_prob}[prior]
    density = (log_prob([z]) + log_det).exp()
    assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=1e-3)


@BOTH
def test_density_of_images_integrates_to_one(prior: str) -> None:
    """Over all y of 2×2 pixels that the logit reaches, by quasi-Monte Carlo."""
    alpha = 0.05
    model = tiny(Config(("dense",) * 3, units=4, prior=prior, logit_alpha=alpha), ImageSpace(2, 2, 1), by=0.1)
    low, width = -alpha / (1 - 2 * alpha), 1 / (1 - 2 * alpha)
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**14, dtype=torch.float64)
    z, log_det = model.encode((low + width * points).view(-1, 1, 2, 2))
    volume = (model.prior.log_prob(z) + log_det).exp().mean() * width**4
    assert float(volume) == pytest.approx(1.0, abs=0.03)


# ---------------------------------------------------------------------------------------------------- 8-bit conventions


def test_constants_of_the_8_bit_grid() -> None:
    """NICE's 5371.78 nats on CIFAR-10 in [-1, 1] are 4.48 bits/dim; the uniform density is 8 bits/dim on any scale."""
    nice = discrete_log_prob(torch.tensor(5371.78, dtype=torch.float64), 3072, extent=2.0)
    assert float(bits_per_dim(nice, 3072)) == pytest.approx(4.48, abs=0.005)
    for extent in (1.0, 2.0, 256.0):
        uniform = torch.tensor(-10 * math.log(extent), dtype=torch.float64)
        assert float(bits_per_dim(discrete_log_prob(uniform, 10, extent), 10)) == pytest.approx(8.0)
    assert LEVELS == 256


def test_a_narrow_prior_around_the_dequantised_image_scores_as_computed_by_hand() -> None:
    """Couplings at the identity, every scale 256: z = 256 y − 0 with a logistic prior; bits/dim without any model."""
    torch.manual_seed(0)
    model = Model(Config(("dense", "dense"), units=2, logit_alpha=0.0), ImageSpace(2, 2, 1))
    (layer,) = (layer for layer in model.modules() if isinstance(layer, DiagonalScale))
    torch.nn.init.constant_(layer.log_scale, math.log(256))
    x = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(1, 1, 2, 2) / 255
    seed = _random.image_seed(x)
    k_and_u = torch.arange(4) + _random.uniform(seed, torch.zeros_like(seed), 0, 0, (4,))[0]
    score = model.log_prob(x).log_prob
    assert score is not None
    expected = torch.log(torch.sigmoid(k_and_u) * torch.sigmoid(-k_and_u)).sum()  # 4 log 256 − D log 256 = 0
    torch.testing.assert_close(score[0], expected)


# ---------------------------------------------------------------------------------------------------- score and samples


@BOTH
def test_score_is_the_change_of_variables_and_its_statistics_its_parts(prior: str) -> None:
    model, x = tiny(Config(TINY.couplings, units=6, channels=6, prior=prior)), grey(5)
    score = model.log_prob(x)
    seed = _random.image_seed(x)
    (z,), log_det = model.encode(dequantise(x, _random.uniform(seed, torch.zeros_like(seed), 0, 0, DIGIT.shape)))
    s = score.statistics
    assert tuple(s) == ("log_p_z", "log_det", "energy_0", "autocorrelation_0")
    assert score.log_prob is not None
    torch.testing.assert_close(s["log_p_z"] + s["log_det"] - 64 * math.log(256), score.log_prob)
    torch.testing.assert_close(s["log_det"], log_det)
    torch.testing.assert_close(s["energy_0"], 0.5 * z.square().mean(dim=(1, 2, 3)))


@BOTH
def test_temperature_scales_the_latents_of_its_own_row(prior: str) -> None:
    model = tiny(Config(TINY.couplings, units=6, channels=6, prior=prior))
    drawn = images(model, [Draw(seed=3, sample=0, steps=1, temperature=0.5 * k) for k in range(3)])
    seed, zero = torch.full((3,), 3), torch.zeros(3, dtype=torch.int64)
    temperature = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[:, None, None, None]
    draw = LOGISTIC.draw if prior == "logistic" else GAUSSIAN.draw
    z = temperature * draw(seed, zero, zero, 0, model.latent_shapes[0])
    assert torch.equal(drawn, quantise(model.decode([z])))
    mode = model.decode([torch.zeros(1, *model.latent_shapes[0], dtype=torch.float64)])
    assert torch.equal(drawn[:1], quantise(mode))


# ------------------------------------------------------------------------------------------------------------- learning


@BOTH
def test_learning_lowers_the_loss_through_every_parameter(prior: str) -> None:
    torch.manual_seed(0)
    model = Model(Config(("convolutional", "dense", "dense"), units=8, channels=8, prior=prior), DIGIT)
    x = grey(4, seed=3).repeat(16, 1, 1, 1)
    batch = Batch(x, unlabelled(x))
    model.prepare([batch])
    optimiser = torch.optim.Adam(model.groups()["flow"], lr=0.01)
    losses = []
    for _ in range(40):
        ((_, loss, _),) = model.objective(batch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert all(p.grad is not None and p.grad.isfinite().all() and (p.grad != 0).any() for p in model.parameters())


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"couplings": ("dense",)}, "couplings"),
        ({"couplings": ("dense", "sparse")}, "couplings: 'sparse'"),
        ({"units": 0}, "units: 0"),
        ({"hidden": 0}, "hidden: 0"),
        ({"channels": 0}, "channels: 0"),
        ({"prior": "cauchy"}, "prior: 'cauchy'"),
        ({"logit_alpha": -0.1}, "logit_alpha: -0.1"),
        ({"logit_alpha": 0.5}, "logit_alpha: 0.5"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(Config(**changes), DIGIT)


def test_images_that_no_checkerboard_halves_are_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 2; it is 7×8"):
        Model(TINY, ImageSpace(7, 8, 1))


def test_spec_takes_no_label() -> None:
    model = Model(TINY, ImageSpace(8, 8, 1, labels=("a", "b")))
    assert {"steps", "temperature"} == set(model.spec.accepts())
    assert model.spec.likelihood is not None
    assert model.spec.likelihood.kind == "bound"
    x: Tensor = grey(2)
    assert torch.equal(model.log_prob(x, torch.tensor([0, 1])).log_prob, model.log_prob(x).log_prob)  # type: ignore[arg-type]
