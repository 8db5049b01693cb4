"""Following a job: submit it, tell each of its messages once, and end it when nobody waits any longer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from starlette.requests import ClientDisconnect
from starlette.types import Receive

from service import errors
from service.broker import CANCELLED, Broker, BrokerAway, Event, Job, JobLost
from service.forecast import forecast
from service.messages import Completed, Failed, ImageDone, Mapped, Message, Progress, Scored, Started, unpack
from service.metrics import JobWatch

T = TypeVar("T")

_ROUNDING = 0.05  # seconds between the deadline of a request and that of its job
_POSITION_SECONDS = 1.0  # how often a queued job's place is looked up
_AWAY_SECONDS = 0.2  # between looks whether a broker is back


@dataclass(frozen=True)
class Queued:
    """So many jobs come before this one; when it is predicted to be done."""

    position: int
    eta_seconds: float | None = None  # from now; None where no worker has told how long its steps take


Told: TypeAlias = Queued | Message


class Once:
    """Drops what a rerun repeats: a job told twice, whole or in part, is told once; its progress never goes back."""

    def __init__(self) -> None:
        self._step = -1
        self._seen: set[tuple[type, int]] = set()

    def admit(self, message: Message) -> bool:
        """Whether the message is news."""
        match message:
            case Progress(step=step):
                ahead, self._step = step > self._step, max(step, self._step)
                return ahead
            case Started():
                k = 0
            case ImageDone(sample=k) | Scored(index=k) | Mapped(index=k):
                pass
            case _:
                return True
        key = (type(message), k)
        news = key not in self._seen
        self._seen.add(key)
        return news


async def follow(broker: Broker, job: Job, watch: JobWatch, waits: bool = True) -> AsyncGenerator[tuple[Told, int]]:
    """Submit a job, and tell where it stands in the queue (if the listener `waits` for that) and then its messages, the
    last of which is `Completed`; each with the number of its event, 0 where it has none.

    Raises what `Broker.submit` does before it tells anything, and a `Problem` for a job that failed. Whoever stops
    listening before the end (closes this, or is cancelled) cancels the job.
    """
    ended, began = False, asyncio.get_running_loop().time()
    try:
        await broker.submit(job)
        async with aclosing(attend(broker, job, watch=watch, waits=waits)) as told:
            async for message, number in told:
                ended = isinstance(message, Completed)
                yield message, number
    except errors.Problem:
        ended = True
        raise
    finally:
        if not ended:
            took = asyncio.get_running_loop().time() - began
            late = job.timeout is not None and took >= job.timeout - _ROUNDING
            watch.cancelled("expired" if late else "hung-up")
            await broker.cancel(job.id)


async def attend(
    broker: Broker, job: Job, after: int = 0, watch: JobWatch | None = None, waits: bool = True
) -> AsyncGenerator[tuple[Told, int]]:
    """What a job that was submitted tells, from event number after + 1 on, to its end; a broker that is away is waited
    for. waits: also its place in the queue, which who goes on reading has left behind, and of which who takes the
    answer as a whole never hears. Raises a `Problem` for a job that failed."""
    once, waiting = Once(), waits
    try:
        place = await _place(broker, job) if waits else None
        if place is not None:
            yield place, 0
        told = _events(broker, job.id)
        async with aclosing(pausing(told, _POSITION_SECONDS) if waits else told) as events:
            async for event in events:
                if event is None:
                    now = await _place(broker, job) if waiting else None
                    if now is not None and (place is None or now.position != place.position):
                        place = now
                        yield place, 0
                    continue
                waiting = False
                message = unpack(event.payload)
                if watch is not None and isinstance(message, Started):
                    watch.began()
                if watch is not None and event.final:
                    completed = message if isinstance(message, Completed) else None
                    if isinstance(message, Failed) and message.kind == "expired":
                        watch.cancelled("expired")
                    watch.ended("done" if completed else "failed", completed)
                if isinstance(message, Failed):
                    raise errors.failure(message)
                if once.admit(message) and event.number > after:
                    yield message, event.number
                if event.final:
                    return
    except KeyError:
        raise JobLost("the queue has lost its memory") from None
    except JobLost as e:
        if str(e) == CANCELLED:
            raise errors.Interrupted("the job was cancelled before it was done") from e
        raise
    raise errors.Interrupted("the job was ended before it was done")


async def queued(broker: Broker, job: Job) -> Queued:
    """Where it stands. Raises `KeyError` for a job that is not known."""
    position = await broker.position(job.id)
    predicted = forecast(job, await broker.pool(), await broker.waiting(), position)
    return Queued(position, None if predicted is None else round(predicted.seconds, 3))


async def _place(broker: Broker, job: Job) -> Queued | None:
    """None while the broker is away."""
    try:
        return await queued(broker, job)
    except BrokerAway:
        return None


async def _events(broker: Broker, job_id: str) -> AsyncGenerator[Event]:
    """A job's events. A broker that is away may come back with it: whoever waits for them has a deadline."""
    number = 0
    while True:
        try:
            async for event in broker.events(job_id, number):
                number = event.number
                yield event
            return
        except BrokerAway:
            await asyncio.sleep(_AWAY_SECONDS)


async def so_far(broker: Broker, job_id: str) -> list[Message]:
    """What a job has told until now, the last of which may be `Failed`. Raises `JobLost`."""
    once = Once()
    messages = [unpack(event.payload) async for event in broker.events(job_id, wait=False)]
    return [message for message in messages if once.admit(message)]


async def outcome(told_of: AsyncGenerator[tuple[Told, int]], deadline: float) -> list[Told]:
    """All that a job tells, once it is complete. Raises `TimeoutError` at `deadline`, on the event loop's clock."""
    async with asyncio.timeout_at(deadline), aclosing(told_of) as told:
        return [message async for message, _ in told]


async def pausing(source: AsyncIterator[T], seconds: float) -> AsyncGenerator[T | None]:
    """The source's items, and None whenever it has been silent for `seconds`."""
    coming: asyncio.Future[T] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(anext(source))
            done, _ = await asyncio.wait({coming}, timeout=seconds)
            if not done:
                yield None
                continue
            arrived, coming = coming, None
            try:
                item = arrived.result()
            except StopAsyncIteration:
                return
            yield item
    finally:
        if coming is not None:
            await _cancel(coming)


async def unless_hung_up(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up first: then raises `ClientDisconnect`.

    receive: the request's, after all of its body was read.
    """
    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        gone.result()
        raise ClientDisconnect
    finally:
        await _cancel(gone)
        await _cancel(working)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task and wait until it is over. What it raises belongs to whoever took its result."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
