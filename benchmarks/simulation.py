"""A pool in simulated time: the real queue, claims and schedulers, on devices and a broker that take as long as they
are said to.

    python -m benchmarks.simulation [--workers 1 4 16 64] [--rates 1000 10000] [--broker-microseconds 100]
        [--page docs/08-pool.md]

What decides is the service's own: `LocalBroker` queues and gives out jobs, `Window` says what a worker claims,
`Scheduler` what steps. What takes time is made up: a step of a device takes DEVICE seconds, and everything that passes
the broker (a submission, a claim, a publication) waits for a server that does one thing after the other, a third of
--broker-microseconds for each. Take that from `python -m benchmarks.broker`, which measures the processor time that the
Redis server spends on a job. The clock is virtual, arrivals are random with a fixed seed: the same command prints the
same table on every machine, however busy it is.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import random
import selectors
import statistics
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgpack
from rich.console import Console
from rich.table import Table

from benchmarks._page import write
from service.broker import Job, ModelState, QueueFull, WorkerState
from service.broker_local import LocalBroker, _Link
from service.scheduler import Row, Scheduler, Ticket
from service.window import Window

DEVICE = (0.05e-3, 4e-3)  # seconds of a step: so many a row, and so many besides
BATCH = 64  # rows that step together
STEPS = (1, 10, 20)  # of a job's only image, each as likely
TENANTS = 8
SECONDS = 1.0  # in which jobs arrive


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop that does not wait: where nothing can be done now, its clock goes to when something can."""

    def __init__(self) -> None:
        super().__init__(_Jump(self))
        self.now = 0.0

    def time(self) -> float:
        return self.now


