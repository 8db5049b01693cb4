"""The scheduler over random histories: every row runs exactly once, nobody starves, time is shared."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.cost import Cost
from service.scheduler import AGEING, SHARED, TENANTS, Row, Scheduler, Ticket


class Simulation:
    """A device that takes `a · rows + b` seconds a step, and chains of a given length."""

    def __init__(self, scheduler: Scheduler, costs: dict[str, tuple[float, float]], multiple: int = 1) -> None:
        self.scheduler, self.costs, self.now = scheduler, costs, 0.0
        self.multiple = multiple  # of rows that a batch is filled up to
        self.left: dict[Row, int] = {}
        self.tickets: dict[str, tuple[Ticket, int]] = {}
        self.joined: Counter[Row] = Counter()
        self.finished: Counter[Row] = Counter()
        self.left_early: dict[str, str] = {}
        self.used: Counter[str] = Counter()
        self.ended: dict[str, float] = {}

    def submit(self, ticket: Ticket, steps: int) -> None:
        self.tickets[ticket.job] = (ticket, steps)
        self.scheduler.submit(ticket, self.now)

    def step(self) -> bool:
        plan = self.scheduler.plan(self.now)
        for job, reason in plan.leave:
            assert job not in self.left_early
            self.left_early[job] = reason
            self.left = {row: n for row, n in self.left.items() if row.job != job}
        if plan.lane is None:
            assert not plan.join
            return bool(plan.leave)
        for row in plan.join:
            assert self.tickets[row.job][0].lane == plan.lane
            self.joined[row] += 1
            self.left[row] = self.tickets[row.job][1]
        rows = [row for row in self.left if self.tickets[row.job][0].lane == plan.lane]
        assert rows, "a lane without rows was planned"
        assert set(self.scheduler.running(plan.lane)) == set(rows)
        a, b = self.costs[plan.lane]
        seconds = a * -(-len(rows) // self.multiple) * self.multiple + b
        self.now += seconds
        self.used[plan.lane] += seconds  # type: ignore[assignment]
        for row in rows:
            self.left[row] -= 1
        done = [row for row in rows if self.left[row] == 0]
        for row in done:
            self.finished[row] += 1
            del self.left[row]
        self.scheduler.report(plan.lane, len(rows), seconds, done)
        for job in {row.job for row in done}:
            if (
                not any(row.job == job for row in self.left)
                and sum(r.job == job for r in self.finished) == self.tickets[job][0].rows
            ):
                self.ended[job] = self.now
        return True

    def run(self) -> None:
        for _ in range(100_000):
            if not self.step():
                return
        raise AssertionError("it never came to an end")


LANES = {"gan": (1e-4, 1e-3), "ddpm": (2e-3, 3e-3), "pixelcnn": (1e-4, 5e-4)}
events = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "cancel", "step", "step"]),
        st.integers(0, 10**6),
    ),
    max_size=60,
)


@settings(max_examples=300, deadline=None)
@given(history=events, max_rows=st.integers(1, 9))
def test_every_row_runs_exactly_once_whatever_happens(history: list[tuple[str, int]], max_rows: int) -> None:
    s = Scheduler(max_rows)
    sim = Simulation(s, LANES)
    for what, number in history:
        rng = random.Random(number)
        if what == "submit":
            ticket = Ticket(
                f"job{len(sim.tickets)}",
                rng.choice(list(LANES)),
                rng.randint(1, 2 * max_rows),
                rng.choice(["interactive", "batch"]),
                rng.choice([None, None, sim.now + rng.random() * 0.05]),
                rng.choice(["a", "b", "c"]),
                steps := rng.choice([1, 2, 30]),
            )
            sim.submit(ticket, steps)
        elif what == "cancel" and sim.tickets:
            s.cancel(rng.choice(list(sim.tickets)))
        else:
            sim.step()
        for lane in LANES:
            assert len(s.running(lane)) <= max_rows
    sim.run()
    assert s.jobs == 0
    assert not sim.left
    for job, (ticket, _) in sim.tickets.items():
        rows = [Row(job, k) for k in range(ticket.rows)]
        if job in sim.left_early:
            assert job not in sim.ended
            assert all(sim.joined[row] <= 1 for row in rows)
        else:
            assert all(sim.joined[row] == 1 and sim.finished[row] == 1 for row in rows)
            assert job in sim.ended


def test_a_cheap_lane_waits_for_one_step_of_a_dear_one_at_most() -> None:
    sim = Simulation(Scheduler(), {"dear": (0.0, 0.1), "cheap": (0.0, 0.001)})
    sim.submit(Ticket("long", "dear", 64), 1000)
    for _ in range(5):
        sim.step()
    for k in range(20):
        arrived = sim.now
        sim.submit(Ticket(f"short{k}", "cheap", 1), 1)
        while f"short{k}" not in sim.ended:
            sim.step()
        assert sim.ended[f"short{k}"] - arrived <= 0.1 + 0.001 + 1e-9


def test_two_busy_lanes_share_the_device_evenly_in_time_not_in_steps() -> None:
    sim = Simulation(Scheduler(), {"dear": (0.0, 0.05), "cheap": (0.0, 0.001)})
    sim.submit(Ticket("a", "dear", 8), 10_000)
    sim.submit(Ticket("b", "cheap", 8), 1_000_000)
    while sim.now < 20:
        sim.step()
    assert sim.used["dear"] == pytest.approx(sim.used["cheap"], rel=0.05)


def test_a_short_job_joins_a_running_batch() -> None:
    sim = Simulation(Scheduler(8), {"m": (0.0, 0.01)})
    sim.submit(Ticket("long", "m", 4), 1000)
    sim.step()
    sim.submit(Ticket("short", "m", 4), 10)
    for _ in range(10):
        sim.step()
    assert "short" in sim.ended


def test_interactive_goes_first_and_batch_does_not_starve() -> None:
    sim = Simulation(Scheduler(1), {"m": (0.0, 0.1)})
    sim.submit(Ticket("batch", "m", 1, "batch"), 1)
    sim.submit(Ticket("first", "m", 1), 1)
    sim.run()
    assert sim.ended["first"] < sim.ended["batch"]
    sim.submit(Ticket("old", "m", 1, "batch"), 1)
    arrived, k = sim.now, 0
    while "old" not in sim.ended:  # a stream of interactive jobs that fills the device
        sim.submit(Ticket(f"i{k}", "m", 1), 1)
        sim.step()
        k += 1
    assert sim.ended["old"] - arrived == pytest.approx(AGEING, abs=0.5)


def test_a_flood_of_one_tenant_delays_that_tenant_alone() -> None:
    sim = Simulation(Scheduler(4), {"m": (0.0, 0.01)})
    for k in range(200):
        sim.submit(Ticket(f"flood{k}", "m", 2, tenant="flood", work=10), 10)
    for k in range(30):
        for _ in range(7):
            sim.step()
        arrived = sim.now
        sim.submit(Ticket(f"quiet{k}", "m", 1, tenant="quiet", work=10), 10)
        while f"quiet{k}" not in sim.ended:
            sim.step()
        # It waits until a row of the flood has run to its end, then runs.
        assert sim.ended[f"quiet{k}"] - arrived <= 0.1 + 0.1 + 1e-9
    assert sum(job.startswith("flood") for job in sim.ended) < 200, "the flood was still there"


@pytest.mark.parametrize("cost", [(1.9e-3, 1.5e-3), (0.0, 5e-3), (1e-4, 2e-3)], ids=["by the row", "flat", "between"])
@pytest.mark.parametrize("flood", [(1, 20), (4, 300), (64, 50)], ids=["like the other's", "long", "large"])
def test_a_flood_leaves_others_p95_within_twice_what_it_is_without(
    cost: tuple[float, float], flood: tuple[int, int]
) -> None:
    """On a device whose steps cost by the row, by the step, or both; batches are filled up to four rows."""

    def p95(flooded: bool) -> float:
        rng = random.Random(1)
        sim = Simulation(Scheduler(64), {"m": cost}, multiple=4)
        for rows in (4, 64):
            sim.scheduler.prepare("m", 64, rows, rows * cost[0] + cost[1])
        sim.submit(Ticket("before", "m", 1, tenant="quiet"), 1)  # it has asked of late
        took: list[float] = []
        asked = 0
        while len(took) < 40:
            comes, name, arrived = sim.now + rng.expovariate(10.0), f"quiet{len(took)}", None
            while name not in sim.ended:
                while flooded and sim.scheduler.jobs < 2 + 128 // flood[0]:
                    sim.submit(Ticket(f"flood{asked}", "m", flood[0], tenant="flood", work=flood[1]), flood[1])
                    asked += 1
                if arrived is None and sim.now >= comes:
                    arrived = comes  # in the middle of a step, perhaps
                    sim.submit(Ticket(name, "m", 1, tenant="quiet", work=20), 20)
                if not sim.step():
                    sim.now = comes
            assert arrived is not None
            took.append(sim.ended[name] - arrived)
        return sorted(took)[37]

    quiet, flooded = p95(flooded=False), p95(flooded=True)
    assert quiet < flooded <= 2 * quiet


def test_without_other_tenants_a_batch_is_as_large_as_it_may_be() -> None:
    sim = Simulation(Scheduler(64), {"m": (1e-3, 1e-3)})
    for rows in (4, 64):
        sim.scheduler.prepare("m", 64, rows, (rows + 1) * 1e-3)
    for k in range(200):
        sim.submit(Ticket(f"a{k}", "m", 1, tenant="a"), 3)
    sim.step()
    assert len(sim.scheduler.running("m")) == 64
    sim.submit(Ticket("b", "m", 1, tenant="b"), 3)
    for _ in range(6):
        sim.step()
    assert "b" in sim.ended
    assert len(sim.scheduler.running("m")) < 8
    sim.now += SHARED
    sim.submit(Ticket("again", "m", 1, tenant="a"), 3)
    for _ in range(2):
        sim.step()
    assert len(sim.scheduler.running("m")) > 50, "b has not asked for a while"


def test_tenants_that_always_wait_are_given_equal_work() -> None:
    sim = Simulation(Scheduler(3), {"m": (0.0, 0.01)})
    for k in range(3000):
        sim.submit(Ticket(f"long{k}", "m", 1, tenant="long", work=50), 50)
        sim.submit(Ticket(f"short{k}", "m", 1, tenant="short", work=2), 2)
    while sim.now < 30:
        sim.step()
    given = {name: sum(sim.tickets[job][1] for job in sim.ended if job.startswith(name)) for name in ("long", "short")}
    assert given["long"] == pytest.approx(given["short"], rel=0.1)


def test_a_tenant_is_not_paid_for_the_time_it_asked_for_nothing() -> None:
    sim = Simulation(Scheduler(1), {"m": (0.0, 0.01)})
    for k in range(100):
        sim.submit(Ticket(f"a{k}", "m", 1, tenant="a", work=1), 1)
    for _ in range(50):
        sim.step()
    for k in range(100):
        sim.submit(Ticket(f"b{k}", "m", 1, tenant="b", work=1), 1)
    for _ in range(20):
        sim.step()
    assert sum(job.startswith("b") for job in sim.ended) == pytest.approx(10, abs=1)


def test_a_job_larger_than_the_batch_is_split_over_time() -> None:
    sim = Simulation(Scheduler(4), {"m": (0.0, 0.01)})
    sim.submit(Ticket("big", "m", 10), 3)
    sim.run()
    assert sim.ended["big"] == pytest.approx(9 * 0.01)


def test_expired_and_cancelled_jobs_are_told_apart_and_once() -> None:
    sim = Simulation(Scheduler(1), {"m": (0.0, 1.0)})
    sim.submit(Ticket("runs", "m", 1), 3)
    sim.submit(Ticket("late", "m", 1, expires=1.5), 1)
    sim.submit(Ticket("unwanted", "m", 1), 1)
    sim.scheduler.cancel("unwanted")
    sim.scheduler.cancel("nobody")
    sim.run()
    assert sim.left_early == {"late": "expired", "unwanted": "cancelled"}
    assert set(sim.ended) == {"runs"}


@given(a=st.floats(1e-5, 1e-2), b=st.floats(0, 1e-2), rows=st.lists(st.integers(1, 64), min_size=5, max_size=40))
def test_cost_recovers_the_line_it_is_shown(a: float, b: float, rows: list[int]) -> None:
    cost = Cost()
    for n in rows:
        cost.observe(n, a * n + b)
    if len(set(rows)) > 1:
        assert cost.predict(20) == pytest.approx(20 * a + b, rel=1e-3)
    assert cost.predict(rows[0]) == pytest.approx(a * rows[0] + b, rel=0.02)
    assert min(cost.coefficients) >= 0


def test_cost_forgets() -> None:
    cost = Cost()
    for n in range(1, 50):
        cost.observe(n, 1.0 * n)
    for _ in range(8):
        for n in range(1, 50):
            cost.observe(n, 0.01 * n)
    assert cost.predict(10) == pytest.approx(0.1, rel=0.1)


def test_bad_tickets_are_refused() -> None:
    s = Scheduler()
    s.submit(Ticket("a", "m", 1), 0)
    with pytest.raises(ValueError, match="a is there already"):
        s.submit(Ticket("a", "m", 1), 0)
    with pytest.raises(ValueError, match="rows: 0"):
        s.submit(Ticket("b", "m", 0), 0)
    with pytest.raises(ValueError, match="max_rows: 0"):
        Scheduler(0)
    with pytest.raises(ValueError, match="m has jobs"):
        s.forget("m")


def test_a_batch_job_that_has_waited_elsewhere_is_urgent_when_its_time_is_over_whoever_came_before() -> None:
    """Jobs come from the broker's queue in other orders than into it: tenants take turns there."""
    sim = Simulation(Scheduler(1), {"m": (0.0, 0.1)})
    sim.now = 3 * AGEING
    sim.submit(Ticket("fresh", "m", 1, "batch", tenant="a"), 1)
    sim.tickets["old"] = (Ticket("old", "m", 1, "batch", tenant="b"), 1)
    sim.scheduler.submit(sim.tickets["old"][0], AGEING)  # it came then, to the broker
    for k in range(20):
        sim.submit(Ticket(f"i{k}", "m", 1, tenant="c"), 1)
        sim.step()
    assert "old" in sim.ended
    assert "fresh" not in sim.ended


