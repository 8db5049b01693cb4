"""What an operator watches: counters and histograms of this API process, and what the workers last told of themselves.

Names follow Prometheus' conventions: `_total` counts, `_seconds` are times, `_ratio` is between 0 and 1.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from service.broker import WorkerState
from service.drift import Drifting
from service.messages import Completed

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 300)


class Metrics:
    """One of these for each application, never a global."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"drawwell_{name}", what, labels, registry=self.registry)

        def histogram(name: str, what: str, *labels: str) -> Histogram:
            return Histogram(f"drawwell_{name}", what, labels, registry=self.registry, buckets=_SECONDS)

        self._requests = counter("http_requests", "Requests answered", "route", "method", "status")
        self._request_seconds = histogram("http_request_seconds", "From a request to the end of its answer", "route")
        self._jobs = counter(
            "jobs", "Jobs that ended while the request they came from was there, by how", "model", "kind", "outcome"
        )
        self._refused = counter("refused", "Requests refused for want of room, time or workers", "reason")
        self._cancelled = counter("cancelled", "Jobs ended before they were done, by why", "reason")
        self._first_step = histogram(
            "time_to_first_step_seconds", "From a request's arrival to the news of its first step", "model", "kind"
        )
        self._queue_seconds = histogram("queue_seconds", "From a job's submission to its first step", "model", "kind")
        self._compute_seconds = histogram("compute_seconds", "Of the steps that a job took part in", "model", "kind")

    def request(self, route: str, method: str, status: int, seconds: float) -> None:
        self._requests.labels(route, method, str(status)).inc()
        self._request_seconds.labels(route).observe(seconds)

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def cancelled(self, reason: Literal["hung-up", "expired", "deleted"]) -> None:
        self._cancelled.labels(reason).inc()

    def began(self, model: str, kind: str, seconds: float) -> None:
        self._first_step.labels(model, kind).observe(seconds)

    def job(self, model: str, kind: str) -> JobWatch:
        return JobWatch(self, model, kind)

    def ended(self, model: str, kind: str, outcome: str, completed: Completed | None) -> None:
        self._jobs.labels(model, kind, outcome).inc()
        if completed is not None:
            self._queue_seconds.labels(model, kind).observe(completed.queue_seconds)
            self._compute_seconds.labels(model, kind).observe(completed.compute_seconds)

    def exposition(self, pool: Sequence[WorkerState], queued_units: int, drifts: Iterable[Drifting] = ()) -> bytes:
        """Everything, in Prometheus' text format."""
        told = CollectorRegistry()
        told.register(_Drifts(drifts))
        told.register(_Pool(pool, queued_units))
        return generate_latest(self.registry) + generate_latest(told)


class JobWatch:
    """Counts one job's first step and its end, each once."""

    def __init__(self, metrics: Metrics, model: str, kind: str) -> None:
        self._metrics, self._model, self._kind = metrics, model, kind
        self._open, self._waits = True, True
        self._since = time.perf_counter()

    def began(self) -> None:
        if self._waits:
            self._waits = False
            self._metrics.began(self._model, self._kind, time.perf_counter() - self._since)

    def ended(self, outcome: str, completed: Completed | None = None) -> None:
        if self._open:
            self._open = False
            self._metrics.ended(self._model, self._kind, outcome, completed)

    def cancelled(self, reason: Literal["hung-up", "expired"]) -> None:
        if self._open:
            self._metrics.cancelled(reason)
        self.ended("cancelled")


