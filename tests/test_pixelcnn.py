"""Gated PixelCNN: exact by enumeration, causal by gradient, and its cached sampler equal to the naive one."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from models import _native, _pixelcnn_sampler, _pixels, _rows, pixelcnn
from models._pixelcnn_sampler import PixelRows
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from models.pixelcnn import Config, Model

GREY = ImageSpace(width=7, height=6, channels=1, labels=("a", "b", "c"))
COLOUR = ImageSpace(width=5, height=4, channels=3)
SMALL = Config(features=8, dilations=(1, 2, 3), hidden=16, embedding=4)
TINY = Config(features=8, dilations=(1, 2), hidden=8, embedding=3)


def build(config: Config, space: ImageSpace, seed: int = 0) -> Model:
    """A model whose logits are far from alike, so that every dependence shows."""
    torch.manual_seed(seed)
    model = Model(config, space)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(1.4 * parameter + 0.1 * torch.randn_like(parameter))
    return model.eval()


def every_image(space: ImageSpace, levels: int) -> Tensor:
    """(levels^D, C, H, W): all that the space holds."""
    images = torch.tensor(list(itertools.product(range(levels), repeat=space.dims)), dtype=torch.float32)
    return images.view(-1, *space.shape) / (levels - 1)


def draws(space: ImageSpace, n: int) -> list[Draw]:
    steps, choices = space.width * space.height, space.classes + 1
    return [
        Draw(seed=100 + i, sample=i, steps=steps, label=i % choices - 1, temperature=0.6 + 0.2 * (i % 4))
        for i in range(n)
    ]


@torch.inference_mode()
def sample(model: Model, requests: list[Draw]) -> Tensor:
    rows = model.init(requests)
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    return model.image(rows)


@torch.inference_mode()
def sample_naively(model: Model, requests: list[Draw]) -> Tensor:
    """A full forward pass for every channel of every pixel."""
    rows = model.init(requests)
    c, h, w = model.spec.image.shape
    top = model.config.levels - 1
    x = torch.zeros(len(requests), c, h, w)
    for i in range(h * w):
        for k in range(c):
            logits = model.logits(x, rows.label)[:, k, i // w, i % w]
            x[:, k, i // w, i % w] = (
                _pixelcnn_sampler.draw(logits, rows.uniforms[:, i, k, None], rows.temperature)[:, 0] / top
            )
    return (x * 255).round() / 255


# -------------------------------------------------------------------------------------------------------------- density


@pytest.mark.parametrize(
    ("space", "levels"),
    [
        (ImageSpace(width=2, height=2, channels=1, labels=("a", "b")), 4),
        (ImageSpace(width=3, height=1, channels=2), 4),
        (ImageSpace(width=1, height=3, channels=3, labels=("a",)), 2),
    ],
)
def test_probabilities_of_a_whole_space_sum_to_one(space: ImageSpace, levels: int) -> None:
    model = build(dataclasses.replace(TINY, levels=levels), space)
    x = every_image(space, levels)
    for label in range(UNLABELLED, space.classes):
        log_prob = model.log_prob(x, torch.full((len(x),), label)).log_prob
        assert log_prob is not None
        assert log_prob.max() <= 0
        assert log_prob.std() > 0.3  # far from uniform
        assert log_prob.double().exp().sum().item() == pytest.approx(1.0, abs=1e-5)


def test_entropy_is_the_expected_surprisal_and_surprises_are_uncorrelated() -> None:
    """By enumeration: E[−log p(x)] = E[Σ entropy], and pixels' surprises have mean zero and no correlation."""
    space = ImageSpace(width=2, height=2, channels=2)
    model = build(dataclasses.replace(TINY, levels=3), space)
    x = every_image(space, 3)
    with torch.inference_mode():
        score = model.log_prob(x)
        log_prob, entropy = model.pixel_terms(x, torch.full((len(x),), UNLABELLED))
    p = log_prob.double().sum(dim=(1, 2)).exp()
    surprise = -(log_prob + entropy).double()
    assert (p[:, None, None] * surprise).sum(dim=0).abs().max() < 1e-5
    assert (p @ (surprise.flatten(1) ** 2)).min() > 0.01  # they do vary
    covariance = torch.einsum("n,ni,nj->ij", p, surprise.flatten(1), surprise.flatten(1))
    assert (covariance - covariance.diag().diag()).abs().max() < 1e-5
    assert (p @ score.statistics["autocorrelation"].double()).abs().item() < 1e-5
    torch.testing.assert_close(score.statistics["entropy"], entropy.sum(dim=(1, 2)))
    torch.testing.assert_close(score.statistics["worst_tile"], surprise.sum(dim=(1, 2)).float())  # one tile holds all


