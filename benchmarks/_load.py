"""The load generator: a process of its own, which sends requests to a server and tells when each was answered.

    python -m benchmarks._load < phase.json > outcome.json

Open loop: requests arrive at random (a Poisson process) at a rate that does not care how the server fares, and a
latency counts from when a request was to arrive, not from when it could be sent: a server that stalls is charged for
all who came meanwhile. Closed loop: so many clients, each asking again as soon as it is answered: what a server can do
at most.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias, cast
from urllib.parse import urlsplit

import httptools
import psutil
import uvloop

from benchmarks._frame import ROOT, percentile

PICKED_SEEDS = 2**31


@dataclass(frozen=True)
class Job:
    """A kind of request."""

    name: str
    body: dict[str, Any]  # JSON; a "seed" in it is replaced by one that no other request has
    share: float = 1.0  # of the requests, in proportion
    goal: float = math.inf  # seconds within which an answer is good
    work: float = 1.0  # of one request, in any unit
    path: str = "/generate"
    accept: str = "image/png"
    tenant: str = ""  # who asks


@dataclass(frozen=True)
class Phase:
    """What is sent, and for how long: open loop with a rate, else closed loop."""

    jobs: tuple[Job, ...]
    seconds: float  # that are measured
    rate: float | None = None  # requests per second
    clients: int = 1  # of a closed loop
    warm: float = 0.0  # seconds of a closed loop before what is measured
    drain: float = 30.0  # seconds that answers are waited for after the last arrival; later ones count as never
    burst: bool = False  # all at once instead of at random: `rate · seconds` requests at time 0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What became of one request; times in seconds from the beginning of the phase."""

    job: int
    due: float  # when it was to be sent (open loop), or was sent (closed loop)
    sent: float
    ended: float | None  # None: not before the end of the phase
    good: bool = False  # answered 200, with content


