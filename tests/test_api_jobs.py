"""Jobs to come back for, and idempotency: over both brokers, with a worker's end that answers as it is told to."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_fakes import SPECS, Api, FakeBroker, at_once, write_model
from brokers import Kind, workers

from service.app import create_app
from service.broker import Broker, BrokerAway, Event, Job, ModelState, WorkerState
from service.catalog import Catalog
from service.messages import Failed, Progress, Started, pack
from service.settings import Settings

pytestmark = pytest.mark.anyio

ASYNC = {"Prefer": "respond-async"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Pool:
    """Two API replicas, where the broker can have two, and a worker that answers when it is let."""

    def __init__(self, clients: Sequence[httpx.AsyncClient]) -> None:
        self.here, self.there = clients[0], clients[-1]
        self.taken: list[Job] = []
        self.cancelled: list[str] = []
        self.go = asyncio.Event()
        self.answer: Callable[[Job], list[Event]] = at_once

    async def until(self, job_id: str, status: str) -> dict[str, Any]:
        async with asyncio.timeout(10):
            while True:
                found: dict[str, Any] = (await self.there.get(f"/jobs/{job_id}")).json()
                if found["status"] == status:
                    return found
                await asyncio.sleep(0.02)


@asynccontextmanager
async def pool(kind: Kind, folder: Path) -> AsyncIterator[Pool]:
    for name in SPECS:
        write_model(folder, name, SPECS[name])
    catalog = Catalog(folder)
    catalog.refresh()
    async with kind.broker(100_000) as one, kind.replica(one) as other, workers(kind, one, "w") as [w]:
        clients = [client(broker, folder, catalog) for broker in (one, other)]
        states = {name: ModelState("ready", catalog.entry(name, ()).version.sha256) for name in SPECS}  # type: ignore[union-attr]
        await w.claims.announce(WorkerState("w", "cpu", True, states))
        made = Pool(clients)
        tasks = [asyncio.create_task(work(w.claims, made)), asyncio.create_task(hear(w.claims, made))]
        async with asyncio.timeout(10):
            while (await clients[-1].get("/readyz")).status_code != 200:
                await asyncio.sleep(0.02)
        try:
            yield made
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for c in clients:
                await c.aclose()


def client(broker: Broker, folder: Path, catalog: Catalog) -> httpx.AsyncClient:
    app = create_app(Settings(models=folder), broker, catalog)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=20)


async def work(claims: Any, made: Pool) -> None:
    while True:
        job = await claims.claim(list(SPECS))
        made.taken.append(job)
        await claims.publish(job.id, [Event(pack(Started(0.1))), Event(pack(Progress(3, 20, 1.5)))])
        await made.go.wait()
        await claims.publish(job.id, made.answer(job))


async def hear(claims: Any, made: Pool) -> None:
    async for job_id in claims.cancellations():
        made.cancelled.append(job_id)
        await claims.publish(job_id, [Event(pack(Failed("cancelled", "")), final=True)])


def events_of(text: str) -> list[tuple[str, str, Any]]:
    """(name, id, data) of each."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if fields:
            found.append((fields["event"], fields.get("id", ""), json.loads(fields["data"])))
    return found


BODY = {"model": "diffusion", "n": 2, "seed": 7, "label": 1}


async def test_a_job_can_be_come_back_for_at_any_replica(kind: Kind, tmp_path: Path) -> None:
    async with pool(kind, tmp_path) as made:
        accepted = await made.here.post("/generate", json=BODY, headers=ASYNC)
        assert accepted.status_code == 202
        assert accepted.headers["Preference-Applied"] == "respond-async"
        job_id = accepted.json()["id"]
        assert accepted.headers["Location"] == f"/jobs/{job_id}"
        running = await made.until(job_id, "running")
        assert (running["answer"], running["problem"], running["model"]) == (None, None, "diffusion")
        made.go.set()
        done = await made.until(job_id, "done")
        whole = (await made.here.post("/generate", json=BODY)).json()
        for answer in (done["answer"], whole):
            del answer["id"], answer["usage"]
        assert done["answer"] == whole


