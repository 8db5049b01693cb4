"""POST /score: say how likely images are."""

from __future__ import annotations

import asyncio
import dataclasses
import math
import uuid
from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request, Response

from anomaly.calibration import Calibration, CalibrationError, Verdict, describe
from service import errors, images, schemas
from service.bodies import JSON, MULTIPART, media_type, read_form, read_json, require_media_type
from service.broker import Job
from service.calibrations import Known
from service.catalog import Version
from service.errors import Fault
from service.jobs import Told, follow, outcome, unless_hung_up
from service.messages import Completed, Pixels, Scored, ScoreImages, pack
from service.routes._services import Served, Services, problems, tenant
from service.schemas import Anomaly, ImageShape, Likelihood, ScoreOptions, ScoreRequest, ScoreResponse, ScoreResult

router = APIRouter(tags=["scores"])

_UNLABELLED = -1
_COMPRESSION = 100  # times what decoding an image takes
_DECODED_FAR_FROM_LOOP = 2**31  # whatever the model's size: images that are resized may be as large as the limit


@router.post(
    "/score",
    response_model=ScoreResponse,
    responses=problems(400, 404, 413, 415, 422, 429, 500, 503, 504),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                JSON: {"schema": {"$ref": "#/components/schemas/ScoreRequest"}},
                MULTIPART: {"schema": {"$ref": "#/components/schemas/ScoreForm"}},
            },
        }
    },
)
async def score(request: Request, services: Served) -> Response:
    """Say how likely images are, in nats of the whole 8-bit image and in bits/dim.

    Images come as base64 in JSON, or as files of a multipart form: PNG, JPEG, WebP, or npy (uint8). They must have the
    model's size and channel count unless `resize` is true. `anomaly` needs a calibrated model: for others it is null,
    and a warning says so.
    """
    require_media_type(request, JSON, MULTIPART)
    options: ScoreOptions
    files: Sequence[str | bytes]
    if media_type(request) == JSON:
        options = body = await read_json(request, ScoreRequest)
        files = body.images
    else:
        options, files = await read_form(request, ScoreOptions, "images")
    timeout = options.timeout or services.settings.request_timeout
    deadline = asyncio.get_running_loop().time() + timeout
    version, likelihood = await _scorer(options.model, services)
    label = _check(options, files, version, services, from_form=media_type(request) == MULTIPART)
    known = await services.calibrations.of(options.model, version)
    if known.calibration is not None and options.fdr is None:
        _check_alpha(options, known.calibration)  # before the work, not after
    pixels, resized = await _decode(files, version.spec.image, options.resize, services.settings.max_image_side)
    job = Job(
        id=uuid.uuid4().hex,
        model=options.model,
        payload=pack(ScoreImages(pixels, (label,) * len(pixels))),
        rows=len(pixels),
        units=len(pixels) * likelihood.steps * likelihood.network_evaluations_per_step,
        kind="score",
        steps=likelihood.steps,
        priority=options.priority,
        timeout=timeout,
        tenant=tenant(request),
    )
    await services.admit(job)
    watched = follow(services.broker, job, services.metrics.job(job.model, "score"))
    told = await unless_hung_up(request.receive, outcome(watched, deadline))
    scored = _complete(told, len(pixels))
    described = await images.off_loop(_COMPRESSION * pixels.size, _describe, pixels, scored)
    verdicts = await images.off_loop(_COMPRESSION * pixels.size, _judge, options, known, described)
    answer = _answer(options, version, likelihood, scored, resized, described, known, verdicts)
    return Response(answer.model_dump_json(), media_type=JSON)


def _check_alpha(options: ScoreOptions, calibration: Calibration) -> None:
    try:
        calibration.rank(options.alpha, options.confidence)
    except CalibrationError as e:
        raise errors.Invalid(Fault(("body", "alpha"), f"{options.model}: {e}", options.alpha)) from None


def _describe(pixels: Pixels, scored: Sequence[Scored]) -> list[dict[str, float]]:
    return [
        describe(x, None if _impossible(s) else s.log_prob, s.energy, s.statistics)
        for x, s in zip(pixels, scored, strict=True)
    ]


def _judge(options: ScoreOptions, known: Known, described: Sequence[dict[str, float]]) -> list[Verdict] | None:
    if known.calibration is None or options.label is not None:
        return None
    scores = known.calibration.score(described)
    if options.fdr is not None:
        return known.calibration.judge_together(scores, options.fdr)
    return known.calibration.judge(scores, options.alpha, options.confidence)


async def _scorer(model: str, services: Services) -> tuple[Version, Likelihood]:
    """A model's version in service and its likelihood. Raises `NoDensity` where it has none."""
    entry, version = await services.model(model)
    if version.spec.likelihood is None:
        pool = await services.broker.pool()
        able = [
            e.id
            for e in services.catalog.entries(pool)
            if e.status != "failed" and e.version and e.version.spec.likelihood
        ]
        raise errors.NoDensity(entry.id, version.spec.family, able)
    return version, version.spec.likelihood


