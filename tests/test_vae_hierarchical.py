"""The hierarchical VAE: whitened codes, KL by group, the bound against the truth, order from coarse to fine."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from models._topdown import TopDown
from models.vae import Config, Hierarchical, Model

SPACE = ImageSpace(8, 8, 1, labels=("a", "b", "c"))
TINY = Config(width=8, blocks=1, components=2, importance_samples=16, groups=(2, 1, 1), group_channels=(2, 3, 4))


def model(space: ImageSpace = SPACE, seed: int = 0, spread: float = 0.2, **changes: object) -> Hierarchical:
    """A tiny hierarchy whose every parameter is away from its start: at first, posteriors are the priors."""
    torch.manual_seed(seed)
    built = Model(dataclasses.replace(TINY, **changes), space).eval().requires_grad_(False)  # type: ignore[arg-type]
    assert isinstance(built, Hierarchical)
    for parameter in built.parameters():
        parameter.add_(spread * torch.randn_like(parameter))
    return built


def images(n: int, space: ImageSpace = SPACE, seed: int = 0) -> Tensor:
    """Random images on the grid k / 255."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, *space.shape), generator=generator) / 255


def noise(vae: Hierarchical, n: int, seed: int = 0) -> Tensor:
    return torch.randn(n, vae.numbers, generator=torch.Generator().manual_seed(seed))


LABELS = torch.tensor([0, 2, UNLABELLED, 1])


# -------------------------------------------------------------------------------------------------- codes and densities


def test_what_inference_decodes_is_what_its_code_decodes_to() -> None:
    vae, x = model(), images(4)
    found = vae.infer(x, LABELS, noise(vae, 12))
    torch.testing.assert_close(vae.decode(found.code, LABELS.repeat_interleave(3)), found.params, rtol=1e-4, atol=1e-5)


def test_the_samples_of_an_image_stand_together() -> None:
    vae, x, epsilon = model(), images(4), noise(model(), 12)
    together = vae.infer(x, LABELS, epsilon)
    for k in range(3):
        single = vae.infer(x, LABELS, epsilon[k::3])
        for ours, theirs in zip(together, single, strict=True):
            torch.testing.assert_close(ours[k::3], theirs, rtol=1e-4, atol=1e-4)


def test_kl_and_ratio_are_those_of_the_gaussians_that_are_not_whitened() -> None:
    """One group: p and q as torch.distributions has them, z in its own units."""
    vae, x = model(groups=(1,), group_channels=(3,)), images(4)
    net, epsilon = vae.top_down, noise(vae, 4)
    (group,) = net.levels[0]
    mean, log_std, h = group.read(net.places[0] + net.labels[0](LABELS % 4)[:, :, None, None])
    change_of_mean, change = group.differ(h, net.features(x)[0])
    p = torch.distributions.Normal(mean, log_std.exp())
    q = torch.distributions.Normal(mean + change_of_mean, (log_std + change).exp())
    z = q.mean + q.stddev * epsilon.view_as(mean)
    found = vae.infer(x, LABELS, epsilon)
    kl = torch.distributions.kl_divergence(q, p).flatten(1).sum(dim=1)
    torch.testing.assert_close(found.kl[:, 0], kl, rtol=1e-4, atol=1e-4)
    ratio = (p.log_prob(z) - q.log_prob(z)).flatten(1).sum(dim=1)
    torch.testing.assert_close(found.log_ratio, ratio, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.code, ((z - mean) / p.stddev).flatten(1), rtol=1e-4, atol=1e-4)


def test_the_log_ratio_is_minus_the_kl_on_average() -> None:
    vae, n = model(), 4_000
    found = vae.infer(images(1), LABELS[:1], noise(vae, n))
    difference = found.log_ratio + found.kl.sum(dim=1)
    assert float(difference.mean().abs()) < 4 * float(difference.std()) / math.sqrt(n)
    assert float(found.kl.min()) > 0
    assert float(found.kl.sum(dim=1).mean()) > 1, "the toy must have something to say, or it tests nothing"


def test_posteriors_begin_as_the_priors() -> None:
    fresh = model(spread=0.0)
    epsilon = noise(fresh, 4)
    found = fresh.infer(images(4), LABELS, epsilon)
    torch.testing.assert_close(found.kl, torch.zeros(4, 4))
    torch.testing.assert_close(found.log_ratio, torch.zeros(4))
    torch.testing.assert_close(found.code, epsilon)


