"""Who steps next: the pure core of the engine. Plain data in, plain data out; no tensors, no clock of its own.

A job is a number of rows (chains) that run in one *lane*: a model and what is done with it. Rows of all jobs of a
lane step together, whatever tick they stand at; they join and leave between steps. `plan(now)` says which lane steps
next and which rows join or leave it first; `report` takes what happened.

Between lanes: deficit round robin (Shreedhar & Varghese 1995) in seconds of device time, by the measured cost of each
lane's step, so that a cheap lane is not kept waiting by a dear one for longer than one step, and time is shared
evenly while both have work. Inside a lane: interactive before batch, with ageing, so that nothing starves; within
that, first come first served, and a job whose rows do not all fit begins with those that do.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal, NamedTuple, TypeAlias

AGEING = 10.0  # seconds that an interactive job is let in ahead of a batch job of the same age
UNKNOWN_COST = 1e-3  # seconds a step is taken to cost before one was measured

Reason: TypeAlias = Literal["cancelled", "expired"]


class Row(NamedTuple):
    job: str
    item: int  # which of its images


@dataclass(frozen=True)
class Ticket:
    """A job as the scheduler sees it."""

    job: str
    lane: str
    rows: int
    priority: Literal["interactive", "batch"] = "interactive"
    expires: float | None = None  # the clock's time after which nobody waits for the answer


@dataclass(frozen=True)
class Plan:
    """What to do next: rows leave, rows join, then the lane takes a step."""

    lane: str | None  # None: no lane has rows to step
    join: tuple[Row, ...] = ()  # rows that begin in `lane`
    leave: tuple[tuple[str, Reason], ...] = ()  # jobs, of any lane, whose rows are to be dropped


class Cost:
    """seconds = a · rows + b of a step, fitted by least squares over the steps seen, older ones counting less and
    less.
    """

    def __init__(self, forget: float = 0.98) -> None:
        self._forget = forget
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        f = self._forget
        self._n, self._x, self._y = f * self._n + 1, f * self._x + rows, f * self._y + seconds
        self._xx, self._xy = f * self._xx + rows * rows, f * self._xy + rows * seconds

    @property
    def coefficients(self) -> tuple[float, float]:
        """(a, b), neither negative. Before anything was seen: (0, UNKNOWN_COST)."""
        if self._n == 0:
            return 0.0, UNKNOWN_COST
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x**2
        if variance > 1e-9 * mean_x**2:
            a = max(0.0, (self._xy / self._n - mean_x * mean_y) / variance)
            b = mean_y - a * mean_x
            if b >= 0:
                return a, b
        return mean_y / mean_x, 0.0  # one batch size seen, or a line that would start below zero: proportional

    def predict(self, rows: int) -> float:
        a, b = self.coefficients
        return a * rows + b


@dataclass
class _Lane:
    max_rows: int  # that may step together
    cost: Cost = field(default_factory=Cost)
    waiting: list[_Waiting] = field(default_factory=list)  # in the order they are let in
    pending: int = 0  # rows of the waiting that have not joined
    running: dict[Row, None] = field(default_factory=dict)  # ordered
    deficit: float = 0.0  # seconds that the lane may still use in this round

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)


@dataclass
class _Waiting:
    key: float  # order in the lane: arrival, later for batch jobs
    ticket: Ticket
    begun: int = 0  # rows that have joined


class Scheduler:
    """Decides; keeps account of rows. `max_rows` of a lane may step together, where it has no number of its own."""

    def __init__(self, max_rows: int = 64) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: {max_rows}; a lane needs at least one")
        self._max_rows = max_rows
        self._lanes: dict[str, _Lane] = {}
        self._tickets: dict[str, Ticket] = {}
        self._expiries: list[tuple[float, str]] = []  # a heap; may name jobs that have ended
        self._unfinished: dict[str, int] = {}  # job -> rows that have not finished
        self._round: deque[str] = deque()  # busy lanes, the one whose turn it is first
        self._cancelled: list[str] = []

    # ------------------------------------------------------------------------------------------------------ what
    # comes in

    def submit(self, ticket: Ticket, now: float) -> None:
        """A new job. Raises `ValueError` for a job that is there already or that has no rows."""
        if ticket.job in self._tickets:
            raise ValueError(f"job: {ticket.job} is there already")
        if ticket.rows < 1:
            raise ValueError(f"rows: {ticket.rows}; a job has at least one")
        lane = self._lane(ticket.lane)
        self._tickets[ticket.job] = ticket
        self._unfinished[ticket.job] = ticket.rows
        waiting = _Waiting(now + (AGEING if ticket.priority == "batch" else 0.0), ticket)
        insort(lane.waiting, waiting, key=lambda w: w.key)
        lane.pending += ticket.rows
        if ticket.expires is not None:
            heappush(self._expiries, (ticket.expires, ticket.job))
        if ticket.lane not in self._round:
            lane.deficit = 0.0
            self._round.append(ticket.lane)

    def cancel(self, job: str) -> None:
        """Drop a job at the next step. One that is not there is no error: it may have just ended."""
        if job in self._tickets:
            self._cancelled.append(job)

    def prepare(self, lane: str, max_rows: int, rows: int, seconds: float) -> None:
        """A new lane: how many of its rows may step together, and a step measured at warm-up."""
        self._lane(lane).max_rows = max_rows
        self._lane(lane).cost.observe(rows, seconds)

    def forget(self, lane: str) -> None:
        """Drop what is known of an idle lane, when its model goes. Raises `ValueError` for one with jobs."""
        if lane in self._round:
            raise ValueError(f"lane: {lane} has jobs")
        self._lanes.pop(lane, None)

    # ------------------------------------------------------------------------------------------------------ what
    # comes out

    def plan(self, now: float) -> Plan:
        """The next step. Rows in `join` count as running and jobs in `leave` as gone once this returns."""
        leave = tuple(self._leavers(now))
        lane_name = self._next_lane()
        if lane_name is None:
            return Plan(None, leave=leave)
        return Plan(lane_name, tuple(self._joiners(self._lanes[lane_name])), leave)

    def report(self, lane_name: str, rows: int, seconds: float, finished: Iterable[Row]) -> None:
        """A step of the lane over so many rows took so many seconds, and these rows are finished."""
        lane = self._lanes[lane_name]
        lane.cost.observe(rows, seconds)
        lane.deficit -= seconds
        for row in finished:
            del lane.running[row]
            self._unfinished[row.job] -= 1
            if self._unfinished[row.job] == 0:
                del self._unfinished[row.job], self._tickets[row.job]
        self._settle(lane_name)

    def drop(self, job: str) -> None:
        """Drop a job now: it failed. One that is not there is no error."""
        ticket = self._tickets.pop(job, None)
        if ticket is None:
            return
        del self._unfinished[job]
        lane = self._lanes[ticket.lane]
        for waiting in [w for w in lane.waiting if w.ticket.job == job]:
            lane.waiting.remove(waiting)
            lane.pending -= ticket.rows - waiting.begun
        lane.running = {row: None for row in lane.running if row.job != job}
        self._settle(ticket.lane)

    # ----------------------------------------------------------------------------------------------------------
    # questions

    @property
    def jobs(self) -> int:
        return len(self._tickets)

    def lane_jobs(self, lane: str) -> int:
        """Jobs of a lane that have not ended."""
        return sum(t.lane == lane for t in self._tickets.values())

    def running(self, lane: str) -> tuple[Row, ...]:
        return tuple(self._lane(lane).running)

    def cost(self, lane: str) -> Cost:
        return self._lane(lane).cost

    # ------------------------------------------------------------------------------------------------------------ the
    # inside

    def _lane(self, name: str) -> _Lane:
        return self._lanes.setdefault(name, _Lane(self._max_rows))

    def _settle(self, name: str) -> None:
        """A lane without work leaves the round; its unused time is not saved up."""
        if name in self._round and not self._lanes[name].busy:
            self._round.remove(name)

    def _leavers(self, now: float) -> Iterable[tuple[str, Reason]]:
        leaving: list[tuple[str, Reason]] = [(job, "cancelled") for job in self._cancelled]
        self._cancelled = []
        while self._expiries and self._expiries[0][0] <= now:
            leaving.append((heappop(self._expiries)[1], "expired"))
        for job, reason in leaving:
            if job in self._tickets:
                self.drop(job)
                yield job, reason

    def _next_lane(self) -> str | None:
        """Deficit round robin: the lane at the front steps while its deficit pays for it; a new turn adds the dearest
        lane's step, so
        that every turn pays for one step at least."""
        if not self._round:
            return None
        predicted = {name: self._predict(self._lanes[name]) for name in self._round}
        quantum = max(predicted.values())
        while self._lanes[self._round[0]].deficit < predicted[self._round[0]]:
            # Its turn is over (or has not begun): to the back of the round, and the next one's turn begins.
            self._round.rotate(-1)
            self._lanes[self._round[0]].deficit += quantum
        return self._round[0]

    def _predict(self, lane: _Lane) -> float:
        return lane.cost.predict(min(len(lane.running) + lane.pending, lane.max_rows))

    def _joiners(self, lane: _Lane) -> Iterable[Row]:
        while lane.waiting and len(lane.running) < lane.max_rows:
            first = lane.waiting[0]
            row = Row(first.ticket.job, first.begun)
            first.begun += 1
            lane.pending -= 1
            lane.running[row] = None
            if first.begun == first.ticket.rows:
                lane.waiting.pop(0)
            yield row
