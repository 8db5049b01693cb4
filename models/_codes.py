"""The language of an image's codes: a causal transformer over a prompt and the patches after it, and what sampling
keeps. For families that draw an image patch by patch; the codes are a discrete autoencoder's (`models._vq`).

    log p(codes | prompt) = Σ_i log p(code_i | code_<i, prompt)        i patch by patch, and in a patch group by group

    B    rows       P    vectors of the prompt       T    patches of an image
    D    width      G    codes of a patch            K    values of a code
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    """Prompt vectors (B, P, D), P ≥ 1, and codes (B, T, G) -> outputs, of which the one at the prompt's last vector
    tells the first patch, the one at the first patch the second, and so on.

    The prompt is whatever a family makes of labels or captions. Positions are learnt, and added to all inputs.
    """

    def __init__(self, groups: int, codes: int, tokens: int, prompt: int, width: int, heads: int, layers: int) -> None:
        super().__init__()
        if layers < 1:
            raise ValueError(f"layers: {layers}; at least 1")
        self.prompt, length = prompt, prompt + tokens - 1  # the last patch is told by the one before it
        self.transformer = Transformer(width, heads, 4 * width, (length,) * layers, length)
        self.embedding = nn.Parameter(0.5 * torch.randn(groups, codes, width))
        self.place = nn.Parameter(0.1 * torch.randn(length, width))
        self.heads = nn.ModuleList(Head(g, codes, width) for g in range(groups))

    def embed(self, codes: Tensor) -> Tensor:
        """(..., G) -> (..., D): the sum of what stands for each."""
        return _sum(self.embedding, codes)

    def forward(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """Outputs (B, P + T − 1, D); `tell` makes logits of those from P − 1 on."""
        out: Tensor = self.transformer(torch.cat([prompt, self.embed(codes[:, :-1])], dim=1) + self.place)
        return out

    def tell(self, outputs: Tensor, codes: Tensor) -> Tensor:
        """Outputs (B, T, D), codes (B, T, G) -> logits (B, T, G, K) float32, each given the patch's codes before it."""
        each = [head(outputs, codes[..., :g]) for g, head in enumerate(self.heads)]
        return torch.stack(each, dim=2).float()

    def logits(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """(B, T, G, K) float32: of every code given the prompt and the codes before it, all at once."""
        return self.tell(self(prompt, codes)[:, self.prompt - 1 :], codes)

    def log_prob(self, prompt: Tensor, codes: Tensor) -> Tensor:
        """(B,) nats: log p(codes | prompt)."""
        chosen = self.logits(prompt, codes).log_softmax(dim=3).gather(3, codes[..., None])
        return chosen.sum(dim=(1, 2, 3))

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
        """Outputs (B, D) that tell each row's next patch: the input is the patch that it drew before, or at first the
        prompt's last vector, (B, D). Writes into the cache."""
        row = torch.arange(len(rows.tick), device=rows.tick.device)
        before = self.embed(rows.codes[row, (rows.tick - 1).clamp(min=0)])
        position = self.prompt - 1 + rows.tick
        h = torch.where(rows.tick[:, None] == 0, last, before) + self.place[position]
        return self.transformer.step(h, cache, position)

    def next(self, outputs: Tensor, drawn: Tensor) -> Tensor:
        """Logits (B, K) float32 of a patch's next code, of outputs (B, D) and the patch's codes so far, (B, g)."""
        logits: Tensor = self.heads[drawn.shape[1]](outputs, drawn)
        return logits.float()


class Head(nn.Module):
    """Outputs (..., D) and a patch's codes before (..., g) -> logits (..., K) of its next."""

    def __init__(self, before: int, codes: int, width: int) -> None:
        super().__init__()
        self.before = nn.Parameter(0.5 * torch.randn(before, codes, width)) if before else None
        self.layers = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, codes))

    def forward(self, outputs: Tensor, codes: Tensor) -> Tensor:
        told = outputs if self.before is None else outputs + _sum(self.before, codes)
        logits: Tensor = self.layers(told)
        return logits


def _sum(tables: Tensor, codes: Tensor) -> Tensor:
    """(..., G) -> (..., D): of each code's row in its own one of the tables (G, K, D)."""
    return torch.stack([table[code] for table, code in zip(tables, codes.unbind(dim=-1), strict=True)]).sum(dim=0)


@dataclass
class CodeRows(Rows):
    """Images of which the first patches have been drawn. A tick draws one, all of its codes."""

    temperature: Tensor  # (B, 1) float64
    top_k: Tensor  # (B,)
    uniforms: Tensor  # (B, T, G) float64: all the randomness of the codes
    codes: Tensor  # (B, T, G)
    cache: Cache

    @property
    def known(self) -> Tensor:
        """(B, T) bool: which patches have been drawn."""
        return torch.arange(self.codes.shape[1], device=self.tick.device) < self.tick[:, None]


class Columns(TypedDict):
    """What every `CodeRows` begins with, but for its cache."""

    tick: Tensor
    left: Tensor
    temperature: Tensor
    top_k: Tensor
    uniforms: Tensor
    codes: Tensor


def begin(draws: Sequence[Draw], tokens: int, groups: int, values: int, device: torch.device) -> Columns:
    """Columns at tick 0 of images that take T = `tokens` patches of G = `groups` codes of K = `values` values."""
    b = len(draws)
    seed = _random.seed_bits([draw.seed for draw in draws], device)
    sample = torch.tensor([draw.sample for draw in draws], device=device)
    return Columns(
        tick=torch.zeros(b, dtype=torch.int64, device=device),
        left=torch.full((b,), tokens, device=device),
        temperature=torch.tensor([[draw.temperature] for draw in draws], dtype=torch.float64, device=device),
        top_k=torch.tensor([values if draw.top_k is None else draw.top_k for draw in draws], device=device),
        uniforms=_random.uniform(seed, sample, 0, CODES, (tokens, groups)).double(),
        codes=torch.zeros(b, tokens, groups, dtype=torch.int64, device=device),
    )


def advance(rows: CodeRows, logits: Callable[[Tensor], Tensor]) -> None:
    """Draw each row's next patch, code by code: logits(codes of it so far, (B, g)) -> (B, K). Writes into `rows`."""
    row = torch.arange(len(rows.tick), device=rows.tick.device)
    uniforms = rows.uniforms[row, rows.tick]
    drawn = rows.codes[row, rows.tick, :0]
    for g in range(rows.codes.shape[2]):
        code = choose(logits(drawn), uniforms[:, g : g + 1].contiguous(), rows.temperature, rows.top_k)
        drawn = torch.cat([drawn, code], dim=1)
    rows.codes[row, rows.tick] = drawn
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
    return torch.searchsorted(cumulative, uniforms.contiguous(), right=True)
