"""POST /score: say how likely images are."""

from __future__ import annotations

import asyncio
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from anomaly.calibration import CalibrationError, Described
from service import errors, images, schemas, scoring
from service.bodies import JSON, MULTIPART, media_type, read_form, read_json, require_media_type
from service.calibrations import Known
from service.ensembles import Together
from service.errors import Fault
from service.images import encode, off_loop
from service.jobs import unless_hung_up
from service.messages import Pixels, Scored
from service.routes._scoring import decoded, scorer_of
from service.routes._services import Served, Services, problems, tenant
from service.schemas import Anomaly, ModelScore, ScoreOptions, ScoreRequest, ScoreResponse, ScoreResult
from service.scoring import Drawn, Found, How, Scorer

router = APIRouter(tags=["scores"])

_UNLABELLED = -1
_COMPRESSION = 100  # times what decoding an image takes


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
    and a warning says so. A list of models, or the name of an ensemble's folder, is an ensemble: calibrated together,
    it judges by the statistics of all.
    """
    require_media_type(request, JSON, MULTIPART)
    options: ScoreOptions
    files: Sequence[str | bytes]
    if media_type(request) == JSON:
        options = body = await read_json(request, ScoreRequest)
        files = body.images
    else:
        options, files = await read_form(request, ScoreOptions, "images")
    options = await _members_for_ensemble(options, services)
    timeout = options.timeout or services.settings.request_timeout
    how = How(options.priority, tenant(request), timeout, asyncio.get_running_loop().time() + timeout)
    scorers = [await scorer_of(model, services) for model in _names(options)]
    scorers = _check(options, files, scorers, services, from_form=media_type(request) == MULTIPART)
    own = [await services.calibrations.of(scorer.id, scorer.version) for scorer in scorers]
    whole = await _together(scorers, own, services)
    try:
        hardly_any = scoring.check_rate(options, whole.known, len(files))
    except CalibrationError as e:
        field, value = ("alpha", options.alpha) if options.fdr is None else ("fdr", options.fdr)
        raise errors.Invalid(Fault(("body", field), f"{_told(options)}: {e}", value)) from None
    no_maps = scoring.no_maps(options, [scorers[k] for k in whole.order], whole.known) if options.heatmap else None
    shape = scorers[0].version.spec.image
    pixels, resized = await decoded(files, shape, options.resize, services.settings.max_image_side)
    mapped = options.heatmap and no_maps is None
    served = (services.broker, services.metrics, services.admit, services.catalog)
    asked = scoring.ask(scorers, pixels, mapped, how, *served)
    found = await unless_hung_up(request.receive, asked)
    answer = await off_loop(_COMPRESSION * pixels.size, _answer, options, scorers, pixels, found, own, whole, mapped)
    answer.warnings.extend(_warnings(options, scorers, found, whole.known, resized))
    no_mask = scoring.no_mask(options, whole.known) if mapped else None
    answer.warnings.extend(told for told in (hardly_any, no_maps, no_mask) if told is not None)
    answer.warnings.extend(_drift(scorers, own, answer, services))
    return Response(answer.model_dump_json(), media_type=JSON)


# ------------------------------------------------------------------------------------------------------------- requests


async def _members_for_ensemble(options: ScoreOptions, services: Services) -> ScoreOptions:
    """Asked of an ensemble by the name of its folder is asked of its members. A model of that name comes first."""
    if isinstance(options.model, str) and options.model not in services.catalog.ids:
        members = await services.ensembles.members(options.model)
        if members is not None:
            return options.model_copy(update={"model": members})
    return options


def _names(options: ScoreOptions) -> list[str]:
    return [options.model] if isinstance(options.model, str) else list(options.model)


def _told(options: ScoreOptions) -> str:
    return " and ".join(_names(options))


def _check(
    options: ScoreOptions,
    files: Sequence[str | bytes],
    scorers: Sequence[Scorer],
    services: Services,
    *,
    from_form: bool,
) -> list[Scorer]:
    """Check fields against models and limits; the scorers with the label as each of them counts it."""
    faults = [] if options.timeout is None else services.limits.faults({"timeout": options.timeout}, "this server")
    if options.fdr is not None and options.confidence is not None and not options.heatmap:  # of a mask it still tells
        told = "is a promise about alpha, and with fdr no alpha judges the images: give the one or the other"
        faults.append(Fault(("body", "confidence"), told, options.confidence))
    labelled = []
    for scorer in scorers:
        label, spec = options.label, scorer.version.spec
        if from_form and isinstance(label, str) and label not in spec.labels and label.isdecimal() and len(label) < 10:
            label = int(label)  # a form has no numbers
        wrong = [] if label is None else scorer.version.accepts.faults({"label": label}, scorer.id)
        faults += wrong
        index = None if wrong else spec.label_index(label)
        if options.marginal:
            faults += _no_marginal(options, scorer)
        every = len(spec.labels) if options.marginal else 0
        labelled.append(dataclasses.replace(scorer, label=_UNLABELLED if index is None else index, every=every))
        if spec.image != scorers[0].version.spec.image:
            other, one = ((s.version.spec.image, s.id) for s in (scorer, scorers[0]))
            sizes = ", those of ".join(f"{name} are {i.width}×{i.height}×{i.channels}" for i, name in (one, other))
            faults.append(Fault(("body", "model"), f"an ensemble looks at one image: those of {sizes}", options.model))
    most = services.settings.max_score_images
    if not 1 <= len(files) <= most:
        faults.append(Fault(("body", "images"), f"{len(files)} images; 1 to {most} are taken"))
    if faults:
        raise errors.Invalid(*faults)
    return labelled


def _no_marginal(options: ScoreOptions, scorer: Scorer) -> list[Fault]:
    """Why the mean over labels cannot be said."""
    where = ("body", "marginal")
    if options.label is not None:
        return [Fault(where, "is over all labels, and one is given: give the one or the other", True)]
    if not scorer.version.spec.labels:
        return [Fault(where, f"{scorer.id} knows no labels", True)]
    if scorer.likelihood.kind == "unnormalised":
        why = "has energies, which have no mean of probabilities; without a label its energy is of all of them already"
        return [Fault(where, f"{scorer.id} {why}", True)]
    return []


async def _together(scorers: Sequence[Scorer], own: Sequence[Known], services: Services) -> Together:
    """The calibration of all of them."""
    if len(scorers) == 1:
        return Together(own[0], (scorers[0].id,), (0,))
    return await services.ensembles.of([s.id for s in scorers], [s.version for s in scorers])


# -------------------------------------------------------------------------------------------------------------- answers


def _answer(
    options: ScoreOptions,
    scorers: Sequence[Scorer],
    pixels: Pixels,
    found: Sequence[Found],
    own: Sequence[Known],
    whole: Together,
    mapped: bool,
) -> ScoreResponse:
    described = [scoring.described(pixels, one.scored) for one in found]
    drawn = _drawn(options, found, whole) if mapped else None
    warnings: list[str] = []
    if len(scorers) == 1:
        each = _scores(options, scorers[0], found[0], described[0], own[0], warnings)
        results = [ScoreResult(**dict(s), **_pictures(drawn, k)) for k, s in enumerate(each)]
    else:
        results = _results_of_ensemble(options, scorers, found, described, own, whole, drawn, warnings)
    likelihoods, alone = [s.likelihood for s in scorers], len(scorers) == 1
    kinds, treatments = [each.kind for each in likelihoods], [each.dequantisation for each in likelihoods]
    families = [s.version.spec.family for s in scorers]
    known = whole.known
    return ScoreResponse(
        model=options.model,
        family=families[0] if alone else families,
        kind=kinds[0] if alone else kinds,
        dequantisation=treatments[0] if alone else treatments,
        results=results,
        calibration=None
        if known.calibration is None
        else schemas.Calibration(n=known.calibration.n, sha256=known.sha256),
        warnings=warnings,
    )


def _results_of_ensemble(
    options: ScoreOptions,
    scorers: Sequence[Scorer],
    found: Sequence[Found],
    described: Sequence[list[Described]],
    own: Sequence[Known],
    whole: Together,
    drawn: Drawn | None,
    warnings: list[str],
) -> list[ScoreResult]:
    statistics = scoring.together(whole.names, [described[k] for k in whole.order])
    verdicts = _anomalies(options, _told(options), whole.known, statistics, warnings)
    shown = scoring.shown(options, whole.known, statistics)
    members = [
        _scores(options, scorer, one, of_model, known, warnings)
        for scorer, one, of_model, known in zip(scorers, found, described, own, strict=True)
    ]
    return [
        ScoreResult(
            log_prob=None,
            bits_per_dim=None,
            stderr=None,
            anomaly=verdicts[k],
            by_label=None,
            statistics=shown[k],
            members={scorer.id: of_model[k] for scorer, of_model in zip(scorers, members, strict=True)},
            **_pictures(drawn, k),
        )
        for k in range(len(statistics))
    ]


def _scores(
    options: ScoreOptions,
    scorer: Scorer,
    found: Found,
    described: Sequence[Described],
    known: Known,
    warnings: list[str],
) -> list[ModelScore]:
    """What one model says of each image by itself."""
    image, labels = scorer.version.spec.image, scorer.version.spec.labels
    dims = image.width * image.height * image.channels
    verdicts = _anomalies(options, scorer.id, known, described, warnings)
    by_label: Sequence[dict[str, float] | None] = [None] * len(described)
    if found.by_label is not None:
        by_label = [dict(zip(labels, logs, strict=True)) for logs in found.by_label]
    each = zip(found.scored, scoring.shown(options, known, described), verdicts, by_label, strict=True)
    return [_score(s, dims, d, a, logs) for s, d, a, logs in each]


def _score(
    scored: Scored, dims: int, shown: dict[str, float], anomaly: Anomaly | None, by_label: dict[str, float] | None
) -> ModelScore:
    log_prob = None if scoring.impossible(scored) else scored.log_prob
    return ModelScore(
        log_prob=log_prob,
        bits_per_dim=None if log_prob is None else -log_prob / math.log(2) / dims,
        energy=scored.energy,
        stderr=scored.stderr,
        converged=scored.converged,
        anomaly=anomaly,
        by_label=by_label,
        statistics={name: value for name, value in shown.items() if name != "energy"},
    )


def _drift(scorers: Sequence[Scorer], own: Sequence[Known], answer: ScoreResponse, services: Services) -> Iterator[str]:
    """Show each watched model's scores to its watch; what that says."""
    for scorer, known in zip(scorers, own, strict=True):
        scores = [(result.members or {}).get(scorer.id, result).anomaly for result in answer.results]
        seen = [anomaly.score for anomaly in scores if anomaly is not None]
        if known.calibration is not None and seen:
            warning = services.drifts.saw(scorer.id, known.sha256, known.calibration, seen)
            if warning is not None:
                yield warning


