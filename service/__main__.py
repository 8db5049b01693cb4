"""python -m service serve | api | worker

serve     the API and its workers on this machine: no Redis, no configuration
api       the API alone; its workers are wherever they share its Redis
worker    workers alone, one for each device of this machine; --check tells whether one of them is ready
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import suppress
from pathlib import Path
from typing import Any

import uvicorn
from pydantic import ValidationError

from service import tracing
from service.app import create_app
from service.broker import Broker
from service.broker_local import LocalBroker
from service.catalog import Catalog
from service.middleware import WithoutPolls
from service.settings import Settings
from service.supervisor import Supervisor, device_list, over_redis, over_socket

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    parser = _parser()
    args = vars(parser.parse_args(argv))
    command, check = args.pop("command"), args.pop("check", False)
    given: dict[str, Any] = {name: value for name, value in args.items() if value is not None}
    try:
        settings = Settings(**given)
        devices = device_list(settings.devices)
        if not settings.models.is_dir():
            raise ValueError(f"models: {settings.models} is not a folder")
        tracing.start(settings.traces if command != "worker" else "off", "drawwell-api")
        if command != "serve" and settings.redis_url is None:
            raise ValueError(
                "redis_url: not set; DRAWWELL_REDIS_URL says where the Redis is that api and workers share"
            )
        if settings.redis_url is not None:
            from service._redis import check_url

            check_url(settings.redis_url.get_secret_value())
    except (ValidationError, ValueError) as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 2
    logging.basicConfig(level=settings.log_level, format=f"%(asctime)s {command} %(levelname)s %(message)s")
    logging.getLogger("uvicorn.access").addFilter(WithoutPolls())
    # uvicorn ends by itself on these, then raises the signal again: that one must not cut the workers' shutdown short.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    if command == "worker":
        return asyncio.run(_check(settings) if check else _work(settings, devices))
    config = uvicorn.Config(
        app="",
        host=settings.host,
        port=settings.port,
        log_level=settings.log_level.lower(),
        log_config=None,
        timeout_graceful_shutdown=10,  # seconds that open answers get to end; after that they are cut
    )
    work = _serve(settings, devices, config) if command == "serve" else _answer(settings, config)
    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        return runner.run(work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m service", description="Serve trained models over HTTP.")
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="the API and its workers on this machine")
    api = commands.add_parser("api", help="the API alone; workers share its Redis")
    worker = commands.add_parser("worker", help="workers alone, for every API that shares their Redis")
    for command in (serve, api, worker):
        command.add_argument("--models", type=Path, help="folder whose subfolders are checkpoints (default: zoo)")
    for command in (serve, api):
        command.add_argument("--host", help="address to listen on (default: 127.0.0.1)")
        command.add_argument("--port", type=int, help="port to listen on (default: 8000)")
    for command in (serve, worker):
        command.add_argument("--devices", help='a worker for each: "cpu", "cuda:0,cuda:1", ... (default: auto)')
    worker.add_argument("--check", action="store_true", help="exit with 0 when a worker of this machine is ready")
    return parser


async def _serve(settings: Settings, devices: list[str], config: uvicorn.Config) -> int:
    broker = LocalBroker(settings.queue_units, settings.keep_seconds)
    supervisor = Supervisor(over_socket(broker), devices, settings)
    return await _listen(settings, config, broker, supervisor.run())


async def _answer(settings: Settings, config: uvicorn.Config) -> int:
    from service.broker_redis import RedisBroker

    assert settings.redis_url is not None
    broker = RedisBroker(settings.redis_url.get_secret_value(), settings.queue_units, settings.keep_seconds)
    try:
        return await _listen(settings, config, broker, broker.run())
    finally:
        await broker.close()


async def _listen(settings: Settings, config: uvicorn.Config, broker: Broker, beside: Coroutine[Any, Any, None]) -> int:
    """Answer HTTP until told to end; `beside` runs from when the API listens until then."""
    config.app = create_app(settings, broker, Catalog(settings.models))
    server = _Server(config)
    running = asyncio.create_task(_run_when(server.listening, beside))
    try:
        await server.serve()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return 0 if server.started else 1


async def _work(settings: Settings, devices: list[str]) -> int:
    """Workers until told to end; then they drain."""
    supervising = asyncio.create_task(Supervisor(over_redis, devices, settings).run())
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, supervising.cancel)
    with suppress(asyncio.CancelledError):
        await supervising
    return 0


async def _check(settings: Settings) -> int:
    from service.broker_redis import workers

    assert settings.redis_url is not None
    mine = [w for w in await workers(settings.redis_url.get_secret_value()) if w.name.startswith(socket.gethostname())]
    return 0 if any(worker.ready for worker in mine) else 1


class _Server(uvicorn.Server):
    """Says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()


async def _run_when(listening: asyncio.Event, work: Coroutine[Any, Any, None]) -> None:
    """Workers that load torch at once would make the API's own start wait for a core."""
    try:
        await listening.wait()
    except asyncio.CancelledError:
        work.close()
        raise
    await work


if __name__ == "__main__":
    sys.exit(main())
