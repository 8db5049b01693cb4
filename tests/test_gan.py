"""The GAN: penalties and losses against closed forms, who gets which gradient, projection, truncation, learning."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from models import _checkpoint, _rows, gan
from models._adversarial import CriticFunction, gradient_norm_squared
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from models._residual import SelfAttention

SPACE = ImageSpace(8, 8, 1, ("ankle boot", "bag", "coat"))
TINY = gan.Config(latent=6, embedding=4, generator_channels=(8, 12), critic_channels=(8, 12), blocks=(0, 1))
SHAPES = [
    pytest.param(TINY, SPACE, id="grey"),
    pytest.param(dataclasses.replace(TINY, attention=4, spectral_norm=True), SPACE, id="attention and spectral norm"),
    pytest.param(dataclasses.replace(TINY, attention=8, objective="wgan-gp", n_critic=3), SPACE, id="wgan-gp"),
    pytest.param(TINY, ImageSpace(12, 8, 3), id="colour without labels, wider than high"),
    pytest.param(dataclasses.replace(TINY, generator="style", objective="logistic"), SPACE, id="style"),
]


def model(config: gan.Config = TINY, space: ImageSpace = SPACE, seed: int = 0) -> gan.Model:
    torch.manual_seed(seed)
    return gan.Model(config, space)


def batch(space: ImageSpace = SPACE, n: int = 6, step: int = 0) -> Batch:
    labels = torch.arange(n) % space.classes if space.classes else torch.full((n,), UNLABELLED)
    return Batch(torch.rand(n, *space.shape), labels, step=step)


@torch.inference_mode()
def draw(m: gan.Model, *draws: Draw) -> Tensor:
    return m.image(m.step(m.init(draws)))


def linear_critic(w: Tensor) -> CriticFunction:
    return lambda x, labels: x.flatten(1) @ w


# ----------------------------------------------------------------------------------------------------------- penalties


@pytest.mark.parametrize("norm", [0.25, 1.0, 3.0])
def test_penalties_of_a_linear_critic(norm: float) -> None:
    """∇ₓ ⟨w, x⟩ = w everywhere: R1 is |w|² / 2, the gradient penalty (|w| − 1)², and the gradient norm |w| is exact."""
    w = torch.randn(12, generator=torch.Generator().manual_seed(1))
    w = w / w.norm() * norm
    real, fake, labels = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2), torch.zeros(5, dtype=torch.int64)
    critic = linear_critic(w)
    assert gradient_norm_squared(critic, real, labels) == pytest.approx([norm**2] * 5, rel=1e-5)
    assert gan.r1_penalty(critic, real, labels).item() == pytest.approx(norm**2 / 2, rel=1e-5)
    assert gan.gradient_penalty(critic, real, fake, labels).item() == pytest.approx((norm - 1) ** 2, abs=1e-6)


def test_penalties_have_the_second_derivative() -> None:
    """d/dw of |w|² / 2 is w, and of (|w| − 1)² is 2 (|w| − 1) w / |w|."""
    w = torch.tensor([3.0, 4.0, 0.0, 0.0], requires_grad=True)
    x, labels = torch.randn(7, 1, 2, 2), torch.zeros(7, dtype=torch.int64)
    (r1,) = torch.autograd.grad(gan.r1_penalty(linear_critic(w), x, labels), w)
    torch.testing.assert_close(r1, w.detach())
    (gp,) = torch.autograd.grad(gan.gradient_penalty(linear_critic(w), x, -x, labels), w)
    torch.testing.assert_close(gp, 2 * (5 - 1) * w.detach() / 5)


def test_the_gradient_penalty_looks_between_real_and_fake() -> None:
    """Where |∇ D| depends on x, it is taken at points of the segment: for D = x²/2 in one dimension |∇ D| = |x|."""
    seen: list[Tensor] = []

    def critic(x: Tensor, labels: Tensor) -> Tensor:
        seen.append(x.detach())
        return x.flatten(1).square().sum(dim=1) / 2

    real, fake = torch.full((500, 1, 1, 1), 3.0), torch.full((500, 1, 1, 1), 1.0)
    penalty = gan.gradient_penalty(critic, real, fake, torch.zeros(500, dtype=torch.int64))
    assert 1 <= seen[0].min() < 1.1 < 2.9 < seen[0].max() <= 3
    assert penalty.item() == pytest.approx(4 / 3, rel=0.1)  # E (x − 1)² for x uniform on [1, 3]


def test_a_flat_critic_has_a_finite_penalty_gradient() -> None:
    """The norm's root has no derivative at zero: a critic that starts flat still gets finite gradients."""
    w = torch.zeros(4, requires_grad=True)
    x, labels = torch.randn(3, 1, 2, 2), torch.zeros(3, dtype=torch.int64)
    penalty = gan.gradient_penalty(linear_critic(w), x, -x, labels)
    assert penalty.item() == pytest.approx(1, abs=1e-4)
    assert torch.autograd.grad(penalty, w)[0].isfinite().all()


