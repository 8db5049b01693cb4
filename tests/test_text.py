"""Captions in the GAN: padding is nothing, words and their order are something, wrong captions are wrong."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from models import gan
from models._captions import PADDING
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from models._text import SHARPNESS, Attend, TextEncoder, altered_captions, contrast, given, wrong_captions

SPACE = ImageSpace(8, 8, 3, captions=True)
CAPTIONS = ("a red circle", "two blue squares", "a red circle above a blue square", "a blue square above a red circle")
TINY = gan.Config(
    latent=6,
    generator_channels=(8, 12),
    critic_channels=(8, 12),
    blocks=(0, 0),
    generator="style",
    vocabulary=280,
    text_width=16,
)


def model(space: ImageSpace = SPACE, seed: int = 0, **changes: object) -> gan.Model:
    """A tiny GAN that knows the captions, with every weight away from its start."""
    torch.manual_seed(seed)
    built = gan.Model(dataclasses.replace(TINY, **changes), space)  # type: ignore[arg-type]
    built.prepare([batch()])
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return built.eval().requires_grad_(False)


def batch(captions: tuple[str, ...] = CAPTIONS, step: int = 0) -> Batch:
    x = torch.rand(len(captions), *SPACE.shape, generator=torch.Generator().manual_seed(1))
    return Batch(x, torch.full((len(captions),), UNLABELLED), captions, step=step)


@torch.inference_mode()
def draw(m: gan.Model, *prompts: str | None) -> Tensor:
    return m.image(m.step(m.init([Draw(seed=3, sample=0, steps=1, prompt=prompt) for prompt in prompts])))


def test_captions_stand_for_labels() -> None:
    m = model(dataclasses.replace(SPACE, labels=("a", "b")))
    assert m.spec.image == SPACE
    assert m.critic.classes is None
    assert draw(m, CAPTIONS[0]).shape == (1, 3, 8, 8)


# -------------------------------------------------------------------------------------------------------------- encoder


def test_padding_is_nothing() -> None:
    """The same tokens with more padding behind them: the same outputs, whatever padding's embedding."""
    torch.manual_seed(0)
    encoder, ids = TextEncoder(20, 12, 16, 2), torch.randint(1, 20, (4, 12))
    ids[:, 5:] = PADDING
    short, long = encoder(ids[:, :5]), encoder(ids)
    torch.testing.assert_close(long.tokens[:, :5], short.tokens)
    torch.testing.assert_close(long.sentence, short.sentence)
    with torch.no_grad():
        encoder.token.weight[PADDING] += 7
    torch.testing.assert_close(encoder(ids).sentence, short.sentence)


def test_what_is_not_seen_is_not_looked_at() -> None:
    torch.manual_seed(0)
    attend = Attend(6, 5, 8)
    x, tokens = torch.randn(2, 3, 6), torch.randn(2, 4, 5, requires_grad=True)
    seen = torch.tensor([[True, True, False, False], [True, True, True, True]])
    (gradient,) = torch.autograd.grad(attend(x, tokens, seen).square().sum(), tokens)
    assert (gradient.abs().sum(dim=2) > 0).tolist() == seen.tolist()
    same = tokens[:, :1].expand(-1, 4, -1)  # where all tokens say one thing, that is what is found: weights sum to one
    torch.testing.assert_close(attend(x, same, seen), attend(x, same[:, :1], seen[:, :1]))