def test_a_group_depends_on_those_above_it_alone() -> None:
    """∂ code of group j / ∂ noise of group k is zero for each k below j, and not for those above."""
    vae = model()
    epsilon = noise(vae, 2).requires_grad_()
    code = vae.infer(images(2), LABELS[:2], epsilon).code
    for j, part in enumerate(torch.split(code, vae.top_down.parts, dim=1)):
        (gradient,) = torch.autograd.grad(part.square().sum(), epsilon, retain_graph=True)
        reached = [float(g.abs().max()) > 0 for g in torch.split(gradient, vae.top_down.parts, dim=1)]
        assert reached == [k <= j for k in range(len(reached))]


def test_levels_halve_rounding_up_and_are_drawn_from_the_coarsest() -> None:
    net = TopDown((3, 28, 20), 2, (1, 0, 2, 1, 1), (4, 1, 3, 2, 5), 8, 1, torch.zeros(7))
    assert net.parts == [5 * 1 * 1, 2 * 2 * 2, 3 * 4 * 3, 3 * 4 * 3, 4 * 14 * 10]
    assert net.numbers == sum(net.parts)
    params = net.decode(torch.randn(2, net.numbers), torch.tensor([0, UNLABELLED]))
    assert params.shape == (2, 7, 28, 20)


# --------------------------------------------------------------------------------------------------------------- bounds


def test_the_bound_climbs_with_s_to_the_truth() -> None:
    """Two groups of one number each above 2×2 pixels: the integral over u ~ N(0, I) is within reach of a grid."""
    space = ImageSpace(2, 2, 1)
    shape = {"groups": (1, 1), "group_channels": (1, 1), "spread": 0.15, "seed": 1}
    x, none = images(16, space), torch.full((16,), UNLABELLED)
    axis = torch.linspace(-8, 8, 161)
    grid = torch.cartesian_prod(axis, axis)
    vae = model(space, **shape)
    params = vae.decode(grid, torch.full((len(grid),), UNLABELLED))
    log_prior = -0.5 * grid.square().sum(dim=1) - math.log(2 * math.pi) + 2 * math.log(0.1)
    exact = torch.stack(
        [
            (vae.likelihood.log_prob(params, image.expand(len(grid), -1, -1, -1)).sum(dim=(1, 2)) + log_prior)
            .double()
            .logsumexp(dim=0)
            for image in x.split(1)
        ]
    )
    scores = [model(space, importance_samples=s, **shape).log_prob(x, none) for s in (1, 8, 64, 512)]
    means = [float(score.log_prob.mean()) for score in scores]
    assert means == sorted(means)
    assert means[0] < means[-1] - 0.05, "the toy must leave the bound a gap, or it tests nothing"
    torch.testing.assert_close(scores[-1].log_prob, exact, check_dtype=False, rtol=0, atol=0.15)
    elbo = -(scores[-1].statistics["reconstruction_nats"] + scores[-1].statistics["kl_nats"])
    assert float(elbo.mean()) < means[1]


def test_the_kl_of_the_groups_sums_to_that_of_the_bound() -> None:
    vae, x = model(importance_samples=11), images(4)  # no multiple of what a step draws
    statistics = vae.log_prob(x, LABELS).statistics
    groups = [statistics[f"kl_nats_{k}"] for k in range(vae.group_count)]
    assert len(groups) == sum(TINY.groups)
    torch.testing.assert_close(sum(groups), statistics["kl_nats"])
    ((_, loss, metrics),) = vae.objective(Batch(x, LABELS, step=10, steps=10))
    torch.testing.assert_close(sum(metrics[f"kl_{k}"] for k in range(vae.group_count)), metrics["kl"])
    bits = (metrics["reconstruction"] + metrics["kl"]) / (64 * math.log(2))
    torch.testing.assert_close(loss, bits)
    torch.testing.assert_close(metrics["bits_per_dim"], bits)


def test_free_bits_are_free() -> None:
    """A group whose KL is below them costs what they are; others cost what they cost."""
    x, labels = images(6), torch.zeros(6, dtype=torch.int64)

    def loss(free_bits: float) -> tuple[float, list[float], float]:
        vae = model(free_bits=free_bits)
        torch.manual_seed(1)
        ((_, value, metrics),) = vae.objective(Batch(x, labels, step=10, steps=10))
        kls = [float(metrics[f"kl_{k}"]) for k in range(vae.group_count)]
        return float(value) * 64 * math.log(2), kls, float(metrics["reconstruction"])

    _, kls, _ = loss(0.0)
    free = sorted(kls)[1] + 1e-3  # more than two of the groups need
    total, _, reconstruction = loss(free)
    assert total == pytest.approx(reconstruction + sum(max(kl, free) for kl in kls), rel=1e-4)


# ------------------------------------------------------------------------------------------- sampling, reconstruction


