"""A calibration made while serving: normal images in, scored through the same broker and scheduler as everything, a
calibration out."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from anomaly import heatmaps
from anomaly.calibration import CalibrationError, calibrate, halves, needed, numbers
from anomaly.heatmaps import Maps
from service import scoring
from service.broker import Broker, Job, QueueFull
from service.catalog import Catalog
from service.errors import Fault, Invalid
from service.messages import Pixels
from service.metrics import Metrics
from service.schemas import ImageShape
from service.scoring import Found, How, Scorer

MOST_VALUES = 2**28  # of all images together, decoded
AT_ONCE = 2  # blocks that are with the workers: while one is scored, the next is on its way
LONGEST_PAUSE = 30.0  # seconds between two attempts to queue a block

Indices: TypeAlias = NDArray[np.intp]


class Asked(Protocol):
    """Whom blocks are given to."""

    broker: Broker
    metrics: Metrics
    catalog: Catalog

    @property
    def admit(self) -> Callable[[Job], Awaitable[None]]: ...


def check_count(n: int, shape: ImageShape, most: int) -> None:
    """Before anything is decoded. Raises `Invalid`."""
    dims = shape.width * shape.height * shape.channels
    most = min(most, MOST_VALUES // dims)
    least = needed(1)
    if not least <= n <= most:
        raise Invalid(Fault(("body", "images"), f"{n} images; {least} to {most} are taken for a calibration"))


def check_distinct(pixels: Pixels) -> None:
    """Raises `Invalid`, naming each image that another one is a copy of: a calibration counts images, and copies would
    promise what fewer images cannot."""
    first: dict[bytes, int] = {}
    faults = []
    for k, image in enumerate(pixels):
        earlier = first.setdefault(hashlib.sha256(image.tobytes()).digest(), k)
        if earlier != k:
            faults.append(Fault(("body", "images", k), f"the same pixels as images[{earlier}]; each is taken once"))
    if faults:
        raise Invalid(*faults)


async def make(
    scorer: Scorer, pixels: Pixels, description: str, key: str | None, how: How, asked: Asked, block: int
) -> bytes:
    """The calibration of these images, packed; `block` of them are scored as one job.

    Raises `Invalid` where they are too few for the model's statistics, a `Problem` for a job that failed, and
    `TimeoutError`.
    """
    found = await _score(scorer, pixels, how, asked, block)
    return await asyncio.to_thread(_fit, scorer, pixels, found, description, key)


async def _score(scorer: Scorer, pixels: Pixels, how: How, asked: Asked, size: int) -> list[Found]:
    blocks = [pixels[start : start + size] for start in range(0, len(pixels), size)]
    found: dict[int, Found] = {0: await _score_block(scorer, blocks[0], how, asked)}
    _check_enough(scorer, blocks[0], found[0], len(pixels))
    waiting = deque(range(1, len(blocks)))

    async def lane() -> None:
        while waiting:
            k = waiting.popleft()
            found[k] = await _score_block(scorer, blocks[k], how, asked)

    lanes = [asyncio.ensure_future(lane()) for _ in range(AT_ONCE)]
    try:
        await asyncio.gather(*lanes)
    finally:
        for one in lanes:
            one.cancel()
        await asyncio.gather(*lanes, return_exceptions=True)
    return [found[k] for k in range(len(blocks))]


async def _score_block(scorer: Scorer, block: Pixels, how: How, asked: Asked) -> Found:
    """Waits where the queue is full: others go first, and there is time."""
    mapped, loop = scorer.likelihood.heatmap_evaluations > 0, asyncio.get_running_loop()
    while True:
        left = how.deadline - loop.time()
        if left <= 0:
            raise TimeoutError
        patient = How(how.priority, how.tenant, left, how.deadline)
        try:
            served = (asked.broker, asked.metrics, asked.admit, asked.catalog)
            (found,) = await scoring.ask([scorer], block, mapped, patient, *served)
        except QueueFull as e:
            await asyncio.sleep(min(max(e.retry_after, 0.1), LONGEST_PAUSE, left))
        else:
            return found


def _check_enough(scorer: Scorer, block: Pixels, found: Found, n: int) -> None:
    """As soon as it is known how many statistics the model has, and not after hours."""
    statistics = len(numbers(scoring.described(block[:1], found.scored[:1])[0]))
    if n < (least := needed(statistics)):
        raise Invalid(
            Fault(("body", "images"), f"{n} images; the {statistics} statistics of {scorer.id} take at least {least}")
        )


def _fit(scorer: Scorer, pixels: Pixels, found: list[Found], description: str, key: str | None) -> bytes:
    described = scoring.described(pixels, [scored for block in found for scored in block.scored])
    fit, held_out = halves(pixels)
    about = {
        "weights_sha256": scorer.version.weights_sha256,
        "data": {"name": "images of a request", "sha256": digest(pixels)},
        "description": description,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **({} if key is None else {"key": key}),
    }
    try:
        maps = _maps(found, fit, held_out)
        made = calibrate([described[k] for k in fit], [described[k] for k in held_out], about, maps)
    except CalibrationError as e:
        raise Invalid(Fault(("body", "images"), str(e))) from e
    return made.pack()


def _maps(found: list[Found], fit: Indices, held_out: Indices) -> Maps | None:
    each = [block.surprise for block in found if block.surprise is not None]
    if len(each) < len(found):
        return None
    surprise = np.concatenate(each)
    return heatmaps.fit([surprise[fit]], [surprise[held_out]])


def digest(pixels: Pixels) -> str:
    """Of the images as a set: the order in which they came does not matter."""
    return hashlib.sha256(b"".join(sorted(hashlib.sha256(image.tobytes()).digest() for image in pixels))).hexdigest()
