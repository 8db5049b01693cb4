"""The feature network: a small classifier of the data's own classes, in whose features samples and images are compared.

Distances in the features of a network trained on photographs say little about clothes of 28×28 pixels, so each data
set gets a network of its own: trained on its training split, deterministic on one machine, and cached, so that every
model of a data set is measured by the same network. Where the data has no labels, the network learns to tell by how
many quarter turns an image was rotated (Gidaris et al., arXiv 1803.07728).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from models._checkpoint import write_file
from models._protocol import JSON, ImageSpace
from training.data import Dataset, Split, batch_indices
from training.download import cache_folder

VERSION = 1  # part of the cache's key: raise it when the network or its training changes
BATCH = 256  # images at a time when measuring


@dataclass(frozen=True)
class FeatureConfig:
    """The network and its training."""

    width: int = 32  # channels at full resolution; then 1.5 and 3 times as many
    features: int = 64  # dimensions that images are compared in
    epochs: int = 5
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0


class FeatureNetwork(nn.Module):
    """x (B, C, H, W) in [0, 1] -> features (B, F) -> logits (B, classes)."""

    def __init__(self, space: ImageSpace, classes: int, config: FeatureConfig) -> None:
        super().__init__()
        widths = (config.width, config.width * 3 // 2, config.width * 3)
        layers: list[nn.Module] = []
        channels = space.channels
        for width in widths:
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True)]
            channels = width
        cells = math.ceil(space.height / 8) * math.ceil(space.width / 8)  # halved three times, rounded up
        self.body = nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * cells, config.features))
        self.head = nn.Linear(config.features, classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, F): the penultimate layer, before its ReLU so that it is close to a Gaussian."""
        out: Tensor = self.body(2 * x - 1)
        return out

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(F.relu(self.features(x)))
        return out


class Described(NamedTuple):
    """What a feature network sees in N images."""

    features: Tensor  # (N, F) float32
    predicted: Tensor  # (N,) int64, the class
    confidence: Tensor  # (N,) float32, the probability that the network gives to that class


@dataclass(frozen=True)
class FeatureSpace:
    """A trained feature network and what is known of it."""

    network: FeatureNetwork
    task: Literal["labels", "rotations"]
    accuracy: float  # of its task on the test split
    sha256: str  # of its weights: numbers are comparable where this is equal

    def describe(self, x: NDArray[np.uint8]) -> Described:
        """What the network sees in 8-bit images (N, C, H, W)."""
        features, logits = [], []
        device = next(self.network.parameters()).device
        with torch.inference_mode():
            for start in range(0, len(x), BATCH):
                f = self.network.features(_scaled(x[start : start + BATCH], device))
                features.append(f.cpu())
                logits.append(self.network.head(F.relu(f)).cpu())
        confidence, predicted = torch.cat(logits).softmax(dim=1).max(dim=1)
        return Described(torch.cat(features), predicted, confidence)


def feature_space(
    data: Dataset,
    config: FeatureConfig | None = None,
    folder: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureSpace:
    """The data set's feature network: from the cache, or trained now (a few CPU minutes for 55,000 images of 28×28).

    folder: the cache, by default `features` in the user's cache folder. report(done, total): called after each step.
    """
    config = config or FeatureConfig()
    folder = folder or cache_folder() / "features"
    labelled = bool(data.space.labels)
    task: Literal["labels", "rotations"] = "labels" if labelled else "rotations"
    network = _build(data.space, task, config)
    key: dict[str, JSON] = {"version": VERSION, "data": data.digest, "config": dataclasses.asdict(config)}

    def learn() -> dict[str, str]:
        return {"task": task, "accuracy": repr(_train(network, data, task, config, report))}

    known = learnt_once(network, key, folder, learn)
    return FeatureSpace(network, task, float(known["accuracy"]), fingerprint(network))


def learnt_once(
    network: nn.Module, key: dict[str, JSON], folder: Path, learn: Callable[[], dict[str, str]]
) -> dict[str, str]:
    """The network with its learnt weights, frozen: from the cache, or `learn()` now. Returns what `learn` did, which is
    cached with the weights. key: all that the weights depend on.
    """
    text = json.dumps(key, sort_keys=True)
    file = folder / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.safetensors"
    if not file.exists():
        metadata = {"key": text, **learn()}
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        write_file(file, save(tensors, metadata=metadata))
    with safe_open(file, framework="pt") as opened:
        known: dict[str, str] = opened.metadata()
    network.load_state_dict(load_file(file))
    network.eval().requires_grad_(False)
    return known


def fingerprint(network: nn.Module) -> str:
    """sha256 of the weights. Not of the file: safetensors writes metadata in an order that changes with every save."""
    sha = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        sha.update(f"{name} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def _build(space: ImageSpace, task: Literal["labels", "rotations"], config: FeatureConfig) -> FeatureNetwork:
    if task == "rotations" and space.width != space.height:
        raise ValueError(f"image: {space.width}×{space.height}; without labels only square images can be told apart")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return FeatureNetwork(space, space.classes if task == "labels" else 4, config)


def _train(
    network: FeatureNetwork,
    data: Dataset,
    task: Literal["labels", "rotations"],
    config: FeatureConfig,
    report: Callable[[int, int], None],
) -> float:
    """Train in place; the accuracy on the test split. One cycle of the learning rate (arXiv 1708.07120)."""
    split = data.splits["train"]
    batch_size = min(config.batch_size, len(split))
    # A data set of a thousand images needs more than five passes to get anywhere.
    steps = max(config.epochs * len(split) // batch_size, 400)
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        batch = split.take(batch_indices(len(split), batch_size, config.seed, step))
        x, target = _examples(batch, task, config.seed + step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(x.contiguous(memory_format=torch.channels_last))
        optimiser.zero_grad()
        F.cross_entropy(logits.float(), target).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        report(step + 1, steps)
    return _accuracy(network.eval(), data.splits["test"], task)


def _accuracy(network: FeatureNetwork, split: Split, task: Literal["labels", "rotations"]) -> float:
    correct = 0
    with torch.inference_mode():
        for start in range(0, len(split), BATCH):
            part = split.take(np.arange(start, min(start + BATCH, len(split))))
            x, target = _examples(part, task, start)
            correct += int((network(x).argmax(dim=1) == target).sum())
    return correct / len(split)


def _examples(batch: Split, task: Literal["labels", "rotations"], seed: int) -> tuple[Tensor, Tensor]:
    """x (B, C, H, W) and its classes (B,): the labels, or the quarter turns that each image was given."""
    x = _scaled(batch.x, torch.device("cpu"))
    if task == "labels":
        return x, torch.from_numpy(batch.labels)
    turns = torch.randint(0, 4, (len(x),), generator=torch.Generator().manual_seed(seed))
    return torch.stack([image.rot90(int(k), dims=(1, 2)) for image, k in zip(x, turns, strict=True)]), turns


def _scaled(x: NDArray[np.uint8], device: torch.device) -> Tensor:
    return torch.from_numpy(x).to(device).to(torch.float32) / 255
