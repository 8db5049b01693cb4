"""The contract: what every family file found in models/ keeps. A new family needs a line in TINY, nothing else here."""

from __future__ import annotations

import ast
import dataclasses
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator

import models
from models import _checkpoint, _modes, _rows
from models._protocol import UNLABELLED, Autoencoder, Batch, Denoiser, Density, Draw, ImageSpace, Localiser, Model, Rows
from service.engine import Engine
from service.messages import Completed, Generate, ImageDone, MapImages, Mapped, Message, Scored, ScoreImages

LABELLED = ImageSpace(width=8, height=8, channels=1, labels=("a", "b", "c"))

CAPTIONED = ImageSpace(width=8, height=8, channels=3, captions=True)
CAPTIONS = ("a red circle", "two blue squares", "a small green triangle above a red square", "a circle")

# Case -> a configuration that runs in milliseconds, and the images it is for. A case is a family, or one of several
# models that a family's Config chooses between: "vae", "vae:hierarchical".
TINY: dict[str, tuple[dict[str, Any], ImageSpace]] = {
    "bayesnet": ({"bins": 4, "by_class": True}, LABELLED),
    "bayesnet:naive": ({"tree": False, "by_class": True}, LABELLED),
    "boltzmann": ({"hidden": (12,), "chains": 6, "particles": 4, "temperatures": 5}, LABELLED),
    "boltzmann:deep": ({"hidden": (12, 8), "chains": 6, "particles": 4, "temperatures": 5}, LABELLED),
    "dalle": (
        {
            "codes": 64,
            "dims": 4,
            "width": 8,
            "blocks": 1,
            "vocabulary": 270,
            "caption_tokens": 4,
            "transformer_width": 18,
            "layers": 2,
        },
        CAPTIONED,
    ),
    "consistency": ({"channels": 16, "multipliers": (1, 2)}, LABELLED),
    "ddpm": ({"channels": 16, "multipliers": (1, 2), "bound_steps": 5}, LABELLED),
    "flow_matching": ({"channels": 16, "multipliers": (1, 2), "score_steps": 4}, LABELLED),
    "ebm": (
        {"channels": (8, 8), "blocks": (1, 0), "langevin_steps": 2, "replay": 30, "rank": 4, "default_steps": 5},
        LABELLED,
    ),
    "gan": (
        {"latent": 4, "embedding": 4, "generator_channels": (8, 8), "critic_channels": (8, 8), "blocks": (0, 1)},
        LABELLED,
    ),
    "gan:style": (
        {
            "latent": 4,
            "embedding": 4,
            "generator_channels": (8, 8),
            "critic_channels": (8, 8),
            "blocks": (0, 1),
            "generator": "style",
        },
        LABELLED,
    ),
    "gan:text": (
        {
            "latent": 4,
            "generator_channels": (8, 8),
            "critic_channels": (8, 8),
            "blocks": (0, 1),
            "generator": "style",
            "objective": "logistic",
            "vocabulary": 270,
            "text_width": 8,
        },
        CAPTIONED,
    ),
    "glow": ({"couplings": (2, 2), "widths": (8, 8), "maps": 2}, LABELLED),
    "latent_diffusion": (
        {
            "widths": (8, 8),
            "code_channels": 2,
            "critic_width": 8,
            "channels": 16,
            "blocks": 1,
            "autoencoder_share": 0.5,
        },
        LABELLED,
    ),
    "nice": ({"couplings": ("convolutional", "convolutional", "dense", "dense"), "units": 8, "channels": 8}, LABELLED),
    "pixel_transformer": (
        {"width": 8, "heads": 2, "hidden": 8, "layers": ("near", "column", "all"), "near": 9, "embedding": 4},
        LABELLED,
    ),
    "gaussian": ({}, LABELLED),
    "gaussian:mixture": ({"components": 2, "rank": 2, "by_class": True, "iterations": 5}, LABELLED),
    "pixelcnn": ({"features": 8, "dilations": (1, 2), "hidden": 8, "embedding": 4}, LABELLED),
    "realnvp": ({"couplings": (2, 2), "widths": (8, 8)}, LABELLED),
    "score_sde": ({"channels": 16, "multipliers": (1, 2), "score_steps": 4}, LABELLED),
    "score_sde:ve": ({"channels": 16, "multipliers": (1, 2), "score_steps": 4, "sde": "ve"}, LABELLED),
    "vae": ({"latent": 4, "width": 8, "blocks": 1, "hidden": 16, "components": 2, "importance_samples": 4}, LABELLED),
    "vae:hierarchical": (
        {
            "width": 8,
            "blocks": 1,
            "components": 2,
            "importance_samples": 4,
            "groups": (1, 1, 1),
            "group_channels": (2, 2, 4),
        },
        LABELLED,
    ),
    "vqvae": (
        {
            "groups": 2,
            "codes": 64,
            "dims": 4,
            "width": 8,
            "blocks": 1,
            "prior_width": 16,
            "prior_heads": 2,
            "prior_layers": 2,
        },
        LABELLED,
    ),
}

