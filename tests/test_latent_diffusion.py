"""Latent diffusion: two stages that leave each other alone, codes of unit scale, samplers that are exact on Gaussian
codes, images of any size given back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from models import _checkpoint, latent_diffusion
from models._diffusion import stratified
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from training.recipes import recipes

SPACE = ImageSpace(width=8, height=8, channels=1, labels=("a", "b", "c"))
TINY: dict[str, Any] = {"widths": (8, 8), "code_channels": 2, "channels": 16, "blocks": 1}


def moved(space: ImageSpace = SPACE, **config: Any) -> latent_diffusion.Model:
    """A tiny model whose weights have left their initialisation, where the U-Net gives out zero."""
    torch.manual_seed(0)
    model = latent_diffusion.Model(latent_diffusion.Config(**(TINY | config)), space)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def batch(n: int = 8, step: int = 0, steps: int = 10, space: ImageSpace = SPACE) -> Batch:
    x = torch.rand(n, *space.shape, generator=torch.Generator().manual_seed(step)).mul(255).round() / 255
    return Batch(x, torch.arange(n) % 3, step=step, steps=steps)


def finish(model: latent_diffusion.Model, draws: list[Draw]) -> latent_diffusion.LatentRows:
    rows = model.init(draws)
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    return rows


# ---------------------------------------------------------------------------------------------------------------- codes


@torch.inference_mode()
@pytest.mark.parametrize(
    ("height", "width", "code"), [(28, 28, (7, 7)), (8, 8, (2, 2)), (7, 5, (2, 2)), (13, 9, (4, 3))]
)
def test_images_of_any_size_have_codes_at_a_quarter_of_it_and_come_back_in_their_size(
    height: int, width: int, code: tuple[int, int]
) -> None:
    space = ImageSpace(width, height, 3, labels=("a", "b", "c"))
    model = moved(space).eval()
    x = batch(3, space=space).x
    mean, log_std = model.posterior(x)
    assert mean.shape == log_std.shape == (3, 2, *code)
    assert (2, *code) == model.code_shape
    assert model.reconstruct(x, torch.zeros(3, dtype=torch.int64)).shape == x.shape
    image = model.image(finish(model, [Draw(0, 0, steps=2)]))
    assert image.shape == (1, *space.shape)


def test_learning_the_autoencoder_brings_images_back() -> None:
    """Flat images, whose code is their brightness."""
    torch.manual_seed(0)
    config = latent_diffusion.Config(**TINY, autoencoder_share=0.99, critic_from=0.9)
    model = latent_diffusion.Model(config, SPACE)
    parameters = model.groups()["autoencoder"]
    optimiser = torch.optim.Adam(parameters, lr=5e-3)
    for step in range(150):
        x = torch.rand(32, 1, 1, 1).expand(-1, *SPACE.shape).contiguous()
        for _, loss, _ in model.objective(Batch(x, torch.zeros(32, dtype=torch.int64), step=step, steps=1000)):
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    x = torch.linspace(0.1, 0.9, 9).view(9, 1, 1, 1).expand(-1, *SPACE.shape)
    with torch.inference_mode():
        back = model.reconstruct(x, torch.zeros(9, dtype=torch.int64))
    assert (back - x).abs().mean() < 0.06


@torch.no_grad()
def test_the_pull_on_the_codes_is_their_divergence_from_a_standard_normal() -> None:
    model = moved(kl_weight=0.5, critic_from=0.9)
    data = batch()
    mean, log_std = model.posterior(data.x)
    q, p = torch.distributions.Normal(mean, log_std.exp()), torch.distributions.Normal(0.0, 1.0)
    divergence = torch.distributions.kl_divergence(q, p).sum() / data.x.numel()
    ((group, loss, metrics),) = model.objective(data)
    assert group == "autoencoder"
    torch.testing.assert_close(metrics["kl"], divergence)
    torch.testing.assert_close(loss, metrics["l1"] + 0.5 * divergence)


# --------------------------------------------------------------------------------------------------------------- stages


def test_the_stages_part_at_the_share_and_each_loss_trains_its_own_group() -> None:
    model = moved(autoencoder_share=0.5, critic_from=0.4)
    groups = model.groups()
    owners = {id(p): group for group, parameters in groups.items() for p in parameters}
    assert set(owners) == {id(p) for p in model.parameters()}
    seen = []
    for step in range(10):
        model.zero_grad()
        for group, loss, _ in model.objective(batch(step=step)):
            loss.backward(inputs=groups[group])
            assert all(p.grad is not None for p in groups[group])
            seen.append((step, group))
        if step >= 5:
            assert all(p.grad is None for group in ("critic", "autoencoder") for p in groups[group])
    assert [group for step, group in seen if step < 2] == ["autoencoder"] * 2
    assert [group for step, group in seen if 2 <= step < 5] == ["critic", "autoencoder"] * 3
    assert [group for step, group in seen if step >= 5] == ["diffusion"] * 5


def test_the_critic_s_gradient_is_its_weight_times_the_distance_s_at_the_decoder_s_last_layer() -> None:
    def gradient(weight: float) -> Tensor:
        model = moved(critic_weight=weight, kl_weight=0.0, critic_from=0.0)
        torch.manual_seed(5)
        *_, (group, loss, _) = model.objective(batch())
        assert group == "autoencoder"
        return torch.autograd.grad(loss, model.decoder.out.weight)[0]

    alone = gradient(0.0)
    for weight in (0.5, 2.0):
        assert float((gradient(weight) - alone).norm() / alone.norm()) == pytest.approx(weight, rel=1e-2)


def test_the_critic_learns_to_tell_images_from_what_comes_back() -> None:
    model = moved(critic_from=0.0)
    optimiser = torch.optim.Adam(model.critic.parameters(), lr=5e-3)
    margins = []
    for _ in range(60):
        group, loss, metrics = next(model.objective(batch(32)))
        assert group == "critic"
        optimiser.zero_grad()
        loss.backward(inputs=list(model.critic.parameters()))
        optimiser.step()
        margins.append(float(metrics["margin"]))
    assert margins[-1] > margins[0] + 1


def test_scale_and_mean_are_measured_once_as_the_second_stage_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    model = moved(autoencoder_share=0.5)
    with torch.no_grad():
        model.encoder.layers[-1].weight[0].mul_(30)  # one channel far larger than the other
        model.encoder.layers[-1].bias[:2] = torch.tensor([5.0, -1.0])
    kept: list[Tensor] = []
    measure = model.measure
    monkeypatch.setattr(model, "measure", lambda z: (kept.append(z), measure(z))[1])
    for step in range(10):
        if step == 5:
            assert model.code_scale.flatten().tolist() == [1, 1]
        list(model.objective(batch(64, step=step)))
    assert len(kept) == 1
    z = kept[0]
    torch.testing.assert_close(model.code_scale.flatten(), z.transpose(0, 1).flatten(1).std(dim=1))
    torch.testing.assert_close(model.code_mean.flatten(), z.transpose(0, 1).flatten(1).mean(dim=1))
    u = (z - model.code_mean) / model.code_scale
    torch.testing.assert_close(u.std(dim=(0, 2, 3)), torch.ones(2))
    torch.testing.assert_close(u.mean(dim=(0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)


@torch.no_grad()
def test_the_diffusion_learns_codes_of_unit_scale_under_hidden_and_shown_labels() -> None:
    model = moved(label_dropout=0.5, autoencoder_share=0.0)
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    class Watching(nn.Module):
        def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
            asked.append((x, t, labels))
            return torch.zeros_like(x)

    model.network = Watching()  # type: ignore[assignment]
    ((group, _, _),) = model.objective(batch(256))
    x, t, labels = asked[0]
    assert group == "diffusion"
    assert float(x.square().mean()) == pytest.approx(1, abs=0.1), "signal and noise keep the variance of unit codes"
    assert (t > 0).all()
    assert (t <= 1).all()
    assert float(t.mean()) == pytest.approx(0.5, abs=0.02)
    assert {UNLABELLED, 0, 1, 2} == set(labels.tolist())


@torch.inference_mode()
def test_saving_keeps_scale_and_mean(tmp_path: Path) -> None:
    model = moved()
    model.measure(3 + 7 * torch.randn(8, 2, 2, 2))
    _checkpoint.save(tmp_path, model.eval(), model.config, {}, half=True)
    again = _checkpoint.load(tmp_path)
    assert torch.equal(again.get_buffer("code_scale"), model.code_scale)
    assert torch.equal(again.get_buffer("code_mean"), model.code_mean)
    assert (model.code_scale > 3).all()


# ------------------------------------------------------------------------------------------------------------- sampling

MEAN, STD = 0.5, 0.3  # of the Gaussian codes u whose best denoiser is known


class BestOfGaussian(nn.Module):
    """v of the best estimate of u ~ N(MEAN, STD²), from x = α u + σ ε."""

    def __init__(self, model: latent_diffusion.Model) -> None:
        super().__init__()
        self.alpha, self.sigma = model.alpha, model.sigma

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        at = (t * (len(self.alpha) - 1)).round().long()
        alpha, sigma = self.alpha[at].view(-1, 1, 1, 1), self.sigma[at].view(-1, 1, 1, 1)
        estimate = MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)
        return (alpha * x - estimate) / sigma


@torch.inference_mode()
@pytest.mark.parametrize("solver", ["ddim", "ancestral", "dpm-solver++"])
def test_samples_of_gaussian_codes_have_their_mean_and_scale(solver: str) -> None:
    model = moved().eval()
    model.network = BestOfGaussian(model)  # type: ignore[assignment]
    rows = finish(model, [Draw(1, k, steps=100, solver=solver) for k in range(200)])
    u = rows.memory[0]  # 1,600 numbers
    assert float(u.mean()) == pytest.approx(MEAN, abs=4 * STD / math.sqrt(1600))
    assert float(u.std()) == pytest.approx(STD, rel=0.12)


@torch.inference_mode()
def test_an_image_is_the_decoded_estimate_at_the_codes_own_scale() -> None:
    model = moved().eval()
    model.measure(2 - 5 * torch.randn(64, 2, 2, 2))
    rows = model.step(model.init([Draw(3, k, steps=4, label=k) for k in range(3)]))
    z = rows.memory[0] * model.code_scale + model.code_mean
    torch.testing.assert_close(model.image(rows), model.decode(z))
    assert rows.left.tolist() == [3] * 3, "a preview at a tick in between"


@torch.inference_mode()
def test_guidance_goes_beyond_the_label_and_means_nothing_without_one() -> None:
    model = moved().eval()

    def codes(label: int, guidance: float) -> Tensor:
        return finish(model, [Draw(3, 0, steps=3, label=label, guidance_scale=guidance)] * 4).memory[0]

    assert not torch.allclose(codes(1, 1.0), codes(1, 3.0))
    torch.testing.assert_close(codes(UNLABELLED, 1.0), codes(UNLABELLED, 3.0))
    torch.testing.assert_close(codes(1, 0.0), codes(UNLABELLED, 1.0), rtol=1e-4, atol=1e-5)


# -------------------------------------------------------------------------------------------------- configs and recipes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"widths": ()}, "widths"),
        ({"code_channels": 0}, "code_channels: 0"),
        ({"autoencoder_blocks": -1}, "autoencoder_blocks: -1"),
        ({"kl_weight": -0.1}, "kl_weight: -0.1"),
        ({"critic_width": 0}, "critic_width: 0"),
        ({"critic_weight": -1.0}, "critic_weight: -1.0"),
        ({"critic_from": 1.5}, "critic_from: 1.5"),
        ({"autoencoder_share": 1.0}, "autoencoder_share: 1.0"),
        ({"multipliers": (0,)}, "multipliers"),
        ({"attention": (1,)}, "attention"),
        ({"prediction": "score"}, "prediction: 'score'; there are epsilon, x0, v"),
        ({"schedule": "square"}, "schedule: 'square'"),
        ({"label_dropout": 1.0}, "label_dropout: 1.0"),
        ({"guidance_scale": 11.0}, "guidance_scale: 11.0"),
        ({"default_steps": 2000}, "default_steps: 2000"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_field(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        latent_diffusion.Model(latent_diffusion.Config(**(TINY | config)), SPACE)


def test_recipes_let_the_learning_rate_descend_anew_where_the_second_stage_begins() -> None:
    runs = [run for run in (make() for make in recipes().values()) if run.family == "latent_diffusion"]
    assert runs
    for run in runs:
        assert run.restarts == (int(run.config.autoencoder_share * run.steps),)


def test_times_of_a_batch_cover_the_unit_interval_and_never_reach_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    for drawn in (0.0, 0.5, 1 - 2**-24):  # the last is the largest that float32 draws below 1
        monkeypatch.setattr(torch, "rand", lambda n, device, drawn=drawn: torch.full((n,), drawn))
        times = stratified(64, torch.device("cpu"))
        assert (times * 64 - torch.arange(64) - drawn).abs().max() < 1e-5
        assert times.max() < 1
        assert (times * 1000).long().max() <= 999
