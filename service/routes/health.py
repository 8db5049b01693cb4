"""GET /healthz: the process lives. GET /readyz: it can do its work. GET /metrics: how it does."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from service import errors
from service.routes._services import Served, problems
from service.schemas import Health

_TEXT = CONTENT_TYPE_LATEST.partition(";")[0]

router = APIRouter(tags=["health"])


@router.get("/healthz", response_model=Health)
async def healthz() -> Health:
    """The process lives."""
    return Health(status="ok")


@router.get("/metrics", response_class=Response, responses={200: {"content": {_TEXT: {}}}, **problems(503)})
async def metrics(services: Served) -> Response:
    """Prometheus: this API process' counters, and what the workers last told of themselves."""
    pool, units = await services.broker.pool(), await services.broker.queued_units()
    return Response(services.metrics.exposition(pool, units, services.drifts), media_type=CONTENT_TYPE_LATEST)


@router.get("/readyz", response_model=Health, responses=problems(503))
async def readyz(services: Served) -> Health | Response:
    """A worker has tried every model and warmed up those that work; 503 before that, and while shutting down."""
    if services.draining:
        return errors.Unavailable("shutting down").response()  # not raised: nobody is refused
    pool = await services.broker.pool()
    if not any(worker.ready for worker in pool):
        what = f"{len(pool)} workers are connected, none is ready yet" if pool else "no worker is connected"
        return errors.Unavailable(what).response()
    return Health(status="ready")
