"""Mixed load: requests of very different lengths arrive at random, at 50, 80 and 100 % of what the server can do.

    python -m benchmarks.mixed [--minutes 10]

Two mixes. `steps`: the DDPM alone, 80 % of the requests take 10 DDIM steps and 20 % take 200. `models`: a GAN, the DDPM
(50 steps) and the PixelCNN together, each asked for about as much work. All requests are for one image.

Capacity is measured first, in a closed loop with more clients than fit into a batch. Then requests arrive open-loop, at
random, and latencies count from when they were to arrive. Goodput: answers a second that came within the goal of their
kind. Utilisation: processor time of the server's processes, of what all cores have.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks._frame import Bench, Results, alone
from benchmarks._load import Job, Outcome, Phase
from benchmarks._page import table
from benchmarks._servers import STARTING, Running, drawwell, of_variants, running, subset, variants

WEIGHT = 4.0
LOADS = (0.5, 0.8, 1.0)  # of capacity
CLIENTS = 64  # of the closed loop that measures capacity, for each worker: a full batch
LEAST, MOST = 1.5, 120.0  # seconds of a window
DDPM, GAN, PIXELCNN = "fashion-mnist-ddpm", "fashion-mnist-gan", "fashion-mnist-pixelcnn"


def steps_mix(model: str = DDPM) -> tuple[Job, ...]:
    """80 % short ones, 20 % long ones."""
    return tuple(
        Job(f"{steps} steps", {"model": model, "n": 1, "steps": steps, "seed": 0}, share, goal, steps)
        for steps, share, goal in ((10, 0.8, 1.0), (200, 0.2, 20.0))
    )


def models_mix(seconds: Mapping[str, float]) -> tuple[Job, ...]:
    """Three families, about the same work of each, by the seconds that an image of it takes when many are asked for."""
    return tuple(
        Job(name, {"model": name, "n": 1, "seed": 0}, share=1 / seconds[name], goal=goal, work=seconds[name])
        for name, goal in ((GAN, 1.0), (DDPM, 10.0), (PIXELCNN, 20.0))
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--mixes", nargs="+", choices=("steps", "models"), default=["steps", "models"])
    variants(parser)


def run(bench: Bench, args: argparse.Namespace) -> None:
    settings = of_variants(args, (DDPM, GAN), bench.smallest)
    cases = [(mix, name) for mix in args.mixes for name in settings]
    # Saturation with half a window to warm up, three loads, and up to a window in all until the last answers are there;
    # before it, half a window and what it takes to warm up for each of three models.
    windows = sum(1.5 + len(LOADS) + 1 + (2.25 if mix == "models" else 0) for mix, _ in cases)
    window = bench.window(windows, LEAST, MOST, STARTING * len(cases))
    for number, (mix, name) in bench.interleaved(cases):
        models = (DDPM,) if mix == "steps" else (GAN, DDPM, PIXELCNN)
        each = [Job(model, {"model": model, "n": 1, "seed": 0}) for model in models]
        case = {"server": name, "mix": mix}
        with subset(args.models, *models) as folder, ours(folder, name, settings[name], each) as server:
            jobs = steps_mix() if mix == "steps" else models_mix(_alone(bench, case, number, server, each, window))
            capacity = measure_capacity(server, jobs, window)
            _loads(bench, case, number, server, jobs, capacity, window)


def ours(folder: Path, name: str, settings: Mapping[str, str], jobs: Sequence[Job]) -> AbstractContextManager[Running]:
    return running(drawwell(folder, name=name, environment=settings), *jobs)


def _alone(
    bench: Bench, case: Mapping[str, str], number: int, server: Running, each: Sequence[Job], window: float
) -> dict[str, float]:
    """Seconds that an image of each model takes, when nothing else is asked for."""
    found = {}
    for job in each:
        outcome = server.phase(closed((job,), window / 2))
        found[job.name] = outcome.seconds / max(len(outcome.completed()), 1)
        bench.record({**case, "job": job.name}, number, "images/s", len(outcome.completed()), alone=1 / found[job.name])
    return found


def closed(jobs: tuple[Job, ...], window: float, workers: int | None = None) -> Phase:
    """More clients than fit into the batches of all workers."""
    clients = CLIENTS * (workers or os.cpu_count() or 1)
    return Phase(jobs, window, clients=clients, warm=window / 2)


def measure_capacity(server: Running, jobs: tuple[Job, ...], window: float) -> float:
    """Requests of this mix per second, at saturation."""
    capacity = server.phase(closed(jobs, window)).capacity
    return max(capacity, 1.0 / window)  # a window too short for any answer still gives a rate to go on with


def _loads(
    bench: Bench,
    case: Mapping[str, str],
    number: int,
    server: Running,
    jobs: tuple[Job, ...],
    capacity: float,
    window: float,
) -> None:
    bench.record(case, number, "requests/s", capacity=capacity)
    for load in LOADS:
        seed = 1000 * number + int(100 * load)  # the same arrivals for every variant of the server, at its own rate
        phase = Phase(jobs, window, rate=load * capacity, drain=max(window, 5.0), seed=seed)
        before = _steps_and_rows(server)
        outcome = server.phase(phase)
        steps, rows = (after - b for after, b in zip(_steps_and_rows(server), before, strict=True))
        record_outcome(bench, {**case, "load": load}, number, outcome)
        if steps > 0:
            bench.record({**case, "load": load}, number, "rows", int(steps), rows_a_step=rows / steps)


def _steps_and_rows(server: Running) -> tuple[float, float]:
    return server.metric("drawwell_steps_total"), server.metric("drawwell_step_rows_total")


def record_outcome(bench: Bench, case: Mapping[str, str | float], number: int, outcome: Outcome) -> None:
    """Latencies by kind, goodput, utilisation, and how late the generator itself was."""
    for job in outcome.jobs:
        count = len(outcome.of(job.name))
        if count:
            latencies = {f"p{q}": outcome.latency(q, job.name) for q in (50, 95, 99)}
            bench.record({**case, "job": job.name}, number, "s", count, **latencies)
    count = len(outcome.of())
    cores = os.cpu_count() or 1
    bench.record(case, number, "requests/s", count, offered=count / outcome.seconds, goodput=outcome.goodput)
    bench.record(case, number, "ratio", utilisation=outcome.server_cpu / outcome.seconds / cores)
    bench.record(case, number, "requests", count, failed=outcome.failed)
    bench.record(case, number, "s", count, lag=outcome.lag)


def page(results: Results) -> dict[str, str]:
    rows, totals = [], []
    for server, mix, load, job in results.cases("server", "mix", "load", "job"):
        case = {"server": server, "mix": mix, "load": load, "job": job}
        times = [results.text(f"p{q}", 1000, **case) for q in (50, 95, 99)]
        rows.append((server, mix, f"{load:.0%}", job, str(results.samples("p50", **case)), *times))
    for server, mix, load in dict.fromkeys(case[:3] for case in results.cases("server", "mix", "load", "job")):
        case = {"server": server, "mix": mix, "load": load}
        names = ("offered", "goodput", "failed", "utilisation", "rows_a_step", "lag")
        totals.append((server, mix, f"{load:.0%}", *(results.text(name, **case) for name in names)))
    capacities = [
        (server, mix, results.text("capacity", server=server, mix=mix))
        for server, mix in results.cases("server", "mix")
    ]
    header = (
        "server", "mix", "load", "offered, requests/s", "goodput ↑", "failed", "utilisation", "rows a step",
        "the generator's own lag, s",
    )  # fmt: skip
    parts = (
        table(("server", "mix", "capacity, requests/s ↑"), capacities),
        table(("server", "mix", "load", "kind", "requests", "p50, ms ↓", "p95, ms ↓", "p99, ms ↓"), rows),
        table(header, totals),
    )
    return {"mixed": "\n".join(parts)}


if __name__ == "__main__":
    import sys

    alone("mixed", sys.modules[__name__])