class _Jump(selectors.DefaultSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that will never come")
        self._loop.now += max(0.0, timeout)
        return []


class Server:
    """Does one thing after the other."""

    def __init__(self) -> None:
        self.busy = 0.0  # seconds, all together
        self._free_at = 0.0

    async def serve(self, seconds: float) -> None:
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + seconds
        self.busy += seconds
        await asyncio.sleep(self._free_at - now)


class Wire:
    """What the broker takes for the socket to a worker."""

    def __init__(self) -> None:
        self.jobs: asyncio.Queue[Job] = asyncio.Queue()

    def write(self, frame: bytes) -> None:
        (length,) = struct.unpack(">I", frame[:4])
        kind, what = msgpack.unpackb(frame[4 : 4 + length])
        assert kind == "job"
        self.jobs.put_nowait(Job(**what))

    def is_closing(self) -> bool:
        return False


@dataclass(frozen=True)
class Request:
    at: float  # seconds from the beginning
    steps: int  # of its image
    tenant: str


@dataclass
class Outcome:
    came: list[float]  # when jobs were asked for, on the clock
    refused: int = 0
    ended: list[float] = field(default_factory=list)  # when,
    took: list[float] = field(default_factory=list)  # how many seconds after the request,
    tenants: list[str] = field(default_factory=list)  # and whose it was
    batch: float = 0.0  # rows of a step, as a share of the most
    broker: float = 0.0  # share of its time in which it was busy


class Pool:
    """Workers, a broker and those who ask."""

    def __init__(self, workers: int, requests: Sequence[Request], seconds: float, cost: float) -> None:
        self._workers, self._requests, self._seconds, self._cost = workers, requests, seconds, cost
        self._broker = LocalBroker(10**9, keep=0.1, clock=asyncio.get_running_loop().time)
        self._server, self._asked = Server(), dict[str, float]()
        self._steps = self._rows = 0
        self._outcome = Outcome([request.at for request in requests])

    async def run(self) -> Outcome:
        loop = asyncio.get_running_loop()
        tasks = [asyncio.ensure_future(self._work(f"w{k}")) for k in range(self._workers)]
        asking = [asyncio.ensure_future(self._ask(k, one)) for k, one in enumerate(self._requests)]
        await asyncio.sleep(self._seconds)
        self._outcome.batch = self._rows / max(1, self._steps) / BATCH
        self._outcome.broker = min(1.0, self._server.busy / loop.time())
        for task in (*tasks, *asking):
            task.cancel()
        await asyncio.gather(*tasks, *asking, return_exceptions=True)
        return self._outcome

    async def _ask(self, k: int, request: Request) -> None:
        await asyncio.sleep(request.at)
        job = Job(f"j{k}", "m", b"", 1, request.steps, steps=request.steps, tenant=request.tenant)
        await self._server.serve(self._cost / 3)
        self._asked[job.id] = request.at
        try:
            await self._broker.submit(job)
        except QueueFull:
            self._outcome.refused += 1

    async def _work(self, name: str) -> None:
        link = self._broker._links[name] = _Link(Wire())  # type: ignore[arg-type]
        state = WorkerState(name, "simulated", True, {"m": ModelState("ready")})
        self._broker._heard(name, link, "announce", [dataclasses.asdict(state)])
        window, scheduler, held = Window(BATCH), Scheduler(BATCH), dict[str, Job]()
        for rows in (4, BATCH):
            scheduler.prepare("m", BATCH, rows, rows * DEVICE[0] + DEVICE[1])
        came, room = asyncio.Event(), asyncio.Event()
        claiming = asyncio.ensure_future(self._claim(name, link, window, scheduler, held, came, room))
        publishing: set[asyncio.Future[None]] = set()
        left: dict[Row, int] = {}
        loop = asyncio.get_running_loop()
        try:
            while True:
                plan = scheduler.plan(loop.time())
                if plan.lane is None:
                    came.clear()
                    await came.wait()
                    continue
                left |= {row: held[row.job].steps for row in plan.join}
                seconds = DEVICE[0] * len(left) + DEVICE[1]
                await asyncio.sleep(seconds)
                self._steps, self._rows = self._steps + 1, self._rows + len(left)
                rows = len(left)
                left = {row: n - 1 for row, n in left.items()}
                done = [row for row, n in left.items() if n == 0]
                scheduler.report("m", rows, seconds, done)
                for row in done:
                    del left[row]
                    window.drop(held[row.job])
                    room.set()
                    publication = asyncio.ensure_future(self._publish(name, link, held.pop(row.job)))
                    publishing.add(publication)
                    publication.add_done_callback(publishing.discard)
        finally:
            claiming.cancel()
            for told in publishing:
                told.cancel()
            await asyncio.gather(claiming, *publishing, return_exceptions=True)

    async def _claim(
        self,
        name: str,
        link: _Link,
        window: Window,
        scheduler: Scheduler,
        held: dict[str, Job],
        came: asyncio.Event,
        room: asyncio.Event,
    ) -> None:
        wire: Any = link.writer
        while True:
            if not window.room(["m"]):
                room.clear()
                await room.wait()
            await self._server.serve(self._cost / 3)
            self._broker._heard(name, link, "claim", [["m"], [], window.enough()])
            while wire.jobs.empty() and (waiting := asyncio.ensure_future(wire.jobs.get())):
                # A claim that stands is replaced when it has become another.
                room.clear()
                changed = asyncio.ensure_future(room.wait())
                await asyncio.wait([waiting, changed], return_when=asyncio.FIRST_COMPLETED)
                changed.cancel()
                if waiting.done():
                    wire.jobs.put_nowait(waiting.result())
                else:
                    waiting.cancel()
                    self._broker._heard(name, link, "claim", [["m"], [], window.enough()])
                await asyncio.gather(waiting, changed, return_exceptions=True)
            job = wire.jobs.get_nowait()
            held[job.id] = job
            window.add(job)
            ticket = Ticket(job.id, "m", 1, tenant=job.tenant, work=job.steps, ticks=job.steps)
            scheduler.submit(ticket, asyncio.get_running_loop().time())
            came.set()

    async def _publish(self, name: str, link: _Link, job: Job) -> None:
        await self._server.serve(self._cost / 3)
        self._broker._heard(name, link, "publish", [job.id, [[b"", True]]])
        now = asyncio.get_running_loop().time()
        self._outcome.ended.append(now)
        self._outcome.took.append(now - self._asked.pop(job.id))
        self._outcome.tenants.append(job.tenant)


def simulate(workers: int, requests: Sequence[Request], seconds: float = SECONDS, cost: float = 100e-6) -> Outcome:
    """What becomes of the requests with so many workers, where a job costs the broker so many seconds."""

    async def main() -> Outcome:
        return await Pool(workers, requests, seconds, cost).run()

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


def at_random(rate: float, seconds: float, seed: int = 0) -> list[Request]:
    """A Poisson process of so many requests a second."""
    rng, found, now = random.Random(seed), list[Request](), 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        found.append(Request(now, rng.choice(STEPS), f"t{len(found) % TENANTS}"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulation", description=__doc__.split("\n")[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1000, 10_000], help="jobs a second that are asked for"
    )
    parser.add_argument("--broker-microseconds", type=float, default=100.0, help="of the broker's time for each job")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for which they are asked for, simulated")
    parser.add_argument("--page", type=Path, help="where the table is put between the markers: docs/08-pool.md")
    args = parser.parse_args()
    head = (
        "workers",
        "asked for, jobs/s",
        "answered, jobs/s",
        "p50, ms",
        "p95, ms",
        "batches full",
        "broker busy",
        "too much for",
    )
    lines = []
    for workers in args.workers:
        for rate in args.rates:
            requests = at_random(rate, args.seconds)
            found = simulate(workers, requests, args.seconds, args.broker_microseconds * 1e-6)
            half = [took for took, at in zip(found.took, found.ended, strict=True) if at > args.seconds / 2]
            came = sum(at > args.seconds / 2 for at in found.came)
            cuts = [1e3 * cut for cut in statistics.quantiles(half, n=20)]
            limit = "the broker" if found.broker > 0.95 else "the devices"
            lines.append(
                [
                    *(f"{workers}", f"{rate:,.0f}", f"{len(half) / (args.seconds / 2):,.0f}"),
                    *(f"{cuts[9]:,.0f}", f"{cuts[18]:,.0f}"),
                    *(f"{100 * found.batch:.0f} %", f"{100 * found.broker:.0f} %"),
                    "" if len(half) > 0.95 * came else limit,
                ]
            )
    if args.page:
        text = "".join(f"| {' | '.join(line)} |\n" for line in ([*head], ["---"] * len(head), *lines))
        write(args.page, {"simulation": text})
    table = Table(*head, title="a simulated pool; times of jobs answered in the second half")
    for line in lines:
        table.add_row(*line)
    Console().print(table)


if __name__ == "__main__":
    main()
