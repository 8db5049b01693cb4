"""The client against a scripted server: what it sends, what it makes of answers, when it retries, what it raises."""

from __future__ import annotations

import base64
import email.utils
import io
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from drawwell import (
    ApiError,
    Busy,
    Client,
    Completed,
    ContractError,
    Drawn,
    DrawwellError,
    Invalid,
    NotFound,
    Progress,
    Queued,
    ServerError,
    TimedOut,
    TransportError,
)
from drawwell.schemas import grid
from drawwell.transport import LONGEST_WAIT, backoff

Step = httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]


class Server:
    """Answers one step of its script after another, and remembers what it was asked and how long the client waited."""

    def __init__(self, *script: Step) -> None:
        self.script = list(script)
        self.asked: list[httpx.Request] = []
        self.waits: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        step = self.script.pop(0)
        if isinstance(step, Exception):
            raise step
        return step if isinstance(step, httpx.Response) else step(request)

    def client(self, **options: Any) -> Client:
        return Client("http://well", transport=httpx.MockTransport(self), sleep=self.waits.append, **options)

    def body(self, k: int = 0) -> dict[str, Any]:
        body: dict[str, Any] = json.loads(self.asked[k].content)
        return body


def png(level: int, mode: str = "L", size: tuple[int, int] = (4, 3)) -> str:
    buffer = io.BytesIO()
    Image.new(mode, size, level).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def generated(n: int = 2, **changes: Any) -> httpx.Response:
    answer = {
        "id": "j1",
        "model": "m",
        "family": "ddpm",
        "steps": 50,
        "seed": 7,
        "images": [{"b64_json": png(10 * k), "seed": 7, "sample": k} for k in range(n)],
        "width": 4,
        "height": 3,
        "channels": 1,
        "usage": {"queue_seconds": 0.01, "compute_seconds": 1.2, "network_evaluations": 200},
        "model_sha256": "abc",
    }
    return httpx.Response(200, json=answer | changes)


