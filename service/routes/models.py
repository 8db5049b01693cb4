"""GET /models, GET /models/{id}: what there is, and what each takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse

from service.broker import WorkerState
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
    pool = await services.broker.pool()
    return JSONResponse(
        {**_to_json(services.entry(model_id, pool, ("path", "model_id"))), "load": _load(model_id, pool)}
    )


def _load(model_id: str, pool: Sequence[WorkerState]) -> dict[str, Any]:
    """What its workers do at present, by what is done with it."""
    found: dict[str, dict[str, Any]] = {}
    for worker in pool:
        for name, load in worker.load.items():
            model, _, kind = name.rpartition("/")
            if model != model_id:
                continue
            lane = found.setdefault(kind, {"workers": 0, "running": 0, "waiting": 0, "steps": 0, "costs": []})
            lane["workers"] += 1
            lane["running"] += load.running
            lane["waiting"] += load.waiting
            lane["steps"] += load.steps
            lane["costs"].append({"row_seconds": load.row_seconds, "step_seconds": load.step_seconds})
    return found


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
