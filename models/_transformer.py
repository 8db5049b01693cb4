"""A causal transformer, for whatever is drawn token by token (arXiv 1706.03762; pre-norm, arXiv 2002.04745).

`Transformer.forward` takes all tokens of a sequence at once, as training and scoring do; `step` takes every row one
token on from wherever it stands, with what is worth keeping of the tokens before it in a cache. On a CPU with a C
compiler a step is `_transformer.c`'s, else it is taken in the tensor operations that stand here.

A layer's pattern says how far back it looks, and in which strides (Sparse Transformers, arXiv 1904.10509): position p
attends to p, p − stride, p − 2·stride, ...: `reach` positions at most. All of a sequence is reach = length; a few
image rows are reach = rows · width; the column above a pixel is stride = width. Where a position lies is told in two
ways: by whatever its input holds (a learnt vector, say: not this module's to add), and by a learnt bias on the
attention's logits for each head and each lag (arXiv 1910.10683, §2.1, with a bucket for every lag).

What conditions a sequence (a label, a prompt) is given with its inputs: added to them, or in tokens of its own before
them, which `prefill` takes all at once.

    B    rows             T    tokens of a sequence     R    reach      C    queries of a block
    D    width            d    width of a head          S    stride     N    blocks
"""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models import _native

# A step reads a cache as far as the row that has come furthest needs it, in blocks of so many positions that are summed
# up one after the other: what lies beyond a row's own position adds exact zeros, and its floats do not depend on how
# far other rows have come. A multiple of the numbers that a CPU adds up at once (16).
BLOCK = 128
# Queries of a block where a whole sequence is taken at once. Softmax on CPUs is several times as fast over a multiple
# of 32 bfloat16 keys as over any other number.
QUERIES = 32

CACHE = 9  # where its cache stands among the numbers of a struct Layer

Cache = tuple[Tensor, ...]  # of each layer, (B, heads, 2, S, K, d): keys and values of the last K · S positions, K ≥ R


class Pattern(NamedTuple):
    """What a position attends to: itself and those that are 1 … reach − 1 strides before it."""

    reach: int
    stride: int = 1


class Transformer(nn.Module):
    """(B, T, D) -> (B, T, D): layers of attention and a two-layer perceptron; output i depends on inputs 0 … i alone.

    width       D
    heads       of every layer; D is a multiple of it
    hidden      units of the perceptrons
    patterns    of each layer, first to last: an int is a reach with stride 1
    length      T at most; the reach of a pattern is cut to what fits
    """

    def __init__(self, width: int, heads: int, hidden: int, patterns: Sequence[Pattern | int], length: int) -> None:
        super().__init__()
        check(width, heads, hidden, patterns)
        self.width, self.length = width, length
        fitting = [_fitting(Pattern(p) if isinstance(p, int) else p, length) for p in patterns]
        self.layers = nn.ModuleList(Layer(width, heads, hidden, p, 1 / math.sqrt(2 * len(patterns))) for p in fitting)
        self.norm = nn.LayerNorm(width)
        self._in_c: InC | None = None

    @property
    def _layers(self) -> tuple[Layer, ...]:
        return cast("tuple[Layer, ...]", tuple(self.layers))

    def forward(self, h: Tensor) -> Tensor:
        """All of a sequence, or its beginning: (B, T, D) -> (B, T, D)."""
        for layer in self._layers:
            h = layer(h)
        out: Tensor = self.norm(h)
        return out

    def cache(self, rows: int) -> Cache:
        """That of so many rows at position 0."""
        if self._in_c is None or not self._in_c.is_of(self):
            self._in_c = InC(self)
        return tuple(layer.attention.cache(rows) for layer in self._layers)

    def prefill(self, h: Tensor, cache: Cache) -> Tensor:
        """`forward` over a sequence's beginning (B, T0, D), which fills the cache: `step` goes on at position T0."""
        for layer, part in zip(self._layers, cache, strict=True):
            h = layer.prefill(h, part)
        out: Tensor = self.norm(h)
        return out

    @torch.no_grad()
    def step(self, h: Tensor, cache: Cache, position: Tensor) -> Tensor:
        """The next token of each row: h (B, D), position (B,) of it -> (B, D), no gradients. Writes into the cache.

        Taking the same step again gives the same result: it writes nothing but what belongs to its own positions.
        """
        native = _native.library("transformer")
        if native is not None:
            in_c = self._in_c or InC(self)  # of the rows of another copy of this model
            if h.dtype == torch.float32 and in_c.usable and _native.usable(*cache):
                return in_c.step(native, h, cache, position.contiguous())
        stand = {
            pattern: Stand.of(pattern, position) for pattern in {layer.attention.pattern for layer in self._layers}
        }
        for layer, part in zip(self._layers, cache, strict=True):
            h = layer.step(h, part, stand[layer.attention.pattern])
        out: Tensor = self.norm(h)
        return out