def test_captions_and_the_order_of_their_words_change_the_image() -> None:
    m = model()
    images = draw(m, *CAPTIONS, None, CAPTIONS[0])
    for i in range(5):
        for j in range(i):
            assert (images[i] - images[j]).abs().max() > 1e-3
    torch.testing.assert_close(images[5], images[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(draw(m, *["A  Red CIRCLE"] * 6)[0], images[0], rtol=0, atol=1e-5)


def test_every_resolution_but_the_finest_looks_at_the_words() -> None:
    m = model(generator_channels=(8, 8, 8), critic_channels=(8, 8, 8), blocks=(0, 0, 0))
    assert [stage.words is not None for stage in m.generator.stages] == [True, True, False]


def test_no_caption_is_drawn_and_judged() -> None:
    m = model()
    assert draw(m, None).isfinite().all()
    x, nothing = batch().x, m._read(m.captions.encode([None] * 4))
    torch.testing.assert_close(m.critic(x, nothing), m.critic.output(m.critic.features(x))[:, 0])
    told = m._read(m.captions.encode(CAPTIONS))
    difference = m.critic(x, told) - m.critic(x, nothing)
    embedded, features = m.critic.embed(told), m.critic.features(x)
    cosine = (embedded * features).sum(dim=1) / embedded.norm(dim=1) / features.norm(dim=1)
    torch.testing.assert_close(difference, SHARPNESS * cosine)


def test_matching_that_is_learnt_before_leaves_judgement_its_scale() -> None:
    """Contrast bounds no length of features or captions; what is judged stays near the hinge's margin."""
    m = model()
    x, told = batch().x, m._read(m.captions.encode(CAPTIONS))
    before = m.critic(x, told)
    m.critic.project.weight.mul_(1000.0)
    torch.testing.assert_close(m.critic(x, told), before)


def test_a_caption_that_is_hidden_teaches_what_no_caption_is() -> None:
    hidden, told = model(caption_dropout=1.0), model(caption_dropout=0.0)
    assert (hidden._asked(batch()) == PADDING).all()
    assert torch.equal(told._asked(batch()), told.captions.encode(CAPTIONS))
    without = Batch(batch().x, batch().labels)
    assert (told._asked(without) == PADDING).all()
    for _group, loss, _metrics in model().requires_grad_(True).objective(without):
        assert loss.isfinite()


# ------------------------------------------------------------------------------------------------------- wrong captions


def test_an_altered_caption_has_another_word_that_stands_after_the_same_one_elsewhere() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 6, (40, 7))
    ids[::2, 5:] = PADDING
    ids[::10] = PADDING
    altered, says_else = altered_captions(ids, 5)
    assert altered.shape == (40, 5, 7)
    seen = {(a, b) for row in ids.tolist() for a, b in pairwise([-1, *row]) if b != PADDING}
    assert not says_else[::10].any()
    assert says_else.float().mean() > 0.8
    for row, others, yes in zip(ids.tolist(), altered.tolist(), says_else.tolist(), strict=True):
        for other, is_else in zip(others, yes, strict=True):
            at = [k for k in range(7) if row[k] != other[k]]
            assert len(at) == is_else
            assert all((other[k - 1] if k else -1, other[k]) in seen for k in at)
            assert [token == PADDING for token in other] == [token == PADDING for token in row]
    places = (altered != ids[:, None]).any(dim=0).any(dim=0)
    assert places.all()


def test_a_caption_whose_words_stand_in_no_other_place_is_not_altered() -> None:
    altered, says_else = altered_captions(torch.tensor([[3, 4, 0], [3, 4, 0]]), 3)
    assert not says_else.any()
    assert (altered == torch.tensor([3, 4, 0])).all()


def test_wrong_captions_are_wrong_in_two_ways() -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, 30, (400, 7))
    ids[::2, 5:] = PADDING
    ids[::10] = PADDING
    wrong, is_wrong = wrong_captions(ids)
    assert (wrong[is_wrong] != ids[is_wrong]).any(dim=1).all()
    assert given(wrong[is_wrong]).all()
    assert given(ids[is_wrong]).all()
    different = (wrong != ids).sum(dim=1)
    others = (wrong == ids.roll(1, dims=0)).all(dim=1)
    assert ((different == 1) | others)[is_wrong].all()
    assert 0.4 < (different[is_wrong] == 1).float().mean() < 0.6
    one = (different == 1) & is_wrong
    torch.testing.assert_close((wrong[one] != PADDING), (ids[one] != PADDING))  # a word for a word


def test_equal_captions_are_not_wrong() -> None:
    ids = torch.tensor([[3, 4, 0]] * 6)
    assert not wrong_captions(ids)[1].any()
    assert not wrong_captions(torch.zeros(6, 3, dtype=torch.int64))[1].any()


def test_contrast_in_closed_form() -> None:
    """n equal cosines: log n. Own caption at 1, all others at 0: log(1 + (n − 1) e^−sharpness)."""
    b, n = 5, 3
    ids = torch.arange(1, b + 1)[:, None]
    eye, ones, wrong = torch.eye(b), torch.ones(b, b), torch.ones(b, n, b)
    no, yes = torch.zeros(b, n, dtype=torch.bool), torch.ones(b, n, dtype=torch.bool)
    assert contrast(ones, ones, ids, wrong, no).item() == pytest.approx(math.log(b), rel=1e-5)
    assert contrast(ones, ones, ids, wrong, yes).item() == pytest.approx(math.log(b + n), rel=1e-5)
    assert contrast(ones, ones, ids, wrong, yes & (torch.arange(n) < 1)).item() == pytest.approx(math.log(b + 1))
    apart = eye.roll(1, dims=0)[:, None].expand(b, n, b)
    told = contrast(3 * eye, 0.2 * eye, ids, apart, yes).item()
    assert told == pytest.approx(math.log(1 + (b + n - 1) * math.exp(-SHARPNESS)), abs=1e-6)


def test_contrast_leaves_out_the_same_caption_and_images_without_one() -> None:
    ones, wrong, no = torch.ones(4, 3), torch.ones(4, 1, 3), torch.zeros(4, 1, dtype=torch.bool)
    ids = torch.tensor([[1], [1], [2], [PADDING]])
    # Images 0 and 1 share a caption: each sees its own and image 2's; image 2 sees three; image 3 has none to tell.
    expected = (math.log(2) + math.log(2) + math.log(3)) / 3
    assert contrast(ones, ones, ids, wrong, no).item() == pytest.approx(expected, rel=1e-5)
    features = torch.randn(4, 3, requires_grad=True)
    nothing = contrast(features, torch.zeros(4, 3), torch.zeros_like(ids), wrong, no)
    assert nothing.item() == 0
    assert torch.autograd.grad(nothing, features)[0].isfinite().all()


