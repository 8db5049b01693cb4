"""Bad input: each gets a clear 4xx that names field and value, costs no work, and disturbs nothing else."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Api, Call, after, b64, file_of, picture, problem_of, ready_worker, silence, tell
from PIL import Image

from service.broker import JobLost, ModelState, NoWorker, QueueFull
from service.messages import Failed
from service.settings import Settings

pytestmark = pytest.mark.anyio

GREY = picture(1, 0, (1, 4, 5))
PNG = b64(file_of(GREY))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    """Whatever a test does to it, it answers a good request afterwards as it did before."""
    api = Api(tmp_path)
    good = {"model": "diffusion", "seed": 1}
    before = (await api.post("/generate", good)).json()
    api.broker.jobs.clear()
    yield api
    api.broker.refusal, api.broker.answer = None, api.broker._at_once
    after = (await api.post("/generate", good)).json()
    assert before | {"id": None} == after | {"id": None}


def ihdr(width: int, height: int, depth: int = 8, colour: int = 0) -> bytes:
    """The beginning of a PNG that says it is of this size, and a little data."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def animated(format: str) -> bytes:
    frames = [Image.fromarray(picture(k, 0, (1, 4, 5))[0]) for k in range(3)]
    out = io.BytesIO()
    frames[0].save(out, format, save_all=True, append_images=frames[1:], lossless=True)
    return out.getvalue()


# (body, field, words of the detail)
GENERATE: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"model": "diffusion", "colour": "red"}, "colour", ["unknown field", "there are", "guidance_scale"]),
    ({"model": "diffusion", "steps": 0}, "steps", ["steps: 0 is less than the minimum of 1"]),
    ({"model": "diffusion", "steps": 1001}, "steps", ["steps: 1001 is greater than the maximum of 1000"]),
    ({"model": "diffusion", "steps": "fifty"}, "steps", ["steps", "integer", '"fifty"']),
    ({"model": "diffusion", "steps": "50"}, "steps", ["steps", "integer", '"50"']),
    ({"model": "diffusion", "steps": 10.5}, "steps", ["steps", "integer", "10.5"]),
    ({"model": "diffusion", "steps": True}, "steps", ["steps", "integer", "true"]),
    ({"model": "diffusion", "n": 0}, "n", ["n: 0 is less than the minimum of 1"]),
    ({"model": "diffusion", "n": 65}, "n", ["n: 65 is greater than the maximum of 64"]),
    ({"model": "diffusion", "n": True}, "n", ["n", "integer", "true"]),
    ({"model": "diffusion", "n": None}, "n", ["n", "integer", "null"]),
    ({"model": "diffusion", "label": "Trousers"}, "label", ['"Trousers"', "T-shirt/top, Trouser, Pullover", "0 to 2"]),
    ({"model": "diffusion", "label": 3}, "label", ["label: 3", "0 to 2"]),
    ({"model": "diffusion", "label": -1}, "label", ["label: -1", "0 to 2"]),
    ({"model": "diffusion", "label": "1"}, "label", ['"1"', "0 to 2"]),
    ({"model": "diffusion", "label": True}, "label", ["a label's name or its index, not "]),
    ({"model": "diffusion", "label": 1.0}, "label", ["a label's name or its index, not "]),
    ({"model": "diffusion", "label": ["Trouser"]}, "label", ["a label's name or its index, not "]),
    ({"model": "gan", "label": 1}, "label", ["gan takes no label", "it takes steps: an integer from 1 to 1"]),
    ({"model": "gan", "solver": "ddim"}, "solver", ["gan takes no solver"]),
    ({"model": "gan", "guidance_scale": 1.5}, "guidance_scale", ["gan takes no guidance_scale"]),
    ({"model": "diffusion", "temperature": 0.5}, "temperature", ["takes no temperature", "ddim, ddpm"]),
    ({"model": "diffusion", "prompt": "a dress"}, "prompt", ["takes no prompt"]),
    ({"model": "diffusion", "solver": "euler"}, "solver", ['"euler" is not one of ddim, ddpm']),
    ({"model": "diffusion", "guidance_scale": -0.5}, "guidance_scale", ["-0.5 is less than the minimum of 0"]),
    ({"model": "diffusion", "guidance_scale": True}, "guidance_scale", ["guidance_scale", "number", "true"]),
    ({"model": "diffusion", "seed": 2**64}, "seed", ["seed", str(2**64), str(2**64 - 1)]),
    ({"model": "diffusion", "seed": -1}, "seed", ["seed", "-1", "0"]),
    ({"model": "diffusion", "seed": 1.5}, "seed", ["seed", "1.5"]),
    ({"model": "diffusion", "seed": "7"}, "seed", ["seed", '"7"']),
    ({"model": "diffusion", "format": "gif"}, "format", ["format", '"gif"', "'webp'"]),
    ({"model": "diffusion", "priority": "urgent"}, "priority", ["priority", '"urgent"', "'batch'"]),
    ({"model": "diffusion", "preview_every": 0}, "preview_every", ["0 is less than the minimum of 1"]),
    ({"model": "diffusion", "timeout": 0}, "timeout", ["timeout: 0.0 is less than or equal to the minimum of 0"]),
    ({"model": "diffusion", "timeout": 1e9}, "timeout", ["maximum of 300.0"]),
    ({"model": "diffusion", "stream": 1}, "stream", ["stream", "boolean", "1"]),
    ({"n": 1}, "model", ["model: missing"]),
    ({"model": 7}, "model", ["model", "string", "7"]),
]


