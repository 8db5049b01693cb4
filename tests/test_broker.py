"""The broker's contract, which every broker keeps: in one process over real sockets, and over a real Redis. Order,
cancellation, dead workers, bounds, idempotency.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable

import pytest
from brokers import Kind, Link, LocalLink, claim, workers
from uvicorn.loops.auto import auto_loop_factory

from service.broker import (
    Broker,
    Event,
    Job,
    JobLost,
    KeyTaken,
    Line,
    ModelState,
    NoWorker,
    QueueFull,
    Waiting,
    WorkerState,
)
from service.broker_local import LocalBroker
from service.errors import problem_of
from service.scheduler import Load

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def job(name: str, **changed: object) -> Job:
    return Job(**{"id": name, "model": "m", "payload": b"draw", "rows": 1, "units": 10, **changed})  # type: ignore[arg-type]


async def told(broker: Broker, name: str, after: int = 0) -> list[bytes]:
    async with asyncio.timeout(10):
        return [event.payload async for event in broker.events(name, after)]


async def test_a_job_is_claimed_and_its_events_come_back_in_order(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        assert await broker.submit(job("a", payload=b"\x00\xff", timeout=3.5)) == "a"
        taken = await claim(w)
        assert dataclasses.replace(taken, queued_seconds=0.0) == job("a", payload=b"\x00\xff", timeout=3.5)
        await w.claims.publish("a", [Event(b"1"), Event(b"2")])
        await w.claims.publish("a", [Event(b"3", final=True)])
        assert await told(broker, "a") == [b"1", b"2", b"3"]
        assert await told(broker, "a") == [b"1", b"2", b"3"], "a second reader gets them from the first on"
        assert [e.number async for e in broker.events("a")] == [1, 2, 3]
        assert await told(broker, "a", after=2) == [b"3"], "a reader that comes back goes on where it was"
        with pytest.raises(KeyError):
            await told(broker, "never")


async def test_large_payloads_come_whole(kind: Kind) -> None:
    large = bytes(range(256)) * 4096
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a", payload=large))
        assert (await claim(w)).payload == large
        await w.claims.publish("a", [Event(large), Event(b"small", final=True)])
        assert await told(broker, "a") == [large, b"small"]
        assert (await broker.status("a")).job.payload == large


async def test_a_reader_hears_events_as_they_come(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a"))
        await claim(w)
        events = broker.events("a")
        for k in range(3):
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            await w.claims.publish("a", [Event(b"%d" % k, final=k == 2)])
            assert (await asyncio.wait_for(waiting, 0.5)).payload == b"%d" % k


async def test_a_claim_waits_for_a_job_and_takes_only_its_models(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        waiting = asyncio.create_task(claim(w, "m"))
        await broker.submit(job("other", model="x"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        await broker.submit(job("mine"))
        assert (await waiting).id == "mine"
        assert (await claim(w, "x", "m")).id == "other"


async def test_a_newer_claim_replaces_the_standing_one(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(w.claims.claim(["m"]), 0.05)
        waiting = asyncio.create_task(claim(w, "x"))
        await asyncio.sleep(0.5)
        await broker.submit(job("a"))
        await broker.submit(job("b", model="x"))
        assert (await waiting).id == "b"
        assert await broker.position("a") == 0


@pytest.mark.parametrize("then", [[], ["x"]])
async def test_a_job_that_comes_just_after_its_claim_was_dropped_goes_to_another_worker(
    kind: Kind, then: list[str]
) -> None:
    """Over Redis, the worker's question is still under way then: it hands the job back, and that does not count."""
    async with kind.broker() as broker, workers(kind, broker, "w1", "w2") as [w1, w2]:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(w1.claims.claim(["m"]), 0.1)
        other = asyncio.create_task(w1.claims.claim(then)) if then else None
        await broker.submit(job("a"))
        taken = await claim(w2)
        assert (taken.id, taken.attempt, taken.deaths) == ("a", 1, 0)
        await w2.claims.publish("a", [Event(b"answer", final=True)])
        assert await told(broker, "a") == [b"answer"]
        if other is not None:
            assert not other.done()
            other.cancel()
            await asyncio.gather(other, return_exceptions=True)


