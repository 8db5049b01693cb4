"""The simulated pool: it loses nothing, says the same each time, and saturates where arithmetic says that it must."""

from __future__ import annotations

import pytest

from benchmarks.simulation import BATCH, DEVICE, STEPS, Request, at_random, simulate


def test_the_same_command_says_the_same() -> None:
    first, again = (simulate(2, at_random(500, 0.1), 0.1, 50e-6) for _ in range(2))
    assert first == again
    assert at_random(500, 0.1, seed=1) != at_random(500, 0.1)


def test_with_room_to_spare_every_job_is_answered_soon() -> None:
    found = simulate(4, at_random(200, 0.4), 0.4, 10e-6)
    late = [at for at in found.came if at > 0.2]
    assert len(found.came) - len(late) <= len(found.ended) <= len(found.came)
    slowest = max(STEPS) * (DEVICE[0] * BATCH + DEVICE[1])
    assert min(found.took) >= DEVICE[0] + DEVICE[1]
    assert max(found.took) <= slowest + 0.05
    assert found.refused == 0


def test_one_worker_answers_no_more_than_its_device_can_do() -> None:
    found = simulate(1, at_random(3000, 0.4), 0.4, 1e-6)
    most = BATCH / (sum(STEPS) / len(STEPS) * (DEVICE[0] * BATCH + DEVICE[1]))  # jobs a second, in full batches
    answered = sum(at > 0.2 for at in found.ended) / 0.2
    assert 0.6 * most < answered < 1.35 * most, "tenants who share a batch are given fewer places"
    assert found.broker < 0.1


def test_a_slow_broker_is_the_limit_however_many_workers_there_are() -> None:
    cost = 1e-3
    found = simulate(8, at_random(2500, 0.3), 0.3, cost)
    assert found.broker > 0.95
    assert 0 < len(found.ended) / 0.3 <= 1 / cost


@pytest.mark.parametrize("flood", [10, 400], ids=["short jobs", "long jobs"])
def test_a_flood_in_the_queue_leaves_others_p95_within_twice_what_it_is_without(flood: int) -> None:
    """Through queue, claims and scheduler: thousands of jobs of one tenant are queued at once; another asks for an
    image now and then.
    """
    seconds = 8.0
    quiet = [Request(0.1 * k, 20, "quiet") for k in range(70)]
    flooding = [Request(0.05, flood, "flood") for _ in range(3000)]

    def p95(requests: list[Request]) -> float:
        found = simulate(2, requests, seconds, 50e-6)
        took = sorted(t for t, tenant in zip(found.took, found.tenants, strict=True) if tenant == "quiet")
        assert len(took) == len(quiet)
        return took[int(0.95 * len(took))]

    alone, beside = p95(quiet), p95(sorted([*quiet, *flooding], key=lambda request: request.at))
    assert alone < beside <= 2 * alone