@pytest.mark.parametrize(("body", "field", "words"), GENERATE, ids=[str(body) for body, _, _ in GENERATE])
async def test_a_bad_field_of_generate_is_named_with_its_value(
    api: Api, body: dict[str, Any], field: str, words: list[str]
) -> None:
    problem = problem_of(await api.post("/generate", body), 422)
    (error,) = problem["errors"]
    assert error["loc"] == ["body", field]
    assert error["input"] == body.get(field)
    for word in words:
        assert word in problem["detail"]
    assert not api.broker.jobs


async def test_every_bad_field_is_named_at_once(api: Api) -> None:
    body = {"model": "gan", "n": 99, "label": 1, "solver": "ddim", "timeout": -1}
    problem = problem_of(await api.post("/generate", body), 422)
    assert {error["loc"][1] for error in problem["errors"]} == {"n", "label", "solver", "timeout"}


@pytest.mark.parametrize("path", ["/generate", "/score"])
async def test_an_unknown_model_is_404_and_the_known_ones_are_listed(api: Api, path: str) -> None:
    body = {"model": "dall-e"} | ({"images": [PNG]} if path == "/score" else {})
    problem = problem_of(await api.post(path, body), 404)
    assert '"dall-e"' in problem["detail"]
    assert "density, diffusion, energy, gan" in problem["detail"]
    assert problem["errors"] == [
        {"loc": ["body", "model"], "msg": problem["detail"].removeprefix("model: "), "input": "dall-e"}
    ]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
@pytest.mark.parametrize("field", ["n", "seed", "steps", "guidance_scale", "timeout", "label"])
async def test_a_number_that_is_none_is_refused(api: Api, field: str, number: str) -> None:
    content = f'{{"model": "diffusion", "{field}": {number}}}'
    response = await api.request("POST", "/generate", content=content, headers={"content-type": "application/json"})
    problem = problem_of(response, 422)
    assert problem["errors"][0]["loc"] == ["body", field]
    assert not api.broker.jobs


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "EOF"),
        (b"{", "EOF"),
        (b'{"model": "gan",}', "trailing comma"),
        (b"{'model': 'gan'}", "key must be a string"),
        (b'{"model": "gan"} x', "trailing characters"),
        (b'{"model": "\xff"}', "unicode"),
        (b'{"model": "\\ud800"}', "hex escape"),
        (b"[" * 100_000, "recursion"),
    ],
)
async def test_malformed_json_is_400_and_says_where(api: Api, content: bytes, word: str) -> None:
    response = await api.request("POST", "/generate", content=content, headers={"content-type": "application/json"})
    problem = problem_of(response, 400)
    assert "line 1 column" in problem["detail"]
    assert word in problem["detail"]