def test_penalties_ignore_autocast() -> None:
    """The same value, in float32, inside bfloat16 autocast."""
    m, b = model(), batch()
    outside = gan.r1_penalty(m.critic, 2 * b.x - 1, b.labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gan.r1_penalty(m.critic, 2 * b.x - 1, b.labels)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


@pytest.mark.parametrize("attention", [0, 4])
def test_penalty_gradient_is_that_of_finite_differences(attention: int) -> None:
    """Double differentiation through the whole critic, attention included."""
    m = model(dataclasses.replace(TINY, attention=attention)).double()
    for layer in m.modules():
        if isinstance(layer, SelfAttention):
            nn.init.constant_(layer.gamma, 0.7)
    x, labels = torch.rand(3, 1, 8, 8, dtype=torch.float64), torch.tensor([0, 2, 1])

    def r1() -> Tensor:
        return gan.r1_penalty(m.critic, x, labels)

    weight = m.critic.mix.weight
    (gradient,) = torch.autograd.grad(r1(), weight)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            weight += sign * 1e-3 * direction
            with torch.enable_grad():
                values.append(r1().item())
            weight -= sign * 1e-3 * direction
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(gradient.norm().item(), rel=1e-3)


# -------------------------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize(
    ("real", "fake", "loss"),
    [
        ([1.0, 5.0], [-1.0, -9.0], 0),
        ([0.0, 0.0], [0.0, 0.0], 2),
        ([-1.0, 1.0], [1.0, -1.0], 2),
        ([0.5, 2.0], [-0.5, 0.0], 0.25 + 0.75),
    ],
)
def test_hinge_loss_by_hand(real: list[float], fake: list[float], loss: float) -> None:
    assert gan.hinge_loss(torch.tensor(real), torch.tensor(fake)).item() == pytest.approx(loss)


def test_logistic_loss_by_hand() -> None:
    """log 2 for each undecided logit; log(1 + e^−x) is nothing far on the right side, and −x far on the wrong one."""
    none, far = torch.zeros(3), torch.full((3,), 40.0)
    assert gan.logistic_loss(none, none).item() == pytest.approx(2 * math.log(2))
    assert gan.logistic_loss(far, -far).item() == pytest.approx(0, abs=1e-6)
    assert gan.logistic_loss(-far, far).item() == pytest.approx(80)


@given(shift=st.floats(-5, 5), gap=st.floats(-5, 5))
@settings(max_examples=25, deadline=None)
def test_wasserstein_loss_is_the_negated_gap_whatever_the_offset(shift: float, gap: float) -> None:
    fake = torch.tensor([-1.0, 0.0, 1.0]) + shift
    assert gan.wasserstein_loss(fake + gap, fake).item() == pytest.approx(-gap, abs=1e-5)


# ----------------------------------------------------------------------------------------------------------- objective


