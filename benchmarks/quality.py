"""Quality: FD-local of samples drawn in each way in which a network can be run, beside what real images reach.

    python -m benchmarks.quality [--checkpoints NAME ...] [--ways WAY ...] [--data-dir DIR]

A faster way (`benchmarks.sampling`) is worth its speed where that is equal within the spread. Samples and real images
are as many, with the same labels, each compared with other real images of the training split: an unbiased comparison,
as the error of a Fréchet distance depends on how many it is taken of. Nothing here is about time: a busy machine gives
the same numbers.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from benchmarks._frame import Bench, Results, alone
from benchmarks._page import table
from benchmarks._ways import LOW, WAYS, NotApplicable, prepared
from models import _checkpoint
from training.measure import draws

WEIGHT = 4.0
CHECKPOINTS = ("fashion-mnist-ddpm", "fashion-mnist-gan")
DRAWN = ("float32", LOW, f"{LOW} compile")  # the other ways in float32 give the same 8-bit images, or are not chosen
SAMPLES, BATCH = 1000, 50


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS, help="names of folders in --models")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=DRAWN, help="ways to run the networks")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--data-dir", type=Path, help="where the data lie (default: DRAWWELL_DATA)")


def run(bench: Bench, args: argparse.Namespace) -> None:
    """However long it takes: fewer samples would be another measure."""
    samples, ways = (16, args.ways[:1]) if bench.smallest else (args.samples, args.ways)
    for name, way in [(name, way) for name in args.checkpoints for way in ways]:
        try:
            found = quality(args.models / name, way, samples, args.data_dir)
        except NotApplicable as e:
            print(f"benchmarks: {name}: {way}: {e}", file=sys.stderr)
            continue
        bench.record({"model": name, "way": way}, 0, "squared distance", samples, **found)
        print(f"benchmarks: {name}: {way}: {found}", flush=True)


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
    model = prepared(folder, way, BATCH)
    asked = draws(model.spec, samples, 1, data.splits["test"].captions)
    drawn = sample(model, asked, BATCH)
    labels = np.array([draw.label for draw in asked])
    real, *others = (space.describe(data.splits["train"].x[i])[0] for i in matched(data.splits["train"], labels, 4))
    described = space.describe(drawn)[0]
    found = [frechet_distance(other, described) for other in (real, *others)]
    floor = [frechet_distance(real, other) for other in others]
    return {
        "fd_local": float(np.mean(found)),
        "fd_local_spread": float(np.ptp(found)),
        "fd_local_real": float(np.mean(floor)),
        "fd_local_real_spread": float(np.ptp(floor)),
    }


def page(results: Results) -> dict[str, str]:
    numbers = ("fd_local", "fd_local_spread", "fd_local_real", "fd_local_real_spread")
    rows = [
        (
            name,
            way,
            f"{results.samples('fd_local', model=name, way=way):,}",
            *(results.text(number, model=name, way=way) for number in numbers),
        )
        for name, way in results.cases("model", "way")
    ]
    header = ("model", "way", "samples", "FD-local ↓", "its least to most", "of real images", "their least to most")
    return {"quality": table(header, rows)}


if __name__ == "__main__":
    alone("quality", sys.modules[__name__])
