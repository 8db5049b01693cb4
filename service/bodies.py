"""Reading requests: bodies into wire types, and Accept into one of the media types on offer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import Request

from service.errors import Fault, Invalid, Malformed, NotAcceptable, WrongMediaType, invalid

Schema = TypeVar("Schema", bound=BaseModel)

JSON = "application/json"
MULTIPART = "multipart/form-data"
_FILES = 1000  # of one form; how many images a request may hold is said by whoever reads them


def media_type(request: Request) -> str:
    """The body's media type, in lower case and without its parameters; empty where none is given."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, schema: type[Schema]) -> Schema:
    """The body as `schema`. Raises `WrongMediaType`, `Malformed` or `Invalid`."""
    require_media_type(request, JSON)
    content = await request.body()
    try:
        body = schema.model_validate_json(content)
    except ValidationError as e:
        raise invalid(e, list(schema.model_fields)) from e
    _refuse_repeated(content)
    return body


def _refuse_repeated(content: bytes) -> None:
    """Raises `Invalid` for a field that stands twice in a JSON text that is otherwise right: parsers take the last and
    say nothing, and whoever wrote the first does not learn that it was ignored."""
    faults: list[Fault] = []

    def look(pairs: list[tuple[str, Any]]) -> None:
        seen: set[str] = set()
        for name, value in pairs:
            if name in seen:
                faults.append(Fault(("body", name), "given twice", value))
            seen.add(name)

    json.loads(content, object_pairs_hook=look, parse_int=str)
    if faults:
        raise Invalid(*faults)


async def read_form(
    request: Request, schema: type[Schema], files: str, most: int = _FILES
) -> tuple[Schema, list[bytes]]:
    """A multipart body: its text fields as `schema`, and the content of each file in the field `files`. A form of more
    than `most` files is not read at all."""
    require_media_type(request, MULTIPART)
    texts: dict[str, str] = {}
    contents: list[bytes] = []
    try:
        async with request.form(max_files=most) as form:
            for name, value in form.multi_items():
                if name == files and isinstance(value, UploadFile):
                    contents.append(await value.read())
                elif name == files or isinstance(value, UploadFile):
                    wanted = "files" if name == files else "text"
                    raise Invalid(Fault(("body", name), f"takes {wanted} in a form"))
                elif name in texts:
                    raise Invalid(Fault(("body", name), "given twice", value))
                else:
                    texts[name] = value
    except HTTPException as e:  # how the framework tells that its parser gave up
        if e.detail.startswith("Too many files"):
            raise Invalid(Fault(("body", files), f"more than {most} files")) from e
        raise Malformed(f"multipart: {e.detail}") from e
    try:
        return schema.model_validate_strings(texts, strict=False), contents
    except ValidationError as e:
        raise invalid(e, [*schema.model_fields, files]) from e


def require_media_type(request: Request, *known: str) -> None:
    found = media_type(request)
    if found not in known:
        raise WrongMediaType(f"the body is {found or 'of no stated media type'}; {' or '.join(known)} is read here")
    coding = request.headers.get("content-encoding", "")
    if coding.strip().lower() not in ("", "identity"):
        told = f"Content-Encoding: {coding[:200]}; bodies are read as they are, without one"
        raise WrongMediaType(told, headers={"Accept-Encoding": "identity"})


def preferred(accept: str | None, offers: Sequence[str]) -> str:
    """The offer that an Accept header likes best (RFC 9110, 12.5.1). Raises `NotAcceptable`.

    Among equals the one that it names more exactly wins, then the one offered first.
    """
    if accept is None or not accept.strip():
        return offers[0]
    ranges = [_media_range(part) for part in accept.split(",") if part.strip()]
    best, best_rank = "", (0.0, 0)
    for offer in offers:
        # The most exact range that matches an offer is the one that speaks of it.
        exact, quality = max(((exact, q) for name, exact, q in ranges if _covers(name, offer)), default=(0, 0.0))
        if quality > 0 and (quality, exact) > best_rank:
            best, best_rank = offer, (quality, exact)
    if not best:
        raise NotAcceptable(f"Accept: {accept[:200]}; there are {', '.join(offers)}")
    return best


def _media_range(part: str) -> tuple[str, int, float]:
    """One range, as "image/*;q=0.5": its name, how exact it is (1 to 3), its quality (0 where it cannot be read)."""
    name, *parameters = (p.strip().lower() for p in part.split(";"))
    quality = 1.0
    for parameter in parameters:
        key, _, value = parameter.partition("=")
        if key.strip() == "q":
            try:
                quality = min(1.0, max(0.0, float(value)))
            except ValueError:
                quality = 0.0
    return name, 1 if name == "*/*" else 2 if name.endswith("/*") else 3, quality


def _covers(media_range: str, media_type: str) -> bool:
    return media_range in ("*/*", media_type, f"{media_type.partition('/')[0]}/*")
