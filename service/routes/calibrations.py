"""GET, POST and PUT /models/{id}/calibration: what counts as normal for a model, told by images of the user's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

from fastapi import APIRouter, Request, Response

from service import errors, recalibration, writes
from service.bodies import JSON, MULTIPART, media_type, read_form, read_json, require_media_type
from service.broker import KeyTaken
from service.calibration_store import Unwritable
from service.calibrations import CAME_WITH_THE_MODEL, Known, told
from service.errors import Fault
from service.jobs import unless_hung_up
from service.routes._scoring import decoded, scorer_of
from service.routes._services import Served, Services, idempotency_key, problems, tenant
from service.schemas import (
    CalibrationOptions,
    CalibrationRequest,
    CalibrationVersion,
    CalibrationVersions,
    ChooseCalibration,
)
from service.scoring import How, Scorer

P = ParamSpec("P")
R = TypeVar("R")

router = APIRouter(prefix="/models/{model_id}/calibration", tags=["calibrations"])

_LOC = ("path", "model_id")


@router.get("", response_model=CalibrationVersions, responses=problems(404, 422, 503))
async def list_calibrations(model_id: str, services: Served) -> Response:
    """The calibrations of a model, which of them is in use, and which were made for other weights."""
    scorer = await scorer_of(model_id, services, _LOC)
    return _json(await _listed(scorer, services))


@router.post(
    "",
    status_code=201,
    response_model=CalibrationVersion,
    responses=problems(400, 403, 404, 409, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/CalibrationRequest"}},
                MULTIPART: {"schema": {"$ref": "#/components/schemas/CalibrationForm"}},
            },
        }
    },
)
async def calibrate(model_id: str, request: Request, services: Served) -> Response:
    """Calibrate a model, without retraining it, on images that are all normal.

    Each is scored like any other, with priority `batch`. Half of them, by the hash of their bytes, choose and fit the
    detector; the scores of the others become p-values. The new calibration is in use from then on, at every replica;
    the old ones are kept, and `PUT` goes back to one.

    Duplicates, images of another size and too few images are refused. Hanging up cancels. With an `Idempotency-Key` the
    same request again is answered with what the first one made; another request with that key is refused.
    """
    writes.check(request, services.settings)
    require_media_type(request, JSON, MULTIPART)
    options: CalibrationOptions
    files: Sequence[str | bytes]
    most = services.settings.max_calibration_images
    if media_type(request) == JSON:
        options = body = await read_json(request, CalibrationRequest)
        files = body.images
    else:
        options, files = await read_form(request, CalibrationOptions, "images", most + 1)
    scorer = await scorer_of(model_id, services, _LOC)
    key = idempotency_key(request)
    if key is not None and (before := await _made_with(key, scorer, options, files, services)) is not None:
        return _json(before)
    recalibration.check_count(len(files), scorer.version.spec.image, most)
    if model_id in services.calibrating:
        raise errors.Conflict(f"{model_id} is being calibrated by another request; wait for it, or cancel it")
    services.calibrating.add(model_id)
    try:
        work = _calibrate(scorer, options, files, key, tenant(request), services)
        made = await unless_hung_up(request.receive, work)
    finally:
        services.calibrating.discard(model_id)
    return _json(made, 201)


@router.put(
    "",
    response_model=CalibrationVersions,
    responses=problems(400, 403, 404, 409, 415, 422, 503),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": {"$ref": "#/components/schemas/ChooseCalibration"}}},
        }
    },
)
async def choose_calibration(model_id: str, request: Request, services: Served) -> Response:
    """Use another of the model's calibrations; 0 is the one that came with it, and none where none did."""
    writes.check(request, services.settings)
    version = (await read_json(request, ChooseCalibration)).version
    scorer = await scorer_of(model_id, services, _LOC)
    found = {listed.version: listed.known for listed in await services.calibrations.listed(model_id, scorer.version)}
    if version != CAME_WITH_THE_MODEL and version not in found:
        there_are = f"there are {', '.join(map(str, found))}" if found else "there are none"
        raise errors.Invalid(Fault(("body", "version"), f"{model_id} has no such calibration; {there_are}", version))
    if version != CAME_WITH_THE_MODEL and (fault := found[version].fault) is not None:
        raise errors.Conflict(f"{model_id}: {fault}")
    await _write(services.calibrations.store.choose, model_id, version)
    services.calibrations.forget(model_id)
    return _json(await _listed(scorer, services))


async def _calibrate(
    scorer: Scorer,
    options: CalibrationOptions,
    files: Sequence[str | bytes],
    key: str | None,
    tenant: str,
    services: Services,
) -> CalibrationVersion:
    settings, store = services.settings, services.calibrations.store
    await _write(store.check_writable, scorer.id)
    shape = scorer.version.spec.image
    pixels, _ = await decoded(files, shape, None, settings.max_image_side)
    recalibration.check_distinct(pixels)
    deadline = asyncio.get_running_loop().time() + settings.calibration_timeout
    how = How("batch", tenant, settings.calibration_timeout, deadline)
    packed = await recalibration.make(
        scorer, pixels, options.description, key, how, services, settings.max_score_images
    )
    number = await _write(store.adopt, scorer.id, packed)  # both at once: hanging up does not come between
    services.calibrations.forget(scorer.id)
    return await _version(number, scorer, services)


async def _version(number: int, scorer: Scorer, services: Services) -> CalibrationVersion:
    listed = await services.calibrations.listed(scorer.id, scorer.version)
    return next(_told(one.version, one.known, one.current) for one in listed if one.version == number)


async def _made_with(
    key: str, scorer: Scorer, options: CalibrationOptions, files: Sequence[str | bytes], services: Services
) -> CalibrationVersion | None:
    """What the same request has made before; put in use, where the server was ended before that. Raises `KeyTaken`
    where the key came with another request."""
    for one in await services.calibrations.listed(scorer.id, scorer.version):
        if one.known.calibration is None or one.known.calibration.about.get("key") != key:
            continue
        pixels, _ = await decoded(files, scorer.version.spec.image, None, services.settings.max_image_side)
        about = one.known.calibration.about
        asked = (options.description, recalibration.digest(pixels))
        if (about.get("description"), about["data"]["sha256"]) != asked:
            raise KeyTaken(key)
        await _write(services.calibrations.store.finish, scorer.id, one.version)
        services.calibrations.forget(scorer.id)
        return await _version(one.version, scorer, services)
    return None


async def _write(work: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    try:
        return await asyncio.to_thread(work, *args, **kwargs)
    except Unwritable as e:
        raise errors.Conflict(str(e)) from e


async def _listed(scorer: Scorer, services: Services) -> CalibrationVersions:
    found = await services.calibrations.listed(scorer.id, scorer.version)
    return CalibrationVersions(
        model=scorer.id,
        current=next((one.version for one in found if one.current), None),
        versions=[_told(one.version, one.known, one.current) for one in found],
    )


def _told(version: int, known: Known, current: bool) -> CalibrationVersion:
    about = {} if known.calibration is None else told(known.calibration)
    return CalibrationVersion(version=version, current=current, sha256=known.sha256, error=known.fault, **about)


def _json(answer: CalibrationVersion | CalibrationVersions, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type=JSON)
