"""A tiny family and data set for tests of the training loop. As a script, `OUT DEVICES STEPS NOISE`, it trains itself.

Two groups, a convolution and a linear layer on top of it, whose losses both depend on both: what a loop can mix up, it
can mix up here.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import _protocol
from models._protocol import Batch, Draw, ImageSpace, Rows, Spec, Steps
from training.config import AdamW, Run
from training.data import Dataset, Split

SPACE = ImageSpace(width=6, height=5, channels=2, labels=("a", "b", "c"))
SIZE = 48  # images to train on


@dataclass(frozen=True)
class Config:
    noise: float = 0.1
    width: int = 3


class Model(_protocol.Model):
    fixed: Tensor
    chain: Tensor
    seen: Tensor
    prepared: Tensor

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        self.config = config
        self.spec = Spec(family="toy", image=space, steps=Steps(unit="pass"))
        self.conv = nn.Conv2d(space.channels, config.width, 3, padding=1)
        self.linear = nn.Linear(config.width * space.height * space.width, space.classes)
        self.unused = nn.Parameter(torch.ones(2))
        self.register_buffer("chain", torch.zeros(4))
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("prepared", torch.zeros((), dtype=torch.int64))
        self.register_buffer("fixed", torch.arange(3.0), persistent=False)

    def prepare(self, batches: Iterable[Batch]) -> None:
        self.prepared += sum(len(batch.x) for batch in batches)
        self.conv.bias.uniform_()  # type: ignore[union-attr]

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"conv": [*self.conv.parameters(), self.unused], "linear": list(self.linear.parameters())}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        yield from objective(self, batch)

    def logits(self, batch: Batch) -> Tensor:
        x = batch.x + self.config.noise * torch.randn_like(batch.x)
        h = F.dropout(F.silu(self.conv(x)), p=min(self.config.noise, 0.5), training=self.training)
        out: Tensor = self.linear(h.flatten(1)).float()
        return out

    def init(self, draws: Sequence[Draw]) -> Rows:
        raise NotImplementedError

    def step(self, rows: Any) -> Rows:
        raise NotImplementedError

    def image(self, rows: Any) -> Tensor:
        raise NotImplementedError


def two_losses(model: Model, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
    """The linear layer learns the labels, then the convolution learns against it; a chain and a counter move along."""
    with torch.no_grad():
        model.chain += model.config.noise * torch.randn(4, device=model.chain.device)
        model.seen += 1
    loss = F.cross_entropy(model.logits(batch), batch.labels)
    yield "linear", loss, {"accuracy": loss.detach().exp().reciprocal()}
    yield "conv", -F.cross_entropy(model.logits(batch), batch.labels), {}


# What a model's objective is: tests put others in its place.
objective: Callable[[Model, Batch], Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]] = two_losses


def dataset(name: str = "toy") -> Dataset:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(0, 256, (SIZE, *SPACE.shape), dtype=np.uint8), rng.integers(0, SPACE.classes, SIZE))
    return Dataset(name, SPACE, {"train": split}, digest="of toys")


def toy_run(**changes: Any) -> Run:
    settings: dict[str, Any] = {
        "family": "toy",
        "config": Config(),
        "data": "toy",
        "steps": 20,
        "batch_size": 8,
        "optimisers": {"conv": AdamW(lr=2e-2, weight_decay=0.1), "linear": AdamW(lr=1e-2)},
        "ema": 0.9,
        "warmup": 4,
        "precision": "fp32",
        "checkpoint_every": 10,
    }
    return Run(**(settings | changes))


def main(out: Path, devices: int, steps: int, noise: float) -> None:
    """Each device leaves its own weights in `out`, beside what the loop writes."""
    from lightning_fabric import Fabric
    from rich.console import Console
    from safetensors.torch import save_file

    import models
    from training import loop
    from training.progress import Progress
    from training.state import State

    models.family = lambda name: sys.modules[__name__]
    begin, kept = loop._begin, []

    def keep(run: Run, data: Dataset, out: Path, fabric: Fabric) -> State:
        kept.append(begin(run, data, out, fabric))
        return kept[0]

    loop._begin = keep
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", precision="32-true")
    fabric.launch()
    run = toy_run(config=Config(noise=noise), steps=steps, clip=10.0)
    loop.train(run, dataset(), out, fabric, Progress(out / "events", Console(), quiet=not fabric.is_global_zero))
    tensors = {name: tensor.clone() for name, tensor in kept[0].tensors().items()}
    save_file(tensors, out / f"device-{fabric.global_rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
