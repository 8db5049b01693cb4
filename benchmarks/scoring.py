"""Scoring: what `/score` does per second and how long it takes, against the bare forward pass; and whether a burst of
one kind of work makes the other wait.

    python -m benchmarks.scoring [--minutes 10]

Speed. Requests of 1, 16 and 64 images, of a flow and of a pixel model, both calibrated, so that answers have verdicts.
Bare: `log_prob` over the same batch in one process with one thread. Served: a server with one worker of one thread; so
many clients that three batches are asked for, and then a single one, for the latency.

Fairness. Short requests of the one kind arrive at random, at a third of what the server can do; first it is quiet
besides, then a burst of BURST images of the other kind is sent at the same time. Of what came while the burst lasted,
the latency is told with its ratio to the quiet one. A burst that lasts longer than the window is hung up on.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
import time

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from benchmarks._frame import Bench, Results, alone, percentile, quotient
from benchmarks._load import Job, Outcome, Phase, begin, finish
from benchmarks._page import table
from benchmarks._servers import Running, drawwell, running, subset
from models import _checkpoint
from models._protocol import Density, unlabelled

WEIGHT = 3.0
FLOW, PIXEL, DDPM = "fashion-mnist-glow", "fashion-mnist-pixelcnn", "fashion-mnist-ddpm"
BATCHES = (1, 16, 64)
AHEAD = 3  # batches that are asked for at any time
BURST = 10_000  # images
IMAGES_A_REQUEST = 64
LOAD = 1 / 3  # of what the server can do, of the short requests beside a burst
BURST_SECONDS = 600.0  # after which a burst is hung up on in any case
LEAST, MOST = 1.0, 60.0  # seconds of a window


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--flow", default=FLOW, help="name of a flow in --models")
    parser.add_argument("--pixel", default=PIXEL, help="name of an autoregressive model in --models")
    parser.add_argument("--burst", type=int, default=BURST, help="images of a burst")


def run(bench: Bench, args: argparse.Namespace) -> None:
    models = (args.flow, args.pixel)
    batches = BATCHES[:1] if bench.smallest else BATCHES
    burst = min(args.burst, IMAGES_A_REQUEST) if bench.smallest else args.burst
    sides = ("generate", "score")
    # A round takes, of each model and batch, a bare window, a served one with half of it to warm up, and half of one
    # for the latency; of each side, half a window to find the rate, a quiet and a busy one.
    window = bench.window(3 * len(models) * len(batches) + 3 * len(sides), LEAST, MOST)
    torch.set_num_threads(1)
    with subset(args.models, *models, DDPM) as folder:
        loaded = {name: _checkpoint.load(folder / name) for name in models}
        pictures = {name: _pictures(model.spec.image.shape) for name, model in loaded.items()}
        ready = [score_job(name, images[:1]) for name, images in pictures.items()]
        with running(drawwell(folder, "cpu"), *ready, _short()) as server:
            for number, what in bench.interleaved([(m, b) for m in models for b in batches] + list(sides)):
                if isinstance(what, tuple):
                    name, batch = what
                    case, images = {"model": name, "batch": batch}, pictures[name][:batch]
                    model = loaded[name]
                    assert isinstance(model, Density), f"{name}: no density"
                    count, took = bare(model, images, window)
                    bench.record(case, number, "images/s", count, bare=count / took)
                    _served(bench, case, number, server, score_job(name, images), window)
                else:
                    heavy = score_job(args.pixel, pictures[args.pixel]) if what == "generate" else _heavy()
                    light = _short() if what == "generate" else score_job(args.pixel, pictures[args.pixel][:1])
                    _fairness(bench, what, number, server, light, heavy, burst, window)


# ---------------------------------------------------------------------------------------------------------------- speed


def bare(model: Density, images: NDArray[np.uint8], seconds: float) -> tuple[int, float]:
    """Images scored by a loop over `log_prob`, and in how many seconds; at least a batch."""
    x = torch.from_numpy(images).float() / 255
    with torch.inference_mode():
        model.log_prob(x, unlabelled(x))  # warms up
        count, began = 0, time.perf_counter()
        while count == 0 or time.perf_counter() - began < seconds:
            model.log_prob(x, unlabelled(x))
            count += len(x)
    return count, time.perf_counter() - began


def _served(bench: Bench, case: dict[str, str | int], number: int, server: Running, job: Job, window: float) -> None:
    outcome = server.phase(Phase((job,), window, clients=AHEAD, warm=window / 2))
    if outcome.failed:
        raise RuntimeError(f"{job.name}: {outcome.failed} requests were refused or failed")
    bench.record(case, number, "images/s", len(outcome.completed()), served=outcome.work_rate)
    outcome = server.phase(Phase((job,), window / 2))
    bench.record(case, number, "s", len(outcome.of()), p50=outcome.latency(50), p95=outcome.latency(95))


# ------------------------------------------------------------------------------------------------------------- fairness


def _fairness(
    bench: Bench, side: str, number: int, server: Running, light: Job, heavy: Job, burst: int, window: float
) -> None:
    """The light requests' latencies, quiet and beside a burst of the heavy ones."""
    rate = LOAD * max(server.phase(Phase((light,), window / 2, clients=16)).capacity, 4 / window)
    arrivals = Phase((light,), window, rate=rate, drain=max(4 * window, 30.0), seed=number)
    quiet = server.phase(arrivals)
    requests = burst // IMAGES_A_REQUEST
    sent = begin(server.url, Phase((heavy,), 1.0, rate=requests, burst=True, drain=BURST_SECONDS))
    try:
        busy = server.phase(arrivals)
        took = math.inf
        if sent.poll() is not None:
            whole = finish(sent)
            if whole.failed:
                raise RuntimeError(f"{heavy.name}: {whole.failed} requests of the burst were refused or failed")
            took = whole.end
    finally:
        sent.kill()  # what is left is hung up on
        sent.wait()
    for beside, outcome, until in (("nothing", quiet, math.inf), ("a burst", busy, took)):
        waits = during(outcome, until)
        if waits:
            latencies = {f"p{q}": percentile(waits, q) for q in (50, 95)}
            bench.record({"side": side, "beside": beside}, number, "s", len(waits), **latencies)
    bench.record({"side": side}, number, "s", burst_lasted=took)