def _anomalies(
    options: ScoreOptions, who: str, known: Known, statistics: Sequence[Described], warnings: list[str]
) -> list[Anomaly | None]:
    """None of each where there is no calibration, or it does not fit; then a warning tells."""
    try:
        verdicts = scoring.judge(options, known, statistics)
    except CalibrationError as e:
        warnings.append(f"anomaly: the calibration of {who} cannot be used: {e}")
        verdicts = None
    return [None] * len(statistics) if verdicts is None else [Anomaly(**dataclasses.asdict(v)) for v in verdicts]


def _drawn(options: ScoreOptions, found: Sequence[Found], whole: Together) -> Drawn:
    assert whole.known.calibration is not None
    assert whole.known.calibration.maps is not None
    surprise = [found[k].surprise for k in whole.order]
    return scoring.draw(options, whole.known.calibration.maps, [s for s in surprise if s is not None])


def _pictures(drawn: Drawn | None, k: int) -> dict[str, Any]:
    if drawn is None:
        return {"heatmap": None}
    return {
        "heatmap": images.to_base64(encode(drawn.picture[k][None], "png")),
        "mask": images.to_base64(encode(drawn.mask[k][None], "png")),
    }


def _warnings(
    options: ScoreOptions, scorers: Sequence[Scorer], found: Sequence[Found], known: Known, resized: Sequence[int]
) -> Iterator[str]:
    who = _told(options)
    if known.fault is not None:
        yield f"anomaly: the calibration of {who} cannot be used: {known.fault}"
    elif known.calibration is not None and options.label is not None:
        yield "anomaly: calibrated without labels; scores given a label have no p-values"
    elif known.calibration is not None and options.marginal:
        yield "anomaly: calibrated without labels; means over labels have no p-values"
    elif known.calibration is None and len(scorers) > 1:
        yield f"anomaly: {who} are not calibrated together, so their scores have no p-values as an ensemble"
    elif known.calibration is None:
        yield f"anomaly: {who} is not calibrated, so its scores have no p-values"
    if resized:
        names = ", ".join(f"images[{k}]" for k in resized)
        yield f"{names}: resized to the model's shape; scores of resized images are not comparable"
    for scorer, one in zip(scorers, found, strict=True):
        whose = f"{scorer.id}: " if len(scorers) > 1 else ""
        for k, s in enumerate(one.scored):
            yield from (f"{whose}images[{k}]: {warning}" for warning in _doubts(s))


def _doubts(s: Scored) -> Iterator[str]:
    if scoring.impossible(s):
        yield f"log_prob is refused: {s.log_prob:.1f} nats would be a probability above one"
    if s.converged is False:
        coarse = s.statistics["coarse_log_prob"]
        yield f"not converged: half the steps give {coarse:.1f} nats, all of them {s.log_prob:.1f}"
    numbers = {"log_prob": s.log_prob, "energy": s.energy, "stderr": s.stderr, **s.statistics}
    for name, value in numbers.items():
        if value is not None and not math.isfinite(value):
            yield f"{name} is {value}, which JSON cannot say"
