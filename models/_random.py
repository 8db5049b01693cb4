"""Counter-based noise: a pure function of (seed, sample, tick, draw), so that an image never depends on its batch
mates.

Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in vectorised tensor operations:
the key is the 64-bit seed; the 128-bit counter is (block, tick, draw, sample), where a block holds four 32-bit words.
Integers are exact on every device; normals are computed in float64 and rounded to float32, so that devices agree on
them as well.

    variable    paper
    x, y        the counter's words 0 and 2, and 1 and 3 (a round carries even words into odd ones)
    m, w        M, the multipliers, and W, the Weyl constants that raise the key
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

ROUNDS = 10
_MASK = 0xFFFFFFFF


@lru_cache(maxsize=16)
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    m = torch.tensor([0xD2511F53, 0xCD9E8D57], dtype=torch.int64, device=device)
    w = torch.tensor([0x9E3779B9, 0xBB67AE85], dtype=torch.int64, device=device)
    return m, torch.arange(ROUNDS, device=device)[:, None] * w  # (2,), (ROUNDS, 2)


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10. counter (4, ...) and key (2, ...), broadcastable, int64 holding unsigned 32-bit words -> (4,
    ...), likewise.
    """
    m, raises = _constants(counter.device)
    ones = (1,) * (counter.dim() - 1)
    m = m.view(2, *ones)
    x, y = counter[0::2], counter[1::2]  # (2, ...) each
    for k in (key + raises.view(ROUNDS, 2, *ones)) & _MASK:
        product = x * m  # wraps modulo 2^64: the bits are those of the unsigned product
        x, y = ((product >> 32) & _MASK).flip(0) ^ y ^ k, (product & _MASK).flip(0)
    return torch.stack([x[0], y[0], x[1], y[1]])


def seed_bits(seeds: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Unsigned 64-bit seeds -> (B,) int64 with the same bits. Raises `ValueError` for a seed outside 0 … 2^64 − 1."""
    for seed in seeds:
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed: {seed} is not an unsigned 64-bit number (0 … {2**64 - 1})")
    return torch.tensor([s - 2**64 if s >= 2**63 else s for s in seeds], dtype=torch.int64, device=device)


def words(seed: Tensor, sample: Tensor, tick: Tensor | int, draw: int, n: int) -> Tensor:
    """(B, n) int64 of random 32-bit words. seed, sample, tick: (B,) (tick may be one number); draw tells draws of one
    tick apart.
    """
    b, blocks = seed.shape[0], (n + 3) // 4
    block = torch.arange(blocks, device=seed.device).expand(1, b, blocks)
    rest = (
        torch.stack([torch.as_tensor(tick, device=seed.device).expand(b), torch.full_like(seed, draw), sample]) & _MASK
    )
    counter = torch.cat([block, rest[:, :, None].expand(3, b, blocks)])  # (4, B, blocks)
    key = torch.stack([seed, seed >> 32]) & _MASK  # (2, B)
    return philox(counter, key[:, :, None]).permute(1, 2, 0).reshape(b, -1)[:, :n]


def uniform(seed: Tensor, sample: Tensor, tick: Tensor | int, draw: int, shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32, uniform on the open interval (0, 1): the 2^23 midpoints (k + ½) 2^-23, each exact in
    float32.
    """
    n = math.prod(shape)
    return ((words(seed, sample, tick, draw, n) >> 9).to(torch.float32) + 0.5).mul_(2.0**-23).view(-1, *shape)


def normal(seed: Tensor, sample: Tensor, tick: Tensor | int, draw: int, shape: Sequence[int]) -> Tensor:
    """(B, *shape) float32, standard normal, by Box–Muller on pairs of words."""
    n = math.prod(shape)
    pairs = words(seed, sample, tick, draw, n + n % 2).view(seed.shape[0], -1, 2).to(torch.float64)
    radius = ((pairs[..., 0] + 0.5) * 2.0**-32).log_().mul_(-2.0).sqrt_()
    angle = pairs[..., 1] * (2.0 * math.pi * 2.0**-32)
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)
    return z.view(seed.shape[0], -1)[:, :n].to(torch.float32).reshape(-1, *shape)


def image_seed(x: Tensor) -> Tensor:
    """(B,) int64 seeds that are a function of each image's own 8-bit content: the same image always gets the same
    noise.

    x: (B, C, H, W) on the grid k / 255. The seed is a 64-bit BLAKE2b of the bytes.
    """
    levels = (x.detach() * 255).round().to(torch.uint8).cpu().contiguous().numpy()
    digests = [hashlib.blake2b(image.tobytes(), digest_size=8).digest() for image in levels]
    return seed_bits([int.from_bytes(digest, "little") for digest in digests], x.device)
