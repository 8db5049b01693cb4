"""What ships: every checkpoint of zoo/ is whole, small, made by a committed recipe, and measures what its card says."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from models import _checkpoint
from models._protocol import Density, Draw, bits_per_dim
from service.engine import Engine
from service.messages import Failed, Generate, ImageDone, Message
from training import data
from training.recipes import recipes

ZOO = Path(__file__).parents[1] / "zoo"
FIVE = ("ddpm", "gan", "pixelcnn", "realnvp", "vae")
checkpoints = pytest.mark.parametrize(
    "folder", sorted(p.parent for p in ZOO.glob("*/model.json")), ids=lambda p: p.name
)

# What the cards promise on Fashion-MNIST's 10,000 test images, in bits/dim.
PROMISED = {
    "fashion-mnist-glow": 3.10,
    "fashion-mnist-nice": 3.80,
    "fashion-mnist-pixel-transformer": 2.90,
    "fashion-mnist-pixelcnn": 2.85,
    "fashion-mnist-realnvp": 3.25,
    "fashion-mnist-vae": 3.6,
}

# Share of 1,000 samples that a classifier takes for what was asked, at the default settings.
AGREE = {
    "fashion-mnist-consistency": 0.80,
    "fashion-mnist-ddpm": 0.90,
    "fashion-mnist-flow-matching": 0.90,
    "fashion-mnist-latent-diffusion": 0.90,
    "fashion-mnist-score-sde": 0.90,
    "fashion-mnist-vqvae": 0.80,
}


def test_the_first_five_are_there_and_the_zoo_is_small() -> None:
    assert {f"fashion-mnist-{name}" for name in FIVE} <= {p.name for p in ZOO.iterdir()}
    assert sum(p.stat().st_size for p in ZOO.rglob("*") if p.is_file()) < 40e6


@checkpoints
def test_every_file_is_what_model_json_says(folder: Path) -> None:
    about = _checkpoint.read_about(folder)
    assert {"weights.safetensors", "samples.png", "README.md"} <= about["files"].keys()
    model = _checkpoint.load(folder)
    assert json.loads(json.dumps(model.spec.to_json())) == about["spec"]


@checkpoints
def test_its_recipe_is_committed_and_still_the_same(folder: Path) -> None:
    recipe = _checkpoint.read_about(folder)["recipe"]
    run = recipes()[recipe["name"]]()
    assert json.loads(json.dumps(run.to_json())) == {k: v for k, v in recipe.items() if k != "name"}


@checkpoints
def test_its_card_says_what_was_measured(folder: Path) -> None:
    metrics = _checkpoint.read_about(folder)["metrics"]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert {"fd_local", "density", "coverage"} <= metrics.keys()
    for metric in metrics.values():
        assert {"value", "unit", "direction", "data", "n"} <= metric.keys()
    if folder.name in PROMISED:
        assert metrics["bits_per_dim"]["n"] == 10_000
        assert metrics["bits_per_dim"]["value"] <= PROMISED[folder.name]
        assert f"{metrics['bits_per_dim']['value']:.4g}" in card
    if folder.name in AGREE:
        assert metrics["label_agreement"]["n"] == 1000
        assert metrics["label_agreement"]["value"] >= AGREE[folder.name]
        assert f"{metrics['label_agreement']['value']:.4g}" in card


def test_consistency_gains_by_a_second_look() -> None:
    metrics = _checkpoint.read_about(ZOO / "fashion-mnist-consistency")["metrics"]
    assert metrics["fd_local_2_steps"]["value"] < metrics["fd_local"]["value"]


@pytest.mark.realdata
@pytest.mark.slow
@checkpoints
@torch.inference_mode()
def test_the_likelihood_on_its_card_is_what_it_gives(folder: Path) -> None:
    """Of 64 test images, fewer where each takes hundreds of evaluations: within four standard errors of the mean."""
    model = _checkpoint.load(folder)
    if not isinstance(model, Density):
        pytest.skip("no density")
    likelihood = model.spec.likelihood
    if likelihood.kind == "unnormalised":
        pytest.skip("an energy: no likelihood is claimed")
    about = _checkpoint.read_about(folder)
    pictures = data.load(about["data"]["name"]).splits["test"].x
    count = 64 if likelihood.steps * likelihood.network_evaluations_per_step < 100 else 12
    index = np.random.default_rng(0).choice(len(pictures), count, replace=False)
    log_prob = model.log_prob(torch.from_numpy(pictures[index]).float() / 255).log_prob
    assert log_prob is not None
    bits = bits_per_dim(log_prob, model.spec.image.dims)
    claimed = about["metrics"]["bits_per_dim"]["value"]
    assert float(bits.mean()) == pytest.approx(claimed, abs=4 * float(bits.std()) / math.sqrt(count))


@pytest.mark.parametrize("name", ["glow", "nice", "pixelcnn", "realnvp"])
@torch.inference_mode()
def test_a_score_is_the_same_to_the_last_bit_in_batches_of_any_size(name: str) -> None:
    """So that the engine need not fill them up: a lone image costs one image."""
    density = _checkpoint.load(ZOO / f"fashion-mnist-{name}")
    assert isinstance(density, Density)
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (16, 1, 28, 28))).float() / 255
    many = density.log_prob(x)
    assert many.log_prob is not None
    for size in (1, 2, 3, 8):
        few = density.log_prob(x[:size])
        assert few.log_prob is not None
        assert torch.equal(few.log_prob, many.log_prob[:size]), size
        for told, expected in ((few.statistics, many.statistics), (few.features, many.features)):
            assert all(torch.equal(value, expected[key][:size]) for key, value in told.items()), size


@pytest.mark.slow
@checkpoints
def test_a_request_gives_the_same_bytes_alone_and_amid_63_others(folder: Path) -> None:
    """With other seeds, steps, solvers and labels, joining and leaving midway: trained weights, the real engine."""
    model = _checkpoint.load(folder)
    spec = model.spec
    rng = random.Random(0)

    def request(k: int) -> Generate:
        label = rng.randrange(spec.image.classes) if spec.image.labels else None
        steps = rng.randint(spec.steps.min, min(spec.steps.max, spec.steps.min + 9))
        guidance = 1.0 if spec.guidance_scale is None else rng.choice([1.0, spec.guidance_scale.default, 3.0])
        solver = rng.choice(spec.solvers) if spec.solvers else None
        return Generate(1, rng.getrandbits(64), steps, solver, label, None, guidance)

    told: dict[str, list[bytes]] = {}

    def tell(job: str, message: Message, final: bool) -> None:
        assert not isinstance(message, Failed) or message.kind == "cancelled", message
        if isinstance(message, ImageDone):
            told.setdefault(job, []).append(message.pixels.tobytes())

    engine = Engine(tell)
    engine.put("m", "1", model)
    mine = request(0)
    engine.submit("alone", "m", mine)
    while engine.step():
        pass
    others = [f"other{k}" for k in range(63)]
    for k, name in enumerate(others):
        if k == 31:
            engine.submit("mine", "m", mine)
        engine.submit(name, "m", request(k))
        if k % 8 == 7:
            engine.step()
    engine.cancel("other7")
    while "mine" not in told:
        assert engine.step()
    assert told["mine"] == told["alone"]


@checkpoints
@torch.inference_mode()
def test_it_draws_pictures_not_noise(folder: Path) -> None:
    """Neighbouring pixels are alike, and of Fashion-MNIST the border is dark and the middle is not."""
    model = _checkpoint.load(folder)
    spec = model.spec
    solver = spec.solvers[0] if spec.solvers else None
    labels = range(4) if spec.image.labels else [-1] * 4
    prompt = "a large red circle" if spec.image.captions else None
    guidance = 1.0 if spec.guidance_scale is None else spec.guidance_scale.default
    draws = [Draw(3, k, spec.steps.default, solver, label, prompt, guidance) for k, label in enumerate(labels)]
    rows = model.init(draws)
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    image = model.image(rows)[:, 0]
    shuffled = image.flatten(1)[:, torch.randperm(image[0].numel(), generator=torch.manual_seed(0))]
    assert image.diff(dim=2).square().mean() < 0.5 * shuffled.diff(dim=1).square().mean()
    if folder.name.startswith("fashion-mnist"):
        border = torch.cat([image[:, 0], image[:, :, 0], image[:, :, -1]], dim=1)
        assert border.mean() < 0.2
        assert image[:, 10:18, 10:18].mean() > 0.2
