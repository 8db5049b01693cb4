"""When a job would be done, against a scheduler that runs; and what is refused by that."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest
from api_fakes import Api, events_of, ready_worker
from hypothesis import example, given, settings
from hypothesis import strategies as st

from service.broker import Job, Line, ModelState, Waiting, WorkerState
from service.forecast import MEASURED, STALE, Forecast, forecast, retry_after
from service.scheduler import Load, Row, Scheduler, Ticket

A, B = 0.01, 0.02  # a step over n rows takes A n + B seconds
JOB = Job("j", "m", b"", rows=4, units=1, steps=20)


def worker(name: str = "w", **lanes: Load) -> WorkerState:
    """Lanes by "m_draw"."""
    return WorkerState(name, "cpu", True, load={key.replace("_", "/"): load for key, load in lanes.items()})


def lane(**changed: object) -> Load:
    shown = {"steps": 1000, "max_rows": 8, "row_seconds": A, "step_seconds": B, "fastest": A + B}
    return Load(**{**shown, **changed})  # type: ignore[arg-type]


class Device:
    """Runs a scheduler's plans, and says when jobs end."""

    def __init__(self, max_rows: int) -> None:
        self.scheduler, self.now = Scheduler(max_rows), 0.0
        self.left: dict[Row, int] = {}
        self.steps: dict[str, int] = {}
        self.unfinished: dict[str, int] = {}
        self.ended: dict[str, float] = {}

    def submit(self, job: str, rows: int, steps: int, priority: str = "interactive") -> None:
        self.steps[job], self.unfinished[job] = steps, rows
        self.scheduler.submit(Ticket(job, "m/draw", rows, priority, ticks=steps), self.now)  # type: ignore[arg-type]

    def step(self) -> bool:
        plan = self.scheduler.plan(self.now)
        if plan.lane is None:
            return False
        self.left |= {row: self.steps[row.job] for row in plan.join}
        seconds = A * len(self.left) + B
        self.now += seconds
        self.left = {row: left - 1 for row, left in self.left.items()}
        done = [row for row, left in self.left.items() if left == 0]
        count = len(self.left)
        self.left = {row: left for row, left in self.left.items() if left}
        self.scheduler.report(plan.lane, count, seconds, done)
        for row in done:
            self.unfinished[row.job] -= 1
            if not self.unfinished[row.job]:
                self.ended[row.job] = self.now
        return True

    def pool(self) -> list[WorkerState]:
        return [worker(m_draw=self.scheduler.load("m/draw"))]


@settings(max_examples=100, deadline=None)
@example(seed=473575, max_rows=7)  # where no step so far had few rows
@example(seed=1032, max_rows=5)  # where the last of the job's rows are a smaller batch
@given(seed=st.integers(0, 10**6), max_rows=st.integers(1, 9))
def test_what_is_said_to_be_impossible_never_happens(seed: int, max_rows: int) -> None:
    """Over random histories a job is never done before `least`, nor long after what was expected."""
    rng, device = random.Random(seed), Device(max_rows)
    for k in range(rng.randint(0, 12)):
        device.submit(f"other{k}", rng.randint(1, 6), rng.choice([1, 5, 60]), rng.choice(["interactive", "batch"]))
        for _ in range(rng.randint(0, 20)):
            device.step()
    asked = Job("mine", "m", b"", rows=rng.randint(1, 6), units=1, steps=rng.choice([1, 10, 50]))
    if not device.scheduler.load("m/draw").steps:
        return
    predicted = forecast(asked, device.pool(), {})
    assert predicted is not None
    device.submit("mine", asked.rows, asked.steps)
    began = device.now
    while "mine" not in device.ended:
        assert device.step()
    took = device.ended["mine"] - began
    assert predicted.least <= took + 1e-9
    longest = max([asked.steps, *device.steps.values()]) * (A * max_rows + B)
    assert took <= predicted.seconds * 1.01 + longest + 1e-9


