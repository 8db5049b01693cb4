"""Connections to Redis: where a URL leads, that a command either answers soon or raises, that long payloads stand in
nobody's way, and the scripts of `service/lua`.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import random
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, Sentinel
from redis.asyncio.connection import AbstractConnection, Connection, SSLConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import SentinelManagedConnection, SentinelManagedSSLConnection
from redis.backoff import ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import (
    BusyLoadingError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    NoScriptError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from service._wires import ANSWER_SECONDS, AWAY, Channels, Command, Wires, check_cancelled
from service.broker import BrokerAway, JobLost

log = logging.getLogger(__name__)

T = TypeVar("T")

PREFIX = "{drawwell}:"
DIRECT, SENTINEL = ("redis", "rediss"), ("redis+sentinel", "rediss+sentinel")
INLINE = 64 * 1024  # bytes of a payload that travels in a stream itself
WIRES = 32  # scripts of this process that run at a time
BLOCK_SECONDS = 0.25  # that a worker's look for jobs waits for one, before it asks what is wanted by now

_SCRIPTS = ("submit", "claim", "take", "publish", "cancel", "renew", "hand_back", "reap")
_FOLDER = Path(__file__).with_name("lua")


# Replies of a server in trouble. Until Redis 7, a script's own error quotes the code of what it called.
_IN_TROUBLE = (BusyLoadingError, ClusterDownError, MasterDownError, OutOfMemoryError, ReadOnlyError, TryAgainError)
_QUOTED = re.compile(r"(?:^|-)(?:BUSY|CLUSTERDOWN|LOADING|MASTERDOWN|MISCONF|OOM|READONLY|TRYAGAIN|UNBLOCKED) ")


class CannotNow(RedisConnectionError):
    """The server can be reached, but not do what it was asked for."""


class _Patient(AbstractConnection):
    """Tells of a server in trouble as of one that cannot be reached: both are for another try, soon or later."""

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except ResponseError as e:
            if isinstance(e, _IN_TROUBLE) or _QUOTED.search(str(e)):
                await self.disconnect()
                raise CannotNow(str(e)) from e
            raise


class _SentinelConnection(_Patient, SentinelManagedConnection):
    pass


class _SentinelTlsConnection(_Patient, SentinelManagedSSLConnection):
    pass


class _Connection(_Patient, Connection):
    """Goes to the node of a Cluster that has our keys, as it is told; back to where the URL leads when that is gone."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._first = self.host, self.port

    async def connect(self) -> None:
        try:
            await super().connect()  # type: ignore[no-untyped-call]
        except AWAY:
            self.host, self.port = self._first
            raise

    async def read_response(self, *args: Any, **options: Any) -> Any:
        try:
            return await super().read_response(*args, **options)
        except MovedError as e:
            await self.disconnect()
            self.host, self.port = e.host or self.host, e.port
            raise RedisConnectionError(f"the keys are at {self.host}:{self.port}") from e  # which is tried again


class _TlsConnection(_Connection, SSLConnection):
    pass


def check_url(url: str) -> None:
    """Raises `ValueError` for a URL that cannot be used. What is said of it shows no part of it that may be secret."""
    parts = urlsplit(url)
    if parts.scheme not in (*DIRECT, *SENTINEL):
        raise ValueError(f"redis_url: begins with none of {', '.join(f'{s}://' for s in (*DIRECT, *SENTINEL))}")
    if parts.fragment or "@" in parts.path + parts.query:
        raise ValueError("redis_url: / ? # and @ within a user's name or password are written as %2F %3F %23 and %40")
    credentials, _, hosts = parts.netloc.rpartition("@")
    sentinel = parts.scheme in SENTINEL
    for host in hosts.split(",") if sentinel else [hosts]:
        port = host.rpartition("]")[2].partition(":")[2]  # after an IPv6 address in brackets, too
        if (not host and sentinel) or (port and not (port.isdecimal() and int(port) < 65536)):
            raise ValueError(f"redis_url: names no host and port{' after the password' if credentials else ''}")
    service, _, db = parts.path.strip("/").partition("/")
    if sentinel and not service:
        raise ValueError("redis_url: names no service after its Sentinels: redis+sentinel://host:26379/service")
    number = db if sentinel else parts.path.strip("/")
    if number and not number.isdecimal():
        raise ValueError(f"redis_url: its database is {number!r}, not a number")


