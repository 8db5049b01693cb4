"""Misfortunes that one process with one Redis can bring about: answers that are lost on their way, a worker that is
silent for too long and comes back, a Redis that forgets, a node of a Cluster.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from brokers import CLAIM, Distributed, claim, job, workers
from redis import Redis
from redis_server import RedisServer

from service._redis import Store
from service.broker import MAX_DEATHS, BrokerAway, Event, QueueFull
from service.broker_redis import RedisBroker
from service.claims_redis import RedisClaims

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def kind(redis_server: RedisServer) -> Distributed:
    redis_server.flush()
    return Distributed(redis_server)


async def test_a_command_whose_answer_was_lost_may_be_sent_again(
    kind: Distributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that hears nothing does not know whether Redis did it. Here it always had."""
    run = Store.run

    async def twice(store: Store, script: str, *arguments: str | int | bytes, **bells: Any) -> Any:
        if script not in ("claim", "take"):  # what these gave is another worker's after its claim ran out
            await run(store, script, *arguments)
        return await run(store, script, *arguments, **bells)

    monkeypatch.setattr(Store, "run", twice)
    async with kind.broker(1000) as broker, workers(kind, broker, "w") as [w]:
        for k in range(4):
            await broker.submit(job(f"j{k}", tenant=f"t{k}"))
        await broker.submit(job("kept", key="k", digest="d"))
        assert await broker.queued_units() == 50
        await broker.cancel("j3")
        taken = [await claim(w) for _ in range(2)]
        assert [one.id for one in taken] == ["j0", "j1"]
        await w.claims.hand_back(["j1"])
        for name in ("j0", "j1", "j2", "kept"):
            if name != "j0":
                assert (await claim(w)).id == name
            await w.claims.publish(name, [Event(b"half")])
            await w.claims.publish(name, [Event(b"whole", final=True)])
            told = [event.payload async for event in broker.events(name)]
            assert told[-1] == b"whole"
            assert set(told) == {b"half", b"whole"}
            assert told.count(b"whole") == 1
        await broker.submit(job("late"))
        assert (await claim(w)).id == "late", "no place of a job that is over stands before it"
        await w.claims.publish("late", [Event(b"", final=True)])
        assert await broker.queued_units() == 0
        with Redis(port=kind.server.port) as client:
            assert client.zcard("{drawwell}:active") == client.hlen("{drawwell}:waiting") == 0
            assert client.scard("{drawwell}:unclaimed") == 0
            assert not list(client.scan_iter("{drawwell}:q:*"))