class InC(_native.Addressed):
    """A transformer as `_transformer.c` takes it: made once, as making it takes as long as a step."""

    def __init__(self, net: Transformer) -> None:
        super().__init__(net)
        layers = [layer.in_c() for layer in net._layers]
        self.usable = net.norm.weight.dtype == torch.float32 and _native.usable(net.norm.weight)
        self._shape = net.width, net._layers[0].attention.heads, net._layers[0].up.shape[1], len(layers)
        self._layers = (ctypes.c_int64 * (len(layers) * len(layers[0])))(*itertools.chain(*layers))
        self._norm = _native.addresses(net.norm.weight, net.norm.bias)

    def step(self, native: ctypes.CDLL, h: Tensor, cache: Cache, position: Tensor) -> Tensor:
        """`Transformer.step`, of a contiguous cache."""
        out, shape = h.clone(memory_format=torch.contiguous_format), (len(h), *self._shape)
        layers = type(self._layers).from_buffer_copy(self._layers)
        each = len(layers) // len(cache)
        for i, part in enumerate(cache):
            layers[i * each + CACHE] = part.data_ptr()
        failed = native.step(
            (ctypes.c_int64 * len(shape))(*shape),
            layers,
            self._norm,
            ctypes.c_void_p(position.data_ptr()),
            ctypes.c_void_p(out.data_ptr()),
        )
        if failed:
            raise MemoryError("no memory for a step")
        return out


class Layer(nn.Module):
    """h + attention(norm h), then the same with a perceptron."""

    def __init__(self, width: int, heads: int, hidden: int, pattern: Pattern, gain: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, pattern, gain)
        self.norm2 = nn.LayerNorm(width)
        self.up = _weight(width, hidden, math.sqrt(2))
        self.down = _weight(hidden, width, gain)

    def forward(self, h: Tensor) -> Tensor:
        mixed, _, _ = self.attention(self.norm1(h))
        return self._perceptron(h + mixed)

    def prefill(self, h: Tensor, cache: Tensor) -> Tensor:
        mixed, keys, values = self.attention(self.norm1(h))
        self.attention.fill(cache, keys, values)
        return self._perceptron(h + mixed)

    def step(self, h: Tensor, cache: Tensor, stand: Stand) -> Tensor:
        return self._perceptron(h + self.attention.step(self.norm1(h), cache, stand))

    def in_c(self) -> list[int]:
        """The struct Layer of `_transformer.c`: where weights and, still open, its part of a cache lie; its pattern."""
        a = self.attention
        weights = (self.norm1.weight, self.norm1.bias, a.qkv, a.bias, a.out, self.norm2.weight, self.norm2.bias)
        tensors = (*weights, self.up, self.down)
        return [*(tensor.data_ptr() for tensor in tensors), 0, *a.pattern, _kept(a.pattern)]

    def _perceptron(self, h: Tensor) -> Tensor:
        out: Tensor = h + F.gelu(self.norm2(h) @ self.up) @ self.down
        return out


