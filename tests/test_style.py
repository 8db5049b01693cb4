"""The style generator: modulation against explicit weights, demodulation, noise, truncation."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models import gan
from models._protocol import UNLABELLED, Draw, ImageSpace
from models._style import ModulatedConv, StyleGenerator

SPACE = ImageSpace(8, 8, 1, ("ankle boot", "bag", "coat"))
TINY = gan.Config(
    latent=6,
    embedding=4,
    generator_channels=(8, 12),
    critic_channels=(8, 12),
    blocks=(0, 0),
    generator="style",
)


def model(space: ImageSpace = SPACE, strength: float = 0.3, **changes: object) -> gan.Model:
    """A tiny GAN whose layers add noise at that strength: they begin without."""
    torch.manual_seed(0)
    built = gan.Model(dataclasses.replace(TINY, **changes), space).eval().requires_grad_(False)  # type: ignore[arg-type]
    for name, parameter in built.generator.named_parameters():
        if name.endswith("strength"):
            parameter.fill_(strength)
    return built


@torch.inference_mode()
def draw(m: gan.Model, *draws: Draw) -> Tensor:
    return m.image(m.step(m.init(draws)))


# ----------------------------------------------------------------------------------------------------------- modulation


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("kernel", [1, 3])
def test_modulated_convolution_is_one_convolution_for_each_row(demodulate: bool, kernel: int) -> None:
    """With weights s_i w_ijk, divided by their norm over i and k (1912.04958, eq. 1 and 3)."""
    torch.manual_seed(0)
    layer = ModulatedConv(5, 7, kernel, width=4, demodulate=demodulate)
    x, w = torch.randn(3, 5, 6, 4), torch.randn(3, 4)
    rows = []
    for image, s in zip(x, layer.affine(w), strict=True):
        weight = layer.weight * s[None, :, None, None]
        if demodulate:
            weight = weight / weight.square().sum(dim=(1, 2, 3), keepdim=True).add(1e-8).sqrt()
        rows.append(F.conv2d(image[None], weight, padding=kernel // 2))
    torch.testing.assert_close(layer(x, w), torch.cat(rows), rtol=1e-4, atol=1e-5)


def test_demodulated_outputs_have_unit_variance_whatever_the_style() -> None:
    torch.manual_seed(0)
    layer = ModulatedConv(6, 9, 3, width=4)
    with torch.no_grad():
        layer.weight.mul_(5)
        w = 3 * torch.randn(4, 4)
        inside = layer(torch.randn(4, 6, 66, 66), w)[:, :, 1:-1, 1:-1]
    torch.testing.assert_close(inside.flatten(2).std(dim=2), torch.ones(4, 9), rtol=0, atol=0.1)


def test_styles_scale_nothing_but_their_own_row() -> None:
    torch.manual_seed(0)
    layer, x = ModulatedConv(5, 7, 3, width=4), torch.randn(2, 5, 6, 6)
    w = torch.randn(2, 4, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x, w)[0].square().sum(), w)
    assert gradient[0].abs().max() > 0
    assert (gradient[1] == 0).all()


# ---------------------------------------------------------------------------------------------------------------- noise


def test_noise_belongs_to_the_row() -> None:
    m = model()
    draws = [Draw(seed=5, sample=k, steps=1, label=0, temperature=0.0) for k in range(4)]
    crowd = draw(m, *draws)
    assert (crowd[:1] - crowd[1:]).flatten(1).abs().amax(dim=1).min() > 1e-2, "the noise is left at temperature 0"
    for k in (0, 3):
        alone = draw(m, *[draws[k]] * 4)
        torch.testing.assert_close(alone, crowd[k].expand_as(alone), rtol=0, atol=1e-5)


def test_every_layer_has_noise_of_its_own() -> None:
    """The strength of each layer is told another noise: no two of the same resolution are alike."""
    m = model()
    generator = m.generator
    assert isinstance(generator, StyleGenerator)
    assert generator.noise_shapes == [(1, 4, 4), (1, 8, 8), (1, 8, 8)]
    seen: list[Tensor] = []
    for stage in generator.stages:
        stage.register_forward_pre_hook(lambda module, args: seen.extend(args[2]))
    draw(m, Draw(seed=5, sample=0, steps=1, label=0))
    assert [tuple(noise.shape[1:]) for noise in seen] == generator.noise_shapes
    assert not torch.equal(seen[1], seen[2])


def test_without_strength_there_is_no_noise() -> None:
    m = model(strength=0.0)
    a, b = draw(m, *(Draw(seed=s, sample=0, steps=1, label=0, temperature=0.0) for s in (1, 2)))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- truncation


def test_truncation_goes_to_the_mean_style_of_the_class() -> None:
    """w(ψ) = w̄ + ψ (w − w̄), where w̄ is the mean over many latent codes."""
    m = model()
    generator = m.generator
    assert isinstance(generator, StyleGenerator)
    styles: list[Tensor] = []
    generator.stages[0].register_forward_pre_hook(lambda module, args: styles.append(args[1]))
    psi = (0.0, 0.5, 1.0, 1.5)
    draw(m, *(Draw(seed=3, sample=0, steps=1, label=1, temperature=t) for t in psi))
    (w,) = styles
    mean = generator.mean_style(torch.tensor([1]))[0]
    for t, style in zip(psi, w, strict=True):
        torch.testing.assert_close(style, mean + t * (w[2] - mean), rtol=1e-4, atol=1e-5)
    codes = torch.randn(20_000, TINY.latent, generator=torch.Generator().manual_seed(1))
    label = generator.told(torch.ones(len(codes), dtype=torch.int64))
    everything = generator.mapping(codes, label)
    distance = (mean - everything.mean(dim=0)).norm() / everything.std(dim=0).norm()
    assert distance < 3 / len(generator.centres) ** 0.5
    assert not torch.allclose(mean, generator.mean_style(torch.tensor([2]))[0], atol=1e-3)


def test_at_temperature_zero_a_class_has_one_style() -> None:
    m = model(strength=0.0)
    images = draw(m, *(Draw(seed=i, sample=i, steps=1, label=i % 3, temperature=0.0) for i in range(6)))
    torch.testing.assert_close(images[:3], images[3:], rtol=0, atol=1e-6)
    assert (images[0] - images[1]).abs().max() > 1e-3


def test_the_length_of_a_latent_code_says_nothing() -> None:
    m = model()
    z, labels, noise = torch.randn(2, 6), torch.tensor([0, 1]), [torch.zeros(2, *s) for s in m.generator.noise_shapes]
    torch.testing.assert_close(m.generator(3 * z, labels, noise), m.generator(z, labels, noise), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("space", [ImageSpace(12, 8, 3), ImageSpace(28, 28, 1, ("a", "b"))])
def test_other_sizes_and_colours_work(space: ImageSpace) -> None:
    m = model(space, generator_channels=(4, 8, 8), critic_channels=(4, 8, 8), blocks=(0, 0, 0))
    images = draw(m, *(Draw(seed=1, sample=k, steps=1, label=UNLABELLED) for k in range(2)))
    assert images.shape == (2, *space.shape)
    assert not torch.equal(images[0], images[1])


def test_each_resolution_adds_to_the_image() -> None:
    m = model()
    base = draw(m, Draw(seed=1, sample=0, steps=1, label=0))
    for stage in m.generator.stages:
        before = stage.bias.clone()
        stage.bias.add_(0.5)
        assert (draw(m, Draw(seed=1, sample=0, steps=1, label=0)) > base).all()
        stage.bias.copy_(before)