@pytest.mark.parametrize("content", [b"[]", b"null", b'"gan"', b"7"])
async def test_json_that_is_no_object_is_refused(api: Api, content: bytes) -> None:
    response = await api.request("POST", "/generate", content=content, headers={"content-type": "application/json"})
    assert "object" in problem_of(response, 422)["detail"]


async def test_a_number_of_many_digits_is_refused(api: Api) -> None:
    content = b'{"model": "diffusion", "seed": ' + b"9" * 10_000 + b"}"
    response = await api.request("POST", "/generate", content=content, headers={"content-type": "application/json"})
    assert "number out of range" in problem_of(response, 400)["detail"]


@pytest.mark.parametrize("path", ["/generate", "/score"])
@pytest.mark.parametrize("content_type", [None, "text/plain", "application/x-www-form-urlencoded", "image/png"])
async def test_another_media_type_is_415_and_the_right_one_is_named(
    api: Api, path: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"content-type": content_type}
    response = await api.request("POST", path, content=b'{"model": "gan"}', headers=headers)
    assert "application/json" in problem_of(response, 415)["detail"]


async def test_the_media_types_parameters_and_case_do_not_matter(api: Api) -> None:
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await api.request("POST", "/generate", content=b'{"model": "gan"}', headers=headers)).status_code == 200


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (PNG[:-3], ["not base64, or cut off"]),
        (PNG[:41], ["not base64, or cut off"]),
        ("data:image/png;base64," + PNG, ["not base64", "after its comma"]),
        ("käse", ["not base64"]),
        ("", ["no image"]),
        (b64(b"GIF89a" + bytes(20)), ["neither PNG, JPEG, WebP nor npy"]),
        (b64(file_of(GREY)[:60]), ["PNG", "cut off"]),
        (b64(file_of(GREY, "JPEG")[:-20]), ["JPEG", "cut off"]),
        (b64(file_of(GREY, "WEBP", lossless=True)[:-20]), ["WebP", "cut off"]),
        (b64(file_of(picture(1, 0, (1, 32, 32)))), ["32×32", "5×4"]),
        (b64(file_of(picture(1, 0, (3, 4, 5)))), ["5×4 with 3 channels", "5×4 with 1 channel"]),
        (b64(ihdr(50_000, 50_000)), ["50000×50000", "4096×4096"]),
        (b64(ihdr(5, 4, depth=16)), ["16 bits"]),
        (b64(animated("PNG")), ["animated PNG"]),
        (b64(animated("WEBP")), ["animated WEBP"]),
    ],
)
async def test_a_bad_image_is_named_by_its_place(api: Api, image: str, words: list[str]) -> None:
    problem = problem_of(await api.post("/score", {"model": "diffusion", "images": [PNG, image, PNG]}), 422)
    (error,) = problem["errors"]
    assert error["loc"] == ["body", "images", 1]
    assert problem["detail"].startswith("images[1]: ")
    for word in words:
        assert word in problem["detail"]
    assert len(str(error["input"])) < 300  # a body of megabytes is not sent back
    assert not api.broker.jobs


async def test_a_bomb_is_refused_when_it_may_be_resized_too(api: Api) -> None:
    body = {"model": "diffusion", "images": [b64(ihdr(50_000, 50_000))], "resize": True}
    assert "50000×50000" in problem_of(await api.post("/score", body), 422)["detail"]


