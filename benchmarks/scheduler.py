"""Growth: what a step of the scheduler costs, by how much waits: `plan` and `report`, without any model.

    python -m benchmarks.scheduler [--minutes 2]

Every lane runs full batches; a row that finishes is followed by a new job, so that as many wait at the end as at the
beginning. Processor time of the thread, in microseconds a step. Beside it what a new job costs (`submit`), with as many
waiting.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import asdict, dataclass

from benchmarks._frame import Bench, Results, alone
from benchmarks._page import table
from service.scheduler import Row, Scheduler, Ticket

WEIGHT = 0.5
ROWS = 16  # that step together
STEPS = 2000  # of a measurement


@dataclass(frozen=True)
class Load:
    waiting: int = 1000  # jobs
    models: int = 20
    tenants: int = 10
    images: int = 1  # of a job
    steps: int = 50  # of an image


# One thing at a time is varied, around what the first one says.
LOADS = (
    Load(),
    *(Load(waiting=n) for n in (1, 10, 100, 10_000)),
    *(Load(models=n) for n in (1, 5, 50)),
    *(Load(tenants=n) for n in (1, 1000)),
    *(Load(images=n) for n in (4, 64)),
    *(Load(steps=n) for n in (1, 1000)),
)


@dataclass(frozen=True)
class Cost:
    """Microseconds, in the mean."""

    step: float
    submit: float


def cost(load: Load, steps: int, seed: int) -> Cost:
    """Of a step, over so many steps, and of the jobs that were submitted meanwhile."""
    rng = random.Random(seed)
    scheduler = Scheduler(ROWS)
    left: dict[Row, int] = {}
    submitted, now, spent = 0, 0.0, 0.0
    submitting: list[float] = []

    def submit() -> None:
        nonlocal submitted
        lane, tenant = f"model{submitted % load.models}", f"tenant{rng.randrange(load.tenants)}"
        ticket = Ticket(f"job{submitted}", lane, load.images, tenant=tenant, work=load.steps)
        began = time.thread_time()
        scheduler.submit(ticket, now)
        submitting.append(time.thread_time() - began)
        submitted += 1

    for _ in range(load.waiting + load.models * ROWS // load.images):
        submit()
    for taken in range(-steps // 4, steps):  # the first ones warm up
        began = time.thread_time()
        plan = scheduler.plan(now)
        planned = time.thread_time()
        assert plan.lane is not None
        for row in plan.join:
            left[row] = rng.randint(1, load.steps)
        running = scheduler.running(plan.lane)
        done = []
        for row in running:
            left[row] -= 1
            if left[row] == 0:
                done.append(row)
                del left[row]
        before, resumed = scheduler.jobs, time.thread_time()
        scheduler.report(plan.lane, len(running), 1e-3 * len(running), done)
        reported = time.thread_time()
        now += 1e-3
        for _ in range(before - scheduler.jobs):
            submit()
        if taken >= 0:
            spent += planned - began + reported - resumed
    latest = submitting[-max(1, len(submitting) // 4) :]  # with the queue as long as it gets
    return Cost(1e6 * spent / steps, 1e6 * sum(latest) / len(latest))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--steps", type=int, default=STEPS, help="of a measurement")


def run(bench: Bench, args: argparse.Namespace) -> None:
    steps = min(args.steps, 20) if bench.smallest else args.steps
    for number, load in bench.interleaved(LOADS):
        found = cost(load, steps, number)
        bench.record(asdict(load), number, "µs", steps, step=found.step, submit=found.submit)


def page(results: Results) -> dict[str, str]:
    rows = []
    for load in LOADS:
        numbers = (load.waiting, load.models, load.tenants, load.images, load.steps)
        costs = (results.text(metric, **asdict(load)) for metric in ("step", "submit"))
        rows.append((*(f"{n:,}" for n in numbers), *costs))
    header = ("waiting jobs", "models", "tenants", "images a job", "steps an image", "µs a step ↓", "µs a new job ↓")
    return {"scheduler": table(header, rows)}


if __name__ == "__main__":
    import sys

    alone("scheduler", sys.modules[__name__])
