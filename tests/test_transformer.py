"""The shared causal transformer: causal by gradient, its steps equal to the full forward, whoever stands beside."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from models import _native, _transformer
from models._transformer import Cache, Pattern, Transformer

LENGTH = 23  # blocks are made smaller than that
PATTERNS = {
    "full": [LENGTH],
    "window": [Pattern(5)],
    "strided": [Pattern(3, stride=4)],
    "all of a stride": [Pattern(99, stride=4)],
    "itself": [1],
    "several": [Pattern(4), Pattern(99, 5), LENGTH, 9],
}
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


@pytest.fixture(autouse=True, params=["C", "tensor operations"])
def way_to_step(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Everything holds of both; in small blocks."""
    monkeypatch.setattr(_transformer, "QUERIES", 4)
    monkeypatch.setattr(_transformer, "BLOCK", 16)
    if request.param == "tensor operations":
        monkeypatch.setattr(_native, "library", lambda name: None)
    elif _native.library("transformer") is None:
        pytest.skip("no C compiler on this machine")
    return str(request.param)


def build(pattern: list[Pattern | int], length: int = LENGTH, width: int = 16) -> Transformer:
    torch.manual_seed(0)
    network = Transformer(width, 2, 24, pattern, length)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return network.eval().requires_grad_(False)


def stepped(network: Transformer, h: Tensor, start: int = 0, cache: Cache | None = None) -> Tensor:
    """(B, T, D) token by token."""
    b, t, _ = h.shape
    cache = network.cache(b) if cache is None else cache
    return torch.stack([network.step(h[:, i], cache, torch.full((b,), i)) for i in range(start, t)], dim=1)


@patterns
def test_steps_equal_the_full_forward(pattern: list[Pattern | int]) -> None:
    network, h = build(pattern), torch.randn(3, LENGTH, 16)
    full = network(h)
    assert full.std() > 0.3
    torch.testing.assert_close(stepped(network, h), full, rtol=1e-5, atol=1e-5)


@patterns
@pytest.mark.parametrize("known", [1, 7, 20])
def test_steps_go_on_where_a_prefill_ends(pattern: list[Pattern | int], known: int) -> None:
    network, h = build(pattern), torch.randn(3, LENGTH, 16)
    full, cache = network(h), network.cache(3)
    torch.testing.assert_close(network.prefill(h[:, :known], cache), full[:, :known], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stepped(network, h, known, cache), full[:, known:], rtol=1e-5, atol=1e-5)


