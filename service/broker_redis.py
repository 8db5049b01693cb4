"""The broker of many machines: API processes and workers share one Redis (6.2 or later).

    {drawwell}:q:<priority>:<model>   a sorted set: queued jobs in the order in which tenants take turns (decision 9)
    {drawwell}:q:…:given, clock       for that: what each tenant was given, and how far the turns have come
    {drawwell}:bell:<model>           a list: a token for each job that came, for which workers without work wait
    {drawwell}:running:<model>        a stream: jobs that workers of the consumer group "workers" claim
    {drawwell}:job:<id>               a hash: the job, its state, who has it, how often it was tried
    {drawwell}:events:<id>            a stream: what was told of it; entry n-0 is event number n
    {drawwell}:blob:<uuid>            a payload too large to stand in the way of others
    {drawwell}:active, queued         what has not ended: by the time at which it is over, and the sum of its work
    {drawwell}:waiting                what no worker has yet: of each line its jobs and steps
    {drawwell}:unclaimed              a set: the ids of those jobs; autoscalers read its size
    {drawwell}:key:<key>              idempotency: which job stands for it
    {drawwell}:worker:<name>          what a worker announced; it expires. Also the channel of its cancellations
    {drawwell}:workers                a set: the names of those
    {drawwell}:dead                   a stream: jobs that took too many workers down, with their history

Whatever reads and writes more than one of these is a Lua script (`service/lua`), so that no crash leaves half of it.
Times are those of the Redis server. Delivery is at least once, and an answer comes exactly once: an attempt has a
number, and what is told under another number, or of a job that has ended, is dropped.

This is the API's side; the workers' is in `claims_redis`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgpack

from service._redis import PREFIX, Store, reached, steadily
from service._wires import ANSWER_SECONDS, AWAY
from service.broker import (
    CANCELLED,
    UNSERVED,
    Broker,
    BrokerAway,
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
    state_in,
)
from service.forecast import retry_after

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # between looks without being told, in case a message on a channel was lost
GONE_SECONDS = 60.0  # that a worker is silent before what Redis keeps of it is forgotten
BOX = 2**16  # bytes of events that wait in this process for a slow reader; it then asks for them again
FRESH = 256  # jobs submitted here that nobody has asked for yet, whose news are kept so
LONGEST = 24 * 3600.0  # seconds that a job without a timeout of its own may take

_Told = tuple[int, bytes, bool]  # an event: its number, what `Store.store` made of its payload, whether it is the last


class _Box:
    """Where news of a job come in for one who waits for them. What is missing or out of turn is to be asked for."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self._told: list[_Told] = []

    def put(self, told: list[_Told]) -> None:
        together = self._told + told
        self._told = together if sum(len(stored) for _, stored, _ in together) <= BOX else []
        self.news.set()

    def take(self, after: int) -> list[_Told]:
        """All events after that number, where it is known that none is missing before them."""
        self.news.clear()
        told, self._told = [event for event in self._told if event[0] > after], []
        return told if [number for number, _, _ in told] == [*range(after + 1, after + 1 + len(told))] else []


