"""The short way to Redis, for what a job waits for: redis-py's connections without its clients.

redis-py connects: by TLS, as a user, to the master that Sentinels name. A command of its clients takes more than twice
as long in Python as the same one over such a connection: for a pool's lock, a task for each write, telemetry.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any, TypeAlias

from hiredis import pack_command
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as RedisTimeoutError

log = logging.getLogger(__name__)

ANSWER_SECONDS = 0.8  # that a command may take; with one more try, an API knows within two seconds that Redis is away
SILENT_SECONDS = 5.0  # that a connection says nothing before it is asked whether it is still there
AWAY = (RedisConnectionError, RedisTimeoutError, OSError)

Command: TypeAlias = tuple[str | int | float | bytes, ...]


class Wires:
    """Connections over which commands are sent and answered, each for one caller at a time.

    pool: redis-py's, which makes them, with neither time-outs nor retries of its own.
    """

    def __init__(self, pool: Any, count: int) -> None:
        self._pool = pool
        self._free: asyncio.LifoQueue[Any] = asyncio.LifoQueue()  # None: one that was not needed yet
        for _ in range(count):
            self._free.put_nowait(None)

    async def ask(self, *commands: Command, seconds: float = ANSWER_SECONDS) -> list[Any]:
        """The answers to commands that are sent together. What a broken connection fails is tried once more, over a new
        one. Raises one of `AWAY`, or what Redis says is wrong.
        """
        if self._free.empty():
            async with asyncio.timeout(seconds):
                connection = await self._free.get()
        else:
            connection = self._free.get_nowait()
        try:
            if connection is None:
                connection = self._pool.make_connection()
            try:
                return await self._exchange(connection, commands, seconds)
            except AWAY:
                await asyncio.sleep(random.uniform(0.02, 0.1))
                return await self._exchange(connection, commands, seconds)
        finally:
            self._free.put_nowait(connection)

    async def _exchange(self, connection: Any, commands: Sequence[Command], seconds: float) -> list[Any]:
        try:
            if not connection.is_connected or await connection.can_read():  # it was cut: nothing is to be read yet
                async with asyncio.timeout(ANSWER_SECONDS):
                    await connection.disconnect(nowait=True)
                    await connection.connect()
            async with asyncio.timeout(seconds):
                packed = b"".join(pack_command(command) for command in commands)  # type: ignore[arg-type]  # a stub's slip
                await connection.send_packed_command(packed, check_health=False)
                return [await connection.read_response() for _ in commands]
        except BaseException:
            # What it was asked it may answer yet, and whoever came next would take that for his own.
            await connection.disconnect(nowait=True)
            raise

    async def close(self) -> None:
        while not self._free.empty():
            if (connection := self._free.get_nowait()) is not None:
                await connection.disconnect()


class Channels:
    """What is published on some channels, over a connection of its own."""

    def __init__(self, pool: Any, own: str) -> None:
        self._own = own
        self._others: set[str] = set()
        self._connection: Any = pool.make_connection()
        self._greeted = False  # the connection is made: who speaks sooner is taken for a part of the greeting

    async def listen(self) -> AsyncIterator[bytes | None]:
        """Messages, until cancelled. None whenever listening begins: before that, some may have been missed."""
        while True:
            try:
                async with asyncio.timeout(2 * ANSWER_SECONDS):
                    await self._connection.connect()
                    self._greeted = True
                    await self._send("SUBSCRIBE", self._own, *self._others)
                while True:
                    kind, channel, *message = await self._heard()
                    check_cancelled()
                    if kind == b"message":
                        yield message[0]
                    elif kind == b"subscribe" and channel.decode() == self._own:
                        yield None
            except (*AWAY, RedisError) as e:
                log.warning("Redis: %s; listening again soon", str(e) or type(e).__name__)
                await asyncio.sleep(random.uniform(0.1, 0.3))
            finally:
                self._greeted = False
                await self._connection.disconnect(nowait=True)

    async def _heard(self) -> list[Any]:
        for _ in range(2):
            heard: list[Any] | None = await self._connection.read_response(timeout=SILENT_SECONDS)
            if heard is not None:
                return heard
            await self._send("PING")
        raise RedisTimeoutError("it has been silent for too long")

    async def add(self, channel: str) -> None:
        self._others.add(channel)
        await self._tell("SUBSCRIBE", channel)

    async def drop(self, channel: str) -> None:
        self._others.discard(channel)
        await self._tell("UNSUBSCRIBE", channel)

    async def _tell(self, *command: str) -> None:
        if self._greeted and self._connection.is_connected:
            with contextlib.suppress(*AWAY, RedisError):  # it is told with the next connection
                await self._send(*command)

    async def _send(self, *command: str) -> None:
        await self._connection.send_command(*command, check_health=False)


def check_cancelled() -> None:
    """Raises `CancelledError` in a task that was cancelled: in redis-py a reply that comes in that moment may swallow
    the first. It stands after commands, and where loops begin again.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError
