"""How a worker's talking thread claims: ahead of the worker, who is in the middle of a step, as far as is free."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path

import pytest
from toys import Config, Walk, WalkRows

from models._protocol import ImageSpace
from service.broker import NOBODY, SUSPECT, Claims, Event, Job, WorkerState
from service.loader import Found, Gone
from service.messages import Generate, Message, pack, unpack
from service.window import AHEAD, Window
from service.worker import Worker, _NewJob, _Talk, _Want


class Plenty(Claims):
    """A broker that always has one more job, of so many rows."""

    def __init__(self, rows: int) -> None:
        self._rows, self._count = rows, 0
        self.handed_back: list[str] = []
        self.left = False
        self.told: list[tuple[str, Message]] = []

    async def run(self) -> None:
        await asyncio.Event().wait()

    async def announce(self, state: WorkerState) -> None: ...

    async def claim(
        self, models: Sequence[str], absent: Sequence[str] = (), enough: Mapping[str, Sequence[str]] = NOBODY
    ) -> Job:
        await asyncio.sleep(0)
        self._count += 1
        return Job(str(self._count), models[0], b"", self._rows, 1)

    async def cancellations(self) -> AsyncIterator[str]:
        await asyncio.Event().wait()
        yield ""

    async def publish(self, job_id: str, events: Sequence[Event]) -> None:
        self.told += [(job_id, unpack(event.payload)) for event in events]

    async def hand_back(self, job_ids: Sequence[str]) -> None:
        self.handed_back += job_ids

    async def leave(self) -> None:
        self.left = True


@pytest.mark.parametrize(("rows", "first", "then"), [(1, 4, 2), (3, 2, 1), (64, 1, 1)])
def test_as_many_jobs_come_as_are_free_and_no_more_until_they_are_counted_in(rows: int, first: int, then: int) -> None:
    """One job comes whatever its rows, as to a worker that has room for one more."""
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()

    async def connect() -> Claims:
        return Plenty(rows)

    def come() -> int:
        count = 0
        try:
            while True:
                assert isinstance(inbox.get(timeout=0.3), _NewJob)
                count += 1
        except queue.Empty:
            return count

    talk = _Talk(connect, inbox)  # type: ignore[arg-type]
    talk.start()
    try:
        talk.want(_Want(["m"], free={"m": 4}))
        assert come() == first
        talk.want(_Want(["m"], free={"m": 2}, taken=first))
        assert come() == then
        talk.want(_Want())
        assert come() == 0
    finally:
        talk.stop()


def test_jobs_that_reach_a_worker_no_more_are_handed_back_when_it_ends() -> None:
    inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
    claims = Plenty(rows=1)

    async def connect() -> Claims:
        return claims

    talk = _Talk(connect, inbox)  # type: ignore[arg-type]
    talk.start()
    talk.want(_Want(["m"], free={"m": 3}))
    came = [inbox.get(timeout=5) for _ in range(3)]
    talk.want(_Want(taken=1))
    talk.stop()
    assert claims.handed_back == [one.job.id for one in came[1:] if isinstance(one, _NewJob)] == ["2", "3"]
    assert claims.left


def test_a_worker_whose_suspect_is_for_others_to_do_takes_jobs_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that goes from the folder takes with it the job that waited for it."""
    worker = Worker("w", "cpu", tmp_path)
    talk = _Talk(lambda: None, worker._inbox)  # type: ignore[arg-type, return-value]
    handed_back: list[str] = []
    wants: list[_Want] = []
    monkeypatch.setattr(talk, "hand_back", handed_back.extend)
    monkeypatch.setattr(talk, "want", wants.append)
    worker._talk = talk
    for name in ("m", "other"):
        worker._hear(Found(name, "1", 10))
    worker._take(Job("suspect", "m", b"", 1, 1, deaths=SUSPECT))
    assert wants[-1] == _Want(taken=1), "it is to run alone"
    worker._hear(Gone("m"))
    assert handed_back == ["suspect"]
    assert wants[-1].absent == ["other"]
    worker._take(Job("next", "other", b"", 1, 1))
    assert handed_back == ["suspect"]


@pytest.mark.parametrize("attempt", [1, 2])
def test_before_the_first_step_of_a_job_whose_worker_died_it_is_told_that_it_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attempt: int
) -> None:
    """Otherwise one that kills in its first step, or its only one, is never to blame."""
    claims = Plenty(rows=1)
    known: list[list[tuple[str, str]]] = []

    async def connect() -> Claims:
        return claims

    class Deadly(Walk):
        def step(self, rows: WalkRows) -> WalkRows:
            known.append([(name, type(message).__name__) for name, message in claims.told])
            return super().step(rows)

    worker = Worker("w", "cpu", tmp_path)
    worker._engine.put("m", "1", Deadly(Config(), ImageSpace(width=3, height=2, channels=1)))
    known.clear()
    talk = worker._talk = _Talk(connect, worker._inbox)
    job = Job("a", "m", pack(Generate(n=1, seed=1, steps=2)), 1, 1, attempt=attempt)
    talk._given = 1
    talk._uncounted.append(job)
    talk.start()
    try:
        worker._take(job)
        assert worker._engine.step()
        assert known[0] == ([("a", "Started")] if attempt > 1 else [])
    finally:
        talk.stop()


def test_what_is_free_ends_where_there_is_enough() -> None:
    window = Window(8)
    assert window.free(["m", "other"]) == {"m": AHEAD * 8, "other": AHEAD * 8}
    window.add(Job("1", "m", b"", 5, 1))
    assert window.free(["m"]) == {"m": AHEAD * 8 - 5}
    window.add(Job("2", "m", b"", AHEAD * 8, 1))
    assert window.free(["m"]) == {}
    assert window.enough() == {"m": [""]}