@pytest.mark.parametrize(
    ("body", "loc", "words"),
    [
        ({"images": []}, ["images"], ["0 images", "1 to 64"]),
        ({"images": [PNG] * 65}, ["images"], ["65 images", "1 to 64"]),
        ({}, ["images"], ["missing"]),
        ({"images": PNG}, ["images"], ["array"]),
        ({"images": [7]}, ["images", 0], ["string", "7"]),
        ({"images": [None]}, ["images", 0], ["string", "null"]),
        ({"images": [PNG], "alpha": 0}, ["alpha"], ["greater than 0"]),
        ({"images": [PNG], "alpha": 1}, ["alpha"], ["less than 1"]),
        ({"images": [PNG], "alpha": "0.1"}, ["alpha"], ["number"]),
        ({"images": [PNG], "label": "Trousers"}, ["label"], ['"Trousers"', "Pullover"]),
        ({"images": [PNG], "resize": "yes"}, ["resize"], ["boolean"]),
        ({"images": [PNG], "n": 2}, ["n"], ["unknown field", "heatmap"]),
        ({"images": [PNG], "timeout": 301}, ["timeout"], ["maximum of 300"]),
    ],
)
async def test_a_bad_field_of_score_is_named(api: Api, body: dict[str, Any], loc: list[Any], words: list[str]) -> None:
    problem = problem_of(await api.post("/score", {"model": "diffusion", **body}), 422)
    assert [error["loc"] for error in problem["errors"]] == [["body", *loc]]
    for word in words:
        assert word in problem["detail"]
    assert not api.broker.jobs


async def test_a_label_for_an_unconditional_density_is_refused(api: Api) -> None:
    body = {"model": "density", "images": [b64(file_of(picture(1, 0, (3, 4, 5))))], "label": 1}
    assert "density takes no label" in problem_of(await api.post("/score", body), 422)["detail"]


@pytest.mark.parametrize(
    ("files", "data", "field"),
    [
        ([], {"model": "diffusion", "images": "text"}, "images"),
        ([("other", file_of(GREY))], {"model": "diffusion"}, "other"),
        ([("images", file_of(GREY))], {"model": "diffusion", "size": "5"}, "size"),
        ([("images", file_of(GREY))], {"model": "diffusion", "alpha": "much"}, "alpha"),
        ([("images", file_of(GREY))], {"model": "diffusion", "alpha": "nan"}, "alpha"),
        ([("images", file_of(GREY))], {"model": ["diffusion", "gan"]}, "model"),
        ([("images", file_of(GREY))], {}, "model"),
        ([("images", file_of(GREY))] * 65, {"model": "diffusion"}, "images"),
        ([("images", file_of(GREY)[:60])], {"model": "diffusion"}, "images"),
    ],
)
async def test_a_bad_field_of_a_form_is_named(api: Api, files: Any, data: Any, field: str) -> None:
    response = await api.post("/score", files=files or {"": b""}, data=data)
    problem = problem_of(response, 422)
    assert problem["errors"][0]["loc"][:2] == ["body", field]
    assert not api.broker.jobs


@pytest.mark.parametrize(
    ("content_type", "content"),
    [
        ("multipart/form-data", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"nonsense"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="model"\r\n\r\ngan'),
    ],
)
async def test_a_malformed_form_is_refused(api: Api, content_type: str, content: bytes) -> None:
    response = await api.request("POST", "/score", content=content, headers={"content-type": content_type})
    assert response.status_code in (400, 422)
    problem_of(response, response.status_code)


# ----------------------------------------------------------------------------------------------------- length of bodies


async def test_a_body_of_17_mib_is_413(api: Api) -> None:
    content = b'{"model": "diffusion", "images": ["' + b"A" * (17 * 2**20) + b'"]}'
    for path in ("/score", "/generate", "/nowhere"):
        response = await api.request("POST", path, content=content, headers={"content-type": "application/json"})
        assert "16,777,216 bytes" in problem_of(response, 413)["detail"]


async def test_an_announced_length_is_refused_before_a_byte_is_read(api: Api) -> None:
    async def never() -> Any:
        raise AssertionError("the body was read")

    for length in (str(2**24 + 1), "9" * 5000):
        sent = []

        async def send(message: Any, sent: list[Any] = sent) -> None:
            sent.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/score",
            "headers": [(b"content-length", length.encode())],
            "query_string": b"",
        }
        await api.app(scope, never, send)
        assert sent[0]["status"] == 413


