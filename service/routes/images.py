"""POST /generate: draw images."""

from __future__ import annotations

import asyncio
import secrets
import uuid
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response

from service import errors, images, sse
from service.bodies import JSON, preferred, read_json
from service.broker import Job
from service.catalog import Version
from service.errors import Fault
from service.jobs import Queued, Told, follow, outcome, unless_hung_up
from service.messages import Completed, Generate, ImageDone, Pixels, Progress, pack
from service.routes._services import Served, Services, problems
from service.schemas import GenerateRequest, GenerateResponse, Generation, Image, Usage

router = APIRouter(tags=["images"])

_PNG = images.MEDIA_TYPES["png"]
_PICKED_SEEDS = 2**53  # JavaScript's numbers hold every integer below
_MODEL_FIELDS = ("steps", "solver", "label", "prompt", "guidance_scale", "temperature")
_LIMITED_FIELDS = ("n", "preview_every", "timeout")


@dataclass(frozen=True)
class Drawing:
    """A generate request with everything resolved."""

    request: GenerateRequest
    version: Version
    asked: Generate
    job: Job
    deadline: float  # on the event loop's clock

    def generation(self, completed: Completed) -> Generation:
        spec = self.version.spec
        return Generation(
            id=self.job.id,
            model=self.job.model,
            family=spec.family,
            steps=self.asked.steps,
            seed=self.asked.seed,
            width=spec.image.width,
            height=spec.image.height,
            channels=spec.image.channels,
            usage=Usage(
                queue_seconds=completed.queue_seconds,
                compute_seconds=completed.compute_seconds,
                network_evaluations=completed.network_evaluations,
            ),
            model_sha256=self.version.weights_sha256,
        )


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: {
            "description": "The images: as JSON, as one PNG (more than one: a grid), or as a stream of events",
            "content": {
                _PNG: {"schema": {"type": "string", "format": "binary"}},
                sse.MEDIA_TYPE: {
                    "schema": {"type": "string"},
                    "example": 'event: queued\ndata: {"position": 0}\n\nevent: progress\ndata: {"step": 10, "steps": 50, "eta_seconds": 1.5}\n\n',
                },
            },
        },
        **problems(400, 404, 406, 413, 415, 422, 429, 500, 503, 504),
    },
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/GenerateRequest"}}},
        }
    },
)
async def generate(request: Request, services: Served) -> Response:
    """Draw images.

    The answer is JSON; with `Accept: image/png` one PNG (more than one image: a grid; the seed is in the header `Drawwell-Seed`);
    with `Accept: text/event-stream` or `"stream": true` a stream of the events `queued {position}`,
    `progress {step, steps, eta_seconds, preview?}`, `image {sample, b64_json}`, `completed {the answer without images}` and
    `error {problem}`. Hanging up cancels.
    """
    body = await read_json(request, GenerateRequest)
    answer = sse.MEDIA_TYPE if body.stream else preferred(request.headers.get("accept"), (JSON, sse.MEDIA_TYPE, _PNG))
    if answer == _PNG and body.format != "png":
        raise errors.Invalid(Fault(("body", "format"), f"Accept: {_PNG} gives png alone", body.format))
    drawing = await _resolve(body, services, streamed=answer == sse.MEDIA_TYPE)
    if answer == sse.MEDIA_TYPE:
        return await _stream(drawing, services)
    told = await unless_hung_up(request.receive, outcome(services.broker, drawing.job, drawing.deadline))
    completed, drawn = _complete(told, drawing.asked.n)
    if answer == _PNG:
        sheet = images.grid(drawn)
        content = await images.off_loop(sheet.size, images.encode, sheet, "png")
        return Response(content, media_type=_PNG, headers={"Drawwell-Seed": str(drawing.asked.seed)})
    encoded = await images.off_loop(
        sum(pixels.size for pixels in drawn), lambda: [images.encode_base64(pixels, body.format) for pixels in drawn]
    )
    seed = drawing.asked.seed
    whole = GenerateResponse(
        **drawing.generation(completed).model_dump(),
        images=[Image(b64_json=b64, seed=seed, sample=k) for k, b64 in enumerate(encoded)],
    )
    return Response(whole.model_dump_json(), media_type=JSON)


