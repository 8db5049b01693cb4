"""What can go wrong, and how it is told: RFC 9457 `application/problem+json`.

    Problem
    ├── Malformed         400   the body cannot be parsed at all
    ├── Forbidden         403   a setting of the server does not allow it
    ├── UnknownModel      404
    ├── NotAcceptable     406   none of the media types in Accept can be given
    ├── Conflict          409   not as things stand: the models folder cannot be written, another is at it, ...
    ├── TooLarge          413   the body is longer than the server takes
    ├── WrongMediaType    415   the body is of a type that the route does not read
    ├── Invalid           422   fields are wrong: `errors` names each with its value
    │   └── NoDensity           the model cannot score
    ├── Busy              429   the queue is full: Retry-After says when to come back
    ├── Internal          500   a fault of the server: told without its insides, logged with them
    │   ├── RowFailed           the model raised or turned NaN on this request
    │   └── Lost                the job ended without an answer
    ├── Unavailable       503   no worker, or the model cannot be loaded
    │   ├── Interrupted         the server ended the job before it was done
    │   └── TooLate             it would not be done within the request's timeout
    └── TimedOut          504   the answer did not come within the request's timeout

Routes raise problems; `install` makes responses of them, and of what the framework raises. `type` is stable and made
for programs; `detail` is made for people.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from service.broker import UNSERVED, BrokerAway, JobLost, KeyTaken, NoWorker, QueueFull
from service.forecast import Forecast
from service.messages import Failed

MEDIA_TYPE = "application/problem+json"
_SHOWN_CHARACTERS = 200
_SHOWN_FAULTS = 3  # in `detail`
_MOST_FAULTS = 100  # in `errors`: a body of megabytes can have a million
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One thing that is wrong with a request: where, why, and the value that was given."""

    loc: tuple[str | int, ...]
    msg: str
    input: Any = None

    def to_json(self) -> dict[str, Any]:
        return {"loc": list(self.loc), "msg": self.msg, "input": shown(self.input)}

    def __str__(self) -> str:
        name = ""
        for part in self.loc[1:] if self.loc[:1] == ("body",) else self.loc:
            name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
        return f"{name}: {self.msg}" if name else self.msg


class Problem(Exception):
    """The root: an answer that is not the one asked for."""

    status: ClassVar[int] = 500
    kind: ClassVar[str] = "internal"
    title: ClassVar[str] = "The server failed"

    def __init__(self, detail: str, *, faults: Sequence[Fault] = (), headers: Mapping[str, str] | None = None) -> None:
        super().__init__(detail)
        self.detail, self.faults, self.headers = detail, tuple(faults), dict(headers or {})

    def to_json(self) -> dict[str, Any]:
        members = {
            "type": f"urn:drawwell:problem:{self.kind}",
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
        }
        return {**members, "errors": [fault.to_json() for fault in self.faults]} if self.faults else members

    def response(self) -> Response:
        return _response(self.to_json(), self.status, self.headers)


class Malformed(Problem):
    status, kind, title = 400, "malformed", "The body cannot be parsed"


class Forbidden(Problem):
    status, kind, title = 403, "forbidden", "This server does not allow that"


class UnknownModel(Problem):
    status, kind, title = 404, "unknown-model", "There is no such model"

    def __init__(self, model: str, known: Sequence[str], loc: tuple[str | int, ...]) -> None:
        there_are = f"there are {', '.join(sorted(known))}" if known else "there are none"
        fault = Fault(loc, f"no model {json.dumps(shown(model), ensure_ascii=False)}; {there_are}", model)
        super().__init__(str(fault), faults=[fault])


class UnknownJob(Problem):
    status, kind, title = 404, "unknown-job", "There is no such job"

    def __init__(self, job_id: str) -> None:
        super().__init__(f"no job {shown(job_id)!r}; one that has ended is kept for a while only")


class NotAcceptable(Problem):
    status, kind, title = 406, "not-acceptable", "No such representation"