def problem(status: int, detail: str = "no", headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    content = {"type": "about:blank", "title": "Title", "status": status, "detail": detail, **more}
    return httpx.Response(
        status,
        json=content,
        headers={"Content-Type": "application/problem+json", "X-Request-ID": "r1", **(headers or {})},
    )


# ----------------------------------------------------------------------------------------------------------- generating


def test_only_what_was_asked_for_is_sent() -> None:
    server = Server(generated(1), generated(1))
    with server.client() as well:
        well.generate("m")
        well.generate(
            "m", n=4, seed=0, label=0, steps=5, solver="ddim", guidance_scale=0.0, priority="batch", timeout=3
        )
    assert server.body(0) == {"model": "m"}
    assert server.body(1) == {
        "model": "m",
        "n": 4,
        "seed": 0,
        "label": 0,
        "steps": 5,
        "solver": "ddim",
        "guidance_scale": 0.0,
        "priority": "batch",
        "timeout": 3,
    }


def test_images_are_pictures_with_what_it_takes_to_draw_them_again(tmp_path: Path) -> None:
    with Server(generated(3)).client() as well:
        images = well.generate("m", n=3)
    assert [image.getpixel((0, 0)) for image in images] == [0, 10, 20]
    assert (images.seed, images.samples, images.steps, images.model, images.model_sha256) == (
        7,
        (0, 1, 2),
        50,
        "m",
        "abc",
    )
    assert (images.size, images.channels, images.usage.network_evaluations) == ((4, 3), 1, 200)
    paths = images.save(tmp_path / "out")
    assert [path.name for path in paths] == ["m-7-0.png", "m-7-1.png", "m-7-2.png"]
    for path, image in zip(paths, images, strict=True):
        with Image.open(path) as saved:
            assert saved.tobytes() == image.tobytes()
    assert [len(images[1:]), images[-1].getpixel((0, 0))] == [2, 20]


def test_a_grid_holds_every_picture_enlarged() -> None:
    pictures = [Image.new("L", (4, 3), 10 * k) for k in range(5)]
    sheet = grid(pictures, columns=2, scale=3, gap=1)
    assert sheet.size == (2 * 12 + 1, 3 * 9 + 2)
    for k in range(5):
        assert {
            sheet.getpixel((x, y))
            for x in range(k % 2 * 13, k % 2 * 13 + 12)
            for y in range(k // 2 * 10, k // 2 * 10 + 9)
        } == {10 * k}
    with pytest.raises(ValueError, match="no pictures"):
        grid([])
    with pytest.raises(ValueError, match="different sizes"):
        grid([Image.new("L", (1, 1)), Image.new("L", (2, 1))])


# ------------------------------------------------------------------------------------------------------------ streaming


def sse(*events: tuple[str, dict[str, Any]], comment: bool = True) -> bytes:
    text = "".join(f"event: {name}\ndata: {json.dumps(data)}\n\n" for name, data in events)
    return ((": keep-alive\n\n" if comment else "") + text).encode()


COMPLETED = ("completed", {k: v for k, v in generated().json().items() if k != "images"})
STORY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("queued", {"position": 2}),
    ("progress", {"step": 10, "steps": 50, "eta_seconds": 1.5, "preview": [png(3), None]}),
    ("something-new", {}),
    ("progress", {"step": 50, "steps": 50, "eta_seconds": None}),
    ("image", {"sample": 1, "b64_json": png(10)}),
    ("image", {"sample": 0, "b64_json": png(0)}),
    COMPLETED,
)


def test_a_stream_tells_what_happens_and_ends_with_what_generate_returns() -> None:
    server = Server(httpx.Response(200, content=sse(*STORY)), generated())
    with server.client() as well:
        queued, begun, done, *drawn, completed = well.stream("m", n=2, seed=7, preview_every=10)
        whole = well.generate("m", n=2, seed=7)
    assert server.body() == {"model": "m", "n": 2, "seed": 7, "preview_every": 10, "stream": True}
    assert server.asked[0].headers["Accept"] == "text/event-stream"
    assert queued == Queued(2)
    assert isinstance(begun, Progress)
    assert (begun.step, begun.steps, begun.eta_seconds) == (10, 50, 1.5)
    assert [picture and picture.getpixel((0, 0)) for picture in begun.previews] == [3, None]
    assert done == Progress(50, 50, None)
    assert [event.sample for event in drawn if isinstance(event, Drawn)] == [1, 0]
    assert isinstance(completed, Completed)
    assert [image.tobytes() for image in completed.images] == [image.tobytes() for image in whole]
    assert (completed.images.samples, completed.images.seed) == (whole.samples, whole.seed)


def test_a_stream_is_parsed_however_it_is_cut_into_pieces() -> None:
    content = sse(*STORY)
    for size in (1, 7, 100):
        pieces = [content[k : k + size] for k in range(0, len(content), size)]
        with Server(httpx.Response(200, content=iter(pieces))).client() as well:
            assert [type(event) for event in well.stream("m")] == [Queued, Progress, Progress, Drawn, Drawn, Completed]


def test_what_fails_before_the_first_event_is_tried_again() -> None:
    server = Server(
        httpx.ConnectError("refused"),
        problem(429, headers={"Retry-After": "3"}),
        httpx.Response(200, content=sse(*STORY)),
    )
    with server.client() as well:
        assert isinstance(list(well.stream("m"))[-1], Completed)
    assert len({request.headers["Idempotency-Key"] for request in server.asked}) == 1
    assert server.waits[1] == 3


def test_a_stream_that_is_refused_says_why() -> None:
    with Server(problem(422, detail="steps: too many")).client() as well, pytest.raises(Invalid, match="too many"):
        list(well.stream("m"))


def test_an_error_midway_is_raised_after_what_was_told_before() -> None:
    error = ("error", {"problem": {"title": "Busy", "status": 503, "detail": "the worker went away"}})
    server = Server(httpx.Response(200, content=sse(*STORY[:2], error)))
    with server.client() as well:
        events = well.stream("m")
        assert [type(next(events)), type(next(events))] == [Queued, Progress]
        with pytest.raises(Busy, match="the worker went away"):
            next(events)


def cut_off() -> Iterator[bytes]:
    yield sse(*STORY[:2])
    raise httpx.ReadError("cut")


@pytest.mark.parametrize("content", [sse(*STORY[:-1]), b"", cut_off()])
def test_a_stream_that_breaks_off_is_no_completed_one(content: Any) -> None:
    with Server(httpx.Response(200, content=content)).client() as well, pytest.raises(TransportError):
        list(well.stream("m"))


@pytest.mark.parametrize("data", ["no json", "[]", '{"position": "first"}'])
def test_an_event_outside_the_contract_is_said_to_be_one(data: str) -> None:
    content = f"event: queued\ndata: {data}\n\n".encode()
    with Server(httpx.Response(200, content=content)).client() as well, pytest.raises(ContractError):
        list(well.stream("m"))


# -------------------------------------------------------------------------------------------------------------- scoring

SCORED: dict[str, Any] = {
    "model": "m",
    "family": "pixelcnn",
    "kind": "exact",
    "dequantisation": "none",
    "results": [
        {
            "log_prob": -1510.2,
            "bits_per_dim": 2.78,
            "stderr": None,
            "anomaly": {
                "score": 3.1,
                "p_value": 0.004,
                "is_anomaly": True,
                "alpha": 0.01,
                "threshold": 2.9,
                "false_positive_rate_upper95": 0.0157,
            },
            "statistics": {"nll_bits": 2178.0},
            "heatmap": png(9),
        },
        {"log_prob": -1.0, "bits_per_dim": 0.1, "anomaly": None, "statistics": {}, "something_new": 1},
    ],
    "calibration": {"n": 1000, "sha256": "x"},
    "warnings": ["resized"],
}


def test_the_very_pixels_are_sent_whatever_an_image_is_given_as(tmp_path: Path) -> None:
    server = Server(*[httpx.Response(200, json=SCORED)] * 3)
    picture = Image.effect_noise((6, 5), 80)
    picture.save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    with server.client() as well:
        well.score("m", picture)
        well.score(
            ["m", "k"], [picture, content, tmp_path / "x.png", str(tmp_path / "x.png")], alpha=0.05, heatmap=True
        )
        well.score("m", content)
    assert server.body(1)["model"] == ["m", "k"]
    assert (server.body(1)["alpha"], server.body(1)["heatmap"]) == (0.05, True)
    sent = server.body(0)["images"] + server.body(1)["images"] + server.body(2)["images"]
    assert len(sent) == 6
    for item in sent:
        with Image.open(io.BytesIO(base64.b64decode(item))) as received:
            assert received.tobytes() == picture.tobytes()


def test_scores_are_values() -> None:
    with Server(httpx.Response(200, json=SCORED)).client() as well:
        scores = well.score("m", [b"a", b"b"])
    first, second = scores
    assert (scores.kind, scores.dequantisation, scores.warnings, len(scores)) == ("exact", "none", ("resized",), 2)
    assert (first.log_prob, first.bits_per_dim, first.statistics) == (-1510.2, 2.78, {"nll_bits": 2178.0})
    assert first.anomaly is not None
    assert str(first.anomaly) == "anomaly (p = 0.004, alpha 0.01)"
    assert first.heatmap is not None
    assert first.heatmap.getpixel((0, 0)) == 9
    assert (second.anomaly, second.heatmap, second.energy) == (None, None, None)
    assert (second.mask, second.members) == (None, {})


def test_an_ensembles_scores_have_those_of_its_members() -> None:
    each = {"log_prob": -7.0, "bits_per_dim": 0.5, "stderr": None, "anomaly": None, "statistics": {"nll_bits": 10.0}}
    together = {"log_prob": None, "bits_per_dim": None, "statistics": {"m.nll_bits": 10.0}, "heatmap": png(9)}
    answer = {
        **SCORED,
        "model": ["m", "k"],
        "family": ["glow", "ddpm"],
        "kind": ["bound", "bound"],
        "dequantisation": ["uniform K=1", "none"],
        "results": [{**together, "mask": png(255), "members": {"m": each, "k": each}}],
    }
    with Server(httpx.Response(200, json=answer)).client() as well:
        scores = well.score(["m", "k"], b"a", heatmap=True, confidence=0.95)
    assert (scores.model, scores.kind) == (("m", "k"), ("bound", "bound"))
    (score,) = scores
    assert score.mask is not None
    assert score.mask.getpixel((0, 0)) == 255
    assert score.members["k"].log_prob == -7.0
    assert score.log_prob is None


# --------------------------------------------------------------------------------------------------------------- models

MODEL: dict[str, Any] = {
    "id": "m",
    "family": "ddpm",
    "status": "ready",
    "image": {"width": 28, "height": 28, "channels": 1},
    "steps": {
        "kind": "iterative",
        "unit": "denoising step",
        "min": 1,
        "default": 50,
        "max": 1000,
        "network_evaluations_per_step": 1,
    },
    "solvers": ["ddim"],
    "likelihood": {"kind": "bound", "dequantisation": "none"},
    "conditioning": {"labels": ["a", "b"]},
    "accepts": {"steps": {"type": "integer"}},
    "metrics": {"bits_per_dim": 3.1},
    "sha256": "x",
}


def test_a_calibration_sends_the_images_and_waits_for_as_long_as_it_takes() -> None:
    made = {"version": 2, "current": True, "sha256": "x", "n": 50, "fit_n": 50, "smallest_alpha": 0.02, "created": None}
    server = Server(
        httpx.Response(503, json={"title": "busy"}),
        httpx.Response(201, json=made),
        httpx.Response(200, json={"model": "m", "current": 2, "versions": [{"version": 0, "sha256": "y"}, made]}),
        httpx.Response(200, json={"model": "m", "current": 0, "versions": [{"version": 0, "current": True}]}),
        httpx.Response(403, json={"title": "no", "status": 403, "detail": "DRAWWELL_ALLOW_CALIBRATION is no"}),
    )
    with server.client(timeout=5) as well:
        calibration = well.calibrate("m", [b"a", b"b"], "line 3", timeout=1000)
        assert (calibration.version, calibration.n, calibration.current) == (2, 50, True)
        assert [c.version for c in well.calibrations("m")] == [0, 2]
        assert [c.current for c in well.use_calibration("m", 0)] == [True]
        with pytest.raises(ApiError, match="DRAWWELL_ALLOW_CALIBRATION"):
            well.calibrate("m", [b"a"])
    assert server.body(1) == {"images": [base64.b64encode(x).decode() for x in (b"a", b"b")], "description": "line 3"}
    first, again, listed, chosen, _ = server.asked
    assert (first.method, first.url.path) == ("POST", "/models/m/calibration")
    assert first.headers["Idempotency-Key"] == again.headers["Idempotency-Key"], "tried again, it is made once"
    assert first.extensions["timeout"]["read"] == 1000
    assert listed.extensions["timeout"]["read"] == 5
    assert (chosen.method, server.body(3)) == ("PUT", {"version": 0})


def test_models_say_what_they_are() -> None:
    nothing = dict.fromkeys(("family", "image", "steps", "solvers", "likelihood", "conditioning", "accepts", "sha256"))
    failed = {"id": "k", "status": "failed", "error": "weights.safetensors: missing", **nothing}
    server = Server(httpx.Response(200, json={"models": [MODEL, failed]}), httpx.Response(200, json=MODEL))
    with server.client() as well:
        m, k = well.models()
        assert well.model("m") == m
    assert [str(request.url) for request in server.asked] == ["http://well/models", "http://well/models/m"]
    assert m.steps is not None
    assert (m.labels, m.steps.max, m.image and m.image.width) == (("a", "b"), 1000, 28)
    assert (k.status, k.error, k.labels, k.likelihood) == ("failed", "weights.safetensors: missing", (), None)


def test_ready_is_a_plain_answer() -> None:
    server = Server(httpx.ConnectError("refused"), problem(503), httpx.Response(200, json={}))
    with server.client() as well:
        assert [well.ready(), well.ready(), well.ready()] == [False, False, True]
    assert server.waits == []


def test_waiting_ends_when_the_server_is_ready_or_time_is_up() -> None:
    server = Server(httpx.ConnectError("refused"), problem(503), httpx.Response(200, json={}), problem(503))
    with server.client() as well:
        well.wait_until_ready(every=0.1)
        assert server.waits == [0.1, 0.1]
        with pytest.raises(TimedOut, match="not ready after 0 s"):
            well.wait_until_ready(timeout=0)


# ------------------------------------------------------------------------------------------------------------- retrying


@pytest.mark.parametrize(
    "failure",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("slow"),
        httpx.RemoteProtocolError("cut"),
        problem(429),
        problem(503),
        httpx.Response(502, text="<html>"),
    ],
)
def test_what_passes_is_tried_again_with_the_same_key_and_body(failure: Step) -> None:
    server = Server(failure, failure, generated())
    with server.client() as well:
        assert len(well.generate("m", n=2, seed=7)) == 2
    assert len({request.headers["Idempotency-Key"] for request in server.asked}) == 1
    assert len({request.content for request in server.asked}) == 1
    assert len(server.waits) == 2
    assert 0 < server.waits[0] < server.waits[1]