@dataclass(frozen=True)
class Outcome:
    """All of a phase. The window that is measured lies from `begin` to `end`."""

    answers: list[Answer]
    begin: float
    end: float
    server_cpu: float = 0.0  # processor seconds of the server's processes during the window
    generator_cpu: float = 0.0  # and of this process
    jobs: tuple[Job, ...] = field(default=())

    def of(self, name: str | None = None) -> list[Answer]:
        """Of a kind, or all; without those that were answered while it warmed up."""
        mine = (a for a in self.answers if name is None or self.jobs[a.job].name == name)
        return [a for a in mine if a.ended is None or a.ended >= self.begin]

    def latencies(self, name: str | None = None) -> list[float]:
        """Seconds from when a request was due to its answer; infinite where none came or it was an error."""
        return [a.ended - a.due if a.good and a.ended is not None else math.inf for a in self.of(name)]

    def latency(self, q: float, name: str | None = None) -> float:
        return percentile(self.latencies(name), q)

    def completed(self, name: str | None = None) -> list[Answer]:
        """Answered within the window."""
        return [a for a in self.of(name) if a.good and a.ended is not None and self.begin <= a.ended < self.end]

    @property
    def seconds(self) -> float:
        return self.end - self.begin

    @property
    def work_rate(self) -> float:
        """Work of the answers that came within the window, per second."""
        return sum(self.jobs[a.job].work for a in self.completed()) / self.seconds

    @property
    def steady(self) -> tuple[int, float]:
        """(answers, in how many seconds) within the window, from the end of one batch to the end of another: where
        answers come in batches, a window that begins and ends anywhere would hold up to one too many or too few.

        A batch ends with an answer that is followed by a longer wait than the mean. Raises `ValueError` where the
        window has not two of these.
        """
        ends = sorted(a.ended for a in self.completed() if a.ended is not None)
        mean = (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else math.inf
        last = [k for k in range(len(ends) - 1) if ends[k + 1] - ends[k] >= 0.999 * mean]
        if len(last) < 2:
            raise ValueError(f"{len(ends)} answers within {self.seconds:.1f} s: too few to tell a rate by")
        return last[-1] - last[0], ends[last[-1]] - ends[last[0]]

    @property
    def capacity(self) -> float:
        """Requests per second of this mix that so much work makes."""
        shares = sum(job.share for job in self.jobs)
        return self.work_rate / (sum(job.share * job.work for job in self.jobs) / shares)

    @property
    def goodput(self) -> float:
        """Requests per second that were due in the window and answered within the goal of their kind."""
        pairs = zip(self.of(), self.latencies(), strict=True)
        return sum(a.good and taken <= self.jobs[a.job].goal for a, taken in pairs) / self.seconds

    @property
    def lag(self) -> float:
        """Seconds by which the generator itself was late, the 99th percentile."""
        return percentile([a.sent - a.due for a in self.of()], 99)

    @property
    def failed(self) -> int:
        """Refused, or not answered."""
        return sum(not a.good for a in self.of())


# ------------------------------------------------------------------------------------------------------------- arrivals


def arrivals(rate: float, seconds: float, shares: Sequence[float], seed: int) -> list[tuple[float, int]]:
    """(when, kind): a Poisson process of `rate` events per second in [0, seconds), each of a kind by its share."""
    if rate <= 0:
        raise ValueError(f"rate: {rate}; requests per second are more than 0")
    rng = random.Random(seed)
    found, kinds, now = [], range(len(shares)), 0.0
    while (now := now + rng.expovariate(rate)) < seconds:
        found.append((now, rng.choices(kinds, shares)[0]))
    return found


def schedule(phase: Phase) -> list[tuple[float, int]]:
    """The arrivals of an open loop; at least one, however short the phase."""
    assert phase.rate is not None
    shares = [job.share for job in phase.jobs]
    if phase.burst:
        rng = random.Random(phase.seed)
        return [(0.0, rng.choices(range(len(shares)), shares)[0]) for _ in range(round(phase.rate * phase.seconds))]
    return arrivals(phase.rate, phase.seconds, shares, phase.seed) or [(0.0, shares.index(max(shares)))]


# ---------------------------------------------------------------------------------------------------------------- loops

Send: TypeAlias = Callable[[Job, int], Awaitable[bool]]  # a request of a kind, the how-manieth -> whether it was good


async def open_loop(send: Send, phase: Phase) -> Outcome:
    """Send each request when it is due, whatever became of those before it."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    plan = schedule(phase)
    answers: list[Answer] = []

    async def one(number: int, due: float, job: int) -> None:
        sent = loop.time() - began
        good, ended = False, None
        try:
            good = await send(phase.jobs[job], phase.seed + number)
            ended = loop.time() - began
        finally:
            answers.append(Answer(job, due, sent, ended, good))

    tasks = []
    for number, (due, job) in enumerate(plan):
        if (wait := began + due - loop.time()) > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(number, due, job)))
        if wait <= 0:
            await asyncio.sleep(0)  # let what was due be sent
    _, late = await asyncio.wait(tasks, timeout=max(0.0, began + phase.seconds - loop.time()) + phase.drain)
    await _end(late)
    answers.sort(key=lambda a: a.due)
    end = max(a.ended or 0.0 for a in answers) if phase.burst else phase.seconds
    return Outcome(answers, 0.0, end, jobs=phase.jobs)


async def closed_loop(send: Send, phase: Phase) -> Outcome:
    """So many clients, each with one request at a time; the kinds at random, by their share."""
    loop = asyncio.get_running_loop()
    began, rng = loop.time(), random.Random(phase.seed)
    shares = [job.share for job in phase.jobs]
    answers: list[Answer] = []

    async def client() -> None:
        while loop.time() - began < phase.warm + phase.seconds:
            job = rng.choices(range(len(shares)), shares)[0]
            sent = loop.time() - began
            good = await send(phase.jobs[job], rng.randrange(PICKED_SEEDS))
            answers.append(Answer(job, sent, sent, loop.time() - began, good))

    clients = [asyncio.ensure_future(client()) for _ in range(phase.clients)]
    _, late = await asyncio.wait(clients, timeout=phase.warm + phase.seconds)
    await _end(late)  # what they still wait for is no longer measured
    for done in clients:
        if not done.cancelled():
            done.result()
    return Outcome(answers, phase.warm, phase.warm + phase.seconds, jobs=phase.jobs)


async def _end(tasks: set[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# -------------------------------------------------------------------------------------------------- the process itself


class _Connection(asyncio.Protocol):
    """One request at a time, one after the other."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._parser, self._answer = httptools.HttpResponseParser(self), asyncio.get_running_loop().create_future()
        self._bytes = 0

    def exchange(self, request: bytes) -> asyncio.Future[tuple[int, int]]:
        """(status, bytes of the content) of the answer; or `ConnectionError`, or what the parser says of it."""
        assert self.transport is not None
        self._parser, self._answer = httptools.HttpResponseParser(self), asyncio.get_running_loop().create_future()
        self._bytes = 0
        self.transport.write(request)
        return self._answer

    @property
    def open(self) -> bool:
        return self.transport is not None and not self.transport.is_closing()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one, but says so to nobody

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as e:
            self._over(ConnectionError(f"no answer of HTTP: {e}"))

    def connection_lost(self, error: Exception | None) -> None:
        self._over(error or ConnectionError("hung up"))

    def on_body(self, body: bytes) -> None:
        self._bytes += len(body)

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.close()
        if not self._answer.done():
            self._answer.set_result((self._parser.get_status_code(), self._bytes))

    def _over(self, error: Exception) -> None:
        self.close()
        if not self._answer.done():
            self._answer.set_exception(error)
            self._answer.exception()  # nobody may wait for it

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()


class Client:
    """Posts JSON over connections that are kept. Lean, as it shares the cores with what is measured: a library for all
    of HTTP takes as long for a request as a small model for an image."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._address = parts.hostname or "127.0.0.1", parts.port or 80
        self._idle: list[_Connection] = []

    async def post(self, path: str, body: bytes, headers: Mapping[str, str]) -> tuple[int, int]:
        """(status, bytes of the content). Raises `OSError`."""
        host, port = self._address
        told = {
            "Host": f"{host}:{port}",
            "Content-Type": "application/json",
            "Content-Length": str(len(body)),
            **headers,
        }
        head = "".join(f"{name}: {value}\r\n" for name, value in told.items())
        request = f"POST {path} HTTP/1.1\r\n{head}\r\n".encode() + body
        connection = await self._connection()
        try:
            answer = await connection.exchange(request)
        except BaseException:  # cancelled too: the answer may still come, so nobody else may use it
            connection.close()
            raise
        if connection.open:
            self._idle.append(connection)
        return answer

    async def _connection(self) -> _Connection:
        while self._idle:
            if (kept := self._idle.pop()).open:
                return kept
        _, made = await asyncio.get_running_loop().create_connection(_Connection, *self._address)
        return made

    def close(self) -> None:
        for connection in self._idle:
            connection.close()


def sender(client: Client) -> Send:
    async def send(job: Job, seed: int) -> bool:
        body = {**job.body, "seed": seed % PICKED_SEEDS} if "seed" in job.body else job.body
        headers = {"Accept": job.accept, **({"Drawwell-Tenant": job.tenant} if job.tenant else {})}
        try:
            status, length = await client.post(job.path, json.dumps(body).encode(), headers)
        except OSError:
            return False
        return status == 200 and length > 0

    return send


async def generate(url: str, phase: Phase, pid: int | None) -> Outcome:
    """Run a phase against a server. pid: its first process, whose processor time is told with that of its children."""
    client = Client(url)
    watch = asyncio.ensure_future(_watch(pid, phase))
    try:
        outcome = await (closed_loop if phase.rate is None else open_loop)(sender(client), phase)
        server, own = await watch
    finally:
        client.close()
    return replace(outcome, server_cpu=server, generator_cpu=own)


async def _watch(pid: int | None, phase: Phase) -> tuple[float, float]:
    """Processor seconds of the server and of this process during the window."""
    warm = phase.warm if phase.rate is None else 0.0
    await asyncio.sleep(warm)
    server, own = processor_seconds(pid), time.process_time()
    await asyncio.sleep(phase.seconds)
    return processor_seconds(pid) - server, time.process_time() - own


def processor_seconds(pid: int | None) -> float:
    """Of a process and all below it that live."""
    if pid is None:
        return 0.0
    found = 0.0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            used = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found += used.user + used.system
    return found


def run(url: str, phase: Phase, pid: int | None = None) -> Outcome:
    """The same, in a process of its own. Raises `RuntimeError` with what it said where it fails."""
    return finish(begin(url, phase, pid))


def begin(url: str, phase: Phase, pid: int | None = None) -> subprocess.Popen[str]:
    """The process, begun. Killing it hangs up on what is not answered."""
    command, pipe = [sys.executable, "-m", "benchmarks._load"], subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, cwd=ROOT)
    assert process.stdin is not None
    with process.stdin as asked:
        json.dump({"url": url, "pid": pid, "phase": asdict(phase)}, asked)
    process.stdin = None  # `communicate` would flush it
    return process


def finish(process: subprocess.Popen[str]) -> Outcome:
    """Wait for its end."""
    told, problem = process.communicate()
    if process.returncode != 0:
        raise RuntimeError(f"the load generator failed:\n{problem}")
    found = json.loads(told)
    jobs = tuple(Job(**job) for job in found.pop("jobs"))
    return Outcome(**{**found, "answers": [Answer(*a) for a in found["answers"]], "jobs": jobs})


def main() -> None:
    asked = json.load(sys.stdin)
    phase = asked["phase"]
    phase = Phase(**{**phase, "jobs": tuple(Job(**job) for job in phase["jobs"])})
    outcome = uvloop.run(generate(asked["url"], phase, asked["pid"]))
    told = {
        "answers": [[a.job, a.due, a.sent, a.ended, a.good] for a in outcome.answers],
        "begin": outcome.begin,
        "end": outcome.end,
        "server_cpu": outcome.server_cpu,
        "generator_cpu": outcome.generator_cpu,
        "jobs": [{**asdict(job), "body": {}} for job in outcome.jobs],
    }
    json.dump(told, sys.stdout)


if __name__ == "__main__":
    main()
