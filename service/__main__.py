"""python -m service serve: the API and its workers on this machine. No Redis, no configuration."""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import ValidationError

from service.app import create_app
from service.broker_local import LocalBroker
from service.catalog import Catalog
from service.settings import Settings
from service.supervisor import Supervisor, device_list


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m service", description="Serve trained models over HTTP.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="the API and its workers on this machine")
    serve.add_argument("--models", type=Path, help="folder whose subfolders are checkpoints (default: zoo)")
    serve.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
    serve.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    serve.add_argument("--devices", help='a worker for each: "cpu", "cuda:0,cuda:1", ... (default: auto)')
    args = parser.parse_args(argv)
    given: dict[str, Any] = {k: v for k, v in vars(args).items() if k != "command" and v is not None}
    try:
        settings = Settings(**given)
        devices = device_list(settings.devices)
        if not settings.models.is_dir():
            raise ValueError(f"models: {settings.models} is not a folder")
    except (ValidationError, ValueError) as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level, format="%(asctime)s api %(levelname)s %(message)s")
    # uvicorn ends by itself on these, then raises the signal again: that one must not cut the workers' shutdown short.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    config = uvicorn.Config(
        app="",
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level.lower(),
        log_config=None,
        timeout_graceful_shutdown=10,  # seconds that open answers get to end; after that they are cut
    )
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(_serve(settings, devices, config))


async def _serve(settings: Settings, devices: list[str], config: uvicorn.Config) -> int:
    broker = LocalBroker(settings.queue_units)
    supervisor = Supervisor(broker, devices, settings.models, settings.max_rows, settings.log_level)
    config.app = create_app(settings, broker, Catalog(settings.models))
    server = _Server(config)
    workers = asyncio.create_task(_run_when(server.listening, supervisor))
    try:
        await server.serve()
    finally:
        workers.cancel()
        await asyncio.gather(workers, return_exceptions=True)
    return 0 if server.started else 1


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


async def _run_when(listening: asyncio.Event, supervisor: Supervisor) -> None:
    """Workers that load torch at once would make the API's own start wait for a core."""
    await listening.wait()
    await supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
