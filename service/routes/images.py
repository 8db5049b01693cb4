"""POST /generate: draw images."""

from __future__ import annotations

import asyncio
import base64
import secrets
import uuid
from collections.abc import AsyncGenerator, Sequence
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
from service.schemas import Format, GenerateRequest, GenerateResponse, Generation, Image, Usage

router = APIRouter(tags=["images"])

_PNG = images.MEDIA_TYPES["png"]
_PICKED_SEEDS = 2**53  # JavaScript's numbers hold every integer below
_MODEL_FIELDS = ("steps", "solver", "label", "prompt", "guidance_scale", "temperature", "top_k")
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
                    "example": 'event: progress\ndata: {"step": 10, "steps": 50, "eta_seconds": 1.5}\n\n',
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

    The answer is JSON; with `Accept: image/png` one PNG (more than one image: a grid; the seed is in the header
    `Drawwell-Seed`); with `Accept: text/event-stream` or `"stream": true` a stream of the events `queued {position}`,
    `progress {step, steps, eta_seconds, preview?}`, `image {sample, b64_json}`, `completed {the answer without images}`
    and `error {problem}`. Hanging up cancels.
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
    encoded = await _encode(drawn, body.format)
    whole = GenerateResponse(
        **drawing.generation(completed).model_dump(),
        images=[Image(b64_json=b64, seed=drawing.asked.seed, sample=k) for k, b64 in enumerate(encoded)],
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
        top_k=values["top_k"],
        preview_every=body.preview_every if streamed else None,  # no other answer has a place for them
    )
    # Guidance asks the network twice a step: with the condition, and without.
    guided = guidance != 1 and (asked.label is not None or asked.prompt is not None)
    evaluations = version.spec.steps.network_evaluations_per_step * (2 if guided else 1)
    evaluations *= version.spec.evaluations.get(asked.solver or "", 1)
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
    events = _events(drawing, services)
    async with asyncio.timeout_at(drawing.deadline):
        first = await anext(events)  # submits, before the answer begins: so a refusal has a status of its own
    return sse.EventStream(first, events, drawing.deadline, services.settings.keep_alive_seconds)


async def _events(drawing: Drawing, services: Services) -> AsyncGenerator[bytes]:
    async with aclosing(follow(services.broker, drawing.job)) as told:
        async for message in told:
            if (event := await _event(message, drawing)) is not None:
                yield event


async def _event(message: Told, drawing: Drawing) -> bytes | None:
    """The event that tells a message; None where there is none."""
    format = drawing.request.format
    match message:
        case Queued(position=position):
            return sse.event("queued", {"position": position})
        case Progress(step=step, steps=steps, eta_seconds=eta, previews=previews):
            data: dict[str, Any] = {"step": step, "steps": steps, "eta_seconds": eta}
            if previews:
                begun = iter(await _encode([pixels for pixels in previews if pixels is not None], format))
                data["preview"] = [None if pixels is None else next(begun) for pixels in previews]
            return sse.event("progress", data)
        case ImageDone(sample=sample, pixels=pixels):
            (b64,) = await _encode([pixels], format)
            return sse.event("image", {"sample": sample, "b64_json": b64})
        case Completed():
            return sse.event("completed", drawing.generation(message))
    return None


async def _encode(drawn: Sequence[Pixels], format: Format) -> list[str]:
    """Base64 of each image."""

    def work() -> list[str]:
        return [base64.b64encode(images.encode(pixels, format)).decode("ascii") for pixels in drawn]

    return await images.off_loop(sum(pixels.size for pixels in drawn), work)
