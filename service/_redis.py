"""Connections to Redis: that a command either answers soon or raises, that long payloads stand in nobody's way, and the
scripts of `service/lua`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import uuid
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, Sentinel
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError

from service.broker import BrokerAway, JobLost

log = logging.getLogger(__name__)

T = TypeVar("T")

PREFIX = "{drawwell}:"
INLINE = 64 * 1024  # bytes of a payload that travels in a stream itself
ANSWER_SECONDS = 0.8  # that a command may take; with one more try, an API knows within two seconds that Redis is away
BLOCK_SECONDS = 0.25  # that a worker's look for jobs waits for one, before it asks what is wanted by now
AWAY = (RedisConnectionError, RedisTimeoutError, OSError)
NOT_NOW = ("LOADING", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "OOM", "MISCONF")  # replies of a server in trouble

_SCRIPTS = ("submit", "claim", "take", "publish", "cancel", "renew", "hand_back", "reap")
_FOLDER = Path(__file__).with_name("lua")


class Store:
    """Connections to one Redis, and the scripts. Every command that does not wait for news answers soon or raises."""

    def __init__(self, url: str) -> None:
        retry = Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), 1)
        options: dict[str, Any] = {
            "socket_timeout": ANSWER_SECONDS,
            "socket_connect_timeout": ANSWER_SECONDS,
            "health_check_interval": 15,
            "retry": retry,
            "protocol": 2,
        }
        self._sentinels: list[Any] = []  # clients of them, to be closed as well
        # What a reply is, redis-py's types leave open.
        self.commands: Any = self._client(url, {**options, "max_connections": 32})
        # Of their own, so that neither keeps a command waiting: long payloads, and reads that wait.
        self.bulk: Any = self._client(url, {**options, "socket_timeout": 30.0, "max_connections": 8})
        self.waiting: Any = self._client(url, {**options, "socket_timeout": BLOCK_SECONDS + 5.0, "max_connections": 8})
        common = (_FOLDER / "_common.lua").read_text(encoding="utf-8")
        self._scripts = {
            name: self.commands.register_script(common + (_FOLDER / f"{name}.lua").read_text(encoding="utf-8"))
            for name in _SCRIPTS
        }

    async def run(self, script: str, *arguments: str | int | bytes) -> Any:
        answer = await self._scripts[script](args=[PREFIX, *arguments])
        check_cancelled()
        return answer

    async def store(self, payload: bytes, seconds: float) -> bytes:
        """What stands for a payload in a stream: itself, or where it lies."""
        if len(payload) <= INLINE:
            return b"=" + payload
        key = f"{PREFIX}blob:{uuid.uuid4().hex}".encode()
        await self.bulk.set(key, payload, px=int(1000 * seconds))
        return b"@" + key

    async def fetch(self, stored: bytes) -> bytes:
        """Raises `JobLost` where the payload is gone."""
        if stored[:1] == b"=":
            return stored[1:]
        payload: bytes | None = await self.bulk.get(stored[1:])
        if payload is None:
            raise JobLost("a large part of it is no longer kept")
        return payload

    async def close(self) -> None:
        for client in (self.commands, self.bulk, self.waiting, *self._sentinels):
            with contextlib.suppress(*AWAY, RedisError):
                await client.aclose(close_connection_pool=True)

    def _client(self, url: str, options: Mapping[str, Any]) -> Redis:
        """A pool of connections. redis:// and rediss:// (TLS) as everywhere; redis+sentinel://host:port,host:port/service
        for the master of that name. Raises `ValueError` for another URL.
        """
        parts = urlsplit(url)
        if parts.scheme not in ("redis+sentinel", "rediss+sentinel"):
            pool = BlockingConnectionPool.from_url(url, timeout=ANSWER_SECONDS, **options)
            return Redis(connection_pool=pool)
        credentials, _, hosts = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        service, _, db = parts.path.strip("/").partition("/")
        if not service:
            raise ValueError(f"redis_url: names no service after {hosts!r}: redis+sentinel://host:26379/service")
        sentinels = [(host, int(port or 26379)) for host, _, port in (h.partition(":") for h in hosts.split(","))]
        given = dict(parse_qsl(parts.query))
        access = {
            "username": unquote(user) or None,
            "password": unquote(password) or None,
            "ssl": parts.scheme == "rediss+sentinel",
        }
        # Pools of redis-py's Sentinel do not wait for a connection: one that is full raises.
        options = {**options, "max_connections": 1024}
        sentinel: Any = Sentinel(
            sentinels, sentinel_kwargs={"password": given.get("sentinel_password")}, **access, **options
        )  # type: ignore[no-untyped-call]
        self._sentinels += sentinel.sentinels
        master: Redis = sentinel.master_for(service, db=int(db or 0))
        return master


async def reached(work: Awaitable[T]) -> T:
    """The result. Raises `BrokerAway` where Redis cannot be reached or cannot answer now."""
    try:
        result = await work
        check_cancelled()
        return result
    except AWAY as e:
        raise BrokerAway(f"Redis cannot be reached: {type(e).__name__}") from e
    except ResponseError as e:
        if str(e).startswith(NOT_NOW):
            raise BrokerAway(f"Redis cannot answer now: {e}") from e
        raise


def check_cancelled() -> None:
    """Raises `CancelledError` in a task that was cancelled: in redis-py a reply that comes in that moment may swallow
    the first. It stands after commands, and where loops begin again.
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


async def steadily(work: Callable[[], Awaitable[None]], seconds: float) -> None:
    """Do it again and again, with some jitter; what Redis refuses is tried again next time."""
    while True:
        check_cancelled()
        try:
            await work()
        except (*AWAY, RedisError) as e:
            log.warning("Redis: %s: %s", type(e).__name__, e)
        await asyncio.sleep(seconds * random.uniform(0.8, 1.2))


async def until_reached(work: Callable[[], Awaitable[T]]) -> T:
    """The result, however long Redis is away."""
    wait = 0.05
    while True:
        try:
            return await work()
        except AWAY as e:
            log.warning("Redis: %s; trying again", type(e).__name__)
        except ResponseError as e:
            if not str(e).startswith(NOT_NOW):
                raise
        await asyncio.sleep(random.uniform(wait / 2, wait))
        wait = min(2 * wait, 1.0)