@pytest.mark.parametrize("before", ["one batch job", "a flood of batch jobs", "a batch job long ago"])
def test_nobody_is_paid_for_what_was_not_asked_for_when_batch_jobs_have_become_urgent(before: str) -> None:
    """One tenant has been given work for long, and always asks for more, when others come or come again."""
    sim = Simulation(Scheduler(1), {"m": (0.0, 0.1)})
    asked = 0

    def steps(n: int) -> None:
        nonlocal asked
        for _ in range(n):
            sim.submit(Ticket(f"always{asked}", "m", 1, tenant="always", work=1), 1)
            asked += 1
            sim.step()

    for k in range(1000 if "flood" in before else 1):
        sim.submit(Ticket(f"batch{k}", "m", 1, "batch", tenant="batch", work=1), 1)
    steps(round(AGEING / 0.1))
    while "batch0" not in sim.ended:
        steps(1)
    late = "batch"
    if "long ago" in before:
        steps(500)
        for k in range(100):
            sim.submit(Ticket(f"batch again{k}", "m", 1, tenant="batch", work=1), 1)
    elif "one" in before:
        late = "new"
        for k in range(100):
            sim.submit(Ticket(f"new{k}", "m", 1, tenant="new", work=1), 1)
    had = Counter(sim.tickets[job][0].tenant for job in sim.ended)
    steps(40)
    has = Counter(sim.tickets[job][0].tenant for job in sim.ended)
    assert has["always"] - had["always"] == pytest.approx(20, abs=2)
    assert has[late] - had[late] == pytest.approx(20, abs=2)