class RedisBroker(Broker):
    """The API's side; see `Broker`. `run` must be running.

    queue_units bounds the step-units of all jobs that have not ended, over all replicas. keep: seconds that an ended
    job's events can still be read. grace: seconds without a ready worker for which jobs are queued all the same.
    """

    def __init__(self, url: str, queue_units: int, keep: float = 600.0, grace: float = 30.0) -> None:
        self._store = Store(url)
        self._limit, self._keep, self._grace = queue_units, keep, grace
        self._home = f"{PREFIX}api:{uuid.uuid4().hex}"
        self._news: dict[str, list[_Box]] = {}  # job -> who waits for news of it
        self._fresh: dict[str, _Box] = {}  # job that was submitted here, and of which nobody has asked for news yet
        self._foreign: dict[str, int] = {}  # job that came by another replica -> how many follow it here
        self._channels = self._store.channels(self._home)
        self._pool: list[WorkerState] = []
        self._waiting: dict[Line, Waiting] = {}  # as of the last look, like the pool
        self._ready_at: float | None = None  # when a worker was last seen ready, on this process's clock
        self._looked = asyncio.Event()  # at the pool, once

    async def run(self) -> None:
        """Hear news, watch the workers, and put an end to jobs that nobody ends; until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._hear())
            group.create_task(steadily(self._look, POLL_SECONDS / 2))
            group.create_task(steadily(self._tidy, 5.0))

    async def close(self) -> None:
        await self._store.close()

    # ---------------------------------------------------------------------------------------------------------- jobs

    async def submit(self, job: Job) -> str:
        lifetime = (job.timeout or LONGEST) + self._keep
        if not await self._anyone(job.model) and not await self._known(job.key):
            raise NoWorker(f"no worker is ready for {job.model}")
        stored = await reached(self._store.store(job.payload, lifetime))
        while len(self._fresh) >= FRESH:
            del self._fresh[next(iter(self._fresh))]
        self._fresh[job.id] = _Box()  # before its first news
        answer = await reached(
            self._store.run(
                "submit",
                *(job.id, job.model, job.priority, job.tenant),
                *(_job_out(job, stored), job.units, self._limit),
                *(int(1000 * (job.timeout or LONGEST)), int(1000 * self._keep), self._home),
                *(job.key or "", job.digest, json.dumps(job.line), job.rows * job.steps),
            )
        )
        kind = answer[0]
        if kind != b"queued":
            self._fresh.pop(job.id, None)
            await self._store.discard(stored)
        if kind == b"known":
            return str(answer[1], "ascii")
        if kind == b"taken":
            raise KeyTaken(job.key or "")
        if kind == b"full":
            queued = answer[1]
            wait = retry_after(queued + job.units - self._limit, queued, self._pool, self._waiting)
            raise QueueFull(wait, queued, self._limit)
        return job.id

    async def cancel(self, job_id: str) -> None:
        await reached(self._store.run("cancel", job_id, CANCELLED))

    async def events(self, job_id: str, after: int = 0, wait: bool = True) -> AsyncIterator[Event]:
        fresh = self._fresh.pop(job_id, None)
        box = fresh or _Box()
        state, lost, home = b"queued", None, self._home.encode()
        known, followed = fresh is not None, False
        unasked = known and wait and not after  # just submitted here: its news will come
        self._news.setdefault(job_id, []).append(box)
        try:
            while True:
                try:
                    told = box.take(after) if known else []
                    if not told and not unasked:
                        (state, lost, home), told = await self._told(job_id, after)
                    unasked = False
                    payloads = [await self._store.fetch(stored) for _, stored, _ in told]
                except AWAY:
                    if not known:
                        raise
                    await asyncio.sleep(random.uniform(0.1, 0.3))  # it was queued: Redis may come back with it
                    continue
                if state is None:
                    if known:
                        raise JobLost("the queue has lost its memory")
                    raise KeyError(job_id)
                if not known and home.decode() != self._home and wait:
                    known = followed = await self._follow(job_id)
                    continue  # what was told before this process heard of it
                known = True
                for (after, _, final), payload in zip(told, payloads, strict=True):
                    yield Event(payload, final, after)
                    if final:
                        return
                if state == b"ended":
                    raise JobLost("it ended without an answer" if lost is None else lost.decode())
                if not wait:
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await box.news.wait()
        except AWAY as e:
            raise BrokerAway(f"Redis cannot be reached: {type(e).__name__}") from e
        finally:
            waiting = self._news[job_id]
            waiting.remove(box)
            if not waiting:
                del self._news[job_id]
            if followed:
                await self._unfollow(job_id)

    async def _told(self, job_id: str, after: int) -> tuple[list[Any], list[_Told]]:
        """Its state, why it was lost, whose it is; then its events: so none is missed that came before the end."""
        async with self._store.commands.pipeline(transaction=False) as both:
            both.hmget(_key(job_id), "state", "lost", "home")
            both.xrange(f"{PREFIX}events:{job_id}", f"({after}-0")
            state, entries = await both.execute()
        return state, [(int(entry.split(b"-")[0]), fields[b"p"], fields[b"f"] == b"1") for entry, fields in entries]

    async def status(self, job_id: str) -> Status:
        found = await reached(self._store.commands.hmget(_key(job_id), "job", "state", "lost", "attempt"))
        packed, state, lost, attempt = found
        if packed is None:
            raise KeyError(job_id)
        described = msgpack.unpackb(packed)
        payload = await reached(self._store.fetch(described["payload"]))
        job = job_in(described, payload, attempt=max(1, int(attempt)))
        return Status(job, state.decode(), None if lost is None else lost.decode())

    async def position(self, job_id: str) -> int:
        """Among the jobs for the same model; tenants that come meanwhile may take turns with this one's."""
        state, queue, place, model, priority = await reached(
            self._store.commands.hmget(_key(job_id), "state", "queue", "place", "model", "priority")
        )
        if state is None:
            raise KeyError(job_id)
        ahead: int | None = await reached(self._store.commands.zrank(queue, place))
        if ahead is None:
            return 0
        if priority == b"batch":
            ahead += await reached(self._store.commands.zcard(_queue("interactive", model.decode())))
        return ahead

    async def queued_units(self) -> int:
        return int(await reached(self._store.commands.get(f"{PREFIX}queued")) or 0)

    async def waiting(self) -> Mapping[Line, Waiting]:
        """As it was half a second ago at most: asking costs no way to Redis."""
        return self._waiting

    async def pool(self) -> Sequence[WorkerState]:
        if not self._looked.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._looked.wait(), ANSWER_SECONDS)
        return list(self._pool)

    # ------------------------------------------------------------------------------------------------------ the inside

    async def _anyone(self, model: str) -> bool:
        if any(worker.takes(model) for worker in await self.pool()):
            return True
        return self._ready_at is not None and time.monotonic() - self._ready_at <= self._grace

    async def _known(self, key: str | None) -> bool:
        return key is not None and bool(await reached(self._store.commands.exists(f"{PREFIX}key:{key}")))

    async def _look(self) -> None:
        """At the workers, and at queued jobs that none of them will ever take."""
        try:
            states = await _announced(self._store)
        except AWAY:
            self._pool = []
            raise
        self._pool, self._waiting = states, _lines_in(await self._store.commands.hgetall(f"{PREFIX}waiting"))
        self._looked.set()
        ready = [state for state in states if state.ready]
        if ready:
            self._ready_at = time.monotonic()
        if not ready or len(ready) < len(states):
            return
        served = {name for state in states for name, model in state.models.items() if model.status != "failed"}
        for priority, model in {(line.priority, line.model) for line in self._waiting if line.model not in served}:
            for place in await self._store.commands.zrange(_queue(priority, model), 0, 999):
                await self._store.run("cancel", place.split(b" ")[2], f"{UNSERVED} {model} any longer")

    async def _tidy(self) -> None:
        await self._store.run("reap", 1000, int(1000 * GONE_SECONDS))

    async def _hear(self) -> None:
        """News of jobs, by the channel of this process and those of jobs that others submitted."""
        async for news in self._channels.listen():
            if news is None:
                for box in [box for boxes in self._news.values() for box in boxes] + [*self._fresh.values()]:
                    box.news.set()  # there may be what was told while nobody heard
                continue
            job_id, first, payloads, final = msgpack.unpackb(news, raw=True)
            told = [(first + k, stored, False) for k, stored in enumerate(payloads)]
            if told and final:
                told[-1] = (*told[-1][:2], True)
            for box in self._boxes(job_id.decode()):
                box.put(told)

    def _boxes(self, job_id: str) -> list[_Box]:
        fresh = self._fresh.get(job_id)
        return self._news.get(job_id, []) + ([fresh] if fresh is not None else [])

    async def _follow(self, job_id: str) -> bool:
        self._foreign[job_id] = self._foreign.get(job_id, 0) + 1
        await self._channels.add(f"{PREFIX}news:{job_id}")
        return True

    async def _unfollow(self, job_id: str) -> None:
        self._foreign[job_id] -= 1
        if self._foreign[job_id] == 0:
            del self._foreign[job_id]
            await self._channels.drop(f"{PREFIX}news:{job_id}")


