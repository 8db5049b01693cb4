"""The bare connections that a job's scripts and news go over: whatever breaks, nobody gets another's answer."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import pytest
from redis import Redis
from redis_server import RedisServer

from service import _wires
from service._redis import Store
from service._wires import AWAY, Wires

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def wires_of(store: Store, count: int) -> AsyncIterator[Wires]:
    wires = Wires(store._bare, count)
    try:
        yield wires
    finally:
        await wires.close()


@contextmanager
def stopped(server: RedisServer) -> Iterator[None]:
    assert server._process is not None
    os.kill(server._process.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server._process.pid, signal.SIGCONT)


@pytest.fixture
async def store(redis_server: RedisServer) -> AsyncIterator[Store]:
    redis_server.flush()
    store = Store(redis_server.url)
    yield store
    await store.close()


def cut_all(server: RedisServer) -> None:
    with Redis(port=server.port) as client:
        for kind in ("normal", "pubsub"):
            client.client_kill_filter(_type=kind, skipme=True)


async def test_each_of_many_callers_gets_the_answer_to_what_he_asked(store: Store) -> None:
    """Some give up in the middle: what is still answered to them is nobody else's."""
    answered = 0

    async def ask(wires: Wires, number: int) -> None:
        nonlocal answered
        answers = await wires.ask(
            ("BLPOP", "{drawwell}:none", 0.01 + 0.01 * (number % 3)), ("ECHO", number), ("ECHO", "last")
        )
        assert answers[1:] == [b"%d" % number, b"last"]
        answered += 1

    chance = random.Random(0)
    async with wires_of(store, 4) as wires:
        for _ in range(20):
            asking = [asyncio.create_task(ask(wires, k)) for k in range(8)]
            await asyncio.sleep(0.03 * chance.random())
            for task in chance.sample(asking, 3):
                task.cancel()
            results = await asyncio.gather(*asking, return_exceptions=True)
            assert all(result is None or isinstance(result, asyncio.CancelledError) for result in results)
    assert answered >= 20 * 5


async def test_connections_that_were_cut_while_nobody_used_them_cost_no_caller_an_error(
    store: Store, redis_server: RedisServer
) -> None:
    async with wires_of(store, 6) as wires:
        for _ in range(3):
            said = await asyncio.gather(*(wires.ask(("ECHO", k)) for k in range(6)))
            assert said == [[b"%d" % k] for k in range(6)]
            cut_all(redis_server)


async def test_who_finds_all_connections_taken_waits_no_longer_than_for_an_answer(store: Store) -> None:
    async with wires_of(store, 1) as wires:
        slow = asyncio.create_task(wires.ask(("BLPOP", "{drawwell}:none", 1.0), seconds=5.0))
        await asyncio.sleep(0.05)
        began = time.monotonic()
        with pytest.raises(AWAY):
            await wires.ask(("PING",), seconds=0.2)
        assert time.monotonic() - began < 0.8
        assert await slow == [None]
        assert await wires.ask(("PING",)) == [b"PONG"]


async def test_a_server_that_says_nothing_is_noticed_within_two_answers_time(
    store: Store, redis_server: RedisServer
) -> None:
    assert await store._wires.ask(("PING",)) == [b"PONG"]
    with stopped(redis_server):
        began = time.monotonic()
        with pytest.raises(AWAY):
            await store._wires.ask(("PING",))
        assert time.monotonic() - began < 2.0
    assert await store._wires.ask(("PING",)) == [b"PONG"]


@pytest.mark.parametrize("how", ["cut", "silent"])
async def test_listening_begins_again_and_says_so(
    store: Store, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(_wires, "SILENT_SECONDS", 0.2)
    channels = store.channels("{drawwell}:own")
    heard: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def listen() -> None:
        async for message in channels.listen():
            heard.put_nowait(message)

    listening = asyncio.create_task(listen())
    with Redis(port=redis_server.port) as client:
        async with asyncio.timeout(20):
            assert await heard.get() is None
            await channels.add("{drawwell}:other")
            for _ in range(2):
                await asyncio.sleep(0.1)
                for name in ("own", "other"):
                    client.publish(f"{{drawwell}}:{name}", name)
                    assert await heard.get() == name.encode()
                if how == "cut":
                    cut_all(redis_server)
                else:
                    with stopped(redis_server):
                        await asyncio.sleep(1.0)
                assert await heard.get() is None
            await asyncio.sleep(1.0)  # it is asked several times whether it is still there
            await channels.drop("{drawwell}:other")
            await asyncio.sleep(0.1)
            assert client.publish("{drawwell}:other", "unheard") == 0
            client.publish("{drawwell}:own", "heard")
            assert await heard.get() == b"heard"
            assert heard.empty()
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
