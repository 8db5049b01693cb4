"""The broker of one machine: queues in the API process, one socket to each worker process. No Redis, no configuration.

Frames on a socket are a 4-byte big-endian length and a msgpack list:

    worker -> API   ["announce", state]   ["claim", [model, ...], [model to be loaded, ...], {model: [tenant of whom
    there is enough, ...]}] ["publish", job id, [[payload, final], ...]]
                    ["hand-back", [job id, ...]]
    API -> worker   ["job", job]          ["cancel", job id]

A claim stands until a job answers it or a newer claim replaces it. When a worker's socket closes, its jobs are queued
again, in their old places.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import math
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgpack

from service.broker import (
    CANCELLED,
    MAX_DEATHS,
    NOBODY,
    UNSERVED,
    Broker,
    Claims,
    Event,
    Job,
    JobLost,
    KeyTaken,
    Line,
    NoWorker,
    QueueFull,
    Status,
    Waiting,
    WorkerState,
    is_wanted,
    state_in,
)
from service.forecast import retry_after
from service.scheduler import AGEING
from service.turns import Place, Turns

log = logging.getLogger(__name__)

FRAME_LIMIT = 256 * 2**20  # bytes


@dataclass
class _Record:
    """A job and what was told of it."""

    job: Job
    submitted: float  # on the broker's clock
    place: Place  # in its queue
    worker: str | None = None  # who has it; None while it is queued
    began: bool = False  # whether that one has told anything of it
    events: list[Event] = field(default_factory=list)
    cancelled: bool = False  # while a worker had it, who was told
    ended: bool = False
    lost: str | None = None  # why it ended without an answer
    news: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass
class _Link:
    """A connected worker."""

    writer: asyncio.StreamWriter
    state: WorkerState | None = None
    wanted: frozenset[str] = frozenset()  # the standing claim: models in memory,
    absent: frozenset[str] = frozenset()  # and such as it would load
    enough: Mapping[str, Sequence[str]] = field(default_factory=dict)  # model -> tenants of whom it wants no more
    jobs: dict[str, None] = field(default_factory=dict)


class LocalBroker(Broker):
    """See `Broker`. `queue_units` bounds the step-units of all jobs that have not ended.

    keep: seconds that an ended job's events can still be read. grace: seconds without a ready worker for which jobs
    are queued all the same, since a worker that died is being restarted.
    """

    def __init__(
        self,
        queue_units: int,
        keep: float = 60.0,
        grace: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._limit, self._keep, self._grace, self._clock = queue_units, keep, grace, clock
        self._records: dict[str, _Record] = {}
        self._queues: dict[tuple[str, str], Turns] = {}  # priority, model -> jobs that wait
        self._links: dict[str, _Link] = {}
        self._keys: dict[str, str] = {}  # idempotency key -> job
        self._units = 0
        self._ready_at: float | None = None  # when a worker was last seen ready
        self._waiting: dict[Line, Waiting] = {}

    # -------------------------------------------------------------------------------------------------------------
    # API side

    async def submit(self, job: Job) -> str:
        if job.key is not None and (known := self._keys.get(job.key)) is not None:
            if self._records[known].job.digest != job.digest:
                raise KeyTaken(job.key)
            return known
        if not self._anyone(job.model):
            raise NoWorker(f"no worker is ready for {job.model}")
        if self._units and self._units + job.units > self._limit:
            over = self._units + job.units - self._limit
            wait = retry_after(over, self._units, await self.pool(), self._waiting)
            raise QueueFull(wait, self._units, self._limit)
        place = self._queue(job).add(job.id, job.tenant, job.units)
        self._records[job.id] = _Record(job, self._clock(), place)
        self._units += job.units
        if job.key is not None:
            self._keys[job.key] = job.id
        self._count(job, 1)
        self._dispatch()
        return job.id

    async def cancel(self, job_id: str) -> None:
        record = self._records.get(job_id)
        if record is None or record.ended:
            return
        if record.worker is None:
            self._queue(record.job).remove(record.place)
            self._count(record.job, -1)
            self._end(record, lost=CANCELLED)
        else:
            record.cancelled = True
            _send(self._links[record.worker].writer, "cancel", job_id)

    async def events(self, job_id: str, after: int = 0, wait: bool = True) -> AsyncIterator[Event]:
        record = self._records[job_id]
        told = after
        while True:
            while told < len(record.events):
                told += 1
                yield record.events[told - 1]
            if record.ended:
                if record.lost is not None:
                    raise JobLost(record.lost)
                return
            if not wait:
                return
            record.news.clear()
            await record.news.wait()

    async def status(self, job_id: str) -> Status:
        record = self._records[job_id]
        state: Literal["queued", "running", "ended"] = "ended" if record.ended else "running"
        return Status(record.job, "queued" if state == "running" and record.worker is None else state, record.lost)

    async def position(self, job_id: str) -> int:
        record = self._records[job_id]
        if record.worker is not None or record.ended:
            return 0
        ahead = self._queue(record.job).position(record.place)
        if record.job.priority == "batch":
            ahead += len(self._queues.get(("interactive", record.job.model), ()))
        return ahead

    async def queued_units(self) -> int:
        return self._units

    async def waiting(self) -> Mapping[Line, Waiting]:
        return dict(self._waiting)

    async def pool(self) -> Sequence[WorkerState]:
        return [link.state for link in self._links.values() if link.state is not None]

    # ----------------------------------------------------------------------------------------------------------
    # worker links

    async def attach(self, name: str, end: socket.socket) -> None:
        """Serve one worker over this end of a socket pair, until it closes."""
        reader, writer = await asyncio.open_connection(sock=end)
        link = self._links[name] = _Link(writer)
        try:
            async for kind, *rest in _frames(reader):
                self._heard(name, link, kind, rest)
        except ConnectionError as e:
            log.info("worker %s: %s", name, e)
        finally:
            self._see_whether_ready()  # until now, perhaps
            del self._links[name]
            writer.close()
            self._give_back(name, link)

    def _heard(self, name: str, link: _Link, kind: str, rest: list[Any]) -> None:
        if kind == "announce":
            link.state = state_in(rest[0])
            self._fail_unservable()
        elif kind == "claim":
            link.wanted, link.absent, link.enough = frozenset(rest[0]), frozenset(rest[1]), rest[2]
            self._dispatch()
        elif kind == "publish":
            job_id, events = rest
            record = self._records.get(job_id)
            if record is None or record.ended or record.worker != name:
                return  # cancelled meanwhile, or no longer its job
            record.began = True
            told = len(record.events)
            record.events += [Event(payload, final, told + k) for k, (payload, final) in enumerate(events, start=1)]
            if record.events[-1].final:
                del link.jobs[job_id]
                self._end(record)
            elif record.cancelled:  # it may have heard so before it had the job
                _send(link.writer, "cancel", job_id)
            record.news.set()
        elif kind == "hand-back":
            mine = {job_id: None for job_id in rest[0] if job_id in link.jobs}
            for job_id in mine:
                del link.jobs[job_id]
            self._queue_again(mine, attempts=0)

    def _dispatch(self) -> None:
        """Give queued jobs to the workers that wait for them, those of the queue whose first one came first before
        others; to workers that have the model in memory, the least loaded first.
        """
        for (_, model), queue in sorted(self._queues.items(), key=lambda of: self._came(*of)):
            takers = [
                (model in link.absent, len(link.jobs), name)
                for name, link in self._links.items()
                if (model in link.wanted or model in link.absent) and not link.writer.is_closing()
            ]
            for _, _, name in sorted(takers):
                if (place := queue.first(self._links[name].enough.get(model, ()))) is not None:
                    queue.take(place)
                    self._give(place.job, name)

    def _came(self, of: tuple[str, str], queue: Turns) -> float:
        """When the first job came; a batch job counts as if it had come later."""
        place = queue.first()
        if place is None:
            return math.inf
        return self._records[place.job].submitted + (AGEING if of[0] == "batch" else 0.0)

    def _give(self, job_id: str, name: str) -> None:
        link, record = self._links[name], self._records[job_id]
        self._count(record.job, -1)
        record.worker, record.began = name, False
        link.wanted = link.absent = frozenset()
        link.jobs[job_id] = None
        waited = self._clock() - record.submitted
        _send(link.writer, "job", {**vars(record.job), "queued_seconds": waited})

    def _give_back(self, name: str, link: _Link) -> None:
        """A worker is gone: its jobs go to others."""
        alone = len(link.jobs) == 1
        for job_id in list(link.jobs):
            record = self._records[job_id]
            job = record.job
            record.job = dataclasses.replace(
                job, deaths=job.deaths + record.began, deaths_alone=job.deaths_alone + (record.began and alone)
            )
            if record.job.deaths_alone >= MAX_DEATHS:
                self._end(record, lost=f"{MAX_DEATHS} workers stopped while they worked on it alone")
                del link.jobs[job_id]
        if link.jobs:
            log.warning("worker %s stopped; its %d jobs are queued again", name, len(link.jobs))
        self._queue_again(link.jobs, attempts=1)

    def _queue_again(self, jobs: Mapping[str, None], attempts: int) -> None:
        """Queue jobs of a worker in their old places; those that nobody wants any longer end."""
        for job_id in jobs:
            record = self._records[job_id]
            if record.cancelled:
                self._end(record, lost=CANCELLED)
                continue
            record.job, record.worker = dataclasses.replace(record.job, attempt=record.job.attempt + attempts), None
            record.place = self._queue(record.job).put_back(record.place)
            self._count(record.job, 1)
        self._dispatch()

    def _fail_unservable(self) -> None:
        """Queued jobs for a model that no worker serves any longer get an answer at once."""
        states = [link.state for link in self._links.values()]
        if not all(state is not None and state.ready for state in states):
            return
        served = {m for state in states if state for m, s in state.models.items() if s.status != "failed"}
        for (_, model), queue in self._queues.items():
            for place in list(queue) if model not in served else ():
                queue.remove(place)
                self._count(self._records[place.job].job, -1)
                self._end(self._records[place.job], lost=f"{UNSERVED} {model} any longer")

    def _end(self, record: _Record, lost: str | None = None) -> None:
        record.ended, record.lost = True, lost
        record.news.set()
        self._units -= record.job.units
        asyncio.get_running_loop().call_later(self._keep, self._forget, record.job)

    def _forget(self, job: Job) -> None:
        del self._records[job.id]
        if job.key is not None:
            del self._keys[job.key]

    def _anyone(self, model: str) -> bool:
        self._see_whether_ready()
        if any(link.state is not None and link.state.takes(model) for link in self._links.values()):
            return True
        return self._ready_at is not None and self._clock() - self._ready_at <= self._grace

    def _see_whether_ready(self) -> None:
        if any(link.state is not None and link.state.ready for link in self._links.values()):
            self._ready_at = self._clock()

    def _queue(self, job: Job) -> Turns:
        return self._queues.setdefault((job.priority, job.model), Turns())

    def _count(self, job: Job, jobs: int) -> None:
        """Into the books of what waits, or out of them."""
        there = self._waiting.pop(job.line, Waiting(0, 0))
        if there.jobs + jobs:
            self._waiting[job.line] = Waiting(there.jobs + jobs, there.steps + jobs * job.rows * job.steps)


class LocalClaims(Claims):
    """A worker's end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._cancelled: asyncio.Queue[str] = asyncio.Queue()
        # By the claim that stands: model -> tenants of whom there is enough.
        self._wanted: dict[str, Sequence[str]] = {}

    @classmethod
    async def connect(cls, fd: int) -> LocalClaims:
        """Over a socket that the parent process passed on."""
        return cls(*await asyncio.open_connection(sock=socket.socket(fileno=fd)))

    async def run(self) -> None:
        """Read until the API closes the socket."""
        with contextlib.suppress(ConnectionError):
            async for kind, what in _frames(self._reader):
                if kind == "job":
                    job = Job(**what)
                    if is_wanted(job, self._wanted) and self._jobs.empty():  # one claim takes one job
                        self._jobs.put_nowait(job)
                    else:  # by now: it was under way when its claim was dropped
                        _send(self._writer, "hand-back", [job.id])
                elif kind == "cancel":
                    self._cancelled.put_nowait(what)

    async def announce(self, state: WorkerState) -> None:
        _send(self._writer, "announce", dataclasses.asdict(state))
        await self._writer.drain()

    async def claim(
        self, models: Sequence[str], absent: Sequence[str] = (), enough: Mapping[str, Sequence[str]] = NOBODY
    ) -> Job:
        self._wanted = {model: enough.get(model, ()) for model in (*absent, *models)}
        described = {model: list(tenants) for model, tenants in enough.items()}
        _send(self._writer, "claim", list(models), list(absent), described)
        try:
            await self._writer.drain()
            return await self._jobs.get()
        except asyncio.CancelledError:
            self._want_nothing()
            while not self._jobs.empty():  # it came in this very moment
                _send(self._writer, "hand-back", [self._jobs.get_nowait().id])
            raise
        finally:
            self._wanted = {}

    async def cancellations(self) -> AsyncIterator[str]:
        while True:
            yield await self._cancelled.get()

    async def publish(self, job_id: str, events: Sequence[Event]) -> None:
        _send(self._writer, "publish", job_id, [[e.payload, e.final] for e in events])
        await self._writer.drain()

    async def hand_back(self, job_ids: Sequence[str]) -> None:
        self._want_nothing()  # or they might come back at once
        _send(self._writer, "hand-back", list(job_ids))
        await self._writer.drain()

    async def leave(self) -> None:
        self._want_nothing()
        await self._writer.drain()

    def _want_nothing(self) -> None:
        _send(self._writer, "claim", [], [], {})


def _send(writer: asyncio.StreamWriter, *frame: Any) -> None:
    if writer.is_closing():  # the other end is gone, of which who reads from it hears next
        return
    body = msgpack.packb(frame)
    writer.write(struct.pack(">I", len(body)) + body)


async def _frames(reader: asyncio.StreamReader) -> AsyncIterator[list[Any]]:
    """Frames until the other end closes; a frame cut short counts as closed."""
    while True:
        try:
            (length,) = struct.unpack(">I", await reader.readexactly(4))
            if length > FRAME_LIMIT:
                raise ConnectionError(f"a frame of {length} bytes; {FRAME_LIMIT} at most")
            body = await reader.readexactly(length)
        except asyncio.IncompleteReadError:
            return
        yield msgpack.unpackb(body)
