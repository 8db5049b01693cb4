"""RealNVP and the bijections it is made of: inverses, log-determinants, the density's constants, samples and scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from flow_toys import DIGIT, grey, images, jacobian, jacobian_log_det, noise, perturbed
from torch import Tensor, nn

from models import _random, _rows
from models._flow_model import (
    Products,
    dequantise,
    discrete_log_prob,
    gaussian_log_prob,
    quantise,
)
from models._flows import (
    ActNorm,
    AffineCoupling,
    Bijection,
    Chain,
    CouplingNetwork,
    Invertible1x1,
    Logit,
    MultiScale,
    Permute,
    Squeeze,
    halves,
)
from models._protocol import Batch, Draw, ImageSpace, bits_per_dim, unlabelled
from models.realnvp import Config, Model

TINY = Config(couplings=(3, 3), widths=(6, 8), logit_alpha=0.05)


def tiny(config: Config = TINY, space: ImageSpace = DIGIT, by: float = 0.3) -> Model:
    torch.manual_seed(0)
    return perturbed(Model(config, space), by)


# --------------------------------------------------------------------------------------------------------------- layers


def coupling(channels: int) -> AffineCoupling:
    kept, changed = channels - channels // 2, channels // 2
    return AffineCoupling(CouplingNetwork(kept, 2 * changed, 5), bound=1.5)


LAYERS: dict[str, Callable[[], Bijection]] = {
    "ActNorm": lambda: ActNorm(4),
    "1x1": lambda: Invertible1x1(4),
    "coupling": lambda: coupling(4),
    "Permute": lambda: Permute((2, 3, 1, 0)),
    "Squeeze": Squeeze,
    "Logit": lambda: Logit(0.01),
    "Chain": lambda: Chain([ActNorm(4), Invertible1x1(4), coupling(4), Squeeze(), coupling(16)]),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_inverts_and_its_log_det_is_autograds(name: str) -> None:
    torch.manual_seed(1)
    layer = perturbed(LAYERS[name]())
    x = 0.02 + 0.96 * noise(2, 4, 2, 4)
    z, log_det = layer(x)
    assert z.dtype == log_det.dtype == torch.float64
    assert log_det.shape == (2,)
    torch.testing.assert_close(layer.inverse(z), x, rtol=0, atol=1e-12)
    for i in range(2):
        expected = jacobian_log_det(lambda v: layer(v)[0], x[i : i + 1])
        assert float(log_det[i]) == pytest.approx(expected, abs=1e-9)


def test_log_det_grows_with_the_volume() -> None:
    """The sign by hand: twice as wide in each of 4·6 dimensions is +24 log 2."""
    layer = ActNorm(4)
    nn.init.constant_(layer.log_scale, math.log(2))
    x = noise(3, 4, 2, 3)
    z, log_det = layer(x)
    torch.testing.assert_close(z, 2 * x)
    torch.testing.assert_close(log_det, torch.full((3,), 24 * math.log(2), dtype=torch.float64))


def test_coupling_of_an_odd_number_of_channels_inverts() -> None:
    layer = perturbed(coupling(5))
    x = noise(2, 5, 2, 2)
    z, log_det = layer(x)
    torch.testing.assert_close(layer.inverse(z), x)
    assert float(log_det[0]) == pytest.approx(jacobian_log_det(lambda v: layer(v)[0], x[:1]), abs=1e-9)


def test_coupling_passes_one_half_and_starts_as_the_identity() -> None:
    x = noise(2, 4, 3, 3)
    z, log_det = coupling(4)(x)
    assert torch.equal(z, x)
    assert torch.equal(log_det, torch.zeros(2, dtype=torch.float64))
    z, _ = perturbed(coupling(4))(x)
    assert torch.equal(z[:, :2], x[:, :2])
    assert not torch.isclose(z[:, 2:], x[:, 2:]).any()


def test_log_scales_stay_inside_the_bound_whatever_the_network_says() -> None:
    class Loud(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([1e6 * torch.sign(x - 0.5), x], dim=1)

    layer = AffineCoupling(Loud(), bound=0.7)
    x = noise(2, 4, 3, 3)
    log_scale, _ = layer.scale_and_shift(x[:, :2])
    assert log_scale.abs().max() <= 0.7
    z, log_det = layer(x)
    torch.testing.assert_close(layer.inverse(z), x)
    assert (log_det.abs() <= 0.7 * 2 * 9).all()


def test_1x1_starts_as_a_rotation_and_its_factors_give_the_determinant() -> None:
    torch.manual_seed(2)
    layer = Invertible1x1(6)
    p, lower, upper = layer.factors(torch.float64)
    w = p @ lower @ upper
    torch.testing.assert_close(w @ w.T, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-6)
    perturbed(layer)
    p, lower, upper = layer.factors(torch.float64)
    expected = torch.linalg.slogdet(p @ lower @ upper)[1]
    torch.testing.assert_close(layer.log_diagonal.double().sum(), expected)


def test_squeeze_puts_the_checkerboards_black_squares_first() -> None:
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(6), indexing="ij")
    white = ((rows + columns) % 2).double().expand(1, 3, 4, 6)
    z, _ = Squeeze()(white)
    assert z.shape == (1, 12, 2, 3)
    first, second = halves(z)
    assert (first == 0).all()
    assert (second == 1).all()


# -------------------------------------------------------------------------------------------------------------- ActNorm


def test_actnorm_gives_the_first_batch_mean_0_and_variance_1() -> None:
    layer = ActNorm(3)
    x = noise(64, 3, 4, 4) * torch.tensor([0.1, 5.0, 300.0])[:, None, None] - 7.0
    z = layer.initialise(x)
    torch.testing.assert_close(z.mean(dim=(0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-4)
    torch.testing.assert_close(z.var(dim=(0, 2, 3)), torch.ones(3, dtype=torch.float64), rtol=1e-3, atol=0)


def test_actnorm_is_set_once_and_remembers_that_it_is() -> None:
    layer, copy = ActNorm(3), ActNorm(3)
    layer.initialise(noise(64, 3, 4, 4))
    copy.load_state_dict(layer.state_dict())
    copy.initialise(100 * noise(64, 3, 4, 4, seed=1))
    assert torch.equal(copy.log_scale, layer.log_scale)
    assert torch.equal(copy.shift, layer.shift)


def test_actnorm_takes_a_constant_channel() -> None:
    z = ActNorm(2).initialise(torch.zeros(8, 2, 2, 2))
    assert z.isfinite().all()


@pytest.mark.parametrize("mixing", ["1x1", "masks"])
def test_prepare_normalises_every_scale_with_no_more_batches_than_needed(mixing: str) -> None:
    config = Config(couplings=(2, 2), widths=(4, 4), mixing=mixing)
    torch.manual_seed(0)
    model = Model(config, DIGIT)
    drawn = []

    def batches() -> Iterator[Batch]:
        for i in itertools.count():
            drawn.append(i)
            yield Batch(grey(200, seed=i), torch.full((200,), -1))

    model.prepare(batches())
    assert len(drawn) == 3
    assert all(layer.initialised for layer in model.modules() if isinstance(layer, ActNorm))
    x = torch.cat([grey(200, seed=i) for i in drawn])
    z, _ = model.encode(
        dequantise(x, torch.rand_like(x))
    )  # couplings are the identity yet: other noise, same statistics
    for latent in z:
        std, mean = torch.std_mean(latent, dim=(0, 2, 3))
        assert mean.abs().max() < 0.1
        assert (std - 1).abs().max() < 0.1


# ----------------------------------------------------------------------------------------------------------- whole flow


@pytest.mark.parametrize("mixing", ["1x1", "masks"])
@pytest.mark.parametrize("space", [ImageSpace(4, 4, 1), ImageSpace(8, 4, 1), ImageSpace(4, 4, 3)], ids=str)
def test_flow_inverts_and_its_log_det_is_autograds(mixing: str, space: ImageSpace) -> None:
    model = tiny(Config(couplings=(4, 3), widths=(6, 6), mixing=mixing, logit_alpha=0.05), space, by=0.1)
    y = noise(1, *space.shape)
    z, log_det = model.encode(y)
    assert tuple(latent.shape[1:] for latent in z) == model.latent_shapes
    assert sum(latent.numel() for latent in z) == space.dims
    torch.testing.assert_close(model.decode(z), y, rtol=0, atol=1e-10)

    def flat(v: Tensor) -> Tensor:
        return torch.cat([latent.flatten() for latent in model.encode(v)[0]])

    assert float(log_det) == pytest.approx(jacobian_log_det(flat, y), abs=1e-8)


def test_flow_inverts_in_float32() -> None:
    model = tiny(by=0.1)
    y = noise(16, *DIGIT.shape).float()
    z, log_det = model.encode(y)
    assert log_det.dtype == torch.float32
    torch.testing.assert_close(model.decode(z), y, rtol=0, atol=1e-4)


@pytest.mark.parametrize("mixing", ["1x1", "masks"])
def test_every_latent_depends_on_more_than_its_own_pixel(mixing: str) -> None:
    """No pixel slips through: with masks, each is changed by its complement within two couplings."""
    config = Config(couplings=(2,), widths=(6,), mixing=mixing)
    model = tiny(config, ImageSpace(4, 4, 1))
    y = noise(1, 1, 4, 4)
    rows = jacobian(lambda v: model.encode(v)[0][0], y)
    assert ((rows != 0).sum(dim=1) > 1).all()


@pytest.mark.parametrize("mixing", ["1x1", "masks"])
def test_density_integrates_to_one(mixing: str) -> None:
    """Over all y of 2×2 pixels that the logit reaches, by quasi-Monte Carlo."""
    alpha = 0.05
    model = tiny(Config(couplings=(3,), widths=(4,), mixing=mixing, logit_alpha=alpha), ImageSpace(2, 2, 1), by=0.1)
    low, width = -alpha / (1 - 2 * alpha), 1 / (1 - 2 * alpha)
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**16, dtype=torch.float64)
    z, log_det = model.encode((low + width * points).view(-1, 1, 2, 2))
    volume = (gaussian_log_prob(z) + log_det).exp().mean() * width**4
    assert float(volume) == pytest.approx(1.0, abs=0.03)


def test_autocast_reaches_the_networks_alone() -> None:
    y = noise(4, *DIGIT.shape).float()
    model = tiny(by=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = model.encode(y)
    assert log_det.dtype == torch.float32
    assert all(latent.dtype == torch.float32 for latent in z)
    assert not torch.equal(z[0], model.encode(y)[0][0])
    for layer in model.modules():
        if isinstance(layer, CouplingNetwork):
            for parameter in layer.last.parameters():
                nn.init.zeros_(parameter)
    exact, exact_log_det = model.encode(y)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = model.encode(y)
    assert all(map(torch.equal, z, exact))
    assert torch.equal(log_det, exact_log_det)


def test_multi_scale_latents_leave_finest_first() -> None:
    flow = MultiScale(Logit(0.1), [Squeeze(), Squeeze(), Squeeze()])
    z, _ = flow(noise(2, 1, 8, 16))
    assert (
        tuple(latent.shape[1:] for latent in z) == ((2, 4, 8), (4, 2, 4), (16, 1, 2)) == flow.latent_shapes((1, 8, 16))
    )


# ---------------------------------------------------------------------------------------------------- 8-bit conventions


def test_dequantised_levels_come_back() -> None:
    x = torch.arange(256).view(1, 1, 16, 16) / 255
    for u in (2.0**-12, 0.5, 1 - 2.0**-12):
        y = dequantise(x, torch.full_like(x, u))
        assert 0 < y.min() < y.max() < 1
        assert torch.equal(quantise(y), x)
        assert torch.equal(quantise(y.double()), x)
    assert torch.equal(quantise(torch.tensor([-0.1, 1.1])), torch.tensor([0.0, 1.0]))


# ---------------------------------------------------------------------------------------------------------------- score


def test_score_is_the_change_of_variables_at_the_images_own_noise() -> None:
    model, x = tiny(by=0.1), grey(5)
    score = model.log_prob(x)
    seed = _random.image_seed(x)
    u = _random.uniform(seed, torch.zeros_like(seed), 0, 0, DIGIT.shape)
    z, log_det = model.encode((torch.round(x * 255) + u) / 256)
    standard = torch.distributions.Normal(0.0, 1.0)
    log_p_z = sum(standard.log_prob(latent).sum(dim=(1, 2, 3)) for latent in z)
    assert score.log_prob is not None
    torch.testing.assert_close(score.log_prob, log_p_z + log_det - 64 * math.log(256))
    assert (score.log_prob < 0).all()


def test_score_is_the_same_every_time_alone_and_in_a_batch() -> None:
    model, x = tiny(by=0.1), grey(7)
    together = model.log_prob(x)
    assert together.log_prob is not None
    again = model.log_prob(x.clone())
    assert again.log_prob is not None
    assert torch.equal(together.log_prob, again.log_prob)
    for i in range(len(x)):
        alone = model.log_prob(x[i : i + 1])
        assert alone.log_prob is not None
        torch.testing.assert_close(alone.log_prob, together.log_prob[i : i + 1], rtol=1e-5, atol=1e-4)
        for name, value in alone.statistics.items():
            torch.testing.assert_close(value, together.statistics[name][i : i + 1], rtol=1e-4, atol=1e-4)


def test_statistics_split_the_score_into_what_its_sum_hides() -> None:
    model, x = tiny(by=0.1), grey(6)
    score = model.log_prob(x)
    s = score.statistics
    assert tuple(s) == model.statistic_names
    assert score.log_prob is not None
    torch.testing.assert_close(s["log_p_z"] + s["log_det"] - 64 * math.log(256), score.log_prob)
    dims = [math.prod(shape) for shape in model.latent_shapes]
    energy = s["energy_0"] * dims[0] + s["energy_1"] * dims[1]
    torch.testing.assert_close(-energy - 32 * math.log(2 * math.pi), s["log_p_z"])


def autocorrelation(z: torch.Tensor) -> torch.Tensor:
    return Products.of(z).autocorrelation


def test_autocorrelation_of_white_of_smooth_and_of_single_values() -> None:
    white = _random.normal(torch.arange(8), torch.zeros(8, dtype=torch.int64), 0, 0, (4, 32, 32))
    assert autocorrelation(white).abs().max() < 0.06  # 7936 pairs: five standard errors
    torch.testing.assert_close(autocorrelation(torch.full((2, 3, 4, 5), 2.0)), torch.full((2,), 4.0))
    checkered = (-1.0) ** (torch.arange(4)[:, None] + torch.arange(4))
    torch.testing.assert_close(autocorrelation(checkered.expand(1, 1, 4, 4)), torch.tensor([-1.0]))
    assert torch.equal(autocorrelation(torch.ones(1, 2, 1, 1)), torch.zeros(1))


def test_score_has_a_gradient_in_the_image() -> None:
    model = tiny(by=0.1)
    x = grey(2).requires_grad_()
    log_prob = model.evaluate(x, unlabelled(x)).log_prob
    assert log_prob is not None
    (gradient,) = torch.autograd.grad(log_prob.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient != 0).all()


# ------------------------------------------------------------------------------------------------------------- sampling


def test_an_image_never_depends_on_its_batch_mates() -> None:
    model = tiny(by=0.1)
    draws = [Draw(seed=i // 2, sample=i % 2, steps=1, temperature=0.25 * (i % 6)) for i in range(24)]
    together = images(model, draws)
    for i in (0, 7, 23):
        assert torch.equal(images(model, draws[i : i + 1])[0], together[i])
    with torch.inference_mode():
        rows = _rows.cat([model.init(draws[12:]), model.init(draws[:12])])
        assert torch.equal(model.image(model.step(rows)), torch.cat([together[12:], together[:12]]))


def test_temperature_scales_every_latent_of_its_own_row() -> None:
    model = tiny(by=0.1)
    draws = [Draw(seed=3, sample=0, steps=1, temperature=t) for t in (0.0, 0.5, 1.0)]
    x = images(model, draws)
    seed = torch.full((3,), 3)
    z = [
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[:, None, None, None]
        * _random.normal(seed, torch.zeros_like(seed), 0, draw, shape)
        for draw, shape in enumerate(model.latent_shapes)
    ]
    assert torch.equal(x, quantise(model.decode(z)))
    mode = model.decode([torch.zeros(1, *shape, dtype=torch.float64) for shape in model.latent_shapes])
    assert torch.equal(x[:1], quantise(mode))


def test_samples_lie_on_the_grid_and_stay_finite_at_every_temperature() -> None:
    model = tiny(by=3.0)  # networks that shout: only the bound on the log-scales holds them
    x = images(model, [Draw(seed=i, sample=0, steps=1, temperature=1.5 * i / 31) for i in range(32)])
    assert x.isfinite().all()
    assert torch.equal(torch.round(x * 255) / 255, x)


# ------------------------------------------------------------------------------------------------------------- learning


def test_objective_is_minus_the_log_likelihood_in_bits_per_dim() -> None:
    model, x = tiny(by=0.1), grey(16)
    torch.manual_seed(5)
    ((group, loss, metrics),) = model.objective(Batch(x, unlabelled(x)))
    torch.manual_seed(5)
    z, log_det = model.encode(dequantise(x, torch.rand_like(x)))
    expected = bits_per_dim(discrete_log_prob(gaussian_log_prob(z) + log_det, 64), 64).mean()
    torch.testing.assert_close(loss, expected)
    assert group == "flow"
    assert not metrics["bits_per_dim"].requires_grad


def test_learning_lowers_the_loss_through_every_parameter() -> None:
    torch.manual_seed(0)
    model = Model(TINY, DIGIT)
    x = grey(4, seed=3).repeat(16, 1, 1, 1)
    batch = Batch(x, unlabelled(x))
    model.prepare([batch])
    parameters = model.groups()["flow"]
    losses = []
    for _ in range(30):
        ((_, loss, _),) = model.objective(batch)
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.sub_(0.02 * gradient.sign())
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert all(gradient.isfinite().all() and (gradient != 0).any() for gradient in gradients)
    assert {id(p) for p in model.parameters()} == {id(p) for p in model.groups()["flow"]}


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"couplings": ()}, "couplings"),
        ({"couplings": (2, 0)}, "couplings"),
        ({"widths": (4,)}, "widths"),
        ({"widths": (4, 0)}, "widths"),
        ({"mixing": "shuffle"}, "mixing: 'shuffle'"),
        ({"couplings": (1, 3), "mixing": "masks"}, "couplings"),
        ({"scale_bound": 0.0}, "scale_bound: 0.0"),
        ({"scale_bound": 11.0}, "scale_bound: 11.0"),
        ({"logit_alpha": 0.0}, "logit_alpha: 0.0"),
        ({"logit_alpha": 0.5}, "logit_alpha: 0.5"),
        ({"couplings": (2, 2, 2, 2), "widths": (4, 4, 4, 4)}, "multiples of 16; it is 8×8"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(Config(**{"couplings": (2, 2), "widths": (4, 4), **changes}), DIGIT)  # type: ignore[arg-type]


def test_spec_says_what_the_number_is_and_takes_no_label() -> None:
    model = Model(TINY, ImageSpace(8, 8, 1, labels=("a", "b")))
    assert model.spec.likelihood is not None
    assert model.spec.likelihood.kind == "bound"
    assert model.spec.likelihood.dequantisation == "uniform K=1"
    assert "label" not in model.spec.accepts()
    assert {"steps", "temperature"} == set(model.spec.accepts())
