"""Sampling: images per second of each family at batch 1, 16 and 64, against its naive loop in eager float32.

    python -m benchmarks.sampling [--minutes 15] [--quality]

Naive. Where a family draws pixel by pixel: a full forward pass for every pixel, extrapolated from a few, as their
costs are all alike (`benchmarks.cache`). Elsewhere: `init`, `step` … `step`, `image` over the batch as torch does by
itself, in one process, with one thread or with one for each core: whichever is faster.

Ours is what one machine draws when each core has a process of one thread, as the server's workers do: the sum over all
of them while all of them draw.

--quality: beside it FD-local of 1,000 samples in each mode, with what as many real images reach (it needs the data:
DRAWWELL_DATA or --data-dir).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks._frame import Bench, Results, alone, quotient
from benchmarks._page import table
from benchmarks.cache import FORWARDS
from benchmarks.cache import Model as PixelModel
from models import _checkpoint
from models._protocol import Draw, Model
from training.measure import draws

WEIGHT = 5.0
BATCHES = (1, 16, 64)
LEAST, MOST = 0.5, 20.0  # seconds of a window
SAMPLES = 1000
CORES = os.cpu_count() or 1

# How a model that was loaded is made ready to draw in a mode. What a mode is, the service says; float32 is as it is.
MODES: dict[str, Callable[[Model], Model]] = {"float32": lambda model: model}


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", help="names of folders in --models (default: all of them)")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    parser.add_argument("--quality", action="store_true", help="also FD-local of samples in each mode")
    parser.add_argument("--data-dir", type=Path, help="where the data lie (default: DRAWWELL_DATA)")


def run(bench: Bench, args: argparse.Namespace) -> None:
    names = args.checkpoints or sorted(path.parent.name for path in args.models.glob(f"*/{_checkpoint.ABOUT}"))
    if not names:
        raise SystemExit(f"{args.models}: no model there (a folder with a model.json)")
    batches = args.batch[:1] if bench.smallest else args.batch
    cases = [(name, batch) for name in names for batch in batches]
    seconds = 0.6 * bench.seconds if args.quality else bench.left
    window = bench.window(len(cases) * (2 + len(MODES)), LEAST, MOST, 5.0 * len(cases), good=1.0, seconds=seconds)
    for number, (name, batch) in bench.interleaved(cases, seconds):
        case = {"model": name, "batch": batch}
        model = _checkpoint.load(args.models / name)
        if number == 0:
            bench.record({"model": name}, 0, "steps", steps=model.spec.steps.default)
        speeds = {f"naive_{threads}": naive(model, batch, window, threads) for threads in sorted({1, CORES})}
        bench.record(case, number, "images/s", batch, **speeds, naive=max(speeds.values()))
        for mode in MODES:
            rate = every_core(args.models / name, mode, batch, window)
            bench.record({**case, "mode": mode}, number, "images/s", ours=rate)
    if args.quality:
        samples = 64 if bench.smallest else SAMPLES
        for name in names:
            for mode in MODES:
                found = quality(args.models / name, mode, samples, args.data_dir)
                bench.record({"model": name, "mode": mode}, 0, "squared distance", samples, **found)


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


def _repeated(work: Callable[[], object], seconds: float, least: int) -> tuple[int, float]:
    """How often it was done, and in how many seconds, after once to warm up."""
    work()
    times, began = 0, time.perf_counter()
    while times < least or time.perf_counter() - began < seconds:
        work()
        times += 1
    return times, time.perf_counter() - began


def every_core(folder: Path, mode: str, batch: int, seconds: float, cores: int = CORES) -> float:
    """Images per second, the sum of a process of one thread for each core, all at the same time."""
    context = multiprocessing.get_context("spawn")  # forked threads of torch hang
    start = context.Barrier(cores)
    ends = []
    for _ in range(cores):
        ours, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_draw, args=(folder, mode, batch, seconds, start, theirs))
        child.start()
        theirs.close()
        ends.append((child, ours))
    rates = []
    for child, ours in ends:
        with suppress(EOFError):  # it has failed; its exit status says so
            rates.append(float(ours.recv()))
        child.join()
    if any(child.exitcode for child, _ in ends):
        raise RuntimeError(f"{folder.name}: a process failed while it drew ({mode}, batch {batch})")
    return sum(rates)


def _draw(folder: Path, mode: str, batch: int, seconds: float, start: Any, end: Connection) -> None:
    torch.set_num_threads(1)
    model = MODES[mode](_checkpoint.load(folder))
    asked = draws(model.spec, batch, 1, ("a picture",))
    with torch.inference_mode():
        sampled(model, asked[:1])
        start.wait(timeout=300)
        times, took = _repeated(lambda: sampled(model, asked), seconds, 1)
    end.send(batch * times / took)


# -------------------------------------------------------------------------------------------------------------- quality


def quality(folder: Path, mode: str, samples: int, data_dir: Path | None) -> dict[str, float]:
    """FD-local of samples in a mode, and of as many real images, against as many training images."""
    from training import data as datasets
    from training.evaluate import matched
    from training.features import feature_space
    from training.measure import sample
    from training.quality import frechet_distance

    about = json.loads((folder / _checkpoint.ABOUT).read_text(encoding="utf-8"))
    data = datasets.load(about["data"]["name"], data_dir)
    space = feature_space(data)
    model = MODES[mode](_checkpoint.load(folder))
    asked = draws(model.spec, samples, 1, data.splits["test"].captions)
    drawn = sample(model, asked, batch=64)
    labels = np.array([draw.label for draw in asked])
    real, *others = (space.describe(data.splits["train"].x[i])[0] for i in matched(data.splits["train"], labels, 4))
    floor = [frechet_distance(real, other) for other in others]
    return {
        "fd_local": frechet_distance(real, space.describe(drawn)[0]),
        "fd_local_real": float(np.mean(floor)),
        "fd_local_real_spread": float(np.ptp(floor)),
    }


# ----------------------------------------------------------------------------------------------------------------- page


def page(results: Results) -> dict[str, str]:
    rows = []
    for name, batch, mode in results.cases("model", "batch", "mode"):
        case = {"model": name, "batch": batch}
        ours, slow = results.values("ours", **case, mode=mode), results.values("naive", **case)
        speeds = (results.text("ours", **case, mode=mode), results.text("naive", **case), quotient(ours, slow))
        rows.append((name, f"{results.values('steps', model=name)[0]:.0f}", str(batch), mode, *speeds))
    header = ("model", "steps", "batch", "mode", "images/s ↑", "naive", "speed-up ↑")
    parts = [table(header, rows)]
    quality_rows = [
        (name, mode, str(results.samples("fd_local", model=name, mode=mode)), *numbers)
        for name, mode in dict.fromkeys((n, m) for n, _, m in results.cases("model", "batch", "mode"))
        if (numbers := [results.text(m, model=name, mode=mode) for m in ("fd_local", "fd_local_real")])[0] != "–"
    ]
    if quality_rows:
        parts.append(table(("model", "mode", "samples", "FD-local ↓", "of real images"), quality_rows))
    return {"sampling": "\n".join(parts)}


if __name__ == "__main__":
    import sys

    alone("sampling", sys.modules[__name__])
