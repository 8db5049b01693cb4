"""What a streamed request tells while it is worked on.

Queued … Progress … Drawn … Drawn … Completed
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from PIL import Image

from drawwell.errors import ContractError, TransportError
from drawwell.schemas import Generation, Images, Picture, Schema, parse
from drawwell.transport import ServerSentEvent, error_of


@dataclass(frozen=True)
class Queued:
    """The request waits; `position` requests are before it. It should be done in `eta_seconds`, where that is known."""

    position: int
    eta_seconds: float | None = None


@dataclass(frozen=True)
class Progress:
    """`step` of `steps` are done. `previews` has a picture for each image that has begun, where they were asked for."""

    step: int
    steps: int
    eta_seconds: float | None
    previews: tuple[Image.Image | None, ...] = ()


@dataclass(frozen=True)
class Drawn:
    """One image is finished."""

    sample: int
    image: Image.Image


@dataclass(frozen=True)
class Completed:
    """All of them are: the last event."""

    images: Images


Event: TypeAlias = Queued | Progress | Drawn | Completed


class _Queued(Schema):
    position: int
    eta_seconds: float | None = None


class _Progress(Schema):
    step: int
    steps: int
    eta_seconds: float | None = None
    preview: tuple[Picture | None, ...] = ()


class _Drawn(Schema):
    sample: int
    b64_json: Picture


def read(events: Iterable[ServerSentEvent]) -> Iterator[Event]:
    """The events of a stream as values; those that are not known are passed over.

    Raises the error that an `error` event tells; `TransportError` where the stream ends before the request is
    completed.
    """
    drawn: list[tuple[int, Image.Image]] = []
    for event in events:
        data = _json(event)
        match event.name:
            case "queued":
                queued = parse(_Queued, data)
                yield Queued(queued.position, queued.eta_seconds)
            case "progress":
                progress = parse(_Progress, data)
                yield Progress(progress.step, progress.steps, progress.eta_seconds, progress.preview)
            case "image":
                image = parse(_Drawn, data)
                drawn.append((image.sample, image.b64_json))
                yield Drawn(image.sample, image.b64_json)
            case "completed":
                yield Completed(Images(parse(Generation, data), drawn))
                return
            case "error":
                problem = data.get("problem", data)
                raise error_of(problem, status=int(problem.get("status", 500)))
    raise TransportError("the stream ended before the request was completed")


def _json(event: ServerSentEvent) -> Mapping[str, Any]:
    try:
        data = json.loads(event.data)
    except ValueError as error:
        raise ContractError(f"event {event.name!r}: data that is not JSON: {event.data[:200]!r}") from error
    if not isinstance(data, Mapping):
        raise ContractError(f"event {event.name!r}: data that is no object: {event.data[:200]!r}")
    return data
