"""Boltzmann machines against enumeration: partition functions, likelihoods, gradients, Gibbs sampling, learning."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from models import _grey, _random
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from models.boltzmann import Config, GibbsRows, Model, States, bits_of, bytes_of

TWO = ImageSpace(width=2, height=1, channels=1, labels=("a", "b"))
machines = pytest.mark.parametrize("hidden", [(4,), (3, 2), (3, 2, 2)])


def machine(hidden: tuple[int, ...], space: ImageSpace = TWO, scale: float = 1.5, **config: Any) -> Model:
    """Random weights that are far from independence, in float64 where a test asks for it."""
    torch.manual_seed(len(hidden))
    settings = {"chains": 4, "particles": 4, "temperatures": 3, "mean_field": 100} | config
    model = Model(Config(hidden=hidden, **settings), space)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
        model.base.copy_(torch.randn_like(model.base))
        model.offset.copy_(torch.rand_like(model.offset))
        model.prior.copy_(torch.tensor([0.3, 0.7][: len(model.prior)]).log())
    return model.eval()


def hidden_states(model: Model) -> States:
    """Every configuration of the hidden layers; s₀ is left open. (2^units, ...)"""
    bits = torch.tensor(list(itertools.product((-0.5, 0.5), repeat=sum(model.config.hidden))), dtype=torch.float64)
    layers = torch.split(bits, list(model.config.hidden), dim=1)
    return [bits.new_zeros(len(bits), len(model.base)), *layers]


def log_weights(model: Model, label: int, states: States) -> Tensor:
    """log Σ_x e^{−E} of each configuration of the hidden layers, the pixels summed out; written out afresh."""
    a, w = model.biases[0].double(), [weight.double() for weight in model.weights]
    u, theta = (a + states[1] @ w[0].mT).chunk(2, dim=1)
    k = torch.arange(1, 256, dtype=torch.float64) / 255
    on = (theta[..., None] * k).logsumexp(dim=-1)
    total = torch.nn.functional.softplus(u + on).sum(dim=1)
    total = total - model.offset.double() @ a - (states[1] @ w[0].mT) @ model.offset.double()
    for layer in range(1, len(states)):
        total = total + states[layer] @ model.biases[layer].double()
        if layer > 1:
            total = total + ((states[layer - 1] @ w[layer - 1]) * states[layer]).sum(dim=1)
    assert model.top is not None
    total += states[-1] @ model.top[label].double()
    result: Tensor = total
    return result


def log_z(model: Model) -> Tensor:
    """(classes,) by enumeration."""
    states = hidden_states(model)
    return torch.stack([log_weights(model, y, states).logsumexp(dim=0) for y in range(2)])


def every_image() -> Tensor:
    """(65536, 1, 1, 2)"""
    k = torch.arange(256)
    return torch.cartesian_prod(k, k).view(-1, 1, 1, 2) / 255


def with_exact_log_z(model: Model) -> Model:
    with torch.no_grad():
        model.log_z.copy_(torch.stack([log_z(model), log_z(model), torch.zeros(2)]))
    return model


# -------------------------------------------------------------------------------------------------------- visible units

THETA = torch.tensor([-2000.0, -300, -7, -0.5, -0.03, -1e-4, 0, 1e-6, 0.02, 0.4, 5, 200, 1500], dtype=torch.float64)


def test_the_sum_over_levels_and_their_mean_are_those_of_the_sum_written_out() -> None:
    k = torch.arange(1, 256, dtype=torch.float64) / 255
    terms = THETA[:, None] * k
    torch.testing.assert_close(_grey.log_sum_levels(THETA), terms.logsumexp(dim=1), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(_grey.mean_level(THETA), terms.softmax(dim=1) @ k, rtol=1e-6, atol=1e-7)
    single = THETA.float()
    torch.testing.assert_close(_grey.log_sum_levels(single), terms.logsumexp(dim=1).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(_grey.mean_level(single), (terms.softmax(dim=1) @ k).float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("u", [-4.0, -6.0, 3.0])
def test_a_pixel_is_drawn_by_its_distribution_function(u: float) -> None:
    """Every level has as large a share of the uniforms as its probability."""
    n = 200_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    k = torch.arange(1, 256, dtype=torch.float64) / 255
    for theta in THETA.tolist():
        p = torch.cat([torch.zeros(1, dtype=torch.float64), u + theta * k]).softmax(dim=0)
        field = torch.tensor([[u, theta]], dtype=torch.float64).expand(n, 2)
        levels = _grey.draw(field, uniforms[:, None])[:, 0].long()
        shares = torch.bincount(levels, minlength=256).double() / n
        torch.testing.assert_close(shares, p, rtol=0, atol=2.1 / n)
        mean = _grey.mean(field[:1])[0, 0]
        torch.testing.assert_close(mean, (p[1:] * k).sum(), rtol=1e-6, atol=1e-7)


def test_the_base_has_the_statistics_of_the_data() -> None:
    torch.manual_seed(0)
    model = Model(Config(hidden=(3,), chains=0), ImageSpace(4, 4, 1))
    x = (torch.rand(500, 1, 4, 4) * 255).round() / 255 * (torch.rand(500, 1, 4, 4) < torch.rand(4, 4))
    with torch.no_grad():
        model.prepare([Batch(x[:300], torch.full((300,), -1)), Batch(x[300:], torch.full((200,), -1))])
    torch.testing.assert_close(model.offset, _grey.statistics(x.flatten(1)).mean(dim=0))
    torch.testing.assert_close(_grey.mean(model.base[None])[0], x.mean(dim=0).flatten(), rtol=0, atol=2e-3)


# --------------------------------------------------------------------------------------------- densities by enumeration


@machines
def test_the_free_energy_is_the_energy_with_the_odd_layers_summed_out(hidden: tuple[int, ...]) -> None:
    model = machine(hidden)
    x = model.see(every_image().double().flatten(1))
    evens = sum(hidden[1::2])
    for y in range(2):
        total = []
        for bits in itertools.product((-0.5, 0.5), repeat=evens):
            states = model.blank(x)
            for layer in range(2, len(states), 2):  # three layers have one even hidden one
                states[layer] = torch.tensor(bits, dtype=torch.float64).expand(len(x), -1)
            total.append((-model.free_energy(states, torch.full((len(x),), y))).logsumexp(dim=0))
        torch.testing.assert_close(torch.stack(total).logsumexp(dim=0), log_z(model)[y], rtol=1e-9, atol=1e-9)


@torch.inference_mode()
def test_probabilities_of_all_images_sum_to_one() -> None:
    model = with_exact_log_z(machine((4,)))
    x = every_image()
    for label in (0, 1, UNLABELLED):
        log_prob = model.log_prob(x, torch.full((len(x),), label)).log_prob
        assert log_prob is not None
        assert float(log_prob.double().logsumexp(dim=0).exp()) == pytest.approx(1, abs=1e-5)


@torch.inference_mode()
def test_the_bound_of_a_deep_machine_is_below_its_likelihood_and_rises() -> None:
    for hidden in ((3, 2), (3, 2, 2)):
        exact = with_exact_log_z(machine(hidden))
        x, labels = every_image()[::97], torch.arange(len(every_image()[::97])) % 2
        visible = exact.see(x.double().flatten(1))
        states = hidden_states(exact)
        log_p = []
        for v, y in zip(visible, labels, strict=True):
            full = [v.expand(len(states[1]), -1), *states[1:]]
            assert exact.top is not None
            energy = sum(full[k] @ exact.biases[k].double() for k in range(len(full)))
            energy = energy + full[-1] @ exact.top[y].double()
            for k in range(1, len(full)):
                energy = energy + ((full[k - 1] @ exact.weights[k - 1].double()) * full[k]).sum(dim=1)
            log_p.append(energy.logsumexp(dim=0) - exact.log_z[0, y])
        bounds = []
        for iterations in (1, 3, 100):
            model = machine(hidden, mean_field=iterations)
            model.log_z.copy_(exact.log_z)
            bound = model.log_prob(x, labels).log_prob
            assert bound is not None
            bounds.append(bound)
        assert (bounds[0] <= bounds[1] + 1e-5).all()
        assert (bounds[1] <= bounds[2] + 1e-5).all()
        assert (bounds[2] <= torch.stack(log_p) + 1e-5).all()
        assert (bounds[2] - torch.stack(log_p)).mean() > -1, "and is of use"


@machines
def test_annealing_finds_log_z_within_its_error_and_brackets_it(hidden: tuple[int, ...]) -> None:
    model = machine(hidden, particles=300, temperatures=100, chains=600)
    with torch.no_grad():
        model.conclude([])
    forward, backward, stderr = model.log_z
    exact = log_z(model).detach()
    assert (stderr < 0.2).all()
    assert ((forward - exact).abs() < 4 * stderr).all()
    assert ((backward - exact).abs() < 4 * stderr + 0.1).all()


@machines
def test_annealing_in_a_few_steps_errs_to_the_side_that_it_should(hidden: tuple[int, ...]) -> None:
    """On average over repetitions, log Z forwards is too low and backwards too high."""
    model = machine(hidden, particles=5, temperatures=4, chains=10)
    found = []
    with torch.no_grad():
        for _ in range(100):
            model.conclude([])
            found.append(model.log_z[:2].clone())
            arrived = bits_of(model.particles, model.chain.shape[1])
            model.chain.copy_(arrived.view(2, 5, -1).transpose(0, 1).flatten(0, 1))  # chains go on
    mean = torch.stack(found[10:]).mean(dim=0)
    assert (mean[0] < log_z(model)).all()
    assert (mean[1] > log_z(model)).all()


@pytest.mark.parametrize("units", [1, 7, 8, 9, 300])
def test_bits_are_kept_eight_in_a_byte(units: int) -> None:
    bits = torch.rand(20, units) < 0.5
    kept = bytes_of(bits)
    assert kept.dtype == torch.uint8
    assert kept.shape == (20, -(-units // 8))
    assert torch.equal(bits_of(kept, units), bits)


# ------------------------------------------------------------------------------------------------------------- learning


def exact_log_prob(model: Model, x: Tensor, labels: Tensor) -> Tensor:
    """(B,) differentiable; of a restricted machine."""
    states = model.blank(model.see(x.double().flatten(1)))
    return -model.free_energy(states, labels) - log_z(model)[labels]


@pytest.mark.parametrize("chains", [0, 40_000])
def test_the_losss_gradient_is_that_of_the_likelihood(chains: int) -> None:
    """Persistent chains that have forgotten their start, or contrastive divergence of many sweeps."""
    model = machine((3,), chains=chains, sweeps=60, scale=0.7, decay=0.0)
    torch.manual_seed(5)
    x = every_image()[torch.randint(65536, (20_000,))] * (torch.rand(20_000, 1, 1, 2) < 0.6)
    labels = (torch.rand(20_000) < 0.3).long()
    (_, loss, _), *_ = model.objective(Batch(x, labels, step=0, steps=10))
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters)
    expected = torch.autograd.grad(-exact_log_prob(model, x, labels).mean(), parameters)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=0, atol=0.02)
    one, other = (torch.cat([g.double().flatten() for g in gradients]) for gradients in (found, expected))
    assert torch.cosine_similarity(one, other, dim=0) > 0.998


def test_images_without_a_label_teach_a_labelled_machine_nothing() -> None:
    model = machine((3,), decay=0.0)
    x = every_image()[:8]
    (_, loss, _), *_ = model.objective(Batch(x, torch.full((8,), UNLABELLED), step=0, steps=10))
    assert all((g == 0).all() for g in torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hidden", "chains"), [((8,), 0), ((8,), 40), ((8, 4), 40), ((6, 4, 3), 40)], ids=["cd", "pcd", "two", "three"]
)
def test_learning_raises_the_likelihood(hidden: tuple[int, ...], chains: int) -> None:
    """Above that of the best independent pixels, with which it begins: two pixels are equal, and tell the class."""
    torch.manual_seed(0)
    labels = torch.randint(0, 2, (1000,))
    lit = torch.rand(1000) < torch.where(labels == 0, 0.9, 0.1)
    x = (torch.randint(1, 256, (1000, 2)) * lit[:, None]).view(-1, 1, 1, 2) / 255
    model = Model(Config(hidden=hidden, chains=chains, particles=50, temperatures=30, decay=0.0), TWO)
    with torch.no_grad():
        model.prepare([Batch(x, labels)])
        model.conclude([])
        before = model.log_prob(x, labels).log_prob
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.02, weight_decay=0.0)
    for step in range(300):
        index = torch.randint(0, 1000, (100,))
        for _, loss, _ in model.objective(Batch(x[index], labels[index], step=step, steps=300)):
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    with torch.no_grad():
        model.conclude([])
        after = model.log_prob(x, labels).log_prob
    assert before is not None
    assert after is not None
    assert float((after - before).mean()) > 0.5, "of 2 log 2 − H(0.1) = 1.06 nats"


def test_chains_are_part_of_what_is_saved() -> None:
    """Loaded elsewhere, with the same generator, learning goes on bit for bit."""
    x, labels = every_image()[:40], torch.arange(40) % 2
    model = machine((3,))

    def step(model: Model, at: int) -> Tensor:
        (_, loss, _), *_ = model.objective(Batch(x, labels, step=at, steps=10))
        return loss.detach()

    step(model, 0)
    other = machine((3,))
    other.load_state_dict(model.state_dict())
    torch.manual_seed(7)
    losses = [step(model, k) for k in (1, 2, 3)]
    torch.manual_seed(7)
    assert [step(other, k) for k in (1, 2, 3)] == losses
    assert torch.equal(model.chain, other.chain)


# ------------------------------------------------------------------------------------------------------------- sampling


def begin(model: Model, n: int, label: int, solver: str = "persistent", steps: int = 1) -> GibbsRows:
    return model.init([Draw(k % 7, k // 7, steps, solver, label=label) for k in range(n)])


def assert_distributed(model: Model, rows: GibbsRows, label: int) -> None:
    """χ² of the hidden layers' configurations against enumeration."""
    probability = log_weights(model, label, hidden_states(model)).softmax(dim=0)
    bits = torch.cat(rows.hidden, dim=1).long()
    index = (bits * 2 ** torch.arange(bits.shape[1] - 1, -1, -1)).sum(dim=1)
    counts, expected = torch.bincount(index, minlength=len(probability)).double(), probability * len(bits)
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]])
    chi2 = ((counts - expected) ** 2 / expected.clamp(min=1)).sum()
    freedom = len(counts) - 1
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)


