"""GET /metrics: what was asked, answered and refused, and what the workers told of themselves."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from api_fakes import Api, Call, after, ready_worker, silence, tell
from prometheus_client.parser import text_string_to_metric_families

from service.broker import Job, ModelState, QueueFull, WorkerState
from service.messages import Failed, Started
from service.scheduler import Load

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


async def samples(api: Api) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    answer = await api.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


async def test_requests_and_jobs_are_counted(api: Api) -> None:
    for _ in range(3):
        await api.post("/generate", {"model": "gan"})
    await api.post("/generate", {"model": "gan", "n": 0})
    found = await samples(api)
    generate = {"route": "/generate", "method": "POST"}
    assert found["drawwell_http_requests_total", key(**generate, status="200")] == 3
    assert found["drawwell_http_requests_total", key(**generate, status="422")] == 1
    assert found["drawwell_http_request_seconds_count", key(route="/generate")] == 4
    assert found["drawwell_jobs_total", key(model="gan", kind="draw", outcome="done")] == 3
    assert found["drawwell_queue_seconds_sum", key(model="gan", kind="draw")] == pytest.approx(0.75)
    assert found["drawwell_compute_seconds_sum", key(model="gan", kind="draw")] == pytest.approx(4.5)


async def test_the_first_step_and_what_ended_early_are_counted_by_their_reason(api: Api) -> None:
    await api.post("/generate", {"model": "gan"})
    api.broker.answer = silence
    await api.post("/generate", {"model": "gan", "timeout": 0.2})
    api.broker.answer = after(*tell(Started(0), Failed("expired", "too late")))
    await api.post("/generate", {"model": "gan"})
    api.broker.answer = silence
    api.broker.changed.clear()
    call = Call(api.app, "/generate", {"model": "gan"})
    await api.broker.changed.wait()
    call.hang_up()
    await call.task
    accepted = await api.post("/generate", {"model": "gan"}, headers={"Prefer": "respond-async"})
    await api.request("DELETE", accepted.headers["location"])
    found = await samples(api)
    assert found["drawwell_cancelled_total", key(reason="expired")] == 2
    assert found["drawwell_cancelled_total", key(reason="hung-up")] == 1
    assert found["drawwell_cancelled_total", key(reason="deleted")] == 1
    assert found["drawwell_time_to_first_step_seconds_count", key(model="gan", kind="draw")] == 2
    assert found["drawwell_jobs_total", key(model="gan", kind="draw", outcome="cancelled")] == 3


async def test_a_request_that_is_answered_by_an_earlier_ones_job_counts_no_job(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    first: dict[str | None, str] = {}
    submit = api.broker.submit

    async def known(job: Job) -> str:
        return first[job.key] if job.key in first else first.setdefault(job.key, await submit(job))

    monkeypatch.setattr(api.broker, "submit", known)
    for accept in ("application/json", "text/event-stream", "image/png"):
        answer = await api.post("/generate", {"model": "gan"}, headers={"Idempotency-Key": "k", "Accept": accept})
        assert answer.status_code == 200
    found = await samples(api)
    assert found["drawwell_http_requests_total", key(route="/generate", method="POST", status="200")] == 3
    assert found["drawwell_jobs_total", key(model="gan", kind="draw", outcome="done")] == 1
    assert found["drawwell_queue_seconds_count", key(model="gan", kind="draw")] == 1


async def test_a_model_shows_what_its_workers_do(api: Api) -> None:
    load = {"gan/draw": Load(10, 320, 1.5, 3, 4, 64, 0.001, 0.002), "vae/draw": Load(1)}
    api.broker.states = [dataclasses.replace(ready_worker(), name=name, load=load) for name in ("w", "v")]
    lane = (await api.get("/models/gan")).json()["load"]
    cost = {"row_seconds": 0.001, "step_seconds": 0.002}
    assert lane == {"draw": {"workers": 2, "running": 6, "waiting": 8, "steps": 20, "costs": [cost, cost]}}


async def test_refusals_are_counted_by_their_reason(api: Api) -> None:
    api.broker.refusal = QueueFull(3.0, 10, 10)
    await api.post("/generate", {"model": "gan"})
    assert (await samples(api))["drawwell_refused_total", key(reason="busy")] == 1
    api.broker.states = []
    assert (await api.get("/readyz")).status_code == 503
    assert ("drawwell_refused_total", key(reason="unavailable")) not in await samples(api), "it asks for nothing"


async def test_workers_tell_of_themselves(api: Api) -> None:
    load = {"gan/draw": Load(10, 320, 1.5, 3, 4, 64, 0.001, 0.002)}
    ready = ready_worker(
        gan=ModelState("ready", resident=True, weight=4096, loads=3, unloads=2, load_seconds=1.5),
        diffusion=ModelState("ready", resident=False, weight=8192, loads=1, unloads=1, load_seconds=0.5),
    )
    api.broker.states = [
        WorkerState("w", "cpu", True, ready.models, load, 2),
        WorkerState("v", "cpu", False),
    ]
    found = await samples(api)
    whose = {"worker": "w", "model": "gan", "kind": "draw"}
    assert found["drawwell_workers", key(state="ready")] == 1
    assert found["drawwell_workers", key(state="not-ready")] == 1
    assert found["drawwell_steps_total", key(**whose)] == 10
    assert found["drawwell_step_rows_total", key(**whose)] == 320
    assert found["drawwell_batch_utilisation_ratio", key(**whose)] == 0.5
    assert found["drawwell_running_rows", key(**whose)] == 3
    assert found["drawwell_waiting_rows", key(**whose)] == 4
    assert found["drawwell_step_cost_seconds", key(**whose, term="row")] == 0.001
    assert found["drawwell_queued_units", key()] == 0
    model = key(worker="w", model="gan")
    assert found["drawwell_model_bytes", model] == 4096
    assert found["drawwell_model_loads_total", model] == 3
    assert found["drawwell_model_unloads_total", model] == 2
    assert found["drawwell_model_load_seconds_total", model] == 1.5
    assert found["drawwell_model_bytes", key(worker="w", model="diffusion")] == 0, "it is not in memory"


def key(**labels: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(labels.items()))
