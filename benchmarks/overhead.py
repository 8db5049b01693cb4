"""What serving costs: images per second of a saturated server, over those of a bare loop with the same network.

    python -m benchmarks.overhead [--minutes 10]

The bare loop is `init`, `step` … `step`, `image` over one batch after another in one process, without HTTP, queue or
PNG. The server gets requests of one whole batch of images, or of one image each, from so many clients that three
batches are always asked for. Both use one thread; then both use all cores: the server a worker for each, the loop as
many threads.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks._frame import Bench, Results, alone, quotient, spread, turned
from benchmarks._load import Job, Phase
from benchmarks._page import table
from benchmarks._servers import STARTING, drawwell, running, subset
from models import _checkpoint
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


def _load(text: str) -> Load:
    model, batch, steps = text.rsplit(":", 2)
    return Load(model, int(batch), int(steps))


def run(bench: Bench, args: argparse.Namespace) -> None:
    pools = [1] if bench.smallest else sorted({1, os.cpu_count() or 1})
    cases = [(load, workers) for load in args.loads for workers in pools]
    # A round takes, of each case, two windows of the server, each with half of one to warm up, and one of the loop.
    seconds = bench.window(4 * len(cases), LEAST, MOST, fixed=STARTING * len(cases))
    with subset(args.models, *(load.model for load in args.loads)) as folder:
        loaded = {load.model: _checkpoint.load(folder / load.model) for load in args.loads}
        for number, (load, workers) in bench.interleaved(cases):
            case = {"model": load.model, "batch": load.batch, "workers": workers}
            for what in turned(("served", "bare"), number):  # another comes first in every round
                if what == "served":
                    for n, (images, took) in served(folder, load, workers, seconds).items():
                        bench.record({**case, "n": n}, number, "images/s", images, served=images / took)
                else:
                    images, took = bare(loaded[load.model], load, workers, seconds)
                    bench.record(case, number, "images/s", images, bare=images / took)


def served(folder: Path, load: Load, workers: int, seconds: float) -> dict[int, tuple[int, float]]:
    """{images a request: (images that a saturated server answered with, in how many seconds)}"""
    jobs = {n: Job("image", load.body(n), work=n) for n in sorted({load.batch, 1})}
    rows = {"DRAWWELL_MAX_ROWS": str(load.batch)}
    found = {}
    with running(drawwell(folder, ",".join(["cpu"] * workers), environment=rows), *jobs.values()) as server:
        for n, job in jobs.items():
            clients = workers * AHEAD * load.batch // n
            outcome = server.phase(Phase((job,), seconds, clients=clients, warm=seconds / 2))
            if outcome.failed:
                raise RuntimeError(f"{load.model}: {outcome.failed} requests were refused or failed")
            found[n] = n * len(outcome.completed()), outcome.seconds
    return found


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
    for model, batch, n, workers in results.cases("model", "batch", "n", "workers"):
        case = {"model": model, "batch": batch, "workers": workers}
        ours, bare = results.values("served", **case, n=n), results.values("bare", **case)
        shown = (str(batch), str(n), str(workers), *(s.text() for s in map(spread, (ours, bare))), quotient(ours, bare))
        rows.append((model, *shown))
    header = ("model", "rows a batch", "images a request", "threads", "served, images/s", "bare loop", "ratio ↑")
    return {"overhead": table(header, rows)}


if __name__ == "__main__":
    import sys

    alone("overhead", sys.modules[__name__])