@machines
@torch.inference_mode()
def test_a_sweep_leaves_the_machines_distribution_as_it_is(hidden: tuple[int, ...]) -> None:
    model, n = machine(hidden), 8000
    rows = begin(model, n, label=1, steps=2)
    states = hidden_states(model)
    upto = log_weights(model, 1, states).softmax(dim=0).cumsum(dim=0)
    start = torch.searchsorted(upto, _random.uniform(rows.seed, rows.sample, 9, 9, (1,)).double()[:, 0].contiguous())
    rows.hidden = tuple(state[start.clamp(max=len(upto) - 1)] > 0 for state in states[1:])
    assert_distributed(model, rows, 1)
    for _ in range(2):
        rows = model.step(rows)
        assert_distributed(model, rows, 1)


@machines
@torch.inference_mode()
def test_chains_forget_where_they_began(hidden: tuple[int, ...]) -> None:
    """From particles that were never learnt, and from noise under rising β."""
    model, n, sweeps = machine(hidden, scale=1.0), 4000, 40
    for solver in ("persistent", "annealed"):
        rows = begin(model, n, label=0, solver=solver, steps=sweeps)
        for _ in range(sweeps):
            rows = model.step(rows)
        assert_distributed(model, rows, 0)


@torch.inference_mode()
def test_a_sample_is_the_expected_image_of_its_hidden_units() -> None:
    model = machine((3,))
    rows = model.step(begin(model, 50, label=0, steps=3))
    field = model.biases[0].double() + (rows.hidden[0].double() - 0.5) @ model.weights[0].double().mT
    torch.testing.assert_close(model.image(rows).flatten(1), _grey.mean(field).float())


@torch.inference_mode()
def test_without_a_label_the_class_is_drawn_by_its_share() -> None:
    rows = begin(machine((3,)), 4000, label=UNLABELLED)
    assert float((rows.label == 1).float().mean()) == pytest.approx(0.7, abs=0.03)


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden": ()}, r"hidden: \(\)"),
        ({"hidden": (4, 4, 4, 4)}, "one to three layers"),
        ({"hidden": (4, 0)}, "at least one unit"),
        ({"chains": -1}, "chains: -1; at least 0"),
        ({"chains": 1}, "chains: 1; 0, or at least one for each of 2 classes"),
        ({"sweeps": 0}, "sweeps: 0"),
        ({"mean_field": 0}, "mean_field: 0"),
        ({"particles": 1}, "particles: 1"),
        ({"temperatures": 1}, "temperatures: 1"),
        ({"default_steps": 0}, "default_steps: 0"),
        ({"pretraining": 1.0}, r"pretraining: 1\.0 is not in \[0, 1\)"),
        ({"decay": -1.0}, "decay: -1.0"),
    ],
)
def test_a_config_that_makes_no_machine_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(Config(**({"hidden": (4,)} | changes)), TWO)