def test_log_prob_is_the_sum_of_its_pixel_terms_under_the_logits() -> None:
    model = build(SMALL, COLOUR)
    x = torch.randint(0, 256, (3, *COLOUR.shape)) / 255
    labels = torch.full((3,), UNLABELLED)
    with torch.inference_mode():
        score = model.log_prob(x, labels)
        logits = model.logits(x, labels)
    assert score.log_prob is not None
    assert score.per_pixel is not None
    assert logits.shape == (3, *COLOUR.shape, 256)
    terms = logits.log_softmax(dim=-1).gather(-1, (x * 255).round().long()[..., None])[..., 0]
    torch.testing.assert_close(score.per_pixel, terms.sum(dim=1))
    torch.testing.assert_close(score.log_prob, score.per_pixel.sum(dim=(1, 2)))


# ------------------------------------------------------------------------------------------------------------ causality


@pytest.mark.parametrize("space", [GREY, COLOUR])
def test_a_pixel_depends_on_every_earlier_pixel_and_on_no_other(space: ImageSpace) -> None:
    """∂ logits_(i, c) / ∂ x_(j, k) ≠ 0 exactly for j < i, and for j = i, k < c: causal, and no blind spot."""
    model = build(dataclasses.replace(SMALL, features=16), space)
    pixels = space.width * space.height
    levels = torch.randint(0, 256, (1, space.height, space.width, space.channels))
    embedded = model.network.embed(levels).detach().requires_grad_()
    features = model.network(embedded, torch.tensor([space.classes - 1]))
    for c in range(space.channels):
        logits = model.network.logits(c, features, embedded).view(pixels, -1)
        for i in range(pixels):
            (gradient,) = torch.autograd.grad(
                logits[i].square().sum(), embedded, retain_graph=True, materialize_grads=True
            )
            influence = gradient.view(pixels * space.channels, -1).abs().amax(dim=1)
            before = i * space.channels + c
            assert (influence[:before] > 0).all(), f"blind spot of pixel {i}, channel {c}"
            assert (influence[before:] == 0).all(), f"pixel {i}, channel {c} sees what comes after it"


def test_label_and_place_reach_every_pixel() -> None:
    model = build(SMALL, GREY)
    embedded = model.network.embed(torch.zeros(1, GREY.height, GREY.width, 1, dtype=torch.int64))
    by_label = [model.network(embedded, torch.tensor([label])) for label in (UNLABELLED, 0, 1, 2)]
    for a, b in itertools.combinations(by_label, 2):
        assert (a - b).abs().amax(dim=3).min() > 1e-4
    assert by_label[0].view(-1, SMALL.features).unique(dim=0).shape[0] == GREY.width * GREY.height


# -------------------------------------------------------------------------------------------------------------- sampler


