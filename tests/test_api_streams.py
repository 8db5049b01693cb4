"""Streams, and following a job: events in their form and order, reruns told once, hanging up cancels."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import uvicorn
from api_fakes import Api, Call, after, at_once, b64, events_of, file_of, picture, pixels_of, silence, tell
from hypothesis import given

from service.broker import Event, Job
from service.jobs import Once, pausing
from service.messages import Completed, Failed, ImageDone, Message, Progress, Scored, Started

pytestmark = pytest.mark.anyio

STREAM = {"Accept": "text/event-stream"}
PNG = b64(file_of(picture(1, 0, (1, 4, 5))))


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


# -------------------------------------------------------------------------------------------------------------- events


@pytest.mark.parametrize(("more", "headers"), [({}, STREAM), ({"stream": True}, {}), ({"stream": True}, STREAM)])
async def test_the_events_are_exactly_those_of_the_contract(api: Api, more: Any, headers: Any) -> None:
    body = {"model": "diffusion", "n": 2, "seed": 7, **more}
    api.broker.places = [3]
    response = await api.post("/generate", body, headers=headers)
    assert response.status_code == 200
    assert response.headers["content-type"].partition(";")[0] == "text/event-stream"
    assert response.headers["cache-control"] == "no-store"
    assert "content-length" not in response.headers
    (queued, progress, first, second, completed) = events_of(response.text)
    assert queued == ("queued", {"position": 3, "eta_seconds": None})
    assert progress == ("progress", {"step": 1, "steps": 20, "eta_seconds": 0.5})
    for k, (name, image) in enumerate((first, second)):
        assert name == "image"
        assert image.keys() == {"sample", "b64_json"}
        assert image["sample"] == k
        assert (pixels_of(base64.b64decode(image["b64_json"])) == picture(7, k, (1, 4, 5))).all()
    whole = (await api.post("/generate", {"model": "diffusion", "n": 2, "seed": 7})).json()
    del whole["images"]
    assert completed == ("completed", whole | {"id": completed[1]["id"]})


@pytest.mark.parametrize("headers", [{}, {"Accept": "image/png"}, {"Idempotency-Key": "a"}])
async def test_who_takes_the_answer_as_a_whole_costs_no_look_at_the_queue(api: Api, headers: Any) -> None:
    api.broker.places = [2, 1, 0]
    assert (await api.post("/generate", {"model": "gan"}, headers=headers)).status_code == 200
    assert (
        await api.post("/score", {"model": "density", "images": [b64(file_of(picture(1, 0, (3, 4, 5))))]})
    ).is_success
    assert api.broker.places == [2, 1, 0]
    await api.post("/generate", {"model": "gan"}, headers=STREAM)
    assert api.broker.places == [1, 0]


async def test_previews_come_with_progress_null_for_an_image_that_has_not_begun(api: Api) -> None:
    shown = picture(1, 1, (1, 4, 5))
    api.broker.answer = after(Event(tell(Progress(5, 20, 1.5, (None, shown)))[0].payload), *at_once_tail())
    response = await api.post("/generate", {"model": "diffusion", "n": 2, "preview_every": 5}, headers=STREAM)
    assert api.broker.task.preview_every == 5
    progress = next(data for name, data in events_of(response.text) if name == "progress")
    assert progress["preview"][0] is None
    assert (pixels_of(base64.b64decode(progress["preview"][1])) == shown).all()


def at_once_tail() -> list[Event]:
    return tell(*(ImageDone(k, picture(1, k, (1, 4, 5))) for k in range(2)), Completed(0, 0, 2))


async def test_a_job_that_fails_ends_its_stream_with_the_problem(api: Api) -> None:
    api.broker.answer = after(*tell(Started(0), Failed("row", "it turned NaN")))
    response = await api.post("/generate", {"model": "gan"}, headers=STREAM)
    assert response.status_code == 200
    assert events_of(response.text)[1:] == [
        (
            "error",
            {
                "problem": {
                    "type": "urn:drawwell:problem:row-failed",
                    "title": "The model failed on this request",
                    "status": 500,
                    "detail": "it turned NaN",
                }
            },
        )
    ]


async def test_what_nobody_foresaw_ends_a_stream_without_its_insides(
    api: Api, caplog: pytest.LogCaptureFixture
) -> None:
    async def fall(job: Job) -> AsyncIterator[Event]:
        raise ZeroDivisionError("secret")
        yield

    api.broker.answer = after(then=fall)
    response = await api.post("/generate", {"model": "gan"}, headers=STREAM)
    (_, (name, data)) = events_of(response.text)
    assert (name, data["problem"]["status"]) == ("error", 500)
    assert "secret" not in response.text
    assert "secret" in caplog.text


async def test_a_stream_that_takes_too_long_ends_with_504_and_its_job_is_cancelled(api: Api) -> None:
    api.broker.answer = silence
    response = await api.post("/generate", {"model": "gan", "timeout": 0.3}, headers=STREAM)
    (_, (name, data)) = events_of(response.text)
    assert (name, data["problem"]["status"]) == ("error", 504)
    assert api.broker.cancelled == [api.broker.job.id]


async def test_comments_keep_a_silent_stream_open(tmp_path: Path) -> None:
    api = Api(tmp_path, keep_alive_seconds=0.01)
    api.broker.answer = silence
    call = Call(api.app, "/generate", {"model": "gan"}, STREAM)
    await call.until(": keep-alive\n\n" * 3)
    assert events_of(call.text)[:4] == [("queued", {"position": 0, "eta_seconds": None}), *[("", "keep-alive")] * 3]
    call.hang_up()
    await call.task


async def test_a_queued_job_tells_its_place_whenever_it_moves_until_it_runs(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs._POSITION_SECONDS", 0.01)
    go = asyncio.Event()

    async def wait(job: Job) -> AsyncIterator[Event]:
        await go.wait()
        for event in at_once(job):
            yield event

    api.broker.places, api.broker.answer = [2, 2, 1, 1, 1, 0], wait
    call = Call(api.app, "/generate", {"model": "gan"}, STREAM)
    await call.until('"position": 0')
    go.set()
    await call.task
    places = [data["position"] for name, data in events_of(call.text) if name == "queued"]
    assert places == [2, 1, 0]


# ---------------------------------------------------------------------------------------------------------- hanging up


@pytest.mark.parametrize(
    ("path", "body", "headers"),
    [
        ("/generate", {"model": "gan"}, {}),
        ("/generate", {"model": "gan"}, {"Accept": "image/png"}),
        ("/generate", {"model": "gan"}, STREAM),
        ("/score", {"model": "diffusion", "images": [PNG]}, {}),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
async def test_hanging_up_cancels_the_job(
    api: Api, path: str, body: Any, headers: Any, begun: bool, caplog: pytest.LogCaptureFixture
) -> None:
    api.broker.answer = after(*tell(Started(0), Completed(0, 0, 0))[:1]) if begun else silence
    call = Call(api.app, path, body, headers)
    await asyncio.wait_for(api.broker.changed.wait(), 30)
    for _ in range(10):
        await asyncio.sleep(0)
    assert api.broker.cancelled == []
    call.hang_up()
    await asyncio.wait_for(call.task, 30)
    assert api.broker.cancelled == [api.broker.job.id]
    assert not any(m["type"] == "http.response.body" and not m.get("more_body") for m in call.sent)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_hanging_up_at_any_moment_leaves_no_job_behind(api: Api) -> None:
    """Wherever the event loop stands when the client goes, a job that was submitted has ended or is cancelled."""
    left = 0
    for turns in range(60):
        api.broker.jobs.clear()
        api.broker.cancelled.clear()
        api.broker.answer = silence
        call = Call(api.app, "/generate", {"model": "gan"}, STREAM if turns % 2 else {})
        for _ in range(turns):
            await asyncio.sleep(0)
        call.hang_up()
        await asyncio.wait_for(call.task, 30)
        assert set(api.broker.jobs) <= set(api.broker.cancelled)
        left += len(api.broker.jobs)
    assert left > 0


async def test_cancelling_the_request_itself_cancels_the_job(api: Api) -> None:
    """As a server does that shuts down."""
    for headers in ({}, STREAM):
        api.broker.jobs.clear()
        api.broker.changed.clear()
        api.broker.answer = silence
        call = Call(api.app, "/generate", {"model": "gan"}, headers)
        await asyncio.wait_for(api.broker.changed.wait(), 30)
        call.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call.task
        assert api.broker.cancelled[-1] == api.broker.job.id


@pytest.mark.parametrize("accept", ["application/json", "text/event-stream"])
async def test_closing_the_socket_cancels_the_job_under_a_real_server(api: Api, accept: str) -> None:
    api.broker.answer = silence
    server = uvicorn.Server(uvicorn.Config(api.app, lifespan="off", log_config=None))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        _, writer = await asyncio.open_connection(*listener.getsockname())
        body = json.dumps({"model": "gan"})
        head = f"POST /generate HTTP/1.1\r\nHost: api\r\nContent-Type: application/json\r\nAccept: {accept}\r\n"
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        await asyncio.wait_for(api.broker.changed.wait(), 30)
        assert api.broker.cancelled == []
        writer.close()
        for _ in range(3000):
            if api.broker.cancelled:
                break
            await asyncio.sleep(0.01)
        assert api.broker.cancelled == [api.broker.job.id]
        server.should_exit = True
        await serving


# -------------------------------------------------------------------------------------------------------------- reruns

PIXELS = picture(0, 0, (1, 2, 2))


@st.composite
def runs(draw: st.DrawFn) -> list[Message]:
    """A job's messages from beginning to end: images in any order, between steps that go up."""
    n, steps = draw(st.integers(1, 4)), draw(st.lists(st.integers(0, 50), unique=True).map(sorted))
    done: list[Message] = [ImageDone(k, PIXELS) for k in draw(st.permutations(range(n)))]
    done += [Scored(k, -1.0) for k in range(n)]
    told: list[Message] = [Progress(step, 50) for step in steps]
    for message in done:
        told.insert(draw(st.integers(0, len(told))), message)
    return [Started(0.0), *told, Completed(0.0, 0.0, 1)]


