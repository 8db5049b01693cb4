"""The workers' side of the broker of many machines; what lies in Redis, and the API's side, are in `broker_redis`.

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
from functools import partial
from typing import Any

import msgpack
from redis.exceptions import RedisError, ResponseError

from service._redis import BLOCK_SECONDS, PREFIX, Store, steadily, until_reached
from service._wires import ANSWER_SECONDS, AWAY, check_cancelled
from service.broker import MAX_DEATHS, NOBODY, Claims, Event, Job, JobLost, WorkerState, is_wanted
from service.broker_redis import LONGEST, job_in
from service.scheduler import AGEING

log = logging.getLogger(__name__)

BELL_SECONDS = 10.0  # that a token stays in a bell nobody waits for (`service/lua/_common.lua`)
GROUP = "workers"  # of consumers of the streams of running jobs


class RedisClaims(Claims):
    """A worker's side; see `Claims`. Its name is its own for one life: a worker that is started again has another."""

    def __init__(self, url: str, name: str, claim_seconds: float = 15.0, keep: float = 600.0) -> None:
        self._store, self.name = Store(url), f"{name}-{uuid.uuid4().hex[:12]}"
        self._channels = self._store.channels(f"{PREFIX}worker:{self.name}")
        self._claim_seconds, self._keep = claim_seconds, keep
        self._held: dict[str, Job] = {}
        self._ending: set[str] = set()  # those whose end is being told
        self._wanted: dict[str, Sequence[str]] = {}  # model in memory -> tenants of whom there is enough
        self._absent: dict[str, Sequence[str]] = {}  # the same of models that would have to be loaded
        self._wants, self._rests = asyncio.Event(), asyncio.Event()  # any job; and no question about jobs is under way
        self._exhausted: tuple[Mapping[str, Sequence[str]] | None, float] = None, 0.0  # nothing was left of it; when
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()  # one at most, for the claim that stands
        self._unwanted: asyncio.Queue[Job] = asyncio.Queue()  # they are this worker's, and it is to hand them back
        self._stopping: dict[str, Job | None] = {}  # lost, as it was told; what of them it was given again meanwhile
        self._dropped: asyncio.Queue[str] = asyncio.Queue()
        self._state: WorkerState | None = None

    async def run(self) -> None:
        """Until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                group.create_task(self._hear())
                group.create_task(self._return_unwanted())
                group.create_task(steadily(self._renew, self._claim_seconds / 4))
                group.create_task(steadily(self._take_over, self._claim_seconds / 4))
                group.create_task(steadily(self._beat, self._claim_seconds / 4))
        finally:
            with contextlib.suppress(*AWAY, RedisError):
                async with self._store.commands.pipeline(transaction=True) as both:
                    both.delete(f"{PREFIX}worker:{self.name}")
                    both.srem(f"{PREFIX}workers", self.name)
                    await both.execute()
            await self._store.close()

    async def announce(self, state: WorkerState) -> None:
        self._state = dataclasses.replace(state, name=self.name)
        with contextlib.suppress(*AWAY):  # the next beat tells
            await self._beat()

    async def claim(
        self, models: Sequence[str], absent: Sequence[str] = (), enough: Mapping[str, Sequence[str]] = NOBODY
    ) -> Job:
        self._wanted = {model: enough.get(model, ()) for model in models}
        self._absent = {model: enough.get(model, ()) for model in absent}
        self._wants.set()
        try:
            return await self._jobs.get()
        finally:
            self._want_nothing()

    async def cancellations(self) -> AsyncIterator[str]:
        while True:
            yield await self._dropped.get()

    async def publish(self, job_id: str, events: Sequence[Event]) -> None:
        final = events[-1].final
        if final:
            self._ending.add(job_id)
        while (job := self._held.get(job_id)) is not None:  # else it is another's by now
            # A publication that was heard but not answered is repeated; readers drop what they have seen.
            told = await until_reached(partial(self._tell, job, events))
            if not told and self._held.get(job_id) is not job:
                continue  # this worker lost it and was given it again meanwhile, as another attempt
            if final or not told:
                self._held.pop(job_id, None)
            if not told and not final:
                self._stop(job_id)
            break
        if final:
            self._ending.discard(job_id)
            self._let_go(job_id)

    async def _tell(self, job: Job, events: Sequence[Event]) -> bool:
        """False where the job is no longer this worker's."""
        lifetime = (job.timeout or LONGEST) + self._keep
        payloads = [await self._store.store(event.payload, lifetime) for event in events]
        company = "company" if len(self._held) > 1 else "alone"
        final = "1" if events[-1].final else "0"
        return bool(await self._store.run("publish", job.id, self.name, job.attempt, company, final, *payloads))

    async def hand_back(self, job_ids: Sequence[str]) -> None:
        self._want_nothing()
        jobs = [self._held.pop(job_id) for job_id in job_ids if job_id in self._held]
        for job_id in job_ids:
            self._let_go(job_id)
        await self._return(jobs)

    async def leave(self) -> None:
        self._want_nothing()
        with contextlib.suppress(TimeoutError):  # Redis is away: what it gives is another's when its claim has run out
            async with asyncio.timeout(BLOCK_SECONDS + ANSWER_SECONDS):
                await self._rests.wait()
                await self._unwanted.join()

    # ------------------------------------------------------------------------------------------------------ the inside

    def _want_nothing(self) -> None:
        self._wanted, self._absent = {}, {}
        self._wants.clear()
        while not self._jobs.empty():  # it came in the very moment in which the claim was dropped
            job = self._jobs.get_nowait()
            self._unwanted.put_nowait(self._held.pop(job.id, job))
            self._let_go(job.id)

    def _stop(self, job_id: str) -> None:
        """Tell the worker to stop. What it tells until it has is of the old attempt; before that it gets no new one."""
        self._stopping.setdefault(job_id, None)
        self._dropped.put_nowait(job_id)

    def _let_go(self, job_id: str) -> None:
        """The worker does it no longer."""
        if (again := self._stopping.pop(job_id, None)) is not None:
            self._unwanted.put_nowait(again)

    async def _return_unwanted(self) -> None:
        while True:
            check_cancelled()
            await self._return([await self._unwanted.get()])
            self._unwanted.task_done()

    async def _return(self, jobs: Sequence[Job]) -> None:
        if jobs:
            arguments = [part for job in jobs for part in (job.id, job.attempt)]
            await until_reached(lambda: self._store.run("hand_back", self.name, *arguments))

    async def _read(self) -> None:
        """Jobs that are wanted, as long as any are. Those of models that are not in memory are looked for no oftener
        than others wait for a bell: a worker that has the model is sooner there.
        """
        looked = 0.0
        while True:
            check_cancelled()
            self._rests.set()
            await self._wants.wait()
            self._rests.clear()
            if not self._jobs.empty():
                await self._jobs_taken()
                continue
            now = time.monotonic()
            try:
                if self._absent and now - looked >= BLOCK_SECONDS:
                    looked = now
                    if await self._ask({**self._wanted, **self._absent}):
                        continue
                await self._ask_or_wait(dict(self._wanted))
            except AWAY as e:
                log.warning("Redis: %s; asking again soon", e)
                await asyncio.sleep(random.uniform(0.1, 0.5))

    async def _ask_or_wait(self, wanted: Mapping[str, Sequence[str]]) -> None:
        """Take a job if one is queued that is wanted, or as soon as one has come, perhaps; not long.

        The second question is sent together with the wait for a bell, so that a job that wakes this worker is at once
        its own. Where nothing was left by the last answer, the first is spared: a bell rings for whoever comes later.
        """
        if not wanted:
            await asyncio.sleep(BLOCK_SECONDS)
            return
        nothing, since = self._exhausted
        self._exhausted = None, 0.0
        spared = nothing == wanted and time.monotonic() - since < BELL_SECONDS / 2
        if spared or not await self._ask(wanted):
            await self._ask(wanted, [f"{PREFIX}bell:{model}" for model in wanted])

    async def _ask(self, wanted: Mapping[str, Sequence[str]], bells: Sequence[str] = ()) -> bool:
        """Take a job, if one is queued that is wanted, perhaps only after a bell has rung or `BLOCK_SECONDS`."""
        described = json.dumps({model: list(tenants) for model, tenants in wanted.items()})
        given = await self._store.run("claim", self.name, int(1000 * AGEING), described, bells=bells)
        *job, more = given or (0,)
        if not more:
            self._exhausted = wanted, time.monotonic()
        if job:
            await self._begin(job)
        return bool(job)

    async def _jobs_taken(self) -> None:
        await asyncio.sleep(0)
        while not self._jobs.empty():
            await asyncio.sleep(0.001)

    async def _begin(self, given: Any) -> None:
        """What the scripts `claim` and `take` gave to this worker."""
        packed, attempt, deaths, deaths_alone, waited = given
        described = msgpack.unpackb(packed)
        try:
            payload = await self._store.fetch(described["payload"])
        except JobLost as e:
            await self._store.run("cancel", described["id"], str(e))
            return
        counted = {"attempt": attempt, "deaths": deaths, "deaths_alone": deaths_alone}
        job = job_in(described, payload, **counted, queued_seconds=waited / 1000)
        if job.id in self._stopping:
            self._stopping[job.id] = job
            return
        if job.id in self._held:  # its claim had run out and came back to this very worker: it is being done already
            self._held[job.id] = job
            return
        # By now: there was time while it waited for a bell. And one claim takes one job.
        if not (self._jobs.empty() and is_wanted(job, {**self._absent, **self._wanted})):
            self._unwanted.put_nowait(job)
            return
        self._held[job.id] = job
        self._jobs.put_nowait(job)

    async def _take_over(self) -> None:
        """Jobs whose workers have not renewed their claims."""
        for model in [*self._wanted, *self._absent]:
            stream = f"{PREFIX}running:{model}"
            try:
                found = await self._store.commands.xautoclaim(
                    stream, GROUP, self.name, int(1000 * self._claim_seconds), count=4
                )
            except ResponseError as e:
                if "NOGROUP" not in str(e):  # nobody has had a job for it yet
                    raise
                continue
            for entry, fields in found[1]:
                if not fields:  # deleted meanwhile
                    if entry is not None:
                        await self._store.commands.xack(stream, GROUP, entry)
                    continue
                log.warning("taking over a job of %s that its worker no longer claims", model)
                given = await self._store.run("take", stream, entry, fields[b"job"], self.name, MAX_DEATHS)
                if given is not None:
                    await self._begin(given)

    async def _renew(self) -> None:
        if not self._held:
            return
        asked = dict(self._held)
        arguments = [part for job in asked.values() for part in (job.id, job.attempt)]
        for job_id in map(bytes.decode, await self._store.run("renew", self.name, *arguments)):
            if self._held.get(job_id) is asked[job_id] and job_id not in self._ending:  # as the same attempt still
                self._stop(job_id)

    async def _beat(self) -> None:
        if self._state is not None:
            packed = msgpack.packb(dataclasses.asdict(self._state))
            async with self._store.commands.pipeline(transaction=True) as both:
                both.set(f"{PREFIX}worker:{self.name}", packed, px=int(1000 * self._claim_seconds))
                both.sadd(f"{PREFIX}workers", self.name)
                await both.execute()

    async def _hear(self) -> None:
        async for job_id in self._channels.listen():
            if job_id is not None:
                self._dropped.put_nowait(job_id.decode())
