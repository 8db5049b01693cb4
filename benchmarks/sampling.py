"""Sampling: images per second of each family at batch 1, 16 and 64, against its naive loop in eager float32.

    python -m benchmarks.sampling [--minutes 15]

Naive. Where a family draws pixel by pixel: a full forward pass for every pixel, extrapolated from a few, as their
costs are all alike (`benchmarks.cache`). Elsewhere: `init`, `step` … `step`, `image` over the batch as torch does by
itself. In one process, with one thread or with one for each core: whichever is faster.

Ours is what one machine draws when each core has a process of one thread, as the server's workers do: the sum over all
of them while all of them draw. The ways are those in which the server can run a network (`benchmarks._ways`).

That they draw as well is for `benchmarks.quality` to show.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks._frame import Bench, Results, alone, quotient, turned
from benchmarks._page import table
from benchmarks._ways import WAYS, NotApplicable, prepared
from benchmarks.cache import FORWARDS
from benchmarks.cache import Model as PixelModel
from models import _checkpoint
from models._protocol import Draw, Model
from training.measure import draws

WEIGHT = 5.0
BATCHES = (1, 16, 64)
LEAST, MOST = 0.5, 20.0  # seconds of a window
STARTING = 6.0  # seconds, about, until processes have loaded torch and a model
CORES = os.cpu_count() or 1


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", help="names of folders in --models (default: all of them)")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to run the networks")


def run(bench: Bench, args: argparse.Namespace) -> None:
    names = args.checkpoints or sorted(path.parent.name for path in args.models.glob(f"*/{_checkpoint.ABOUT}"))
    if not names:
        raise SystemExit(f"{args.models}: no model there (a folder with a model.json)")
    batches = args.batch[:1] if bench.smallest else args.batch
    ways = args.ways[:1] if bench.smallest else args.ways
    # Of each model and batch, two windows of the naive loop and one of each way; processes are started for each way.
    windows, starts = len(names) * len(batches) * (2 + len(ways)), len(names) * len(ways)
    window = bench.window(windows, LEAST, MOST, STARTING * starts, good=1.0)
    for number, name in bench.interleaved(names):
        folder = args.models / name
        model = _checkpoint.load(folder)
        bench.record({"model": name}, number, "steps", steps=model.spec.steps.default)
        for batch in batches:
            speeds = {f"naive_{threads}": naive(model, batch, window, threads) for threads in sorted({1, CORES})}
            bench.record({"model": name, "batch": batch}, number, "images/s", batch, **speeds)
            bench.record({"model": name, "batch": batch}, number, "images/s", batch, naive=max(speeds.values()))
        for way in turned(ways, number):
            for batch, rate in every_core(folder, way, batches, window).items():
                bench.record({"model": name, "batch": batch, "way": way}, number, "images/s", batch, ours=rate)


# ---------------------------------------------------------------------------------------------------------------- speed


def sampled(model: Model, asked: Sequence[Draw]) -> None:
    rows: Any = model.init(asked)
    while int(rows.left.max()) > 0:
        rows = model.step(rows)
    model.image(rows)


@torch.inference_mode()
def naive(model: Model, batch: int, seconds: float, threads: int) -> float:
    """Images per second of the naive sampler: of a pixel model by the part of a batch that a full forward pass makes;
    else of whole batches, at least one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        if isinstance(model, PixelModel):
            asked = draws(model.spec, batch, 1, ("a picture",))
            labels = torch.tensor([draw.label for draw in asked])
            x = torch.randint(0, 256, (batch, *model.spec.image.shape)) / 255
            passes, took = _repeated(lambda: model.logits(x, labels), seconds, FORWARDS)
            return batch * passes / model.spec.image.dims / took
        asked = draws(model.spec, batch, 1, ("a picture",))
        times, took = _repeated(lambda: sampled(model, asked), seconds, 1)
        return batch * times / took
    finally:
        torch.set_num_threads(before)


def _repeated(work: Callable[[], object], seconds: float, least: int = 1) -> tuple[int, float]:
    """How often it was done, and in how many seconds. The first time is slower, and counts only where it is long."""
    began = time.perf_counter()
    work()
    if least == 1 and (took := time.perf_counter() - began) >= seconds:
        return 1, took
    times, began = 0, time.perf_counter()
    while times < least or time.perf_counter() - began < seconds:
        work()
        times += 1
    return times, time.perf_counter() - began


def every_core(folder: Path, way: str, batches: Sequence[int], seconds: float) -> dict[int, float]:
    """{batch: images per second}, the sum of a process of one thread for each core, all at the same time; none where
    the model cannot be run in that way."""
    context = multiprocessing.get_context("spawn")  # forked threads of torch hang
    start, answers = context.Barrier(CORES), context.SimpleQueue()
    arguments = (folder, way, tuple(batches), seconds, start, answers)
    children = [context.Process(target=_draw, args=arguments) for _ in range(CORES)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    if any(child.exitcode for child in children):
        raise RuntimeError(f"{folder.name}: a process failed while it drew ({way})")
    rates: dict[int, float] = {}
    while not answers.empty():
        for batch, rate in answers.get().items():
            rates[batch] = rates.get(batch, 0.0) + rate
    return rates


def _draw(folder: Path, way: str, batches: Sequence[int], seconds: float, start: Any, answers: Any) -> None:
    torch.set_num_threads(1)
    rates = {}
    for batch in batches:
        try:
            model = prepared(folder, way, batch)
        except NotApplicable as e:
            print(f"benchmarks: {folder.name}: {way}: {e}", file=sys.stderr)
            break
        asked = draws(model.spec, batch, 1, ("a picture",))
        with torch.inference_mode():
            start.wait(timeout=600)
            times, took = _repeated(partial(sampled, model, asked), seconds)
        rates[batch] = batch * times / took
    answers.put(rates)


# ----------------------------------------------------------------------------------------------------------------- page


def page(results: Results) -> dict[str, str]:
    rows = []
    for name, batch, way in results.cases("model", "batch", "way"):
        case = {"model": name, "batch": batch}
        ours, slow = results.values("ours", **case, way=way), results.values("naive", **case)
        speeds = (results.text("ours", **case, way=way), results.text("naive", **case), quotient(ours, slow))
        steps = f"{results.values('steps', model=name)[0]:.0f}"
        rows.append((name, steps, str(batch), way, *speeds))
    return {"sampling": table(("model", "steps", "batch", "way", "images/s ↑", "naive", "speed-up ↑"), rows)}


if __name__ == "__main__":
    alone("sampling", sys.modules[__name__])