def during(outcome: Outcome, until: float) -> list[float]:
    """Latencies of what was due before then."""
    pairs = zip(outcome.of(), outcome.latencies(), strict=True)
    return [latency for answer, latency in pairs if answer.due < until]


# ------------------------------------------------------------------------------------------------------------- requests


def _short() -> Job:
    return Job("generate", {"model": DDPM, "n": 1, "steps": 10, "seed": 0})


def _heavy() -> Job:
    return Job("generate", {"model": DDPM, "n": IMAGES_A_REQUEST, "steps": 10, "seed": 0})


def score_job(name: str, images: NDArray[np.uint8]) -> Job:
    body = {"model": name, "images": [_png(image) for image in images]}
    return Job(f"score {name}", body, work=len(images), path="/score", accept="application/json")


def _pictures(shape: tuple[int, int, int]) -> NDArray[np.uint8]:
    """64 images of smooth shapes on black: what a score costs does not depend on what is in them."""
    c, h, w = shape
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:h, 0:w] / max(h, w)
    centre, width = rng.uniform(0.3, 0.7, (64, 2, 1, 1)), rng.uniform(0.05, 0.3, (64, 1, 1))
    disc = np.exp(-((y - centre[:, 0]) ** 2 + (x - centre[:, 1]) ** 2) / (2 * width**2))  # (64, H, W)
    return np.repeat((255 * disc).round().astype(np.uint8)[:, None], c, axis=1)


def _png(image: NDArray[np.uint8]) -> str:
    pixels = image.transpose(1, 2, 0)
    out = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(out, "png")
    return base64.b64encode(out.getvalue()).decode()


# ----------------------------------------------------------------------------------------------------------------- page


def page(results: Results) -> dict[str, str]:
    rows = []
    for name, batch in results.cases("model", "batch"):
        case = {"model": name, "batch": batch}
        ratio = quotient(results.values("served", **case), results.values("bare", **case))
        speeds = (results.text("served", **case), results.text("bare", **case), ratio)
        rows.append((name, str(batch), *speeds, results.text("p50", 1000, **case), results.text("p95", 1000, **case)))
    header = ("model", "images a request", "served, images/s", "bare", "ratio ↑", "p50 alone, ms ↓", "p95 ↓")
    fair = []
    for (side,) in results.cases("side"):
        quiet, busy = ({"side": side, "beside": beside} for beside in ("nothing", "a burst"))
        ratio = quotient(results.values("p95", **busy), results.values("p95", **quiet))
        other = "score" if side == "generate" else "generate"
        fair.append((f"/{side}", f"/{other}", *(results.text("p95", 1000, **c) for c in (quiet, busy)), ratio))
    names = ("short requests to", "burst to", "p95 quiet, ms ↓", "p95 beside the burst, ms ↓", "ratio ↓")
    return {"scoring": f"{table(header, rows)}\n{table(names, fair)}"}


if __name__ == "__main__":
    import sys

    alone("scoring", sys.modules[__name__])
