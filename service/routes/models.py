"""GET /models, GET /models/{id}: what there is, and what each takes."""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from service.catalog import Entry
from service.routes._services import Served, problems
from service.schemas import ModelEntry, ModelList

router = APIRouter(prefix="/models", tags=["models"])


@router.get("", response_model=ModelList, responses=problems(500))
async def list_models(services: Served) -> Response:
    """Every model, by id."""
    pool = await services.broker.pool()
    return JSONResponse({"models": [_to_json(entry) for entry in services.catalog.entries(pool)]})


@router.get("/{model_id}", response_model=ModelEntry, responses=problems(404, 422))
async def get_model(model_id: str, services: Served) -> Response:
    """One model."""
    return JSONResponse(_to_json(services.entry(model_id, await services.broker.pool(), ("path", "model_id"))))


def _to_json(entry: Entry) -> dict[str, Any]:
    version = entry.version
    return {
        "id": entry.id,
        "status": entry.status,
        "resident": entry.resident,
        **({"error": entry.error} if entry.error is not None else {}),
        **(version.spec.model_dump(mode="json") if version else {}),
        "metrics": version.metrics if version else {},
        "sha256": version.weights_sha256 if version else None,
        "execution": dataclasses.asdict(entry.execution) if entry.execution else None,
    }
