"""What DRAWWELL_REDIS_URL may be: users with passwords, TLS, Sentinel; each against servers that really ask for it."""

from __future__ import annotations

import asyncio
import os
import re
import ssl
import subprocess
import sys
import time
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

import pytest
import redis
import trustme
from redis_server import RedisServer, binary
from servers import free_port

from service.broker import Broker, BrokerAway, Event, Job, ModelState, WorkerState
from service.broker_redis import RedisBroker, workers
from service.claims_redis import RedisClaims

pytestmark = pytest.mark.anyio

USER, PASSWORD = "drawwell", "a/b:c@d %?#"
# What docs/08-pool.md says that a user needs.
RULES = (
    "on",
    f">{PASSWORD}",
    "resetchannels",
    "~{drawwell}:*",
    "&{drawwell}:*",
    "+@all",
    "-@admin",
    "-@dangerous",
    "+info",
)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@asynccontextmanager
async def both_ends(url: str) -> AsyncIterator[tuple[RedisBroker, RedisClaims]]:
    broker, claims = RedisBroker(url, 10**6), RedisClaims(url, "w", claim_seconds=30.0)
    running = [asyncio.create_task(broker.run()), asyncio.create_task(claims.run())]
    try:
        await claims.announce(WorkerState("w", "cpu", True, {"m": ModelState("ready")}))
        async with asyncio.timeout(20):
            while not await broker.pool():
                await asyncio.sleep(0.05)
        yield broker, claims
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        await broker.close()


async def answered(broker: Broker, claims: RedisClaims, name: str) -> None:
    """A job with a large payload goes its whole way."""
    await broker.submit(Job(name, "m", b"x" * 100_000, 1, 1, timeout=60.0))
    await done(broker, claims, name)


async def done(broker: Broker, claims: RedisClaims, name: str) -> None:
    async with asyncio.timeout(30):
        assert (await claims.claim(["m"])).id == name
        await claims.publish(name, [Event(b"half"), Event(b"whole", final=True)])
        assert [event.payload async for event in broker.events(name)] == [b"half", b"whole"]


# ---------------------------------------------------------------------------------------------------------------- users


async def test_a_user_who_may_touch_nothing_else_is_enough(tmp_path: Path) -> None:
    with RedisServer(tmp_path) as server:
        with redis.Redis(port=server.port) as root:
            root.execute_command("ACL", "SETUSER", USER, *RULES)
            root.execute_command("ACL", "SETUSER", "default", "off")
        url = f"redis://{USER}:{quote(PASSWORD, safe='')}@127.0.0.1:{server.port}/0"
        async with both_ends(url) as (broker, claims):
            await answered(broker, claims, "a")
            await broker.submit(Job("b", "m", b"", 1, 1))
            await broker.cancel("b")
            await broker._store.run("reap", 1000, 0)
        for wrong in (f"redis://127.0.0.1:{server.port}/0", f"redis://{USER}:wrong@127.0.0.1:{server.port}/0"):
            with pytest.raises(BrokerAway, match="Authentication"):
                await workers(wrong)


# ------------------------------------------------------------------------------------------------------------------ TLS