@pytest.mark.parametrize(
    ("config", "space"),
    [
        (SMALL, GREY),
        (dataclasses.replace(SMALL, levels=8), COLOUR),
        (dataclasses.replace(SMALL, dilations=(5,)), ImageSpace(width=3, height=4, channels=1)),
        (SMALL, ImageSpace(width=1, height=5, channels=1)),
    ],
)
def test_cached_sampler_equals_naive_sampler(config: Config, space: ImageSpace) -> None:
    model = build(config, space)
    requests = draws(space, 6)
    cached = sample(model, requests)
    assert torch.equal(cached, sample_naively(model, requests))
    assert cached.std() > 0.1
    assert torch.equal((cached * 255).round() / 255, cached)


@pytest.fixture
def in_torch(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Ticks in tensor operations, as without a C compiler (that C does the same: tests/test_native.py)."""
    monkeypatch.setenv("DRAWWELL_NATIVE", "0")
    _native.library.cache_clear()
    yield
    _native.library.cache_clear()


@pytest.fixture
def drawn_logits(in_torch: None, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The logits of every call of `draw`, in order."""
    seen: list[Tensor] = []
    original = _pixelcnn_sampler.draw

    def spy(logits: Tensor, uniforms: Tensor, temperature: Tensor) -> Tensor:
        seen.append(logits.clone())
        return original(logits, uniforms, temperature)

    monkeypatch.setattr(_pixelcnn_sampler, "draw", spy)
    return seen


@pytest.mark.parametrize("space", [GREY, COLOUR])
def test_cached_logits_equal_those_of_the_full_forward(space: ImageSpace, drawn_logits: list[Tensor]) -> None:
    model = build(SMALL, space)
    requests = draws(space, 4)
    x = sample(model, requests)
    cached = torch.stack(drawn_logits, dim=1)  # (B, H·W·C, levels)
    with torch.inference_mode():
        full = model.logits(x, torch.tensor([d.label for d in requests]))
    torch.testing.assert_close(cached, full.permute(0, 2, 3, 1, 4).flatten(1, 3), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("in_c", [True, False])
def test_weights_that_are_written_or_moved_show(in_c: bool, request: pytest.FixtureRequest) -> None:
    """Though what a tick reads of them is kept from image to image."""
    if not in_c:
        request.getfixturevalue("in_torch")
    model, other, requests = build(SMALL, GREY), build(SMALL, GREY, seed=1), draws(GREY, 3)
    first, second = sample(model, requests), sample(other, requests)
    assert not torch.equal(first, second)
    model.load_state_dict(other.state_dict())
    assert torch.equal(sample(model, requests), second)
    original = build(SMALL, GREY)
    for parameter, put in zip(model.parameters(), original.parameters(), strict=True):
        parameter.data = put.data.clone(memory_format=torch.preserve_format)
    assert torch.equal(sample(model, requests), first)


def test_rows_join_and_leave_and_stand_at_different_pixels() -> None:
    """Every image is the one that it is alone, whoever steps beside it."""
    model = build(SMALL, GREY)
    requests = draws(GREY, 9)
    alone = [sample(model, [request]) for request in requests]
    generator = torch.Generator().manual_seed(0)
    waiting, finished = list(range(9)), {}
    names: list[int] = []
    rows: PixelRows | None = None
    with torch.inference_mode():
        while waiting or names:
            if waiting and (not names or torch.rand((), generator=generator) < 0.15):
                joining = [waiting.pop() for _ in range(min(len(waiting), 2))]
                new = model.init([requests[i] for i in joining])
                rows, names = (new if rows is None or not names else _rows.cat([rows, new])), names + joining
            assert rows is not None
            rows = model.step(rows)
            if (rows.left == 0).any():
                for k in (rows.left == 0).nonzero().flatten().tolist():
                    finished[names[k]] = model.image(rows)[k : k + 1]
                stay = (rows.left > 0).nonzero().flatten()
                order = stay[torch.randperm(len(stay), generator=generator)]
                rows, names = _rows.take(rows, order), [names[k] for k in order.tolist()]
    assert len(set(map(int, model.init(requests).tick))) == 1
    for i, image in finished.items():
        assert torch.equal(image, alone[i])
    assert len(finished) == 9


@pytest.mark.usefixtures("in_torch")
def test_a_tick_that_failed_can_be_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raises leaves its rows as good as they were, whether they stand together or apart."""
    model = build(SMALL, GREY)
    requests = draws(GREY, 3)
    expected = sample(model, requests)
    original = _pixelcnn_sampler.draw

    def fail(*_: Tensor) -> Tensor:
        raise MemoryError

    for head_start in (0, 2, 7):
        with torch.inference_mode():
            rows = model.init(requests[:1])
            for _ in range(head_start):
                rows = model.step(rows)
            rows = _rows.cat([rows, model.init(requests[1:])])
            while int(rows.left.max()) > 0:
                unfinished = (rows.left > 0).nonzero().flatten()
                done = _rows.take(rows, (rows.left == 0).nonzero().flatten())
                rows = _rows.take(rows, unfinished)
                monkeypatch.setattr(_pixelcnn_sampler, "draw", fail)
                with pytest.raises(MemoryError):
                    model.step(rows)
                monkeypatch.setattr(_pixelcnn_sampler, "draw", original)
                rows = _rows.cat([done, model.step(rows)])
        assert torch.equal(model.image(rows), expected)


def test_preview_shows_what_is_drawn_and_grey_beyond() -> None:
    model = build(SMALL, COLOUR)
    final = sample(model, draws(COLOUR, 2)).flatten(2)
    with torch.inference_mode():
        rows = model.init(draws(COLOUR, 2))
        for tick in range(COLOUR.width * COLOUR.height):
            preview = model.image(rows).flatten(2)
            assert torch.equal(preview[..., :tick], final[..., :tick])
            assert (preview[..., tick:] == _pixels.NOT_YET).all()
            rows = model.step(rows)


def test_samples_follow_the_density() -> None:
    """Frequencies of all 16 images of a tiny space against their probabilities: χ² with 15 degrees of freedom."""
    space, n = ImageSpace(width=2, height=2, channels=1), 4000
    model = build(dataclasses.replace(TINY, levels=2), space)
    with torch.inference_mode():
        expected = n * model.log_prob(every_image(space, 2)).log_prob.exp()  # type: ignore[union-attr]
    x = sample(model, [Draw(seed=7, sample=i, steps=4) for i in range(n)])
    index = (x.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(dim=1).long()
    chi2 = ((index.bincount(minlength=16) - expected).square() / expected).sum()
    assert chi2 < 37.7  # exceeded by one seed in a thousand


def test_draw_inverts_the_distribution_function() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0]])
    n = 20_000
    uniforms = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for temperature in (0.5, 1.0, 2.0):
        levels = _pixelcnn_sampler.draw(
            logits.expand(n, 5), uniforms[:, None], torch.full((n, 1), temperature, dtype=torch.float64)
        )
        assert (levels.diff(dim=0) >= 0).all()
        share = levels[:, 0].bincount(minlength=5) / n
        assert (share - (logits[0] / temperature).softmax(0)).abs().max() <= 1 / n
        assert share[2] == 0


def test_draw_stays_in_range_at_the_ends_of_the_uniforms() -> None:
    ends = torch.tensor([[2.0**-24], [1 - 2.0**-24]], dtype=torch.float64)
    logits = torch.full((2, 256), -80.0)
    logits[:, 17] = 60.0
    assert _pixelcnn_sampler.draw(logits, ends, torch.full((2, 1), 0.1, dtype=torch.float64)).tolist() == [[17], [17]]
    assert _pixelcnn_sampler.draw(torch.zeros(2, 256), ends, torch.ones(2, 1, dtype=torch.float64)).tolist() == [
        [0],
        [255],
    ]


def test_low_temperature_draws_likelier_images() -> None:
    model = build(SMALL, GREY)
    likelihoods = []
    for temperature in (0.3, 1.0, 2.0):
        x = sample(model, [Draw(seed=1, sample=i, steps=42, temperature=temperature) for i in range(24)])
        with torch.inference_mode():
            likelihoods.append(model.log_prob(x).log_prob.mean())  # type: ignore[union-attr]
    assert likelihoods == sorted(likelihoods, reverse=True)


# ------------------------------------------------------------------------------------------------------------ objective


def test_gate_has_the_gradient_of_glu() -> None:
    u = torch.randn(2, 6, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pixelcnn.gate, (u,))
    torch.testing.assert_close(pixelcnn.gate(u), torch.nn.functional.glu(u, dim=1))


def test_objective_is_the_mean_negative_log_likelihood() -> None:
    model = build(dataclasses.replace(SMALL, label_dropout=0.0), GREY)
    x, labels = torch.randint(0, 256, (4, *GREY.shape)) / 255, torch.tensor([0, 1, 2, UNLABELLED])
    ((group, loss, metrics),) = model.objective(Batch(x, labels))
    assert {group} == model.groups().keys()
    log_prob = model.log_prob(x, labels).log_prob
    assert log_prob is not None
    torch.testing.assert_close(loss, -log_prob.mean() / GREY.dims)
    assert metrics["bits_per_dim"].item() == pytest.approx(loss.item() / math.log(2), rel=1e-6)


def test_hidden_labels_teach_the_null_label_alone() -> None:
    x, labels = torch.rand(8, *GREY.shape), torch.arange(8) % 3
    for dropout, learns in ((0.0, [True, True, True, False]), (1.0 - 1e-9, [False, False, False, True])):
        model = build(dataclasses.replace(SMALL, label_dropout=dropout), GREY)
        ((_, loss, _),) = model.objective(Batch(x, labels))
        assert model.network.label is not None
        (gradient,) = torch.autograd.grad(loss, [model.network.label.weight])
        assert (gradient != 0).any(dim=1).tolist() == learns


def test_learns_which_image_belongs_to_which_label() -> None:
    """Two labels with one image each: an image costs nothing given its label, a bit without, a lot otherwise."""
    torch.manual_seed(0)
    space = ImageSpace(width=4, height=4, channels=1, labels=("a", "b"))
    model = Model(Config(features=16, dilations=(1, 2), hidden=32, embedding=8, label_dropout=0.3), space)
    images = torch.randint(0, 256, (2, 1, 4, 4)) / 255
    labels = torch.tensor([0, 1])
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 150)
    for _ in range(150):
        ((_, loss, _),) = model.objective(Batch(images.repeat(8, 1, 1, 1), labels.repeat(8)))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()

    def bits(at: Tensor) -> Tensor:
        log_prob = model.log_prob(images, at).log_prob
        assert log_prob is not None
        return -log_prob / math.log(2)

    assert bits(labels).max() < 0.3
    assert (bits(torch.full((2,), UNLABELLED)) - 1).abs().max() < 0.5
    assert bits(labels.flip(0)).min() > 3
    assert torch.equal(sample(model, [Draw(seed=3, sample=i, steps=16, label=i) for i in (0, 1)]), images)


def test_a_model_without_labels_has_no_label_embedding() -> None:
    model = Model(SMALL, COLOUR)
    assert model.network.label is None
    assert "label" not in model.spec.accepts()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": 0}, "features: 0"),
        ({"hidden": -1}, "hidden: -1"),
        ({"embedding": 0}, "embedding: 0"),
        ({"dilations": ()}, r"dilations: \(\)"),
        ({"dilations": (1, 0)}, r"dilations: \(1, 0\)"),
        ({"levels": 1}, "levels: 1"),
        ({"levels": 300}, "levels: 300"),
        ({"label_dropout": 1.0}, "label_dropout: 1.0"),
    ],
)
def test_a_config_that_cannot_be_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Model(dataclasses.replace(SMALL, **change), GREY)  # type: ignore[arg-type]
