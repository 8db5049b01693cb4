"""POST /generate: draw images."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import secrets
import uuid
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import APIRouter, Request, Response

from service import errors, images, sse, tracing
from service.bodies import JSON, preferred, read_json
from service.broker import Job
from service.drawing import Drawing
from service.errors import Fault
from service.jobs import attend, follow, outcome, unless_hung_up
from service.messages import Generate, pack
from service.routes._services import Served, Services, idempotency_key, problems, tenant
from service.schemas import GenerateRequest, GenerateResponse, JobResponse

router = APIRouter(tags=["images"])

_PNG = images.MEDIA_TYPES["png"]
_PICKED_SEEDS = 2**53  # JavaScript's numbers hold every integer below
_MODEL_FIELDS = ("steps", "solver", "label", "prompt", "guidance_scale", "temperature", "top_k")
_LIMITED_FIELDS = ("n", "preview_every", "timeout")


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        202: {"model": JobResponse, "description": "With `Prefer: respond-async`: come back to Location"},
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
    `Drawwell-Seed`); with `Accept: text/event-stream` or `"stream": true` a stream of the events `queued {position,
    eta_seconds}`, `progress {step, steps, eta_seconds, preview?}`, `image {sample, b64_json}`, `completed {the answer
    without images}` and `error {problem}`. Hanging up cancels. With `Prefer: respond-async` the answer is 202 at once,
    and the job at `Location` goes on by itself.

    With an `Idempotency-Key` the same request again is answered by the same job, attached to while it runs and replayed
    when it is done; hanging up does not cancel it.
    """
    body = await read_json(request, GenerateRequest)
    answer = sse.MEDIA_TYPE if body.stream else preferred(request.headers.get("accept"), (JSON, sse.MEDIA_TYPE, _PNG))
    if answer == _PNG and body.format != "png":
        raise errors.Invalid(Fault(("body", "format"), f"Accept: {_PNG} gives png alone", body.format))
    later = _prefers_async(request)
    deadline = asyncio.get_running_loop().time() + (body.timeout or services.settings.request_timeout)
    streamed = answer == sse.MEDIA_TYPE
    drawing, job = await _resolve(body, services, request, streamed=later or streamed)
    watch = services.metrics.job(job.model, "draw")
    if later or job.key is not None:  # it may be that an earlier request's job stands for this one
        job_id = await services.broker.submit(job)
        mine = job_id == job.id
        job = (await services.broker.status(job_id)).job
        drawing = Drawing.unpack(job.about)
        told_of = attend(services.broker, job, watch=watch if mine else None, waits=streamed)
    else:
        told_of = follow(services.broker, job, watch, waits=streamed)
    if later:
        accepted = JobResponse(id=job_id, model=job.model, status="queued")
        headers = {"Location": f"/jobs/{job_id}", "Preference-Applied": "respond-async"}
        return Response(accepted.model_dump_json(), 202, headers, JSON)
    if streamed:
        return await _stream(drawing.events(told_of), deadline, services)
    told = await unless_hung_up(request.receive, outcome(told_of, deadline))
    if answer == _PNG:
        sheet = images.grid(drawing.complete(told)[1])
        content = await images.off_loop(sheet.size, images.encode, sheet, "png")
        return Response(content, media_type=_PNG, headers={"Drawwell-Seed": str(drawing.seed)})
    return Response((await drawing.whole(told)).model_dump_json(), media_type=JSON)


def _prefers_async(request: Request) -> bool:
    """Prefer: respond-async (RFC 7240, 4.1)."""
    preferences = ",".join(request.headers.getlist("prefer")).lower().split(",")
    return any(preference.partition(";")[0].strip() == "respond-async" for preference in preferences)


async def _resolve(
    body: GenerateRequest, services: Services, request: Request, *, streamed: bool
) -> tuple[Drawing, Job]:
    """Check a request against its model and the limits, and fill in what it leaves open."""
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
    image = version.spec.image
    drawing = Drawing(
        id=uuid.uuid4().hex,
        model=body.model,
        family=version.spec.family,
        model_sha256=version.weights_sha256,
        n=body.n,
        steps=asked.steps,
        seed=asked.seed,
        width=image.width,
        height=image.height,
        channels=image.channels,
        format=body.format,
    )
    job = Job(
        id=drawing.id,
        model=body.model,
        payload=pack(asked),
        rows=body.n,
        units=body.n * asked.steps * evaluations,
        steps=version.spec.ticks(asked.steps, asked.solver),
        priority=body.priority,
        timeout=body.timeout or services.settings.request_timeout,
        tenant=tenant(request),
        key=idempotency_key(request),
        digest=hashlib.sha256(body.model_dump_json().encode()).hexdigest(),
        about=drawing.pack(),
        trace=tracing.carried(),
    )
    if job.key is None:  # else it may be a job that is done already
        surely = 1 if asked.solver in version.spec.adaptive else job.steps
        await services.admit(dataclasses.replace(job, steps=surely))
    return drawing, job


def _given(body: GenerateRequest, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name in names if (value := getattr(body, name)) is not None}


async def _stream(events: AsyncGenerator[bytes], deadline: float, services: Services) -> Response:
    async with asyncio.timeout_at(deadline):
        first = await anext(events)  # submits, before the answer begins: so a refusal has a status of its own
    return sse.EventStream(first, events, deadline, services.settings.keep_alive_seconds)
