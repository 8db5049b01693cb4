"""What lies in Redis does not grow: everything goes when its time is over, what dead workers left as well."""

from __future__ import annotations

import asyncio
import re

import pytest
from brokers import CLAIM, Distributed, claim, job, workers
from redis import Redis
from redis_server import RedisServer

from service.broker import MAX_DEATHS, Event
from service.broker_redis import RedisBroker
from service.claims_redis import GROUP

pytestmark = pytest.mark.anyio

# What stays, however many jobs there were: a counter, a sum, and about a thousand jobs at most that killed workers.
STANDING = {"{drawwell}:places", "{drawwell}:queued", "{drawwell}:dead"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def kind(redis_server: RedisServer) -> Distributed:
    redis_server.flush()
    return Distributed(redis_server)


async def test_when_all_is_over_nothing_is_left_but_a_few_sums(kind: Distributed) -> None:
    """Jobs that are answered, cancelled, handed back, too large, late, and deadly; of many tenants, with keys."""
    server = kind.server
    async with kind.broker(10**6, keep=0.5) as broker:
        assert isinstance(broker, RedisBroker)
        async with workers(kind, broker, "w1", "w2") as [w1, w2]:
            for k in range(20):
                payload = b"x" * (100_000 if k % 5 == 0 else 10)
                await broker.submit(job(f"j{k}", key=f"k{k}", payload=payload, tenant=f"t{k % 7}"))
            await broker.submit(job("late", timeout=0.1, priority="batch"))
            for k in range(5):
                await broker.cancel(f"j{k}")
            taken = [await claim(link) for link in [w1, w2] * 7]
            await w1.claims.hand_back([taken[0].id])
            for link, one in zip([w1, w2] * 7, taken, strict=True):
                await link.claims.publish(one.id, [Event(b"y" * 100_000), Event(b"", final=True)])
            for one in (await claim(w2), await claim(w2)):
                await w2.claims.publish(one.id, [Event(b"", final=True)])
            async with asyncio.timeout(20):
                while await broker.queued_units():  # the late one is put an end to five seconds after its time
                    await asyncio.sleep(0.05)
            await broker.submit(job("deadly", timeout=20.0))
        for k in range(MAX_DEATHS):
            async with workers(kind, broker, f"v{k}") as [v]:
                assert (await claim(v)).deaths_alone == k
                await v.claims.publish("deadly", [Event(b"began")])
        async with workers(kind, broker, "last") as [last]:
            waiting = asyncio.create_task(last.claims.claim(["m"]))
            async with asyncio.timeout(10):
                while (await broker.status("deadly")).state != "ended":
                    await asyncio.sleep(0.05)
            waiting.cancel()
        await broker._store.run("reap", 1000, 0)
        with Redis(port=server.port, decode_responses=True) as client:
            assert client.get("{drawwell}:queued") == "0"
            await asyncio.sleep(0.6)
            left = {key for key in client.scan_iter("*") if client.pttl(key) < 0}
            assert left == STANDING
            soon = {re.sub(r":[^:]*$", "", key) for key in client.scan_iter("*")} - {"{drawwell}"}
            assert soon <= {f"{{drawwell}}:{kind}" for kind in ("bell", "blob", "key")}, "and these have their time"
            assert client.xlen("{drawwell}:dead") == 1


async def test_consumers_of_workers_that_are_gone_are_forgotten_when_they_claim_nothing(
    kind: Distributed,
) -> None:
    async with kind.broker(10**6) as broker:
        assert isinstance(broker, RedisBroker)
        with Redis(port=kind.server.port, decode_responses=True) as client:

            def consumers() -> list[str]:
                found = client.xinfo_consumers("{drawwell}:running:m", GROUP)
                return sorted(consumer["name"].split("-")[0] for consumer in found)  # type: ignore[union-attr]

            for k in range(4):  # lives of workers: each does one job, the last two leave theirs undone
                async with workers(kind, broker, f"w{k}") as [w]:
                    await broker.submit(job(f"j{k}"))
                    one = await claim(w)
                    if k < 2:
                        await w.claims.publish(one.id, [Event(b"", final=True)])
            assert consumers() == ["w0", "w1", "w2", "w3"]
            await asyncio.sleep(2 * CLAIM)
            await broker._store.run("reap", 1000, 200)
            assert consumers() == ["w2", "w3"], "what claims a job is not forgotten with it"
            async with workers(kind, broker, "heir") as [heir]:
                assert sorted([(await claim(heir)).id, (await claim(heir)).id]) == ["j2", "j3"]
                await asyncio.sleep(0.3)
                await broker._store.run("reap", 1000, 200)
                assert consumers() == ["heir"], "one that lives stays, however long it is silent"
                for name in ("j2", "j3"):
                    await heir.claims.publish(name, [Event(b"", final=True)])
            await asyncio.sleep(0.3)
            await broker._store.run("reap", 1000, 200)
            assert not client.exists("{drawwell}:running:m", "{drawwell}:streams"), "nobody reads it any longer"


async def test_a_stream_of_events_is_cut_at_some_thousands(kind: Distributed) -> None:
    async with kind.broker(10**6) as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("long"))
        await claim(w)
        for _ in range(20):
            await w.claims.publish("long", [Event(b"step")] * 500)
        with Redis(port=kind.server.port) as client:
            assert 4096 <= client.xlen("{drawwell}:events:long") <= 5000  # type: ignore[operator]
        await w.claims.publish("long", [Event(b"done", final=True)])
        told = [event async for event in broker.events("long")]
        assert told[-1].payload == b"done"
        assert told[-1].number == 10_001


async def test_a_job_costs_three_scripts_where_a_worker_waits_for_it(kind: Distributed) -> None:
    """It is submitted, claimed by the question that stood with the worker's wait, and answered; no script looks in
    vain between them."""

    def scripts() -> int:
        stats = Redis.from_url(kind.server.url).info("commandstats")
        return int(stats["cmdstat_evalsha"]["calls"])

    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        began = 0
        for k in range(12):
            waiting = asyncio.create_task(claim(w))
            await asyncio.sleep(0.01)
            if k == 2:  # by now the server knows the scripts
                began = scripts()
            await broker.submit(job(f"j{k}"))
            await waiting
            await w.claims.publish(f"j{k}", [Event(b"", final=True)])
        assert 3 * 10 <= scripts() - began <= 3 * 10 + 4  # and renewals