def test_a_wrong_caption_counts_as_drawn() -> None:
    """The critic's loss is the mean of (real, drawn) and (real, wrongly told), and the contrast on top."""
    m = model(contrast=0.0, caption_dropout=0.0, penalty=0.0).requires_grad_(True)
    real, condition = 2 * batch().x - 1, m.captions.encode(CAPTIONS)
    fake = torch.rand_like(real)
    torch.manual_seed(2)
    loss, _ = m._critic_loss(real, fake, condition)
    torch.manual_seed(2)
    wrong, is_wrong = wrong_captions(condition)
    told, told_wrong = m._read(condition), m._read(wrong)
    logits = m.critic(real, told), m.critic(fake, told), m.critic(real, told_wrong)
    counted = torch.where(is_wrong, logits[2], logits[1])
    expected = gan.hinge_loss(*logits[:2]) + gan.hinge_loss(logits[0], counted)
    torch.testing.assert_close(loss, expected / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("objective", ["hinge", "logistic", "wgan-gp"])
def test_each_loss_reaches_its_own_group_only(objective: str) -> None:
    m = model(objective=objective, caption_dropout=0.0).requires_grad_(True)
    groups = m.groups()
    for group, loss, _metrics in m.objective(batch(step=m.config.penalty_every - 1)):
        other = groups["generator" if group == "critic" else "critic"]
        own = torch.autograd.grad(loss, groups[group], retain_graph=True, allow_unused=True)
        assert all(g is not None and g.isfinite().all() for g in own)
        assert all(g is None for g in torch.autograd.grad(loss, other, allow_unused=True))


def test_captions_are_read_by_one_encoder_that_the_critic_teaches() -> None:
    """Also while there is nothing to judge: then by contrast alone, and the judgement waits."""
    m = model(reconstruction=1.0, critic_from=0.5, caption_dropout=0.0).requires_grad_(True)
    text = {id(p) for p in m.text.parameters()}
    groups = m.groups()
    assert text <= {id(p) for p in groups["critic"]}
    assert not text & {id(p) for p in groups["generator"]}
    early = list(m.objective(dataclasses.replace(batch(step=4), steps=10)))
    assert [group for group, *_ in early] == ["critic", "generator"]
    (_, matching, _), (_, anew, _) = early
    every = torch.autograd.grad(matching, list(m.text.parameters()), retain_graph=True)
    assert all(g.abs().sum() > 0 for g in every)
    judging = [*m.critic.output.parameters()]
    assert all(g is None for g in torch.autograd.grad(matching, judging, allow_unused=True, retain_graph=True))
    assert all(g is None for g in torch.autograd.grad(anew, groups["critic"], allow_unused=True))


# ------------------------------------------------------------------------------------------------------------- learning


@pytest.mark.slow
def test_it_learns_what_captions_ask_for() -> None:
    """4×4 images, one half red or blue: after a few hundred steps colour and half are those of the caption."""
    torch.manual_seed(0)
    space = ImageSpace(4, 4, 3, captions=True)
    captions = [f"{colour} on the {side}" for colour in ("red", "blue") for side in ("left", "right")]
    config = dataclasses.replace(TINY, generator_channels=(12, 16), critic_channels=(12, 16), penalty=0.1)
    m = gan.Model(config, space)
    m.prepare([Batch(torch.zeros(1), torch.zeros(1), tuple(captions))])

    def picture(k: Tensor) -> Tensor:
        x = 0.5 + 0.05 * torch.randn(len(k), 3, 4, 4)
        for i, what in enumerate(k.tolist()):
            half = slice(0, 2) if what % 2 == 0 else slice(2, 4)
            x[i, :, :, half] = torch.tensor([0.9, 0.1, 0.1] if what < 2 else [0.1, 0.1, 0.9])[:, None, None]
        return x.clamp(0, 1)

    optimisers = {name: torch.optim.Adam(p, lr=3e-3, betas=(0.0, 0.99)) for name, p in m.groups().items()}
    for step in range(120):
        k = torch.randint(0, 4, (24,))
        for group, loss, _ in m.objective(
            Batch(picture(k), torch.full((24,), UNLABELLED), tuple(captions[i] for i in k), step=step)
        ):
            optimisers[group].zero_grad()
            loss.backward(inputs=m.groups()[group])
            optimisers[group].step()
    m.eval().requires_grad_(False)
    asked = torch.arange(40) % 4
    drawn = m.image(m.step(m.init([Draw(1, i, 1, prompt=captions[k]) for i, k in enumerate(asked.tolist())])))
    truth = torch.stack([picture(torch.full((8,), k)).mean(dim=0) for k in range(4)])
    nearest = (drawn[:, None] - truth).square().sum(dim=(2, 3, 4)).argmin(dim=1)
    assert (nearest == asked).float().mean() > 0.8