@asynccontextmanager
async def with_tls(port: int, authority: trustme.CA) -> AsyncIterator[int]:
    """A port that speaks TLS, and passes on what it hears; the server itself may have been built without."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    pumps: set[asyncio.Task[None]] = set()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", port)
        for ends in ((reader, far_writer), (far_reader, writer)):
            pumps.add(asyncio.ensure_future(pump(*ends)))

    listening = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield int(listening.sockets[0].getsockname()[1])
    finally:
        listening.close()
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def test_tls_with_a_certificate_of_ones_own_authority(tmp_path: Path) -> None:
    authority, foreign = trustme.CA(), trustme.CA()
    for name, one in (("ours", authority), ("foreign", foreign)):
        one.cert_pem.write_to_path(str(tmp_path / f"{name}.pem"))
    with RedisServer(tmp_path) as server:
        async with with_tls(server.port, authority) as port:
            url = f"rediss://127.0.0.1:{port}/0"
            async with both_ends(f"{url}?ssl_ca_certs={quote(str(tmp_path / 'ours.pem'))}") as (broker, claims):
                await answered(broker, claims, "a")
            for untrusting in (url, f"{url}?ssl_ca_certs={quote(str(tmp_path / 'foreign.pem'))}"):
                with pytest.raises(BrokerAway):
                    await workers(untrusting)


# ------------------------------------------------------------------------------------------------------------- Sentinel


@contextmanager
def sentinel(folder: Path, master: int) -> Iterator[int]:
    """A Sentinel that watches the master and calls it down after half a second."""
    port, folder = free_port(), folder / "sentinel"
    folder.mkdir()
    (folder / "sentinel.conf").write_text(
        f"port {port}\nbind 127.0.0.1\ndir {folder}\n"
        f"sentinel monitor pool 127.0.0.1 {master} 1\n"
        "sentinel down-after-milliseconds pool 500\nsentinel failover-timeout pool 3000\n"
    )
    with (folder / "sentinel.log").open("wb") as log:
        process = subprocess.Popen([binary(), "sentinel.conf", "--sentinel"], cwd=folder, stdout=log, stderr=log)
    try:
        with redis.Redis(port=port) as client:
            until(lambda: int(client.sentinel_master("pool")["num-slaves"]) == 1)  # type: ignore[index,arg-type]
        yield port
    finally:
        process.kill()
        process.wait()


def until(holds: object, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(redis.RedisError):
            if holds():  # type: ignore[operator]
                return
        time.sleep(0.1)
    raise AssertionError("it never came to hold")


@pytest.mark.slow
async def test_with_sentinel_a_replica_takes_over_and_nothing_is_lost(tmp_path: Path) -> None:
    for name in ("master", "replica"):
        (tmp_path / name).mkdir()
    with RedisServer(tmp_path / "master") as master:
        replica = RedisServer(tmp_path / "replica", "--replicaof", "127.0.0.1", str(master.port))
        with replica, sentinel(tmp_path, master.port) as port:
            async with both_ends(f"redis+sentinel://127.0.0.1:1,127.0.0.1:{port}/pool") as (broker, claims):
                await answered(broker, claims, "before")
                await broker.submit(Job("during", "m", b"queued", 1, 1, timeout=120.0))
                with redis.Redis(port=master.port) as client:
                    client.wait(1, 5000)  # the replica has it, too
                master.kill()
                with pytest.raises(BrokerAway):
                    await broker.submit(Job("refused", "m", b"", 1, 1))
                with redis.Redis(port=replica.port) as client:
                    await asyncio.to_thread(until, lambda: client.info("replication")["role"] == "master")  # type: ignore[index]
                await done(broker, claims, "during")
                await answered(broker, claims, "after")


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("redis+sentinel://user:hush@one:26379,two", "names no service after its Sentinels"),
        ("redis+sentinel://user:hu/sh@one:26379/pool", "are written as %2F"),
        ("redis+sentinel://one,:26379x/pool", "names no host and port"),
        ("redis+sentinel://user:hush@one/pool/first", "its database is 'first'"),
        ("redis://:hu/sh@one:6379/0", "are written as %2F"),
        ("redis://:hu#sh@one:6379/0", "are written as %2F"),
        ("redis://:hu?sh@one:6379/0", "are written as %2F"),
        ("redis://:hush", "names no host and port"),
        ("redis://:hush@one:port/0", "names no host and port after the password"),
        ("rediss://:hush@one:6379/first", "its database is 'first', not a number"),
        ("http://:hush@one:6379/0", "begins with none of redis://, rediss://"),
        ("hush", "begins with none of redis://, rediss://"),
    ],
)
async def test_a_url_that_cannot_be_read_is_refused_without_telling_its_password(url: str, why: str) -> None:
    for refusing in (lambda: RedisBroker(url, 100), lambda: RedisClaims(url, "w")):
        with pytest.raises(ValueError, match=why) as refused:
            refusing()
        said = "".join(traceback.format_exception_only(refused.value))
        assert refused.value.__cause__ is refused.value.__context__ is None
        assert not {"hu", "sh", "hush"} & set(re.findall(r"\w+", said))


def test_a_process_that_is_given_such_a_url_says_so_and_ends(tmp_path: Path) -> None:
    environment = {**os.environ, "DRAWWELL_REDIS_URL": "redis://:hush/hush@one:6379/0"}
    command = [sys.executable, "-m", "service", "worker", "--models", str(tmp_path)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert ended.returncode == 2
    assert ended.stderr.startswith("python -m service: redis_url: / ? # and @ within")
    assert "hush" not in ended.stderr + ended.stdout
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "url",
    [
        "redis://host",
        "redis://user:p%40ss@[::1]:6379/0",
        "rediss://host:6379/0?ssl_ca_certs=/a/b.pem",
        "redis+sentinel://a:26379,b/pool/2?sentinel_password=x",
    ],
)
async def test_urls_that_can_be_read(url: str) -> None:
    await RedisBroker(url, 100).close()
