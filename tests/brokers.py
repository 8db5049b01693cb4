"""Brokers of both kinds with workers' ends, for tests that hold for either."""

from __future__ import annotations

import abc
import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager

from redis_server import RedisServer

from service.broker import Broker, Claims, Job, ModelState, WorkerState
from service.broker_local import LocalBroker, LocalClaims
from service.broker_redis import RedisBroker
from service.claims_redis import RedisClaims

CLAIM = 0.6  # seconds after which a worker that gives no sign of life loses its jobs


class Link(abc.ABC):
    """A worker's end of a broker."""

    claims: Claims

    def __init__(self, name: str) -> None:
        self.name = name

    @abc.abstractmethod
    async def connect(self) -> None: ...

    @abc.abstractmethod
    async def die(self) -> None:
        """Without a word, as after kill -9."""

    async def open(self, broker: Broker, *models: str, ready: bool = True) -> None:
        await self.connect()
        states = {model: ModelState("ready") for model in models}
        await self.claims.announce(WorkerState(self.name, "cpu", ready, states))
        async with asyncio.timeout(5):
            while not any(state.name.startswith(self.name) for state in await broker.pool()):
                await asyncio.sleep(0.01)


class LocalLink(Link):
    def __init__(self, broker: LocalBroker, name: str) -> None:
        super().__init__(name)
        self.broker = broker

    async def connect(self) -> None:
        ours, theirs = socket.socketpair()
        self.attached = asyncio.create_task(self.broker.attach(self.name, ours))
        self.claims = self.local = LocalClaims(*await asyncio.open_connection(sock=theirs))
        self.reading = asyncio.create_task(self.claims.run())

    async def die(self) -> None:
        self.local._writer.close()
        self.reading.cancel()
        await asyncio.gather(self.attached, self.reading, return_exceptions=True)


class RedisLink(Link):
    def __init__(self, url: str, name: str) -> None:
        super().__init__(name)
        self.url = url

    async def connect(self) -> None:
        self.claims = RedisClaims(self.url, self.name, claim_seconds=CLAIM)
        self.running = asyncio.create_task(self.claims.run())

    async def die(self) -> None:
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)


class Kind(abc.ABC):
    """How a broker and its links are made."""

    @abc.abstractmethod
    def broker(
        self, queue_units: int = 100, keep: float = 60.0, grace: float = 30.0
    ) -> AbstractAsyncContextManager[Broker]: ...

    @abc.abstractmethod
    def replica(self, broker: Broker) -> AbstractAsyncContextManager[Broker]:
        """Another API process's end of it; the same one, where there can be one only."""

    @abc.abstractmethod
    def link(self, broker: Broker, name: str) -> Link: ...


class Local(Kind):
    @asynccontextmanager
    async def broker(self, queue_units: int = 100, keep: float = 60.0, grace: float = 30.0) -> AsyncIterator[Broker]:
        yield LocalBroker(queue_units, keep, grace)

    @asynccontextmanager
    async def replica(self, broker: Broker) -> AsyncIterator[Broker]:
        yield broker

    def link(self, broker: Broker, name: str) -> Link:
        assert isinstance(broker, LocalBroker)
        return LocalLink(broker, name)


class Distributed(Kind):
    def __init__(self, server: RedisServer) -> None:
        self.server = server

    @asynccontextmanager
    async def broker(self, queue_units: int = 100, keep: float = 60.0, grace: float = 30.0) -> AsyncIterator[Broker]:
        broker = RedisBroker(self.server.url, queue_units, keep, grace)
        running = asyncio.create_task(broker.run())
        try:
            yield broker
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await broker.close()

    def replica(self, broker: Broker) -> AbstractAsyncContextManager[Broker]:
        return self.broker(100_000)

    def link(self, broker: Broker, name: str) -> Link:
        return RedisLink(self.server.url, name)


@asynccontextmanager
async def workers(kind: Kind, broker: Broker, *names: str) -> AsyncIterator[list[Link]]:
    links = [kind.link(broker, name) for name in names]
    async with AsyncExitStack() as stack:
        for link in links:
            await link.open(broker, "m")
            stack.push_async_callback(link.die)
        yield links


def job(name: str, **changed: object) -> Job:
    made: dict[str, object] = {"id": name, "model": "m", "payload": b"draw", "rows": 1, "units": 10, "timeout": 30.0}
    return Job(**made | changed)  # type: ignore[arg-type]


async def claim(link: Link, *models: str) -> Job:
    return await asyncio.wait_for(link.claims.claim(models or ("m",)), 10)
