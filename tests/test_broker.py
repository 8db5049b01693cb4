"""The broker's contract, over real sockets: order, cancellation, dead workers, bounds."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from service.broker import Event, Job, JobLost, ModelState, NoWorker, QueueFull, WorkerState
from service.broker_local import LocalBroker, LocalClaims

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Link:
    """A worker's end, with the API's end attached to a broker."""

    def __init__(self, broker: LocalBroker, name: str) -> None:
        self.broker, self.name = broker, name

    async def open(self, *models: str, ready: bool = True) -> None:
        ours, theirs = socket.socketpair()
        self.attached = asyncio.create_task(self.broker.attach(self.name, ours))
        self.claims = LocalClaims(*await asyncio.open_connection(sock=theirs))
        self.reading = asyncio.create_task(self.claims.run())
        states = {model: ModelState("ready") for model in models}
        await self.claims.announce(WorkerState(self.name, "cpu", ready, states))
        while not any(state.name == self.name for state in await self.broker.pool()):
            await asyncio.sleep(0)

    async def die(self) -> None:
        self.claims._writer.close()
        self.reading.cancel()
        await asyncio.gather(self.attached, self.reading, return_exceptions=True)


@asynccontextmanager
async def workers(broker: LocalBroker, *names: str) -> AsyncIterator[list[Link]]:
    links = [Link(broker, name) for name in names]
    for link in links:
        await link.open("m")
    try:
        yield links
    finally:
        for link in links:
            await link.die()


def job(name: str, **changed: object) -> Job:
    return Job(**{"id": name, "model": "m", "payload": b"draw", "rows": 1, "units": 10, **changed})  # type: ignore[arg-type]


async def told(broker: LocalBroker, name: str) -> list[bytes]:
    return [event.payload async for event in broker.events(name)]


async def claim(link: Link, *models: str) -> Job:
    return await asyncio.wait_for(link.claims.claim(models or ("m",)), 5)


async def test_a_job_is_claimed_and_its_events_come_back_in_order() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w") as [w]:
        await broker.submit(job("a", payload=b"\x00\xff", timeout=3.5))
        taken = await claim(w)
        assert dataclasses.replace(taken, queued_seconds=0.0) == job("a", payload=b"\x00\xff", timeout=3.5)
        await w.claims.publish("a", [Event(b"1"), Event(b"2")])
        await w.claims.publish("a", [Event(b"3", final=True)])
        assert await told(broker, "a") == [b"1", b"2", b"3"]
        assert await told(broker, "a") == [b"1", b"2", b"3"], "a second reader gets them from the first on"
        with pytest.raises(KeyError):
            await told(broker, "never")


async def test_a_claim_waits_for_a_job_and_takes_only_its_models() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w") as [w]:
        waiting = asyncio.create_task(claim(w, "m"))
        await broker.submit(job("other", model="x"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await broker.submit(job("mine"))
        assert (await waiting).id == "mine"
        assert (await claim(w, "x", "m")).id == "other"


async def test_a_newer_claim_replaces_the_standing_one() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w") as [w]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(w.claims.claim(["m"]), 0.05)
        waiting = asyncio.create_task(claim(w, "x"))
        await asyncio.sleep(0.05)
        await broker.submit(job("a"))
        await broker.submit(job("b", model="x"))
        assert (await waiting).id == "b"
        assert await broker.position("a") == 0


async def test_interactive_jobs_go_first_and_positions_say_so() -> None:
    now = [0.0]
    broker = LocalBroker(100, clock=lambda: now[0])
    async with workers(broker, "w") as [w]:
        await broker.submit(job("slow", priority="batch"))
        now[0] = 2.0
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        assert [await broker.position(name) for name in ("a", "b", "slow")] == [0, 1, 2]
        now[0] = 5.0
        taken = [await claim(w) for _ in range(3)]
        assert [t.id for t in taken] == ["a", "b", "slow"]
        assert [t.queued_seconds for t in taken] == [3.0, 3.0, 5.0]


async def test_jobs_of_a_dead_worker_are_done_by_another_in_their_order() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w1") as [w1]:
        for name in ("a", "b"):
            await broker.submit(job(name))
        assert [(await claim(w1)).id for _ in range(2)] == ["a", "b"]
        await w1.claims.publish("a", [Event(b"half")])
        await broker.submit(job("c"))
    async with workers(broker, "w2") as [w2]:
        taken = [await claim(w2) for _ in range(3)]
        assert [(t.id, t.attempt) for t in taken] == [("a", 2), ("b", 2), ("c", 1)]
        await w2.claims.publish("a", [Event(b"half"), Event(b"whole", final=True)])
        assert await told(broker, "a") == [b"half", b"half", b"whole"], "what a rerun repeats is the reader's to drop"


async def test_a_job_that_takes_three_workers_down_is_lost_with_a_reason() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w0") as [w]:
        await broker.submit(job("poison"))
        await claim(w)
    for k in (1, 2):
        async with workers(broker, f"w{k}") as [w]:
            await claim(w)
    with pytest.raises(JobLost, match="3 workers stopped while they worked on it"):
        await told(broker, "poison")


async def test_a_cancelled_job_ends_wherever_it_is() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w") as [w]:
        await broker.submit(job("runs"))
        await claim(w)
        await broker.submit(job("waits"))
        await broker.cancel("runs")
        await broker.cancel("waits")
        await broker.cancel("nobody")
        cancellations = w.claims.cancellations()
        assert await asyncio.wait_for(anext(cancellations), 5) == "runs"
        await w.claims.publish("runs", [Event(b"cancelled", final=True)])
        assert await told(broker, "runs") == [b"cancelled"]
        with pytest.raises(JobLost, match="cancelled"):
            await told(broker, "waits")
        await broker.cancel("runs")


async def test_what_is_told_of_an_ended_job_is_dropped() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w") as [w]:
        await broker.submit(job("a"))
        await claim(w)
        await w.claims.publish("a", [Event(b"1", final=True)])
        await w.claims.publish("a", [Event(b"2", final=True)])
        await w.claims.publish("never", [Event(b"x", final=True)])
        await broker.submit(job("b"))
        await claim(w)
        await w.claims.publish("b", [Event(b"1", final=True)])
        assert await told(broker, "b") == [b"1"]
        assert await told(broker, "a") == [b"1"]


async def test_the_queue_is_bounded_in_units_and_says_when_to_come_back() -> None:
    now = [0.0]
    broker = LocalBroker(25, clock=lambda: now[0])
    async with workers(broker, "w") as [w]:
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        with pytest.raises(QueueFull, match="20 step-units are queued, of 25 at most") as full:
            await broker.submit(job("c"))
        assert full.value.retry_after == 1.0, "no pace was measured yet"
        await claim(w)
        now[0] = 20.0
        await w.claims.publish("a", [Event(b"", final=True)])
        assert await told(broker, "a") == [b""]
        with pytest.raises(QueueFull) as full:
            await broker.submit(job("d", units=20))
        assert full.value.retry_after == pytest.approx(5 / 0.5), "5 units too many, at 10 units in 20 seconds"
        await broker.submit(job("c"))


async def test_an_empty_queue_takes_a_job_of_any_size() -> None:
    broker = LocalBroker(25)
    async with workers(broker, "w"):
        await broker.submit(job("huge", units=1000))
        with pytest.raises(QueueFull):
            await broker.submit(job("small", units=1))


async def test_without_a_worker_jobs_are_refused_but_not_while_one_restarts() -> None:
    now = [0.0]
    broker = LocalBroker(100, grace=30, clock=lambda: now[0])
    with pytest.raises(NoWorker):
        await broker.submit(job("a"))
    link = Link(broker, "w")
    await link.open("m", ready=False)
    with pytest.raises(NoWorker):
        await broker.submit(job("a"))
    await link.claims.announce(WorkerState("w", "cpu", True, {"m": ModelState("ready")}))
    while not (await broker.pool())[0].ready:
        await asyncio.sleep(0)
    await broker.submit(job("a"))
    await link.die()
    now[0] = 29.0
    await broker.submit(job("b"))
    now[0] = 31.0
    with pytest.raises(NoWorker):
        await broker.submit(job("c"))


async def test_queued_jobs_for_a_model_that_is_gone_are_answered_at_once() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w") as [w]:
        await broker.submit(job("a"))
        states = {"m": ModelState("failed", error="broken")}
        await w.claims.announce(WorkerState("w", "cpu", True, states))
        with pytest.raises(JobLost, match="no worker serves m any longer"):
            await asyncio.wait_for(told(broker, "a"), 5)


async def test_ended_jobs_are_forgotten_after_a_while() -> None:
    broker = LocalBroker(100, keep=0.05)
    async with workers(broker, "w") as [w]:
        await broker.submit(job("a"))
        await claim(w)
        await w.claims.publish("a", [Event(b"", final=True)])
        assert await told(broker, "a") == [b""]
        await asyncio.sleep(0.15)
        with pytest.raises(KeyError):
            await told(broker, "a")


async def test_jobs_are_spread_over_idle_workers() -> None:
    broker = LocalBroker(100)
    async with workers(broker, "w1", "w2") as [w1, w2]:
        claims = [asyncio.create_task(claim(w)) for w in (w1, w2)]
        await asyncio.sleep(0.05)
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        assert {(await c).id for c in claims} == {"a", "b"}
