"""/jobs/{id}: come back for what was asked for with `Prefer: respond-async`, or with an `Idempotency-Key`."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from service import errors, sse
from service.bodies import JSON
from service.broker import JobLost, Status
from service.drawing import Drawing
from service.errors import Fault
from service.jobs import attend, queued, so_far
from service.messages import Completed, Failed, Progress, unpack
from service.routes._services import Served, Services, problems
from service.schemas import JobProgress, JobResponse, ProblemDetails

router = APIRouter(prefix="/jobs", tags=["jobs"])


@router.get("/{job_id}", response_model=JobResponse, responses=problems(404, 422, 503))
async def get_job(job_id: str, services: Served) -> Response:
    """How far a job is; its answer, or why there is none, once it has ended. Kept for a while after that."""
    status, drawing = await _known(job_id, services)
    return Response((await _describe(status, drawing, services)).model_dump_json(), media_type=JSON)


@router.get(
    "/{job_id}/events",
    response_class=Response,
    responses={
        200: {"description": "The job's events, as POST /generate streams them", "content": {sse.MEDIA_TYPE: {}}},
        204: {"description": "The job has ended, and `Last-Event-ID` was its last event"},
        **problems(404, 422, 503),
    },
)
async def get_events(
    job_id: str, services: Served, last_event_id: Annotated[str | None, Header(alias="Last-Event-ID")] = None
) -> Response:
    """The job's events from its first on, or from the one after `Last-Event-ID`. Hanging up does not cancel.

    Where the last one has been seen the answer is 204, on which an EventSource stops asking.
    """
    status, drawing = await _known(job_id, services)
    after = 0
    if last_event_id:
        if not last_event_id.isdecimal() or len(last_event_id) > 9:
            raise errors.Invalid(Fault(("header", "Last-Event-ID"), "no event has this id", last_event_id))
        after = int(last_event_id)
    if after and status.state == "ended" and await _all_seen(status.job.id, after, services):
        return Response(status_code=204)
    events = drawing.events(attend(services.broker, status.job, after, waits=after == 0 or status.state == "queued"))
    deadline = asyncio.get_running_loop().time() + services.settings.request_timeout
    return sse.EventStream(b"", events, deadline, services.settings.keep_alive_seconds)


@router.delete("/{job_id}", status_code=204, responses=problems(404, 422, 503))
async def cancel_job(job_id: str, services: Served, request: Request) -> Response:
    """Stop a job at its next step. One that has ended stays as it ended."""
    status, _ = await _known(job_id, services)
    if status.state != "ended":
        services.metrics.cancelled("deleted")
    await services.broker.cancel(job_id)
    return Response(status_code=204)


async def _all_seen(job_id: str, after: int, services: Services) -> bool:
    """Whether a job that has ended told nothing after that event, and its end is no error, which has no number."""
    last = None
    try:
        async for event in services.broker.events(job_id, wait=False):
            last = event
    except JobLost:
        return False
    return last is not None and last.number <= after and isinstance(unpack(last.payload), Completed)


async def _known(job_id: str, services: Services) -> tuple[Status, Drawing]:
    try:
        status = await services.broker.status(job_id)
    except KeyError:
        status = None
    if status is None or not status.job.about:
        raise errors.UnknownJob(job_id) from None
    return status, Drawing.unpack(status.job.about)


async def _describe(status: Status, drawing: Drawing, services: Services) -> JobResponse:
    job_id = status.job.id
    found = JobResponse(id=job_id, model=status.job.model, status=status.state if status.state != "ended" else "done")
    if status.state == "queued":
        place = await queued(services.broker, status.job)
        return found.model_copy(update={"position": place.position, "eta_seconds": place.eta_seconds})
    try:
        told = await so_far(services.broker, job_id)
    except JobLost as e:
        return _ended(found, errors.problem_of(e))
    last = told[-1] if told else None
    if isinstance(last, Failed):
        return _ended(found, errors.failure(last))
    if isinstance(last, Completed):
        return found.model_copy(update={"status": "done", "answer": await drawing.whole(told)})
    progress = next((m for m in reversed(told) if isinstance(m, Progress)), None)
    if progress is not None:
        told_of = JobProgress(step=progress.step, steps=progress.steps, eta_seconds=progress.eta_seconds)
        found = found.model_copy(update={"progress": told_of})
    return found.model_copy(update={"status": "running"})


def _ended(found: JobResponse, problem: errors.Problem) -> JobResponse:
    details = ProblemDetails(**problem.to_json())
    cancelled = isinstance(problem, errors.Interrupted)
    return found.model_copy(update={"status": "cancelled" if cancelled else "failed", "problem": details})