SIZE = 16


def family_of(case: str) -> ModuleType:
    return models.family(case.partition(":")[0])


def untrained(case: str) -> Model:
    config, space = TINY[case]
    module = family_of(case)
    model: Model = module.Model(module.Config(**config), space)
    return model


def examples(n: int, space: ImageSpace) -> Batch:
    """Training data: pictures, and their labels or captions."""
    labels = torch.arange(n) % space.classes if space.labels else torch.full((n,), UNLABELLED)
    captions = tuple(CAPTIONS[k % len(CAPTIONS)] for k in range(n)) if space.captions else ()
    return Batch(pictures(n, space), labels, captions)


families = pytest.mark.parametrize("name", sorted(TINY))
READERS = ("dalle", "gan")  # families that read captions
densities = pytest.mark.parametrize("name", [c for c in sorted(TINY) if untrained(c).spec.likelihood is not None])


@pytest.fixture(scope="module")
def make() -> Callable[[str], Model]:
    """A tiny model by family, with weights moved away from an initialisation that may be trivial."""
    made: dict[str, Model] = {}

    def build(name: str) -> Model:
        if name not in made:
            torch.manual_seed(0)
            with torch.inference_mode(False), torch.no_grad():  # whichever test asks first
                model = untrained(name)
                model.prepare([examples(8, model.spec.image)])
                for parameter in model.parameters():
                    parameter.add_(0.05 * torch.randn_like(parameter))
                model.conclude([examples(8, model.spec.image)])
            made[name] = model.eval().requires_grad_(False)
        return made[name]

    return build


