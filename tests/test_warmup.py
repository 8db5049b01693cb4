"""Trying a model before it serves: in batches of which sizes a row comes out the same, and for how long."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_engine import SPACE
from toys import Config, Walk, WalkRows

from models._protocol import UNLABELLED, Draw, Range, Score
from service.programs import Drawing, Scoring
from service.warmup import CANONICAL_ROWS, LONGEST_STEP, Tried, tried


class Slow(Walk):
    """A step takes `base` seconds and `pace` more for each row, on a clock of its own."""

    def __init__(self, pace: float, base: float = 0.0) -> None:
        super().__init__(Config(), SPACE)
        self.pace, self.base, self.now = pace, base, 0.0
        self.sizes: list[int] = []

    def step(self, rows: WalkRows) -> WalkRows:
        self.sizes.append(len(rows.tick))
        self.now += self.base + self.pace * len(rows.tick)
        return super().step(rows)

    def clock(self) -> float:
        return self.now


def try_it(model: Slow, max_rows: int = 64) -> Tried:
    return tried(Drawing(model), torch.device("cpu"), max_rows, "exact", model.clock, model.clock)


@pytest.mark.parametrize("base", [0.0, 0.001, 0.1, 0.4, 2.0])
@pytest.mark.parametrize("pace", [0.0, 1e-4, 0.003, 0.008, 0.02, 0.09, 0.2, 0.4, 3.0])
def test_a_slow_model_is_tried_in_seconds_and_served_in_small_batches(pace: float, base: float) -> None:
    model = Slow(pace, base)
    found = try_it(model)
    lone = base + pace
    assert model.now <= 4 * lone + 16 * LONGEST_STEP, "a few steps of one row, and then such as are quick"
    if found.max_rows > 1:
        assert base + pace * found.max_rows <= LONGEST_STEP * (1 + 1e-9)
    for rows in range(1, found.max_rows + 1):
        assert rows <= found.size(rows) <= found.size(found.max_rows)
    for rows in (1, found.max_rows):
        assert found.step_seconds(rows) == pytest.approx(base + pace * found.size(rows))
    assert found.seconds[1] == pytest.approx(lone)
    if base + pace * 64 <= LONGEST_STEP:
        assert found.max_rows == 64
    elif base + pace * 4 <= LONGEST_STEP and base + pace * 8 > LONGEST_STEP:
        assert found.max_rows == 4


def test_where_a_step_costs_the_same_whatever_its_rows_many_are_taken() -> None:
    assert try_it(Slow(0.0, 0.4)).max_rows == 64
    assert try_it(Slow(0.05)).max_rows == 8
    assert try_it(Slow(0.0, 2.0)).max_rows == 1


class SlowScore(Slow):
    """So is its score, of one step; of more than 16 rows each takes `crowded` times as long."""

    def __init__(self, pace: float, base: float, crowded: float = 1.0) -> None:
        super().__init__(pace, base)
        self.crowded = crowded

    def takes(self, rows: int) -> float:
        return self.base + self.pace * rows * (self.crowded if rows > 16 else 1.0)

    def evaluate(self, x: torch.Tensor, labels: torch.Tensor) -> Score:
        self.now += self.takes(len(x))
        return super().evaluate(x, labels)


@pytest.mark.parametrize(
    ("pace", "base", "crowded", "rows"),
    [
        (0.02, 0.0, 1.0, 8),  # by the row: nobody gains by more
        (0.02, 0.004, 1.0, 8),
        (0.002, 0.0, 1.0, 64),  # as long as a short step
        (0.001, 0.0, 1.5, 64),  # a short step of any size
        (0.004, 0.0, 1.5, 16),  # more rows are dearer rows
        (0.005, 0.05, 1.0, 64),  # long, and worth it
        (0.0, 0.4, 1.0, 64),
        (0.2, 0.0, 1.0, 1),  # one row is a long step already
    ],
)
def test_rows_of_one_step_come_in_short_steps_where_longer_ones_make_none_cheaper(
    pace: float, base: float, crowded: float, rows: int
) -> None:
    model = SlowScore(pace, base, crowded)
    found = tried(Scoring(model), torch.device("cpu"), 64, "exact", model.clock, model.clock)
    assert found.max_rows == rows
    chain = Slow(pace, base)
    assert try_it(chain).max_rows >= rows, "rows that go on need a place each"


@pytest.mark.parametrize("max_rows", [1, 2, 3, 4, 6, 16, 100])
def test_no_batch_is_larger_than_was_asked_for(max_rows: int) -> None:
    model = Slow(1e-6)
    found = try_it(model, max_rows)
    assert found.max_rows == max_rows
    assert max(model.sizes) == -(-max_rows // 4) * 4
    assert {found.size(rows) for rows in range(1, max_rows + 1)} <= {1, 2, 3, *range(4, 104, 4)}


class Sensitive(Walk):
    """Some of its floats depend on the size of the batch: where there are so many rows, of requests with a label or
    without, after so many steps."""

    def __init__(self, sizes: set[int], labelled: bool, after: int, seen: bool) -> None:
        super().__init__(Config(), dataclasses.replace(SPACE, labels=("a",)))
        self.spec = dataclasses.replace(self.spec, guidance_scale=Range(0.0, 1.0, 3.0))
        self.bad_sizes, self.labelled, self.after, self.seen = sizes, labelled, after, seen

    def init(self, draws: list[Draw]) -> WalkRows:  # type: ignore[override]
        rows = super().init(draws)
        rows.sample = torch.tensor([d.sample + 1000 * (d.label == UNLABELLED) for d in draws])
        return rows

    def odd(self, rows: WalkRows) -> bool:
        of_kind = bool((rows.sample < 1000).all()) == self.labelled
        return len(rows.tick) in self.bad_sizes and of_kind and int(rows.tick.min()) >= self.after

    def step(self, rows: WalkRows) -> WalkRows:
        rows = super().step(rows)
        if not self.seen and self.odd(rows):
            rows.x = rows.x * (1 + 1e-6)
        return rows

    def image(self, rows: WalkRows) -> torch.Tensor:
        image = super().image(rows)
        return image * (1 - 1e-6) if self.seen and self.odd(rows) else image


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("after", [1, 2])
@pytest.mark.parametrize("seen", [True, False])
@pytest.mark.parametrize("sizes", [set(), {1}, {2}, {1, 3}, {1, 2, 3}])
def test_few_rows_are_filled_up_where_a_bit_was_seen_to_differ(
    sizes: set[int], labelled: bool, after: int, seen: bool
) -> None:
    """In a column of the rows or in the image alone, at once or at the last step, with a condition or without."""
    model = Sensitive(sizes, labelled, after, seen)
    found = tried(Drawing(model), torch.device("cpu"), 32, "exact", lambda: 0.0)
    assert (found.multiple, found.max_rows) == (4, 32)
    assert found.alike == {1, 2, 3} - sizes
    assert [found.size(rows) for rows in range(1, 6)] == [*(4 if rows in sizes else rows for rows in (1, 2, 3)), 4, 8]


def test_every_batch_has_one_size_where_multiples_differ() -> None:
    model = Sensitive({8}, labelled=True, after=1, seen=True)
    found = tried(Drawing(model), torch.device("cpu"), 32, "exact", lambda: 0.0)
    assert (found.multiple, found.max_rows, found.alike) == (CANONICAL_ROWS, CANONICAL_ROWS, frozenset())