def test_of_very_many_tenants_not_all_are_remembered_though_somebody_always_waits() -> None:
    sim = Simulation(Scheduler(1), {"m": (0.0, 0.001)})
    for k in range(10 * TENANTS):
        sim.submit(Ticket(f"j{k}", "m", 1, tenant=f"tenant{k}"), 1)
        if k > 5:
            sim.step()
    assert len(sim.scheduler._lanes["m"].line._given) <= 2 * TENANTS + 1


@pytest.mark.parametrize("stopped", [60.0, 3600.0])
def test_a_process_that_stood_still_in_a_step_goes_on_as_before(stopped: float) -> None:
    sim = Simulation(Scheduler(), costs := {"a": (1e-3, 4e-3), "b": (1e-3, 4e-3)})
    for lane in costs:
        for rows in (4, 64):
            sim.scheduler.prepare(lane, 64, rows, rows * 1e-3 + 4e-3)
        sim.submit(Ticket(lane, lane, 8), 10**6)
    for _ in range(100):
        sim.step()
    costs["a"] = (0.0, stopped)
    while sim.used["a"] < stopped:
        sim.step()
    costs["a"] = costs["b"]
    before = sim.used.copy()
    after = sim.now
    while sim.now < after + 2:
        sim.step()
    assert sim.used["a"] - before["a"] == pytest.approx(sim.used["b"] - before["b"], rel=0.2)
    assert sim.scheduler.cost("a").predict(8) < 2 * 12e-3


