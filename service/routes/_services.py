"""What routes work with: built by `create_app`, kept on the application, never a global."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

from fastapi import Depends, Request

from service import errors
from service.accepts import Accepts
from service.broker import Broker, Job, WorkerState
from service.calibrations import Calibrations
from service.catalog import Catalog, Entry, Version
from service.drift import Drifts
from service.ensembles import Ensembles
from service.errors import Fault
from service.forecast import forecast
from service.metrics import Metrics
from service.settings import Settings

_TOKEN = re.compile(r"[\x21-\x7e]{1,128}")
_LARGEST_STRIDE = 2**31 - 1  # what every worker can hold; more steps than any model takes


@dataclass
class Services:
    settings: Settings
    broker: Broker
    catalog: Catalog
    limits: Accepts  # what settings allow, field by field
    calibrations: Calibrations
    ensembles: Ensembles
    metrics: Metrics = field(default_factory=Metrics)
    drifts: Drifts = field(default_factory=lambda: Drifts("", math.inf))
    calibrating: set[str] = field(default_factory=set)  # models whose new calibration is being made
    draining: bool = False  # shutting down: no longer ready

    async def model(self, model: str, loc: tuple[str | int, ...] = ("body", "model")) -> tuple[Entry, Version]:
        """A model that can be asked, and its version in service. Raises `UnknownModel` or `Unavailable`."""
        pool = await self.broker.pool()
        entry = self.entry(model, pool, loc)
        if entry.version is None or entry.status == "failed":
            raise errors.Unavailable(f"model: {model} cannot be used: {entry.error}")
        return entry, entry.version

    def entry(self, model: str, pool: Sequence[WorkerState], loc: tuple[str | int, ...]) -> Entry:
        """Raises `UnknownModel`."""
        try:
            return self.catalog.entry(model, pool)
        except KeyError:
            raise errors.UnknownModel(model, self.catalog.ids, loc) from None

    async def admit(self, job: Job) -> None:
        """Raises `TooLate` for a job that surely would not be done within its timeout (`service.forecast`)."""
        predicted = forecast(job, await self.broker.pool(), await self.broker.waiting())
        if predicted is not None and job.timeout is not None and predicted.least > job.timeout:
            raise errors.TooLate(job.timeout, predicted)


def limits(settings: Settings) -> Accepts:
    positive = {"type": "integer", "minimum": 1}
    return Accepts(
        {
            "n": {**positive, "maximum": settings.max_images},
            "preview_every": {**positive, "maximum": _LARGEST_STRIDE},
            "timeout": {"type": "number", "exclusiveMinimum": 0, "maximum": settings.request_timeout},
        }
    )


async def _services(request: Request) -> Services:  # async: else it would be called in a thread
    services: Services = request.app.state.services
    return services


Served: TypeAlias = Annotated[Services, Depends(_services)]


def tenant(request: Request) -> str:
    """Who asks: the header `Drawwell-Tenant`. Tenants of one model take turns. Raises `Invalid`."""
    return _token(request, "Drawwell-Tenant") or ""


def idempotency_key(request: Request) -> str | None:
    """Raises `Invalid`."""
    return _token(request, "Idempotency-Key")


def _token(request: Request, header: str) -> str | None:
    several = request.headers.getlist(header)
    if len(several) > 1:
        raise errors.Invalid(Fault(("header", header), "given more than once", several))
    given = several[0] if several else None
    if given is not None and not _TOKEN.fullmatch(given):
        raise errors.Invalid(
            Fault(("header", header), "takes 1 to 128 printable ASCII characters without spaces", given)
        )
    return given


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI: the problems that a route answers with."""
    content = {"application/problem+json": {"schema": {"$ref": "#/components/schemas/ProblemDetails"}}}
    meanings = {
        400: "The body cannot be parsed",
        403: "A setting of the server does not allow it",
        404: "There is no such model, or job",
        406: "None of the media types in Accept can be given",
        409: "Not as things stand: the models folder cannot be written, or another request is at it",
        413: "The body is too long",
        415: "The body is of another media type",
        422: "The request is not valid: `errors` names each field and its value",
        429: "The queue is full: Retry-After says when to come back, in seconds",
        500: "The server failed",
        503: "No worker is ready, the model cannot be used, or it would not be done in time",
        504: "The answer did not come in time",
    }
    return {status: {"description": meanings[status], "content": content} for status in statuses}
