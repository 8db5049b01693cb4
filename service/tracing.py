"""Spans of requests and jobs for OpenTelemetry: where the time of one request goes. Off by default.

    POST /generate               in the API, as a child of the client's `traceparent`
      queue, steps               in the worker, on whatever machine: the job carries the trace
      encode                     in the API: pixels to files

Without the packages (the extra `otel`), or without `start`, nothing is recorded and nothing is sent. Where spans go,
the usual variables say (OTEL_EXPORTER_OTLP_ENDPOINT, OTEL_RESOURCE_ATTRIBUTES, ...)."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

from service.broker import Job
from service.messages import Completed, Failed, Message, Started

try:
    from opentelemetry import propagate, trace
except ModuleNotFoundError:  # an extra
    trace = propagate = None  # type: ignore[assignment]

Traces: TypeAlias = Literal["off", "console", "otlp"]

_NAME = "drawwell"


def start(traces: Traces, service: str) -> None:
    """Record spans in this process, and send them. Raises `ValueError` where a package is missing."""
    if traces == "off":
        return
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SimpleSpanProcessor

        provider = TracerProvider(resource=Resource.create({"service.name": service}))
        if traces == "console":
            provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
        else:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

            provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    except ModuleNotFoundError as e:
        raise ValueError(f"traces: {traces!r} needs the package {e.name}: pip install -e '.[otel]'") from e
    trace.set_tracer_provider(provider)


@contextmanager
def request(method: str, headers: Mapping[str, str]) -> Iterator[Any]:
    """A span of a request, which goes on the client's trace. Yields what `answered` takes."""
    if trace is None:
        yield None
        return
    with trace.get_tracer(_NAME).start_as_current_span(
        method,
        context=propagate.extract(headers),
        kind=trace.SpanKind.SERVER,
        attributes={"http.request.method": method},
    ) as span:
        yield span


def answered(span: Any, method: str, route: str, status: int) -> None:
    """Tell what became of a request."""
    if span is not None and span.is_recording():
        span.update_name(f"{method} {route}")
        span.set_attributes({"http.route": route, "http.response.status_code": status})
        if status >= 500:
            span.set_status(trace.Status(trace.StatusCode.ERROR))


@contextmanager
def span(name: str, **attributes: str | int | float) -> Iterator[None]:
    """A span of its own, beneath the current one."""
    if trace is None:
        yield
        return
    with trace.get_tracer(_NAME).start_as_current_span(
        name, attributes={f"{_NAME}.{key}": value for key, value in attributes.items()}
    ):
        yield


def carried() -> str:
    """The current span as a `traceparent` (https://www.w3.org/TR/trace-context/), for a job to take along; or ""."""
    if trace is None:
        return ""
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent", "")


class JobSpans:
    """A worker's spans of its jobs: how long each waited, and how long it stepped."""

    def __init__(self) -> None:
        self._began: dict[str, int] = {}  # job -> when its first step began, in ns since the epoch

    def told(self, job: Job, message: Message) -> None:
        """What the worker tells of a job."""
        if trace is None or not job.trace:
            return
        now = time.time_ns()
        if isinstance(message, Started):
            self._began[job.id] = now
            self._record(job, "queue", now - int(message.queue_seconds * 1e9), now)
        elif isinstance(message, Completed | Failed):
            self._record(job, "steps", self._began.pop(job.id, now), now, message)

    def forget(self, job_id: str) -> None:
        """Another does it."""
        self._began.pop(job_id, None)

    def _record(self, job: Job, name: str, begin: int, end: int, last: Completed | Failed | None = None) -> None:
        attributes: dict[str, str | int | float] = {
            "model": job.model,
            "kind": job.kind,
            "rows": job.rows,
            "steps": job.steps,
            "priority": job.priority,
            "attempt": job.attempt,
        }
        if isinstance(last, Completed):
            attributes |= {"compute_seconds": last.compute_seconds, "network_evaluations": last.network_evaluations}
        made = trace.get_tracer(_NAME).start_span(
            name,
            context=propagate.extract({"traceparent": job.trace}),
            start_time=begin,
            attributes={f"{_NAME}.{key}": value for key, value in attributes.items()},
        )
        if isinstance(last, Failed):
            made.set_status(trace.Status(trace.StatusCode.ERROR, last.kind))
        made.end(end)
