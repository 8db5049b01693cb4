"""The energy-based model: gradients, Langevin steps against closed forms, replayed chains, what is learnt."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from models.ebm import Config, Model

SPACE = ImageSpace(width=8, height=8, channels=1, labels=("a", "b", "c"))
SMALL: dict[str, Any] = {"channels": (8, 8), "blocks": (1, 0), "langevin_steps": 3, "replay": 30, "rank": 4}


def made(space: ImageSpace = SPACE, **changes: Any) -> Model:
    torch.manual_seed(0)
    return Model(Config(**(SMALL | changes)), space)


def batch(n: int = 12, space: ImageSpace = SPACE, **changes: Any) -> Batch:
    torch.manual_seed(1)
    labels = torch.arange(n) % space.classes if space.classes else torch.full((n,), UNLABELLED)
    return Batch((torch.rand(n, *space.shape) * 255).round() / 255, labels, **changes)


def prepared(model: Model) -> Model:
    with torch.no_grad():
        model.prepare([batch(300, model.spec.image)])
    return model


class Bowl(nn.Module):
    """f = −½ Σ k (x − centre)², the same for every class: the energy of a Gaussian."""

    def __init__(self, stiffness: float, centre: float, classes: int) -> None:
        super().__init__()
        self.stiffness, self.centre, self.classes = stiffness, centre, classes

    def forward(self, x: Tensor) -> Tensor:
        f = -0.5 * self.stiffness * (x - self.centre).square().flatten(1).sum(dim=1)
        return f[:, None].expand(-1, self.classes)


# --------------------------------------------------------------------------------------------------------------- energy


def test_the_gradient_is_that_of_the_energy_in_any_grad_mode() -> None:
    model = made().double()
    x = (torch.rand(3, 1, 8, 8, dtype=torch.float64) * 2 - 1).requires_grad_()
    labels = torch.tensor([0, 2, UNLABELLED])
    energy = -model.network.output(model.network.layers(x).flatten(1))  # in float64, which the network's output is not
    tau = model.config.softness
    chosen = torch.stack([energy[0, 0], energy[1, 2], -tau * (-energy[2] / tau).logsumexp(dim=0)])
    (expected,) = torch.autograd.grad(chosen.sum(), x)
    torch.testing.assert_close(model.gradient(x, labels), expected, rtol=1e-5, atol=1e-8)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            fresh = x.detach().clone()
            torch.testing.assert_close(model.gradient(fresh, labels.clone()), expected, rtol=1e-5, atol=1e-8)


def test_without_a_label_the_energy_is_that_of_the_sum_over_labels() -> None:
    """e^{−E(x)/τ} = Σ_y e^{−E(x, y)/τ}"""
    model = made()
    x, tau = 2 * batch(5).x - 1, model.config.softness
    each = torch.stack([model.energy(x, torch.full((5,), y)) for y in range(3)])
    whole = model.energy(x, torch.full((5,), UNLABELLED))
    torch.testing.assert_close((-whole / tau).exp(), (-each / tau).exp().sum(dim=0))


def test_a_score_is_the_energy_and_the_norm_of_its_gradient() -> None:
    model = made()
    x, labels = batch(4).x, torch.tensor([0, 1, 2, UNLABELLED])
    with torch.inference_mode():
        score = model.log_prob(x, labels)
    assert score.log_prob is None
    assert score.energy is not None
    torch.testing.assert_close(score.energy, model.energy(2 * x - 1, labels))
    norm = model.gradient(2 * x - 1, labels).flatten(1).norm(dim=1)
    torch.testing.assert_close(score.statistics["gradient_norm"], norm)


def test_spectral_norm_bounds_every_layer() -> None:
    model = made(spectral_norm=True)
    for _ in range(50):
        model.network(torch.randn(4, 1, 8, 8))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            assert float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) == pytest.approx(1, abs=1e-2)


# --------------------------------------------------------------------------------------------------------------- chains


def test_langevin_steps_sample_the_gaussian_of_a_quadratic_energy() -> None:
    """x ← x − ηk (x − m) + σξ has mean m and variance σ² / (1 − (1 − ηk)²) ≈ T / k, T = σ²/2η, once the start is
    forgotten."""
    model = made(rate=0.5, noise=0.05, clip=10.0)
    stiffness, centre = 0.2, 0.1
    model.network = Bowl(stiffness, centre, 3)  # type: ignore[assignment]
    rows = model.init([Draw(k, 0, 100, label=k % 3) for k in range(60)])
    for _ in range(100):
        rows = model.step(rows)
    expected = model.config.noise**2 / (1 - (1 - model.config.rate * stiffness) ** 2)
    temperature = model.config.noise**2 / (2 * model.config.rate)
    assert expected == pytest.approx(temperature / stiffness, rel=0.06)
    n = rows.x.numel()
    assert float(rows.x.mean()) == pytest.approx(centre, abs=5 * math.sqrt(expected / n))
    assert float(rows.x.var()) == pytest.approx(expected, rel=5 * math.sqrt(2 / n))


def test_a_step_follows_no_more_of_a_gradient_than_the_clip_and_stays_within_the_image() -> None:
    model = made(rate=2.0, clip=0.03, noise=0.0)
    x, nothing = torch.tensor([[0.0, 0.5, -0.99]]), torch.zeros(1, 3)
    steep = torch.tensor([[-100.0, 0.01, 0.02]])
    torch.testing.assert_close(model.follow(x, steep, nothing), torch.tensor([[0.06, 0.48, -1.0]]))


def test_the_start_has_the_mean_and_covariance_of_each_class() -> None:
    """Where the rank is full; with fewer, the covariance along the principal components."""
    space = ImageSpace(width=4, height=2, channels=1, labels=("a", "b"))
    torch.manual_seed(3)
    mixing = torch.randn(2, 8, 8) * 0.02
    labels = torch.arange(4000) % 2
    x = (torch.einsum("bij,bj->bi", mixing[labels], torch.randn(4000, 8)) + 0.5 + 0.1 * labels[:, None]).clamp(0, 1)
    model = made(space, channels=(4,), blocks=(0,), rank=8)
    with torch.no_grad():
        model.prepare([Batch(x.view(-1, 1, 2, 4), labels)])
        for y in range(2):
            drawn = model.start(torch.full((20_000,), y), torch.randn(20_000, 8)).flatten(1)
            mine = 2 * x[labels == y] - 1
            torch.testing.assert_close(drawn.mean(dim=0), mine.mean(dim=0), rtol=0, atol=0.02)
            torch.testing.assert_close(drawn.T.cov(), mine.T.cov(), rtol=0.15, atol=0.002)


def test_chains_go_on_where_they_were_each_in_its_class() -> None:
    """Without noise, restarts and a gradient, the buffer stays as it is, up to the rounding of one grey level."""
    model = prepared(made(restart=0.0, noise=0.0, replay=60))
    model.network = Bowl(0.0, 0.0, 3)  # type: ignore[assignment]
    before = model.replay.clone()
    labels = torch.arange(12) % 3
    x, metrics = model._run_chains(labels, labels)
    assert float(metrics["restarts"]) == 0
    assert int((model.replay.int() - before.int()).abs().max()) <= 1
    start = 2 * before.float() / 255 - 1
    for chain, label in zip(x, labels, strict=True):
        distance = (start - chain).abs().flatten(1).amax(dim=1)
        assert int(distance.argmin()) % 3 == label
        assert float(distance.min()) < 1e-6


def test_restarted_chains_forget_the_buffer() -> None:
    model = prepared(made(restart=1.0, noise=0.0))
    model.replay.fill_(255)
    labels = torch.arange(12) % 3
    x, metrics = model._run_chains(labels, labels)
    assert float(metrics["restarts"]) == 1
    assert float(x.mean()) < 0.5


def test_the_replay_buffer_is_part_of_what_a_run_resumes_from() -> None:
    """Loaded elsewhere, with the same generator, learning goes on bit for bit."""
    model = prepared(made())

    def step(model: Model) -> Tensor:
        (_, loss, _), *_ = model.objective(batch())
        return loss.detach()

    step(model)
    other = made()
    other.load_state_dict(model.state_dict())
    torch.manual_seed(7)
    losses = [step(model) for _ in range(3)]
    torch.manual_seed(7)
    assert [step(other) for _ in range(3)] == losses
    assert torch.equal(model.replay, other.replay)
    assert "replay" in model.training_only


# ------------------------------------------------------------------------------------------------------------- learning


def test_the_losss_gradient_lowers_the_datas_energy_and_raises_the_chains() -> None:
    """Without the penalty and the cross-entropy it is ∂E(data) − ∂E(chains), the gradient of the log-likelihood were
    the chains draws from the model; no gradient runs through the chains."""
    model = prepared(made(penalty=0.0, classification=0.0, data_noise=0.0, label_dropout=0.0))
    given, same = batch(), made_like(model)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    torch.rand(12)  # the draws that come before the chains'
    torch.randn_like(given.x)
    chains, _ = same._run_chains(given.labels, given.labels)
    torch.set_rng_state(state)
    (_, loss, _), *_ = model.objective(given)
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters)
    gap = model.energy(2 * given.x - 1, given.labels).mean() - model.energy(chains, given.labels).mean()
    for a, b in zip(found, torch.autograd.grad(gap, parameters), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def made_like(model: Model) -> Model:
    other = made(penalty=0.0, classification=0.0, data_noise=0.0, label_dropout=0.0)
    other.load_state_dict(model.state_dict())
    return other


@pytest.mark.slow
@pytest.mark.parametrize("restart", [0.05, 1.0], ids=["replayed", "short runs"])
def test_it_learns_to_draw_what_no_gaussian_draws(restart: float) -> None:
    """Images that are all dark or all bright: the Gaussian of both draws grey ones, the model hardly any."""
    model = made(ImageSpace(8, 8, 1), langevin_steps=10, replay=120, rate=1.0, clip=1.0, restart=restart, penalty=0.01)
    torch.manual_seed(2)

    def data(n: int) -> Batch:
        x = torch.randint(0, 2, (n, 1, 1, 1)) * 0.7 + 0.15
        return Batch(x.expand(n, 1, 8, 8), torch.full((n,), UNLABELLED))

    with torch.no_grad():
        model.prepare([data(500)])
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3, betas=(0.0, 0.99))
    for step in range(150):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / 150)
        for _, loss, _ in model.objective(data(32)):
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    rows = model.init([Draw(k, 0, 100 if restart < 1 else 10) for k in range(90)])
    begun = model.image(rows).mean(dim=(1, 2, 3))
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    level = model.image(rows).mean(dim=(1, 2, 3))

    def grey(level: Tensor) -> float:
        return float(((level > 0.3) & (level < 0.7)).float().mean())

    assert grey(begun) > 0.3
    assert grey(level) < 0.15
    assert 0.2 < float((level > 0.5).float().mean()) < 0.8, "of both kinds"


# --------------------------------------------------------------------------------------------------------------- config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": ()}, r"channels: \(\)"),
        ({"channels": (8, 8, 8, 8)}, "4 halvings leave nothing of an image of 8×8"),
        ({"blocks": (1,)}, r"blocks: \(1,\); 2 numbers"),
        ({"rate": 0.0}, "rate: 0.0; above 0"),
        ({"softness": -1.0}, "softness: -1.0"),
        ({"noise": -0.1}, "noise: -0.1; not negative"),
        ({"langevin_steps": 0}, "langevin_steps: 0; at least 1"),
        ({"restart": 1.5}, r"restart: 1\.5 is not in \[0, 1\]"),
        ({"replay": 2}, "replay: 2; at least one chain for each of 3 classes"),
    ],
)
def test_a_config_that_makes_no_model_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    settings = SMALL | changes
    if changes.get("channels") == (8, 8, 8, 8):
        settings["blocks"] = (0, 0, 0, 0)
    with pytest.raises(ValueError, match=message):
        Model(Config(**settings), SPACE)