class Attention(nn.Module):
    """Causal attention of several heads in a pattern."""

    def __init__(self, width: int, heads: int, pattern: Pattern, gain: float) -> None:
        super().__init__()
        self.heads, self.pattern = heads, pattern
        self.qkv = _weight(width, 3 * width)
        self.out = _weight(width, width, gain)
        self.bias = nn.Parameter(torch.zeros(pattern.reach, heads))  # by lag, in strides

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T, D) -> (B, T, D), and the keys and values of all positions, (B, T, heads, d) each.

        A stride of S makes S sequences, each of every S-th position. Each is cut into N blocks of C queries, whose keys
        are those of the block and of as many blocks before it as the pattern reaches into.
        """
        b, t, width = x.shape
        (reach, stride), heads = self.pattern, self.heads
        length = math.ceil(t / stride)
        size = QUERIES * (math.ceil(length / QUERIES) if reach >= length else 1)  # C
        blocks = math.ceil(length / size)  # N
        before = 0 if blocks == 1 else math.ceil((reach - 1) / size)  # blocks that the first query of a block sees
        qkv = x @ self.qkv
        padded = F.pad(qkv, (0, 0, 0, blocks * size * stride - t))
        parts = padded.view(b, blocks, size, stride, 3, heads, -1).permute(4, 0, 3, 5, 1, 2, 6)
        q, k, v = parts.unbind()  # (B, S, heads, N, C, d) each
        if before:
            k, v = (_with_blocks_before(part, before) for part in (k, v))  # (B, S, heads, N, (before + 1) · C, d)
        scale = 1 / math.sqrt(q.shape[-1])
        logits = (q * scale) @ k.mT
        logits = logits + self._bias_of_blocks(blocks, size, before).to(logits.dtype)
        mixed = logits.softmax(dim=-1).to(v.dtype) @ v
        mixed = mixed.permute(0, 3, 4, 1, 2, 5).reshape(b, -1, width)[:, :t]
        _, keys, values = qkv.view(b, t, 3, heads, -1).unbind(dim=2)
        return mixed @ self.out, keys, values

    def _bias_of_blocks(self, blocks: int, size: int, before: int) -> Tensor:
        """(heads, N, C, (before + 1) · C): of each query of a block to its keys, −∞ where it is not to see one."""
        at = torch.arange(size, device=self.bias.device)
        key = torch.arange(-before * size, size, device=self.bias.device)
        lag = at[:, None] - key  # (C, keys)
        bias = self.bias[lag.clamp(0, self.pattern.reach - 1)].permute(2, 0, 1)[:, None]
        first = torch.arange(blocks, device=self.bias.device) * size
        seen = (lag >= 0) & (lag < self.pattern.reach) & (first[:, None, None] + key >= 0)  # (N, C, keys)
        return torch.where(seen, bias, -torch.inf)

    # with a cache

    def cache(self, rows: int) -> Tensor:
        d = len(self.out) // self.heads
        return self.bias.new_zeros(rows, self.heads, 2, self.pattern.stride, _kept(self.pattern), d)

    def fill(self, cache: Tensor, keys: Tensor, values: Tensor) -> None:
        """Keep keys and values (B, T0, heads, d) of the positions 0 … T0 − 1, as far back as any later one looks."""
        stride, kept, t = self.pattern.stride, cache.shape[4], keys.shape[1]
        at = torch.arange(max(0, t - kept * stride), t, device=keys.device)
        last = torch.stack([keys, values], dim=3)[:, at]  # (B, ·, heads, 2, d)
        cache[:, :, :, at % stride, at // stride % kept] = last.permute(0, 2, 3, 1, 4).to(cache.dtype)

    def step(self, x: Tensor, cache: Tensor, stand: Stand) -> Tensor:
        """x (B, D) -> (B, D)"""
        b, heads = len(x), self.heads
        q, k, v = (x @ self.qkv).view(b, 3, heads, -1).unbind(dim=1)  # (B, heads, d) each
        stand.write(cache, torch.stack([k, v], dim=2))
        keys, values = stand.read(cache).flatten(0, 1).unbind(dim=1)  # (B·heads, K, d) each
        q = q.reshape(b * heads, 1, -1) * (1 / math.sqrt(q.shape[-1]))
        logits = torch.cat([torch.bmm(q, keys[:, block].mT) for block in stand.blocks], dim=2)
        bias = self.bias[stand.lag].masked_fill(stand.unseen[:, :, None], -torch.inf).mT  # (B or 1, heads, ·)
        weights = (logits.view(b, heads, -1) + bias).softmax(dim=-1).view_as(logits)
        first, *more = stand.blocks
        mixed = torch.bmm(weights[:, :, first], values[:, first])
        for block in more:
            mixed.baddbmm_(weights[:, :, block], values[:, block])
        return mixed.view(b, -1) @ self.out


@dataclass(frozen=True)
class Stand:
    """Where a step's rows stand in a cache of some pattern. Position p is turn ⌊p / S⌋ of lane p mod S, and lies there
    at its turn modulo K."""

    pattern: Pattern
    lane: Tensor  # (B,), or of one row for all of them if they stand at one position; so are all of these
    slot: Tensor  # (B,)
    lag: Tensor  # (B, n) of the first n slots of the lane, which are as many as any row needs
    unseen: Tensor  # (B, n) bool
    blocks: Sequence[slice]  # of the n slots
    together: tuple[int, int] | None  # lane and slot of all rows

    @staticmethod
    def of(pattern: Pattern, position: Tensor) -> Stand:
        """Of rows at `position` (B,)."""
        (reach, stride), kept, at = pattern, _kept(pattern), position.tolist()
        alike = at.count(at[0]) == len(at)  # as after a request for several images: then a slice does for a gather
        together = (at[0] % stride, at[0] // stride % kept) if alike else None
        position = position[:1] if alike else position
        turn = position // stride
        n = min(kept, (max(at) // stride // BLOCK + 1) * BLOCK)
        lag = (turn[:, None] - torch.arange(n, device=position.device)) % kept
        return Stand(
            pattern,
            lane=position % stride,
            slot=turn % kept,
            lag=lag.clamp(max=reach - 1),
            unseen=lag > turn.clamp(max=reach - 1)[:, None],
            blocks=[slice(begin, begin + BLOCK) for begin in range(0, n, BLOCK)],
            together=together,
        )

    def write(self, cache: Tensor, new: Tensor) -> None:
        """Put keys and values (B, heads, 2, d) where each row stands."""
        if self.together:
            lane, slot = self.together
            cache[:, :, :, lane, slot] = new
        else:
            at = self._lanes(cache) * cache.shape[4] + self.slot.repeat_interleave(2 * cache.shape[1])
            cache.flatten(0, 4).index_copy_(0, at, new.flatten(0, 2))

    def read(self, cache: Tensor) -> Tensor:
        """(B, heads, 2, K, d): the lane of each row."""
        if self.together or self.pattern.stride == 1:
            return cache[:, :, :, self.together[0] if self.together else 0]
        b, heads, _, _, kept, d = cache.shape
        return cache.flatten(0, 3).index_select(0, self._lanes(cache)).view(b, heads, 2, kept, d)

    def _lanes(self, cache: Tensor) -> Tensor:
        """(B · heads · 2,) index of each row's lanes in the cache, its dims before the slots taken as one."""
        b, heads, _, stride, _, _ = cache.shape
        first = torch.arange(b * heads * 2, device=cache.device) * stride
        return (first.view(b, -1) + self.lane[:, None]).flatten()


