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
from collections.abc import Iterator, Mapping

from benchmarks._frame import Bench, Results, alone
from benchmarks._load import Job, Outcome, Phase
from benchmarks._page import table
from benchmarks._servers import Running, drawwell, running, subset

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


def run(bench: Bench, args: argparse.Namespace) -> None:
    share = 1 / len(args.mixes)
    for k, mix in enumerate(args.mixes):
        seconds = share * bench.seconds if k + 1 < len(args.mixes) else bench.left
        (_steps if mix == "steps" else _models)(bench, args, seconds)


def _steps(bench: Bench, args: argparse.Namespace, seconds: float) -> None:
    window = min(max(seconds / 3 / (1.5 + len(LOADS)), LEAST), MOST)
    jobs = steps_mix()
    with subset(args.models, DDPM) as folder, running(drawwell(folder), *jobs) as server:
        for number in _rounds(bench, seconds):
            capacity = measure_capacity(server, jobs, window)
            _record(bench, "steps", number, server, jobs, capacity, window)


def _models(bench: Bench, args: argparse.Namespace, seconds: float) -> None:
    names = (GAN, DDPM, PIXELCNN)
    window = min(max(seconds / 3 / (0.5 * len(names) + 1.5 + len(LOADS)), LEAST), MOST)
    alone_jobs = {name: Job(name, {"model": name, "n": 1, "seed": 0}) for name in names}
    with subset(args.models, *names) as folder, running(drawwell(folder), *alone_jobs.values()) as server:
        for number in _rounds(bench, seconds):
            each = {}
            for name, job in alone_jobs.items():
                outcome = server.phase(closed((job,), window / 2))
                each[name] = outcome.seconds / max(len(outcome.completed()), 1)
                bench.record({"mix": "models", "job": name}, number, "images/s", alone=1 / each[name])
            jobs = models_mix(each)
            capacity = measure_capacity(server, jobs, window)
            _record(bench, "models", number, server, jobs, capacity, window)


def _rounds(bench: Bench, seconds: float) -> Iterator[int]:
    for number, _ in bench.interleaved([None], seconds):
        yield number


def closed(jobs: tuple[Job, ...], window: float, workers: int | None = None) -> Phase:
    """More clients than fit into the batches of all workers."""
    clients = CLIENTS * (workers or os.cpu_count() or 1)
    return Phase(jobs, window, clients=clients, warm=window / 2)


def measure_capacity(server: Running, jobs: tuple[Job, ...], window: float) -> float:
    """Requests of this mix per second, at saturation."""
    capacity = server.phase(closed(jobs, window)).capacity
    return max(capacity, 1.0 / window)  # a window too short for any answer still gives a rate to go on with


def _record(
    bench: Bench, mix: str, number: int, server: Running, jobs: tuple[Job, ...], capacity: float, window: float
) -> None:
    bench.record({"mix": mix}, number, "requests/s", capacity=capacity)
    for load in LOADS:
        phase = Phase(jobs, window, rate=load * capacity, drain=max(window, 5.0), seed=1000 * number + int(100 * load))
        before = _steps_and_rows(server)
        outcome = server.phase(phase)
        steps, rows = (after - b for after, b in zip(_steps_and_rows(server), before, strict=True))
        case = {"mix": mix, "load": load}
        record_outcome(bench, case, number, outcome)
        if steps > 0:
            bench.record(case, number, "rows", int(steps), rows_a_step=rows / steps)


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
    rows = []
    for mix, load, job in results.cases("mix", "load", "job"):
        whole = {"mix": mix, "load": load}
        case = {**whole, "job": job}
        times = [results.text(f"p{q}", 1000, **case) for q in (50, 95, 99)]
        rows.append((mix, f"{load:.0%}", job, str(results.samples("p50", **case)), *times))
    totals = []
    for mix, load in dict.fromkeys((mix, load) for mix, load, _ in results.cases("mix", "load", "job")):
        case = {"mix": mix, "load": load}
        numbers = [
            results.text(name, **case) for name in ("offered", "goodput", "failed", "utilisation", "rows_a_step")
        ]
        totals.append((mix, f"{load:.0%}", *numbers))
    latencies = table(("mix", "load", "kind", "requests", "p50, ms", "p95, ms", "p99, ms"), rows)
    header = ("mix", "load", "offered, requests/s", "goodput", "failed", "utilisation", "rows a step")
    capacities = ", ".join(f"{m}: {results.text('capacity', mix=m)}" for (m,) in results.cases("mix"))
    return {"mixed": f"Capacity, requests/s: {capacities}.\n\n{latencies}\n{table(header, totals)}"}


if __name__ == "__main__":
    import sys

    alone("mixed", sys.modules[__name__])
