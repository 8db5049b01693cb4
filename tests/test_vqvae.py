"""The discrete autoencoder, the language of its codes, and the VQ-VAE that joins them."""

from __future__ import annotations

import dataclasses
import math
import re
from itertools import product
from typing import Any

import pytest
import torch

from models import _codes, _rows
from models._codes import CodeRows, CodeTransformer
from models._protocol import Batch, Draw, ImageSpace
from models._vq import DEAD, Codebook, DiscreteAutoencoder, straight_through
from models.vqvae import Config, Model

LABELLED = ImageSpace(width=8, height=8, channels=1, labels=("a", "b", "c"))
TINY: dict[str, Any] = {
    "codes": 16,
    "dims": 4,
    "width": 8,
    "blocks": 1,
    "prior_width": 16,
    "prior_heads": 4,
    "prior_layers": 2,
}


def pictures(n: int, space: ImageSpace, seed: int = 0) -> torch.Tensor:
    """(n, C, H, W) on the grid k / 255: blurred noise."""
    noise = torch.rand(n, *space.shape, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1) * 255).round() / 255


def examples(n: int, space: ImageSpace) -> Batch:
    return Batch(pictures(n, space), torch.arange(n) % space.classes)


def built(space: ImageSpace = LABELLED, **changes: Any) -> Model:
    torch.manual_seed(0)
    model = Model(Config(**{**TINY, **changes}), space)
    with torch.no_grad():
        model.prepare([examples(8, space)])
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


# ------------------------------------------------------------------------------------------------------------- codebook


def test_a_vector_is_the_nearest() -> None:
    torch.manual_seed(0)
    book, z = Codebook(20, 3, 0.9), torch.randn(50, 3)
    assert torch.equal(book(z), torch.cdist(z, book.vectors).argmin(dim=1))


def test_the_moving_averages_on_one_batch_are_their_closed_form() -> None:
    """p after n steps is γⁿ p₀ + (1 − γⁿ) n_k / N, and p e likewise in Σ_k / N, as long as nothing changes sides."""
    book = Codebook(2, 1, 0.9)
    book.vectors.copy_(torch.tensor([[-1.0], [1.0]]))
    z = torch.tensor([[-3.0], [-1.0], [2.0], [1.0], [3.0], [6.0]])
    share, total = torch.tensor([2 / 6, 4 / 6]), torch.tensor([[-4 / 6], [12 / 6]])
    first = book.shares[:, None] * book.vectors
    for n in range(1, 30):
        book.follow(z, book(z))
        kept = 0.9**n
        torch.testing.assert_close(book.shares, kept * 0.5 + (1 - kept) * share)
        torch.testing.assert_close(book.shares[:, None] * book.vectors, kept * first + (1 - kept) * total)
    for _ in range(200):
        book.follow(z, book(z))
    torch.testing.assert_close(book.vectors, torch.tensor([[-2.0], [3.0]]))  # the means of either side


def test_dead_vectors_come_back_where_the_data_is() -> None:
    torch.manual_seed(0)
    book = Codebook(8, 2, 0.9)
    book.vectors.copy_(torch.cat([torch.zeros(1, 2), torch.full((7, 2), 100.0)]))
    z = torch.randn(64, 2)
    steps = math.ceil(math.log(DEAD) / math.log(0.9))  # until a share of 1 / K has fallen below what is dead
    for _ in range(steps - 1):
        book.follow(z, book(z))
    assert (book.vectors[1:] > 99).all(), "not before"
    for _ in range(40):
        book.follow(z, book(z))
    assert (book.vectors.abs() < 5).all()
    assert len(book(z).unique()) == 8


def test_perplexity_and_usage_have_their_limits() -> None:
    book = Codebook(10, 2, 0.9)
    assert book.metrics()["perplexity"] == pytest.approx(10)
    assert book.metrics()["usage"] == 1
    book.shares.copy_(torch.tensor([0.5, 0.5] + [0.0] * 8))
    assert book.metrics()["perplexity"] == pytest.approx(2)
    assert book.metrics()["usage"] == pytest.approx(0.2)


def test_more_vectors_than_data_begin_where_the_data_is_and_apart() -> None:
    torch.manual_seed(0)
    book, z = Codebook(10, 2, 0.9), torch.tensor([[0.0, 0.0], [5.0, 5.0], [9.0, 0.0]])
    book.begin(z)
    assert torch.cdist(book.vectors, z).min(dim=1).values.max() < 0.1
    assert len(book.vectors.unique(dim=0)) == 10


