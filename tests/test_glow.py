"""Glow: what labels change, the learnt Gaussians of the latents, inverses and log-determinants, density, storage."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from flow_toys import DIGIT, grey, images, jacobian_log_det, noise, perturbed
from torch import Tensor, nn

from models import _checkpoint, _random
from models._flow_model import dequantise, discrete_log_prob, gaussian_log_prob, quantise
from models._flows import (
    ActNorm,
    AffineCoupling,
    AffineGiven,
    Bijection,
    Chain,
    Convolution,
    CouplingNetwork,
    Invertible1x1,
    halves,
)
from models._protocol import Batch, Draw, ImageSpace, bits_per_dim, unlabelled
from models.glow import Config, Model

TINY = Config(couplings=(2, 2), widths=(6, 8), maps=2, logit_alpha=0.05)
CLASSES = ("a", "b", "c")
LABELLED = ImageSpace(8, 8, 1, labels=CLASSES)


def tiny(config: Config = TINY, space: ImageSpace = LABELLED, by: float = 0.1) -> Model:
    torch.manual_seed(0)
    return perturbed(Model(config, space), by)


# ------------------------------------------------------------------------------------------------- layers told a label

GIVEN = {
    "coupling": lambda: AffineCoupling(CouplingNetwork(2 + 3, 4, 5), bound=1.5),
    "split": lambda: AffineCoupling(Convolution(2 + 3, 4, 3, padding=1), bound=1.5),
    "top": lambda: AffineGiven(Convolution(3, 8, 1), bound=1.5),
    "step": lambda: Chain(
        [ActNorm(4), Invertible1x1(4), AffineCoupling(CouplingNetwork(2 + 3, 4, 5), bound=1.5), ActNorm(4)]
    ),
}


@pytest.mark.parametrize("name", GIVEN)
def test_layer_inverts_and_its_log_det_is_autograds_whatever_it_is_told(name: str) -> None:
    torch.manual_seed(1)
    layer: Bijection = perturbed(GIVEN[name]())
    x, given = noise(2, 4, 2, 4), noise(2, 3, 2, 4, seed=1)
    z, log_det = layer(x, given)
    torch.testing.assert_close(layer.inverse(z, given), x, rtol=0, atol=1e-12)
    for i in range(2):
        told = given[i : i + 1]
        expected = jacobian_log_det(lambda v, told=told: layer(v, told)[0], x[i : i + 1])  # type: ignore[misc]
        assert float(log_det[i]) == pytest.approx(expected, abs=1e-9)
    other, _ = layer(x, given + 0.5)
    assert not torch.isclose(other[:, 2:], z[:, 2:]).any()


def test_an_affine_map_to_a_standard_normal_is_a_gaussian() -> None:
    """The half that leaves, h_b, is N(μ, σ²) given h_a: with z = (h_b − μ) / σ its log-density is log N(z) + log|det|,
    and a temperature τ on z is one on σ."""
    layer = perturbed(AffineCoupling(Convolution(2 + 3, 4, 3, padding=1), bound=1.5))
    h, given = noise(3, 4, 4, 4), noise(3, 3, 4, 4, seed=1)
    kept, leaving = halves(h)
    log_scale, shift = layer.scale_and_shift(kept, given)
    sigma, mu = (-log_scale).exp(), -shift * (-log_scale).exp()
    expected = torch.distributions.Normal(mu, sigma).log_prob(leaving).sum(dim=(1, 2, 3))
    z, log_det = layer(h, given)
    torch.testing.assert_close(gaussian_log_prob([halves(z)[1]]) + log_det, expected)
    epsilon = noise(3, 2, 4, 4, seed=2)
    drawn = layer.inverse(torch.cat([kept, 0.3 * epsilon], dim=1), given)
    torch.testing.assert_close(halves(drawn)[1], mu + 0.3 * sigma * epsilon)


def test_density_of_two_numbers_integrates_to_one() -> None:
    """A step of flow on a single pixel of two channels: by the trapezoidal rule on a grid that holds all the mass."""
    torch.manual_seed(2)
    step = [ActNorm(2), Invertible1x1(2), AffineCoupling(CouplingNetwork(1 + 1, 2, 8), bound=0.5)]
    layer = perturbed(Chain([*step, AffineGiven(Convolution(1, 4, 1), bound=0.5)]))
    axis = torch.linspace(-24, 24, 241, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)[:, :, None, None]
    for told in (-1.0, 1.0):
        z, log_det = layer(points, torch.full((len(points), 1, 1, 1), told, dtype=torch.float64))
        density = (gaussian_log_prob([z]) + log_det).exp()
        assert float(density.max()) > 0.02
        assert float(density.sum() * (axis[1] - axis[0]) ** 2) == pytest.approx(1.0, abs=1e-4)


# ----------------------------------------------------------------------------------------------------------- whole flow


@pytest.mark.parametrize("label", [-1, 0, 2])
@pytest.mark.parametrize("channels", [1, 3])
def test_flow_inverts_and_its_log_det_is_autograds(label: int, channels: int) -> None:
    space = ImageSpace(4, 4, channels, labels=CLASSES)
    model = tiny(space=space)
    y, labels = noise(1, *space.shape), torch.tensor([label])
    z, log_det = model.encode(y, labels)
    assert tuple(latent.shape[1:] for latent in z) == model.latent_shapes
    torch.testing.assert_close(model.decode(z, labels), y, rtol=0, atol=1e-10)

    def flat(v: Tensor) -> Tensor:
        return torch.cat([latent.flatten() for latent in model.encode(v, labels)[0]])

    assert float(log_det) == pytest.approx(jacobian_log_det(flat, y), abs=1e-8)


def test_flow_inverts_in_float32() -> None:
    model, labels = tiny(), torch.arange(16) % 4 - 1
    y = noise(16, *LABELLED.shape).float()
    z, log_det = model.encode(y, labels)
    assert log_det.dtype == torch.float32
    torch.testing.assert_close(model.decode(z, labels), y, rtol=0, atol=1e-4)


def test_latents_of_every_scale_are_found_again() -> None:
    """Whatever latents one decodes, at the finest scale or the coarsest, encoding gives them back; each matters."""
    config = Config(couplings=(2, 1, 2), widths=(4, 4, 4), maps=1)
    model, labels = tiny(config), torch.tensor([0, 1, 2, -1])
    z = [
        _random.normal(torch.arange(4), torch.zeros(4, dtype=torch.int64), 0, i, shape).double()
        for i, shape in enumerate(model.latent_shapes)
    ]
    assert model.latent_shapes == ((2, 4, 4), (4, 2, 2), (16, 1, 1))
    y = model.decode(z, labels)
    again, _ = model.encode(y, labels)
    for i, (mine, theirs) in enumerate(zip(z, again, strict=True)):
        torch.testing.assert_close(theirs, mine, rtol=0, atol=1e-8)
        changed = [latent + (0.5 if j == i else 0.0) for j, latent in enumerate(z)]
        assert ((model.decode(changed, labels) - y).abs().amax(dim=(1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("label", [-1, 1])
def test_density_of_images_integrates_to_one(label: int) -> None:
    """Over all y of 2×2 pixels that the logit reaches, by quasi-Monte Carlo."""
    alpha = 0.05
    config = Config(couplings=(3,), widths=(4,), maps=2, logit_alpha=alpha)
    model = tiny(config, ImageSpace(2, 2, 1, labels=CLASSES))
    low, width = -alpha / (1 - 2 * alpha), 1 / (1 - 2 * alpha)
    points = torch.quasirandom.SobolEngine(4, scramble=True, seed=0).draw(2**14, dtype=torch.float64)
    z, log_det = model.encode((low + width * points).view(-1, 1, 2, 2), torch.full((len(points),), label))
    volume = (gaussian_log_prob(z) + log_det).exp().mean() * width**4
    assert float(volume) == pytest.approx(1.0, abs=0.03)


def test_prepare_normalises_every_scale() -> None:
    torch.manual_seed(0)
    model = Model(TINY, LABELLED)
    x, labels = grey(512), torch.arange(512) % 3
    model.prepare([Batch(x[:200], labels[:200]), Batch(x[200:], labels[200:])])
    assert all(layer.initialised for layer in model.modules() if isinstance(layer, ActNorm))
    z, _ = model.encode(dequantise(x, torch.rand_like(x)), labels)  # every network answers zero yet
    for latent in z:
        std, mean = torch.std_mean(latent, dim=(0, 2, 3))
        assert mean.abs().max() < 0.1
        assert (std - 1).abs().max() < 0.1


def test_weights_stored_in_16_bits_are_still_a_bijection(tmp_path: Path) -> None:
    """Rounded weights are another flow, as exactly invertible and as rightly normalised."""
    model = tiny(space=ImageSpace(4, 4, 1, labels=CLASSES))
    _checkpoint.save(tmp_path, model, model.config, {"metrics": {}}, half=True)
    rounded = _checkpoint.load(tmp_path)
    assert isinstance(rounded, Model)
    y, labels = noise(1, 1, 4, 4), torch.tensor([1])
    z, log_det = rounded.encode(y, labels)
    assert not torch.equal(z[0], model.encode(y, labels)[0][0])
    torch.testing.assert_close(rounded.decode(z, labels), y, rtol=0, atol=1e-10)

    def flat(v: Tensor) -> Tensor:
        return torch.cat([latent.flatten() for latent in rounded.encode(v, labels)[0]])

    assert float(log_det) == pytest.approx(jacobian_log_det(flat, y), abs=1e-8)


# --------------------------------------------------------------------------------------------------------------- labels


def test_every_label_and_none_has_a_density_and_samples_of_its_own() -> None:
    model, x = tiny(by=0.3), grey(1).expand(4, -1, -1, -1)
    labels = torch.tensor([-1, 0, 1, 2])
    log_prob = model.log_prob(x, labels).log_prob
    assert log_prob is not None
    assert len(set(log_prob.tolist())) == 4
    assert torch.equal(model.log_prob(x).log_prob, log_prob[:1].expand(4))  # type: ignore[arg-type]
    drawn = images(model, [Draw(seed=1, sample=0, steps=1, label=label) for label in labels.tolist()])
    assert all(not torch.equal(drawn[i], drawn[j]) for i in range(4) for j in range(i))


def test_score_is_the_change_of_variables_given_the_label() -> None:
    model, x, labels = tiny(), grey(4), torch.tensor([-1, 0, 1, 2])
    score = model.log_prob(x, labels)
    seed = _random.image_seed(x)
    u = _random.uniform(seed, torch.zeros_like(seed), 0, 0, LABELLED.shape)
    z, log_det = model.encode((torch.round(x * 255) + u) / 256, labels)
    expected = discrete_log_prob(gaussian_log_prob(z) + log_det, 64)
    assert score.log_prob is not None
    torch.testing.assert_close(score.log_prob, expected)
    assert tuple(score.statistics) == model.statistic_names
    assert {"log_p_z", "log_det", "energy_0", "energy_1"} < set(model.statistic_names)


def test_training_hides_labels_as_often_as_asked() -> None:
    def gradient_of_maps(dropout: float, labels: Tensor) -> Tensor:
        torch.manual_seed(0)
        model = perturbed(Model(Config((2,), (4,), maps=1, label_dropout=dropout), LABELLED), 0.1)
        maps = model.flow.maps[0].maps.requires_grad_()
        ((_, loss, _),) = model.objective(Batch(grey(len(labels)), labels))
        (gradient,) = torch.autograd.grad(loss, maps)
        return gradient.abs().sum(dim=(1, 2, 3)) > 0  # (classes + 1,)

    seen = torch.arange(300) % 2
    assert gradient_of_maps(0.0, seen).tolist() == [True, True, False, False]
    assert gradient_of_maps(0.3, seen).tolist() == [True, True, False, True]
    assert gradient_of_maps(0.0, torch.full((8,), -1)).tolist() == [False, False, False, True]


def test_without_labels_it_is_told_the_place_alone() -> None:
    model = tiny(space=DIGIT)
    assert model.label_dropout == 0.0
    assert "label" not in model.spec.accepts()
    assert [tuple(m.maps.shape) for m in model.flow.maps] == [(1, 2, 4, 4), (1, 2, 2, 2)]
    x = grey(2)
    score = model.log_prob(x).log_prob
    assert score is not None
    assert (score < 0).all()


def test_it_learns_which_label_an_image_has() -> None:
    """Dark images are of class a, bright ones of class b: after some steps most are likelier given their own label by
    far, and little less likely without any."""
    torch.manual_seed(0)
    model = Model(Config((2,), (8,), maps=2, label_dropout=0.3), ImageSpace(4, 4, 1, labels=("a", "b")))
    labels = torch.arange(64) % 2
    x = ((40 + 160 * labels[:, None, None, None] + 40 * torch.rand(64, 1, 4, 4)).round()) / 255
    batch = Batch(x, labels)
    model.prepare([batch])
    optimiser = torch.optim.Adam(model.groups()["flow"], lr=0.02)
    for _ in range(60):
        ((_, loss, _),) = model.objective(batch)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    with torch.inference_mode():
        right, wrong, none = (
            bits_per_dim(s, 16)
            for s in (model.log_prob(x, told).log_prob for told in (labels, 1 - labels, unlabelled(x)))
            if s is not None
        )
    assert float((right < wrong).float().mean()) > 0.9
    assert float((wrong - right).median()) > 0.5
    assert float((none - right).mean()) < 0.5


# ------------------------------------------------------------------------------------------------------------- sampling


def test_temperature_scales_the_latents_of_every_scale_of_its_own_row() -> None:
    model = tiny()
    drawn = images(model, [Draw(seed=3, sample=0, steps=1, label=k - 1, temperature=0.5 * k) for k in range(3)])
    seed = torch.full((3,), 3)
    z = [
        torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)[:, None, None, None]
        * _random.normal(seed, torch.zeros_like(seed), 0, draw, shape)
        for draw, shape in enumerate(model.latent_shapes)
    ]
    assert torch.equal(drawn, quantise(model.decode(z, torch.tensor([-1, 0, 1]))))


def test_autocast_reaches_the_networks_alone() -> None:
    y, labels = noise(4, *LABELLED.shape).float(), torch.tensor([0, 1, 2, -1])
    model = tiny()
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    exact, exact_log_det = model.encode(y, labels)
    with torch.autocast("cpu", torch.bfloat16):
        z, log_det = model.encode(y, labels)
    assert all(map(torch.equal, z, exact))
    assert torch.equal(log_det, exact_log_det)
    assert math.isfinite(float(log_det.sum()))


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"couplings": ()}, "couplings"),
        ({"couplings": (2, 0)}, "couplings"),
        ({"widths": (4,)}, "widths"),
        ({"widths": (4, 0)}, "widths"),
        ({"maps": 0}, "maps: 0"),
        ({"scale_bound": 0.0}, "scale_bound: 0.0"),
        ({"scale_bound": 11.0}, "scale_bound: 11.0"),
        ({"logit_alpha": 0.0}, "logit_alpha: 0.0"),
        ({"logit_alpha": 0.5}, "logit_alpha: 0.5"),
        ({"label_dropout": 1.0}, "label_dropout: 1.0"),
        ({"couplings": (2, 2, 2, 2), "widths": (4, 4, 4, 4)}, "multiples of 16; it is 8×8"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_name(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(Config(**{"couplings": (2, 2), "widths": (4, 4), **changes}), LABELLED)  # type: ignore[arg-type]