def test_room_is_found_behind_what_runs_and_waits() -> None:
    device = Device(4)
    device.submit("runs", 3, 10)
    device.step()
    load = device.scheduler.load("m/draw")
    assert (load.first_in, load.urgent_in, load.patient_in, load.left) == (0, 0, 0, 27)
    device.submit("later", 2, 5, "batch")  # one beside them, and one after it
    device.submit("next", 1, 7)  # but this one goes first
    load = device.scheduler.load("m/draw")
    assert (load.first_in, load.urgent_in, load.patient_in) == (0, 7, 9)
    device.step()
    device.step()
    load = device.scheduler.load("m/draw")
    assert (load.running, load.waiting, load.left) == (4, 2, 3 * 7 + 5 + 2 * 5)


def test_an_idle_pool_refuses_only_what_its_fastest_step_could_not_do() -> None:
    idle = [worker(m_draw=lane(row_seconds=100.0, fastest=0.01))]  # the fit is far off: a busy hour
    predicted = forecast(JOB, idle, {})
    assert predicted is not None
    assert predicted.seconds > 1000
    assert predicted.least == pytest.approx(20 * 0.01)
    young = [worker(m_draw=lane(steps=MEASURED - 1, fastest=9.0))]
    told = forecast(JOB, young, {})
    assert told is not None
    assert told.least == 0
    assert forecast(JOB, [worker(other_draw=lane())], {}) is None


def test_the_best_worker_counts_and_lanes_share_its_device() -> None:
    full = lane(running=8, waiting=8, urgent_in=100, patient_in=100, first_in=50)
    alone = forecast(JOB, [worker(m_draw=lane())], {})
    both = forecast(JOB, [worker(m_draw=full), worker("v", m_draw=lane())], {})
    assert alone == both
    assert alone is not None
    assert alone.seconds == pytest.approx(20 * (4 * A + B))
    shared = forecast(JOB, [worker(m_draw=lane(), x_draw=lane(running=1), y_score=lane(waiting=2))], {})
    assert shared is not None
    assert shared.seconds == pytest.approx(3 * alone.seconds)
    assert shared.least == alone.least
    busy = forecast(JOB, [worker(m_draw=full)], {})
    assert busy is not None
    assert busy.least == pytest.approx(100 * (8 * A + B) - STALE + 20 * (A + B))
    others = forecast(
        dataclasses.replace(JOB, tenant="t"), [worker(m_draw=dataclasses.replace(full, tenants=("s",)))], {}
    )
    assert others is not None
    assert others.least == pytest.approx(50 * (8 * A + B) - STALE + 20 * (A + B)), "tenants take turns"


def test_workers_that_warm_up_or_would_have_to_load_the_model_may_be_the_sooner_ones() -> None:
    """They are given such jobs: so nobody is refused for the queue of another."""
    full = worker(m_draw=lane(running=8, waiting=8, urgent_in=1000, patient_in=1000, first_in=500))
    state = ModelState("ready")
    least = 1000 * (8 * A + B) - STALE + 20 * (A + B)

    def told(*others: WorkerState) -> Forecast:
        predicted = forecast(JOB, [full, *others], {})
        assert predicted is not None
        return predicted

    assert told().least == pytest.approx(least)
    warming = dataclasses.replace(worker("v", m_draw=lane()), ready=False, models={"m": state})
    assert told(warming).least == pytest.approx(20 * (A + B))
    assert told(warming).seconds == pytest.approx(20 * (4 * A + B))
    draining = dataclasses.replace(warming, draining=True)
    assert told(draining).least == pytest.approx(least)
    for status, ready in (("ready", True), ("loading", True), ("loading", False)):
        absent = ModelState(status, resident=False)
        assert told(WorkerState("v", "cpu", ready, {"m": absent})).least == 0
    for models in ({}, {"m": ModelState("failed")}):
        assert told(WorkerState("v", "cpu", True, models)).least == pytest.approx(least)


