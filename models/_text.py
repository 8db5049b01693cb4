"""Captions in networks that see them next to images: an encoder, attention of image features to words, and losses that
hold an image against captions that are not its own.

    variable    meaning
    ids         (B, L) int64 tokens of captions (`models._captions`), padded at the end; padding alone: no caption
    tokens      (B, L, D) what the encoder makes of each
    seen        (B, L) bool: what is looked at, all but the padding
    sentence    (B, D) the caption as a whole
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models._captions import PADDING

HEADS = 4
SHARPNESS = 10.0  # of the softmax over cosines in `contrast`, 1 / τ


class Text(NamedTuple):
    """What an encoder makes of captions."""

    tokens: Tensor  # (B, L, D)
    seen: Tensor  # (B, L)
    sentence: Tensor  # (B, D)


class Attend(nn.Module):
    """What queries x (B, N, ·) find among tokens (B, L, ·) that are seen (B, L): (B, N, ·), as wide as the queries."""

    def __init__(self, queries: int, tokens: int, width: int) -> None:
        super().__init__()
        self.query = nn.Linear(queries, width, bias=False)
        self.key_value = nn.Linear(tokens, 2 * width, bias=False)
        self.out = nn.Linear(width, queries)

    def forward(self, x: Tensor, tokens: Tensor, seen: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.query(x).view(b, n, HEADS, -1).transpose(1, 2)  # (B, heads, N, d)
        k, v = self.key_value(tokens).view(b, tokens.shape[1], 2, HEADS, -1).permute(2, 0, 3, 1, 4)
        logits = (q @ k.mT).float() * q.shape[-1] ** -0.5
        weights = logits.masked_fill(~seen[:, None, None], -torch.inf).softmax(dim=-1).to(v.dtype)
        out: Tensor = self.out((weights @ v).transpose(1, 2).reshape(b, n, -1))
        return out


class TextLayer(nn.Module):
    """Every token looks at every other, then a perceptron; pre-norm (arXiv 2002.04745)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attend = nn.LayerNorm(width), Attend(width, width, width)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, h: Tensor, seen: Tensor) -> Tensor:
        looking = self.norm1(h)
        h = h + self.attend(looking, looking, seen)
        out: Tensor = h + self.down(F.gelu(self.up(self.norm2(h))))
        return out


class TextEncoder(nn.Module):
    """ids (B, L) -> Text. A transformer; where there is no caption, its first token, padding, says so."""

    def __init__(self, vocabulary: int, length: int, width: int, layers: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocabulary, width)
        self.place = nn.Parameter(torch.randn(length, width))
        self.layers = nn.ModuleList(TextLayer(width) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.whole = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.whole_norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> Text:
        seen = ids != PADDING
        seen[:, 0] = True
        h = self.token(ids) + self.place[: ids.shape[1]]
        for layer in self.layers:
            h = layer(h, seen)
        tokens: Tensor = self.norm(h)
        mean = (tokens * seen[:, :, None]).sum(dim=1) / seen.sum(dim=1, keepdim=True)
        return Text(tokens, seen, self.whole_norm(mean + self.whole(mean)))


class TextAttention(nn.Module):
    """x + what each position of a feature map x (B, C, H, W) finds in a caption; the identity at first."""

    def __init__(self, channels: int, text: int) -> None:
        super().__init__()
        self.attend = Attend(channels, text, text)
        nn.init.zeros_(self.attend.out.weight)
        nn.init.zeros_(self.attend.out.bias)

    def forward(self, x: Tensor, text: Text) -> Tensor:
        b, c, h, w = x.shape
        positions = x.permute(0, 2, 3, 1).reshape(b, h * w, c)
        found = self.attend(positions, text.tokens, text.seen)
        out: Tensor = x + found.view(b, h, w, c).permute(0, 3, 1, 2)
        return out


# --------------------------------------------------------------------------------------------------- captions that lie


def given(ids: Tensor) -> Tensor:
    """(B,) bool: whether there is a caption."""
    return ids[:, 0] != PADDING


def altered_captions(ids: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of each caption n others (B, n, L), from torch's global generator, and which of them say something else (B, n).

    One token is exchanged for another that stands after the same token somewhere in the batch, if one does: so what is
    wrong is a word, not the language, and the meaning of the words' order has to be learnt (arXiv 2210.01936).
    """
    b, length = ids.shape
    device = ids.device
    before = torch.cat([ids.new_full((b, 1), -1), ids[:, :-1]], dim=1)
    lengths = (ids != PADDING).sum(dim=1, keepdim=True)
    place = (torch.rand(b, n, device=device) * lengths).long()  # (B, n)
    own, context = ids.gather(1, place)[..., None], before.gather(1, place)[..., None]  # (B, n, 1)
    fits = (before.flatten() == context) & (ids.flatten() != own) & (ids.flatten() != PADDING)  # (B, n, B·L)
    chosen = torch.rand(b, n, b * length, device=device).masked_fill(~fits, -1).argmax(dim=2)
    found = fits.any(dim=2) & given(ids)[:, None]
    token = torch.where(found, ids.flatten()[chosen], own[..., 0])
    return ids[:, None].repeat(1, n, 1).scatter(2, place[..., None], token[..., None]), found


def wrong_captions(ids: Tensor) -> tuple[Tensor, Tensor]:
    """For each image of a batch a caption that is not its own (B, L), from torch's global generator, and whether that
    is so (B,): not where either is missing or both are equal.

    Half of them are another image's (arXiv 1605.05396, §4.2). Those differ in so much that telling them apart teaches
    little, so the others are the image's own with another word.
    """
    other = ids.roll(1, dims=0)
    altered, says_else = (part[:, 0] for part in altered_captions(ids, 1))
    takes_other = torch.rand(len(ids), device=ids.device) < 0.5
    is_other = given(ids) & given(other) & (other != ids).any(dim=1)
    return torch.where(takes_other[:, None], other, altered), torch.where(takes_other, is_other, says_else)


def contrast(images: Tensor, captions: Tensor, ids: Tensor, wrong: Tensor, is_wrong: Tensor) -> Tensor:
    """−log of the share that its own caption has for an image, among those of the batch and wrong ones (InfoNCE, arXiv
    1807.03748, eq. 4, on cosines; between images and captions as in 2101.04702, eq. 4), over images with a caption.

    images, captions (B, F), wrong (B, n, F): features of images, of their captions ids (B, L), and of wrong ones where
    is_wrong (B, n). Captions equal to the own one are left out.
    """
    images, captions, wrong = (F.normalize(x.float(), dim=-1) for x in (images, captions, wrong))
    own = torch.eye(len(ids), dtype=torch.bool, device=ids.device)
    out = ((ids[:, None] == ids).all(dim=2) | ~given(ids)) & ~own  # (B, B): no wrong answers
    cosines = torch.cat(
        [
            (images @ captions.T).masked_fill(out, -torch.inf),
            (wrong @ images[:, :, None])[..., 0].masked_fill(~is_wrong, -torch.inf),
        ],
        dim=1,
    )
    loss: Tensor = F.cross_entropy(SHARPNESS * cosines, own.long().argmax(dim=1), reduction="none")
    told = given(ids).float()
    return (loss * told).sum() / told.sum().clamp(min=1)
