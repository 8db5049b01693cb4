"""What a stranger may send besides wrong values: fields twice, floods of mistakes, codings, endless forms, methods."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import Api, Call, b64, file_of, picture, problem_of, silence

from service.broker import Event
from service.messages import Progress, pack

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}
PNG = file_of(picture(1, 0, (1, 4, 5)))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path, allow_calibration="yes")


async def sent(api: Api, content: str | bytes, path: str = "/generate", **headers: str) -> httpx.Response:
    return await api.request("POST", path, content=content, headers={**JSON, **headers})


# ------------------------------------------------------------------------------------------------------- fields, values


@pytest.mark.parametrize("again", ['"seed": 2', '"seed": 1', '"s\\u0065ed": 2', '"seed": null'])
async def test_a_field_given_twice_is_refused_and_not_the_first_one_ignored(api: Api, again: str) -> None:
    problem = problem_of(await sent(api, f'{{"model": "gan", "seed": 1, {again}}}'), 422)
    (error,) = problem["errors"]
    assert (error["loc"], error["msg"]) == (["body", "seed"], "given twice")
    assert not api.broker.jobs


async def test_each_field_given_twice_is_named(api: Api) -> None:
    content = f'{{"images": ["{b64(PNG)}"], "model": "gan", "images": ["{b64(PNG)}"], "model": "diffusion"}}'
    problem = problem_of(await sent(api, content, "/score"), 422)
    assert [error["loc"][1] for error in problem["errors"]] == ["images", "model"]


async def test_names_and_braces_inside_of_texts_are_no_fields(api: Api) -> None:
    content = '{"model": "\\"model\\": 1, {\\"model\\": 2}"}'
    assert '"model' in problem_of(await sent(api, content), 404)["detail"]


@pytest.mark.parametrize("how", [{"stream": True}, {}])
async def test_a_stride_of_previews_that_no_worker_could_hold_is_refused(api: Api, how: dict[str, Any]) -> None:
    body = {"model": "diffusion", "preview_every": 2**64, **how}
    problem = problem_of(await api.post("/generate", body), 422)
    assert problem["errors"][0]["loc"] == ["body", "preview_every"]
    assert "maximum of 2147483647" in problem["detail"]
    assert (await api.post("/generate", {**body, "preview_every": 2**31 - 1})).status_code == 200


async def test_a_calibration_is_not_told_to_resize_which_it_cannot_be(api: Api) -> None:
    large = b64(file_of(picture(1, 0, (3, 9, 9))))
    refused = problem_of(await api.post("/models/density/calibration", {"images": [large] * 120}), 422)
    assert "9×9" in refused["detail"]
    assert "resize" not in refused["detail"]
    scored = problem_of(await api.post("/score", {"model": "density", "images": [large]}), 422)
    assert '"resize": true brings it there' in scored["detail"]


async def test_a_confidence_that_nothing_would_be_promised_with_is_refused(api: Api) -> None:
    body = {"model": "diffusion", "images": [b64(PNG)], "confidence": 0.9, "fdr": 0.1}
    (error,) = problem_of(await api.post("/score", body), 422)["errors"]
    assert (error["loc"], error["input"]) == (["body", "confidence"], 0.9)
    assert (await api.post("/score", body | {"heatmap": True})).status_code == 200, "masks have their alpha"


# --------------------------------------------------------------------------------------------------------------- floods


def flood(kind: str) -> tuple[str, str]:
    """(path, body): a million mistakes."""
    if kind == "fields":
        return "/generate", "{" + ",".join(f'"{k:x}":1' for k in range(10**6)) + "}"
    if kind == "items":
        return "/score", f'{{"model": "diffusion", "images": [{",".join(["1"] * 10**6)}]}}'
    return "/score", f'{{"model": [{",".join(["1"] * 10**6)}], "images": []}}'


@pytest.mark.parametrize("kind", ["fields", "items", "models"])
async def test_a_million_mistakes_are_answered_shortly(api: Api, kind: str) -> None:
    """The event loop is everybody's: to list each of them would hold it for many seconds."""
    path, content = flood(kind)
    began = time.process_time()
    answer = await sent(api, content, path)
    assert time.process_time() - began < 5
    assert len(answer.content) < 5000
    problem = problem_of(answer, 422)
    assert ("1,000,001 faults" if kind == "fields" else kind.replace("items", "images")[:5]) in problem["detail"]