# ---------------------------------------------------------------------------------------------------------- autoencoder


def test_the_gradient_passes_the_choice_of_a_vector_as_if_there_were_none() -> None:
    z = torch.randn(5, 3, requires_grad=True)
    chosen, weights = torch.randn(5, 3), torch.randn(5, 3)
    out = straight_through(z, chosen)
    torch.testing.assert_close(out, chosen)
    (gradient,) = torch.autograd.grad((out * weights).sum(), z)
    assert torch.equal(gradient, weights)


def test_the_loss_is_that_of_the_paper_and_moves_the_codebook() -> None:
    """Gradients of the encoder: the reconstruction's through the copy, and the commitment's."""
    torch.manual_seed(0)
    autoencoder = DiscreteAutoencoder(LABELLED, 8, 1, 2, 16, 4, decay=0.9, commitment=0.5, scale=-1.0)
    x = pictures(6, LABELLED)
    with torch.no_grad():
        for parameter in autoencoder.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        autoencoder.prepare(pictures(6, LABELLED, seed=1))
        codes, distance = autoencoder.nearest(x)
        params = autoencoder.decode(codes)
        at_one = torch.cat([params[:, :2], torch.full_like(params[:, 2:], -1.0)], dim=1)
        told = autoencoder.likelihood.log_prob(params, x) + autoencoder.likelihood.log_prob(at_one, x)
        expected = -told.mean() + 0.5 * distance.mean()
    before = [book.vectors.clone() for book in autoencoder.codebooks]
    loss, metrics = autoencoder.loss(x)
    torch.testing.assert_close(loss.detach(), expected)
    assert not any(torch.equal(book.vectors, old) for book, old in zip(autoencoder.codebooks, before, strict=True))
    assert {"reconstruction", "distance", "perplexity", "usage"} <= metrics.keys()
    assert all(p.grad_fn is None for p in autoencoder.buffers())
    gradients = torch.autograd.grad(loss, list(autoencoder.parameters()))
    assert all(g.abs().sum() > 0 for g in gradients)


def test_the_means_learn_at_one_scale_and_the_scales_from_what_that_leaves() -> None:
    torch.manual_seed(0)
    autoencoder = DiscreteAutoencoder(LABELLED, 8, 1, 1, 16, 4, decay=0.9, commitment=0.0, scale=-1.0)
    x = pictures(6, LABELLED)
    others = [p for name, p in autoencoder.named_parameters() if not name.startswith("log_scale")]

    def gradients() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(autoencoder.loss(x, quantised=False)[0], others)

    before = gradients()
    with torch.no_grad():
        autoencoder.log_scale.bias.sub_(2.0)
    for old, new in zip(before, gradients(), strict=True):
        assert torch.equal(old, new), "the scales do not weigh what the rest learns"


def test_training_fits_images_and_keeps_the_codebook_in_use() -> None:
    torch.manual_seed(0)
    autoencoder = DiscreteAutoencoder(LABELLED, 16, 1, 1, 16, 4, decay=0.9, commitment=0.25, scale=-1.5)
    x = pictures(32, LABELLED)
    x = (x > 0.5).float()
    with torch.no_grad():
        autoencoder.prepare(x)
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=5e-3)
    losses = []
    for _ in range(80):
        loss, metrics = autoencoder.loss(x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(metrics["reconstruction"]))
    assert losses[-1] < 0.6 * losses[0]
    assert metrics["perplexity"] > 4


def test_an_image_partly_known_is_grey_elsewhere_and_whole_when_all_is_known() -> None:
    model = built()
    codes = model.autoencoder.encode(pictures(3, LABELLED))
    known = torch.tensor([[True, False, False, False], [True, True, True, True], [False] * 4])
    x = model.autoencoder.veiled(model.autoencoder.median(model.autoencoder.params(codes, known)), known)
    assert (x[0, :, :4, 4:] == 0.5).all()
    assert (x[0, :, 4:] == 0.5).all()
    assert (x[0, :, :4, :4] != 0.5).any()
    assert (x[2] == 0.5).all()
    torch.testing.assert_close(x[1], model.reconstruct(pictures(3, LABELLED), torch.zeros(3))[1])


# ---------------------------------------------------------------------------------------------------------------- codes


