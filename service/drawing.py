"""What a generate request asked for, and how its answers look: whole, as events, or as a job to come back for.

A `Drawing` travels with its job, so that any API process can give the answer.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from service import images, sse, tracing
from service.jobs import Queued, Told
from service.messages import Completed, ImageDone, Pixels, Progress
from service.schemas import Format, GenerateResponse, Generation, Image, Usage


@dataclass(frozen=True)
class Drawing:
    """All that an answer needs, besides what the worker tells."""

    id: str  # of the job
    model: str
    family: str
    model_sha256: str
    n: int
    steps: int
    seed: int
    width: int
    height: int
    channels: int
    format: Format

    def pack(self) -> bytes:
        return json.dumps(vars(self)).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> Drawing:
        return cls(**json.loads(packed))

    def generation(self, completed: Completed) -> Generation:
        """The answer without its images."""
        usage = Usage(
            queue_seconds=completed.queue_seconds,
            compute_seconds=completed.compute_seconds,
            network_evaluations=completed.network_evaluations,
        )
        return Generation(
            id=self.id,
            model=self.model,
            family=self.family,
            steps=self.steps,
            seed=self.seed,
            width=self.width,
            height=self.height,
            channels=self.channels,
            usage=usage,
            model_sha256=self.model_sha256,
            precision=completed.precision,
        )

    def complete(self, told: Sequence[Told]) -> tuple[Completed, list[Pixels]]:
        """The images of a finished job in order. A worker that told fewer than it was asked for is a fault of ours."""
        drawn = {message.sample: message.pixels for message in told if isinstance(message, ImageDone)}
        completed = told[-1] if told else None
        if not isinstance(completed, Completed) or drawn.keys() != set(range(self.n)):
            raise RuntimeError(f"a job of {self.n} images ended with {sorted(drawn)} and {type(completed).__name__}")
        return completed, [drawn[k] for k in range(self.n)]

    async def whole(self, told: Sequence[Told]) -> GenerateResponse:
        completed, drawn = self.complete(told)
        encoded = await _encode(drawn, self.format)
        return GenerateResponse(
            **self.generation(completed).model_dump(),
            images=[Image(b64_json=b64, seed=self.seed, sample=k) for k, b64 in enumerate(encoded)],
        )

    async def events(self, told: AsyncGenerator[tuple[Told, int]]) -> AsyncGenerator[bytes]:
        """What is told, as server-sent events."""
        async with aclosing(told) as messages:
            async for message, number in messages:
                if (event := await self._event(message, number)) is not None:
                    yield event

    async def _event(self, message: Told, number: int) -> bytes | None:
        match message:
            case Queued(position=position, eta_seconds=eta):
                return sse.event("queued", {"position": position, "eta_seconds": eta})
            case Progress(step=step, steps=steps, eta_seconds=eta, previews=previews):
                data: dict[str, Any] = {"step": step, "steps": steps, "eta_seconds": eta}
                if previews:
                    begun = iter(await _encode([pixels for pixels in previews if pixels is not None], self.format))
                    data["preview"] = [None if pixels is None else next(begun) for pixels in previews]
                return sse.event("progress", data, number)
            case ImageDone(sample=sample, pixels=pixels):
                (b64,) = await _encode([pixels], self.format)
                return sse.event("image", {"sample": sample, "b64_json": b64}, number)
            case Completed():
                return sse.event("completed", self.generation(message), number)
        return None


async def _encode(drawn: Iterable[Pixels], format: Format) -> list[str]:
    """Base64 of each image."""
    pictures = list(drawn)

    def work() -> list[str]:
        return [images.to_base64(images.encode(pixels, format)) for pixels in pictures]

    with tracing.span("encode", images=len(pictures), format=format):
        return await images.off_loop(sum(pixels.size for pixels in pictures), work)
