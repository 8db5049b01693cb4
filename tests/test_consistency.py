"""Consistency models: the boundary holds exactly, a Gaussian's ODE is learnt as its closed form, schedules and noise
levels are the papers', and a student begins as its teacher."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from rich.console import Console
from torch import Tensor, nn

from models import _random, consistency, ddpm
from models._protocol import UNLABELLED, Batch, Denoiser, Draw, ImageSpace
from training import data
from training.loop import train
from training.progress import Progress
from training.recipes import recipes

SPACE = ImageSpace(width=8, height=8, channels=1, labels=("a", "b", "c"))
TINY: dict[str, Any] = {"channels": 8, "multipliers": (1, 2)}
MEAN, STD = 0.3, 0.4  # of the Gaussian whose ODE has a closed form, on the scale [−1, 1]


def moved(**config: Any) -> consistency.Model:
    """A tiny model whose weights have left their initialisation, where the network gives out zero."""
    torch.manual_seed(0)
    model = consistency.Model(consistency.Config(**(TINY | config)), SPACE)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def noisy(sigma: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(len(sigma), *SPACE.shape, generator=generator) * 2 - 1
    return x0 + sigma.view(-1, 1, 1, 1) * torch.randn(x0.shape, generator=generator)


# ------------------------------------------------------------------------------------------------- what the function is


@torch.inference_mode()
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
@pytest.mark.parametrize("sigma_min", [0.002, 0.01])
def test_at_the_least_noise_it_is_the_identity_exactly_whatever_the_weights(
    sigma_data: float, sigma_min: float
) -> None:
    model = moved(sigma_data=sigma_data, sigma_min=sigma_min)
    sigma = torch.full((4,), sigma_min)
    x = noisy(sigma)
    assert torch.equal(model.consistency(x, sigma, torch.tensor([0, 1, 2, UNLABELLED])), x)
    assert not torch.equal(model.consistency(x, 2 * sigma, torch.zeros(4, dtype=torch.int64)), x)


@torch.no_grad()
@pytest.mark.parametrize("variance", ["learned", "small"])
def test_a_student_with_its_teacher_s_weights_begins_as_its_teacher(variance: str) -> None:
    torch.manual_seed(1)
    teacher = ddpm.Model(ddpm.Config(**TINY, clip=False, variance=variance, bound_steps=5), SPACE)
    for parameter in teacher.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    student = moved()
    student.begin_from(teacher)
    sigma = torch.tensor([0.1, 0.5, 1.0, 4.0, 20.0, 80.0])
    x, labels = noisy(sigma), torch.tensor([0, 1, 2, 0, 1, UNLABELLED])
    expected = teacher.denoised(x, sigma, labels, torch.ones(6))
    torch.testing.assert_close(student.consistency(x, sigma, labels), expected, rtol=0.02, atol=0.05)
    before = moved().consistency(x, sigma, labels)
    assert (before - expected).abs().mean() > 10 * (student.consistency(x, sigma, labels) - expected).abs().mean()


@torch.no_grad()
def test_of_a_teacher_of_another_shape_it_takes_what_fits() -> None:
    student = moved()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    teacher = ddpm.Model(ddpm.Config(channels=8, multipliers=(1, 3), bound_steps=5), SPACE)
    student.begin_from(teacher)
    theirs = teacher.state_dict()
    taken = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "network.stem.weight" in taken
    assert not any(name.startswith("network.middle") for name in taken)
    for name in taken:
        assert torch.equal(student.state_dict()[name], theirs[name][: len(before[name])])


@torch.inference_mode()
@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_a_distance_over_what_the_network_can_reach_is_one_between_its_outputs(sigma_data: float) -> None:
    class Constant(nn.Module):
        def __init__(self, value: float) -> None:
            super().__init__()
            self.value = value

        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            return torch.full_like(x[:, :1], self.value)

    model = moved(sigma_data=sigma_data)
    sigma = torch.logspace(-2, 2, 9)
    x, labels = noisy(sigma), torch.zeros(9, dtype=torch.int64)
    ends = []
    for value in (0.0, 0.1):
        model.network = Constant(value)  # type: ignore[assignment]
        ends.append(model.consistency(x, sigma, labels))
    distance = (ends[1] - ends[0]).square().sum(dim=(1, 2, 3)).sqrt()
    torch.testing.assert_close(distance / model._reach(sigma), torch.full((9,), 0.1 * 8), rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ schedules


def test_the_number_of_intervals_doubles_as_in_the_paper() -> None:
    """s₀ = 10, s₁ = 1280 over K = 400,000: eight stretches of 50,000 steps (2310.14189, §3.4)."""
    seen = [consistency.intervals_at(k, 400_000, 10, 1280) for k in range(0, 400_000, 25_000)]
    assert seen == [10 * 2 ** (i // 2) for i in range(16)]
    assert consistency.intervals_at(399_999, 400_000, 10, 1280) == 1280
    assert consistency.intervals_at(49_999, 400_000, 10, 1280) == 10
    assert [consistency.intervals_at(k, 3, 10, 1280) for k in range(3)] == [10, 20, 40], "however short the run is"
    assert {consistency.intervals_at(k, 100, 18, 18) for k in range(100)} == {18}


def test_noise_levels_are_those_of_the_papers() -> None:
    """2303.01469, appendix C: T = 80, ε = 0.002, N = 18, ρ = 7."""
    levels = consistency.noise_levels(17, 0.002, 80.0)
    assert len(levels) == 18
    assert levels[0] == pytest.approx(0.002)
    assert levels[-1] == pytest.approx(80.0)
    for i in (2, 9, 17):
        power = 0.002 ** (1 / 7) + (i - 1) / 17 * (80 ** (1 / 7) - 0.002 ** (1 / 7))
        assert levels[i - 1] == pytest.approx(power**7)


def test_an_interval_s_chance_is_what_a_log_normal_gives_it() -> None:
    levels = consistency.noise_levels(40, 0.002, 80.0)
    chances = consistency.interval_chances(levels, -1.1, 2.0)
    normal = torch.distributions.Normal(torch.tensor(-1.1).double(), torch.tensor(2.0).double())
    torch.testing.assert_close(chances, 2 * normal.cdf(levels.log()).diff())


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_the_noise_levels_of_a_sample_are_even_in_angle(scale: float) -> None:
    assert consistency.sampling_levels(1, 0.002, 80.0, scale).tolist() == pytest.approx([80.0, 0.002])
    assert consistency.sampling_levels(2, 0.002, 80.0, scale).tolist() == pytest.approx([80.0, scale, 0.002])
    levels = consistency.sampling_levels(8, 0.002, 80.0, scale)
    assert (levels.diff() < 0).all()
    angles = torch.atan(levels[1:-1] / scale)
    torch.testing.assert_close(angles, torch.arange(7, 0, -1).double() * math.pi / 16)
    tight = consistency.sampling_levels(8, 0.3, 1.0, scale)
    assert (tight[0], tight[-1]) == (1.0, pytest.approx(0.3))
    assert (tight.diff() <= 0).all()


@torch.inference_mode()
def test_several_steps_are_algorithm_1() -> None:
    """x ← f(τ_1 z, τ_1); then x ← f(x + √(τ² − ε²) z, τ) for each further τ."""
    model = moved()
    draws = [Draw(5, k, steps=3, label=k) for k in range(3)]
    rows = model.init(draws)
    labels = torch.arange(3)
    seed, sample = torch.full((3,), 5), torch.arange(3)
    levels = consistency.sampling_levels(3, 0.002, 80.0, 1.0).float()
    x = levels[0] * _random.normal(seed, sample, 0, 0, SPACE.shape)
    x = model.consistency(x, levels[0].expand(3), labels)
    for tick in (1, 2):
        z = _random.normal(seed, sample, tick - 1, 1, SPACE.shape)
        x = x + (levels[tick] ** 2 - 0.002**2).sqrt() * z
        x = model.consistency(x, levels[tick].expand(3), labels)
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    torch.testing.assert_close(model.image(rows), ((x + 1) / 2).clamp(0, 1))
    torch.testing.assert_close(rows.x, x, msg="no noise is added at the end")


# ------------------------------------------------------------------------------------- a Gaussian, in closed form


class Gaussian(Denoiser):
    """The best denoiser of pixels that are N(MEAN, STD²), each alone. It keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Tensor, Tensor]] = []

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        self.asked.append((labels, guidance))
        variance = sigma.view(-1, 1, 1, 1).square()
        return (STD**2 * x + variance * MEAN) / (STD**2 + variance)


