"""What several workers and several tenants get: twice the images from two workers, and an answer in time beside a
flood.

    python -m benchmarks.pool [--minutes 5]

Workers: one and two of one thread each, each in a server of its own, closed loop with full batches, in turns. Tenants:
on one worker, one who asks for an image now and then (open loop), first alone, then while another keeps FLOOD requests
for many images going; the flood begins once the first has been measured, so both have asked of late.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor

from benchmarks._frame import Bench, Results, alone, quotient
from benchmarks._load import Job, Phase
from benchmarks._page import table
from benchmarks._servers import STARTING, Running, drawwell, running, subset

WEIGHT = 1.5
CLIENTS = 64  # for each worker: a full batch
FLOOD = 32  # requests of the flood that wait at any time,
IMAGES, FLOOD_STEPS = 16, 50  # for so many images of so many steps each
RATE = 0.5  # requests a second of the other: far from what a worker can do
LEAST, MOST = 2.0, 120.0  # seconds of a window


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="fashion-mnist-ddpm")
    parser.add_argument("--steps", type=int, default=20, help="of an image")


def run(bench: Bench, args: argparse.Namespace) -> None:
    request = Job("image", {"model": args.model, "n": 1, "steps": args.steps, "seed": 0})
    # A round: one and two workers with half a window to warm up, a tenant alone, and beside the flood.
    seconds = bench.window(1.5 * 2 + 2.5, LEAST, MOST, fixed=3 * STARTING)
    with subset(args.models, args.model) as folder:
        for number, what in bench.interleaved(["workers 1", "workers 2", "tenants"]):
            devices = "cpu,cpu" if what == "workers 2" else "cpu"
            with running(drawwell(folder, devices), request) as server:
                if what == "tenants":
                    _tenants(bench, number, server, request, seconds)
                    continue
                workers = int(what[-1])
                phase = Phase((request,), seconds, clients=CLIENTS * workers, warm=seconds / 2)
                found = server.phase(phase)
                images = len(found.completed())
                bench.record({"workers": workers}, number, "images/s", images, speed=images / found.seconds)


def _tenants(bench: Bench, number: int, server: Running, request: Job, seconds: float) -> None:
    quiet = Job("quiet", request.body, tenant="quiet")
    flood = Job("flood", {**request.body, "n": IMAGES, "steps": FLOOD_STEPS}, tenant="flood", accept="application/json")
    phase = Phase((quiet,), seconds, rate=RATE, seed=number)
    with ThreadPoolExecutor(1) as beside:
        for case in ("alone", "beside a flood"):
            if case != "alone":
                flooding = beside.submit(server.phase, Phase((flood,), seconds, clients=FLOOD, warm=1.0))
            found = server.phase(phase)
            cuts = {f"p{q}": found.latency(q) for q in (50, 95)}
            bench.record({"tenant": case}, number, "s", len(found.of()), **cuts)
        flooded = flooding.result()
        bench.record({"tenant": "the flood"}, number, "images/s", speed=flooded.capacity * IMAGES)


def page(results: Results) -> dict[str, str]:
    speeds = {n: results.values("speed", workers=n) for (n,) in results.cases("workers")}
    rows = [(str(n), results.text("speed", workers=n), quotient(speeds[n], speeds[1])) for n in speeds]
    cases = [name for (name,) in results.cases("tenant") if name != "the flood"]
    quiet = results.values("p95", tenant="alone")
    lines = [
        (
            name,
            *(results.text(p, tenant=name) for p in ("p50", "p95")),
            quotient(results.values("p95", tenant=name), quiet),
        )
        for name in cases
    ]
    header = ("a tenant who asks now and then", "p50, s ↓", "p95, s ↓", "p95, times that alone ↓")
    return {"pool": table(("workers", "images/s ↑", "times one worker ↑"), rows) + "\n" + table(header, lines)}


if __name__ == "__main__":
    import sys

    alone("pool", sys.modules[__name__])
