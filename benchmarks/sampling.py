"""Sampling: images per second of each family at batch 1, 16 and 64, against its naive loop in eager float32.

    python -m benchmarks.sampling [--minutes 15] [--quality]

Naive. Where a family draws pixel by pixel: a full forward pass for every pixel, extrapolated from a few, as their
costs are all alike (`benchmarks.cache`). Elsewhere: `init`, `step` … `step`, `image` over the batch as torch does by
itself. In one process, with one thread or with one for each core: whichever is faster.

Ours is what one machine draws when each core has a process of one thread, as the server's workers do: the sum over all
of them while all of them draw. The ways are those in which the server can run a network (`benchmarks._ways`).

--quality: beside it FD-local of 1,000 samples of each way, with what as many real images reach (it needs the data:
DRAWWELL_DATA or --data-dir).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
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
SAMPLES, QUALITY_BATCH = 1000, 50
STARTING = 6.0  # seconds, about, until processes have loaded torch and a model
CORES = os.cpu_count() or 1


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", help="names of folders in --models (default: all of them)")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to run the networks")
    parser.add_argument("--quality", action="store_true", help="also FD-local of samples drawn in each way")
    parser.add_argument("--data-dir", type=Path, help="where the data lie (default: DRAWWELL_DATA)")


def run(bench: Bench, args: argparse.Namespace) -> None:
    names = args.checkpoints or sorted(path.parent.name for path in args.models.glob(f"*/{_checkpoint.ABOUT}"))
    if not names:
        raise SystemExit(f"{args.models}: no model there (a folder with a model.json)")
    batches = args.batch[:1] if bench.smallest else args.batch
    ways = args.ways[:1] if bench.smallest else args.ways
    seconds = 0.6 * bench.seconds if args.quality else bench.left
    # Of each model and batch, two windows of the naive loop and one of each way; processes are started for each way.
    windows, starts = len(names) * len(batches) * (2 + len(ways)), len(names) * len(ways)
    window = bench.window(windows, LEAST, MOST, STARTING * starts, good=1.0, seconds=seconds)
    for number, name in bench.interleaved(names, seconds):
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
    if args.quality:
        samples = 64 if bench.smallest else SAMPLES
        for name, way in [(name, way) for name in names for way in ways]:
            found = quality(args.models / name, way, samples, args.data_dir)
            bench.record({"model": name, "way": way}, 0, "squared distance", samples, **found)


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


# -------------------------------------------------------------------------------------------------------------- quality


def quality(folder: Path, way: str, samples: int, data_dir: Path | None) -> dict[str, float]:
    """FD-local of samples drawn in a way, and of as many real images, against as many training images."""
    from training import data as datasets
    from training.evaluate import matched
    from training.features import feature_space
    from training.measure import sample
    from training.quality import frechet_distance

    about = json.loads((folder / _checkpoint.ABOUT).read_text(encoding="utf-8"))
    data = datasets.load(about["data"]["name"], data_dir)
    space = feature_space(data)
    model = prepared(folder, way, QUALITY_BATCH)
    asked = draws(model.spec, samples, 1, data.splits["test"].captions)
    drawn = sample(model, asked, QUALITY_BATCH)
    labels = np.array([draw.label for draw in asked])
    real, *others = (
        space.describe(data.splits["train"].x[i]).features for i in matched(data.splits["train"], labels, 4)
    )
    floor = [frechet_distance(real, other) for other in others]
    return {
        "fd_local": frechet_distance(real, space.describe(drawn).features),
        "fd_local_real": float(np.mean(floor)),
        "fd_local_real_spread": float(np.ptp(floor)),
    }


# ----------------------------------------------------------------------------------------------------------------- page


def page(results: Results) -> dict[str, str]:
    rows = []
    for name, batch, way in results.cases("model", "batch", "way"):
        case = {"model": name, "batch": batch}
        ours, slow = results.values("ours", **case, way=way), results.values("naive", **case)
        speeds = (results.text("ours", **case, way=way), results.text("naive", **case), quotient(ours, slow))
        steps = f"{results.values('steps', model=name)[0]:.0f}"
        rows.append((name, steps, str(batch), way, *speeds))
    parts = [table(("model", "steps", "batch", "way", "images/s ↑", "naive", "speed-up ↑"), rows)]
    found = [
        (name, way) for name, way in results.cases("model", "way") if results.values("fd_local", model=name, way=way)
    ]
    if found:
        numbers = ("fd_local", "fd_local_real", "fd_local_real_spread")
        quality_rows = [
            (
                name,
                way,
                str(results.samples("fd_local", model=name, way=way)),
                *(results.text(m, model=name, way=way) for m in numbers),
            )
            for name, way in found
        ]
        header = ("model", "way", "samples", "FD-local ↓", "of real images", "their least to most")
        parts.append(table(header, quality_rows))
    return {"sampling": "\n".join(parts)}


if __name__ == "__main__":
    alone("sampling", sys.modules[__name__])
