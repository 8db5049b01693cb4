"""What a denoiser tells of an image under fixed noise: closed forms, and that families ask what they say they ask."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from models import _denoising, _random, ddpm, flow_matching
from models._denoising import CLEAN_SIGMAS, LABEL_SIGMA, MAP_SIGMAS, SIGMAS, Probes
from models._diffusion import column
from models._protocol import UNLABELLED, ImageSpace

SPACE = ImageSpace(6, 8, 2, labels=("a", "b", "c"))
DIMS = SPACE.dims


def images(n: int = 5) -> Tensor:
    return (torch.rand(n, *SPACE.shape, generator=torch.Generator().manual_seed(3)) * 255).round() / 255


def statistics(
    denoised: _denoising.Denoised, x: Tensor, label: int = UNLABELLED, each: int | None = None
) -> dict[str, Tensor]:
    """All probes, `each` of them a tick."""
    probes = Probes(SPACE.classes)
    each = probes.count if each is None else each
    errors, image = probes.begin(x), (2 * x - 1, _random.image_seed(x), torch.full((len(x),), label))
    features = _denoising.no_features(x, 1)
    for tick in range(-(-probes.count // each)):
        at = torch.full((len(x),), tick)
        errors, features = _denoising.probe(probes, probed_by(denoised), errors, features, at, each, image, 0)
    return {**probes.statistics(errors, DIMS), "middle": features}


def probed_by(denoised: _denoising.Denoised) -> _denoising.Probed:
    """Whose network's middle is the image that it is shown, in the mean over channels."""
    return lambda x, sigma, labels: (denoised(x, sigma, labels, torch.ones(len(x))), x.mean(dim=1, keepdim=True))