@pytest.mark.parametrize("path", ["/score", "/generate"])
@pytest.mark.parametrize("content_type", ["application/json", "multipart/form-data; boundary=x"])
async def test_a_body_without_length_is_cut_at_the_limit(api: Api, path: str, content_type: str) -> None:
    sent = 0

    async def flood() -> AsyncIterator[bytes]:
        nonlocal sent
        yield b'--x\r\nContent-Disposition: form-data; name="images"; filename="a"\r\n\r\n'
        for _ in range(64):
            sent += 1
            yield bytes(2**20)

    response = await api.request("POST", path, content=flood(), headers={"content-type": content_type})
    if path == "/generate" and content_type != "application/json":
        problem_of(response, 415)
        return
    problem_of(response, 413)
    assert response.headers["connection"] == "close"
    assert sent <= 17


async def test_a_body_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    api = Api(tmp_path, max_body_bytes=1024)
    for length, status in ((1024, 200), (1025, 413)):
        content = b'{"model": "gan"}'.ljust(length)
        response = await api.request("POST", "/generate", content=content, headers={"content-type": "application/json"})
        assert response.status_code == status


# ------------------------------------------------------------------------------------ when the service cannot do it now


async def test_a_full_queue_is_429_and_says_when_to_come_back(api: Api) -> None:
    api.broker.refusal = QueueFull(retry_after=12.3, queued=190_000, limit=200_000)
    for path, body in (("/generate", {"model": "gan"}), ("/score", {"model": "diffusion", "images": [PNG]})):
        response = await api.post(path, body)
        assert "190000 step-units" in problem_of(response, 429)["detail"]
        assert response.headers["retry-after"] == "13"


async def test_no_worker_is_503(api: Api) -> None:
    api.broker.refusal = NoWorker("none")
    assert problem_of(await api.post("/generate", {"model": "gan"}), 503)["type"] == "urn:drawwell:problem:unavailable"


@pytest.mark.parametrize("body", [{"model": "gan"}, {"model": "gan", "stream": True}])
async def test_a_refusal_has_its_own_status_for_streams_too(api: Api, body: dict[str, Any]) -> None:
    api.broker.refusal = NoWorker("none")
    problem_of(await api.post("/generate", body), 503)


@pytest.mark.parametrize(
    ("kind", "status", "word"),
    [
        ("row", 500, "it turned NaN"),
        ("unknown-model", 503, "it turned NaN"),
        ("expired", 504, "timeout"),
        ("cancelled", 503, "cancelled"),
        ("internal", 500, "log"),
    ],
)
async def test_a_failed_job_is_told_by_its_kind(api: Api, kind: str, status: int, word: str) -> None:
    api.broker.answer = after(*tell(Failed(kind, "it turned NaN")))
    problem = problem_of(await api.post("/generate", {"model": "gan"}), status)
    assert word in problem["detail"]
    assert ("NaN" in problem["detail"]) == (kind in ("row", "unknown-model"))
    assert api.broker.cancelled == []  # it has ended already


async def test_a_lost_job_is_500_and_says_so(api: Api) -> None:
    async def lose(job: Any) -> AsyncIterator[Any]:
        raise JobLost("3 workers stopped while they worked on it")
        yield

    api.broker.answer = lose
    assert "3 workers stopped" in problem_of(await api.post("/generate", {"model": "gan"}), 500)["detail"]