class Conflict(Problem):
    status, kind, title = 409, "conflict", "Not as things stand"


class TooLarge(Problem):
    status, kind, title = 413, "too-large", "The body is too long"

    def __init__(self, limit: int) -> None:
        # The rest of the body stays unread, so the connection cannot carry another request.
        super().__init__(f"the body is longer than {limit:,} bytes", headers={"Connection": "close"})


class WrongMediaType(Problem):
    status, kind, title = 415, "wrong-media-type", "The body is of another media type"


class Invalid(Problem):
    status, kind, title = 422, "invalid", "The request is not valid"

    def __init__(self, *faults: Fault) -> None:
        told = "; ".join(str(fault) for fault in faults[:_SHOWN_FAULTS])
        more = len(faults) - _SHOWN_FAULTS
        super().__init__(f"{told}; and {more:,} more" if more > 0 else told, faults=faults[:_MOST_FAULTS])


class NoDensity(Invalid):
    kind, title = "no-density", "The model has no density"

    def __init__(
        self, model: str, family: str, able: Sequence[str], loc: tuple[str | int, ...] = ("body", "model")
    ) -> None:
        others = f"models that have one: {', '.join(sorted(able))}" if able else "no model here has one"
        super().__init__(
            Fault(
                loc,
                f"{model} is a {family} without a density: it draws images, and cannot score them; {others}",
                model,
            )
        )


class Busy(Problem):
    status, kind, title = 429, "busy", "The queue is full"

    def __init__(self, full: QueueFull) -> None:
        seconds = max(1, math.ceil(full.retry_after))
        super().__init__(f"{full}; try again in {seconds} s", headers={"Retry-After": str(seconds)})


class Internal(Problem):
    pass


class RowFailed(Internal):
    kind, title = "row-failed", "The model failed on this request"


class Lost(Internal):
    kind, title = "lost", "The job was lost"


class Unavailable(Problem):
    status, kind, title = 503, "unavailable", "The service cannot do this now"


class Interrupted(Unavailable):
    kind, title = "interrupted", "The job was ended"


class TooLate(Unavailable):
    kind, title = "too-late", "It would not be done in time"

    def __init__(self, timeout: float, predicted: Forecast) -> None:
        seconds = max(1, math.ceil(predicted.least - timeout))
        super().__init__(
            f"timeout: {timeout:g} s; with what is queued it would be done in about {predicted.seconds:.1f} s, and not "
            f"before {predicted.least:.1f} s; try again in {seconds} s, or allow more time",
            headers={"Retry-After": str(seconds)},
        )
        self._predicted = predicted

    def to_json(self) -> dict[str, Any]:
        predicted = {"seconds": round(self._predicted.seconds, 3), "least_seconds": round(self._predicted.least, 3)}
        return {**super().to_json(), "predicted": predicted}


class TimedOut(Problem):
    status, kind, title = 504, "timed-out", "The answer took too long"

    def __init__(
        self, detail: str = "the answer did not come within the request's timeout; its job was cancelled"
    ) -> None:
        super().__init__(detail)


def problem_of(error: Exception) -> Problem:
    """What a client is told of an exception. What nobody foresaw is logged in full and told as `Internal`."""
    match error:
        case Problem():
            return error
        case QueueFull():
            return Busy(error)
        case BrokerAway():
            return Unavailable(f"the queue cannot be reached: {error}")
        case KeyTaken():
            return Invalid(Fault(("header", "Idempotency-Key"), str(error), error.key))
        case NoWorker():
            return Unavailable("no worker is connected that could do this")
        case JobLost() if str(error).startswith(UNSERVED):
            return Unavailable(str(error))
        case JobLost():
            return Lost(f"the job ended without an answer: {error}")
        case TimeoutError():
            return TimedOut()
    log.error("unexpected %s", type(error).__name__, exc_info=error)
    return Internal("the server failed; its log has the reason under this X-Request-ID")