def test_every_request_has_a_key_of_its_own() -> None:
    server = Server(generated(), generated())
    with server.client() as well:
        well.generate("m")
        well.generate("m")
    assert len({request.headers["Idempotency-Key"] for request in server.asked}) == 2


def test_retry_after_is_obeyed_as_seconds_and_as_a_date() -> None:
    date = email.utils.formatdate(time.time() + 20, usegmt=True)
    server = Server(
        problem(429, headers={"Retry-After": "7"}),
        problem(503, headers={"Retry-After": date}),
        problem(503, headers={"Retry-After": "0"}),
        problem(503, headers={"Retry-After": "soon"}),
        generated(),
    )
    with server.client() as well:
        well.generate("m")
    assert server.waits[0] == 7
    assert 15 < server.waits[1] <= 20
    assert server.waits[2] == 0
    assert server.waits[3] > 0


def test_a_wait_that_is_too_long_is_the_callers_to_decide() -> None:
    server = Server(problem(429, headers={"Retry-After": str(LONGEST_WAIT + 1)}))
    with server.client() as well, pytest.raises(Busy) as caught:
        well.generate("m")
    assert caught.value.retry_after == LONGEST_WAIT + 1
    assert server.waits == []


def test_attempts_end() -> None:
    server = Server(*[problem(503, detail="no worker")] * 3)
    with server.client(retries=2) as well, pytest.raises(Busy, match="no worker"):
        well.generate("m")
    assert len(server.asked) == 3
    with pytest.raises(ValueError, match="retries: -1"):
        Client(retries=-1)


