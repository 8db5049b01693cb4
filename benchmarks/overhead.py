"""What serving costs: images per second of a saturated server, over those of a bare loop with the same network.

    python -m benchmarks.overhead [--minutes 10]

The bare loop is `init`, `step` … `step`, `image` over one batch after another in one process, without HTTP, queue or
PNG. The server gets requests of one whole batch of images, or of one image each, from so many clients that three
batches are always asked for. Where the server has chosen a faster way to run the network, the loop runs it in the same
way. Both use one thread; then both use all cores: the server a worker for each, the loop as many threads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch

from benchmarks._frame import Bench, Results, alone, quotient
from benchmarks._load import Job, Outcome, Phase
from benchmarks._page import table
from benchmarks._servers import STARTING, Server, drawwell, of_variants, running, subset, variants
from benchmarks._ways import prepared, way_of
from models._protocol import Draw, Model

WEIGHT = 3.0
AHEAD = 3  # batches that are asked for at any time
LEAST, MOST = 1.0, 30.0  # seconds of a measurement


@dataclass(frozen=True)
class Load:
    model: str
    batch: int
    steps: int

    def body(self, n: int) -> dict[str, str | int]:
        return {"model": self.model, "n": n, "steps": self.steps, "seed": 0}


LOADS = (Load("fashion-mnist-ddpm", 16, 50), Load("fashion-mnist-gan", 64, 1))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--loads", nargs="+", type=_load, default=LOADS, metavar="MODEL:BATCH:STEPS")
    variants(parser)


def _load(text: str) -> Load:
    model, batch, steps = text.rsplit(":", 2)
    return Load(model, int(batch), int(steps))


def run(bench: Bench, args: argparse.Namespace) -> None:
    settings = of_variants(args, [load.model for load in args.loads], bench.smallest)
    first, cores = next(iter(settings)), os.cpu_count() or 1
    cases = [(load, name, 1) for load in args.loads for name in settings]
    if cores > 1 and not bench.smallest:
        cases += [(load, first, cores) for load in args.loads]
    # A round takes, of each case, two windows of the server, each with half of one to warm up, and one of the loop.
    seconds = bench.window(4 * len(cases), LEAST, MOST, fixed=STARTING * len(cases))
    with subset(args.models, *(load.model for load in args.loads)) as folder:
        for number, (load, name, workers) in bench.interleaved(cases):
            case = {"model": load.model, "batch": load.batch, "server": name, "workers": workers}
            way, found = served(
                folder, load, drawwell(folder, ",".join(["cpu"] * workers), name, settings[name]), seconds
            )
            for n, (images, took) in found.items():
                bench.record({**case, "n": n}, number, "images/s", images, served=images / took)
            images, took = bare(prepared(folder / load.model, way, load.batch), load, workers, seconds)
            bench.record({**case, "way": way}, number, "images/s", images, bare=images / took)


def served(folder: Path, load: Load, server: Server, seconds: float) -> tuple[str, dict[int, tuple[int, float]]]:
    """In which way the server runs the network, and {images a request: (images it answered with, in how many seconds)}
    when it is saturated."""
    jobs = {n: Job("image", load.body(n), work=n) for n in sorted({load.batch, 1})}
    found = {}
    with running(server.with_environment(DRAWWELL_MAX_ROWS=str(load.batch)), *jobs.values()) as started:
        workers = started.metric("drawwell_workers", state="ready")
        way = way_of(httpx.get(f"{started.url}/models/{load.model}", timeout=60).raise_for_status().json())
        for n, job in jobs.items():
            clients = int(workers) * AHEAD * load.batch // n
            outcome = started.phase(Phase((job,), seconds, clients=clients, warm=seconds / 2))
            if outcome.failed:
                raise RuntimeError(f"{load.model}: {outcome.failed} requests were refused or failed")
            answers, took = _rate(outcome)
            found[n] = n * answers, took
    return way, found


def _rate(outcome: Outcome) -> tuple[int, float]:
    """Answers, and in how many seconds; of the whole window where it is too short for anything better."""
    try:
        return outcome.steady
    except ValueError:
        return len(outcome.completed()), outcome.seconds


def bare(model: Model, load: Load, threads: int, seconds: float) -> tuple[int, float]:
    """Images that a loop over the network drew, and in how many seconds: whole batches, at least one."""
    with _threads(threads):
        _batch(model, load)  # warms up
        images, began = 0, time.perf_counter()
        while images == 0 or time.perf_counter() - began < seconds:
            _batch(model, load)
            images += load.batch
        return images, time.perf_counter() - began


@torch.inference_mode()
def _batch(model: Model, load: Load) -> None:
    solver = model.spec.solvers[0] if model.spec.solvers else None
    rows = model.init([Draw(seed=k, sample=0, steps=load.steps, solver=solver) for k in range(load.batch)])
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    model.image(rows)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def page(results: Results) -> dict[str, str]:
    rows = []
    for model, batch, server, workers, n in results.cases("model", "batch", "server", "workers", "n"):
        case = {"model": model, "batch": batch, "server": server, "workers": workers}
        ours, bare = results.values("served", **case, n=n), results.values("bare", **case)
        ways = dict.fromkeys(m["way"] for m in results.measurements if m.items() >= {**case, "metric": "bare"}.items())
        speeds = (results.text("served", **case, n=n), results.text("bare", **case), quotient(ours, bare))
        rows.append((model, str(batch), str(n), server, ", ".join(ways), str(workers), *speeds))
    header = ("model", "rows a batch", "images a request", "server", "networks run", "threads")
    return {"overhead": table((*header, "served, images/s ↑", "bare loop", "ratio ↑"), rows)}


if __name__ == "__main__":
    import sys

    alone("overhead", sys.modules[__name__])