class _Drifts:
    """How far watched models' scores have drifted from their calibrations, in this process."""

    def __init__(self, drifts: Iterable[Drifting]) -> None:
        self._drifts = list(drifts)

    def collect(self) -> Iterator[Metric]:
        what = "log10 of the evidence that images are not like those of the calibration (2: 100 : 1)"
        evidence = GaugeMetricFamily("drawwell_calibration_drift_log10", what, labels=["model"])
        peak = GaugeMetricFamily("drawwell_calibration_drift_peak_log10", "The most that it ever was", labels=["model"])
        alarm = GaugeMetricFamily("drawwell_calibration_drift_alarm", "1: the bound was reached", labels=["model"])
        images = CounterMetricFamily("drawwell_calibration_drift_images", "Images that were watched", labels=["model"])
        for drift in self._drifts:
            evidence.add_metric([drift.model], drift.evidence)
            peak.add_metric([drift.model], drift.peak)
            alarm.add_metric([drift.model], float(drift.alarm))
            images.add_metric([drift.model], drift.images)
        yield from (evidence, peak, alarm, images)


class _Pool:
    """The workers' own numbers, as they last told them."""

    def __init__(self, pool: Sequence[WorkerState], queued_units: int) -> None:
        self._pool, self._queued_units = pool, queued_units

    def collect(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("drawwell_workers", "Worker processes, by whether they are ready", labels=["state"])
        ready = sum(worker.ready for worker in self._pool)
        workers.add_metric(["ready"], ready)
        workers.add_metric(["not-ready"], len(self._pool) - ready)
        yield workers
        yield GaugeMetricFamily("drawwell_queued_units", "Step-units of jobs that have not ended", self._queued_units)
        labels = ["worker", "model", "kind"]
        steps = CounterMetricFamily("drawwell_steps", "Steps taken", labels=labels)
        rows = CounterMetricFamily("drawwell_step_rows", "Rows (images) over all steps", labels=labels)
        seconds = CounterMetricFamily("drawwell_step_seconds", "Device time of all steps", labels=labels)
        use = GaugeMetricFamily("drawwell_batch_utilisation_ratio", "Rows per step of the most it holds", labels=labels)
        running = GaugeMetricFamily("drawwell_running_rows", "Rows that step now", labels=labels)
        waiting = GaugeMetricFamily("drawwell_waiting_rows", "Rows that wait in the worker", labels=labels)
        cost = GaugeMetricFamily(
            "drawwell_step_cost_seconds", "Fitted: a step takes row · rows + step", labels=[*labels, "term"]
        )
        for worker in self._pool:
            for name, load in worker.load.items():
                model, _, kind = name.rpartition("/")
                whose = [worker.name, model, kind]
                steps.add_metric(whose, load.steps)
                rows.add_metric(whose, load.rows)
                seconds.add_metric(whose, load.seconds)
                use.add_metric(whose, load.rows / (load.steps * load.max_rows) if load.steps else 0.0)
                running.add_metric(whose, load.running)
                waiting.add_metric(whose, load.waiting)
                cost.add_metric([*whose, "row"], load.row_seconds)
                cost.add_metric([*whose, "step"], load.step_seconds)
        yield from _memory(self._pool)
        yield from (steps, rows, seconds, use, running, waiting, cost)


def _memory(pool: Sequence[WorkerState]) -> Iterator[Metric]:
    """What models take, and how often they were loaded and unloaded."""
    labels = ["worker", "model"]
    weight = GaugeMetricFamily(
        "drawwell_model_bytes", "Memory that a model takes; 0 while it is not there", labels=labels
    )
    loads = CounterMetricFamily("drawwell_model_loads", "Times that a model was loaded", labels=labels)
    unloads = CounterMetricFamily("drawwell_model_unloads", "Times that a model made room for another", labels=labels)
    seconds = CounterMetricFamily("drawwell_model_load_seconds", "Time spent loading a model", labels=labels)
    for worker in pool:
        for name, state in worker.models.items():
            whose = [worker.name, name]
            weight.add_metric(whose, state.weight if state.resident else 0)
            loads.add_metric(whose, state.loads)
            unloads.add_metric(whose, state.unloads)
            seconds.add_metric(whose, state.load_seconds)
    yield from (weight, loads, unloads, seconds)
