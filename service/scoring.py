"""Scores, maps and verdicts of images by one model or several: the jobs that it takes, and what is made of their
messages."""

from __future__ import annotations

import asyncio
import math
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from anomaly.calibration import CalibrationError, Described, Verdict, describe, numbers
from anomaly.conformal import needed
from anomaly.ensembles import joined
from anomaly.heatmaps import Maps, Surprises
from service import tracing
from service.broker import Broker, Job
from service.calibrations import Known
from service.catalog import Catalog, Version
from service.errors import Interrupted
from service.jobs import Told, follow, outcome
from service.marginals import marginal
from service.messages import Completed, MapImages, Mapped, Pixels, Scored, ScoreImages, pack
from service.metrics import Metrics
from service.schemas import Likelihood, ScoreOptions

M = TypeVar("M", Scored, Mapped)


@dataclass(frozen=True)
class Scorer:
    """A model that is asked."""

    id: str
    version: Version
    likelihood: Likelihood
    label: int = -1  # as this model counts labels
    every: int = 0  # labels to score each image under, to take the mean over them; 0: under `label` alone


@dataclass(frozen=True)
class How:
    priority: Literal["interactive", "batch"]
    tenant: str
    timeout: float  # seconds
    deadline: float  # on the event loop's clock


@dataclass(frozen=True)
class Found:
    """What one model says of all images."""

    scored: list[Scored]
    surprise: Surprises | None  # (n, H, W), where it was asked for
    by_label: list[tuple[float, ...]] | None = None  # log p(x | y) of each image, where every label was asked for


async def ask(
    scorers: Sequence[Scorer],
    pixels: Pixels,
    mapped: bool,
    how: How,
    broker: Broker,
    metrics: Metrics,
    admit: Callable[[Job], Awaitable[None]],
    catalog: Catalog,
) -> list[Found]:
    """One job for each model, and, where maps are wanted, one more for each that draws them; all at once. Where one
    fails, the others are cancelled. Raises a `Problem`, also where other weights have scored than were asked, which is
    what a calibration would not be of; what `Broker.submit` and `admit` raise, and `TimeoutError`."""
    n = len(pixels)
    maps_by = [mapped and scorer.likelihood.heatmap_evaluations > 0 for scorer in scorers]
    jobs: list[Job] = []
    for scorer, draws in zip(scorers, maps_by, strict=True):
        each, units = scorer.likelihood, scorer.likelihood.steps * scorer.likelihood.network_evaluations_per_step
        task = _task(scorer, pixels)
        jobs.append(_job(scorer, pack(task), len(task.labels), "score", each.steps, units, how))
        if draws:
            labels = (scorer.label,) * n
            jobs.append(_job(scorer, pack(MapImages(pixels, labels)), n, "map", 1, each.heatmap_evaluations, how))
    for job in jobs:
        await admit(job)
    waiting = [
        asyncio.ensure_future(outcome(follow(broker, job, metrics.job(job.model, job.kind), waits=False), how.deadline))
        for job in jobs
    ]
    try:
        told = iter(await asyncio.gather(*waiting))
    finally:
        for future in waiting:
            future.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    found = []
    for scorer, draws in zip(scorers, maps_by, strict=True):
        of_scores, of_maps = next(told), next(told) if draws else None
        scored, by_label = _gathered(scorer, _complete(of_scores, n * max(1, scorer.every), Scored))
        surprise = None if of_maps is None else np.stack([m.surprise for m in _complete(of_maps, n, Mapped)])
        for version in {end.version for end in (*of_scores, *(of_maps or ())) if isinstance(end, Completed)}:
            await _check_weights(scorer, version, catalog)
        found.append(Found(scored, surprise, by_label))
    return found


def _task(scorer: Scorer, pixels: Pixels) -> ScoreImages:
    """The images, or each of them under every label in turn."""
    if not scorer.every:
        return ScoreImages(pixels, (scorer.label,) * len(pixels))
    return ScoreImages(np.repeat(pixels, scorer.every, axis=0), tuple(range(scorer.every)) * len(pixels))