def language(prompt: int = 3, tokens: int = 4, codes: int = 3, groups: int = 1) -> CodeTransformer:
    torch.manual_seed(0)
    model = CodeTransformer(groups, codes, tokens, prompt, width=16, heads=2, layers=2)
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.parametrize("groups", [1, 2])
@torch.inference_mode()
def test_all_sequences_of_codes_together_have_probability_one(groups: int) -> None:
    model = language(tokens=4 // groups, groups=groups)
    sequences = torch.tensor(list(product(range(3), repeat=4))).view(81, 4 // groups, groups)
    prompt = torch.randn(1, 3, 16).expand(len(sequences), -1, -1)
    log_prob = model.log_prob(prompt, sequences)
    assert float(log_prob.double().exp().sum()) == pytest.approx(1, abs=1e-5)
    assert log_prob.std() > 0.1


def test_a_code_depends_on_the_prompt_and_the_codes_before_it_alone() -> None:
    """Through the vectors that stand for codes: of the prompt, of patches before, and of the patch's own groups."""
    model = language(groups=2)
    codes, prompt = torch.zeros(1, 4, 2, dtype=torch.int64), torch.randn(1, 3, 16)
    h = torch.cat([prompt, model.embed(codes[:, :-1])], dim=1).detach().requires_grad_()
    logits = model.tell(model.transformer(h + model.place)[:, 2:], codes)
    for i in range(4):
        (gradient,) = torch.autograd.grad(logits[0, i].square().sum(), h, retain_graph=True)
        reached = gradient[0].abs().sum(dim=1) > 0
        assert reached.tolist() == [k < 3 + i for k in range(6)]
    other = codes.clone()
    other[0, 2, 0] = 1
    changed = (model.logits(prompt, codes) != model.logits(prompt, other)).any(dim=3)[0]
    assert changed.flatten().tolist() == [False] * 5 + [True] * 3, "its own group's logits no, the next group's yes"


def rows_of(model: CodeTransformer, prompt: torch.Tensor, tokens: int, **draw: Any) -> CodeRows:
    draws = [Draw(seed=7, sample=k, steps=tokens, **draw) for k in range(len(prompt))]
    groups, codes, _ = model.embedding.shape
    columns = _codes.begin(draws, tokens, groups, codes, torch.device("cpu"))
    return CodeRows(**columns, cache=model.begin(prompt[:, :-1]))


def step(model: CodeTransformer, rows: CodeRows, prompt: torch.Tensor) -> torch.Tensor:
    """Draw a patch; the logits (B, G, K) that its codes were drawn from."""
    outputs, seen = model.step(rows, prompt[:, -1], rows.cache), []

    def logits(drawn: torch.Tensor) -> torch.Tensor:
        seen.append(model.next(outputs, drawn))
        return seen[-1]

    _codes.advance(rows, logits)
    return torch.stack(seen, dim=1)


@pytest.mark.parametrize(("prompt_length", "groups"), [(1, 1), (3, 1), (3, 2)])
@torch.inference_mode()
def test_cached_logits_are_those_of_the_full_forward(prompt_length: int, groups: int) -> None:
    model = language(prompt_length, tokens=5, codes=8, groups=groups)
    prompt = torch.randn(6, prompt_length, 16)
    rows, stepped = rows_of(model, prompt, 5), []
    while int(rows.left.max()):
        stepped.append(step(model, rows, prompt))
    torch.testing.assert_close(torch.stack(stepped, dim=1), model.logits(prompt, rows.codes), rtol=1e-4, atol=1e-5)


@torch.inference_mode()
def test_rows_at_different_places_share_a_batch() -> None:
    model = language(2, tokens=5, codes=8, groups=2)
    prompt = torch.randn(8, 2, 16)
    alone, ahead = rows_of(model, prompt, 5), rows_of(model, prompt, 5)
    for _ in range(5):
        step(model, alone, prompt)
    for _ in range(2):
        step(model, ahead, prompt)
    mixed = _rows.cat([ahead, rows_of(model, prompt, 5)])
    for _ in range(3):
        step(model, mixed, torch.cat([prompt, prompt]))
    assert torch.equal(mixed.codes[:8], alone.codes)
    assert torch.equal(mixed.codes[8:, :3], alone.codes[:, :3])


def test_choices_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([[0.0, 2.0, -1.0, 1.0]])
    uniforms = ((torch.arange(1000) + 0.5) / 1000).double()[:, None]
    for temperature, top_k in ((1.0, 4), (0.5, 4), (1.0, 2), (2.0, 3)):
        column = torch.full((1000, 1), temperature, dtype=torch.float64)
        chosen = _codes.choose(logits.expand(1000, -1), uniforms, column, torch.full((1000,), top_k))
        least = logits[0].sort(descending=True).values[top_k - 1]
        expected = (logits[0] / temperature).masked_fill(logits[0] < least, -torch.inf).softmax(dim=0)
        found = torch.bincount(chosen[:, 0], minlength=4) / 1000
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_the_likeliest_alone_is_greedy_whatever_the_temperature_and_the_noise() -> None:
    torch.manual_seed(0)
    logits = torch.randn(64, 9)
    logits[:, 3] = logits[:, 5]  # ties
    for temperature in (0.1, 1.0, 2.0):
        column = torch.full((64, 1), temperature, dtype=torch.float64)
        chosen = _codes.choose(logits, torch.rand(64, 1).double(), column, torch.ones(64, dtype=torch.int64))
        assert torch.equal(chosen[:, 0], logits.argmax(dim=1))


# ---------------------------------------------------------------------------------------------------------------- model


@torch.inference_mode()
def test_the_bound_is_a_term_of_the_sum_over_all_codes() -> None:
    """With two codes for each of four patches all sixteen sequences can be summed: log p(x) is at least the bound."""
    model = built(codes=2)
    x, labels = pictures(4, LABELLED), torch.tensor([0, 1, 2, -1])
    terms = []
    for sequence in product(range(2), repeat=4):
        codes = torch.tensor([sequence]).expand(4, -1)[..., None]
        log_codes = model.prior.log_prob(model.prompt(labels), codes)
        terms.append(log_codes + model.autoencoder.log_prob(x, codes))
    score = model.log_prob(x, labels).log_prob
    assert score is not None
    assert (score <= torch.stack(terms).logsumexp(dim=0) + 1e-4).all()
    its_own = (model.autoencoder.encode(x)[..., 0] * torch.tensor([8, 4, 2, 1])).sum(dim=1)
    torch.testing.assert_close(score, torch.stack(terms)[its_own, torch.arange(4)])


@torch.inference_mode()
def test_a_drawn_image_shows_the_codes_of_its_median() -> None:
    model = built()
    asked = [Draw(seed=3, sample=0, steps=4, label=1, solver=solver) for solver in ("median", "draw")]
    rows = model.init(asked)
    while int(rows.left.max()):
        rows = model.step(rows)
    assert torch.equal(rows.codes[0], rows.codes[1])
    median, drawn = model.image(rows)
    params = model.autoencoder.decode(rows.codes)
    assert torch.equal(median, model.autoencoder.median(params)[0])
    assert not torch.equal(median, drawn)
    half = torch.full((1, model.autoencoder.likelihood.uniforms, 8, 8), 0.5)
    torch.testing.assert_close(model.autoencoder.likelihood.draw(params[:1], half)[0], median, rtol=0, atol=0.51 / 255)
    assert torch.equal((drawn * 255).round() / 255, drawn)


def test_each_stage_trains_its_own_half() -> None:
    torch.manual_seed(0)
    model, batch = Model(Config(**TINY, first_stage=0.5), LABELLED), examples(8, LABELLED)
    with torch.no_grad():
        model.prepare([batch])
    groups = [
        [group for group, _, _ in model.objective(dataclasses.replace(batch, step=step, steps=4))] for step in range(4)
    ]
    assert groups == [["autoencoder"], ["autoencoder"], ["prior"], ["prior"]]
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    list(model.objective(dataclasses.replace(batch, step=3, steps=4)))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name]), "the second stage leaves the codebook alone"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": 1}, "codes: 1; at least 2"),
        ({"groups": 0}, "groups: 0; at least 1"),
        ({"width": 7}, "width: 7; an even number"),
        ({"decay": 1.0}, "decay: 1.0 is not in [0, 1)"),
        ({"commitment": -1.0}, "commitment: -1.0"),
        ({"first_stage": 1.0}, "first_stage: 1.0"),
        ({"unquantised": 1.0}, "unquantised: 1.0"),
        ({"label_dropout": 1.0}, "label_dropout: 1.0"),
        ({"prior_width": 15}, "prior_width: 15"),
        ({"prior_layers": 0}, "prior_layers: 0"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Model(Config(**{**TINY, **changes}), LABELLED)


def test_images_that_cannot_be_cut_into_patches_are_refused() -> None:
    with pytest.raises(ValueError, match="image: 10×8"):
        Model(Config(**TINY), ImageSpace(width=10, height=8, channels=1))
