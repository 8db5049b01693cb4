"""What surrounds every request: its id, the last resort for what nobody caught, the limit on its body. Plain ASGI."""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Mapping
from contextlib import nullcontext

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import tracing
from service.errors import TooLarge, problem_of
from service.metrics import Metrics

_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")

log = logging.getLogger(__name__)


_POLLED = ("/healthz", "/readyz", "/metrics")  # again and again, by machines


class WithoutPolls(logging.Filter):
    """Keeps polls out of uvicorn's access log, unless all is to be told."""

    def filter(self, record: logging.LogRecord) -> bool:
        _, _, path, *_ = record.args if isinstance(record.args, tuple) and len(record.args) > 2 else ("", "", "")
        return str(path).partition("?")[0] not in _POLLED or logging.getLogger().isEnabledFor(logging.DEBUG)


class RequestContext:
    """Gives every response an `X-Request-ID`, the client's if it sent one, and answers 500 for whatever was not caught.

    It stands inside the framework's own catch-all, whose answer would come without the id.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app, self.metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        started, status, began = False, 500, time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal started, status
            if message["type"] == "http.response.start":
                started, status = True, message["status"]
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            await send(message)

        traced = nullcontext() if scope["path"] in _POLLED else tracing.request(scope["method"], Headers(scope=scope))
        with traced as span:
            try:
                await self.app(scope, receive, send_with_id)
            except ClientDisconnect:
                log.info("request %s: the client hung up", request_id)
            except Exception as error:
                log.error("request %s: %s %s failed", request_id, scope["method"], scope["path"])
                if started:
                    raise  # half an answer is out: only closing the connection tells that there is no more
                await problem_of(error).response()(scope, receive, send_with_id)
            finally:
                route = getattr(scope.get("route"), "path", "unknown")
                self.metrics.request(route, scope["method"], status, time.perf_counter() - began)
                tracing.answered(span, scope["method"], route, status)


class Heads:
    """Answers HEAD as GET is answered, without the body (RFC 9110, 9.3.2): health checks ask so."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return
        ended = False

        async def send_head(message: Message) -> None:
            nonlocal ended
            if message["type"] != "http.response.body":
                await send(message)
                return
            if ended:
                raise ClientDisconnect  # a stream need not go on
            ended = True
            await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self.app({**scope, "method": "GET"}, receive, send_head)


class BodyLimit:
    """Refuses a body longer than `limit` bytes: at once where Content-Length says so, else at the byte too many.

    larger: the limits of paths that are allowed more, by patterns that the whole path matches.
    """

    def __init__(self, app: ASGIApp, limit: int, larger: Mapping[str, int] | None = None) -> None:
        self.app, self.limit = app, limit
        self.larger = [(re.compile(pattern), allowed) for pattern, allowed in (larger or {}).items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = next((allowed for path, allowed in self.larger if path.fullmatch(scope["path"])), self.limit)
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > limit):
            await TooLarge(limit).response()(scope, receive, send)
            return
        received = 0

        async def receive_within_limit() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise TooLarge(limit)
            return message

        await self.app(scope, receive_within_limit, send)
