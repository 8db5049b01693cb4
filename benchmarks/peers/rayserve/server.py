"""Ray Serve (https://docs.ray.io): `@serve.batch` as its page on dynamic request batching says, a replica a core.

Of the same page is that a batch may be an asynchronous generator: a request whose part is done is answered while the
rest of its batch goes on. No request can join meanwhile.
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncGenerator, Iterator
from typing import Any

import ray
from ray import serve
from starlette.requests import Request
from starlette.responses import Response

from benchmarks.peers._sampling import Asked, Painter

BATCH, WORKERS = int(os.environ["PEER_BATCH"]), int(os.environ["PEER_WORKERS"])


# Two batches of requests to a replica: one that is drawn, one that is collected.
@serve.deployment(num_replicas=WORKERS, max_ongoing_requests=2 * BATCH, ray_actor_options={"num_cpus": 1})
class Drawing:
    def __init__(self) -> None:
        self.painter = Painter.from_environment()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=float(os.environ["PEER_WAIT"]))
    async def draw(self, asked: list[Asked]) -> AsyncGenerator[list[Any], None]:
        """Yields, whenever requests are finished, their PNGs and None for the others; then ends those requests."""
        answers: Iterator[tuple[int, bytes]] = self.painter.finishing(asked)
        over: set[int] = set()
        while (found := await asyncio.to_thread(next, answers, None)) is not None:
            index, png = found
            yield [png if i == index else StopIteration if i in over else None for i in range(len(asked))]
            over.add(index)
            yield [StopIteration if i in over else None for i in range(len(asked))]

    async def __call__(self, request: Request) -> Response:
        png = b""
        async for part in self.draw(Asked(**await request.json())):
            png = part or png
        return Response(png, media_type="image/png")


def main() -> None:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    ray.init(num_cpus=WORKERS + 1, include_dashboard=False, object_store_memory=10**8, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(os.environ["PEER_PORT"])})
    deployment: Any = Drawing  # the decorator has made one of it
    serve.run(deployment.bind(), route_prefix="/generate")
    ended.wait()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