async def test_its_events_go_on_where_a_reader_left(kind: Kind, tmp_path: Path) -> None:
    async with pool(kind, tmp_path) as made:
        job_id = (await made.here.post("/generate", json=BODY, headers=ASYNC)).json()["id"]
        made.go.set()
        whole = events_of((await made.there.get(f"/jobs/{job_id}/events")).text)
        assert [name for name, _, _ in whole] == ["queued", "progress", "image", "image", "completed"]
        numbers = [int(number) for _, number, _ in whole[1:]]
        assert numbers == sorted(set(numbers))
        rest = events_of(
            (await made.there.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": str(numbers[1])})).text
        )
        assert rest == whole[3:], "where it stood in the queue is behind it"


async def test_who_has_seen_the_last_event_is_not_kept_coming_back(kind: Kind, tmp_path: Path) -> None:
    """An EventSource asks again, with the last id that it saw, until it is answered 204."""
    async with pool(kind, tmp_path) as made:
        job_id = (await made.here.post("/generate", json=BODY, headers=ASYNC)).json()["id"]
        made.go.set()
        last = events_of((await made.here.get(f"/jobs/{job_id}/events")).text)[-1]
        assert last[0] == "completed"
        for seen in (last[1], "999999999"):
            again = await made.there.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": seen})
            assert (again.status_code, again.content) == (204, b"")
        before = await made.there.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": str(int(last[1]) - 1)})
        assert events_of(before.text) == [last]


async def test_the_end_of_a_job_that_failed_is_told_to_whoever_comes_back(kind: Kind, tmp_path: Path) -> None:
    async with pool(kind, tmp_path) as made:
        made.answer = lambda job: [Event(pack(Failed("row", "FloatingPointError: no")), final=True)]
        made.go.set()
        job_id = (await made.here.post("/generate", json=BODY, headers=ASYNC)).json()["id"]
        await made.until(job_id, "failed")
        again = await made.there.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "999999999"})
        assert [name for name, _, _ in events_of(again.text)] == ["error"]


async def test_a_cancelled_job_says_so(kind: Kind, tmp_path: Path) -> None:
    async with pool(kind, tmp_path) as made:
        job_id = (await made.here.post("/generate", json=BODY, headers=ASYNC)).json()["id"]
        await made.until(job_id, "running")
        assert (await made.there.delete(f"/jobs/{job_id}")).status_code == 204
        ended = await made.until(job_id, "cancelled")
        assert ended["problem"]["type"] == "urn:drawwell:problem:interrupted"
        assert set(made.cancelled) == {job_id}
        assert (await made.there.delete(f"/jobs/{job_id}")).status_code == 204, "again is no error"


async def test_a_job_that_failed_tells_its_problem(kind: Kind, tmp_path: Path) -> None:
    async with pool(kind, tmp_path) as made:
        made.answer = lambda job: [Event(pack(Failed("row", "FloatingPointError: no")), final=True)]
        made.go.set()
        job_id = (await made.here.post("/generate", json=BODY, headers=ASYNC)).json()["id"]
        assert (await made.until(job_id, "failed"))["problem"]["detail"] == "FloatingPointError: no"
        (_, (name, _, data)) = events_of((await made.there.get(f"/jobs/{job_id}/events")).text)[0::2]
        assert (name, data["problem"]["status"]) == ("error", 500)


async def test_a_key_means_one_job(kind: Kind, tmp_path: Path) -> None:
    """The same request with the same key: attached to while it runs, replayed when it is done, at any replica."""
    async with pool(kind, tmp_path) as made:
        body = {"model": "diffusion", "n": 1}  # without a seed: two jobs would be two images
        key = {"Idempotency-Key": "order-66"}
        both = [asyncio.create_task(c.post("/generate", json=body, headers=key)) for c in (made.here, made.there)]
        async with asyncio.timeout(10):
            while not made.taken:
                await asyncio.sleep(0.01)
        made.go.set()
        answers = [(await task).json() for task in both]
        answers.append((await made.there.post("/generate", json=body, headers=key)).json())
        assert answers[0] == answers[1] == answers[2]
        assert len(made.taken) == 1
        other = await made.here.post("/generate", json={**body, "n": 2}, headers=key)
        assert other.status_code == 422
        (error,) = other.json()["errors"]
        assert (error["loc"], error["input"]) == (["header", "Idempotency-Key"], "order-66")


