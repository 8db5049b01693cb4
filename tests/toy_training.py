"""A tiny family and data set for tests of the training loop. As a script, it trains on two devices.

Two groups, a convolution and a linear layer on top of it, whose losses both depend on both: what a loop can mix up, it
can mix up here.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from rich.console import Console
from safetensors.torch import save_file
from torch import Tensor, nn

import models
from models import _protocol
from models._protocol import Batch, Draw, ImageSpace, Rows, Spec, Steps
from training import loop
from training.config import AdamW, Run
from training.data import Dataset, Split
from training.progress import Progress
from training.state import State

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
    concluded: Tensor

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
        self.register_buffer("concluded", torch.zeros(4))  # images and steps seen, a weight and a random number
        self.register_buffer("fixed", torch.arange(3.0), persistent=False)

    def prepare(self, batches: Iterable[Batch]) -> None:
        self.prepared += sum(len(batch.x) for batch in batches)
        self.conv.bias.uniform_()  # type: ignore[union-attr]

    def conclude(self, batches: Iterable[Batch]) -> None:
        images, steps = zip(*((len(batch.x), batch.step) for batch in batches), strict=True)
        weight = float(self.conv.weight.flatten()[0])
        self.concluded += torch.tensor([sum(images), max(steps), weight, float(torch.rand(()))])

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


# ----------------------------------------------------------------------------- as a script: several runs on two devices


def on_two_devices(out: Path, run: Run) -> int:
    """Start the run in two processes of a process group of its own, which has the id that is returned."""
    if pid := os.fork():
        return pid
    os.setsid()
    try:
        fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp_fork", precision="32-true")
        fabric.launch(partial(train_and_keep, out=out, run=run))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def train_and_keep(fabric: Fabric, out: Path, run: Run) -> None:
    """Train; each device leaves its own state in `out`, beside what the loop writes."""
    begin, kept = loop._begin, []

    def keep(run: Run, data: Dataset, out: Path, fabric: Fabric) -> State:
        kept.append(begin(run, data, out, fabric))
        return kept[0]

    loop._begin = keep
    loop.train(run, dataset(), out, fabric, Progress(out / "events", Console(), quiet=True))
    tensors = {name: tensor.clone() for name, tensor in kept[0].tensors().items()}
    save_file(tensors, out / f"device-{fabric.global_rank}.safetensors")


def finish(pid: int) -> None:
    _, status = os.waitpid(pid, 0)
    if status != 0:
        sys.exit(f"a run ended with status {status}")


def main(out: Path) -> None:
    """Leave in `out`: plain, without noise; straight, with noise; killed, the same after SIGKILL and another start."""
    models.family = lambda name: sys.modules[__name__]
    torch.set_num_threads(1)
    noisy = toy_run(config=Config(noise=0.3), steps=60)
    finish(on_two_devices(out / "plain", plain_run()))
    finish(on_two_devices(out / "straight", noisy))
    killed = on_two_devices(out / "killed", noisy)
    while not (out / "killed" / "resume").exists():
        if os.waitpid(killed, os.WNOHANG) != (0, 0):
            sys.exit("the run ended before it could be killed")
        time.sleep(0.002)
    os.killpg(killed, signal.SIGKILL)
    os.waitpid(killed, 0)
    (out / "killed-at.json").write_bytes((out / "killed" / "resume" / "state.json").read_bytes())
    finish(on_two_devices(out / "killed", noisy))


def plain_run() -> Run:
    """Without noise: a function of the batches alone. The clipping norm is never reached."""
    return toy_run(config=Config(noise=0.0), steps=12, clip=10.0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