def gaussian(spread: float) -> _denoising.Denoised:
    """The best denoiser of pixels that are independent Gaussians of mean 0."""

    def denoised(x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        return x * column(spread**2 / (spread**2 + sigma.square()))

    return denoised


def test_the_score_of_a_gaussian_is_its_gradient() -> None:
    """∇ log N(x; 0, s² + σ²) = −x / (s² + σ²)."""
    x, s = images(), 0.7
    found = statistics(gaussian(s), x)
    for sigma in CLEAN_SIGMAS:
        expected = (2 * x - 1).flatten(1).norm(dim=1) / (s**2 + sigma**2)
        # by quadrants of one size, whose mean the whole is
        torch.testing.assert_close(found[f"log_score_norm_{sigma:g}"].exp(), expected)


def test_the_error_under_noise_is_that_of_the_reconstruction() -> None:
    """x̂₀ − x₀ = (s² σ ε − σ² x₀) / (s² + σ²), whose square has a known mean over ε."""
    x = images(400).clamp(0.25, 0.75)
    s, x0 = 0.7, 2 * images(400).clamp(0.25, 0.75) - 1
    found = statistics(gaussian(s), x)
    for sigma in SIGMAS:
        per_pixel = (s**4 * sigma**2 + sigma**4 * x0.square()) / (s**2 + sigma**2) ** 2
        expected = per_pixel.mean(dim=(1, 2, 3))
        ratio = found[f"log_denoising_error_{sigma:g}"].exp() / expected
        assert float(ratio.mean()) == pytest.approx(1, abs=0.02)
        left = found[f"log_denoising_error_{sigma:g}_top_left"].exp() / per_pixel[:, :, :4, :3].mean(dim=(1, 2, 3))
        assert float(left.mean()) == pytest.approx(1, abs=0.04)


def test_labels_are_weighed_as_one_step_of_a_diffusion_classifier() -> None:
    """A denoiser that knows each class's one image: D e / 2σ² is ‖x − m‖² / 2σ²."""
    x = images()
    means = torch.tensor([-0.5, 0.0, 0.5, 0.2])  # the last where there is no label

    def denoised(x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        return column(means[labels]).expand_as(x)

    found = statistics(denoised, x)
    nats = (2 * x[:, None] - 1 - means[None, :, None, None, None]).square().sum(dim=(2, 3, 4)) / (2 * LABEL_SIGMA**2)
    given, none = nats[:, :3], nats[:, 3]
    torch.testing.assert_close(found["label_marginal"], math.log(3) - (-given).logsumexp(dim=1))
    torch.testing.assert_close(found["label_gain"], none - given.amin(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found["label_spread"], given.std(dim=1, unbiased=False))
    asked = statistics(denoised, x, label=1)
    torch.testing.assert_close(asked["label_gain"], given[:, 1] - given.amin(dim=1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(asked["label_marginal"], found["label_marginal"])


def test_it_does_not_matter_how_many_probes_a_tick_takes() -> None:
    whole = statistics(gaussian(0.5), images())
    for each in (1, 4, 7):
        parts = statistics(gaussian(0.5), images(), each=each)
        assert parts.keys() == whole.keys()
        for name, value in parts.items():
            torch.testing.assert_close(value, whole[name], rtol=0, atol=0)


def test_many_labels_are_not_tried_and_none_need_be() -> None:
    assert Probes(0).count == Probes(_denoising.MOST_LABELS + 1).count == len(SIGMAS) + len(CLEAN_SIGMAS)
    assert Probes(3).count == Probes(0).count + 3
    assert not any(name.startswith("label") for name in Probes(0).statistics(Probes(0).begin(images()), DIMS))


def test_a_perfect_reconstruction_is_finite() -> None:
    x = images()
    found = statistics(lambda *_: 2 * x - 1, x)
    assert all(value.isfinite().all() for value in found.values())


@torch.inference_mode()
def test_a_ddpms_probes_are_those_of_its_denoiser() -> None:
    """In one batch with the terms of its bound, and by the same network at the same noise."""
    torch.manual_seed(0)
    model = ddpm.Model(ddpm.Config(channels=16, multipliers=(1, 2), bound_steps=5), SPACE).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    x, seed = images(), _random.image_seed(images())
    labels = torch.tensor([-1, 0, 1, 2, -1])
    score = model.log_prob(x, labels)
    x0, one = 2 * x - 1, torch.ones(len(x))
    for sigma in CLEAN_SIGMAS:
        error = model.denoised(x0, sigma * one, labels, one) - x0
        expected = (error.flatten(1).norm(dim=1) / sigma**2).log()
        torch.testing.assert_close(score.statistics[f"log_score_norm_{sigma:g}"], expected, rtol=1e-3, atol=1e-3)
    for i, sigma in enumerate(SIGMAS):
        noise = _random.normal(seed, torch.zeros_like(seed), 1001 + i, ddpm.BOUND_NOISE, SPACE.shape)
        error = model.denoised(x0 + sigma * noise, sigma * one, labels, one) - x0
        expected = error.square().mean(dim=(1, 2, 3)).log()
        found = score.statistics[f"log_denoising_error_{sigma:g}"]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        if sigma == _denoising.FEATURE_SIGMA:
            alpha = 1 / math.sqrt(1 + sigma**2)
            here = alpha * (x0 + sigma * noise)
            _, middle = model._evaluate_with_middle(here, model._time(sigma * one), labels)
            expected = _denoising.note_features(score.features["middle"], torch.full((5,), i), middle)
            torch.testing.assert_close(score.features["middle"], expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_flow_takes_its_probes_beside_the_steps_of_its_integral() -> None:
    torch.manual_seed(0)
    model = flow_matching.Model(flow_matching.Config(channels=16, multipliers=(1, 2), score_steps=4), SPACE).eval()
    x = images()
    score = model.log_prob(x)
    found = {**score.statistics, **score.features}
    expected = statistics_by(model, x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-4)


def statistics_by(model: flow_matching.Model, x: Tensor) -> dict[str, Tensor]:
    probes, none = Probes(SPACE.classes), torch.full((len(x),), UNLABELLED)
    image = (2 * x - 1, _random.image_seed(x), none)
    start = torch.zeros(len(x), dtype=torch.int64)
    errors, features = probes.begin(x), _denoising.no_features(x, model.network.deepest)
    errors, features = _denoising.probe(probes, model.probed, errors, features, start, probes.count, image, 2)
    return {**probes.statistics(errors, DIMS), "middle": features}


def test_the_features_are_those_of_the_probe_at_their_noise() -> None:
    x = images()
    noise = _random.normal(_random.image_seed(x), torch.zeros(5, dtype=torch.int64), SIGMAS.index(0.5), 0, SPACE.shape)
    shown = (2 * x - 1 + 0.5 * noise).mean(dim=1, keepdim=True)
    expected = torch.nn.functional.adaptive_avg_pool2d(shown, _denoising.PLACES).flatten(1)
    torch.testing.assert_close(statistics(gaussian(0.5), x)["middle"], expected)


def test_a_map_shows_where_the_reconstruction_fails() -> None:
    x = images()

    def denoised(noisy: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        found = 2 * x - 1
        found[:, :, 2, 3] += 0.25
        return found

    surprise = _denoising.surprise(denoised, x, torch.full((len(x),), UNLABELLED))
    expected = torch.zeros(len(x), *SPACE.shape[1:])
    expected[:, 2, 3] = 2 * 0.25
    torch.testing.assert_close(surprise, expected)
    assert len(MAP_SIGMAS) == 3