def pictures(n: int, space: ImageSpace, seed: int = 0) -> torch.Tensor:
    """(n, C, H, W) on the grid k / 255: blurred noise, so that neighbours resemble each other."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand(n, *space.shape, generator=generator)
    return (torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1) * 255).round() / 255


def draws(model: Model, n: int, seed: int = 0) -> list[Draw]:
    """Requests as different from each other as the Spec allows."""
    rng = random.Random(seed)
    spec = model.spec
    out = []
    for k in range(n):
        out.append(
            Draw(
                seed=rng.getrandbits(64),
                sample=k % 3,
                steps=rng.randint(spec.steps.min, min(spec.steps.max, spec.steps.min + 11)),
                solver=rng.choice(spec.solvers) if spec.solvers else None,
                label=rng.randint(-1, spec.image.classes - 1) if spec.image.labels else UNLABELLED,
                guidance_scale=1.0
                if spec.guidance_scale is None
                else rng.choice([1.0, spec.guidance_scale.default, 2.0]),
                temperature=1.0 if spec.temperature is None else rng.choice([1.0, 0.7, spec.temperature.default]),
                prompt=rng.choice([None, *CAPTIONS]) if spec.image.captions else None,
                top_k=None if spec.top_k is None else rng.choice([None, 1, spec.top_k // 2, spec.top_k]),
            )
        )
    return out


def finish(model: Model, rows: Rows) -> Rows:
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    return rows


def levels(image: torch.Tensor) -> np.ndarray:
    return (image * 255).round().to(torch.uint8).numpy()


@pytest.mark.parametrize("name", [case for case in sorted(TINY) if case.partition(":")[0] not in READERS])
def test_captions_are_nothing_to_a_family_that_reads_none(name: str) -> None:
    """It learns from such images all the same, and its Spec lets nobody ask for a prompt."""
    config, space = TINY[name]
    module = family_of(name)
    model = module.Model(module.Config(**config), dataclasses.replace(space, captions=True))
    assert not model.spec.image.captions
    assert "prompt" not in model.spec.to_json()["accepts"]


def test_every_family_found_has_a_tiny_configuration() -> None:
    assert sorted({case.partition(":")[0] for case in TINY}) == models.family_names()


@families
def test_a_family_knows_torch_and_what_families_share_and_nothing_else(name: str) -> None:
    tree = ast.parse(Path(family_of(name).__file__ or "").read_text(encoding="utf-8"))
    known = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {f"{node.module}.{alias.name}" for alias in node.names}
    allowed = ("torch", "models._", *sys.stdlib_module_names)
    assert not {module for module in known if not module.startswith(allowed)}


@families
def test_the_spec_is_json_and_its_schemas_are_schemas(name: str, make: Callable[[str], Model]) -> None:
    spec = make(name).spec
    assert spec.family == name.partition(":")[0]
    assert json.loads(json.dumps(spec.to_json())) == spec.to_json()
    assert 1 <= spec.steps.min <= spec.steps.default <= spec.steps.max
    for field, schema in spec.accepts().items():
        Draft202012Validator.check_schema(schema)
        if "default" in schema:
            Draft202012Validator(schema).validate(schema["default"])
        assert field in ("steps", "solver", "label", "prompt", "guidance_scale", "temperature", "top_k")


@families
def test_the_spec_says_whether_it_is_a_density(name: str, make: Callable[[str], Model]) -> None:
    model = make(name)
    assert isinstance(model, Density) == (model.spec.likelihood is not None)


@families
@torch.inference_mode()
def test_a_row_takes_as_many_steps_as_asked_and_its_image_is_valid_at_each(
    name: str, make: Callable[[str], Model]
) -> None:
    model = make(name)
    asked = draws(model, 5)
    rows = model.init(asked)
    assert rows.tick.tolist() == [0] * 5
    spec = model.spec
    assert rows.left.tolist() == [1 if d.solver in spec.adaptive else spec.ticks(d.steps, d.solver) for d in asked]
    taken = 0
    while int(rows.left.max()) > 0:
        assert ((rows.progress() >= 0) & (rows.progress() <= 1)).all()
        image = model.image(rows)
        assert image.shape == (len(rows.tick), *model.spec.image.shape)
        assert image.isfinite().all()
        assert image.min() >= 0
        assert image.max() <= 1
        before = image.clone()
        assert torch.equal(model.image(rows), before), "a preview changes nothing"
        rows = _rows.take(rows, [i for i, left in enumerate(rows.left.tolist()) if left > 0])
        rows = model.step(rows)
        taken += 1
        assert rows.tick.tolist() == [taken] * len(rows.tick)
    assert rows.progress().tolist() == [1.0] * len(rows.left)
    assert rows.left.tolist() == [0] * len(rows.left)


@families
@torch.inference_mode()
def test_image_is_a_function_of_the_draw_alone(name: str, make: Callable[[str], Model]) -> None:
    """The same bytes alone and amid others that join and leave at any step, in batches of one size: at other sizes
    floats may differ, which is the engine's to see to.
    """
    model = make(name)
    asked = draws(model, 12, seed=1)
    expected = {}
    for k, draw in enumerate(asked):
        rows = _rows.pad(model.init([draw]), SIZE)
        expected[k] = levels(model.image(finish(model, rows)))[0]
    for seed in range(3):
        assert_crowd(model, asked, expected, random.Random(seed))


def assert_crowd(model: Model, asked: list[Draw], expected: dict[int, np.ndarray], rng: random.Random) -> None:
    order = list(range(len(asked)))
    rng.shuffle(order)
    running: list[int] = []
    rows: Rows | None = None
    seen = {}
    while order or running:
        if order and (not running or rng.random() < 0.5):
            joining = [order.pop() for _ in range(min(len(order), rng.randint(1, 4)))]
            fresh = model.init([asked[k] for k in joining])
            rows = fresh if rows is None else _rows.cat([_rows.take(rows, range(len(running))), fresh])
            running += joining
            rows = _rows.pad(rows, SIZE)
        assert rows is not None
        rows = model.step(rows)
        left = rows.left.tolist()[: len(running)]
        for i in [i for i, n in enumerate(left) if n == 0]:
            seen[running[i]] = levels(model.image(_rows.pad(_rows.take(rows, [i]), SIZE)))[0]
        keep = [i for i, n in enumerate(left) if n > 0]
        running = [running[i] for i in keep]
        rows = _rows.pad(_rows.take(rows, keep), SIZE) if keep else None
    for k, image in expected.items():
        np.testing.assert_array_equal(seen[k], image)


@families
@torch.inference_mode()
def test_any_step_can_be_taken_again(name: str, make: Callable[[str], Model]) -> None:
    """What the engine relies on when a step raised: writes in place can be repeated."""
    model = make(name)
    asked = draws(model, 4, seed=2)[:1] * 4
    once = finish(model, model.init(asked))
    rows = model.init(asked)
    while int(rows.left.max()) > 0:
        model.step(dataclasses.replace(rows))  # and forget what came of it
        rows = model.step(dataclasses.replace(rows))
    np.testing.assert_array_equal(levels(model.image(rows)), levels(model.image(once)))


@families
@torch.inference_mode()
def test_different_seeds_samples_and_labels_give_different_images(name: str, make: Callable[[str], Model]) -> None:
    model = make(name)
    spec = model.spec
    base = {"steps": min(spec.steps.max, spec.steps.min + 3), "solver": spec.solvers[0] if spec.solvers else None}
    label = 0 if spec.image.labels else UNLABELLED
    asked = [Draw(1, 0, label=label, **base), Draw(2, 0, label=label, **base), Draw(1, 1, label=label, **base)]
    if "label" in spec.accepts():
        asked.append(Draw(1, 0, label=1, **base))
    if "prompt" in spec.accepts():
        asked += [Draw(1, 0, prompt=caption, **base) for caption in CAPTIONS[:2]]
    images = model.image(finish(model, model.init(asked)))
    for i in range(1, len(asked)):
        assert not torch.equal(images[0], images[i])


@families
@torch.inference_mode()
def test_save_load_sample_again(name: str, make: Callable[[str], Model], tmp_path: Path) -> None:
    model = make(name)
    config = family_of(name).Config(**TINY[name][0])
    _checkpoint.save(tmp_path / "m", model, config, {"metrics": {}})
    again = _checkpoint.load(tmp_path / "m")
    assert again.spec == model.spec
    asked = draws(model, 4, seed=3)
    same = [levels(m.image(finish_each(m, asked))) for m in (model, again)]
    np.testing.assert_array_equal(*same)


def finish_each(model: Model, asked: list[Draw]) -> Rows:
    """All finished, though they take different numbers of steps."""
    return _rows.cat([finish(model, model.init([draw])) for draw in asked])


@families
def test_a_model_is_read_only(name: str, make: Callable[[str], Model]) -> None:
    model = make(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.inference_mode():
        finish(model, model.init(draws(model, 1)))
        if isinstance(model, Density):
            model.log_prob(pictures(2, model.spec.image))
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


@families
@torch.inference_mode()
def test_networks_that_drawing_calls_run_in_bfloat16_too(name: str, make: Callable[[str], Model]) -> None:
    model = make(name)
    try:
        calls = _modes.called(model)
    except _modes.NotApplicable:
        return  # it draws by no network of tensors: the server says so, and draws in float32
    for network, args in calls.items():
        call = model.networks()[network]
        low, plain = (_modes.flat(found) for found in (_modes.Autocast(call, model.device)(*args), call(*args)))
        assert [(part.dtype, part.shape) for part in low] == [(part.dtype, part.shape) for part in plain]
        for found, expected in zip(low, plain, strict=True):
            torch.testing.assert_close(found, expected, rtol=0.1, atol=0.1)


@densities
@torch.inference_mode()
def test_scores_have_the_kind_that_the_spec_says(name: str, make: Callable[[str], Model]) -> None:
    model = make(name)
    assert isinstance(model, Density)
    likelihood = model.spec.likelihood
    assert likelihood is not None
    x = pictures(6, model.spec.image)
    rows = model.score_init(x, torch.full((6,), UNLABELLED))
    assert rows.left.tolist() == [likelihood.steps] * 6
    score = model.log_prob(x)
    value = score.log_prob if likelihood.kind != "unnormalised" else score.energy
    assert value is not None
    assert value.shape == (6,)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    if likelihood.kind == "exact":
        assert (value <= 0).all()
    if score.per_pixel is not None:
        assert score.per_pixel.shape == (6, model.spec.image.height, model.spec.image.width)
        torch.testing.assert_close(score.per_pixel.flatten(1).sum(1), value)
    for statistic in score.statistics.values():
        assert statistic.shape == (6,)
    assert not score.statistics.keys() & score.features.keys()
    for name, feature in score.features.items():
        assert feature.shape == (6, feature.shape[1]), name
        assert feature.isfinite().all(), name


@densities
@torch.inference_mode()
def test_an_image_has_one_score(name: str, make: Callable[[str], Model]) -> None:
    """Whatever else is in the batch, and whenever it is asked."""
    model = make(name)
    assert isinstance(model, Density)
    x = pictures(8, model.spec.image, seed=4)

    def value(x: torch.Tensor) -> torch.Tensor:
        score = model.log_prob(x)
        found = score.energy if score.log_prob is None else score.log_prob
        assert found is not None
        return found

    together, flipped = value(x), value(x.flip(0))
    apart = torch.cat([value(x[k : k + 1].expand(8, -1, -1, -1))[:1] for k in range(8)])
    torch.testing.assert_close(together, flipped.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


@densities
def test_the_spec_says_whether_it_has_heat_maps(name: str, make: Callable[[str], Model]) -> None:
    likelihood = make(name).spec.likelihood
    assert likelihood is not None
    assert isinstance(make(name), Localiser) == (likelihood.heatmap_evaluations > 0)


@densities
@torch.inference_mode()
def test_a_heat_map_is_the_same_alone_and_in_any_batch(name: str, make: Callable[[str], Model]) -> None:
    model = make(name)
    if not isinstance(model, Localiser):
        pytest.skip("no heat map")
    x = pictures(8, model.spec.image, seed=5)
    labels = torch.arange(8) % (model.spec.image.classes + 1) - 1

    def maps(x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = model.map_init(x, labels)
        assert rows.left.tolist() == [1] * len(x)
        rows = model.map_step(rows)
        assert rows.left.tolist() == [0] * len(x)
        return rows.surprise

    together = maps(x, labels)
    assert together.shape == (8, *model.spec.image.shape[1:])
    assert together.dtype == torch.float32
    assert together.isfinite().all()
    torch.testing.assert_close(maps(x.flip(0), labels.flip(0)).flip(0), together, rtol=0, atol=0)
    apart = [maps(x[k : k + 1].expand(8, -1, -1, -1), labels[k : k + 1].expand(8))[0] for k in range(8)]
    torch.testing.assert_close(torch.stack(apart), together, rtol=0, atol=0)
    assert together.flatten(1).std(dim=1).min() > 0, "it says where"


@families
@torch.inference_mode()
def test_a_denoiser_takes_any_noise_row_by_row(name: str, make: Callable[[str], Model]) -> None:
    model = make(name)
    if not isinstance(model, Denoiser):
        pytest.skip("no denoiser")
    x0 = 2 * pictures(SIZE, model.spec.image) - 1
    sigma = torch.logspace(-3, 3, SIZE)
    labels = torch.arange(SIZE) % (model.spec.image.classes + 1) - 1
    guidance = torch.tensor([1.0, 2.0]).repeat_interleave(4).repeat(SIZE // 8)
    x = x0 + sigma[:, None, None, None] * torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    denoised = model.denoised(x, sigma, labels, guidance)
    assert denoised.shape == x.shape
    assert denoised.dtype == torch.float32
    assert denoised.isfinite().all()
    order = torch.randperm(SIZE, generator=torch.Generator().manual_seed(2))
    again = model.denoised(x[order], sigma[order], labels[order], guidance[order])
    torch.testing.assert_close(again, denoised[order])
    unlabelled = torch.full_like(labels, UNLABELLED)
    by_guidance = [model.denoised(x, sigma, unlabelled, torch.full((SIZE,), g)) for g in (1.0, 3.0)]
    torch.testing.assert_close(*by_guidance)


@families
@torch.inference_mode()
def test_an_autoencoder_gives_images_back_one_by_one(name: str, make: Callable[[str], Model]) -> None:
    model = make(name)
    if not isinstance(model, Autoencoder):
        pytest.skip("no autoencoder")
    x = pictures(8, model.spec.image, seed=6)
    labels = torch.arange(8) % (model.spec.image.classes + 1) - 1
    back = model.reconstruct(x, labels)
    assert back.shape == x.shape
    assert back.isfinite().all()
    assert back.min() >= 0
    assert back.max() <= 1
    torch.testing.assert_close(model.reconstruct(x.flip(0), labels.flip(0)), back.flip(0))
    assert torch.equal(model.reconstruct(x, labels), back), "no noise in it"


@families
def test_one_step_of_training_lowers_a_loss_and_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    model = untrained(name).train()
    batch = examples(16, model.spec.image)
    with torch.no_grad():
        model.prepare([batch])
    groups = model.groups()
    owners = {id(p): g for g, ps in groups.items() for p in ps}
    assert set(owners) == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(map(len, groups.values())) == len(owners), "no parameter is in two groups"
    optimisers = {g: torch.optim.Adam(ps, lr=1e-3) for g, ps in groups.items()}
    touched: set[int] = set()
    for step in range(12):
        for group, loss, metrics in model.objective(dataclasses.replace(batch, step=step, steps=12)):
            assert loss.dim() == 0
            assert loss.isfinite()
            assert all(m.dim() == 0 and not m.requires_grad for m in metrics.values())
            gradients = torch.autograd.grad(loss, groups[group], allow_unused=True)
            for parameter, gradient in zip(groups[group], gradients, strict=True):
                parameter.grad = gradient
                if gradient is not None and gradient.abs().sum() > 0:
                    touched.add(id(parameter))
            optimisers[group].step()
    untouched = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in touched]
    assert not untouched


@families
def test_the_engine_serves_it(name: str, make: Callable[[str], Model]) -> None:
    """Through the one engine: drawn amid others equals drawn alone; scored in a burst equals scored alone."""
    model = make(name)
    spec = model.spec
    told: dict[str, list[Message]] = {}
    engine = Engine(lambda job, message, final: told.setdefault(job, []).append(message), max_rows=8)
    engine.put("m", "1", model)
    tasks = {
        f"job{k}": Generate(
            2,
            d.seed,
            d.steps,
            d.solver,
            None if d.label == UNLABELLED else d.label,
            d.prompt,
            d.guidance_scale,
            d.temperature,
            d.top_k,
        )
        for k, d in enumerate(draws(model, 6, seed=5))
    }
    for job, task in tasks.items():
        engine.submit(job, "m", task)
        engine.step()
    while engine.step():
        pass
    crowd = {job: pixels(told[job]) for job in tasks}
    for job, task in tasks.items():
        assert isinstance(told[job][-1], Completed)
        engine.submit(f"{job} alone", "m", task)
        while engine.step():
            pass
        np.testing.assert_array_equal(pixels(told[f"{job} alone"]), crowd[job])
    if spec.likelihood is not None:
        images = (pictures(11, spec.image) * 255).round().to(torch.uint8).numpy()
        engine.submit("scores", "m", ScoreImages(images, (-1,) * 11))
        engine.submit("score", "m", ScoreImages(images[3:4], (-1,)))
        while engine.step():
            pass
        scores = {m.index: m for m in told["scores"] if isinstance(m, Scored)}
        single = [m for m in told["score"] if isinstance(m, Scored)]
        assert sorted(scores) == list(range(11))
        assert (single[0].log_prob, single[0].energy) == (scores[3].log_prob, scores[3].energy)
        assert single[0].statistics == scores[3].statistics
        for feature, vector in scores[3].features.items():
            np.testing.assert_array_equal(single[0].features[feature], vector)
        if spec.likelihood.heatmap_evaluations:
            engine.submit("maps", "m", MapImages(images, (-1,) * 11))
            engine.submit("map", "m", MapImages(images[3:4], (-1,)))
            while engine.step():
                pass
            maps = {m.index: m.surprise for m in told["maps"] if isinstance(m, Mapped)}
            (alone,) = (m.surprise for m in told["map"] if isinstance(m, Mapped))
            assert sorted(maps) == list(range(11))
            np.testing.assert_array_equal(alone, maps[3])
            assert isinstance(done := told["map"][-1], Completed)
            assert done.network_evaluations == spec.likelihood.heatmap_evaluations


def pixels(messages: list[Message]) -> np.ndarray:
    done = {m.sample: m.pixels for m in messages if isinstance(m, ImageDone)}
    return np.stack([done[k] for k in sorted(done)])