def failure(failed: Failed) -> Problem:
    """What a client is told of a worker's `Failed`."""
    match failed.kind:
        case "row":
            return RowFailed(failed.detail)
        case "unknown-model":
            return Unavailable(failed.detail)
        case "expired":
            return TimedOut()
        case "cancelled":
            return Interrupted("the job was cancelled before it was done")
    log.error("a worker failed: %s: %s", failed.kind, failed.detail)
    return Internal("the worker failed; its log has the reason")


def invalid(error: ValidationError, fields: Sequence[str]) -> Problem:
    """What a client is told of a body that pydantic refused. fields: names that the body takes."""
    if (count := error.error_count()) > _MOST_FAULTS:  # even to list them would take seconds
        return Invalid(Fault(("body",), f"{count:,} faults, too many to name each; the fields are {', '.join(fields)}"))
    details = error.errors(include_url=False, include_context=False)
    if details[0]["type"] == "json_invalid":
        return Malformed(details[0]["msg"])
    return Invalid(*(_fault(detail, ("body",), fields) for detail in details))


def shown(value: Any) -> Any:
    """A value as an error body may show it: JSON, and short."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError):
        text = value = repr(value)
    if len(text) <= _SHOWN_CHARACTERS:
        return value
    return f"{text[:_SHOWN_CHARACTERS]}… ({len(text):,} characters)"


def install(app: FastAPI) -> None:
    """Make every error that leaves a route a problem."""
    app.add_exception_handler(Problem, _on_error)
    app.add_exception_handler(QueueFull, _on_error)
    app.add_exception_handler(NoWorker, _on_error)
    app.add_exception_handler(BrokerAway, _on_error)
    app.add_exception_handler(KeyTaken, _on_error)
    app.add_exception_handler(JobLost, _on_error)
    app.add_exception_handler(TimeoutError, _on_error)
    app.add_exception_handler(RequestValidationError, _on_validation_error)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_error(request: Request, error: Exception) -> Response:
    problem = problem_of(error)
    if problem.status in (429, 503, 504):
        request.app.state.services.metrics.refused(problem.kind)
    return problem.response()


async def _on_validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return Invalid(*(_fault(detail, (), ()) for detail in error.errors())).response()


async def _on_http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    status = HTTPStatus(error.status_code)
    if status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
        return Response(status_code=status, headers=error.headers)
    detail = error.detail
    if detail == status.phrase:  # the framework's own: say it of this request
        detail = f"{request.method} {request.url.path}: {status.phrase.lower()}"
    body = {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail}
    headers = dict(error.headers or {})
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers["Allow"] = _allowed(request)
    return _response(body, status, headers)


def _allowed(request: Request) -> str:
    """What a path can be asked (RFC 9110, 10.2.1): the framework names the methods of its first route alone."""
    routes = request.app.router.routes
    found = [m for m in _METHODS if any(r.matches({**request.scope, "method": m})[0] is Match.FULL for r in routes)]
    return ", ".join([*found, "HEAD"] if "GET" in found and "HEAD" not in found else found)


def _fault(detail: Mapping[str, Any], prefix: tuple[str | int, ...], fields: Sequence[str]) -> Fault:
    """One of pydantic's errors, in words that name the value or what would be right."""
    loc, msg, value = (*prefix, *detail["loc"]), str(detail["msg"]), detail.get("input")
    if detail["type"] == "missing":
        return Fault(loc, "missing")
    if detail["type"] == "extra_forbidden":
        return Fault(loc, f"unknown field; there are {', '.join(fields)}", value)
    if msg.startswith(("Input should", "String should")):
        msg = f"{msg[0].lower()}{msg[1:]}, not {json.dumps(shown(value), ensure_ascii=False)}"
    return Fault(loc, msg, value)


def _response(body: Mapping[str, Any], status: int, headers: Mapping[str, str]) -> Response:
    # ASCII: a request may quote lone surrogates, which UTF-8 cannot say.
    return Response(json.dumps(body), status, headers=dict(headers), media_type=MEDIA_TYPE)