async def test_a_worker_that_was_silent_for_too_long_and_comes_back_did_not_die(
    kind: Distributed, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its claim runs out again and again, and nobody else is there to take its job."""

    async def never(_: RedisClaims) -> None:
        return

    monkeypatch.setattr(RedisClaims, "_renew", never)
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a"))
        await claim(w)
        waiting = asyncio.create_task(w.claims.claim(["m"]))
        await asyncio.sleep(0.1)  # so that it asks for more, and looks for what others no longer claim
        steps = 0
        async with asyncio.timeout(120):
            while caplog.text.count("taking over a job of m") < 5:
                await w.claims.publish("a", [Event(b"step")])
                steps += 1
                await asyncio.sleep(0.05)
        assert not waiting.done(), "it has the job already"
        assert (await broker.status("a")).job.attempt == 1
        await w.claims.publish("a", [Event(b"done", final=True)])
        assert [event.payload async for event in broker.events("a")] == [b"step"] * steps + [b"done"]
        waiting.cancel()


@pytest.mark.parametrize("heard", ["renewing", "publishing"])
async def test_a_job_that_a_worker_lost_and_is_given_again_is_not_answered_by_its_stopping(
    kind: Distributed, monkeypatch: pytest.MonkeyPatch, heard: str
) -> None:
    """Another had taken it over and handed it back. What is told before it is stopped is of an old attempt."""

    async def never(_: RedisClaims) -> None:
        return

    renew = RedisClaims._renew
    monkeypatch.setattr(RedisClaims, "_renew", never)
    monkeypatch.setattr(RedisClaims, "_take_over", never)
    async with kind.broker() as broker, workers(kind, broker, "w1", "w2") as [w1, w2]:
        await broker.submit(job("a"))
        await claim(w1)
        assert isinstance(w1.claims, RedisClaims)
        assert isinstance(w2.claims, RedisClaims)
        stream, store, name = "{drawwell}:running:m", w2.claims._store, w2.claims.name
        _, [(entry, fields)], *_ = await store.commands.xautoclaim(stream, "workers", name, 0)
        given = await store.run("take", stream, entry, fields[b"job"], name, MAX_DEATHS)
        assert await store.run("hand_back", name, "a", given[1]) == 1
        if heard == "renewing":
            await renew(w1.claims)
        else:
            await w1.claims.publish("a", [Event(b"half")])
        assert await asyncio.wait_for(anext(w1.claims.cancellations()), 5) == "a"
        again = asyncio.create_task(claim(w1))
        async with asyncio.timeout(5):
            while (await broker.status("a")).state != "running":
                await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert not again.done()
        await w1.claims.publish("a", [Event(b"stopped", final=True)])
        assert (await again).id == "a"
        await w1.claims.publish("a", [Event(b"answer", final=True)])
        assert [event.payload async for event in broker.events("a")] == [b"answer"]
        assert not w1.claims._stopping


async def test_a_wait_that_the_server_breaks_off_is_begun_again(kind: Distributed) -> None:
    """As when it becomes a replica of another, or by an operator's hand."""
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        waiting = asyncio.create_task(claim(w))
        with Redis(port=kind.server.port) as client:
            async with asyncio.timeout(5):
                while not [c for c in client.client_list() if c["cmd"] == "blpop" and c["flags"] == "b"]:
                    await asyncio.sleep(0.01)
            for one in client.client_list():
                client.client_unblock(int(one["id"]), error=True)
        await broker.submit(job("a"))
        assert (await waiting).id == "a"


async def test_a_large_request_that_is_refused_leaves_nothing_behind(kind: Distributed) -> None:
    large = b"x" * 200_000
    async with kind.broker(25) as broker, workers(kind, broker, "w"):
        await broker.submit(job("a", payload=large, key="k", digest="d"))
        await broker.submit(job("b"))
        for _ in range(5):
            with pytest.raises(QueueFull):
                await broker.submit(job("c", payload=large))
            assert await broker.submit(job("d", payload=large, key="k", digest="d")) == "a"
        with Redis(port=kind.server.port) as client:
            assert len(list(client.scan_iter("{drawwell}:blob:*"))) == 1, "that of the job which is queued"


async def test_large_payloads_on_their_way_keep_small_ones_waiting_nowhere(
    kind: Distributed, monkeypatch: pytest.MonkeyPatch
) -> None:
    large, go = b"x" * 200_000, asyncio.Event()
    async with kind.broker(1000) as broker, workers(kind, broker, "w") as [w]:
        assert isinstance(broker, RedisBroker)
        for name in ("get", "set"):
            real = getattr(broker._store.bulk, name)

            async def slow(*arguments: object, real: Any = real, **options: object) -> Any:
                await go.wait()
                return await real(*arguments, **options)

            monkeypatch.setattr(broker._store.bulk, name, slow)
        await broker.submit(job("answered"))
        assert (await claim(w)).id == "answered"
        await w.claims.publish("answered", [Event(large, final=True)])
        reading = asyncio.create_task(anext(aiter(broker.events("answered"))))
        submitting = asyncio.create_task(broker.submit(job("large", payload=large)))
        await broker.submit(job("small"))
        assert (await claim(w)).id == "small"
        await w.claims.publish("small", [Event(b"done", final=True)])
        assert [event.payload async for event in broker.events("small")] == [b"done"]
        assert not reading.done()
        assert not submitting.done()
        go.set()
        assert (await asyncio.wait_for(reading, 10)).payload == large
        assert await asyncio.wait_for(submitting, 10) == "large"


async def test_replicas_that_are_asked_at_once_share_one_bound(kind: Distributed) -> None:
    async with kind.broker(50) as one, kind.broker(50) as other, workers(kind, one, "w"):
        async with asyncio.timeout(5):
            while not await other.pool():
                await asyncio.sleep(0.01)
        brokers = [one, other] * 10
        asked = [broker.submit(job(f"j{k}")) for k, broker in enumerate(brokers)]
        answers = await asyncio.gather(*asked, return_exceptions=True)
        assert sum(isinstance(answer, str) for answer in answers) == 5
        assert sum(isinstance(answer, QueueFull) for answer in answers) == 15
        assert await one.queued_units() == await other.queued_units() == 50


async def test_a_redis_that_is_full_refuses_new_jobs_and_loses_none(kind: Distributed) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a"))
        await claim(w)
        waiting = asyncio.create_task(w.claims.claim(["m"]))
        with Redis(port=kind.server.port) as client:
            client.config_set("maxmemory", 1)
            try:
                with pytest.raises(BrokerAway, match="cannot answer now"):
                    await broker.submit(job("refused"))
                publishing = asyncio.create_task(w.claims.publish("a", [Event(b"done", final=True)]))
                await asyncio.sleep(1.5)
                assert not publishing.done()
                assert not waiting.done()
            finally:
                client.config_set("maxmemory", 0)
        await asyncio.wait_for(publishing, 10)
        assert [event.payload async for event in broker.events("a")] == [b"done"]
        await broker.submit(job("b"))
        assert (await asyncio.wait_for(waiting, 10)).id == "b", "the worker asks on"


async def test_who_looks_at_the_workers_does_not_look_through_everybodys_keys(kind: Distributed) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w1", "w2") as [_, w2]:
        with Redis(port=kind.server.port) as client:
            client.config_resetstat()
            await asyncio.sleep(1.5)
            assert [state.name.split("-")[0] for state in await broker.pool()] == ["w1", "w2"]
            assert not {"cmdstat_scan", "cmdstat_keys"} & client.info("commandstats").keys()  # type: ignore[union-attr]
            client.sadd("{drawwell}:workers", "killed")  # whose announcement has expired
            await broker._store.run("reap", 1000, 60_000)  # type: ignore[attr-defined]
            assert client.scard("{drawwell}:workers") == 2
            await w2.die()
            assert client.scard("{drawwell}:workers") == 1
            assert client.exists("{drawwell}:workers")


async def test_all_is_done_in_one_slot_of_a_cluster_whichever_node_is_asked(tmp_path: Path) -> None:
    """A node of a Cluster refuses commands and scripts that touch keys of two slots, or that are another node's."""
    for name in ("ours", "other"):
        (tmp_path / name).mkdir()
    clustered = ("--cluster-enabled", "yes")
    with RedisServer(tmp_path / "ours", *clustered) as ours, RedisServer(tmp_path / "other", *clustered) as other:
        with Redis(port=ours.port) as one, Redis(port=other.port) as two:
            slot = one.execute_command("CLUSTER KEYSLOT", "{drawwell}:")
            one.execute_command("CLUSTER", "ADDSLOTS", slot)
            two.execute_command("CLUSTER", "ADDSLOTS", *(k for k in range(16384) if k != slot))
            one.execute_command("CLUSTER", "MEET", "127.0.0.1", other.port)
            async with asyncio.timeout(30):
                while not all(client.execute_command("CLUSTER INFO")["cluster_state"] == "ok" for client in (one, two)):
                    await asyncio.sleep(0.05)
        kind = Distributed(other)
        async with kind.broker(1000) as broker:
            assert isinstance(broker, RedisBroker)
            async with workers(kind, broker, "w1") as [w1]:
                for k in range(4):
                    await broker.submit(job(f"j{k}", payload=b"x" * 100_000, key=f"k{k}", tenant=f"t{k}"))
                assert await broker.position("j3") == 3
                taken = await claim(w1)
                await w1.claims.publish(taken.id, [Event(b"y" * 100_000), Event(b"", final=True)])
                await w1.claims.hand_back([(await claim(w1)).id])
                await broker.cancel("j3")
                left = await claim(w1)
            async with workers(kind, broker, "w2") as [w2]:
                async with asyncio.timeout(10 * CLAIM):
                    again = [await claim(w2), await claim(w2)]
                assert left.id in {one.id for one in again}
                for one in again:
                    await w2.claims.publish(one.id, [Event(b"", final=True)])
                    assert [event.final async for event in broker.events(one.id)][-1]
            await broker._store.run("reap", 1000, 0)
            assert await broker.queued_units() == 0
        with Redis(port=ours.port) as client:
            assert client.exists("{drawwell}:places"), "it was all done here"