async def workers(url: str) -> list[WorkerState]:
    """Every worker that has announced itself of late. Raises `BrokerAway`."""
    store = Store(url)
    try:
        return await reached(_announced(store))
    finally:
        await store.close()


async def _announced(store: Store) -> list[WorkerState]:
    names = [name.decode() for name in await store.commands.smembers(f"{PREFIX}workers")]
    found = await store.commands.mget([f"{PREFIX}worker:{name}" for name in names]) if names else []
    states = [state_in(msgpack.unpackb(packed)) for packed in found if packed is not None]
    return sorted(states, key=lambda state: state.name)


def _key(job_id: str) -> str:
    return f"{PREFIX}job:{job_id}"


def _queue(priority: str, model: str) -> str:
    return f"{PREFIX}q:{priority}:{model}"


def _lines_in(told: Mapping[bytes, bytes]) -> dict[Line, Waiting]:
    """The books of what waits: "<line> jobs" and "<line> steps", each line as JSON."""
    found: dict[Line, Waiting] = {}
    for name, count in told.items():
        if name.endswith(b" jobs"):
            line = name.removesuffix(b" jobs")
            found[Line(*json.loads(line))] = Waiting(int(count), int(told.get(line + b" steps", 0)))
    return found


def _job_out(job: Job, stored: bytes) -> bytes:
    """stored: what `Store.store` made of its payload."""
    packed: bytes = msgpack.packb({**vars(job), "payload": stored})
    return packed


def job_in(described: Mapping[str, Any], payload: bytes, **counted: float) -> Job:
    """What `_job_out` packed, with its payload again, and with what was counted of it since."""
    return Job(**{**described, "payload": payload, **counted})
