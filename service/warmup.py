"""Trying a program before it serves: in batches of which sizes a row comes out the same, and what a step takes.

Batches grow from one row on, twice as many each time, for as long as a step is expected to take no longer than
`LONGEST_STEP`. So a slow model is tried in a few seconds, and is served in small batches: others wait for the end of a
step, and where a step costs by the row, larger ones would not be worth their waiting. Rows that take one step only, as
all scores of one pass do, need no places beside each other at all: their batches are no longer than `SHORT_STEP`, but
where they would cost more by the row. What live steps take is learnt from them (`service.cost`).

Floats are compared bit for bit: every column of the rows after a step, and what is to be seen of them. Where they are
the same for every multiple of `_rows.ROW_MULTIPLE` that was tried, a batch is filled up to such a multiple; fewer rows
than the least of them are not, where they, too, were seen to come out the same, to the end of a short chain. Where
multiples differ, every batch has one size.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from models import _rows
from models._protocol import Rows
from service.execution import Determinism
from service.programs import Drawing, Program

log = logging.getLogger(__name__)

CANONICAL_ROWS = 16  # of every batch on a CPU, where sizes are not alike
LONGEST_STEP = 0.5  # seconds
SHORT_STEP = 0.1  # seconds
AS_CHEAP = 1.1  # times what a row costs in the batch where it costs least
LOOKED_AT = 4  # steps after which images are compared, where pixels decide
SLOW = 0.1  # seconds of a step, from which on few rows are compared with more after a single one
FOLLOWED = 0.5  # seconds for which they are followed where steps are faster: as a rule to their end


@dataclass(frozen=True)
class Tried:
    """What was found."""

    multiple: int  # of rows that a batch is filled up to
    max_rows: int  # that step together
    alike: frozenset[int] = frozenset()  # sizes of batches that need no filling up, besides the multiples
    seconds: dict[int, float] = field(default_factory=dict)  # of a step, by the rows of the batches that were tried

    def size(self, rows: int) -> int:
        """That a batch of so many rows is filled up to."""
        return rows if rows in self.alike else -(-rows // self.multiple) * self.multiple

    def step_seconds(self, rows: int) -> float:
        """What a step took for such a batch, or for the next larger one that was tried."""
        return self.seconds[min(size for size in self.seconds if size >= self.size(rows))]


@torch.inference_mode()
def tried(
    program: Program,
    device: torch.device,
    max_rows: int,
    determinism: Determinism,
    clock: Callable[[], float],
    spent: Callable[[], float] | None = None,
) -> Tried:
    """How to run the program in batches of `max_rows` at most. Raises whatever it does.

    clock: what `Tried.seconds` are told by. spent: what decides whether a step is slow; by default the time of this
    thread's processor where that does the work, so that others who keep it busy make no model a slow one.
    """
    few = _rows.ROW_MULTIPLE
    trial = _Trial(program, device, clock, spent or (time.thread_time if device.type == "cpu" else time.perf_counter))
    trial.grow(max(1, -(-max_rows // few)) * few)
    top = max(trial.after)  # served in larger batches than these, steps would take too long
    if top < max_rows:
        log.info("%s: more than %d rows would take longer than %g s a step", program.name, top, LONGEST_STEP)
    top = trial.worth_it(few)
    exact = all(trial.same(size, top) for size in trial.after if size % few == 0 and size < top)
    alike = trial.alike(min(few, top)) if exact else frozenset[int]()
    if determinism == "pixels" and isinstance(program, Drawing) and top >= few:
        small = [size for size in range(1, few + 1) if size not in alike]
        expected = _shown(program, top)
        if all(np.array_equal(_shown(program, size), expected[:size]) for size in small):
            return Tried(1, min(max_rows, top), seconds=trial.seconds)
    if exact:
        return Tried(min(few, top), min(max_rows, top), alike, trial.seconds)
    canonical = max(size for size in trial.after if device.type == "cuda" or size <= CANONICAL_ROWS)
    log.info("%s: floats depend on the batch size; every batch has %d rows", program.name, canonical)
    return Tried(canonical, canonical, seconds=trial.seconds)


class _Trial:
    """A step over batches of every size that is tried, and what came of it."""

    def __init__(
        self, program: Program, device: torch.device, clock: Callable[[], float], spent: Callable[[], float]
    ) -> None:
        self._program, self._clock, self._spent = program, clock, spent
        self._times = 1 if device.type == "cpu" else 2  # the first step of a size chooses its kernels there
        self.after: dict[int, Rows] = {}  # by size
        self.seconds: dict[int, float] = {}
        self._pace: dict[int, float] = {}

    def grow(self, top: int) -> None:
        """To so many rows, or as many as a step takes no longer than it should."""
        self._step(1)  # the first of all is slower
        self._step(1)
        size = 1
        while size < top:
            more = top if size >= CANONICAL_ROWS and self._expected(top) <= LONGEST_STEP else min(2 * size, top)
            if self._expected(more) > LONGEST_STEP:
                return
            self._step(more)
            if self._pace[more] > LONGEST_STEP:
                del self.after[more]
                return
            size = more

    def _expected(self, rows: int) -> float:
        """Seconds, on the line through the two largest sizes; of two rows nothing is known from one."""
        largest = max(self._pace)
        if largest == 1:
            return self._pace[1]
        before = max(size for size in self._pace if size < largest)
        each = (self._pace[largest] - self._pace[before]) / (largest - before)
        return self._pace[largest] + max(0.0, each) * (rows - largest)

    def worth_it(self, multiple: int) -> int:
        """The largest batch to serve: of rows that go on after a step, the largest that was tried; of others none that
        takes long without making rows cheaper. Of sizes that are such multiples, if there are any."""
        top = max(self.after)
        if self._pace[top] <= SHORT_STEP or int(self.after[top].left.max()) > 0:
            return top
        each = {size: self._pace[size] / size for size in self.after if size % multiple == 0 or top < multiple}
        cheap = [size for size in sorted(each) if each[size] <= AS_CHEAP * min(each.values())]
        return next((size for size in cheap if self._pace[size] >= SHORT_STEP), cheap[-1])

    def same(self, size: int, top: int) -> bool:
        """Whether a step over so many rows gave them the same floats as one over more."""
        return self._equal(self.after[size], self.after[top], size)

    def alike(self, more: int) -> frozenset[int]:
        """Sizes below it in which rows come out as in batches of `more`: to the end of a short chain, or as far as that
        can be followed; of requests without a condition too, which a model may treat otherwise."""
        slow = self._pace[more] >= SLOW
        for size in range(1, more):
            if size not in self.after:
                self._step(size)
        sizes = [size for size in range(1, more) if self.same(size, more)]
        for plain in ([] if slow else [False]) + ([True] if self._program.has_plain else []):
            chains = {size: self._program.warm(size, plain, short=True) for size in (*sizes, more)}
            each = sum(self._pace[size] for size in chains)
            for _ in range(1 if slow else max(2, int(FOLLOWED / (each + 1e-6)))):
                if int(chains[more].left.min()) <= 0:
                    break
                chains = {size: self._program.step(rows) for size, rows in chains.items()}
            sizes = [size for size in sizes if self._equal(chains[size], chains[more], size)]
        return frozenset(sizes)

    def _step(self, rows: int) -> None:
        for _ in range(self._times):
            fresh = self._program.warm(rows)
            began, spent = self._clock(), self._spent()
            after = self._program.step(fresh)
            self._program.result(after)  # on the host: so the device is done
            self._pace[rows], self.seconds[rows] = self._spent() - spent, self._clock() - began
        self.after[rows] = after

    def _equal(self, few: Rows, many: Rows, size: int) -> bool:
        cut = _rows.take(many, range(size))
        if not _rows.equal(few, cut):
            return False
        seen, expected = self._program.floats(few), self._program.floats(many)[:size]
        return bool(((seen == expected) | (seen.isnan() & expected.isnan())).all())


def _advanced(program: Program, rows: Rows, steps: int) -> Rows:
    for _ in range(steps):
        if int(rows.left.min()) > 0:
            rows = program.step(rows)
    return rows


def _shown(program: Program, rows: int) -> Any:
    """8-bit images after a few steps."""
    drawn = program.result(_advanced(program, program.warm(rows), LOOKED_AT))
    return np.stack([np.zeros(0, np.uint8) if image is None else image for image in drawn])
