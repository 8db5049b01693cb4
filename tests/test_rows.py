"""cat, take, pad and nbytes for any Rows: the algebra that lets rows join and leave a running batch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models import _rows
from models._protocol import Rows


@dataclass
class Cache(Rows):
    keys: tuple[Tensor, ...]


@dataclass
class Chain(Rows):
    x: Tensor
    pair: tuple[Tensor, tuple[Tensor, Cache]]
    nothing: tuple[Tensor, ...] = ()


def chain(first: int, b: int) -> Chain:
    """Rows numbered from `first`: every value of row i says i, so that a mix-up shows."""
    tick = torch.arange(first, first + b)
    x = tick[:, None, None].expand(b, 2, 3).float().contiguous()
    cache = Cache(tick, tick + 1, keys=(x.double(), x.bool()))
    return Chain(tick, tick * 2, x, (tick.to(torch.uint8), (x[:, :0], cache)))


def leaves(tree: Any) -> list[Tensor]:
    if isinstance(tree, Tensor):
        return [tree]
    parts = tree if isinstance(tree, tuple) else [getattr(tree, field.name) for field in fields(tree)]
    return [leaf for part in parts for leaf in leaves(part)]


def same(a: Rows, b: Rows) -> bool:
    pairs = zip(leaves(a), leaves(b), strict=True)
    return type(a) is type(b) and all(p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)


SIZES = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def parts_of(sizes: list[int]) -> list[Chain]:
    return [chain(sum(sizes[:i]), b) for i, b in enumerate(sizes)]


@given(sizes=SIZES)
def test_cat_puts_the_rows_of_every_field_one_after_the_other(sizes: list[int]) -> None:
    together = _rows.cat(parts_of(sizes))
    assert _rows.count(together) == sum(sizes)
    assert same(together, chain(0, sum(sizes)))


@given(sizes=SIZES)
def test_take_undoes_cat(sizes: list[int]) -> None:
    parts = parts_of(sizes)
    together, start = _rows.cat(parts), 0
    for part in parts:
        stop = start + _rows.count(part)
        assert same(_rows.take(together, range(start, stop)), part)
        start = stop


@given(data=st.data(), b=st.integers(1, 6))
def test_take_gives_the_rows_asked_for_in_that_order(data: st.DataObject, b: int) -> None:
    index = data.draw(st.lists(st.integers(0, b - 1), max_size=8))
    taken = _rows.take(chain(0, b), index)
    assert taken.tick.tolist() == index
    assert all(leaf.shape[0] == len(index) for leaf in leaves(taken))
    assert same(taken, _rows.take(chain(0, b), torch.tensor(index, dtype=torch.int64)))
    again = data.draw(st.lists(st.integers(0, len(index) - 1), max_size=8) if index else st.just([]))
    assert same(_rows.take(taken, again), _rows.take(chain(0, b), [index[i] for i in again]))


def test_take_is_a_copy() -> None:
    rows = chain(0, 3)
    taken = _rows.take(rows, [0, 1, 2])
    for leaf in leaves(taken):
        leaf.zero_()
    assert same(rows, chain(0, 3))


@given(b=st.integers(1, 5), size=st.integers(0, 9))
def test_pad_repeats_the_last_row_and_take_cuts_it_off(b: int, size: int) -> None:
    padded = _rows.pad(chain(0, b), size)
    assert _rows.count(padded) == max(b, size)
    assert padded.tick.tolist() == [min(i, b - 1) for i in range(max(b, size))]
    assert same(_rows.take(padded, range(b)), chain(0, b))


@given(sizes=SIZES)
def test_nbytes_is_additive_and_counts_every_field(sizes: list[int]) -> None:
    # tick and left of both dataclasses (8 bytes each), x (6 floats), its doubles and booleans, one byte.
    row = 4 * 8 + 6 * 4 + 6 * 8 + 6 + 1
    assert _rows.nbytes(_rows.cat(parts_of(sizes))) == sum(map(_rows.nbytes, parts_of(sizes))) == row * sum(sizes)


@given(b=st.integers(0, 9))
def test_filled_repeats_the_last_index_up_to_the_next_multiple(b: int) -> None:
    index = torch.arange(b) * 3
    filled = _rows.filled(index)
    assert len(filled) % _rows.ROW_MULTIPLE == 0
    assert len(filled) - b < _rows.ROW_MULTIPLE
    assert torch.equal(filled[:b], index)
    assert set(filled[b:].tolist()) <= set(index[-1:].tolist())


@given(data=st.data(), b=st.integers(1, 4))
def test_equal_sees_one_changed_value_in_any_column(data: st.DataObject, b: int) -> None:
    assert _rows.equal(chain(0, b), chain(0, b))
    changed = chain(0, b)
    columns = [leaf for leaf in leaves(changed) if leaf.numel()]
    column = data.draw(st.sampled_from(columns)).view(-1)
    at = data.draw(st.integers(0, len(column) - 1))
    column[at] = ~column[at] if column.dtype == torch.bool else column[at] + 1
    assert not _rows.equal(changed, chain(0, b))


def test_equal_takes_nan_for_nan_and_no_shape_for_another() -> None:
    a, b = chain(0, 2), chain(0, 2)
    a.x[0, 0, 0] = float("nan")
    assert not _rows.equal(a, b)
    b.x[0, 0, 0] = float("nan")
    assert _rows.equal(a, b)
    one, four = (Rows(torch.zeros(n, dtype=torch.int64), torch.zeros(n, dtype=torch.int64)) for n in (1, 4))
    assert not _rows.equal(one, four), "one row would broadcast over four"


def test_cat_refuses_an_empty_list() -> None:
    with pytest.raises(ValueError, match="batches: none given"):
        _rows.cat([])


def test_cat_refuses_rows_of_different_types_by_name() -> None:
    plain = Rows(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"different types: \['Chain', 'Rows'\]"):
        _rows.cat([chain(0, 1), plain])


def test_cat_refuses_tuples_of_different_lengths() -> None:
    a, b = (Cache(torch.zeros(1), torch.zeros(1), keys=(torch.zeros(1),) * n) for n in (1, 2))
    with pytest.raises(ValueError, match="zip"):
        _rows.cat([a, b])


@pytest.mark.parametrize("value", [None, 3, [torch.zeros(2)], {"x": torch.zeros(2)}, Chain])
def test_a_field_that_cannot_be_batched_is_refused_by_its_type(value: Any) -> None:
    rows = Chain(torch.zeros(2), torch.zeros(2), value, chain(0, 2).pair)
    for act in (lambda: _rows.cat([rows, rows]), lambda: _rows.take(rows, [0]), lambda: _rows.nbytes(rows)):
        with pytest.raises(TypeError, match=f"a field of type {type(value).__name__}"):
            act()


def test_an_index_outside_the_batch_is_refused() -> None:
    for index in ([3], [-1]):
        with pytest.raises(IndexError):
            _rows.take(chain(0, 3), index)


def test_no_rows_can_be_taken_but_not_padded() -> None:
    none = _rows.take(chain(0, 3), [])
    assert _rows.count(none) == 0
    assert same(_rows.cat([none, chain(0, 2)]), chain(0, 2))
    with pytest.raises(ValueError, match="no row to pad with"):
        _rows.pad(none, 2)
