"""The language of an image's codes: a causal transformer over a prompt and the codes after it, and what sampling keeps.
For families that draw an image code by code; the codes are a discrete autoencoder's (`models._vq`).

    log p(codes | prompt) = Σ_i log p(code_i | code_<i, prompt)

    B    rows       P    vectors of the prompt       T    codes of an image       K    values of a code       D    width
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn

from models import _random
from models._nn import at_least
from models._protocol import Draw, Rows
from models._transformer import Cache, Transformer

CODES = 0  # draw of a row's noise
TOGETHER = 8  # rows whose prompts are taken in at a time


class CodeTransformer(nn.Module):
    """Prompt vectors (B, P, D), P ≥ 1, and codes (B, T) -> outputs, of which the one at the prompt's last vector tells
    the first code, the one at the first code the second, and so on.

    The prompt is whatever a family makes of labels or captions. Positions are learnt, and added to all inputs.
    """

    def __init__(self, codes: int, tokens: int, prompt: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: {layers}; at least 1")
        self.prompt, length = prompt, prompt + tokens - 1  # the last code is told by the one before it
        self.transformer = Transformer(width, heads, 4 * width, (length,) * layers, length)
        self.embedding = nn.Parameter(0.5 * torch.randn(codes, width))
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.head = nn.Linear(width, codes)

    def forward(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """Outputs (B, P + T − 1, D); `head` makes logits of those from P − 1 on."""
        h = torch.cat([prompt, self.embedding[codes[:, :-1]]], dim=1) + self.place
        out: Tensor = self.transformer(h)
        return out

    def logits(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """(B, T, K) float32: of every code given the prompt and the codes before it, all at once."""
        logits: Tensor = self.head(self(prompt, codes)[:, self.prompt - 1 :])
        return logits.float()

    def log_prob(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """(B,) nats: log p(codes | prompt)."""
        chosen = self.logits(prompt, codes).log_softmax(dim=2).gather(2, codes[:, :, None])
        return chosen.sum(dim=(1, 2))

    def begin(self, prompt: Tensor) -> Cache:
        """The cache after all of the prompt but its last vector, (B, P − 1, D).

        Taken in so many rows at a time, the last repeated where there are fewer: floats depend on how many rows a
        product has, and a row's cache must not.
        """
        cache = self.transformer.cache(len(prompt))
        if self.prompt == 1:
            return cache
        told = prompt + self.place[: self.prompt - 1]
        for at in range(0, len(prompt), TOGETHER):
            part = told[at : at + TOGETHER]
            filled = self.transformer.cache(TOGETHER)
            self.transformer.prefill(at_least(TOGETHER, part), filled)
            for mine, theirs in zip(cache, filled, strict=True):
                mine[at : at + TOGETHER] = theirs[: len(part)]
        return cache

    def step(self, rows: CodeRows, last: Tensor, cache: Cache) -> Tensor:
        """Logits (B, K) of each row's next code: the input is the code that it drew before, or at first the prompt's
        last vector, (B, D). Writes into the cache."""
        before = self.embedding[rows.codes.gather(1, (rows.tick - 1).clamp(min=0)[:, None])[:, 0]]
        position = self.prompt - 1 + rows.tick
        h = torch.where(rows.tick[:, None] == 0, last, before) + self.place[position]
        logits: Tensor = self.head(self.transformer.step(h, cache, position))
        return logits.float()


@dataclass
class CodeRows(Rows):
    """Images of which the first codes have been drawn. A tick draws one."""

    temperature: Tensor  # (B, 1) float64
    top_k: Tensor  # (B,)
    uniforms: Tensor  # (B, T) float64: all the randomness of the codes
    codes: Tensor  # (B, T)
    cache: Cache

    @property
    def known(self) -> Tensor:
        """(B, T) bool: which codes have been drawn."""
        return torch.arange(self.codes.shape[1], device=self.tick.device) < self.tick[:, None]


class Columns(TypedDict):
    """What every `CodeRows` begins with, but for its cache."""

    tick: Tensor
    left: Tensor
    temperature: Tensor
    top_k: Tensor
    uniforms: Tensor
    codes: Tensor


def begin(draws: Sequence[Draw], tokens: int, values: int, device: torch.device) -> Columns:
    """Columns at tick 0 of images that take so many codes, each of so many values."""
    b = len(draws)
    seed = _random.seed_bits([draw.seed for draw in draws], device)
    sample = torch.tensor([draw.sample for draw in draws], device=device)
    return Columns(
        tick=torch.zeros(b, dtype=torch.int64, device=device),
        left=torch.full((b,), tokens, device=device),
        temperature=torch.tensor([[draw.temperature] for draw in draws], dtype=torch.float64, device=device),
        top_k=torch.tensor([values if draw.top_k is None else draw.top_k for draw in draws], device=device),
        uniforms=_random.uniform(seed, sample, 0, CODES, (tokens,)).double(),
        codes=torch.zeros(b, tokens, dtype=torch.int64, device=device),
    )


def advance(rows: CodeRows, logits: Tensor) -> None:
    """Draw each row's next code from its logits (B, K). Writes into `rows`."""
    at = rows.tick[:, None]
    chosen = choose(logits, rows.uniforms.gather(1, at), rows.temperature, rows.top_k)
    rows.codes.scatter_(1, at, chosen)
    rows.tick, rows.left = rows.tick + 1, rows.left - 1


def choose(logits: Tensor, uniforms: Tensor, temperature: Tensor, top_k: Tensor) -> Tensor:
    """Codes (B, 1) from the softmax of logits (B, K) / temperature (B, 1) among each row's top_k (B,) likeliest values:
    the quantiles at uniforms (B, 1). Of equally likely values the first come first, so that exactly top_k remain.

    In float64 the distribution function is monotone and ends above any uniform: the code is always a possible one.
    """
    logits = logits.double()
    if bool((top_k < logits.shape[1]).any()):
        rank = logits.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        logits = logits.masked_fill(rank >= top_k[:, None], -torch.inf)
    cumulative = (logits / temperature).softmax(dim=1).cumsum(dim=1)
    return torch.searchsorted(cumulative, uniforms, right=True)