def test_a_sample_is_the_decoded_noise() -> None:
    vae = model()
    hot, cold = (Draw(3, 0, 1, label=1, temperature=t) for t in (1.0, 0.0))
    image = vae.image(vae.step(vae.init([hot, cold])))
    none = torch.zeros(1, vae.numbers)
    torch.testing.assert_close(image[1:], vae.likelihood.mean(vae.decode(none, torch.tensor([1]))), rtol=0, atol=1e-5)
    assert not torch.equal(image[0], image[1])


@pytest.mark.parametrize("kind", ["flat", "hierarchical"])
def test_interpolation_ends_at_the_reconstructions(kind: str) -> None:
    config = TINY if kind == "hierarchical" else Config(latent=4, width=8, blocks=1, hidden=16, components=2)
    torch.manual_seed(0)
    vae = Model(config, SPACE).eval().requires_grad_(False)
    for parameter in vae.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    a, b = images(4), images(4, seed=1)
    line = vae.interpolate(a, b, 5, LABELS)
    assert line.shape == (4, 5, 1, 8, 8)
    torch.testing.assert_close(line[:, 0], vae.reconstruct(a, LABELS), rtol=0, atol=1e-4)
    torch.testing.assert_close(line[:, -1], vae.reconstruct(b, LABELS), rtol=0, atol=1e-4)
    back = vae.interpolate(b, a, 5, LABELS)
    torch.testing.assert_close(line, back.flip(1), rtol=0, atol=1e-4)
    steps = (line[:, 1:] - line[:, :-1]).flatten(2).norm(dim=2)
    assert (steps < (line[:, -1] - line[:, 0]).flatten(1).norm(dim=1)[:, None]).all(), "no step is the whole way"
    with pytest.raises(ValueError, match="n: 1"):
        vae.interpolate(a, b, 1, LABELS)


def test_labels_reach_prior_and_posterior() -> None:
    vae, x = model(), images(4)
    codes = torch.zeros(4, vae.numbers)
    assert (vae.decode(codes, LABELS) - vae.decode(codes, LABELS.roll(1))).flatten(1).abs().amax(dim=1).min() > 0
    assert (vae.code(x, LABELS) - vae.code(x, LABELS.roll(1))).abs().amax(dim=1).min() > 0


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_a_few_steps_of_training_teach_it() -> None:
    """Blobs whose place and size vary: the bound falls by more than a bit per pixel, reconstructions follow x."""
    torch.manual_seed(0)
    vae = Model(dataclasses.replace(TINY, groups=(1, 1), group_channels=(2, 4), importance_samples=8), SPACE)
    optimiser = torch.optim.Adam(vae.parameters(), lr=4e-3)
    grid = torch.stack(torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij"))

    def blobs(n: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, 3, (n,))
        distance = (grid - 2 - 3 * torch.rand(n, 2, 1, 1)).square().sum(dim=1, keepdim=True)
        bright = torch.exp(-distance / (1 + 2 * labels[:, None, None, None])) + 0.02 * torch.rand(n, 1, 8, 8)
        return (bright.clamp(0, 1) * 255).round() / 255, labels

    held_out, labels = blobs(128)
    with torch.no_grad():
        before = vae.log_prob(held_out, labels).log_prob.mean()
    for step in range(150):
        x, y = blobs(32)
        ((_, loss, _),) = vae.objective(Batch(x, y, step=step, steps=150))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
    vae.requires_grad_(False).eval()
    score = vae.log_prob(held_out, labels)
    assert float(score.log_prob.mean()) > float(before) + 64 * math.log(2)
    error = (held_out - vae.reconstruct(held_out, labels)).square().mean()
    assert float(error) < 0.85 * float((held_out - held_out.mean(dim=0)).square().mean())


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"groups": (1, 0), "group_channels": (2, 2)}, r"groups: \(1, 0\)"),
        ({"groups": (-1, 1), "group_channels": (2, 2)}, r"groups: \(-1, 1\)"),
        ({"group_channels": (2, 3)}, r"group_channels: \(2, 3\)"),
        ({"group_channels": (2, 3, 0)}, r"group_channels: \(2, 3, 0\)"),
        ({"free_bits": -1.0}, "free_bits: -1.0"),
    ],
)
def test_a_wrong_config_is_refused_by_field_and_value(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(dataclasses.replace(TINY, **change), SPACE)  # type: ignore[arg-type]


def test_an_image_that_cannot_be_halved_is_refused() -> None:
    with pytest.raises(ValueError, match="image: 9×8; width and height must be multiples of 2"):
        Model(TINY, ImageSpace(9, 8, 1))