def test_a_process_that_stood_still_between_steps_goes_on_as_before() -> None:
    """As while it draws previews: they are charged, the minute in which nothing was done is not."""
    sim = Simulation(Scheduler(), costs := {"a": (1e-3, 4e-3), "b": (1e-3, 4e-3)})
    for lane in costs:
        for rows in (4, 64):
            sim.scheduler.prepare(lane, 64, rows, rows * 1e-3 + 4e-3)
        sim.submit(Ticket(lane, lane, 8), 10**6)
    for _ in range(100):
        sim.step()
    sim.scheduler.charge("a", 60.0)
    before, after = sim.used.copy(), sim.now
    while sim.now < after + 2:
        sim.step()
    assert sim.used["a"] - before["a"] == pytest.approx(sim.used["b"] - before["b"], rel=0.2)


def test_a_device_that_has_become_slower_for_good_is_believed() -> None:
    scheduler = Scheduler()
    scheduler.prepare("m", 64, 4, 0.008)
    scheduler.prepare("m", 64, 64, 0.068)
    for _ in range(100):
        scheduler.report("m", 8, 1.2, [])
    assert scheduler.cost("m").predict(8) == pytest.approx(1.2, rel=0.3)


@given(
    st.lists(st.tuples(st.integers(0, 64), st.sampled_from([-1.0, 0.0, 1e-12, 1e-3, 1e5]), st.booleans()), max_size=60)
)
def test_whatever_a_clock_says_costs_are_finite_and_a_lane_steps(steps: list[tuple[int, float, bool]]) -> None:
    scheduler = Scheduler()
    for job, lane in (("a", "m"), ("b", "n")):
        scheduler.submit(Ticket(job, lane, 1), 0.0)
    for rows, seconds, together in steps:
        lane = scheduler.plan(0.0).lane
        assert lane is not None
        scheduler.report(lane, rows, seconds, [], together=together)
        a, b = scheduler.cost(lane).coefficients
        assert 0 <= a < 1e9
        assert 0 <= b < 1e9


def test_steps_that_were_not_taken_together_say_nothing_of_what_a_step_costs() -> None:
    scheduler = Scheduler()
    scheduler.prepare("m", 64, 4, 0.01)
    before = scheduler.load("m")
    scheduler.report("m", 0, 1e-6, [])
    scheduler.report("m", 64, 5.0, [], together=False)
    after = scheduler.load("m")
    assert (after.fastest, after.row_seconds) == (before.fastest, before.row_seconds)
    assert (after.steps, after.seconds) == (2, pytest.approx(5.0))
