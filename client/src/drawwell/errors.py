"""What can go wrong.

DrawwellError
├── TransportError      no answer came: the server is not there, or the connection was cut
│   └── TimedOut        … within the time allowed
├── ApiError            the server said no, and why (`status`, `title`, `detail`, `request_id`)
│   ├── NotFound        404: no such model or job
│   ├── Invalid         422, 400, 413, 415: the request is not one that this model takes; `fields` says where
│   ├── Busy            429, 503: too much to do, or no worker; `retry_after` says when to come back
│   └── ServerError     any other 5xx
└── ContractError       an answer that is not in the contract: another kind of server, or another version

Only `TransportError` and `Busy` are worth trying again, and the client has already done so when it raises them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class DrawwellError(Exception):
    """Anything that this library raises of its own."""


class TransportError(DrawwellError):
    """No answer came: the server is not there, or the connection was cut, as often as it was tried."""


class TimedOut(TransportError):
    """No answer came within the time allowed."""


class ContractError(DrawwellError):
    """An answer that is not in the contract: another kind of server, or another version."""


@dataclass(frozen=True)
class Field:
    """What is wrong with one field of a request."""

    name: str  # dotted where nested, such as "images.3"
    message: str
    value: Any = None  # what was sent


class ApiError(DrawwellError):
    """The server answered with an error: RFC 9457's `status`, `title` and `detail`, and the request's id in its log."""

    def __init__(self, problem: Mapping[str, Any], *, status: int, request_id: str | None = None) -> None:
        self.status = status
        self.type = str(problem.get("type", "about:blank"))
        self.title = str(problem.get("title", f"HTTP {status}"))
        self.detail = str(problem.get("detail") or "")
        self.fields = tuple(_field(item) for item in problem.get("errors") or ())
        self.request_id = request_id
        lines = [f"{self.title}: {self.detail}" if self.detail else self.title]
        lines += [f"{field.name}: {field.message}" for field in self.fields if field.message not in self.detail]
        super().__init__("\n  ".join(lines) + (f" [request {request_id}]" if request_id else ""))


class NotFound(ApiError):
    """404: no such model or job."""


class Invalid(ApiError):
    """400, 413, 415 or 422: the request is not one that this model takes."""


class Busy(ApiError):
    """429 or 503: too much to do, a deadline that cannot be met, or no worker."""

    def __init__(
        self,
        problem: Mapping[str, Any],
        *,
        status: int,
        request_id: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(problem, status=status, request_id=request_id)
        self.retry_after = retry_after  # seconds


class ServerError(ApiError):
    """500 and the like: the server's fault."""


def _field(item: Any) -> Field:
    if not isinstance(item, Mapping):
        return Field("", str(item))
    loc = item.get("loc", "")
    path = loc if isinstance(loc, str) else ".".join(str(part) for part in loc if part != "body")
    return Field(path, str(item.get("msg", "")), item.get("input"))
