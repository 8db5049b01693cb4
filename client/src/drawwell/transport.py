"""One request until it is answered: which failures deserve another attempt, how long to wait, which error to raise."""

from __future__ import annotations

import email.utils
import random
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from drawwell.errors import ApiError, Busy, ContractError, Invalid, NotFound, ServerError, TimedOut, TransportError

# Worth another attempt: the server was busy, or something between it and us was.
RETRIED = frozenset({408, 425, 429, 502, 503, 504})
LONGEST_WAIT = 60.0  # seconds; a server that asks for more gets no further attempt

_KINDS: dict[int, type[ApiError]] = {404: NotFound, 400: Invalid, 413: Invalid, 415: Invalid, 422: Invalid}


@dataclass(frozen=True)
class ServerSentEvent:
    """One event of a `text/event-stream`."""

    name: str
    data: str


class Transport:
    """Sends requests, and again where that may help. A generated image is a function of its request, so that is
    always safe; one idempotency key is kept over all attempts, so that the work is not even done twice."""

    def __init__(self, http: httpx.Client, retries: int, sleep: Callable[[float], None] = time.sleep) -> None:
        if retries < 0:
            raise ValueError(f"retries: {retries} is negative")
        self.http = http
        self.retries = retries
        self.sleep = sleep

    def json(self, method: str, path: str, body: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """The answer's JSON. timeout: seconds without a sign of life that an attempt may take, where they are more than
        the client's. Raises a `DrawwellError`."""
        response = self._send(method, path, body, timeout=timeout)
        try:
            return response.json()
        except ValueError as error:
            raise ContractError(f"{response.url}: an answer that is not JSON: {response.text[:200]!r}") from error

    @contextmanager
    def events(self, path: str, body: Mapping[str, Any]) -> Iterator[Iterator[ServerSentEvent]]:
        """The events of a streamed answer, as they come. Only what fails before the first of them is tried again."""
        response = self._send("POST", path, body, headers={"Accept": "text/event-stream"}, stream=True)
        with closing(response):
            yield _parse_events(response)

    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        headers: Mapping[str, str] | None = None,
        stream: bool = False,
        timeout: float | None = None,
    ) -> httpx.Response:
        waits = httpx.USE_CLIENT_DEFAULT if timeout is None else httpx.Timeout(timeout, connect=min(timeout, 10.0))
        headers = {**(headers or {}), **({"Idempotency-Key": str(uuid.uuid4())} if method == "POST" else {})}
        attempt = 0
        while True:
            try:
                response = self.http.send(
                    self.http.build_request(method, path, json=body, headers=headers, timeout=waits), stream=stream
                )
                if not response.is_success:
                    with closing(response):
                        response.read()
            except httpx.TransportError as error:
                wait = backoff(attempt)
                failure: TransportError | ApiError = _transport_error(error)
            else:
                if response.is_success:
                    return response
                failure = api_error(response)
                if response.status_code not in RETRIED:
                    raise failure
                asked = retry_after(response)
                wait = backoff(attempt) if asked is None else asked
            if attempt >= self.retries or wait > LONGEST_WAIT:
                raise failure
            self.sleep(wait)
            attempt += 1


def backoff(attempt: int) -> float:
    """Seconds before the next attempt: about 0.5, 1, 2, 4, 8, 8 …, spread so that clients do not all return at once."""
    return min(8.0, 0.5 * 2.0**attempt) * random.uniform(0.75, 1.25)


def retry_after(response: httpx.Response) -> float | None:
    """Seconds that the server asks to wait: `Retry-After` as a number or as a date; None where it does not say."""
    value = response.headers.get("Retry-After", "").strip()
    if not value:
        return None
    try:
        return max(0.0, float(value))
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(value)
        except ValueError:
            return None
        return max(0.0, when.timestamp() - time.time())


def api_error(response: httpx.Response) -> ApiError:
    """The error that an answer stands for."""
    status = response.status_code
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, Mapping):
        problem = {"title": f"HTTP {status}", "detail": response.text[:200]}
    return error_of(problem, status, response.headers.get("X-Request-ID"), retry_after(response))


def error_of(
    problem: Mapping[str, Any], status: int, request_id: str | None = None, retry_after: float | None = None
) -> ApiError:
    """The error that a problem (RFC 9457) stands for."""
    if status in (429, 503):
        return Busy(problem, status=status, request_id=request_id, retry_after=retry_after)
    kind = _KINDS.get(status, ServerError if status >= 500 else ApiError)
    return kind(problem, status=status, request_id=request_id)


def _parse_events(response: httpx.Response) -> Iterator[ServerSentEvent]:
    """Raises `TransportError` where the stream is cut off."""
    name, data = "message", list[str]()
    try:
        for line in response.iter_lines():
            field, _, value = line.partition(":")
            if not line and data:
                yield ServerSentEvent(name, "\n".join(data))
            if not line:
                name, data = "message", []
            elif field == "event":
                name = value.removeprefix(" ")
            elif field == "data":
                data.append(value.removeprefix(" "))
    except httpx.TransportError as error:
        raise _transport_error(error) from error


def _transport_error(error: httpx.TransportError) -> TransportError:
    # httpx sets the request on every error that its own transports raise.
    where = error.request.url
    if isinstance(error, httpx.TimeoutException):
        result: TransportError = TimedOut(f"{where}: no answer in time ({type(error).__name__})")
    else:
        result = TransportError(f"{where}: {error or type(error).__name__}")
    result.__cause__ = error
    return result