def _gathered(scorer: Scorer, scored: list[Scored]) -> tuple[list[Scored], list[tuple[float, ...]] | None]:
    """What the task's scores say of each image."""
    k = scorer.every
    if not k:
        return scored, None
    found = [marginal(scored[i * k : (i + 1) * k], i) for i in range(len(scored) // k)]
    return [one.scored for one in found], [one.by_label for one in found]


def _job(
    scorer: Scorer, payload: bytes, n: int, kind: Literal["score", "map"], steps: int, units: int, how: How
) -> Job:
    """Of n images that take so many steps, and step-units, each."""
    return Job(
        id=uuid.uuid4().hex,
        model=scorer.id,
        payload=payload,
        rows=n,
        units=n * units,
        kind=kind,
        steps=steps,
        priority=how.priority,
        timeout=how.timeout,
        tenant=how.tenant,
        trace=tracing.carried(),
    )


def _complete(told: Sequence[Told], n: int, kind: type[M]) -> list[M]:
    found = {message.index: message for message in told if isinstance(message, kind)}
    if not isinstance(told[-1], Completed) or found.keys() != set(range(n)):
        raise RuntimeError(f"a job of {n} images ended with {sorted(found)} and {type(told[-1]).__name__}")
    return [found[k] for k in range(n)]


async def _check_weights(scorer: Scorer, version: str, catalog: Catalog) -> None:
    """A job may wait while its model's folder changes, and then runs on what workers have by then."""
    if version in ("", scorer.version.sha256):
        return
    if catalog.weights(scorer.id, version) is None:  # workers may have seen it first
        await asyncio.to_thread(catalog.refresh)
    if catalog.weights(scorer.id, version) != scorer.version.weights_sha256:
        raise Interrupted(
            f"{scorer.id} has other weights now than when it was asked, so the scores are not its own; ask again",
            headers={"Retry-After": "1"},
        )


def impossible(scored: Scored) -> bool:
    """An integral that is a probability above one: too few steps for this image."""
    return scored.converged is False and scored.log_prob is not None and scored.log_prob > 0


def described(pixels: Pixels, scored: Sequence[Scored]) -> list[Described]:
    """Every image's statistics and feature vectors, by name. A likelihood that is refused is no number, and so as odd
    as can be: not one that is missing, as of a model that has none."""
    return [
        describe(x, math.nan if impossible(s) else s.log_prob, s.energy, s.statistics, features=s.features)
        for x, s in zip(pixels, scored, strict=True)
    ]


def together(names: Sequence[str], by_model: Sequence[Sequence[Described]]) -> list[Described]:
    """Every image's statistics by all models."""
    return [joined(names, of_image) for of_image in zip(*by_model, strict=True)]


def fits(options: ScoreOptions, known: Known) -> bool:
    """Whether there is a calibration for such scores."""
    return known.calibration is not None and options.label is None and not options.marginal


def shown(options: ScoreOptions, known: Known, described: Sequence[Described]) -> list[dict[str, float]]:
    """Every image's numbers for an answer: its statistics, and with them, where there is a calibration to tell, how
    unusual its feature vectors are."""
    found = [{name: value for name, value in numbers(one).items() if not math.isnan(value)} for one in described]
    if known.calibration is not None and fits(options, known):
        return [a | b for a, b in zip(found, known.calibration.distances(described), strict=True)]
    return found


def judge(options: ScoreOptions, known: Known, statistics: Sequence[Described]) -> list[Verdict] | None:
    """None where there is no calibration for such scores."""
    if known.calibration is None or not fits(options, known):
        return None
    scores = known.calibration.score(statistics)
    if options.fdr is not None:
        return known.calibration.judge_together(scores, options.fdr)
    return known.calibration.judge(scores, options.alpha, options.confidence)


@dataclass(frozen=True)
class Drawn:
    """Heat maps: levels (n, H, W), and where they are beyond what normal images reach anywhere."""

    picture: NDArray[np.uint8]
    mask: NDArray[np.uint8]  # 0 or 255


def draw(options: ScoreOptions, maps: Maps, surprise: Sequence[Surprises]) -> Drawn:
    """From each model's surprise. The mask's level is `alpha`, with `confidence` where that is asked for; an alpha that
    is too small for so few calibration images masks nothing (`no_mask`)."""
    heights = maps.heights(surprise)
    mask = maps.mask(heights, maps.rank(options.alpha, options.confidence))
    return Drawn(maps.picture(heights), np.where(mask, 255, 0).astype(np.uint8))


def no_maps(options: ScoreOptions, scorers: Sequence[Scorer], known: Known) -> str | None:
    """Why no heat maps can be drawn; None where they can."""
    able = sum(scorer.likelihood.heatmap_evaluations > 0 for scorer in scorers)
    names = " and ".join(scorer.id for scorer in scorers)
    if not able:
        families = ", ".join(sorted({scorer.version.spec.family for scorer in scorers}))
        return f"heatmap: {families} says of whole images only how likely they are"
    if options.label is not None or options.marginal:
        return "heatmap: calibrated without labels; what is normal given one, or over all, is not known"
    if known.calibration is None or known.calibration.maps is None:
        return f"heatmap: {names}: not calibrated with heat maps, so it is not known what is normal; calibrate again"
    if len(known.calibration.maps.centre) != able:
        made = len(known.calibration.maps.centre)
        return f"heatmap: the calibration of {names} is of {made} maps, and these draw {able}; calibrate again"
    return None


def no_mask(options: ScoreOptions, known: Known) -> str | None:
    """Why no mask can have white in it, though there is an answer: with `fdr` the alpha judges masks alone."""
    if known.calibration is None or known.calibration.maps is None:
        return None
    try:
        known.calibration.rank(options.alpha, options.confidence)
    except CalibrationError as e:
        return f"mask: black whatever the image, since {e}"
    return None


def check_rate(options: ScoreOptions, known: Known, images: int) -> str | None:
    """Before the work, not after: whether any of so many images could be called an anomaly. What is to be known of it.
    Raises `CalibrationError`."""
    if known.calibration is None or not fits(options, known):
        return None
    if options.fdr is None:
        known.calibration.rank(options.alpha, options.confidence)
        return None
    least, n = known.calibration.together(images, options.fdr), known.calibration.n
    if least == 1:
        return None
    return (
        f"fdr: of {images} images judged together none is named unless {least} or more are, as {n:,} calibration "
        f"images tell no p-value below 1 in {n + 1:,}; it takes {needed(options.fdr / images):,} to name a single one"
    )