def _kept(pattern: Pattern) -> int:
    """K: whole blocks where there is more than one."""
    return pattern.reach if pattern.reach <= BLOCK else math.ceil(pattern.reach / BLOCK) * BLOCK


def _with_blocks_before(x: Tensor, before: int) -> Tensor:
    """(..., N, C, d) -> (..., N, (before + 1) · C, d): each block after those before it; zeros before the first."""
    n = x.shape[-3]
    padded = F.pad(x, (0, 0, 0, 0, before, 0))
    return torch.cat([padded.narrow(-3, i, n) for i in range(before + 1)], dim=-2)


def _fitting(pattern: Pattern, length: int) -> Pattern:
    stride = min(pattern.stride, length)
    return Pattern(min(pattern.reach, math.ceil(length / stride)), stride)


def _weight(inputs: int, outputs: int, gain: float = 1.0) -> nn.Parameter:
    return nn.Parameter(torch.randn(inputs, outputs) * (gain / math.sqrt(inputs)))


def check(width: int, heads: int, hidden: int, patterns: Sequence[Pattern | int]) -> None:
    """Raises `ValueError` for a transformer that cannot be."""
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"width: {width} is not a positive multiple of heads ({heads})")
    if hidden < 1:
        raise ValueError(f"hidden: {hidden}; a positive number is needed")
    if not patterns:
        raise ValueError("patterns: none; there must be a layer")
    for pattern in patterns:
        if min((pattern,) if isinstance(pattern, int) else pattern) < 1:
            raise ValueError(f"patterns: {pattern}; reach and stride are positive")