@pytest.mark.parametrize(("config", "space"), SHAPES)
def test_each_loss_reaches_its_own_group_only(config: gan.Config, space: ImageSpace) -> None:
    m = model(config, space)
    groups = m.groups()
    names = []
    for group, loss, metrics in m.objective(batch(space, step=config.penalty_every - 1)):
        names.append(group)
        other = groups["generator" if group == "critic" else "critic"]
        assert loss.dtype == torch.float32
        assert loss.isfinite()
        assert all(not value.requires_grad and value.dim() == 0 for value in metrics.values())
        own = torch.autograd.grad(loss, groups[group], retain_graph=True, allow_unused=True)
        assert all(g is not None and g.isfinite().all() for g in own)
        assert all(g is None for g in torch.autograd.grad(loss, other, allow_unused=True))
    assert names == ["critic"] * config.n_critic + ["generator"]


def test_groups_are_all_parameters_once() -> None:
    m = model(dataclasses.replace(TINY, spectral_norm=True))
    grouped = [id(p) for parameters in m.groups().values() for p in parameters]
    assert sorted(grouped) == sorted(id(p) for p in m.parameters())


def test_the_generator_sees_the_updated_critic() -> None:
    """Halving the critic's last layer between the two losses, offset and all, halves the generator's loss."""
    m, b = model(), batch()

    def losses(scale: float) -> list[float]:
        torch.manual_seed(3)
        found = []
        with_update = m.objective(b)
        for _group, loss, _metrics in with_update:
            found.append(loss.item())
            with torch.no_grad():
                for p in [*m.critic.output.parameters(), *m.critic.classes.parameters()]:
                    p.mul_(scale)
        with torch.no_grad():
            for p in [*m.critic.output.parameters(), *m.critic.classes.parameters()]:
                p.mul_(scale**-2)
        return found

    before, after = losses(1.0), losses(0.5)
    assert after[0] == before[0]
    assert after[1] == pytest.approx(before[1] / 2, rel=1e-5)


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_one_autocast_around_the_whole_objective(precision: torch.dtype | None) -> None:
    """The loop keeps one autocast open over all losses of a step and forgets the casts after each update."""
    m = model(dataclasses.replace(TINY, objective="wgan-gp", n_critic=2))
    groups = m.groups()
    with torch.autocast("cpu", dtype=precision, enabled=precision is not None):
        for group, loss, _metrics in m.objective(batch(step=m.config.penalty_every - 1)):
            gradients = torch.autograd.grad(loss, groups[group])
            assert all(g.isfinite().all() for g in gradients)
            assert sum(g.abs().sum() for g in gradients) > 0
            with torch.no_grad():
                for p, g in zip(groups[group], gradients, strict=True):
                    p -= 1e-3 * g
            torch.clear_autocast_cache()


def test_the_penalty_is_lazy_and_keeps_its_mean_weight() -> None:
    config = dataclasses.replace(TINY, penalty=2.0, penalty_every=4)
    m = model(config)
    plain = model(dataclasses.replace(config, penalty=0.0))
    for step in range(6):
        torch.manual_seed(5)
        _, loss, metrics = next(m.objective(b := batch(step=step)))
        torch.manual_seed(5)
        _, bare, nothing = next(plain.objective(batch(step=step)))
        assert "critic penalty" not in nothing
        assert ("critic penalty" in metrics) == (step % 4 == 3)
        if step % 4 == 3:
            penalty = gan.r1_penalty(m.critic, 2 * b.x - 1, b.labels)
            torch.testing.assert_close(loss - bare, 4 * 2.0 * penalty, rtol=1e-4, atol=1e-5)
        else:
            torch.testing.assert_close(loss, bare)