async def _resolve(body: GenerateRequest, services: Services, *, streamed: bool) -> Drawing:
    """Check a request against its model and the limits, and fill in what it leaves open."""
    deadline = asyncio.get_running_loop().time() + (body.timeout or services.settings.request_timeout)
    _, version = await services.model(body.model)
    given = _given(body, _MODEL_FIELDS)
    faults = services.limits.faults(_given(body, _LIMITED_FIELDS), "this server")
    faults += version.accepts.faults(given, body.model)
    if faults:
        raise errors.Invalid(*faults)
    values = {name: given.get(name, version.accepts.default(name)) for name in _MODEL_FIELDS}
    guidance = 1.0 if values["guidance_scale"] is None else float(values["guidance_scale"])
    asked = Generate(
        n=body.n,
        seed=secrets.randbelow(_PICKED_SEEDS) if body.seed is None else body.seed,
        steps=int(values["steps"]),
        solver=values["solver"],
        label=version.spec.label_index(values["label"]),
        prompt=values["prompt"],
        guidance_scale=guidance,
        temperature=1.0 if values["temperature"] is None else float(values["temperature"]),
        preview_every=body.preview_every if streamed else None,  # no other answer has a place for them
    )
    # Guidance asks the network twice a step: with the condition, and without.
    evaluations = version.spec.steps.network_evaluations_per_step * (2 if guidance != 1 else 1)
    job = Job(
        id=uuid.uuid4().hex,
        model=body.model,
        payload=pack(asked),
        rows=body.n,
        units=body.n * asked.steps * evaluations,
        priority=body.priority,
        timeout=body.timeout or services.settings.request_timeout,
    )
    return Drawing(body, version, asked, job, deadline)


def _given(body: GenerateRequest, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(body, name)) is not None}


def _complete(told: list[Told], n: int) -> tuple[Completed, list[Pixels]]:
    """The images of a finished job in order. A worker that told fewer than it was asked for is a fault of ours."""
    drawn = {message.sample: message.pixels for message in told if isinstance(message, ImageDone)}
    completed = told[-1]
    if not isinstance(completed, Completed) or drawn.keys() != set(range(n)):
        raise RuntimeError(f"a job of {n} images ended with {sorted(drawn)} and {type(completed).__name__}")
    return completed, [drawn[k] for k in range(n)]


async def _stream(drawing: Drawing, services: Services) -> Response:
    """Submits before the answer begins, so that a refusal has its own status."""
    told = follow(services.broker, drawing.job)
    try:
        async with asyncio.timeout_at(drawing.deadline):
            first = await anext(told)
    except BaseException:
        await told.aclose()
        raise
    return sse.EventStream(_events(first, told, drawing), drawing.deadline, services.settings.keep_alive_seconds)


async def _events(first: Told, told: AsyncGenerator[Told], drawing: Drawing) -> AsyncGenerator[bytes]:
    async with aclosing(told):
        for event in await _told_as(first, drawing):
            yield event
        async for message in told:
            for event in await _told_as(message, drawing):
                yield event


async def _told_as(message: Told, drawing: Drawing) -> list[bytes]:
    """The events that tell a message: one, or none."""
    format = drawing.request.format
    match message:
        case Queued(position=position):
            return [sse.event("queued", {"position": position})]
        case Progress(previews=previews):
            data: Mapping[str, Any] = {"step": message.step, "steps": message.steps, "eta_seconds": message.eta_seconds}
            if previews:
                work = sum(p.size for p in previews)
                data = {
                    **data,
                    "preview": await images.off_loop(work, lambda: [images.encode_base64(p, format) for p in previews]),
                }
            return [sse.event("progress", data)]
        case ImageDone(sample=sample, pixels=pixels):
            b64 = await images.off_loop(pixels.size, images.encode_base64, pixels, format)
            return [sse.event("image", {"sample": sample, "b64_json": b64})]
        case Completed():
            return [sse.event("completed", drawing.generation(message))]
    return []