class Store:
    """Connections to one Redis, and the scripts. Every command that does not wait for news answers soon or raises."""

    def __init__(self, url: str) -> None:
        options: dict[str, Any] = {"socket_connect_timeout": ANSWER_SECONDS, "protocol": 2}
        careful = {
            "socket_timeout": ANSWER_SECONDS,
            "health_check_interval": 15,
            "retry": Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), 1),
        }
        self._sentinels: list[Any] = []  # clients of them, to be closed as well
        # What a reply is, redis-py's types leave open.
        self.commands: Any = self._client(url, {**options, **careful, "max_connections": 32})
        # Of its own, so that long payloads keep no command waiting.
        self.bulk: Any = self._client(url, {**options, **careful, "socket_timeout": 30.0, "max_connections": 8})
        bare = {**options, "socket_timeout": None, "retry": Retry(NoBackoff(), 0)}  # `Wires` has its own of both
        self._bare: Any = self._client(url, {**bare, "max_connections": WIRES}).connection_pool
        self._wires = Wires(self._bare, WIRES)
        common = (_FOLDER / "_common.lua").read_text(encoding="utf-8")
        texts = {name: common + (_FOLDER / f"{name}.lua").read_text(encoding="utf-8") for name in _SCRIPTS}
        self._scripts = {name: (hashlib.sha1(text.encode()).hexdigest(), text) for name, text in texts.items()}

    async def run(self, script: str, *arguments: str | int | bytes, bells: Sequence[str] = ()) -> Any:
        """Its answer. With bells (lists) it runs when one of them has a token, which goes, or in `BLOCK_SECONDS`."""
        digest, text = self._scripts[script]
        # The one key that is named stands for all: a Cluster goes by its hash tag.
        given = 1, PREFIX, PREFIX, *arguments
        try:
            if bells:
                wait: Command = ("BLPOP", *bells, BLOCK_SECONDS)
                _, answer = await self._wires.ask(wait, ("EVALSHA", digest, *given), seconds=BLOCK_SECONDS + 5.0)
            else:
                (answer,) = await self._wires.ask(("EVALSHA", digest, *given))
        except NoScriptError:  # since the server was started
            (answer,) = await self._wires.ask(("EVAL", text, *given))
        check_cancelled()
        return answer

    def channels(self, own: str) -> Channels:
        """What is published there, and elsewhere as it is asked for."""
        return Channels(self._bare, own)

    async def store(self, payload: bytes, seconds: float) -> bytes:
        """What stands for a payload in a stream: itself, or where it lies."""
        if len(payload) <= INLINE:
            return b"=" + payload
        key = f"{PREFIX}blob:{uuid.uuid4().hex}".encode()
        await self.bulk.set(key, payload, px=int(1000 * seconds))
        return b"@" + key

    async def discard(self, stored: bytes) -> None:
        """Nobody will fetch it. Where Redis is away just now, it expires by itself."""
        if stored[:1] == b"@":
            with contextlib.suppress(*AWAY, RedisError):
                await self.bulk.delete(stored[1:])

    async def fetch(self, stored: bytes) -> bytes:
        """Raises `JobLost` where the payload is gone."""
        if stored[:1] == b"=":
            return stored[1:]
        payload: bytes | None = await self.bulk.get(stored[1:])
        if payload is None:
            raise JobLost("a large part of it is no longer kept")
        return payload

    async def close(self) -> None:
        await self._wires.close()
        for client in (self.commands, self.bulk, *self._sentinels):
            with contextlib.suppress(*AWAY, RedisError):
                await client.aclose(close_connection_pool=True)

    def _client(self, url: str, options: Mapping[str, Any]) -> Redis:
        """A pool of connections. redis:// and rediss:// (TLS) as everywhere, of any node of a Cluster too;
        redis+sentinel://host:port,host:port/service for the master of that name. Raises `ValueError` for another URL.
        """
        check_url(url)
        parts = urlsplit(url)
        if parts.scheme not in SENTINEL:
            pool = BlockingConnectionPool.from_url(url, timeout=ANSWER_SECONDS, **options)
            pool.connection_class = _TlsConnection if parts.scheme == "rediss" else _Connection
            return Redis(connection_pool=pool)
        credentials, _, hosts = parts.netloc.rpartition("@")
        user, _, password = credentials.partition(":")
        service, _, db = parts.path.strip("/").partition("/")
        sentinels = [(host, int(port or 26379)) for host, _, port in (h.partition(":") for h in hosts.split(","))]
        given = dict(parse_qsl(parts.query))
        access = {
            "username": unquote(user) or None,
            "password": unquote(password) or None,
            "ssl": parts.scheme == "rediss+sentinel",
        }
        # Pools of redis-py's Sentinel do not wait for a connection: one that is full raises.
        connection = _SentinelTlsConnection if parts.scheme == "rediss+sentinel" else _SentinelConnection
        options = {**options, "max_connections": 1024}
        asked = {  # one that does not answer is left for the next
            "password": given.get("sentinel_password"),
            "socket_timeout": ANSWER_SECONDS / 4,
            "socket_connect_timeout": ANSWER_SECONDS / 4,
            "retry": Retry(NoBackoff(), 0),
        }
        sentinel: Any = Sentinel(sentinels, sentinel_kwargs=asked, **access, **options)  # type: ignore[no-untyped-call]
        self._sentinels += sentinel.sentinels
        master: Redis = sentinel.master_for(service, db=int(db or 0), connection_class=connection)
        return master


async def reached(work: Awaitable[T]) -> T:
    """The result. Raises `BrokerAway` where Redis cannot be reached or cannot answer now."""
    try:
        result = await work
        check_cancelled()
        return result
    except CannotNow as e:
        raise BrokerAway(f"Redis cannot answer now: {e}") from e
    except AWAY as e:
        raise BrokerAway(f"Redis cannot be reached: {type(e).__name__}") from e


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
        await asyncio.sleep(random.uniform(wait / 2, wait))
        wait = min(2 * wait, 1.0)
