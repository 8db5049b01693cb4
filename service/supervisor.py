"""Starts the worker processes of this machine, and starts again one that dies. What it was doing, the broker gives to
another.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from service.broker_local import LocalBroker
from service.settings import Settings

log = logging.getLogger(__name__)

GRACE = 5.0  # seconds a worker has to end after SIGTERM, besides those for what it runs
LONGEST_WAIT = 10.0  # seconds between restarts of a worker that keeps dying


def device_list(devices: str) -> list[str]:
    """The device of each worker. "auto" is every CUDA device, or without one, a worker for each CPU core up to four;
    otherwise the
    comma-separated list ("cpu,cpu" makes two workers on the CPU). Raises `ValueError` for anything else."""
    if devices == "auto":
        cuda = sorted(Path("/dev").glob("nvidia[0-9]*"))
        return [f"cuda:{k}" for k in range(len(cuda))] or ["cpu"] * min(4, os.cpu_count() or 1)
    found = [device.strip() for device in devices.split(",")]
    for device in found:
        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            raise ValueError(
                f'devices: {device!r}; a device is "cpu", "cuda" or "cuda:N", and "auto" takes what there is'
            )
    return found


@dataclass(frozen=True)
class Reach:
    """How a worker process reaches its broker."""

    arguments: Sequence[str]
    end: socket.socket | None = None  # that the process inherits
    attach: Callable[[], Awaitable[None]] | None = None  # what serves the other end, while the process lives


def over_socket(broker: LocalBroker) -> Callable[[str], Reach]:
    """A socket pair for each life of a worker."""

    def reach(name: str) -> Reach:
        ours, theirs = socket.socketpair()
        return Reach(["--fd", str(theirs.fileno())], theirs, lambda: broker.attach(name, ours))

    return reach


def over_redis(name: str) -> Reach:
    """The environment says where Redis is: a command line would show its password."""
    return Reach(["--redis"])


class Supervisor:
    """Keeps one worker process per device alive. CPU workers have one thread each: two unpinned OpenMP threads may
    land on one core.
    """

    def __init__(self, reach: Callable[[str], Reach], devices: Sequence[str], settings: Settings) -> None:
        self._reach, self._devices, self._settings = reach, devices, settings
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    @property
    def pids(self) -> dict[str, int]:
        """Process ids of the workers that run, by name."""
        return {name: process.pid for name, process in self._processes.items()}

    async def run(self) -> None:
        """Until cancelled; then every worker is ended."""
        async with asyncio.TaskGroup() as group:
            for k, device in enumerate(self._devices):
                group.create_task(self._keep(f"worker-{k}", device))

    async def _keep(self, name: str, device: str) -> None:
        wait = 0.1
        while True:
            began = time.monotonic()
            code = await self._serve(name, device)
            wait = 0.1 if time.monotonic() - began > 60 else min(2 * wait, LONGEST_WAIT)
            log.error("%s ended with exit status %s; starting it again in %.1f s", name, code, wait)
            await asyncio.sleep(wait)

    async def _serve(self, name: str, device: str) -> int:
        """One life of a worker. Returns its exit status."""
        reach, settings = self._reach(name), self._settings
        command = ["-m", "service.worker", *reach.arguments, "--name", name, "--device", device]
        command += ["--models", str(settings.models), "--max-rows", str(settings.max_rows)]
        command += ["--determinism", settings.determinism, "--modes", settings.modes, "--precision", settings.precision]
        command += ["--favour", settings.favour]
        command += ["--traces", settings.traces]
        if settings.compile_cache is not None:
            command += ["--compile-cache", str(settings.compile_cache)]
        command += ["--drain-seconds", str(settings.drain_seconds), "--log-level", settings.log_level]
        if settings.model_memory is not None:
            command += ["--model-memory", str(settings.model_memory)]
        threads = {"OMP_NUM_THREADS": "1"} if device == "cpu" else {}
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *command,
            pass_fds=[] if reach.end is None else [reach.end.fileno()],
            env={**os.environ, **threads},
        )
        if reach.end is not None:
            reach.end.close()
        self._processes[name] = process
        link = None if reach.attach is None else asyncio.ensure_future(reach.attach())
        try:
            return await process.wait()
        finally:
            await self._end(process)
            del self._processes[name]
            if link is not None:
                link.cancel()
                await asyncio.gather(link, return_exceptions=True)

    async def _end(self, process: asyncio.subprocess.Process) -> None:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), self._settings.drain_seconds + GRACE)
            except TimeoutError:
                process.kill()
                await process.wait()