def test_critic_updates_see_disjoint_parts_of_the_batch() -> None:
    m = model(dataclasses.replace(TINY, objective="wgan-gp", n_critic=3))
    seen: list[Tensor] = []
    m.critic.layers.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    b = batch(n=6)
    list(m.objective(b))  # a step without a penalty: one forward pass each
    real = torch.cat([x[: x.shape[0] // 2] for x in seen[:3]])
    torch.testing.assert_close(real, 2 * b.x - 1)
    assert len(seen) == 4
    assert seen[3].shape[0] == 6


# ------------------------------------------------------------------------------------------------------------ networks


def test_projection_is_the_inner_product_of_class_and_features() -> None:
    """D(x, a) − D(x, b) = ⟨e_a − e_b, φ(x)⟩, and without a label nothing is projected."""
    m, b = model(), batch()
    embeddings, features = m.critic.classes.weight, m.critic.features(b.x)
    for y in range(3):
        for other in range(3):
            difference = m.critic(b.x, torch.full((6,), y)) - m.critic(b.x, torch.full((6,), other))
            torch.testing.assert_close(difference, features @ (embeddings[y] - embeddings[other]), rtol=1e-4, atol=1e-5)
    alone = m.critic(b.x, torch.full((6,), UNLABELLED))
    torch.testing.assert_close(alone, m.critic.output(features)[:, 0])


def test_spectral_norm_makes_every_layer_of_the_critic_one_lipschitz() -> None:
    """Each weight matrix's largest singular value is 1 once power iteration has converged, however large it was."""
    m = model(dataclasses.replace(TINY, spectral_norm=True, attention=4)).train()
    layers = [(n, c) for n, c in m.critic.named_modules() if isinstance(c, nn.Conv2d | nn.Linear | nn.Embedding)]
    with torch.no_grad():
        for _, layer in layers:
            layer.parametrizations.weight.original.mul_(7)
        for _ in range(300):
            for _, layer in layers:
                layer.weight  # noqa: B018 — each access in training mode is a power iteration
        for name, layer in layers:
            sigma = torch.linalg.matrix_norm(layer.weight.flatten(1), ord=2).item()
            assert sigma == pytest.approx(1, abs=2e-3), name
        x = torch.randn(2, m.critic.mix.in_features)
        out = m.critic.mix(x)
        assert (out[0] - out[1]).norm() <= (x[0] - x[1]).norm() * 1.002


def test_spectral_norm_survives_the_state_dict() -> None:
    config = dataclasses.replace(TINY, spectral_norm=True)
    m, other = model(config, seed=0).eval(), model(config, seed=1).eval()
    state = m.state_dict()
    assert len({t.data_ptr() for t in state.values() if t.numel()}) == len(
        state
    )  # nothing shared: safetensors takes it
    other.load_state_dict(state)
    b = batch()
    torch.testing.assert_close(other.critic(b.x, b.labels), m.critic(b.x, b.labels), rtol=0, atol=0)


def test_self_attention_starts_as_the_identity_and_then_looks_everywhere() -> None:
    torch.manual_seed(0)
    layer, x = SelfAttention(16), torch.randn(2, 16, 4, 4, requires_grad=True)
    torch.testing.assert_close(layer(x), x, rtol=0, atol=0)
    nn.init.ones_(layer.gamma)
    (gradient,) = torch.autograd.grad(layer(x)[0, :, 0, 0].sum(), x)
    assert (gradient[0].abs().sum(dim=0) > 0).all()  # one output position depends on every input position
    assert (gradient[1] == 0).all()  # and on no other row


def test_self_attention_weights_are_a_distribution() -> None:
    """Where every position holds the same value, the attended value is that value: the weights sum to one."""
    torch.manual_seed(0)
    layer = SelfAttention(16)
    nn.init.ones_(layer.gamma)
    x = torch.randn(1, 16, 1, 1).expand(1, 16, 3, 5)
    value = layer.mix(x)[:, 2 * layer.inner :]
    torch.testing.assert_close(layer(x), x + layer.output(value))


@pytest.mark.parametrize(("config", "space"), SHAPES)
def test_the_critic_judges_each_image_by_itself(config: gan.Config, space: ImageSpace) -> None:
    m, b = model(config, space).eval(), batch(space)
    alone = torch.cat([m.critic(b.x[i : i + 1], b.labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(m.critic(b.x, b.labels), alone, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ sampling


@pytest.mark.parametrize("n", [1, 2, 3, 5, 7])
def test_an_image_is_the_same_to_the_last_bit_in_any_batch(n: int) -> None:
    """So that the service need not fill up a lone one with others."""
    space = ImageSpace(28, 28, 1, SPACE.labels)
    m = model(
        dataclasses.replace(
            TINY, latent=64, embedding=32, generator_channels=(16, 64, 96), critic_channels=(8, 8, 8), blocks=(0, 0, 1)
        ),
        space,
    )
    draws = [Draw(seed=k, sample=0, steps=1, label=k % 3) for k in range(16)]
    assert torch.equal(draw(m, *draws[:n]), draw(m, *draws)[:n])


@pytest.mark.parametrize(("config", "space"), SHAPES)
def test_alone_is_as_in_a_crowd(config: gan.Config, space: ImageSpace) -> None:
    m = model(config, space).eval()
    labels = [0, 2, UNLABELLED] if space.classes else [UNLABELLED]
    draws = [
        Draw(seed=2**64 - 1 - i // 2, sample=i % 2, steps=1, label=labels[i % len(labels)], temperature=i / 6)
        for i in range(8)
    ]
    crowd = draw(m, *draws)
    for i, one in enumerate(draws):
        torch.testing.assert_close(draw(m, one)[0], crowd[i], rtol=0, atol=2e-6)
    with torch.inference_mode():
        mixed = _rows.take(_rows.cat([m.init(draws[5:]), m.init(draws[:5])]), [4, 1, 7])
        torch.testing.assert_close(m.image(m.step(mixed)), crowd[[1, 6, 4]], rtol=0, atol=2e-6)


def test_preview_is_mid_grey_and_the_image_lies_in_range() -> None:
    m = model().eval()
    with torch.inference_mode():
        rows = m.init([Draw(seed=1, sample=i, steps=1, label=i % 3, temperature=1.5) for i in range(9)])
        assert (m.image(rows) == 0.5).all()
        assert rows.left.tolist() == [1] * 9
        rows = m.step(rows)
        assert rows.left.tolist() == [0] * 9
        assert rows.tick.tolist() == [1] * 9
        image = m.image(rows)
    assert image.shape == (9, *SPACE.shape)
    assert image.min() >= 0
    assert image.max() <= 1


def test_temperature_zero_is_one_image_per_class() -> None:
    m = model().eval()
    cold = [Draw(seed=i, sample=i, steps=1, label=i % 3, temperature=0.0) for i in range(9)]
    images = draw(m, *cold)
    for i in range(3, 9):
        torch.testing.assert_close(images[i], images[i % 3], rtol=0, atol=1e-6)
    assert (images[0] - images[1]).abs().max() > 1e-3
    warm = draw(m, *(dataclasses.replace(d, temperature=1.0) for d in cold))
    assert (warm[0] - warm[3]).abs().max() > 1e-3


def test_temperature_scales_the_code() -> None:
    m = model()
    rows = m.init([Draw(seed=4, sample=0, steps=1, label=0, temperature=t) for t in (1.0, 0.5)])
    assert torch.equal(rows.z[0], rows.z[1])
    halved = m.generator(rows.z[1:] / 2, rows.condition[1:])
    torch.testing.assert_close(m.image(m.step(rows))[1:], (halved + 1) / 2)
    many = m.init([Draw(seed=s, sample=0, steps=1, label=0) for s in range(3000)]).z
    assert many.mean().abs() < 0.03
    assert many.std().item() == pytest.approx(1, abs=0.03)


def test_unlabelled_draws_a_class_of_its_own_uniformly() -> None:
    m = model().eval()
    n = 3000
    rows = m.init([Draw(seed=5, sample=i, steps=1) for i in range(n)])
    counts = torch.bincount(rows.condition, minlength=3)
    assert len(counts) == 3
    deviation = math.sqrt(n * (1 / 3) * (2 / 3))
    assert ((counts - n / 3).abs() < 4 * deviation).all()
    again = m.init([Draw(seed=5, sample=i, steps=1) for i in (7, 3)])
    assert again.condition.tolist() == rows.condition[[7, 3]].tolist()
    # The label drawn is what the image shows: asking for it by name gives the same image.
    named = draw(m, *(Draw(seed=5, sample=i, steps=1, label=int(rows.condition[i])) for i in range(6)))
    torch.testing.assert_close(draw(m, *(Draw(seed=5, sample=i, steps=1) for i in range(6))), named, rtol=0, atol=0)


def test_a_checkpoint_holds_the_generator_alone_and_draws_the_same(tmp_path: Path) -> None:
    config = dataclasses.replace(TINY, reconstruction=1.0)
    m = model(config).eval()
    _checkpoint.save(tmp_path, m, config, {})
    assert {name.split(".")[0] for name in load_file(tmp_path / _checkpoint.WEIGHTS)} == {"generator"}
    loaded = _checkpoint.load(tmp_path)
    assert isinstance(loaded, gan.Model)
    asked = [Draw(seed=7, sample=i, steps=1, label=1) for i in range(3)]
    assert torch.equal(draw(loaded, *asked), draw(m, *asked))


def test_a_training_batch_may_lack_labels() -> None:
    m, b = model(), batch()
    b.labels[::2] = UNLABELLED
    for _group, loss, _metrics in m.objective(b):
        assert loss.isfinite()


# ------------------------------------------------------------------------------------------------------------- encoder


def test_the_encoder_sees_where_things_lie_and_nothing_finer_or_coloured() -> None:
    m = model(dataclasses.replace(TINY, reconstruction=1.0), ImageSpace(12, 8, 3))
    assert m.encoder is not None
    x = torch.rand(2, 3, 8, 12) * 2 - 1
    q = m.encoder(x)
    for change in (x.roll(1, dims=1), x.view(2, 3, 2, 4, 12).flip(3).reshape(x.shape)):  # colours; rows of every cell
        for one, other in zip(q, m.encoder(change), strict=True):
            torch.testing.assert_close(one, other)
    moved = m.encoder(x.roll(gan.COARSE, dims=3))
    assert (moved.mean - q.mean).abs().max() > 1e-3


def test_half_of_the_codes_come_from_the_images_and_only_the_generators_turn_teaches_the_encoder() -> None:
    m, b = model(dataclasses.replace(TINY, reconstruction=1.0)), batch(n=6)
    assert m.encoder is not None
    weights = list(m.encoder.parameters())
    z, kl = m._codes(2 * b.x - 1, 3)
    assert z.shape == (6, 6)
    assert kl is not None
    assert kl.shape == (3,)
    assert (kl >= 0).all()
    assert torch.autograd.grad(z[3:].sum() + 0 * z[:3].sum(), weights[0])[0].abs().max() == 0
    turns = list(m.objective(b))
    assert [group for group, *_ in turns] == ["critic", "generator"]
    for group, loss, metrics in turns:
        found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
        assert all((g is None) == (group == "critic") for g in found)
        assert ("reconstruction" in metrics) == (group == "generator")
    m = model(dataclasses.replace(TINY, reconstruction=1.0, critic_from=0.5))
    for step, groups in ((4, ["generator"]), (5, ["critic", "generator"])):
        assert [group for group, *_ in m.objective(dataclasses.replace(b, step=step, steps=10))] == groups


@pytest.mark.slow
def test_drawn_anew_things_lie_where_they_lay() -> None:
    """8×8 images, dark but for one quarter, which the label does not tell: after training, G(E(x)) has it there."""
    space = ImageSpace(8, 8, 1, ("bright", "brighter"))
    config = dataclasses.replace(TINY, blocks=(0, 0), reconstruction=3.0, penalty=0.1)
    m = model(config, space)
    assert m.encoder is not None
    groups = m.groups()
    optimisers = {name: torch.optim.Adam(p, lr=3e-3, betas=(0.0, 0.99)) for name, p in groups.items()}

    def some(n: int) -> tuple[Tensor, Tensor, Tensor]:
        quarter, labels = torch.randint(0, 4, (n,)), torch.randint(0, 2, (n,))
        x = torch.full((n, 1, 2, 4, 2, 4), 0.1)
        x[torch.arange(n), 0, quarter // 2, :, quarter % 2] = 0.6 + 0.3 * labels[:, None, None]
        return x.view(n, 1, 8, 8), labels, quarter

    for step in range(250):
        x, labels, _ = some(32)
        for group, loss, _metrics in m.objective(Batch(x, labels, step=step)):
            for p, g in zip(groups[group], torch.autograd.grad(loss, groups[group]), strict=True):
                p.grad = g
            optimisers[group].step()
    x, labels, quarter = some(64)
    with torch.inference_mode():
        anew = m._draw(labels, m.encoder(2 * x - 1).mean)
    brightness = anew.view(64, 2, 4, 2, 4).mean(dim=(2, 4)).flatten(1)
    assert (brightness.argmax(dim=1) == quarter).float().mean() > 0.9


# -------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"objective": "softplus"}, "objective"),
        ({"latent": 0}, "latent"),
        ({"embedding": 0}, "embedding"),
        ({"n_critic": 0}, "n_critic"),
        ({"penalty": -1.0}, "penalty"),
        ({"penalty_every": 0}, "penalty_every"),
        ({"generator_channels": (8,)}, "generator_channels"),
        ({"critic_channels": (8, 8, 8)}, "critic_channels"),
        ({"blocks": (1,)}, "blocks"),
        ({"blocks": (-1, 0)}, "blocks"),
        ({"attention": 5}, "attention"),
        ({"generator": "stylish"}, "generator"),
        ({"mapping_layers": 0}, "mapping_layers"),
        ({"text_width": 6}, "text_width"),
        ({"text_layers": 0}, "text_layers"),
        ({"caption_dropout": 1.5}, "caption_dropout"),
        ({"contrast": -1.0}, "contrast"),
        ({"features": -1}, "features"),
        ({"reconstruction": -1.0}, "reconstruction"),
        ({"reconstruction": 1.0, "critic_from": 1.0}, "critic_from"),
        ({"critic_from": 0.5}, "critic_from"),
        ({"generator_channels": (4,) * 5, "critic_channels": (4,) * 5, "blocks": (0,) * 5}, "generator_channels"),
    ],
)
def test_a_wrong_config_is_refused_by_name(change: dict[str, object], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        gan.Model(dataclasses.replace(TINY, **change), SPACE)


def test_captions_need_the_style_generator() -> None:
    with pytest.raises(ValueError, match='generator: "residual"'):
        gan.Model(TINY, ImageSpace(8, 8, 1, captions=True))


# ------------------------------------------------------------------------------------------------------------ learning


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["hinge", "wgan-gp"])
def test_learns_two_clusters_of_tiny_images(objective: str) -> None:
    """2×2 images around a centre per class, with one bright direction: the class means and the spread are learnt."""
    space = ImageSpace(2, 2, 1, ("a", "b"))
    centres = torch.tensor([[0.7, 0.3, 0.3, 0.7], [0.3, 0.6, 0.6, 0.3]])
    config = gan.Config(
        objective=objective,
        latent=4,
        embedding=4,
        generator_channels=(8, 16),
        critic_channels=(8, 16),
        blocks=(0, 0),
        penalty=0.1 if objective == "hinge" else 1.0,
        penalty_every=4 if objective == "hinge" else 1,
    )
    m = model(config, space)
    groups = m.groups()
    optimisers = {name: torch.optim.Adam(p, lr=5e-3, betas=(0.0, 0.99)) for name, p in groups.items()}
    average = torch.optim.swa_utils.AveragedModel(m, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.98))
    for step in range(300):
        labels = torch.randint(0, 2, (64,))
        x = centres[labels] + 0.1 * torch.randn(64, 1) * torch.tensor([1.0, 1.0, -1.0, -1.0])
        for group, loss, _metrics in m.objective(Batch(x.clamp(0, 1).view(-1, 1, 2, 2), labels, step=step)):
            for p, g in zip(groups[group], torch.autograd.grad(loss, groups[group]), strict=True):
                p.grad = g
            optimisers[group].step()
        average.update_parameters(m)
    m = average.module.eval()
    for label in (0, 1):
        images = draw(m, *(Draw(seed=9, sample=i, steps=1, label=label) for i in range(500))).view(500, 4)
        torch.testing.assert_close(images.mean(dim=0), centres[label], rtol=0, atol=0.05)
        spread = (images - images.mean(dim=0)) @ torch.tensor([0.25, 0.25, -0.25, -0.25])
        assert 0.04 < spread.std() < 0.16  # 0.1 in the data: neither collapsed nor scattered
