"""Spans: from a client's trace through the API and the job to the worker, and none where nobody asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from api_fakes import Api

from service import tracing
from service.broker import Job
from service.messages import Completed, Failed, Progress, Started
from service.middleware import WithoutPolls

sdk = pytest.importorskip("opentelemetry.sdk.trace")
trace = pytest.importorskip("opentelemetry.trace")

CLIENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
TRACE, PARENT = int(CLIENT[3:35], 16), int(CLIENT[36:52], 16)


class Kept(list[Any]):
    """A span processor that keeps what has ended."""

    def on_start(self, span: Any, parent_context: Any = None) -> None: ...

    def _on_ending(self, span: Any) -> None: ...

    def on_end(self, span: Any) -> None:
        self.append(span)

    def shutdown(self) -> None: ...

    def force_flush(self, timeout_millis: int = 0) -> bool:
        return True


_KEPT = Kept()


@pytest.fixture
def spans() -> Iterator[Kept]:
    """The spans of this process; its provider can be set once."""
    if not isinstance(trace.get_tracer_provider(), sdk.TracerProvider):
        provider = sdk.TracerProvider()
        provider.add_span_processor(_KEPT)
        trace.set_tracer_provider(provider)
    _KEPT.clear()
    yield _KEPT
    _KEPT.clear()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


def ancestors(span: Any, spans: Kept) -> set[int]:
    """Ids of the spans above it: the framework has some of its own between ours."""
    parents = {s.context.span_id: s.parent for s in spans}
    found, above = set(), span.parent
    while above is not None:
        found.add(above.span_id)
        above = parents.get(above.span_id)
    return found


@pytest.mark.anyio
async def test_a_request_goes_on_the_clients_trace_and_its_job_takes_it_along(api: Api, spans: Kept) -> None:
    answer = await api.post("/generate", {"model": "gan", "n": 2}, headers={"traceparent": CLIENT})
    assert answer.status_code == 200
    by_name = {span.name: span for span in spans}
    request, encode = by_name["POST /generate"], by_name["encode"]
    assert request.context.trace_id == encode.context.trace_id == TRACE
    assert request.parent.span_id == PARENT
    assert request.context.span_id in ancestors(encode, spans)
    assert request.attributes["http.response.status_code"] == 200
    assert encode.attributes["drawwell.images"] == 2
    carried = api.broker.job.trace
    assert carried.startswith(f"00-{TRACE:032x}-")
    assert int(carried.split("-")[2], 16) in {span.context.span_id for span in spans}
    await api.get("/healthz")
    ours = [span.name for span in spans if span.instrumentation_scope.name == "drawwell"]
    assert sorted(ours) == ["POST /generate", "encode"], "polls are not traced"


def test_a_worker_tells_how_long_a_job_waited_and_stepped(spans: Kept) -> None:
    told, job = tracing.JobSpans(), Job("j", "m", b"", rows=3, units=30, steps=10, trace=CLIENT)
    told.told(job, Started(1.5))
    told.told(job, Progress(5, 10))
    told.told(job, Completed(1.5, 0.7, 30))
    queue, steps = spans
    assert (queue.name, steps.name) == ("queue", "steps")
    for span in (queue, steps):
        assert (span.context.trace_id, span.parent.span_id) == (TRACE, PARENT)
        assert span.attributes["drawwell.model"] == "m"
        assert span.attributes["drawwell.rows"] == 3
    assert queue.end_time - queue.start_time == pytest.approx(1.5e9, rel=1e-3)
    assert queue.end_time == steps.start_time <= steps.end_time
    assert steps.attributes["drawwell.network_evaluations"] == 30
    told.told(job, Started(0.1))
    told.told(job, Failed("row", "it turned NaN"))
    assert spans[-1].status.status_code is trace.StatusCode.ERROR
    told.told(job, Started(0.1))
    told.forget("j")
    assert not told._began, "a job that is handed back leaves nothing"


def test_a_job_that_nobody_traces_makes_no_spans(spans: Kept) -> None:
    told, job = tracing.JobSpans(), Job("j", "m", b"", rows=3, units=30)
    told.told(job, Started(1.5))
    told.told(job, Completed(1.5, 0.7, 30))
    assert not spans
    assert not told._began


def test_without_the_packages_nothing_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "trace", None)
    with tracing.request("GET", {}) as span, tracing.span("encode", images=1):
        tracing.answered(span, "GET", "/x", 200)
        assert tracing.carried() == ""
    job = Job("j", "m", b"", rows=1, units=1, trace=CLIENT)
    tracing.JobSpans().told(job, Started(0.0))


def test_traces_are_off_until_they_are_asked_for() -> None:
    before = trace.get_tracer_provider()
    tracing.start("off", "drawwell-api")
    assert trace.get_tracer_provider() is before


@pytest.mark.parametrize(("path", "kept"), [("/healthz", False), ("/metrics?x=1", False), ("/generate", True)])
def test_polls_are_kept_out_of_the_access_log_unless_all_is_told(path: str, kept: bool) -> None:
    arguments = ("127.0.0.1:1", "GET", path, "1.1", 200)
    record = logging.LogRecord("uvicorn.access", logging.INFO, "", 0, '%s - "%s %s HTTP/%s" %d', arguments, None)
    root, before = logging.getLogger(), logging.getLogger().level
    try:
        root.setLevel(logging.INFO)
        assert WithoutPolls().filter(record) == kept
        root.setLevel(logging.DEBUG)
        assert WithoutPolls().filter(record)
    finally:
        root.setLevel(before)
