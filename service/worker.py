"""A process that owns one device: claims jobs, runs the engine, publishes events.

Three threads. The main one drives the engine, step after step. One runs asyncio and talks to the broker. One reads
checkpoints (`service.loader`); the main thread takes them in between two steps. They meet in one inbox.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import queue
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias, get_args

import torch
from uvicorn.loops.auto import auto_loop_factory

from service import tracing
from service.broker import SUSPECT, Claims, Event, Job, WorkerState
from service.broker_local import LocalClaims
from service.engine import Engine
from service.execution import Determinism, Favour, Precision, modes_in, precisions_in
from service.loader import Found, Gone, Loaded, Loader, News, Refused, Scanned
from service.messages import Failed, Generate, MapImages, Message, ScoreImages, Started, pack, unpack
from service.modes import Modes, Renewed, use_cache
from service.residency import Residency
from service.settings import Settings
from service.window import Window

log = logging.getLogger(__name__)

TELL_EVERY = 1.0  # seconds between announcements of the load, while there is any
TOLD_WITHIN = 1.0  # seconds that a step waits until it is told what it is about to do
QUIET = 0.05  # seconds without a command after which the load's end is announced: it would keep the answer waiting


@dataclass(frozen=True)
class _NewJob:
    job: Job


@dataclass(frozen=True)
class _Cancel:
    job_id: str


@dataclass(frozen=True)
class _Drain:
    """The process is told to end: what runs may come to its end, for a while."""


@dataclass(frozen=True)
class _Stop:
    """The broker is gone."""


_Command: TypeAlias = _NewJob | _Cancel | News | Renewed | _Drain | _Stop


class Worker:
    """Startup, main loop and shutdown of one worker."""

    def __init__(
        self,
        name: str,
        device: str,
        folder: Path,
        max_rows: int = 64,
        drain_seconds: float = 20.0,
        memory: int | None = None,
        determinism: Determinism = "exact",
        modes: Sequence[str] = (),
        precision: Mapping[str, Precision] | None = None,
        favour: Favour = "both",
    ) -> None:
        self._name, self._device = name, device
        self._drain_seconds = drain_seconds
        self._ends_at: float | None = None  # the clock's time at which what still runs is handed back
        self._inbox: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._outbox: dict[str, list[Event]] = {}
        self._window = Window(max_rows)
        self._held: dict[str, Job] = {}
        self._taken = 0  # jobs, of all that were claimed
        self._announced = 0.0  # when, on the clock
        self._untold = False  # whether the load is another one since
        self._heard = threading.Event()  # whether the broker has what was last told before a step
        self._heard.set()
        self._suspect: str | None = None  # a job that several workers did not survive, and that runs alone
        self._talk: _Talk | None = None
        self._spans = tracing.JobSpans()
        self._engine = Engine(self._emit, device, max_rows, determinism=determinism)
        self._modes = Modes(self._engine.warm, folder, modes, precision, max_rows, self._inbox.put, favour)
        self._loader = Loader(folder, device, self._modes.warm, self._inbox.put)
        self._residency = Residency(self._engine, self._loader.load, memory)

    def run(self, connect: Callable[[], Awaitable[Claims]]) -> None:
        """Serve until the broker is gone, or to the end of a drain. `connect` runs in the talking thread."""
        self._talk = _Talk(connect, self._inbox)
        self._talk.start()
        self._loader.start()
        try:
            self._loop()
        finally:
            self._loader.stop()
            self._talk.stop()

    def drain(self) -> None:
        """Take no more jobs; end when those here are done, or handed back after `drain_seconds`."""
        self._inbox.put(_Drain())

    # ------------------------------------------------------------------------------------------------------------
    # main loop

    def _loop(self) -> None:
        busy = False
        while True:
            if not self._obey_all(wait=not busy):
                return
            if self._residency.pump():
                self._announce()
            busy = self._engine.step()
            self._flush()
            if self._ends_at is not None and (not self._held or time.monotonic() >= self._ends_at):
                if self._held:
                    log.warning("handing back %d jobs that did not come to their end in time", len(self._held))
                self._give_back(list(self._held.values()))
                return

    def _obey_all(self, wait: bool) -> bool:
        """False when the broker is gone. What a command holds, a model perhaps, is let go of on return."""
        for command in self._commands(wait):
            if isinstance(command, _Stop):
                return False
            self._obey(command)
        return True

    def _commands(self, wait: bool) -> list[_Command]:
        commands = [self._next()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                commands.append(self._inbox.get_nowait())
        return commands

    def _next(self) -> _Command:
        """The next command, whenever it comes; the load is told before, once it is quiet."""
        if self._untold:
            try:
                return self._inbox.get(timeout=QUIET)
            except queue.Empty:
                self._announce()
        return self._inbox.get()

    def _obey(self, command: _Command) -> None:
        if isinstance(command, _NewJob):
            self._take(command.job)
        elif isinstance(command, _Cancel):
            if self._residency.forget(command.job_id):
                self._emit(command.job_id, Failed("cancelled", "the job was cancelled before it began"), True)
            self._engine.cancel(command.job_id)
        elif isinstance(command, Found | Gone | Loaded | Refused | Scanned):
            self._hear(command)
        elif isinstance(command, Renewed):
            if self._residency.renew(command.name, command.model, command.warm, command.execution):
                self._announce()
        elif isinstance(command, _Drain) and self._ends_at is None:
            log.info("draining: %d jobs are here", len(self._held))
            self._ends_at = time.monotonic() + self._drain_seconds
            self._announce()
            self._give_back(self._residency.waiting())

    def _hear(self, news: News) -> None:
        was_ready = self._residency.ready
        begin, hand_back = self._residency.hear(news)
        for job in begin:
            self._begin(job)
        self._give_back(hand_back)
        for job_id in self._residency.expired():
            self._residency.forget(job_id)
            self._emit(job_id, Failed("expired", "the job was expired before it began"), True)
        if not isinstance(news, Scanned) or self._residency.ready != was_ready:
            self._announce()

    def _take(self, job: Job) -> None:
        self._taken += 1
        if self._suspect is not None:
            self._give_back([job])
            return
        if job.deaths >= SUSPECT:
            log.warning("job %s: %d workers stopped while they worked on it; it runs alone now", job.id, job.deaths)
            self._suspect = job.id
            self._give_back(list(self._held.values()))
        self._held[job.id] = job
        self._window.add(job)
        self._claim()
        if self._residency.admit(job):
            self._begin(job)

    def _begin(self, job: Job) -> None:
        try:
            task = unpack(job.payload)
            if not isinstance(task, Generate | ScoreImages | MapImages):
                raise ValueError(f"a {type(task).__name__} is no task")
            self._engine.submit(job.id, job.model, task, job.priority, job.timeout, job.queued_seconds, job.tenant)
        except ValueError as e:  # a job is input: whatever is wrong with it concerns it alone
            self._emit(job.id, Failed("internal", str(e)), True)

    def _give_back(self, jobs: Sequence[Job]) -> None:
        """Let others do these."""
        assert self._talk is not None
        for job in jobs:
            self._engine.forget(job.id)
            self._residency.forget(job.id)
            self._spans.forget(job.id)
            self._outbox.pop(job.id, None)
            if self._held.pop(job.id, None) is not None:
                self._window.drop(job)
            if job.id == self._suspect:
                self._suspect = None
        if jobs:
            self._talk.hand_back([job.id for job in jobs])

    # ------------------------------------------------------------------------------------------------------------
    # telling

    def _emit(self, job_id: str, message: Message, final: bool) -> None:
        self._outbox.setdefault(job_id, []).append(Event(pack(message), final))
        if (held := self._held.get(job_id)) is not None:
            self._spans.told(held, message)
        if final and (job := self._held.pop(job_id, None)) is not None:
            self._window.drop(job)
            self._residency.touch(job.model)
            if job_id == self._suspect:
                self._suspect = None
        if held is not None and held.attempt > 1 and isinstance(message, Started):
            self._tell_before_the_step()

    def _tell_before_the_step(self) -> None:
        """A worker that had this job died, in its first step perhaps. If this one does as well, it is known of what."""
        assert self._talk is not None
        behind, self._heard = not self._heard.is_set(), threading.Event()
        self._talk.publish(self._outbox)
        self._talk.mark(self._heard)
        self._outbox = {}
        if not behind:  # the broker is away: nobody waits for it again and again
            self._heard.wait(TOLD_WITHIN)

    def _flush(self) -> None:
        if self._outbox:
            assert self._talk is not None
            self._talk.publish(self._outbox)
            self._outbox = {}
            self._claim()
            self._untold = True
        if self._untold and time.monotonic() - self._announced > TELL_EVERY:
            self._announce()

    def _announce(self) -> None:
        assert self._talk is not None
        ready = self._residency.ready and self._ends_at is None
        self._announced, self._untold = time.monotonic(), False
        models = dict(self._residency.states)
        draining = self._ends_at is not None
        state = WorkerState(self._name, self._device, ready, models, self._engine.load(), len(self._held), draining)
        self._talk.announce(state)
        self._claim()

    def _claim(self) -> None:
        """Ask for more work for the models that have room."""
        assert self._talk is not None
        if self._ends_at is not None or self._suspect is not None:
            self._talk.want(_Want(taken=self._taken))
            return
        here, absent = self._window.room(self._residency.here()), self._window.room(self._residency.absent())
        self._talk.want(_Want(here, absent, self._window.enough(), self._window.free(here), self._taken))


@dataclass(frozen=True)
class _HandBack:
    job_ids: list[str]


@dataclass(frozen=True)
class _Want:
    """See `Claims.claim`."""

    models: Sequence[str] = ()
    absent: Sequence[str] = ()
    enough: Mapping[str, Sequence[str]] = field(default_factory=dict)
    free: Mapping[str, int] = field(default_factory=dict)  # rows that may come before the worker says so again
    taken: int = 0  # jobs that it has counted in so far


_Told: TypeAlias = "dict[str, list[Event]] | WorkerState | _Want | _HandBack | threading.Event"


class _Talk:
    """The thread that talks to the broker. Its methods may be called from any thread; they return at once."""

    def __init__(self, connect: Callable[[], Awaitable[Claims]], inbox: queue.SimpleQueue[_Command]) -> None:
        self._connect, self._inbox = connect, inbox
        self._loop = auto_loop_factory()()  # uvloop, where there is one, as the API has
        self._thread = threading.Thread(target=self._run, name="talk", daemon=True)
        self._begun = threading.Event()
        self._told: asyncio.Queue[_Told | None] = asyncio.Queue()
        self._wanted = _Want()
        self._changed = asyncio.Event()
        self._given = 0  # jobs
        self._uncounted: deque[Job] = deque()  # those of them that the worker has not counted in yet

    def start(self) -> None:
        self._thread.start()
        self._begun.wait()

    def stop(self) -> None:
        """Tell what is still to be told, then end the thread."""
        with contextlib.suppress(RuntimeError):  # its loop has ended by itself: the broker is gone
            self._loop.call_soon_threadsafe(self._told.put_nowait, None)
        self._thread.join()

    def publish(self, outbox: dict[str, list[Event]]) -> None:
        self._soon(outbox)

    def mark(self, heard: threading.Event) -> None:
        """It is set when all is told that was to be told so far."""
        self._soon(heard)

    def announce(self, state: WorkerState) -> None:
        self._soon(state)

    def want(self, wanted: _Want) -> None:
        self._soon(wanted)

    def hand_back(self, job_ids: list[str]) -> None:
        self._soon(_HandBack(job_ids))

    def _soon(self, what: _Told) -> None:
        with contextlib.suppress(RuntimeError):  # as above; a _Stop is in the inbox then
            self._loop.call_soon_threadsafe(self._told.put_nowait, what)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._main())
        finally:
            self._begun.set()
            self._inbox.put(_Stop())
            self._loop.close()

    async def _main(self) -> None:
        claims = await self._connect()
        self._begun.set()
        tasks = [
            asyncio.ensure_future(c)
            for c in (claims.run(), self._tell(claims), self._claim(claims), self._hear(claims))
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                with contextlib.suppress(ConnectionError):  # the broker is gone: so are we
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _tell(self, claims: Claims) -> None:
        while (what := await self._told.get()) is not None:
            if isinstance(what, WorkerState):
                await claims.announce(what)
            elif isinstance(what, dict):
                for job_id, events in what.items():
                    await claims.publish(job_id, events)
            elif isinstance(what, _HandBack):
                await claims.hand_back(what.job_ids)
            elif isinstance(what, threading.Event):
                what.set()
            else:
                self._wanted = what
                while len(self._uncounted) > self._given - what.taken:
                    self._uncounted.popleft()
                self._changed.set()
        await claims.hand_back([job.id for job in self._uncounted])
        await claims.leave()

    async def _claim(self, claims: Claims) -> None:
        """Keep one claim standing for the models that have room; each change replaces it. The next one waits for the
        worker, who is in the middle of a step perhaps, only where it would take more than is free."""
        while True:
            self._changed.clear()
            wanted = self._wanted
            if not wanted.models and not wanted.absent:
                await self._changed.wait()
                continue
            claim = asyncio.ensure_future(claims.claim(wanted.models, wanted.absent, wanted.enough))
            changed = asyncio.ensure_future(self._changed.wait())
            try:
                await asyncio.wait([claim, changed], return_when=asyncio.FIRST_COMPLETED)
                if claim.done():
                    job = claim.result()
                    self._given += 1
                    self._uncounted.append(job)
                    self._inbox.put(_NewJob(job))
                    coming = sum(other.rows for other in self._uncounted if other.model == job.model)
                    if coming >= self._wanted.free.get(job.model, 0):
                        await changed
            finally:
                claim.cancel()
                changed.cancel()
                await asyncio.gather(claim, changed, return_exceptions=True)

    async def _hear(self, claims: Claims) -> None:
        async for job_id in claims.cancellations():
            self._inbox.put(_Cancel(job_id))


def main(argv: list[str] | None = None) -> int:
    """python -m service.worker: one worker, started by the API's supervisor with a socket to it."""
    parser = argparse.ArgumentParser(prog="python -m service.worker", description=main.__doc__)
    reach = parser.add_mutually_exclusive_group(required=True)
    reach.add_argument("--fd", type=int, help="file descriptor of the socket to the API process")
    reach.add_argument("--redis", action="store_true", help="over the Redis that DRAWWELL_REDIS_URL names")
    parser.add_argument("--name", required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--max-rows", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads for torch")
    parser.add_argument("--determinism", choices=("exact", "pixels"), default="exact")
    parser.add_argument("--modes", type=modes_in, default=("eager",))
    parser.add_argument("--favour", choices=get_args(Favour), default="both")
    parser.add_argument("--precision", type=precisions_in, default={})
    parser.add_argument("--compile-cache", type=Path)
    parser.add_argument("--traces", choices=("off", "console", "otlp"), default="off")
    parser.add_argument("--drain-seconds", type=float, default=20.0)
    parser.add_argument("--model-memory", type=int, help="bytes that models may take in memory; without it, any number")
    parser.add_argument("--log-level", default="INFO")
    args = parser.parse_args(argv)
    logging.basicConfig(level=args.log_level, format=f"%(asctime)s {args.name} %(levelname)s %(message)s")
    torch.set_num_threads(args.threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    use_cache(args.compile_cache)
    tracing.start(args.traces, "drawwell-worker")
    worker = Worker(
        *(args.name, args.device, args.models, args.max_rows, args.drain_seconds, args.model_memory),
        *(args.determinism, args.modes, args.precision, args.favour),
    )
    signal.signal(signal.SIGTERM, lambda *_: worker.drain())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the API ends its workers itself
    worker.run((lambda: LocalClaims.connect(args.fd)) if args.fd is not None else (lambda: _over_redis(args.name)))
    return 0


async def _over_redis(name: str) -> Claims:
    from service.claims_redis import RedisClaims

    from_environment: dict[str, str] = {}
    settings = Settings(**from_environment)  # type: ignore[arg-type]
    if settings.redis_url is None:
        raise ValueError("redis_url: not set; DRAWWELL_REDIS_URL says where Redis is")
    host = f"{socket.gethostname()}-{name}"
    return RedisClaims(settings.redis_url.get_secret_value(), host, settings.claim_seconds, settings.keep_seconds)


if __name__ == "__main__":
    sys.exit(main())