async def test_of_many_bad_images_a_hundred_are_named(tmp_path: Path) -> None:
    api = Api(tmp_path, max_score_images=1000)
    problem = problem_of(await api.post("/score", {"model": "diffusion", "images": ["?"] * 1000}), 422)
    assert [error["loc"][2] for error in problem["errors"]] == list(range(100))
    assert problem["detail"].endswith("; and 997 more")


# --------------------------------------------------------------------------------------------------- bodies of any kind


async def test_a_coded_body_is_415_and_says_what_is_read(api: Api) -> None:
    answer = await sent(api, b"\x1f\x8b", **{"content-encoding": "gzip"})
    assert "Content-Encoding: gzip" in problem_of(answer, 415)["detail"]
    assert answer.headers["accept-encoding"] == "identity"
    plain = await sent(api, json.dumps({"model": "gan"}), **{"content-encoding": "identity"})
    assert plain.status_code == 200


@pytest.mark.parametrize(
    ("data", "files", "status", "words"),
    [
        ({}, 1001, 422, "images: more than 1000 files"),
        ({f"x{k}": "1" for k in range(1001)}, 1, 400, "multipart: Too many fields"),
        ({"label": "x" * 2**21}, 1, 400, "multipart: Part exceeded maximum size"),
    ],
)
async def test_a_form_without_end_is_a_problem_like_others(
    api: Api, data: dict[str, str], files: int, status: int, words: str
) -> None:
    answer = await api.post("/score", files=[("images", PNG)] * files, data={"model": "diffusion", **data})
    problem = problem_of(answer, status)
    assert words in problem["detail"]
    assert problem["type"] == f"urn:drawwell:problem:{'malformed' if status == 400 else 'invalid'}"


# -------------------------------------------------------------------------------------------------------------- methods


@pytest.mark.parametrize(
    ("path", "allowed"),
    [
        ("/generate", {"POST"}),
        ("/models", {"GET", "HEAD"}),
        ("/jobs/none", {"GET", "HEAD", "DELETE"}),
        ("/models/density/calibration", {"GET", "HEAD", "POST", "PUT"}),
    ],
)
async def test_a_method_that_is_not_allowed_is_told_all_that_are(api: Api, path: str, allowed: set[str]) -> None:
    answer = await api.request("PATCH", path)
    problem_of(answer, 405)
    assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/models", "/models/gan", "/models/none", "/docs"])
async def test_head_is_get_without_the_body(api: Api, path: str) -> None:
    got, head = await api.get(path), await api.request("HEAD", path)
    assert head.content == b""
    assert got.content != b""
    assert head.status_code == got.status_code
    for header in ("content-type", "content-length"):
        if path != "/metrics":  # whose numbers the first of the two has changed
            assert head.headers[header] == got.headers[header]
    assert head.headers["x-request-id"]


async def test_head_of_what_only_takes_a_body_is_405(api: Api) -> None:
    answer = await api.request("HEAD", "/generate")
    assert (answer.status_code, answer.content, answer.headers["allow"]) == (405, b"", "POST")


async def test_head_of_a_stream_ends(api: Api) -> None:
    """Though its job goes on."""
    job_id = (await api.post("/generate", {"model": "diffusion", "seed": 1})).json()["id"]
    api.broker.jobs[job_id] = api.broker.job

    async def slowly(job: Any) -> Any:
        yield Event(pack(Progress(1, 20, None)))
        async for event in silence(job):
            yield event

    api.broker.answer = slowly
    call = Call(api.app, f"/jobs/{job_id}/events", b"", method="HEAD")
    call.hang_up()
    await call.task
    assert call.status == 200
    assert call.text == ""
