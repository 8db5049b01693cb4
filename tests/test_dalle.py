"""Images from captions: what a caption changes, guidance, and that a checkpoint understands captions."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest
import torch

from models import _checkpoint, _codes, _rows
from models._captions import PADDING
from models._protocol import UNLABELLED, Batch, Draw, ImageSpace
from models.dalle import CaptionedRows, Config, Model

CAPTIONED = ImageSpace(width=8, height=8, channels=3, captions=True)
CAPTIONS = ("a red circle", "two blue squares", "a small green triangle above a red square", "a circle")
TINY: dict[str, Any] = {
    "groups": 2,
    "codes": 16,
    "dims": 4,
    "width": 8,
    "blocks": 1,
    "vocabulary": 290,
    "caption_tokens": 6,
    "transformer_width": 16,
    "heads": 4,
    "layers": 2,
}
TOKENS = 4


def pictures(n: int, space: ImageSpace, seed: int = 0) -> torch.Tensor:
    """(n, C, H, W) on the grid k / 255: blurred noise."""
    noise = torch.rand(n, *space.shape, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1) * 255).round() / 255


def examples(n: int) -> Batch:
    captions = tuple(CAPTIONS[k % len(CAPTIONS)] for k in range(n))
    return Batch(pictures(n, CAPTIONED), torch.full((n,), UNLABELLED), captions)


def built(**changes: Any) -> Model:
    torch.manual_seed(0)
    model = Model(Config(**{**TINY, **changes}), CAPTIONED)
    with torch.no_grad():
        model.prepare([examples(8)])
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


def asked(n: int, **draw: Any) -> list[Draw]:
    draws = [Draw(seed=5, sample=k, steps=TOKENS, prompt=CAPTIONS[k % len(CAPTIONS)]) for k in range(n)]
    return [dataclasses.replace(d, **draw) for d in draws]


def finished(model: Model, draws: list[Draw]) -> CaptionedRows:
    rows = model.init(draws)
    while int(rows.left.max()):
        rows = model.step(rows)
    return rows


def step(model: Model, rows: CaptionedRows) -> torch.Tensor:
    """Draw a patch; the logits (B, G, K) that its codes were drawn from."""
    logits, seen = model.logits(rows), []

    def watched(drawn: torch.Tensor) -> torch.Tensor:
        seen.append(logits(drawn))
        return seen[-1]

    _codes.advance(rows, watched)
    return torch.stack(seen, dim=1)


def all_logits(model: Model, rows: CaptionedRows, text: torch.Tensor) -> torch.Tensor:
    return model.transformer.logits(model.prompt(text), rows.codes)


@torch.inference_mode()
def test_cached_logits_are_those_of_the_full_forward_over_caption_and_codes() -> None:
    model = built()
    draws = asked(6)
    rows = model.init(draws)
    stepped = torch.stack([step(model, rows) for _ in range(TOKENS)], dim=1)
    full = all_logits(model, rows, model.captions.encode([d.prompt for d in draws]))
    torch.testing.assert_close(stepped, full, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_guided_logits_are_the_formula_and_those_of_scale_one_are_the_conditional_ones() -> None:
    model = built()
    scales = [0.0, 1.0, 2.5, 1.0, 7.0, 0.5]
    draws = [dataclasses.replace(d, guidance_scale=s) for d, s in zip(asked(6), scales, strict=True)]
    rows, plain = model.init(draws), model.init(asked(6))
    stepped = torch.stack([step(model, rows) for _ in range(TOKENS)], dim=1)
    unguided = torch.stack([step(model, plain) for _ in range(TOKENS)], dim=1)
    conditional = all_logits(model, rows, model.captions.encode([d.prompt for d in draws]))
    unconditional = all_logits(model, rows, model.captions.encode([None] * 6))
    expected = unconditional + torch.tensor(scales)[:, None, None, None] * (conditional - unconditional)
    torch.testing.assert_close(stepped, expected, rtol=1e-4, atol=1e-3)
    for k in (1, 3):
        assert torch.equal(stepped[k], unguided[k]), "bit for bit"


@torch.inference_mode()
def test_guidance_means_nothing_without_a_caption() -> None:
    model = built()
    rows = model.init(asked(4, prompt=None, guidance_scale=5.0))
    assert (rows.guidance == 1).all()


@torch.inference_mode()
def test_the_likeliest_codes_alone_depend_on_nothing_but_the_caption() -> None:
    model = built()
    greedy = [
        finished(model, asked(4, seed=seed, top_k=1, temperature=temperature)).codes
        for seed, temperature in ((1, 1.0), (2, 0.3), (3, 2.0))
    ]
    assert torch.equal(greedy[0], greedy[1])
    assert torch.equal(greedy[0], greedy[2])
    full = all_logits(model, finished(model, asked(4, top_k=1)), model.captions.encode(list(CAPTIONS)))
    assert torch.equal(full.argmax(dim=3), greedy[0])


@torch.inference_mode()
def test_a_caption_is_taken_in_the_same_alone_and_among_others() -> None:
    model = built()
    together = model.init(asked(11))
    for k in (0, 3, 7, 8, 10):
        alone = model.init(asked(11)[k : k + 1])
        assert _rows.equal(alone, _rows.take(together, [k]))


@torch.inference_mode()
def test_a_checkpoint_reads_captions_as_the_model_did(tmp_path: Any) -> None:
    model = built()
    _checkpoint.save(tmp_path, model, Config(**TINY), {"metrics": {}})
    again = _checkpoint.load(tmp_path)
    assert isinstance(again, Model)
    texts = [*CAPTIONS, "an unseen mauve hexagon", None]
    assert torch.equal(again.captions.encode(texts), model.captions.encode(texts))
    assert torch.equal(finished(again, asked(4)).codes, finished(model, asked(4)).codes)


def test_the_loss_is_one_part_text_and_seven_parts_image_and_hidden_captions_are_not_learnt() -> None:
    model = built(caption_dropout=0.0)
    batch = dataclasses.replace(examples(8), step=9, steps=10)
    ((group, loss, metrics),) = model.objective(batch)
    assert group == "transformer"
    torch.testing.assert_close(loss, (metrics["text_nats"] + 7 * metrics["image_nats"]) / 8)

    text = model.captions.encode(list(batch.captions))
    log_text = (
        model.text_head(model.transformer(model.prompt(text), torch.zeros(8, TOKENS, 2, dtype=torch.int64))[:, :6])
        .log_softmax(dim=2)
        .gather(2, text[:, :, None])[:, :, 0]
    )
    said = text != PADDING
    torch.testing.assert_close(metrics["text_nats"], -(log_text * said).sum() / said.sum())

    silent = built(caption_dropout=0.999999)
    torch.manual_seed(0)
    ((_, _, metrics),) = silent.objective(batch)
    assert metrics["text_nats"] == 0


def test_a_code_depends_on_all_of_the_caption_and_the_text_on_no_code() -> None:
    model = built()
    text = model.captions.encode(list(CAPTIONS[:1]))
    prompt = model.prompt(text).requires_grad_()
    outputs = model.transformer(prompt, torch.zeros(1, TOKENS, 2, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(outputs[0, 6].sum(), prompt)  # what the first code is drawn from
    assert (gradient[0].abs().sum(dim=1) > 0).all()
    torch.manual_seed(1)
    other = model.transformer(prompt, torch.randint(16, (1, TOKENS, 2)))
    torch.testing.assert_close(other[:, :7], outputs[:, :7])


@torch.inference_mode()
def test_a_score_is_the_model_without_a_caption() -> None:
    model = built()
    x = pictures(3, CAPTIONED)
    score = model.log_prob(x)
    codes = model.autoencoder.encode(x)
    log_codes = model.transformer.log_prob(model.prompt(model.captions.encode([None] * 3)), codes)
    torch.testing.assert_close(score.log_prob, log_codes + model.autoencoder.log_prob(x, codes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocabulary": 256}, "vocabulary: 256; at least 257"),
        ({"caption_tokens": 0}, "length: 0"),
        ({"first_stage": 0.0}, "first_stage: 0.0"),
        ({"guidance_scale": 11.0}, "guidance_scale: 11.0 is not in [0, 10]"),
        ({"text_weight": 1.0}, "text_weight: 1.0"),
        ({"caption_dropout": -0.1}, "caption_dropout: -0.1"),
        ({"layers": 0}, "layers: 0"),
        ({"transformer_width": 18}, "width: 18 is not a positive multiple of heads (4)"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Model(Config(**{**TINY, **changes}), CAPTIONED)


def test_data_without_captions_is_refused() -> None:
    with pytest.raises(ValueError, match="space: images without captions"):
        Model(Config(**TINY), ImageSpace(width=8, height=8, channels=3))
    with pytest.raises(ValueError, match="captions: none given"):
        Model(Config(**TINY), CAPTIONED).prepare([Batch(pictures(8, CAPTIONED), torch.full((8,), UNLABELLED))])
