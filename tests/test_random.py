"""Counter-based noise: the published vectors, the distributions, and that a row's noise is its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models import _random

WORD = st.integers(0, 2**32 - 1)
SEED = st.integers(0, 2**64 - 1)

# Random123's kat_vectors for philox4x32-10: counter, key, output.
PUBLISHED = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def philox_plain(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 as section 3 of the paper states it, one block, with Python's integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a, b = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (b >> 32) ^ c1 ^ k0, b & 0xFFFFFFFF, (a >> 32) ^ c3 ^ k1, a & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def philox(counter: list[int], key: list[int]) -> list[int]:
    out: list[int] = _random.philox(torch.tensor(counter)[:, None], torch.tensor(key)[:, None])[:, 0].tolist()
    return out


def rows(*seeds: int) -> tuple[Tensor, Tensor]:
    """(seed, sample) of as many rows; sample 0."""
    bits = _random.seed_bits(seeds)
    return bits, torch.zeros_like(bits)


# --------------------------------------------------------------------------------------------------------------- philox


@pytest.mark.parametrize(("counter", "key", "output"), PUBLISHED)
def test_philox_gives_the_published_vectors(counter: str, key: str, output: str) -> None:
    words = [[int(word, 16) for word in line.split()] for line in (counter, key, output)]
    assert philox(words[0], words[1]) == words[2]
    assert philox_plain(words[0], words[1]) == words[2]


@given(counter=st.lists(WORD, min_size=4, max_size=4), key=st.lists(WORD, min_size=2, max_size=2))
def test_philox_equals_the_plain_statement_of_the_paper(counter: list[int], key: list[int]) -> None:
    assert philox(counter, key) == philox_plain(counter, key)


@given(seed=SEED, sample=WORD, tick=WORD, draw=WORD, n=st.integers(1, 13))
def test_words_are_philox_of_block_tick_draw_sample_under_the_seed(
    seed: int, sample: int, tick: int, draw: int, n: int
) -> None:
    key = [seed & 0xFFFFFFFF, seed >> 32]
    expected = [w for block in range(4) for w in philox_plain([block, tick, draw, sample], key)][:n]
    bits = _random.seed_bits([seed])
    assert _random.words(bits, torch.tensor([sample]), torch.tensor([tick]), draw, n).tolist() == [expected]
    assert _random.words(bits, torch.tensor([sample]), tick, draw, n).tolist() == [expected]


# ---------------------------------------------------------------------------------------------------------------- seeds


@given(seed=st.integers(2**63, 2**64 - 1))
def test_the_upper_half_of_the_seeds_keeps_its_bits(seed: int) -> None:
    bits = _random.seed_bits([seed, seed - 2**63])
    assert bits.dtype == torch.int64
    assert [b % 2**64 for b in bits.tolist()] == [seed, seed - 2**63]
    high, low = _random.words(bits, torch.zeros_like(bits), 0, 0, 8)
    assert not torch.equal(high, low), "the top bit of a seed counts"


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**63)])
def test_a_seed_outside_64_bits_is_refused_by_name(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"seed: {seed} is not an unsigned 64-bit number"):
        _random.seed_bits([0, seed])


# ---------------------------------------------------------------------------------------------------------- whose noise

DRAWS = [_random.uniform, _random.normal]


@pytest.mark.parametrize("draw", DRAWS)
@given(data=st.data())
@settings(max_examples=25)
def test_noise_depends_on_no_batch_mate_and_no_order(draw: object, data: st.DataObject) -> None:
    assert callable(draw)
    column = st.lists(st.tuples(SEED, st.integers(0, 1000), st.integers(0, 1000)), min_size=1, max_size=6)
    drawn = data.draw(column)
    seed = _random.seed_bits([row[0] for row in drawn])
    sample, tick = (torch.tensor([row[i] for row in drawn]) for i in (1, 2))
    together = draw(seed, sample, tick, 3, (2, 5))
    order = torch.tensor(data.draw(st.permutations(range(len(drawn)))))
    assert torch.equal(draw(seed[order], sample[order], tick[order], 3, (2, 5)), together[order])
    for i in range(len(drawn)):
        alone = draw(seed[i : i + 1], sample[i : i + 1], tick[i : i + 1], 3, (2, 5))
        assert torch.equal(alone[0], together[i])


@pytest.mark.parametrize("draw", [_random.words, *DRAWS])
@given(seed=SEED, few=st.integers(1, 9), more=st.integers(0, 30))
@settings(max_examples=25)
def test_a_longer_draw_begins_with_the_shorter_one(draw: object, seed: int, few: int, more: int) -> None:
    assert callable(draw)
    short, long = (draw(*rows(seed), 0, 0, n if draw is _random.words else (n,)) for n in (few, few + more))
    assert torch.equal(long[:, :few], short)


def test_global_generators_neither_matter_nor_move() -> None:
    seed, sample = rows(5)
    before = torch.get_rng_state()
    first = _random.normal(seed, sample, 0, 0, (9,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1234)
    assert torch.equal(_random.normal(seed, sample, 0, 0, (9,)), first)


def test_seeds_samples_ticks_and_draws_are_streams_of_their_own() -> None:
    """Neighbours in any column, and the same number in two columns, give uncorrelated normals."""
    n, far = 20_000, 2**63
    columns = [(0, 0, 0, 0), (1, 0, 0, 0), (2**32, 0, 0, 0), (far, 0, 0, 0)]
    columns += [(0, 1, 0, 0), (0, 2, 0, 0), (0, 0, 1, 0), (0, 0, 2, 0), (0, 0, 0, 1), (0, 0, 0, 2), (1, 1, 1, 1)]
    streams = [
        _random.normal(_random.seed_bits([seed]), torch.tensor([sample]), tick, draw, (n,))[0]
        for seed, sample, tick, draw in columns
    ]
    # Shifted copies of one another would pass a test of aligned numbers: look at neighbouring lags as well.
    for lag in (0, 1, 2, 4):
        shifted = torch.stack([s.roll(lag) for s in streams])
        correlation = torch.stack(streams).double() @ shifted.double().T / n
        if lag == 0:
            correlation -= torch.diag(correlation.diagonal())
        assert correlation.abs().max() < 5 / math.sqrt(n)  # five standard errors, of 484 pairs


# -------------------------------------------------------------------------------------------------------- distributions

MANY = 1 << 18


def test_uniform_is_uniform() -> None:
    u = _random.uniform(*rows(7), 0, 0, (MANY,))[0].double().numpy()
    assert scipy.stats.kstest(u, "uniform").pvalue > 1e-3
    assert abs(u.mean() - 1 / 2) < 5 * math.sqrt(1 / 12 / MANY)
    assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / MANY)
    pairs, _, _ = np.histogram2d(u[0::2], u[1::2], bins=16)
    assert scipy.stats.chisquare(pairs.ravel()).pvalue > 1e-3


def test_normal_is_standard_normal() -> None:
    z = _random.normal(*rows(7), 0, 0, (MANY,))[0].double().numpy()
    assert scipy.stats.kstest(z, "norm").pvalue > 1e-3
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - moment) < 5 * math.sqrt(variance / MANY), f"moment {power}"
    radius = z[0::2] ** 2 + z[1::2] ** 2  # the two normals of one pair of words are independent
    assert scipy.stats.kstest(radius, "chi2", (2,)).pvalue > 1e-3
    assert abs(np.corrcoef(z[0::2] ** 2, z[1::2] ** 2)[0, 1]) < 5 / math.sqrt(MANY / 2)


def test_every_word_gives_a_finite_normal_and_a_uniform_inside_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    extreme = torch.tensor([[0, 0, 0, 2**32 - 1, 2**32 - 1, 0, 2**32 - 1, 2**32 - 1, 511, 512, 2**31, 2**31 - 1]])
    monkeypatch.setattr(_random, "words", lambda seed, sample, tick, draw, n: extreme[:, :n])
    u = _random.uniform(*rows(0), 0, 0, (12,))
    assert u.dtype == torch.float32
    assert u.min() == 2.0**-24
    assert u.max() == 1 - 2.0**-24
    z = _random.normal(*rows(0), 0, 0, (12,))
    assert z.dtype == torch.float32
    assert z.isfinite().all()
    assert z.abs().max() <= math.sqrt(2 * 33 * math.log(2))  # the largest radius, of the word 0


def test_uniforms_are_exact_multiples_in_float32() -> None:
    """Rounding would put 1.0 within reach, and make some numbers likelier than others."""
    u = _random.uniform(*rows(3), 0, 0, (10_000,))[0].double() * 2**23
    assert torch.equal(u - 0.5, (u - 0.5).round())


# ---------------------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (2, 3, 5), (4, 1)])
def test_the_shape_is_the_batch_and_what_was_asked_for(draw: object, shape: tuple[int, ...]) -> None:
    assert callable(draw)
    assert draw(*rows(1, 2, 3), 0, 0, shape).shape == (3, *shape)


# ----------------------------------------------------------------------------------------------------------- image seed


def grid(seed: int, b: int = 4) -> Tensor:
    return torch.randint(0, 256, (b, 3, 5, 4), generator=torch.Generator().manual_seed(seed)) / 255


def test_the_seed_of_an_image_is_a_function_of_its_bytes_alone() -> None:
    x = grid(0)
    seeds = _random.image_seed(x)
    assert seeds.dtype == torch.int64
    assert seeds.shape == (4,)
    assert torch.equal(_random.image_seed(x.flip(0)), seeds.flip(0))
    assert torch.equal(torch.cat([_random.image_seed(image[None]) for image in x]), seeds)
    assert torch.equal(_random.image_seed(x.contiguous(memory_format=torch.channels_last)), seeds)
    assert torch.equal(_random.image_seed(x.double()), seeds)
    assert torch.equal(_random.image_seed(x + 1e-5), seeds), "rounding noise of the scaling must not matter"


def test_one_level_in_one_pixel_gives_another_seed() -> None:
    x = grid(1, b=1)
    x[0, 1, 2, 3] = 100 / 255
    y = x.clone()
    y[0, 1, 2, 3] = 101 / 255
    assert _random.image_seed(x) != _random.image_seed(y)


def test_the_seeds_of_images_use_all_64_bits() -> None:
    seeds = _random.image_seed(grid(2, b=256))
    bits = (seeds[:, None] >> torch.arange(64)) & 1
    assert len(set(seeds.tolist())) == 256
    assert (bits.double().mean(dim=0) - 0.5).abs().max() < 5 * 0.5 / math.sqrt(256)
