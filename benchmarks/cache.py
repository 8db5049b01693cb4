"""What the caches of families that draw pixel by pixel save, and that they change nothing: cached sampling against a
full forward pass a pixel.

    python -m benchmarks.cache [--checkpoint FOLDER | --family NAME] [--batch 1 16] [--rounds 5] [--agreement 0]

Speed. Both are measured in turns, one thread, float32: a round is one batch of images drawn with the caches, all
H·W ticks of it, and then FORWARDS full forward passes of the same batch. The naive sampler's time is that of a pass
times H·W·C: extrapolated, since its passes are all alike. What else it would do (draw from the logits) is left out, in
its favour. Times are of the thread's processor, so that other work on the machine counts little. Reported are medians
over the rounds, with the least and the most.

Agreement, on that many images drawn in batches of CROWD. Naive: given the pixels before it, would a full forward pass
have drawn another level for a pixel? Alone: is an image that is drawn alone another one?

Without a checkpoint the network is the family's default one with untrained weights: the work is the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import models
from models import _checkpoint, pixel_transformer, pixelcnn
from models._codes import choose
from models._protocol import UNLABELLED, Draw, ImageSpace

Model = pixelcnn.Model | pixel_transformer.Model
FAMILIES = ("pixelcnn", "pixel_transformer")
FORWARDS = 4  # full forward passes measured in a round
CROWD = 64  # images drawn together where agreement is measured


@dataclass(frozen=True)
class Seconds:
    """Of the thread's processor, and on the wall."""

    cpu: float
    wall: float


@dataclass(frozen=True)
class Comparison:
    """One batch size: each a list over the rounds."""

    batch: int
    cached: list[Seconds]  # for a whole batch of images
    forward: list[Seconds]  # for a full forward pass
    passes: int  # that a naive sampler needs: H·W·C

    @property
    def speedups(self) -> list[float]:
        """Naive over cached time of each round."""
        return [self.passes * f.cpu / c.cpu for f, c in zip(self.forward, self.cached, strict=True)]


def compare(model: Model, batch: int, rounds: int) -> Comparison:
    """Measure both samplers in turns, after a round to warm up that is not counted."""
    space = model.spec.image
    requests = _requests(model, batch)
    labels = torch.tensor([request.label for request in requests])
    x = torch.randint(0, 256, (batch, *space.shape)) / 255

    def cached() -> None:
        _sample(model, requests)

    def forwards() -> None:
        for _ in range(FORWARDS):
            model.logits(x, labels)

    with torch.inference_mode():
        pairs = [(_seconds(cached), _seconds(forwards, FORWARDS)) for _ in range(rounds + 1)][1:]
    return Comparison(batch, [c for c, _ in pairs], [f for _, f in pairs], space.dims)


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


def _spread(values: list[float], digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} – {max(values):.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cache", description=__doc__.split(":")[0])
    parser.add_argument("--checkpoint", type=Path, help="a trained model (default: 28×28 grey, untrained)")
    parser.add_argument("--family", choices=FAMILIES, default="pixelcnn", help="of the untrained model")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--agreement", type=int, default=0, metavar="IMAGES", help="drawn to compare the samplers' images"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = _model(args.checkpoint, args.family)
    image, millions = model.spec.image, sum(p.numel() for p in model.parameters()) / 1e6
    table = Table(
        *("batch", "cached, s a batch", "images/s", "full forward, ms", "naive, s (extrapolated)", "speed-up, ×"),
        title=f"{model.spec.family}: {image.width}×{image.height}×{image.channels}, {millions:.2f} M parameters; "
        f"CPU time of one thread: median (least – most) of {args.rounds} rounds",
    )
    for batch in args.batch:
        result = compare(model, batch, args.rounds)
        cached, forward = [s.cpu for s in result.cached], [s.cpu for s in result.forward]
        table.add_row(
            str(batch),
            _spread(cached, 3),
            f"{batch / statistics.median(cached):.1f}",
            _spread([1000 * f for f in forward], 1),
            f"{result.passes * statistics.median(forward):.1f}",
            _spread(result.speedups, 0),
        )
    console = Console(width=140)
    console.print(table)
    if args.agreement:
        pixels, others = agreement(model, args.agreement)
        console.print(
            f"the naive sampler draws {pixels} of {args.agreement * image.width * image.height} pixels otherwise; "
            f"{others} of {args.agreement} images are others alone than in a batch of {CROWD}"
        )


def _model(checkpoint: Path | None, family: str) -> Model:
    if checkpoint is None:
        torch.manual_seed(0)
        space, module = ImageSpace(width=28, height=28, channels=1, labels=tuple("0123456789")), models.family(family)
        model = module.Model(module.Config(), space).eval()
    else:
        model = _checkpoint.load(checkpoint, torch.device("cpu"))
    if not isinstance(model, Model):
        raise SystemExit(f"{checkpoint}: a {model.spec.family}, not one of {', '.join(FAMILIES)}")
    return model


if __name__ == "__main__":
    main()
