"""Who steps next: the pure core of the engine. Plain data in, plain data out; no tensors, no clock of its own.

A job is a number of rows (chains) that run in one *lane*: a model and what is done with it. Rows of all jobs of a
lane step together, whatever tick they stand at; they join and leave between steps. `plan(now)` says which lane steps
next and which rows join or leave it first; `report` takes what happened.

Between lanes: deficit round robin (Shreedhar & Varghese 1995) in seconds of device time, by the measured cost of each
lane's step, so that a cheap lane is not kept waiting by a dear one for longer than one step, and time is shared
evenly while both have work. Inside a lane a row joins whenever there is room, and which one is asked in this order:

    interactive before batch     but a batch job that has waited for AGEING seconds counts as interactive
    tenants in turn              by the work that each has been given (start-time fair queueing, Goyal, Vin and Cheng
                                 1996), so that a flood of one tenant's jobs delays only that tenant's
    first come, first served     among the jobs of one tenant; a job whose rows do not all fit begins with those that do

While several tenants have asked a lane of late, its batch is kept so small that a step takes no longer than
`SHARED_COST` times one of the smallest batch, and no tenant may fill it alone: so one who asks for little finds a place
at once, and steps that are about as fast as if nobody else were there. Where a step costs the same whatever its rows,
as on a GPU that is not full, that takes an eighth of the batch from a flood; where it costs by the row, it costs
little.

What a step costs here grows with the rows that join or leave in it and the logarithm of the number of tenants; not with
the number of jobs that wait.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush, heapreplace, nlargest
from typing import Literal, NamedTuple, TypeAlias

from service.cost import Cost

AGEING = 10.0  # seconds after which a batch job is let in as if it were an interactive one that has just come

SHARED = 60.0  # seconds for which a tenant counts as asking
SHARED_COST = 1.5  # see above
KEPT_FREE = 8  # one of so many places is kept free of the tenant who has the others
TENANTS = 1000  # besides those who wait, whose turns a lane remembers: those who were given the most

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
    tenant: str = ""  # who asks
    work: int = 1  # of a row, in step-units: what the tenant is charged for it
    ticks: int = 1  # steps that a row takes; about as many where its solver chooses them


@dataclass(frozen=True)
class Plan:
    """What to do next: rows leave, rows join, then the lane takes a step."""

    lane: str | None  # None: no lane has rows to step
    join: tuple[Row, ...] = ()  # rows that begin in `lane`
    leave: tuple[tuple[str, Reason], ...] = ()  # jobs, of any lane, whose rows are to be dropped


@dataclass(frozen=True)
class Load:
    """What a lane has done since it was there, and does now."""

    steps: int = 0
    rows: int = 0  # over all steps
    seconds: float = 0.0
    running: int = 0  # rows
    waiting: int = 0
    max_rows: int = 1  # that may step together
    row_seconds: float = 0.0  # a step over n rows takes row_seconds · n + step_seconds
    step_seconds: float = 0.0
    fastest: float = 0.0  # seconds of the fastest step so far
    left: int = 0  # steps still to take, summed over the rows that run and wait
    first_in: int = 0  # steps until there is room for a row: if nobody waited,
    urgent_in: int = 0  # behind the interactive ones that wait,
    patient_in: int = 0  # and behind all that wait
    tenants: tuple[str, ...] = ()  # whose rows wait


@dataclass(eq=False)
class _Waiting:
    """A job of which rows wait to join."""

    ticket: Ticket
    begun: int = 0  # rows that have joined
    gone: bool = False  # the job was dropped

    @property
    def over(self) -> bool:
        """No row of it waits any longer."""
        return self.gone or self.begun == self.ticket.rows


class _Turns:
    """Jobs that wait, by tenant; the first job of the tenant that has been given least comes next."""

    def __init__(self, given: dict[str, float]) -> None:
        self._given = given  # tenant -> work given, on the lane's virtual clock
        self._queues: dict[str, deque[_Waiting]] = {}
        self._order: list[tuple[float, str]] = []  # a heap of (given, tenant); what is told there may be too little

    def add(self, waiting: _Waiting) -> None:
        tenant = waiting.ticket.tenant
        if tenant not in self._queues:
            self._queues[tenant] = deque()
            heappush(self._order, (self._given[tenant], tenant))
        self._queues[tenant].append(waiting)

    def first(self, full: Set[str]) -> _Waiting | None:
        """The job whose row joins next, of tenants who are not `full`; jobs that are gone, or have begun whole, are let
        go on the way.
        """
        passed_over: list[tuple[float, str]] = []
        try:
            return self._first(full, passed_over)
        finally:
            for entry in passed_over:
                heappush(self._order, entry)

    def _first(self, full: Set[str], passed_over: list[tuple[float, str]]) -> _Waiting | None:
        while self._order:
            told, tenant = self._order[0]
            jobs = self._queues[tenant]
            if tenant not in self:
                heappop(self._order)
                del self._queues[tenant]
            elif told < self._given[tenant]:
                heapreplace(self._order, (self._given[tenant], tenant))
            elif tenant in full:
                passed_over.append(heappop(self._order))
            else:
                return jobs[0]
        return None

    def __contains__(self, tenant: str) -> bool:
        """Whether rows of the tenant wait, and not only what is to be let go."""
        jobs = self._queues.get(tenant)
        while jobs and jobs[0].over:
            jobs.popleft()
        return bool(jobs)

    @property
    def known(self) -> Set[str]:
        """Tenants whose rows wait, or have waited of late."""
        return self._queues.keys()


class _Line:
    """A lane's waiting jobs, in the order in which their rows are to join."""

    def __init__(self) -> None:
        self._given: dict[str, float] = {}
        self._clock = 0.0  # virtual: the work that a tenant would have been given who never wanted for jobs
        self._urgent, self._patient = _Turns(self._given), _Turns(self._given)
        self._ageing: list[tuple[float, int, _Waiting]] = []  # a heap: batch jobs, by when they become urgent
        self._count = 0  # of jobs so far
        self._remembered = 2 * TENANTS  # so many tenants, until those are forgotten for whom it matters least

    def add(self, waiting: _Waiting, now: float) -> None:
        """now: when it came, to whom it may have waited for elsewhere."""
        tenant = waiting.ticket.tenant
        if tenant not in self._urgent and tenant not in self._patient:
            self._catch_up(tenant)
        self._count += 1
        if waiting.ticket.priority == "batch":
            self._patient.add(waiting)
            heappush(self._ageing, (now + AGEING, self._count, waiting))
        else:
            self._urgent.add(waiting)

    def rows(self, now: float, full: Set[str]) -> Iterator[Row]:
        """Rows, one after the other, as they join; none of tenants who are `full` when it comes to them."""
        self._age(now)
        while (waiting := self._urgent.first(full) or self._patient.first(full)) is not None:
            ticket = waiting.ticket
            self._clock = max(self._clock, self._given[ticket.tenant])
            self._given[ticket.tenant] += ticket.work
            waiting.begun += 1
            yield Row(ticket.job, waiting.begun - 1)

    def _age(self, now: float) -> None:
        while self._ageing and self._ageing[0][0] <= now:
            waiting = heappop(self._ageing)[-1]
            if not waiting.over:
                if waiting.ticket.tenant not in self._urgent:  # among those it comes only now
                    self._catch_up(waiting.ticket.tenant)
                self._urgent.add(waiting)

    def _catch_up(self, tenant: str) -> None:
        """What was not asked for is not saved up."""
        self._given[tenant] = max(self._clock, self._given.get(tenant, 0.0))
        if len(self._given) > self._remembered:
            there = self._urgent.known | self._patient.known | {tenant}
            gone = [name for name, given in self._given.items() if given > self._clock and name not in there]
            kept = nlargest(TENANTS, gone, key=self._given.__getitem__)
            forgotten = self._given.keys() - there - set(kept)
            for name in forgotten:
                del self._given[name]
            self._remembered = 2 * max(TENANTS, len(self._given))

    def __bool__(self) -> bool:
        """Whether anyone has ever waited here."""
        return bool(self._given)


