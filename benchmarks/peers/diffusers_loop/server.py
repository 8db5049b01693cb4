"""FastAPI around a sampling loop, as a pipeline of diffusers is commonly served: a lock, one request at a time, its n
images as one batch. As many processes as there are cores, or one with all of their threads.

    uvicorn benchmarks.peers.diffusers_loop.server:app --workers 2
"""

from __future__ import annotations

import threading

from fastapi import FastAPI, Response
from pydantic import BaseModel

from benchmarks.peers._sampling import Asked, Painter

app = FastAPI()
painter, lock = Painter.from_environment(), threading.Lock()


class Request(BaseModel):
    model: str
    n: int = 1
    steps: int | None = None
    seed: int = 0


@app.post("/generate")
def generate(request: Request) -> Response:
    with lock:
        (png,) = painter.draw([Asked(**request.model_dump())])
    return Response(png, media_type="image/png")
