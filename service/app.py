"""The API process: HTTP in, jobs out. It holds no weights and imports no torch."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service import errors
from service.broker import Broker
from service.calibrations import Calibrations
from service.catalog import Catalog
from service.drift import Drifts
from service.ensembles import Ensembles
from service.middleware import BodyLimit, Heads, RequestContext
from service.routes import calibrations as calibration_routes
from service.routes import health, images, jobs, models, scores
from service.routes._services import Services, limits
from service.schemas import (
    CalibrationOptions,
    CalibrationRequest,
    ChooseCalibration,
    GenerateRequest,
    ProblemDetails,
    ScoreOptions,
    ScoreRequest,
)
from service.settings import Settings

VERSION = "0.1.0"


def create_app(settings: Settings, broker: Broker, catalog: Catalog) -> FastAPI:
    """The application. While it runs it keeps the catalog fresh; starting broker and workers is the caller's."""
    calibrations, ensembles = Calibrations(settings.models, settings.catalog_poll_seconds), Ensembles(settings.models)
    services = Services(settings, broker, catalog, limits(settings), calibrations, ensembles)
    services.drifts = Drifts(settings.drift_models, settings.drift_bound)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        await asyncio.to_thread(catalog.refresh)
        watching = asyncio.create_task(catalog.watch(settings.catalog_poll_seconds))
        try:
            yield
        finally:
            services.draining = True
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    app = _App(
        title="Drawwell",
        version=VERSION,
        summary="Draws images from every family of deep generative model, and says how likely an image is.",
        lifespan=lifespan,
    )
    app.state.services = services
    for routes in (images, scores, jobs, models, calibration_routes, health):
        app.include_router(routes.router)
    errors.install(app)
    app.add_middleware(
        BodyLimit,
        limit=settings.max_body_bytes,
        larger={r"/models/[^/]+/calibration": settings.max_calibration_bytes},
    )
    app.add_middleware(RequestContext, metrics=services.metrics)
    app.add_middleware(Heads)  # the last added is the outermost
    return app


class _App(FastAPI):
    def openapi(self) -> dict[str, Any]:
        """The framework's document, completed with the bodies that routes read by themselves."""
        if self.openapi_schema is None:
            document = super().openapi()
            document["components"]["schemas"].update(_bodies())
        return super().openapi()


def _bodies() -> dict[str, Any]:
    requests: list[type[BaseModel]] = [GenerateRequest, ScoreRequest, CalibrationRequest, ChooseCalibration]
    bodies: list[type[BaseModel]] = [*requests, ScoreOptions, CalibrationOptions, ProblemDetails]
    forms = (ScoreOptions, CalibrationOptions)
    _, found = models_json_schema(
        [(body, "validation") for body in bodies],
        ref_template="#/components/schemas/{model}",
    )
    schemas: dict[str, Any] = found["$defs"]
    files = {
        "type": "array",
        "items": {"type": "string", "format": "binary"},
        "description": "PNG, JPEG, WebP or npy files",
    }
    for options in forms:
        form = schemas.pop(options.__name__)
        name = options.__name__.replace("Options", "Form")
        schemas[name] = {
            **form,
            "title": name,
            "properties": {**form["properties"], "images": files},
            "required": [*form.get("required", []), "images"],
        }
    return schemas