def test_what_waits_counts_for_those_behind_it_and_a_flood_for_its_own_tenant() -> None:
    pool = [worker(m_draw=lane()), worker("v", m_draw=lane())]
    flood = {Line("m", "draw", "interactive", "flood"): Waiting(10, 16_000)}
    step = 8 * A + B

    def least(**changed: object) -> float:
        predicted = forecast(dataclasses.replace(JOB, **changed), pool, flood)  # type: ignore[arg-type]
        assert predicted is not None
        return predicted.least

    quiet = least(tenant="quiet")
    assert quiet == pytest.approx(20 * (A + B))
    assert least(tenant="flood") == pytest.approx(quiet + 1000 * step - STALE)
    assert least(tenant="flood", priority="batch") == least(tenant="flood")
    flood = {Line("m", "draw", "batch", "flood"): Waiting(10, 16_000)}
    assert least(tenant="flood") == quiet, "an interactive job goes before them"
    third = forecast(dataclasses.replace(JOB, priority="batch"), pool, flood, position=3)
    assert third is not None
    assert third.seconds == pytest.approx(3 * 1600 / 16 * step + 20 * (4 * A + B))


def test_retry_after_is_the_time_that_the_work_over_the_bound_takes() -> None:
    pool = [worker(m_draw=lane(left=80)), worker("v", m_draw=lane())]
    line = {Line("m", "draw", "interactive", ""): Waiting(1, 720)}
    whole = 800 * (8 * A + B) / 8 / 2
    assert retry_after(100, 400, pool, line) == pytest.approx(whole / 4)
    assert retry_after(1, 10**6, pool, line) == 1
    assert retry_after(10**6, 400, pool, line) == pytest.approx(whole), "then nothing is queued, and any job has room"
    assert retry_after(10**6, 400, pool, {Line("m", "draw", "interactive", ""): Waiting(1, 10**7)}) == 3600
    assert retry_after(10, 10, [], line) == 1


# ----------------------------------------------------------------------------------------------------------------- HTTP


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def api(tmp_path: Path) -> Api:
    return Api(tmp_path)


def busy(api: Api, **changed: object) -> None:
    load = {"diffusion/draw": lane(**changed), "diffusion/score": lane(**changed)}
    api.broker.states = [dataclasses.replace(ready_worker(), load=load)]


@pytest.mark.anyio
async def test_a_deadline_that_cannot_be_met_is_refused_at_once(api: Api) -> None:
    busy(api, urgent_in=1000, patient_in=1000, running=8, waiting=8)  # 100 s
    body = {"model": "diffusion", "steps": 10, "timeout": 30}
    for headers in ({}, {"Accept": "text/event-stream"}, {"Prefer": "respond-async"}):
        refused = await api.post("/generate", body, headers=headers)
        assert refused.status_code == 503
        assert refused.headers["content-type"] == "application/problem+json"
        problem = refused.json()
        assert problem["type"] == "urn:drawwell:problem:too-late"
        assert problem["predicted"]["least_seconds"] == pytest.approx(100 - STALE + 10 * (A + B))
        assert int(refused.headers["retry-after"]) == pytest.approx(100 - STALE - 30, abs=1)
        assert "timeout: 30 s" in problem["detail"]
    assert not api.broker.jobs
    assert (await api.post("/generate", body | {"timeout": 110})).status_code == 200
    kept = await api.post("/generate", body, headers={"Idempotency-Key": "k"})
    assert kept.status_code == 200, "it may be done already"
    text = (await api.get("/metrics")).text
    assert 'drawwell_refused_total{reason="too-late"} 3.0' in text


@pytest.mark.anyio
async def test_an_idle_pool_is_asked_whatever_its_fit_says(api: Api) -> None:
    busy(api, row_seconds=50.0, fastest=0.01)
    assert (await api.post("/generate", {"model": "diffusion", "steps": 10, "timeout": 1})).status_code == 200
    refused = await api.post("/generate", {"model": "diffusion", "steps": 1000, "timeout": 5})
    assert refused.status_code == 503, "a thousand steps of 0.01 s"


@pytest.mark.anyio
async def test_queued_tells_the_place_and_when_it_is_done(api: Api) -> None:
    busy(api)
    api.broker.places = [5]
    api.broker.lines = {Line("diffusion", "draw", "interactive", ""): Waiting(10, 1600)}
    body = {"model": "diffusion", "steps": 10, "n": 2, "stream": True}
    name, data = events_of((await api.post("/generate", body)).text)[0]
    assert name == "queued"
    step = 8 * A + B
    assert data == {"position": 5, "eta_seconds": pytest.approx(800 / 8 * step + 10 * (2 * A + B))}
