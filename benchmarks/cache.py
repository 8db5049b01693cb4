"""What the caches of families that draw pixel by pixel save, and that they change nothing: cached sampling against a
full forward pass a pixel.

    python -m benchmarks.cache [--minutes 10] [--checkpoints NAME ...] [--batch 1 16] [--agreement 0]

Speed. Both are measured in turns, one thread, float32: a round is one batch of images drawn with the caches, all
H·W ticks of it, and then FORWARDS full forward passes of the same batch. The naive sampler's time is that of a pass
times H·W·C: extrapolated, since its passes are all alike. What else it would do (draw from the logits) is left out, in
its favour. Times are of the thread's processor, so that other work on the machine counts little.

Steps are taken in C where there is a compiler (`models._native`), and in tensor operations, as where there is none.

Agreement, on that many images drawn in batches of CROWD. Naive: given the pixels before it, would a full forward pass
have drawn another level for a pixel? Alone: is an image that is drawn alone another one?

A family of which no checkpoint is there is measured untrained, with its default network: the work is the same.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import models
from benchmarks._frame import Bench, Results, alone
from benchmarks._page import table
from models import _checkpoint, _native, pixel_transformer, pixelcnn
from models._codes import choose
from models._protocol import UNLABELLED, Draw, ImageSpace

Model = pixelcnn.Model | pixel_transformer.Model
WEIGHT = 3.0
CHECKPOINTS = ("fashion-mnist-pixelcnn", "fashion-mnist-pixel-transformer")
FAMILIES = ("pixelcnn", "pixel_transformer")  # the families of these
FORWARDS = 4  # full forward passes measured in a round
CROWD = 64  # images drawn together where agreement is measured


@dataclass(frozen=True)
class Seconds:
    """Of the thread's processor, and on the wall."""

    cpu: float
    wall: float


def compare(model: Model, batch: int) -> tuple[Seconds, Seconds]:
    """Seconds of a whole batch of images drawn with the caches, and of one full forward pass over such a batch."""
    requests = _requests(model, batch)
    labels = torch.tensor([request.label for request in requests])
    x = torch.randint(0, 256, (batch, *model.spec.image.shape)) / 255

    def cached() -> None:
        _sample(model, requests)

    def forwards() -> None:
        for _ in range(FORWARDS):
            model.logits(x, labels)

    with torch.inference_mode():
        return _seconds(cached), _seconds(forwards, FORWARDS)


@torch.inference_mode()
def agreement(model: Model, images: int) -> tuple[int, int]:
    """How many pixels the naive sampler would have drawn otherwise, and how many images are others when alone."""
    pixels, others = 0, 0
    for start in range(0, images, CROWD):
        requests = _requests(model, images)[start : start + CROWD]
        crowd, rows = _sample(model, requests)
        drawn = (crowd * (model.config.levels - 1)).round().long().permute(0, 2, 3, 1).flatten(1, 2)  # (B, H·W, C)
        for i, request in enumerate(requests):
            logits = model.logits(crowd[i : i + 1], rows.label[i : i + 1])[0].permute(1, 2, 0, 3).flatten(0, 2)
            temperature, any_level = rows.temperature[i].expand(len(logits), 1), torch.tensor(logits.shape[1])
            naive = choose(logits, rows.uniforms[i].view(-1, 1), temperature, any_level.expand(len(logits)))
            pixels += int((naive.view_as(drawn[i]) != drawn[i]).any(dim=1).sum())
            others += int(not torch.equal(_sample(model, [request])[0][0], crowd[i]))
    return pixels, others


def _sample(model: Model, requests: list[Draw]) -> tuple[Tensor, Any]:
    rows: Any = model.init(requests)
    for _ in range(model.spec.steps.default):
        rows = model.step(rows)
    return model.image(rows), rows


def _requests(model: Model, n: int) -> list[Draw]:
    """As many as asked, of every label in turn."""
    steps, classes = model.spec.steps.default, model.spec.image.classes
    return [Draw(seed=1, sample=i, steps=steps, label=i % classes if classes else UNLABELLED) for i in range(n)]


