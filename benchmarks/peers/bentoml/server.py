"""BentoML (https://docs.bentoml.com): adaptive batching as its page of that name says: a service that draws batches,
with a worker for each core, and one before it that takes single requests with several parameters.

    bentoml serve benchmarks.peers.bentoml.server:Front
"""

# No `from __future__ import annotations`: BentoML reads the annotations.
import base64
import os
from typing import Annotated

import bentoml
from bentoml.validators import ContentType
from pydantic import BaseModel

from benchmarks.peers._sampling import Asked, Painter

LIMITS = {"timeout": 3600, "max_concurrency": 100_000}  # BentoML would refuse what has waited for a minute


class Request(BaseModel):
    model: str
    n: int = 1
    steps: int | None = None
    seed: int = 0


@bentoml.service(workers=int(os.environ["PEER_WORKERS"]), traffic=LIMITS)
class Drawing:
    def __init__(self) -> None:
        self.painter = Painter.from_environment()

    @bentoml.api(
        batchable=True, max_batch_size=int(os.environ["PEER_BATCH"]), max_latency_ms=int(os.environ["PEER_LATENCY_MS"])
    )
    def draw(self, requests: list[Request]) -> list[str]:
        return [
            base64.b64encode(png).decode() for png in self.painter.draw([Asked(**r.model_dump()) for r in requests])
        ]


@bentoml.service(workers=1, traffic=LIMITS)
class Front:
    drawing = bentoml.depends(Drawing)

    @bentoml.api(route="/generate")
    async def generate(
        self, model: str, n: int = 1, steps: int | None = None, seed: int = 0
    ) -> Annotated[bytes, ContentType("image/png")]:
        answers = await self.drawing.to_async.draw([Request(model=model, n=n, steps=steps, seed=seed)])
        return base64.b64decode(answers[0])