async def test_what_nobody_foresaw_is_500_without_its_insides(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    async def fall(job: Any) -> AsyncIterator[Any]:
        raise ZeroDivisionError("secret")
        yield

    api.broker.answer = fall
    response = await api.post("/generate", {"model": "gan"}, headers={"X-Request-ID": "r-1"})
    problem = problem_of(response, 500)
    assert response.headers["x-request-id"] == "r-1"
    assert "secret" not in response.text
    assert "ZeroDivisionError" not in response.text
    assert "secret" in caplog.text
    assert "r-1" in caplog.text
    assert problem["title"] == "The server failed"


async def test_an_answer_that_takes_too_long_is_504_and_its_job_is_cancelled(api: Api) -> None:
    api.broker.answer = silence
    for path, body in (
        ("/generate", {"model": "gan", "timeout": 0.3}),
        ("/score", {"model": "diffusion", "images": [PNG], "timeout": 0.3}),
    ):
        api.broker.jobs.clear()
        problem_of(await api.post(path, body), 504)
        assert api.broker.cancelled[-1] == api.broker.job.id


async def test_a_model_that_failed_is_503_with_its_reason(api: Api) -> None:
    api.broker.states = [ready_worker(gan=ModelState("failed", error="weights.safetensors: sha256 differs"))]
    problem = problem_of(await api.post("/generate", {"model": "gan"}), 503)
    assert "weights.safetensors: sha256 differs" in problem["detail"]
    api.broker.states = [ready_worker()]


# ---------------------------------------------------------------------------------------------------- around all routes


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nowhere", 404), ("GET", "/generate", 405), ("DELETE", "/models", 405), ("GET", "/models/none", 404)],
)
async def test_what_is_not_there_is_a_problem_too(api: Api, method: str, path: str, status: int) -> None:
    response = await api.request(method, path)
    problem = problem_of(response, status)
    assert path in problem["detail"] or '"none"' in problem["detail"]
    if status == 405:
        assert response.headers["allow"]


async def test_every_response_carries_a_request_id(api: Api) -> None:
    ids = [(await api.get("/healthz")).headers["x-request-id"] for _ in range(5)]
    assert len(set(ids)) == 5
    for path in ("/healthz", "/models", "/nowhere", "/docs", "/openapi.json"):
        response = await api.get(path, headers={"X-Request-ID": "the/clients-own:1"})
        assert response.headers["x-request-id"] == "the/clients-own:1"


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\u00e9"])
async def test_a_request_id_that_could_spoil_a_log_is_replaced(api: Api, given: str) -> None:
    response = await api.get("/healthz", headers={"X-Request-ID": given.encode("latin-1")})
    assert response.headers["x-request-id"] != given
    assert len(response.headers["x-request-id"]) == 32


async def test_an_idempotency_key_is_ignored(api: Api) -> None:
    response = await api.post("/generate", {"model": "gan"}, headers={"Idempotency-Key": "k"})
    assert response.status_code == 200


async def test_a_body_that_never_comes_whole_ends_quietly(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    call = Call(api.app, "/generate", b"{")
    call._incoming.get_nowait()
    call._incoming.put_nowait({"type": "http.request", "body": b"{", "more_body": True})
    call.hang_up()
    await call.task
    assert call.sent == []
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_settings_come_from_the_environment_and_have_the_contracts_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    default = Settings()
    assert default.max_body_bytes == 16 * 2**20
    assert (default.max_images, default.max_score_images, default.max_image_side) == (64, 64, 4096)
    assert (default.request_timeout, default.host, default.port) == (300, "127.0.0.1", 8000)
    monkeypatch.setenv("DRAWWELL_MAX_IMAGES", "3")
    monkeypatch.setenv("DRAWWELL_DATA", "unrelated")
    assert Settings().max_images == 3
    monkeypatch.setenv("DRAWWELL_MAX_IMAGES", "none")
    with pytest.raises(ValueError, match="max_images"):
        Settings()


async def test_limits_are_settings(tmp_path: Path) -> None:
    api = Api(tmp_path, max_images=2, max_score_images=1, max_image_side=4)
    assert "maximum of 2" in (await api.post("/generate", {"model": "gan", "n": 3})).json()["detail"]
    two = await api.post("/score", {"model": "diffusion", "images": [PNG, PNG]})
    assert "1 to 1" in two.json()["detail"]
    wide = await api.post("/score", {"model": "diffusion", "images": [PNG]})
    assert "4×4 is the largest" in wide.json()["detail"]