async def test_hanging_up_does_not_cancel_a_job_with_a_key(kind: Kind, tmp_path: Path) -> None:
    async with pool(kind, tmp_path) as made:
        key = {"Idempotency-Key": "k"}
        asking = asyncio.create_task(made.here.post("/generate", json=BODY, headers=key))
        async with asyncio.timeout(10):
            while not made.taken:
                await asyncio.sleep(0.01)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        made.go.set()
        assert (await made.there.post("/generate", json=BODY, headers=key)).status_code == 200
        assert not made.cancelled
        assert len(made.taken) == 1


async def test_bad_requests_name_what_is_wrong(kind: Kind, tmp_path: Path) -> None:
    async with pool(kind, tmp_path) as made:
        for answer in (await made.here.get("/jobs/none"), await made.here.delete("/jobs/none")):
            assert answer.status_code == 404
            assert answer.json()["type"] == "urn:drawwell:problem:unknown-job"
        bad = await made.here.post("/generate", json=BODY, headers={"Idempotency-Key": "two words"})
        assert (bad.status_code, bad.json()["errors"][0]["input"]) == (422, "two words")
        twice = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
        bad = await made.here.post("/generate", json=BODY, headers=twice)
        assert (bad.status_code, bad.json()["errors"][0]["input"]) == (422, ["a", "b"])
        bad = await made.here.post("/generate", json=BODY, headers={"Drawwell-Tenant": "x" * 200})
        assert (bad.status_code, bad.json()["errors"][0]["loc"]) == (422, ["header", "Drawwell-Tenant"])
        job_id = (await made.here.post("/generate", json=BODY, headers=ASYNC)).json()["id"]
        bad = await made.here.get(f"/jobs/{job_id}/events", headers={"Last-Event-ID": "seven"})
        assert (bad.status_code, bad.json()["errors"][0]["input"]) == (422, "seven")
        asked = await made.here.post("/generate", json={**BODY, "n": 0}, headers=ASYNC)
        assert asked.status_code == 422, "a bad request is told at once"


async def test_the_tenant_travels_with_the_job(kind: Kind, tmp_path: Path) -> None:
    async with pool(kind, tmp_path) as made:
        made.go.set()
        await made.here.post("/generate", json=BODY, headers={"Drawwell-Tenant": "line-3"})
        assert made.taken[0].tenant == "line-3"


# ------------------------------------------------------------------------------------------------------ a broker away


class Away(FakeBroker):
    """Cannot be reached now and then, once it has taken a job."""

    def __init__(self) -> None:
        super().__init__()
        self.left = {"position": 1, "events": 4}

    def _goes(self, what: str) -> bool:
        self.left[what] -= 1
        return self.left[what] >= 0

    async def position(self, job_id: str) -> int:
        if self._goes("position"):
            raise BrokerAway("gone")
        return await super().position(job_id)

    async def events(self, job_id: str, after: int = 0, wait: bool = True) -> AsyncIterator[Event]:
        if self._goes("events"):
            raise BrokerAway("gone")
        async for event in super().events(job_id, after, wait):
            yield event
            if self._goes("events"):
                raise BrokerAway("gone")


async def test_who_waits_goes_on_waiting_while_the_broker_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = Api(tmp_path)
    monkeypatch.setattr("api_fakes.FakeBroker", Away)
    for how in ({}, {"stream": True}):
        api = Api(tmp_path)
        answer, whole = await api.post("/generate", {**BODY, **how}), await quiet.post("/generate", {**BODY, **how})
        left: dict[str, int] = api.broker.left  # type: ignore[attr-defined]
        assert left["events"] <= 0, "it was away as often as it was to be"
        assert left["position"] == (0 if how else 1), "a place in the queue is for streams"
        assert answer.status_code == 200
        if how:
            found, wanted = events_of(answer.text), events_of(whole.text)
            assert [e for e in found if e[0] == "image"] == [e for e in wanted if e[0] == "image"]
            assert [name for name, _, _ in found].count("completed") == 1
        else:
            assert answer.json()["images"] == whole.json()["images"]
        assert not api.broker.cancelled