async def test_a_job_that_comes_in_the_moment_in_which_its_claim_is_dropped_goes_to_another_worker(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w1", "w2") as [w1, w2]:
        dropped = asyncio.ensure_future(w1.claims.claim(["m"]))
        come: asyncio.Queue[Job] = w1.claims._jobs  # type: ignore[attr-defined]
        put = come.put_nowait

        def put_and_drop(taken: Job) -> None:
            put(taken)
            dropped.cancel()

        monkeypatch.setattr(come, "put_nowait", put_and_drop)
        await asyncio.sleep(0.1)
        await broker.submit(job("a"))
        with pytest.raises(asyncio.CancelledError):
            await dropped
        taken = await asyncio.wait_for(w2.claims.claim(["m"]), 1)
        assert (taken.id, taken.attempt, taken.deaths) == ("a", 1, 0)


async def test_a_worker_that_leaves_takes_no_job_with_it(kind: Kind) -> None:
    """What comes while it ends need not wait until its claim has run out."""
    async with kind.broker(1000) as broker, workers(kind, broker, "stays") as [stays]:
        for k in range(10):
            async with workers(kind, broker, f"w{k}") as [w]:
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(w.claims.claim(["m"]), 0.05 + 0.01 * k)
                await asyncio.gather(w.claims.leave(), broker.submit(job(f"j{k}")))
            assert (await broker.status(f"j{k}")).state == "queued"
            taken = await claim(stays)
            assert (taken.id, taken.attempt, taken.deaths) == (f"j{k}", 1, 0)


async def test_interactive_jobs_go_first_and_positions_say_so(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("slow", priority="batch"))
        await asyncio.sleep(0.2)
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        assert [await broker.position(name) for name in ("a", "b", "slow")] == [0, 1, 2]
        taken = [await claim(w) for _ in range(3)]
        assert [t.id for t in taken] == ["a", "b", "slow"]
        assert taken[2].queued_seconds > taken[0].queued_seconds + 0.1
        assert [await broker.position(name) for name in ("a", "b", "slow")] == [0, 0, 0]


async def test_status_says_how_far_a_job_is(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a", about=b"what was asked"))
        assert (await broker.status("a")).state == "queued"
        await claim(w)
        status = await broker.status("a")
        assert (status.state, status.job.about, status.lost) == ("running", b"what was asked", None)
        await w.claims.publish("a", [Event(b"", final=True)])
        await told(broker, "a")
        assert (await broker.status("a")).state == "ended"
        with pytest.raises(KeyError):
            await broker.status("never")


async def test_jobs_of_a_dead_worker_are_done_by_another(kind: Kind) -> None:
    async with kind.broker() as broker:
        async with workers(kind, broker, "w1") as [w1]:
            for name in ("a", "b"):
                await broker.submit(job(name))
            assert [(await claim(w1)).id for _ in range(2)] == ["a", "b"]
            await w1.claims.publish("a", [Event(b"half")])
            await broker.submit(job("c"))
        async with workers(kind, broker, "w2") as [w2]:
            taken = [await claim(w2) for _ in range(3)]
            assert sorted((t.id, t.attempt) for t in taken) == [("a", 2), ("b", 2), ("c", 1)]
            await w2.claims.publish("a", [Event(b"half"), Event(b"whole", final=True)])
            assert await told(broker, "a") == [b"half", b"half", b"whole"], (
                "what a rerun repeats is the reader's to drop"
            )


async def test_a_job_that_takes_three_workers_down_alone_is_lost_with_a_reason(kind: Kind) -> None:
    async with kind.broker() as broker:
        for k in range(3):
            async with workers(kind, broker, f"w{k}") as [w]:
                if k == 0:
                    await broker.submit(job("poison"))
                taken = await claim(w)
                assert (taken.attempt, taken.deaths, taken.deaths_alone) == (k + 1, k, k)
                await w.claims.publish("poison", [Event(b"began")])
        async with workers(kind, broker, "w3") as [w]:
            waiting = asyncio.create_task(claim(w))
            with pytest.raises(JobLost, match="3 workers stopped while they worked on it"):
                await told(broker, "poison")
            waiting.cancel()


async def test_a_death_in_company_makes_a_job_a_suspect_but_never_condemns_it(kind: Kind) -> None:
    async with kind.broker() as broker:
        for k in range(4):
            async with workers(kind, broker, f"w{k}") as [w]:
                if k == 0:
                    await broker.submit(job("a"))
                    await broker.submit(job("b"))
                taken = [await claim(w), await claim(w)]
                assert [(t.deaths, t.deaths_alone) for t in taken] == [(k, 0), (k, 0)]
                for t in taken:
                    await w.claims.publish(t.id, [Event(b"began")])
        async with workers(kind, broker, "last") as [w]:
            for t in [await claim(w), await claim(w)]:
                await w.claims.publish(t.id, [Event(b"done", final=True)])
            assert (await told(broker, "a"))[-1] == (await told(broker, "b"))[-1] == b"done"


async def test_a_job_that_had_not_begun_is_not_blamed_for_its_workers_death(kind: Kind) -> None:
    async with kind.broker() as broker:
        for k in range(5):
            async with workers(kind, broker, f"w{k}") as [w]:
                if k == 0:
                    await broker.submit(job("innocent"))
                taken = await claim(w)
                assert (taken.attempt, taken.deaths) == (k + 1, 0)
        async with workers(kind, broker, "last") as [w]:
            await claim(w)
            await w.claims.publish("innocent", [Event(b"done", final=True)])
            assert await told(broker, "innocent") == [b"done"]


async def test_jobs_handed_back_go_to_another_worker_and_it_does_not_count(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w1", "w2") as [w1, w2]:
        await broker.submit(job("a"))
        await claim(w1)
        await w1.claims.hand_back(["a", "never"])
        taken = await claim(w2)
        assert (taken.id, taken.attempt) == ("a", 1)
        await w1.claims.publish("a", [Event(b"late", final=True)])
        await w2.claims.publish("a", [Event(b"answer", final=True)])
        assert await told(broker, "a") == [b"answer"]


async def test_a_cancelled_job_ends_wherever_it_is(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("runs"))
        await claim(w)
        await broker.submit(job("waits"))
        await broker.cancel("runs")
        await broker.cancel("waits")
        await broker.cancel("nobody")
        cancellations = w.claims.cancellations()
        assert await asyncio.wait_for(anext(cancellations), 5) == "runs"
        await w.claims.publish("runs", [Event(b"cancelled", final=True)])
        assert await told(broker, "runs") == [b"cancelled"]
        with pytest.raises(JobLost, match="cancelled"):
            await told(broker, "waits")
        await broker.cancel("runs")


@pytest.mark.parametrize("how", ["hands it back", "dies"])
async def test_a_cancelled_job_is_not_done_again_when_its_worker_leaves_it(kind: Kind, how: str) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w1", "w2") as [w1, w2]:
        await broker.submit(job("a"))
        await claim(w1)
        await broker.cancel("a")
        other = asyncio.create_task(claim(w2))
        await (w1.die() if how == "dies" else w1.claims.hand_back(["a"]))
        with pytest.raises(JobLost, match="cancelled"):
            await told(broker, "a")
        assert not other.done()
        assert await broker.queued_units() == 0
        other.cancel()


async def test_a_worker_that_goes_on_with_a_cancelled_job_is_told_so_again(kind: Kind) -> None:
    """It may have heard so before the job had reached it."""
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a"))
        await claim(w)
        await broker.cancel("a")
        cancellations = w.claims.cancellations()
        assert await asyncio.wait_for(anext(cancellations), 5) == "a"
        await w.claims.publish("a", [Event(b"half")])
        assert await asyncio.wait_for(anext(cancellations), 5) == "a"


async def test_what_is_told_of_an_ended_job_is_dropped(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a"))
        await claim(w)
        await w.claims.publish("a", [Event(b"1", final=True)])
        await w.claims.publish("a", [Event(b"2", final=True)])
        await w.claims.publish("never", [Event(b"x", final=True)])
        await broker.submit(job("b"))
        await claim(w)
        await w.claims.publish("b", [Event(b"1", final=True)])
        assert await told(broker, "b") == [b"1"]
        assert await told(broker, "a") == [b"1"]


async def test_a_key_stands_for_the_first_job_that_had_it(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        assert await broker.submit(job("a", key="k", digest="1")) == "a"
        assert await broker.submit(job("b", key="k", digest="1")) == "a"
        with pytest.raises(KeyTaken, match="'k'"):
            await broker.submit(job("c", key="k", digest="2"))
        await claim(w)
        await w.claims.publish("a", [Event(b"once", final=True)])
        await told(broker, "a")
        assert await broker.submit(job("d", key="k", digest="1")) == "a", "and when it is done as well"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(w.claims.claim(["m"]), 0.5)


async def test_the_queue_is_bounded_in_units(kind: Kind) -> None:
    async with kind.broker(25) as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        with pytest.raises(QueueFull, match="20 step-units are queued, of 25 at most") as full:
            await broker.submit(job("c"))
        assert full.value.retry_after == 1.0, "no pace was measured yet"
        await claim(w)
        await w.claims.publish("a", [Event(b"", final=True)])
        assert await told(broker, "a") == [b""]
        await broker.submit(job("c"))


async def test_a_full_queue_says_when_to_come_back(kind: Kind) -> None:
    """By the pace that its workers told, and the work that they hold and that waits."""
    async with kind.broker(25) as broker, workers(kind, broker, "w") as [w]:
        load = {"m/draw": Load(max_rows=4, row_seconds=0.1, step_seconds=0.4, left=100)}
        await w.claims.announce(WorkerState("w", "cpu", True, {"m": ModelState("ready")}, load))
        for name in ("a", "b"):
            await broker.submit(job(name, rows=2, steps=25))
        async with asyncio.timeout(5):
            while not (await broker.waiting() and (await broker.pool())[0].load):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.7)  # until the books were looked at again, where they are elsewhere
        with pytest.raises(QueueFull) as full:
            await broker.submit(job("d", units=15))
        seconds = (100 + 2 * 2 * 25) * (4 * 0.1 + 0.4) / 4
        assert full.value.retry_after == pytest.approx(seconds * 10 / 20), "half of the work is too much"


async def test_the_books_of_what_waits_follow_every_way_of_a_job(kind: Kind) -> None:
    async with kind.broker(1000) as broker, workers(kind, broker, "w") as [w]:

        async def waiting() -> dict[Line, Waiting]:
            await asyncio.sleep(0.8)
            return dict(await broker.waiting())

        flood, urgent = Line("m", "draw", "batch", "flood"), Line("m", "draw", "interactive", "")
        for name in ("a", "b"):
            await broker.submit(job(name, rows=3, steps=50, priority="batch", tenant="flood"))
        await broker.submit(job("c", rows=1, steps=7))
        await broker.submit(job("d", rows=2, steps=7))
        assert await waiting() == {flood: Waiting(2, 300), urgent: Waiting(2, 21)}
        assert [(await claim(w)).id for _ in range(3)] == ["c", "d", "a"]
        assert await waiting() == {flood: Waiting(1, 150)}
        await w.claims.hand_back(["d"])
        await broker.cancel("b")
        assert await waiting() == {urgent: Waiting(1, 14)}
        await broker.cancel("d")
        assert await waiting() == {}


async def test_an_empty_queue_takes_a_job_of_any_size(kind: Kind) -> None:
    async with kind.broker(25) as broker, workers(kind, broker, "w"):
        await broker.submit(job("huge", units=1000))
        with pytest.raises(QueueFull):
            await broker.submit(job("small", units=1))


async def test_without_a_worker_jobs_are_refused_but_not_while_one_restarts(kind: Kind) -> None:
    async with kind.broker(grace=2.5) as broker:
        for key in (None, "k"):
            with pytest.raises(NoWorker):
                await broker.submit(job("a", key=key))
        link = kind.link(broker, "w")
        await link.open(broker, ready=False)
        with pytest.raises(NoWorker):
            await broker.submit(job("a"))
        await link.claims.announce(WorkerState("w", "cpu", True, {"m": ModelState("ready")}))
        async with asyncio.timeout(5):
            while not (await broker.pool())[0].ready:
                await asyncio.sleep(0.01)
        await broker.submit(job("a"))
        await link.die()
        await broker.submit(job("b"))
        await asyncio.sleep(4)
        with pytest.raises(NoWorker):
            await broker.submit(job("c"))


async def test_a_worker_that_warms_up_is_given_jobs_for_what_it_has_and_may_have(kind: Kind) -> None:
    async with kind.broker(grace=0.0) as broker:
        link = kind.link(broker, "w")
        await link.connect()
        states = {"here": ModelState("ready"), "soon": ModelState("loading"), "never": ModelState("failed")}

        async def announce(draining: bool) -> None:
            await link.claims.announce(WorkerState("w", "cpu", False, states, draining=draining))
            async with asyncio.timeout(5):
                while [state.draining for state in await broker.pool()] != [draining]:
                    await asyncio.sleep(0.01)

        await announce(draining=False)
        for model in ("here", "soon"):
            assert await broker.submit(job(model, model=model)) == model
        for model in ("never", "unheard"):
            with pytest.raises(NoWorker, match=f"no worker is ready for {model}"):
                await broker.submit(job(model, model=model))
        assert (await asyncio.wait_for(link.claims.claim(["here"], ["soon"]), 10)).id == "here"
        assert (await asyncio.wait_for(link.claims.claim(["here"], ["soon"]), 10)).id == "soon"
        await announce(draining=True)
        with pytest.raises(NoWorker):
            await broker.submit(job("late", model="here"))
        await link.die()


async def test_queued_jobs_for_a_model_that_is_gone_are_answered_at_once(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a"))
        states = {"m": ModelState("failed", error="broken")}
        await w.claims.announce(WorkerState("w", "cpu", True, states))
        with pytest.raises(JobLost, match="no worker serves m any longer") as lost:
            await asyncio.wait_for(told(broker, "a"), 5)
        assert problem_of(lost.value).status == 503, "somebody took it away: no fault of the server"


async def test_ended_jobs_are_forgotten_after_a_while(kind: Kind) -> None:
    async with kind.broker(keep=0.3) as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a", key="k"))
        await claim(w)
        await w.claims.publish("a", [Event(b"", final=True)])
        assert await told(broker, "a") == [b""]
        await asyncio.sleep(0.5)
        with pytest.raises(KeyError):
            await told(broker, "a")
        assert await broker.submit(job("b", key="k")) == "b", "its key stands for nothing any longer"


async def test_jobs_are_spread_over_idle_workers(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w1", "w2") as [w1, w2]:
        claims = [asyncio.create_task(claim(w)) for w in (w1, w2)]
        await asyncio.sleep(0.4)
        await broker.submit(job("a"))
        await broker.submit(job("b"))
        assert {(await c).id for c in claims} == {"a", "b"}


# ------------------------------------------------------------------------------------------------------------- tenants


async def claimed(link: Link, count: int) -> list[str]:
    return [(await claim(link)).id for _ in range(count)]


async def test_a_tenant_who_comes_late_does_not_wait_behind_a_flood(kind: Kind) -> None:
    async with kind.broker(100_000) as broker, workers(kind, broker, "w") as [w]:
        for k in range(50):
            await broker.submit(job(f"flood{k}", tenant="flood"))
        assert await claimed(w, 3) == ["flood0", "flood1", "flood2"]
        for k in range(3):
            await broker.submit(job(f"quiet{k}", tenant="quiet"))
        assert [await broker.position(f"quiet{k}") for k in range(3)] == [0, 2, 4]
        assert await claimed(w, 6) == ["quiet0", "flood3", "quiet1", "flood4", "quiet2", "flood5"]


async def test_tenants_are_given_equal_work_not_equal_numbers_of_jobs(kind: Kind) -> None:
    async with kind.broker(100_000) as broker, workers(kind, broker, "w") as [w]:
        for k in range(12):
            await broker.submit(job(f"large{k}", tenant="large", units=90))
        for k in range(60):
            await broker.submit(job(f"small{k}", tenant="small", units=10))
        taken = await claimed(w, 40)
        large = sum(name.startswith("large") for name in taken)
        assert 90 * large == pytest.approx(10 * (40 - large), abs=90)
        of_one = [name for name in taken if name.startswith("small")]
        assert of_one == [f"small{k}" for k in range(len(of_one))], "first come, first served among one tenant's"


async def test_time_away_is_not_saved_up(kind: Kind) -> None:
    async with kind.broker(100_000) as broker, workers(kind, broker, "w") as [w]:
        for k in range(30):
            await broker.submit(job(f"a{k}", tenant="a"))
        await claimed(w, 20)
        for k in range(30):
            await broker.submit(job(f"b{k}", tenant="b"))
        taken = await claimed(w, 10)
        assert sum(name.startswith("b") for name in taken) == pytest.approx(5, abs=1)


async def test_a_worker_that_has_enough_of_a_tenant_is_given_others_jobs(kind: Kind) -> None:
    async with kind.broker(100_000) as broker, workers(kind, broker, "w") as [w]:
        for k in range(40):
            await broker.submit(job(f"flood{k}", tenant="flood"))
        waiting = asyncio.create_task(asyncio.wait_for(w.claims.claim(["m"], enough={"m": ["flood"]}), 10))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        await broker.submit(job("quiet", tenant="quiet"))
        assert (await waiting).id == "quiet"
        assert (await claim(w)).id == "flood0"


async def test_a_job_handed_back_stands_where_it_stood(kind: Kind) -> None:
    async with kind.broker(100_000) as broker, workers(kind, broker, "w") as [w]:
        for k in range(4):
            await broker.submit(job(f"a{k}", tenant="a b: c"))
        assert await claimed(w, 2) == ["a0", "a1"]
        await w.claims.hand_back(["a1", "a0"])
        assert await claimed(w, 4) == ["a0", "a1", "a2", "a3"]


async def test_a_job_handed_back_is_not_passed_by_all_who_came_since_the_queue_was_empty(kind: Kind) -> None:
    async with kind.broker(10**8) as broker, workers(kind, broker, "w1", "w2") as [w1, w2]:
        await broker.submit(job("hours", units=10**6))
        await broker.submit(job("late"))
        assert [(await claim(w1)).id for _ in range(2)] == ["hours", "late"]
        for k in range(3):
            await broker.submit(job(f"new{k}"))
        await w1.claims.hand_back(["late"])
        async with asyncio.timeout(5):
            while (await broker.status("late")).state != "queued":
                await asyncio.sleep(0.01)
        assert await broker.position("late") == 0
        assert (await claim(w2)).id == "late"


async def test_a_batch_job_waits_no_longer_than_an_interactive_one_that_came_a_while_later(
    kind: Kind, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("service.broker_local", "service.claims_redis"):
        monkeypatch.setattr(f"{module}.AGEING", 0.3)
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("batch", priority="batch"))
        await broker.submit(job("soon"))
        await asyncio.sleep(0.4)
        await broker.submit(job("late"))
        assert await claimed(w, 3) == ["soon", "batch", "late"]


async def test_a_job_goes_rather_to_the_worker_that_has_its_model_in_memory(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w1", "w2") as [w1, w2]:
        sooner = 0
        for k in range(6):
            has, lacks = (w1, w2) if k % 2 else (w2, w1)
            would_load = asyncio.create_task(lacks.claims.claim(["other"], ["m"]))
            waiting = asyncio.create_task(has.claims.claim(["m"], ["other"]))
            await asyncio.sleep(0.35)
            await broker.submit(job(f"j{k}"))
            async with asyncio.timeout(10):
                done, pending = await asyncio.wait([waiting, would_load], return_when=asyncio.FIRST_COMPLETED)
            assert {task.result().id for task in done} == {f"j{k}"}
            sooner += waiting in done
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)
        assert sooner >= 5


async def test_a_job_for_a_model_that_nobody_has_in_memory_is_taken_all_the_same(kind: Kind) -> None:
    async with kind.broker() as broker, workers(kind, broker, "w") as [w]:
        await broker.submit(job("a"))
        assert (await asyncio.wait_for(w.claims.claim(["other"], ["m"]), 10)).id == "a"
        await broker.submit(job("b"))
        assert (await asyncio.wait_for(w.claims.claim([], ["m"]), 10)).id == "b"


@pytest.mark.parametrize("loop", [asyncio.new_event_loop, auto_loop_factory()])
def test_what_comes_between_a_workers_end_and_the_news_of_it(loop: Callable[[], asyncio.AbstractEventLoop]) -> None:
    """Its socket is closed, and nobody has heard so yet: new jobs are for others, and to cancel one is no error."""

    async def scene() -> None:
        broker = LocalBroker(100, 60.0, 30.0)
        dying, living = LocalLink(broker, "dying"), LocalLink(broker, "living")
        await dying.open(broker, "m")
        await broker.submit(job("running"))
        await claim(dying)
        claiming = asyncio.create_task(dying.claims.claim(["m"]))
        async with asyncio.timeout(5):
            while not broker._links["dying"].wanted:
                await asyncio.sleep(0.01)
        broker._links["dying"].writer.transport.abort()
        await asyncio.sleep(0)  # now it is closed
        assert "dying" in broker._links
        await broker.submit(job("new"))
        await broker.cancel("running")
        await living.open(broker, "m")
        taken = await claim(living)
        assert (taken.id, taken.attempt) == ("new", 1)
        with pytest.raises(JobLost):
            await told(broker, "running")
        claiming.cancel()
        for link in (dying, living):
            await link.die()

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(scene())
