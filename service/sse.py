"""Server-sent events (https://html.spec.whatwg.org/multipage/server-sent-events.html)."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from pydantic import BaseModel
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from service.errors import problem_of
from service.jobs import pausing, unless_hung_up

MEDIA_TYPE = "text/event-stream"


def event(name: str, data: Mapping[str, Any] | BaseModel, number: int = 0) -> bytes:
    """One event, with an id to go on from where it has a number. Its data is one line of JSON."""
    text = data.model_dump_json() if isinstance(data, BaseModel) else json.dumps(data)
    numbered = f"id: {number}\n" if number else ""
    return f"event: {name}\n{numbered}data: {text}\n\n".encode()


class EventStream(Response):
    """Sends events as they come, and a comment whenever they have been silent for `keep_alive` seconds.

    What the events raise is told as a last event, `error`, and so is their not having ended at `deadline` (on the event
    loop's clock). A client that hangs up closes them.
    """

    media_type = MEDIA_TYPE

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes], deadline: float, keep_alive: float) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first, self._rest, self._deadline, self._keep_alive = first, rest, deadline, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._rest):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            try:
                await unless_hung_up(receive, self._send_all(send))
            except ClientDisconnect:
                return

    async def _send_all(self, send: Send) -> None:
        await _send(send, self._first)
        try:
            async with asyncio.timeout_at(self._deadline), aclosing(pausing(self._rest, self._keep_alive)) as chunks:
                async for chunk in chunks:
                    await _send(send, b": keep-alive\n\n" if chunk is None else chunk)
        except Exception as error:
            await _send(send, event("error", {"problem": problem_of(error).to_json()}))
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _send(send: Send, chunk: bytes) -> None:
    await send({"type": "http.response.body", "body": chunk, "more_body": True})
