"""What a step of the scheduler costs, by how much waits: `plan` and `report`, without any model.

    python -m benchmarks.scheduler [--steps 2000] [--rounds 5]

Every lane runs full batches; a row that finishes is followed by a new job, so that as many wait at the end as at the
beginning. Processor time of the thread; medians over the rounds, with the least and the most, in microseconds a step.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from service.scheduler import Row, Scheduler, Ticket

ROWS = 16  # that step together


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


def microseconds(load: Load, steps: int, seed: int) -> float:
    """Of a step, in the mean over so many steps."""
    rng = random.Random(seed)
    scheduler = Scheduler(ROWS)
    left: dict[Row, int] = {}
    submitted, now, spent = 0, 0.0, 0.0

    def submit() -> None:
        nonlocal submitted
        lane, tenant = f"model{submitted % load.models}", f"tenant{rng.randrange(load.tenants)}"
        scheduler.submit(Ticket(f"job{submitted}", lane, load.images, tenant=tenant, work=load.steps), now)
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
    return 1e6 * spent / steps


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scheduler", description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    table = Table("waiting jobs", "models", "tenants", "images a job", "steps an image", "µs a step")
    for load in LOADS:
        found = [microseconds(load, args.steps, seed) for seed in range(args.rounds)]
        spread = f"{statistics.median(found):.1f} ({min(found):.1f} – {max(found):.1f})"
        table.add_row(*(f"{n:,}" for n in (load.waiting, load.models, load.tenants, load.images, load.steps)), spread)
    Console().print(table)


if __name__ == "__main__":
    main()