@patterns
def test_an_output_depends_on_what_its_pattern_shows_it_and_on_nothing_else(pattern: list[Pattern | int]) -> None:
    """∂ out_i / ∂ in_j is exactly zero for j > i, and elsewhere where no chain of layers leads from i to j."""
    network, h = build(pattern), torch.randn(1, LENGTH, 16, requires_grad=True)
    out = network(h)[0]
    lag = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    seen = torch.eye(LENGTH)
    for p in pattern:
        reach, stride = p if isinstance(p, Pattern) else Pattern(p)
        attends = (lag >= 0) & (lag % stride == 0) & (lag // stride < reach)
        seen = attends.float() @ seen
    for i in range(LENGTH):
        (gradient,) = torch.autograd.grad(out[i].square().sum(), h, retain_graph=True)
        assert torch.equal(gradient[0].abs().amax(dim=1) > 0, seen[i] > 0), f"output {i}"


@patterns
def test_rows_stand_at_their_own_positions(pattern: list[Pattern | int]) -> None:
    """Bit for bit the same as the row among rows that stand where it does; the caches join and leave by row."""
    network, h = build(pattern), torch.randn(4, LENGTH, 16)
    expected = stepped(network, h)
    cache, position = network.cache(4), torch.tensor([0, 0, 0, 0])
    generator = torch.Generator().manual_seed(1)
    while int(position.min()) < LENGTH:
        go = (torch.rand(4, generator=generator) < 0.6) & (position < LENGTH)
        at = torch.cat([go.nonzero()[:, 0], (~go).nonzero()[:, 0]])  # those that wait take their last step again
        waiting = ~go[at]
        taken = (position[at] - waiting.long()).clamp(min=0)
        some = tuple(part[at] for part in cache)
        out = network.step(h[at, taken], some, taken)
        for part, new in zip(cache, some, strict=True):
            part[at] = new
        assert torch.equal(out, expected[at, taken])
        position[at] += (~waiting).long()


@patterns
def test_a_step_can_be_taken_again(pattern: list[Pattern | int]) -> None:
    network, h = build(pattern), torch.randn(4, LENGTH, 16)
    expected, cache = stepped(network, h), network.cache(4)
    for i in range(LENGTH):
        for _ in range(2):
            assert torch.equal(network.step(h[:, i], cache, torch.full((4,), i)), expected[:, i])


def test_how_far_others_have_come_does_not_change_a_bit() -> None:
    """A row at the beginning beside one at the end, where the cache is read in many blocks instead of one."""
    length = 150
    network, h = build([length], length), torch.randn(4, length, 16)
    late = network.cache(4)
    network.prefill(h, late)
    apart = network.cache(4)
    for i in range(length):
        alone = network.step(h[:, i], apart, torch.full((4,), i))
        beside = tuple(part.clone() for part in apart)
        for part, end in zip(beside, late, strict=True):
            part[3] = end[3]
        position = torch.tensor([i, i, i, length - 1])
        assert torch.equal(network.step(h[range(4), position], beside, position)[:3], alone[:3])


@torch.inference_mode()
def test_in_c_a_row_is_the_same_bits_in_a_batch_of_any_size(way_to_step: str) -> None:
    if way_to_step != "C":
        pytest.skip("matrix libraries sum up otherwise for other numbers of rows")
    network, h = build(PATTERNS["several"], width=24), torch.randn(9, LENGTH, 24)
    expected = stepped(network, h)
    for size in range(1, 9):
        assert torch.equal(stepped(network, h[:size]), expected[:size]), size


def test_c_steps_in_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network, h = build([5]), torch.randn(2, 3, 16)
    single = stepped(network, h)
    monkeypatch.setattr(_transformer.InC, "step", None)
    torch.testing.assert_close(stepped(network.double(), h.double()).float(), single, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))])
def test_a_copy_reads_its_own_weights_and_what_is_written_or_moved_shows(
    copied: Callable[[Transformer], Transformer],
) -> None:
    """Though it is kept from step to step where C finds them."""
    network, h = build(PATTERNS["several"]), torch.randn(2, LENGTH, 16)
    expected, begun = stepped(network, h), network.cache(2)
    other = copied(network)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(stepped(other, h, cache=begun), expected)
    written = stepped(network, h)
    assert (written - expected).abs().max() > 0.1
    for parameter, put in zip(network.parameters(), other.parameters(), strict=True):
        parameter.data = put.data.clone()
    torch.testing.assert_close(stepped(network, h), expected)


def test_a_reach_is_cut_to_the_sequence() -> None:
    network = Transformer(8, 2, 8, [1000, Pattern(1000, 3), Pattern(2, 1000)], 10)
    assert [tuple(part.shape) for part in network.cache(5)] == [
        (5, 2, 2, 1, 10, 4),
        (5, 2, 2, 3, 4, 4),
        (5, 2, 2, 10, 1, 4),
    ]


def test_every_parameter_learns() -> None:
    network = build(PATTERNS["several"]).requires_grad_(True)
    network(torch.randn(2, LENGTH, 16)).square().mean().backward()
    for name, parameter in itertools.chain(network.named_parameters()):
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 4, 8, [3]), "width: 6 is not a positive multiple of heads"),
        ((8, 0, 8, [3]), "width: 8"),
        ((8, 2, 0, [3]), "hidden: 0"),
        ((8, 2, 8, []), "patterns: none"),
        ((8, 2, 8, [3, 0]), "patterns: 0"),
        ((8, 2, 8, [Pattern(3, 0)]), "patterns: Pattern"),
    ],
)
def test_a_transformer_that_cannot_be_is_refused(arguments: tuple, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(ValueError, match=message):
        Transformer(*arguments, length=10)