def test_waits_grow_and_stay_bounded() -> None:
    waits = [backoff(attempt) for attempt in range(50)]
    assert all(0 < wait <= 10 for wait in waits)
    assert min(waits[5:]) > max(waits[:2])


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (problem(404), NotFound),
        (problem(400), Invalid),
        (problem(413), Invalid),
        (problem(415), Invalid),
        (problem(422), Invalid),
        (problem(500), ServerError),
        (problem(409), ApiError),
        (httpx.Response(500, text="Internal Server Error"), ServerError),
        (httpx.Response(404, json=["odd"]), NotFound),
    ],
)
def test_what_would_not_change_is_raised_at_once(answer: httpx.Response, kind: type[ApiError]) -> None:
    server = Server(answer)
    with server.client() as well, pytest.raises(ApiError) as caught:
        well.generate("m")
    assert type(caught.value) is kind
    assert caught.value.status == answer.status_code
    assert isinstance(caught.value, DrawwellError)
    assert len(server.asked) == 1


def test_an_invalid_request_names_the_field() -> None:
    errors = [
        {"loc": ["body", "steps"], "msg": "must be at most 1000", "input": 5000},
        {"loc": "images.3", "msg": "is 32×32, the model takes 28×28"},
    ]
    with Server(problem(422, detail="2 fields", errors=errors)).client() as well, pytest.raises(Invalid) as caught:
        well.generate("m", steps=5000)
    assert [(field.name, field.value) for field in caught.value.fields] == [("steps", 5000), ("images.3", None)]
    assert str(caught.value) == (
        "Title: 2 fields\n  steps: must be at most 1000\n  images.3: is 32×32, the model takes 28×28 [request r1]"
    )


@pytest.mark.parametrize(
    ("failure", "kind"), [(httpx.ConnectError("refused"), TransportError), (httpx.ReadTimeout("slow"), TimedOut)]
)
def test_no_answer_is_told_apart_from_a_no(failure: Exception, kind: type[TransportError]) -> None:
    with (
        Server(failure).client(retries=0) as well,
        pytest.raises(TransportError, match="http://well/generate") as caught,
    ):
        well.generate("m")
    assert type(caught.value) is kind
    assert caught.value.__cause__ is failure


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, text="<html>a page</html>"),
        httpx.Response(200, json={"id": "j1"}),
        generated(1, images=[{"b64_json": "AAAA", "seed": 1, "sample": 0}]),
        generated(1, images=[{"b64_json": "no base64!", "seed": 1, "sample": 0}]),
    ],
)
def test_an_answer_outside_the_contract_is_said_to_be_one(answer: httpx.Response) -> None:
    with Server(answer).client() as well, pytest.raises(ContractError):
        well.generate("m")


def test_another_kind_of_server_is_noticed() -> None:
    with Server(httpx.Response(200, json=[])).client() as well, pytest.raises(ContractError, match="without 'models'"):
        well.models()
