"""The queue in which tenants take turns, over random histories."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import given, settings
from hypothesis import strategies as st

from service.turns import TENANTS, Place, Turns

JOBS = st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 50)), min_size=1, max_size=60)


def drain(queue: Turns) -> list[Place]:
    order = []
    while (place := queue.first()) is not None:
        queue.take(place)
        order.append(place)
    return order


@settings(deadline=None)
@given(JOBS)
def test_while_two_tenants_wait_neither_is_given_more_than_a_job_of_each_ahead(jobs: list[tuple[str, int]]) -> None:
    """Goyal, Vin and Cheng 1996, theorem 1: |W_a − W_b| ≤ largest job of a + largest job of b."""
    queue, work, left = Turns(), dict[str, int](), Counter[str]()
    for k, (tenant, units) in enumerate(jobs):
        queue.add(f"{tenant}{k}", tenant, units)
        work[f"{tenant}{k}"] = units
        left[tenant] += 1
    largest = {tenant: max(units for t, units in jobs if t == tenant) for tenant in left}
    given_to: Counter[str] = Counter()
    for place in drain(queue):
        given_to[place.tenant] += work[place.job]
        left[place.tenant] -= 1
        for a in left:
            for b in left:
                if left[a] and left[b]:
                    assert given_to[a] - given_to[b] <= largest[a] + largest[b]
    assert len(queue) == 0


@settings(deadline=None)
@given(JOBS, st.randoms(use_true_random=False))
def test_every_job_has_its_turn_once_and_each_tenant_its_own_in_order(jobs: list[tuple[str, int]], rng: object) -> None:
    queue, order = Turns(), defaultdict[str, list[int]](list)
    out: list[Place] = []
    for k, (tenant, units) in enumerate(jobs):
        place = queue.add(f"{tenant}{k}", tenant, units)
        assert 0 <= queue.position(place) < len(queue)
        assert list(queue)[queue.position(place)] is place
        if rng.random() < 0.4 and (first := queue.first(without="a")) is not None:  # type: ignore[attr-defined]
            assert first.tenant != "a"
            queue.take(first)
            if rng.random() < 0.3:  # type: ignore[attr-defined]
                assert queue.put_back(first) == first, "where it stood"
            else:
                out.append(first)
    for place in out + drain(queue):
        order[place.tenant].append(int(place.job[1:]))
    assert sorted(n for ns in order.values() for n in ns) == list(range(len(jobs)))
    assert all(ns == sorted(ns) for ns in order.values())
    assert queue.add("x", "x", 1).tag == 0, "an empty queue owes nobody anything"


def test_a_job_that_comes_back_after_nobody_waited_is_the_next() -> None:
    """A worker dies after hours of work: the jobs that it had must not wait until others were given as much again."""
    queue = Turns()
    queue.add("hours", "a", 10**6)
    late = [queue.add(name, "a", 10) for name in ("late", "later")]
    drain(queue)
    queue.add("new", "b", 10)
    back = [queue.put_back(place) for place in late]
    queue.add("newer", "c", 10)
    assert [queue.position(place) for place in back] == [0, 1]
    assert [place.job for place in drain(queue)] == ["late", "later", "new", "newer"]


def test_of_very_many_tenants_those_who_were_given_the_most_are_remembered() -> None:
    queue = Turns()
    for k in range(6 * TENANTS):
        queue.add(f"j{k}", f"tenant{k}", 5.0 if k % 10 == 0 else 1.0)
        if k > 10:
            place = queue.first()
            assert place is not None
            queue.take(place)
    assert len(queue._given) <= 2 * TENANTS + 1
    assert {f"tenant{k}" for k in range(0, 6 * TENANTS - 2000, 10)} <= queue._given.keys()