@dataclass
class _Lane:
    max_rows: int  # that may step together
    cost: Cost = field(default_factory=Cost)
    line: _Line = field(default_factory=_Line)
    pending: int = 0  # rows in the line
    running: dict[Row, int] = field(default_factory=dict)  # ordered; after which step of the lane each is done
    deficit: float = 0.0  # seconds that the lane may still use in this round
    predicted: float = 0.0  # seconds of its next step
    steps: int = 0  # so far
    rows: int = 0
    seconds: float = 0.0
    fastest: float = 0.0
    # Rows -> seconds of a step, at warm-up: what is measured later depends on what sizes there were, and these on it.
    measured: dict[int, float] = field(default_factory=dict)
    asked: dict[str, float] = field(default_factory=dict)  # the last two tenants that asked, and when
    places: int = 0  # that may be taken as of the last step: fewer than max_rows while tenants share it

    @property
    def busy(self) -> bool:
        return bool(self.pending or self.running)

    def predict(self) -> None:
        places = max(self.places or self.max_rows, len(self.running))
        self.predicted = self.cost.predict(min(len(self.running) + self.pending, places))

    def share(self, now: float) -> bool:
        """How many places there are now; True while several tenants share them."""
        shared = sum(now - at < SHARED for at in self.asked.values()) > 1
        self.places = self.max_rows
        if shared and len(self.measured) > 1:
            few, many = min(self.measured), max(self.measured)
            cheapest, dearest = self.measured[few], self.measured[many]
            if dearest > SHARED_COST * cheapest:
                more = (SHARED_COST - 1) * cheapest * (many - few) / (dearest - cheapest)
                self.places = min(self.max_rows, max(2, few + int(more / few) * few))
        return shared