def _seconds(work: Callable[[], None], times: int = 1) -> Seconds:
    cpu, wall = time.thread_time(), time.perf_counter()
    work()
    return Seconds((time.thread_time() - cpu) / times, (time.perf_counter() - wall) / times)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--checkpoints", nargs="+", default=CHECKPOINTS, help="names of folders in --models")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument(
        "--agreement", type=int, default=0, metavar="IMAGES", help="drawn to compare the samplers' images"
    )


def run(bench: Bench, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    loaded = {name: _model(args.models / name) for name in args.checkpoints}
    batches = args.batch[:1] if bench.smallest else args.batch
    if not bench.smallest:
        for model in loaded.values():  # a first batch of anything is slower
            compare(model, min(batches))
    cases = [(name, batch, native) for name in loaded for batch in batches for native in (True, False)]
    for number, (name, batch, native) in bench.interleaved(cases):
        model = loaded[name]
        with steps_in_c(native):
            cached, forward = compare(model, batch)
        about = {"model": name, "family": model.spec.family, "trained": (args.models / name).exists()}
        case = {**about, "batch": batch, "in_c": native}
        bench.record(case, number, "s", batch, cached=cached.cpu, cached_wall=cached.wall, forward=forward.cpu)
        bench.record(case, number, "images/s", batch, speed=batch / cached.cpu)
        bench.record(case, number, "ratio", speed_up=model.spec.image.dims * forward.cpu / cached.cpu)
    for name, model in loaded.items():
        if args.agreement:
            pixels, others = agreement(model, args.agreement)
            bench.record({"model": name}, 0, "pixels", args.agreement, drawn_otherwise=pixels)
            bench.record({"model": name}, 0, "images", args.agreement, other_alone=others)


@contextmanager
def steps_in_c(wanted: bool) -> Iterator[None]:
    """Whether families may take their steps so."""
    before = os.environ.get("DRAWWELL_NATIVE")
    if not wanted:
        os.environ["DRAWWELL_NATIVE"] = "0"
    _native.library.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("DRAWWELL_NATIVE", None)
        if before is not None:
            os.environ["DRAWWELL_NATIVE"] = before
        _native.library.cache_clear()


def page(results: Results) -> dict[str, str]:
    rows = []
    for name, batch, in_c, trained in sorted(results.cases("model", "batch", "in_c", "trained"), key=lambda c: c[0]):
        case = {"model": name, "batch": batch, "in_c": in_c}
        numbers = (
            results.text("cached", **case),
            results.text("speed", **case),
            results.text("forward", 1000, **case),
            results.text("speed_up", **case),
        )
        steps = "C" if in_c else "tensor operations"
        rows.append((name if trained else f"{name} (untrained)", str(batch), steps, *numbers))
    header = (
        "model",
        "batch",
        "steps in",
        "cached, s a batch",
        "images/s",
        "a full forward, ms",
        "speed-up over naive ↑",
    )
    lines = [
        f"{name}: of {results.samples('drawn_otherwise', model=name)} images, the naive sampler draws "
        f"{results.text('drawn_otherwise', model=name)} pixels otherwise, and "
        f"{results.text('other_alone', model=name)} are others alone than in a batch of {CROWD}.\n"
        for name, _, _ in results.cases("model", "batch", "trained")
        if results.values("drawn_otherwise", model=name)
    ]
    return {"cache": table(header, rows) + "".join(f"\n{line}" for line in dict.fromkeys(lines))}


def _model(folder: Path) -> Model:
    if (folder / _checkpoint.ABOUT).exists():
        model = _checkpoint.load(folder)
    else:
        family = next((f for f in FAMILIES if folder.name.endswith(f.replace("_", "-"))), None)
        if family is None:
            raise SystemExit(f"{folder}: no checkpoint, nor named after one of {', '.join(FAMILIES)}")
        torch.manual_seed(0)
        space, module = ImageSpace(width=28, height=28, channels=1, labels=tuple("0123456789")), models.family(family)
        model = module.Model(module.Config(), space).eval()
    if not isinstance(model, Model):
        raise SystemExit(f"{folder}: a {model.spec.family}, not one of {', '.join(FAMILIES)}")
    return model


if __name__ == "__main__":
    import sys

    alone("cache", sys.modules[__name__])