def once(messages: list[Message]) -> list[Message]:
    filter = Once()
    return [m for m in messages if filter.admit(m)]


@given(runs())
def test_a_run_without_a_rerun_is_told_as_it_is(run: list[Message]) -> None:
    assert once(run) == run


@given(runs(), st.data())
def test_a_rerun_adds_nothing_to_what_was_told(run: list[Message], data: st.DataObject) -> None:
    """However often workers died, and however far each came, what is told is one run."""
    cuts = data.draw(st.lists(st.integers(0, len(run) - 1), max_size=3))
    interrupted = [m for cut in cuts for m in run[:cut]]
    assert sorted(map(repr, once(interrupted + run))) == sorted(map(repr, run))


@given(runs(), runs(), st.data())
def test_progress_never_goes_back_even_when_a_rerun_tells_other_steps(
    one: list[Message], other: list[Message], data: st.DataObject
) -> None:
    told = once(one[: data.draw(st.integers(0, len(one) - 1))] + other)
    steps = [m.step for m in told if isinstance(m, Progress)]
    assert steps == sorted(set(steps))
    samples = [m.sample for m in told if isinstance(m, ImageDone)]
    assert len(samples) == len(set(samples))


async def test_a_rerun_reaches_the_client_once(api: Api) -> None:
    async def twice(job: Job) -> AsyncIterator[Event]:
        events = at_once(job)
        for event in [*events[:4], *events]:
            yield event

    api.broker.answer = twice
    streamed = await api.post("/generate", {"model": "diffusion", "n": 3, "seed": 5}, headers=STREAM)
    names = [name for name, _ in events_of(streamed.text)]
    assert names == ["queued", "progress", "image", "image", "image", "completed"]
    api.broker.jobs.clear()
    answer = (await api.post("/generate", {"model": "diffusion", "n": 3, "seed": 5})).json()
    assert [image["sample"] for image in answer["images"]] == [0, 1, 2]


async def test_a_job_whose_events_end_without_an_answer_is_interrupted(api: Api) -> None:
    async def stop(job: Job) -> AsyncIterator[Event]:
        yield tell(Started(0), Completed(0, 0, 0))[0]

    api.broker.answer = stop
    response = await api.post("/generate", {"model": "gan"})
    assert (response.status_code, response.json()["type"]) == (503, "urn:drawwell:problem:interrupted")


async def test_a_worker_that_tells_too_few_images_is_a_fault_of_ours(api: Api) -> None:
    api.broker.answer = after(*tell(ImageDone(0, PIXELS), Completed(0, 0, 0)))
    response = await api.post("/generate", {"model": "diffusion", "n": 2})
    assert response.status_code == 500


async def test_pausing_tells_silence_and_loses_nothing() -> None:
    heard = asyncio.Event()

    async def slow() -> AsyncIterator[int]:
        yield 0
        await heard.wait()
        yield 1

    told = []
    async for item in pausing(slow(), 0.001):
        told.append(item)
        if item is None:
            heard.set()
    assert None in told
    assert [item for item in told if item is not None] == [0, 1]