def end_of_trajectory(x: Tensor, sigma: Tensor, least: float) -> Tensor:
    """Where the Gaussian's probability-flow ODE takes x from sigma (B,) down to `least`."""
    return MEAN + (x - MEAN) * ((STD**2 + least**2) / (STD**2 + sigma.view(-1, 1, 1, 1).square())).sqrt()


class Affine(nn.Module):
    """(x, t) -> a(t) x + b(t): a network that can be the Gaussian's exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.curve = nn.Sequential(nn.Linear(1, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        a, b = self.curve(4 * t[:, None] - 2).T[:, :, None, None, None]
        return a * x + b


def of_gaussians(**config: Any) -> consistency.Model:
    settings = {"detail_periods": (), "weighting": "even", "noise_mean": 0.0, "noise_std": 2.0} | config
    model = consistency.Model(consistency.Config(**(TINY | settings)), SPACE)
    model.network = Affine()  # type: ignore[assignment]
    return model


def gaussian_batch(n: int, **about: Any) -> Batch:
    return Batch((MEAN + STD * torch.randn(n, *SPACE.shape) + 1) / 2, torch.zeros(n, dtype=torch.int64), **about)


@pytest.mark.parametrize("taught", [True, False], ids=["distillation", "training"])
def test_it_learns_the_ode_of_a_gaussian(taught: bool) -> None:
    """Where the whole trajectory leads is learnt from one small step of it at a time."""
    torch.manual_seed(0)
    model, teacher = of_gaussians(intervals=(10, 80)), Gaussian() if taught else None
    optimiser = torch.optim.Adam(model.parameters(), lr=5e-3)
    sigma = torch.tensor([0.01, 0.1, 0.3, 1.0, 3.0, 10.0, 80.0])
    x = MEAN + (STD**2 + sigma.view(-1, 1, 1, 1).square()).sqrt() * torch.randn(7, *SPACE.shape)
    exact = end_of_trajectory(x, sigma, model.config.sigma_min)
    labels = torch.zeros(7, dtype=torch.int64)

    def error() -> float:
        return float((model.consistency(x, sigma, labels) - exact).detach().square().mean().sqrt())

    before = error()
    steps = 900
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        for _, loss, _ in model.objective(gaussian_batch(64, step=step, steps=steps, teacher=teacher)):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    assert before > 0.3
    assert error() < (0.08 if taught else 0.1)


@torch.no_grad()
def test_of_the_exact_function_only_the_euler_step_s_own_error_is_left() -> None:
    """So the distance falls with the square of the interval."""

    torch.manual_seed(0)
    distances = []
    for intervals in (40, 80, 160):
        model = of_gaussians(intervals=(intervals, intervals))
        model.consistency = lambda x, sigma, labels: end_of_trajectory(x, sigma, 0.002)  # type: ignore[method-assign]
        batch = gaussian_batch(512, teacher=Gaussian())
        distances.append(next(model.objective(batch))[2]["distance"])
    squares = [float(d + consistency.HUBER * 8) ** 2 - (consistency.HUBER * 8) ** 2 for d in distances]
    assert 3 < math.sqrt(squares[0] / squares[1]) < 5
    assert 3 < math.sqrt(squares[1] / squares[2]) < 5


def test_the_target_is_held_fixed_and_the_teacher_is_asked_under_the_guidance_that_is_built_in() -> None:
    torch.manual_seed(0)
    model, teacher = of_gaussians(guidance_scale=2.5, label_dropout=0.5), Gaussian()
    seen: list[tuple[Tensor, bool]] = []
    inner = model.consistency

    def watched(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        seen.append((labels, torch.is_grad_enabled()))
        return inner(x, sigma, labels)

    model.consistency = watched  # type: ignore[method-assign]
    ((group, loss, metrics),) = model.objective(gaussian_batch(32, teacher=teacher))
    assert (group, loss.requires_grad, metrics["distance"].requires_grad) == ("network", True, False)
    assert sorted(grad for _, grad in seen) == [False, True]
    labels, guidance = teacher.asked[0]
    assert set(labels.tolist()) == {0, UNLABELLED}
    assert all(torch.equal(labels, other) for other, _ in seen)
    assert guidance.tolist() == [2.5] * 32


# -------------------------------------------------------------------------------------------------- configs and recipes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"channels": 0}, "channels: 0"),
        ({"multipliers": ()}, "multipliers"),
        ({"attention": (2,)}, "attention"),
        ({"detail_periods": (0.0,)}, "detail_periods"),
        ({"sigma_data": 0.0}, "sigma_data: 0.0"),
        ({"sigma_min": 90.0}, "sigma_min, sigma_max: 90.0, 80.0"),
        ({"intervals": (20, 10)}, r"intervals: \(20, 10\)"),
        ({"intervals": (0, 10)}, r"intervals: \(0, 10\)"),
        ({"weighting": "odd"}, "weighting: 'odd'; there are interval, output, even"),
        ({"label_dropout": 1.0}, "label_dropout: 1.0"),
        ({"guidance_scale": -1.0}, "guidance_scale: -1.0"),
        ({"max_steps": 0}, "max_steps: 0"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        consistency.Model(consistency.Config(**(TINY | config)), SPACE)


def test_the_recipe_that_learns_from_data_alone_runs(tmp_path: Path) -> None:
    run = dataclasses.replace(recipes()["digits-consistency"](), steps=8, warmup=2, batch_size=16)
    assert run.teacher is None
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    state = train(
        run, data.load(run.data), tmp_path, fabric, Progress(tmp_path / "events", Console(file=io.StringIO()))
    )
    model = state.average
    with torch.inference_mode():
        image = model.image(model.step(model.init([Draw(0, k, steps=1, label=k) for k in range(4)])))
    assert image.isfinite().all()