def _check(
    options: ScoreOptions, files: Sequence[str | bytes], version: Version, services: Services, *, from_form: bool
) -> int:
    """Check fields against model and limits; the label's index, -1 without one."""
    label = options.label
    if (
        from_form
        and isinstance(label, str)
        and label not in version.spec.labels
        and label.isdecimal()
        and len(label) < 10
    ):
        label = int(label)  # a form has no numbers
    faults = [] if options.timeout is None else services.limits.faults({"timeout": options.timeout}, "this server")
    if label is not None:
        faults += version.accepts.faults({"label": label}, options.model)
    most = services.settings.max_score_images
    if not 1 <= len(files) <= most:
        faults.append(Fault(("body", "images"), f"{len(files)} images; 1 to {most} are taken"))
    if faults:
        raise errors.Invalid(*faults)
    index = version.spec.label_index(label)
    return _UNLABELLED if index is None else index


async def _decode(
    files: Sequence[str | bytes], shape: ImageShape, resize: bool, max_side: int
) -> tuple[Pixels, list[int]]:
    """Files -> pixels (N, C, H, W), and which of them were resized. Raises `Invalid`, naming each that is refused."""

    def work() -> tuple[list[Pixels], list[int], list[Fault]]:
        decoded, resized, faults = [], [], []
        for k, file in enumerate(files):
            try:
                data = images.from_base64(file) if isinstance(file, str) else file
                image = images.decode(data, shape, resize=resize, max_side=max_side)
            except images.ImageRefused as e:
                faults.append(Fault(("body", "images", k), str(e), file if isinstance(file, str) else None))
                continue
            decoded.append(image.pixels)
            if image.resized:
                resized.append(k)
        return decoded, resized, faults

    cost = _DECODED_FAR_FROM_LOOP if resize else len(files) * shape.width * shape.height * shape.channels
    decoded, resized, faults = await images.off_loop(cost, work)
    if faults:
        raise errors.Invalid(*faults)
    return np.stack(decoded), resized


def _complete(told: Sequence[Told], n: int) -> list[Scored]:
    scored = {message.index: message for message in told if isinstance(message, Scored)}
    if not isinstance(told[-1], Completed) or scored.keys() != set(range(n)):
        raise RuntimeError(f"a job of {n} scores ended with {sorted(scored)} and {type(told[-1]).__name__}")
    return [scored[k] for k in range(n)]


def _answer(
    options: ScoreOptions,
    version: Version,
    likelihood: Likelihood,
    scored: Sequence[Scored],
    resized: Sequence[int],
    described: Sequence[dict[str, float]],
    known: Known,
    verdicts: Sequence[Verdict] | None,
) -> ScoreResponse:
    shape = version.spec.image
    dims = shape.width * shape.height * shape.channels
    anomalies = [None] * len(scored) if verdicts is None else [Anomaly(**dataclasses.asdict(v)) for v in verdicts]
    return ScoreResponse(
        model=options.model,
        family=version.spec.family,
        kind=likelihood.kind,
        dequantisation=likelihood.dequantisation,
        results=[_result(s, dims, d, a) for s, d, a in zip(scored, described, anomalies, strict=True)],
        calibration=None
        if known.calibration is None
        else schemas.Calibration(n=known.calibration.n, sha256=known.sha256),
        warnings=list(_warnings(options, known, scored, resized)),
    )


def _result(scored: Scored, dims: int, described: dict[str, float], anomaly: Anomaly | None) -> ScoreResult:
    log_prob = None if _impossible(scored) else scored.log_prob
    return ScoreResult(
        log_prob=log_prob,
        bits_per_dim=None if log_prob is None else -log_prob / math.log(2) / dims,
        energy=scored.energy,
        stderr=scored.stderr,
        converged=scored.converged,
        anomaly=anomaly,
        statistics={name: value for name, value in described.items() if name != "energy"},
        heatmap=None,
    )


def _impossible(scored: Scored) -> bool:
    """An integral that is a probability above one: too few steps for this image."""
    return scored.converged is False and scored.log_prob is not None and scored.log_prob > 0


def _warnings(options: ScoreOptions, known: Known, scored: Sequence[Scored], resized: Sequence[int]) -> list[str]:
    warnings = []
    if known.fault is not None:
        warnings.append(f"anomaly: the calibration of {options.model} cannot be used: {known.fault}")
    elif known.calibration is not None and options.label is not None:
        warnings.append("anomaly: calibrated without labels; scores given a label have no p-values")
    elif known.calibration is None:
        warnings.append(f"anomaly: {options.model} is not calibrated, so its scores have no p-values")
    if options.heatmap:
        warnings.append("heatmap: this server draws none yet")
    if resized:
        names = ", ".join(f"images[{k}]" for k in resized)
        warnings.append(f"{names}: resized to the model's shape; scores of resized images are not comparable")
    for k, s in enumerate(scored):
        if _impossible(s):
            warnings.append(f"images[{k}]: log_prob is refused: {s.log_prob:.1f} nats would be a probability above one")
        if s.converged is False:
            warnings.append(
                f"images[{k}]: not converged: half the steps give {s.statistics['coarse_log_prob']:.1f} nats, "
                f"all of them {s.log_prob:.1f}"
            )
        numbers = {"log_prob": s.log_prob, "energy": s.energy, "stderr": s.stderr, **s.statistics}
        for name, value in numbers.items():
            if value is not None and not math.isfinite(value):
                warnings.append(f"images[{k}]: {name} is {value}, which JSON cannot say")
    return warnings
