"""The broker of many machines: API processes and workers share one Redis (6.2 or later).

    {drawwell}:q:<priority>:<model>   streams of jobs, read by the consumer group "workers"
    {drawwell}:job:<id>               a hash: the job, its state, who has it, how often it was tried
    {drawwell}:events:<id>            a stream: what was told of it; entry n-0 is event number n
    {drawwell}:blob:<uuid>            a payload too large to stand in the way of others
    {drawwell}:active, units, queued  what has not ended: by its time, its work, and the sum of that
    {drawwell}:lines, waiting         what no worker has yet: where each job stands; of each line its jobs and steps
    {drawwell}:key:<key>              idempotency: which job stands for it
    {drawwell}:worker:<name>          what a worker announced; it expires. Also the channel of its cancellations
    {drawwell}:dead                   a stream: jobs that took too many workers down, with their history

Whatever reads and writes more than one of these is a Lua script (`service/lua`), so that no crash leaves half of it.
Times are those of the Redis server. Delivery is at least once, and an answer comes exactly once: an attempt has a
number, and what is told under another number, or of a job that has ended, is dropped.

A worker renews the claims on its jobs while it lives. One that has not done so for `claim_seconds` (it died, was
stopped, lost its network) loses them to others, and when it comes back it is told so.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgpack
from redis.exceptions import RedisError, ResponseError

from service._redis import (
    ANSWER_SECONDS,
    AWAY,
    BLOCK_SECONDS,
    PREFIX,
    Store,
    check_cancelled,
    reached,
    steadily,
    until_reached,
)
from service.broker import (
    CANCELLED,
    MAX_DEATHS,
    Broker,
    BrokerAway,
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
    state_in,
)
from service.forecast import retry_after

log = logging.getLogger(__name__)

GROUP = "workers"
POLL_SECONDS = 1.0  # between looks without being told, in case a message on a channel was lost
POSITIONS = 1000  # that a place in a queue is counted up to
LONGEST = 24 * 3600.0  # seconds that a job without a timeout of its own may take


class RedisBroker(Broker):
    """The API's side; see `Broker`. `run` must be running.

    queue_units bounds the step-units of all jobs that have not ended, over all replicas. keep: seconds that an ended
    job's events can still be read. grace: seconds without a ready worker for which jobs are queued all the same.
    """

    def __init__(self, url: str, queue_units: int, keep: float = 600.0, grace: float = 30.0) -> None:
        self._store = Store(url)
        self._limit, self._keep, self._grace = queue_units, keep, grace
        self._home = f"{PREFIX}api:{uuid.uuid4().hex}"
        self._news: dict[str, list[asyncio.Event]] = {}  # job -> who waits for news of it
        self._foreign: dict[str, int] = {}  # job that came by another replica -> how many follow it here
        self._channels: Any = None  # redis-py's PubSub, while connected
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
        described = dataclasses.replace(job, payload=await reached(self._store.store(job.payload, lifetime)))
        if job.key is None and not await self._anyone():
            raise NoWorker("no worker is ready")
        answer = await reached(
            self._store.run(
                "submit",
                *(job.id, _queue(job.priority, job.model), job.model, job.priority),
                *(_job_out(described), job.units, self._limit),
                *(int(1000 * (job.timeout or LONGEST)), int(1000 * self._keep), self._home),
                *(job.key or "", job.digest, json.dumps(job.line), job.rows * job.steps),
            )
        )
        kind = answer[0]
        if kind == b"known":
            return str(answer[1], "ascii")
        if kind == b"taken":
            raise KeyTaken(f"{job.key!r} was used for another request")
        if kind == b"full":
            queued = answer[1]
            wait = retry_after(queued + job.units - self._limit, queued, self._pool, self._waiting)
            raise QueueFull(wait, queued, self._limit)
        return job.id

    async def cancel(self, job_id: str) -> None:
        await reached(self._store.run("cancel", job_id, CANCELLED))

    async def events(self, job_id: str, after: int = 0, wait: bool = True) -> AsyncIterator[Event]:
        news = asyncio.Event()
        self._news.setdefault(job_id, []).append(news)
        followed = known = False
        try:
            while True:
                news.clear()
                try:
                    (state, lost, home), told = await self._told(job_id, after)
                    payloads = [await self._store.fetch(fields[b"p"]) for _, fields in told]
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
                for (number, fields), payload in zip(told, payloads, strict=True):
                    after = int(number.split(b"-")[0])
                    yield Event(payload, fields[b"f"] == b"1", after)
                    if fields[b"f"] == b"1":
                        return
                if state == b"ended":
                    raise JobLost("it ended without an answer" if lost is None else lost.decode())
                if not wait:
                    return
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), POLL_SECONDS)
        except AWAY as e:
            raise BrokerAway(f"Redis cannot be reached: {type(e).__name__}") from e
        finally:
            waiting = self._news[job_id]
            waiting.remove(news)
            if not waiting:
                del self._news[job_id]
            if followed:
                await self._unfollow(job_id)

    async def _told(self, job_id: str, after: int) -> Any:
        """Its state, why it was lost, whose it is; then its events: so none is missed that came before the end."""
        async with self._store.commands.pipeline(transaction=False) as both:
            both.hmget(_key(job_id), "state", "lost", "home")
            both.xrange(f"{PREFIX}events:{job_id}", f"({after}-0")
            return await both.execute()

    async def status(self, job_id: str) -> Status:
        found = await reached(self._store.commands.hmget(_key(job_id), "job", "state", "lost", "attempt"))
        packed, state, lost, attempt = found
        if packed is None:
            raise KeyError(job_id)
        job = dataclasses.replace(_job_in(packed), attempt=max(1, int(attempt)))
        job = dataclasses.replace(job, payload=await reached(self._store.fetch(job.payload)))
        return Status(job, state.decode(), None if lost is None else lost.decode())

    async def position(self, job_id: str) -> int:
        """Among the jobs for the same model."""
        state, model, priority, entry = await reached(
            self._store.commands.hmget(_key(job_id), "state", "model", "priority", "entry")
        )
        if state is None:
            raise KeyError(job_id)
        if state != b"queued":
            return 0
        ahead = await self._queued(_queue(priority.decode(), model.decode()), f"({entry.decode()}")
        if priority == b"batch":
            ahead += await self._queued(_queue("interactive", model.decode()), "+")
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

    async def _queued(self, queue: str, upto: str) -> int:
        """Entries of a queue, up to that one, that no worker was given; no more than POSITIONS are counted."""
        last = await reached(_last_delivered(self._store.commands, queue))
        return len(await reached(self._store.commands.xrange(queue, f"({last}", upto, POSITIONS)))

    async def _anyone(self) -> bool:
        await self.pool()
        return self._ready_at is not None and time.monotonic() - self._ready_at <= self._grace

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
        for queue in await self._store.commands.smembers(f"{PREFIX}queues"):
            model = queue.decode().removeprefix(f"{PREFIX}q:").partition(":")[2]
            if model not in served:
                for _, fields in await self._store.commands.xrange(queue, count=1000):
                    await self._store.run("cancel", fields[b"job"], f"no worker serves {model} any longer")

    async def _tidy(self) -> None:
        await self._store.run("reap", 1000)

    async def _hear(self) -> None:
        """News of jobs, by the channel of this process and those of jobs that others submitted."""
        while True:
            try:
                async with self._store.waiting.pubsub() as channels:
                    names = [self._home, *(f"{PREFIX}news:{job_id}" for job_id in self._foreign)]
                    await channels.subscribe(*names)
                    self._channels = channels
                    for waiting in list(self._news.values()):  # what was told while nobody heard
                        _wake(waiting)
                    while True:
                        check_cancelled()
                        message = await channels.get_message(ignore_subscribe_messages=True, timeout=POLL_SECONDS)
                        if message is not None:
                            _wake(self._news.get(message["data"].decode(), []))
            except (*AWAY, RedisError) as e:
                log.warning("Redis: %s; listening again soon", e)
                await asyncio.sleep(random.uniform(0.1, 0.3))
            finally:
                self._channels = None

    async def _follow(self, job_id: str) -> bool:
        self._foreign[job_id] = self._foreign.get(job_id, 0) + 1
        if self._channels is not None:
            with contextlib.suppress(*AWAY, RedisError):  # then it is subscribed to with the next connection
                await self._channels.subscribe(f"{PREFIX}news:{job_id}")
        return True

    async def _unfollow(self, job_id: str) -> None:
        self._foreign[job_id] -= 1
        if self._foreign[job_id] == 0:
            del self._foreign[job_id]
            if self._channels is not None:
                with contextlib.suppress(*AWAY, RedisError):
                    await self._channels.unsubscribe(f"{PREFIX}news:{job_id}")


class RedisClaims(Claims):
    """A worker's side; see `Claims`. Its name is its own for one life: a worker that is started again has another."""

    def __init__(self, url: str, name: str, claim_seconds: float = 15.0, keep: float = 600.0) -> None:
        self._store, self.name = Store(url), f"{name}-{uuid.uuid4().hex[:12]}"
        self._claim_seconds, self._keep = claim_seconds, keep
        self._held: dict[str, Job] = {}
        self._wanted: tuple[str, ...] = ()
        self._wants = asyncio.Event()
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._dropped: asyncio.Queue[str] = asyncio.Queue()
        self._state: WorkerState | None = None
        self._groups: set[str] = set()  # queues that are known to have their consumer group

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                group.create_task(self._hear())
                group.create_task(steadily(self._renew, self._claim_seconds / 4))
                group.create_task(steadily(self._take_over, self._claim_seconds / 4))
                group.create_task(steadily(self._beat, self._claim_seconds / 4))
        finally:
            with contextlib.suppress(*AWAY, RedisError):
                await self._store.commands.delete(f"{PREFIX}worker:{self.name}")
            await self._store.close()

    async def announce(self, state: WorkerState) -> None:
        self._state = dataclasses.replace(state, name=self.name)
        with contextlib.suppress(*AWAY):  # the next beat tells
            await self._beat()

    async def claim(self, models: Sequence[str], absent: Sequence[str] = ()) -> Job:
        self._wanted = (*models, *absent)
        self._wants.set()
        try:
            return await self._jobs.get()
        finally:
            self._wanted = ()
            self._wants.clear()

    async def cancellations(self) -> AsyncIterator[str]:
        while True:
            yield await self._dropped.get()

    async def publish(self, job_id: str, events: Sequence[Event]) -> None:
        job = self._held.get(job_id)
        if job is None:
            return  # another's by now
        final = events[-1].final
        lifetime = (job.timeout or LONGEST) + self._keep

        async def tell() -> int:
            payloads = [await self._store.store(event.payload, lifetime) for event in events]
            told: int = await self._store.run(
                *("publish", job_id, self.name, job.attempt),
                *("company" if len(self._held) > 1 else "alone", "1" if final else "0", *payloads),
            )
            return told

        # A publication that was heard but not answered is repeated; readers drop what they have seen.
        told = await until_reached(tell)
        if final or not told:
            self._held.pop(job_id, None)
        if not told and not final:
            self._dropped.put_nowait(job_id)

    async def hand_back(self, job_ids: Sequence[str]) -> None:
        self._wanted = ()
        mine = [self._held.pop(job_id) for job_id in job_ids if job_id in self._held]
        if mine:
            arguments = [part for job in mine for part in (job.id, job.attempt)]
            await until_reached(lambda: self._store.run("hand_back", self.name, *arguments))

    # ------------------------------------------------------------------------------------------------------ the inside

    async def _read(self) -> None:
        """Jobs for the models that are wanted, interactive ones first, as long as any are."""
        while True:
            check_cancelled()
            await self._wants.wait()
            models = random.sample(self._wanted, len(self._wanted))
            if not models or not self._jobs.empty():
                await self._jobs_taken()
                continue
            urgent, patient = ([_queue(p, model) for model in models] for p in ("interactive", "batch"))
            try:
                await self._ensure_groups(urgent + patient)
                for queues, block in ((urgent, None), (patient, None), (urgent + patient, int(1000 * BLOCK_SECONDS))):
                    found = await self._store.waiting.xreadgroup(
                        GROUP, self.name, dict.fromkeys(queues, ">"), count=1, block=block
                    )
                    for queue, entries in found:
                        for entry, fields in entries:
                            await self._take(queue.decode(), entry, fields)
                    if found:
                        break
            except ResponseError as e:
                if "NOGROUP" not in str(e):
                    raise
                self._groups.clear()  # Redis has lost its memory
            except AWAY as e:
                log.warning("Redis: %s; asking again soon", e)
                await asyncio.sleep(random.uniform(0.1, 0.5))

    async def _jobs_taken(self) -> None:
        await asyncio.sleep(0)
        while not self._jobs.empty():
            await asyncio.sleep(0.001)

    async def _take(self, queue: str, entry: bytes, fields: Mapping[bytes, bytes] | None) -> None:
        """Make a job that the group gave to this worker its own, if it is still to be done."""
        if not fields:  # deleted meanwhile
            await self._store.commands.xack(queue, GROUP, entry)
            return
        job_id = fields[b"job"]
        taken = await self._store.run("take", queue, entry, job_id, self.name, MAX_DEATHS)
        if taken is None:
            return
        packed, attempt, deaths, deaths_alone, waited = taken
        job = dataclasses.replace(
            _job_in(packed),
            attempt=attempt,
            deaths=deaths,
            deaths_alone=deaths_alone,
            queued_seconds=waited / 1000,
        )
        try:
            job = dataclasses.replace(job, payload=await self._store.fetch(job.payload))
        except JobLost as e:
            await self._store.run("cancel", job_id, str(e))
            return
        if job.id in self._held:  # its claim had run out and came back to this very worker: it is being done already
            self._held[job.id] = job
            return
        self._held[job.id] = job
        self._jobs.put_nowait(job)

    async def _take_over(self) -> None:
        """Jobs whose workers have not renewed their claims."""
        for model in self._wanted:
            for priority in ("interactive", "batch"):
                queue = _queue(priority, model)
                await self._ensure_groups([queue])
                try:
                    found = await self._store.commands.xautoclaim(
                        queue, GROUP, self.name, int(1000 * self._claim_seconds), count=4
                    )
                except ResponseError as e:
                    if "NOGROUP" not in str(e):
                        raise
                    self._groups.discard(queue)
                    continue
                for entry, fields in found[1]:
                    if entry is not None:
                        log.warning("taking over a job of %s that its worker no longer claims", model)
                        await self._take(queue, entry, fields)

    async def _renew(self) -> None:
        if not self._held:
            return
        arguments = [part for job in self._held.values() for part in (job.id, job.attempt)]
        for job_id in await self._store.run("renew", self.name, *arguments):
            self._dropped.put_nowait(job_id.decode())

    async def _beat(self) -> None:
        if self._state is not None:
            packed = msgpack.packb(dataclasses.asdict(self._state))
            key = f"{PREFIX}worker:{self.name}"
            await self._store.commands.set(key, packed, px=int(1000 * self._claim_seconds))

    async def _hear(self) -> None:
        while True:
            try:
                async with self._store.waiting.pubsub() as channel:
                    await channel.subscribe(f"{PREFIX}worker:{self.name}")
                    while True:
                        check_cancelled()
                        message = await channel.get_message(ignore_subscribe_messages=True, timeout=POLL_SECONDS)
                        if message is not None:
                            self._dropped.put_nowait(message["data"].decode())
            except (*AWAY, RedisError) as e:
                log.warning("Redis: %s; listening again soon", e)
                await asyncio.sleep(random.uniform(0.1, 0.5))

    async def _ensure_groups(self, queues: Sequence[str]) -> None:
        for queue in queues:
            if queue not in self._groups:
                try:
                    await self._store.commands.xgroup_create(queue, GROUP, id="0", mkstream=True)
                except ResponseError as e:
                    if "BUSYGROUP" not in str(e):
                        raise
                self._groups.add(queue)


async def workers(url: str) -> list[WorkerState]:
    """Every worker that has announced itself of late. Raises `BrokerAway`."""
    store = Store(url)
    try:
        return await reached(_announced(store))
    finally:
        await store.close()


async def _announced(store: Store) -> list[WorkerState]:
    keys = [key async for key in store.commands.scan_iter(f"{PREFIX}worker:*", count=1000)]
    found = await store.commands.mget(keys) if keys else []
    states = [state_in(msgpack.unpackb(packed)) for packed in found if packed is not None]
    return sorted(states, key=lambda state: state.name)


async def _last_delivered(client: Any, queue: str) -> str:
    """The last entry that the group gave to a worker."""
    try:
        groups = await client.xinfo_groups(queue)
    except ResponseError:  # there is no such queue
        return "0-0"
    return next((g["last-delivered-id"].decode() for g in groups if g["name"] == GROUP.encode()), "0-0")


def _wake(waiting: Sequence[asyncio.Event]) -> None:
    for news in waiting:
        news.set()


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


def _job_out(job: Job) -> bytes:
    packed: bytes = msgpack.packb(dataclasses.asdict(job))
    return packed


def _job_in(packed: bytes) -> Job:
    return Job(**msgpack.unpackb(packed))