class Scheduler:
    """Decides; keeps account of rows. `max_rows` of a lane may step together, where it has no number of its own."""

    def __init__(self, max_rows: int = 64) -> None:
        if max_rows < 1:
            raise ValueError(f"max_rows: {max_rows}; a lane needs at least one")
        self._max_rows = max_rows
        self._lanes: dict[str, _Lane] = {}
        self._tickets: dict[str, Ticket] = {}
        self._expiries: list[tuple[float, str]] = []  # a heap; may name jobs that have ended
        self._waiting: dict[str, _Waiting] = {}  # job -> its rows that wait, while there are any
        self._unfinished: dict[str, int] = {}  # job -> rows that have not finished
        self._round: deque[str] = deque()  # busy lanes, the one whose turn it is first
        self._cancelled: list[str] = []

    # --------------------------------------------------------------------------------------------------- what comes in

    def submit(self, ticket: Ticket, now: float) -> None:
        """A new job. Raises `ValueError` for a job that is there already or that has no rows."""
        if ticket.job in self._tickets:
            raise ValueError(f"job: {ticket.job} is there already")
        if ticket.rows < 1:
            raise ValueError(f"rows: {ticket.rows}; a job has at least one")
        lane = self._lane(ticket.lane)
        self._tickets[ticket.job] = ticket
        others = [(tenant, at) for tenant, at in lane.asked.items() if tenant != ticket.tenant]
        lane.asked = {**dict(others[-1:]), ticket.tenant: now}
        self._unfinished[ticket.job] = ticket.rows
        waiting = self._waiting[ticket.job] = _Waiting(ticket)
        lane.line.add(waiting, now)
        lane.pending += ticket.rows
        lane.predict()
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
        """A new lane: how many of its rows may step together, and a step over so many rows that was measured at
        warm-up; told once for each such measurement. With the smallest batch and the largest, the lane can be shared
        (see above).
        """
        made = self._lane(lane)
        made.max_rows, made.measured[rows] = max_rows, seconds
        made.cost.observe(rows, seconds)
        made.fastest = min(seconds, made.fastest or seconds)

    def forget(self, lane: str) -> None:
        """Drop what is known of an idle lane, when its model goes. Raises `ValueError` for one with jobs."""
        if lane in self._round:
            raise ValueError(f"lane: {lane} has jobs")
        self._lanes.pop(lane, None)

    # -------------------------------------------------------------------------------------------------- what comes out

    def plan(self, now: float) -> Plan:
        """The next step. Rows in `join` count as running and jobs in `leave` as gone once this returns."""
        leave = tuple(self._leavers(now))
        lane_name = self._next_lane()
        if lane_name is None:
            return Plan(None, leave=leave)
        return Plan(lane_name, tuple(self._joiners(self._lanes[lane_name], now)), leave)

    def report(
        self, lane_name: str, rows: int, seconds: float, finished: Iterable[Row], *, together: bool = True
    ) -> None:
        """A step of the lane over so many rows took so many seconds, and these rows are finished. together: in one
        batch; what else they took says nothing of what a step costs.
        """
        lane = self._lanes[lane_name]
        plausible = lane.cost.plausible(rows, seconds)
        lane.deficit -= plausible
        if together and rows:
            lane.cost.observe(rows, plausible)
            lane.fastest = min(seconds, lane.fastest or seconds)
        lane.steps, lane.rows, lane.seconds = lane.steps + 1, lane.rows + rows, lane.seconds + seconds
        for row in finished:
            del lane.running[row]
            self._unfinished[row.job] -= 1
            if self._unfinished[row.job] == 0:
                del self._unfinished[row.job], self._tickets[row.job]
        self._settle(lane_name)

    def charge(self, lane_name: str, seconds: float) -> None:
        """A lane has used the device for something else than a step, as for previews."""
        lane = self._lanes[lane_name]
        lane.deficit -= lane.cost.plausible(len(lane.running), seconds)
        lane.seconds += seconds

    def drop(self, job: str) -> None:
        """Drop a job now: it failed. One that is not there is no error."""
        ticket = self._tickets.pop(job, None)
        if ticket is None:
            return
        del self._unfinished[job]
        lane = self._lanes[ticket.lane]
        begun = ticket.rows
        if (waiting := self._waiting.pop(job, None)) is not None:
            waiting.gone, begun = True, waiting.begun
            lane.pending -= ticket.rows - begun
        for item in range(begun):
            lane.running.pop(Row(job, item), None)
        self._settle(ticket.lane)

    # ------------------------------------------------------------------------------------------------------- questions

    @property
    def jobs(self) -> int:
        return len(self._tickets)

    def lane_jobs(self, lane: str) -> int:
        """Jobs of a lane that have not ended."""
        return sum(t.lane == lane for t in self._tickets.values())

    def load(self, name: str) -> Load:
        lane = self._lane(name)
        ends = [max(1, end - lane.steps) for end in lane.running.values()]
        waiting = [w for w in (self._waiting.values() if lane.pending else ()) if w.ticket.lane == name]
        urgent = [_steps(w) for w in waiting if w.ticket.priority == "interactive"]
        patient = [_steps(w) for w in waiting if w.ticket.priority == "batch"]
        first_in, urgent_in, patient_in = _rooms(ends, urgent, patient, lane.max_rows)
        return Load(
            *(lane.steps, lane.rows, lane.seconds, len(lane.running), lane.pending, lane.max_rows),
            *lane.cost.coefficients,
            fastest=lane.fastest,
            left=sum(ends) + sum(rows * ticks for rows, ticks in urgent + patient),
            first_in=first_in,
            urgent_in=urgent_in,
            patient_in=patient_in,
            tenants=tuple(sorted({w.ticket.tenant for w in waiting})),
        )

    def running(self, lane: str) -> tuple[Row, ...]:
        return tuple(self._lane(lane).running)

    def cost(self, lane: str) -> Cost:
        return self._lane(lane).cost

    # ------------------------------------------------------------------------------------------------------ the inside

    def _lane(self, name: str) -> _Lane:
        return self._lanes.setdefault(name, _Lane(self._max_rows))

    def _settle(self, name: str) -> None:
        """Look ahead to the lane's next step. One without work leaves the round; its unused time is not saved up."""
        lane = self._lanes[name]
        lane.predict()
        if lane.line and not lane.pending:
            lane.line = _Line()  # nobody waits, so nobody is owed anything
        if name in self._round and not lane.busy:
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
        lane's step, so that every turn pays for one step at least."""
        if not self._round:
            return None
        quantum = max(1e-9, *(self._lanes[name].predicted for name in self._round))
        while True:
            for _ in range(len(self._round)):
                if (front := self._lanes[self._round[0]]).deficit >= front.predicted:
                    return self._round[0]
                # Its turn is over (or has not begun): to the back of the round, and the next one's turn begins.
                self._round.rotate(-1)
                self._lanes[self._round[0]].deficit += quantum
            lanes = [self._lanes[name] for name in self._round]
            rounds = min(math.ceil((lane.predicted - lane.deficit) / quantum) for lane in lanes) - 1
            for lane in lanes if rounds > 0 else ():  # at once, as many in which nobody's turn would pay for a step
                lane.deficit += rounds * quantum

    def _joiners(self, lane: _Lane, now: float) -> Iterable[Row]:
        if not lane.pending:
            return
        shared, full = lane.share(now), set[str]()
        if len(lane.running) >= lane.places:
            return
        at_most = lane.places - max(1, lane.places // KEPT_FREE) if shared else lane.places
        held = Counter(self._tickets[row.job].tenant for row in lane.running)
        full |= {tenant for tenant, rows in held.items() if rows >= at_most and shared}
        for row in lane.line.rows(now, full):
            ticket = self._tickets[row.job]
            lane.pending -= 1
            lane.running[row] = lane.steps + ticket.ticks
            if row.item + 1 == ticket.rows:
                del self._waiting[row.job]
            held[ticket.tenant] += 1
            if shared and held[ticket.tenant] >= at_most:
                full.add(ticket.tenant)
            yield row
            if len(lane.running) >= lane.places:
                return


def _steps(waiting: _Waiting) -> tuple[int, int]:
    """How many of its rows wait, and the steps that each will take."""
    return waiting.ticket.rows - waiting.begun, max(1, waiting.ticket.ticks)


def _rooms(
    ends: list[int], urgent: Iterable[tuple[int, int]], patient: Iterable[tuple[int, int]], places: int
) -> tuple[int, int, int]:
    """Steps until there is room for another row, behind the rows that run (and end after `ends` steps), behind
    those and the urgent ones, and behind all: each takes the first place that is free."""
    free = ends + [0] * (places - len(ends))
    heapify(free)
    found = [free[0]]
    for line in (urgent, patient):
        for rows, ticks in line:
            for _ in range(rows):
                heapreplace(free, free[0] + ticks)
        found.append(free[0])
    return found[0], found[1], found[2]
