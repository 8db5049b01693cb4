"""Does a picture show what its caption asks for? A small network, trained on the pictures of `training.shapes`, reads a
picture's scene back, and every caption can be parsed to the scene that it asks for.

A scene is read as what lies where: how the groups are arranged, and of each, in reading order, the attributes. So "a
red star above a blue square" and "a blue square below a red star" are one answer. Like the feature network, the judge
is deterministic on one machine and cached, so that every model is judged by the same one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from models._protocol import JSON
from training import shapes
from training.data import Dataset, Split, batch_indices
from training.download import cache_folder
from training.features import fingerprint, learnt_once
from training.shapes import Group, Scene

VERSION = 1  # part of the cache's key: raise it when the network, its training or the order of the answers changes
BATCH = 256  # images at a time when reading
ABSENT = -1  # the answer about a second group that is not there: asked of nobody

ATTRIBUTES: dict[str, tuple[object, ...]] = {
    "count": tuple(shapes.COUNTS),
    "size": shapes.SIZES,
    "colour": shapes.COLOURS,
    "shape": shapes.SHAPES,
}
ARRANGEMENTS = ("one group", "stacked", "side by side")
GROUPS = 2
QUESTIONS = ("arrangement", *(name for _ in range(GROUPS) for name in ATTRIBUTES))
OPTIONS = [len(ARRANGEMENTS), *(len(options) for _ in range(GROUPS) for options in ATTRIBUTES.values())]
AGREEMENT = ("arrangement", "count", "colour", "shape")  # what "it shows what was asked" means


@dataclass(frozen=True)
class JudgeConfig:
    """The network and its training."""

    width: int = 32  # channels at full resolution; then 2, 3 and 4 times as many
    hidden: int = 256
    epochs: int = 12
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0


class JudgeNetwork(nn.Module):
    """x (B, 3, 32, 32) in [0, 1] -> logits of every question's options, one after the other (B, Σ OPTIONS)."""

    def __init__(self, config: JudgeConfig) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for times in (1, 2, 3):
            width = times * config.width
            convolution = nn.Conv2d(channels, width, 3, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
            channels = width
        cells = (shapes.SIDE // 8) ** 2
        self.body = nn.Sequential(
            *layers, nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2)
        )
        self.head = nn.Sequential(
            nn.Linear(channels * cells, config.hidden), nn.ReLU(), nn.Linear(config.hidden, sum(OPTIONS))
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.body(2 * x - 1))
        return out


@dataclass(frozen=True)
class Judge:
    """A trained judge and how far it can be trusted."""

    network: JudgeNetwork
    accuracy: dict[str, float]  # on real pictures that it has not seen, by the names that `agreement` returns
    sha256: str  # of its weights: numbers are comparable where this is equal

    def agreement(self, x: NDArray[np.uint8], captions: Sequence[str]) -> dict[str, NDArray[np.bool_]]:
        """For each picture of x (N, 3, 32, 32): whether it shows what its caption says of every group, by attribute;
        and as "caption" whether arrangement, counts, colours and shapes are all right.

        Raises `ValueError` for a caption that is no scene's.
        """
        return _agreement(self.network, x, _answers(captions))


def describes_scenes(data: Dataset) -> bool:
    """Whether these are pictures that a judge can read: of its size, and every caption a scene's."""
    if not data.space.captions or data.space.shape != (3, shapes.SIDE, shapes.SIDE):
        return False
    try:
        for split in data.splits.values():
            _answers(split.captions)
    except ValueError:
        return False
    return True


def judge(
    data: Dataset,
    config: JudgeConfig | None = None,
    folder: Path | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Judge:
    """The judge of a data set that `describes_scenes`: from the cache, or trained now on its training split.

    folder: the cache, by default `features` in the user's cache folder. report(done, total): called after each step.
    """
    config = config or JudgeConfig()
    folder = folder or cache_folder() / "features"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = JudgeNetwork(config)
        key: dict[str, JSON] = {"judge": VERSION, "data": data.digest, "config": dataclasses.asdict(config)}
        known = learnt_once(network, key, folder, lambda: _train(network, data, config, report))
    accuracy = {name: float(value) for name, value in known.items() if name in {*QUESTIONS, "caption"}}
    return Judge(network, accuracy, fingerprint(network))


def _train(
    network: JudgeNetwork, data: Dataset, config: JudgeConfig, report: Callable[[int, int], None]
) -> dict[str, str]:
    """Train in place; the accuracies on the test split. Half of the pictures are mirrored, and so are their answers."""
    split = data.splits["train"]
    answers = _answers(split.captions)
    batch_size = min(config.batch_size, len(split))
    steps = max(config.epochs * len(split) // batch_size, 400)
    network.train().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimiser = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        index = batch_indices(len(split), batch_size, config.seed, step)
        x, asked = _scaled(split.x[index]), answers[index]
        if step % 2:
            x, asked = x.flip(3), _mirrored(asked)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = network(x.contiguous(memory_format=torch.channels_last))
        each = zip(logits.float().split(OPTIONS, dim=1), asked.T, strict=True)
        loss = torch.stack([F.cross_entropy(one, answer, ignore_index=ABSENT) for one, answer in each]).sum()
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        schedule.step()
        report(step + 1, steps)
    network.eval()
    held_out: Split = data.splits["test"]
    right = _agreement(network, held_out.x, _answers(held_out.captions))
    return {name: repr(float(values.mean())) for name, values in right.items()}


def _agreement(network: JudgeNetwork, x: NDArray[np.uint8], asked: Tensor) -> dict[str, NDArray[np.bool_]]:
    read = torch.empty_like(asked)
    with torch.inference_mode():
        for start in range(0, len(x), BATCH):
            logits = network(_scaled(x[start : start + BATCH])).split(OPTIONS, dim=1)
            read[start : start + BATCH] = torch.stack([one.argmax(dim=1) for one in logits], dim=1)
    right = (read == asked) | (asked == ABSENT)
    named = {
        name: right[:, [i for i, question in enumerate(QUESTIONS) if question == name]].all(dim=1)
        for name in ("arrangement", *ATTRIBUTES)
    }
    named["caption"] = torch.stack([named[name] for name in AGREEMENT]).all(dim=0)
    return {name: values.numpy() for name, values in named.items()}


def _answers(captions: Sequence[str]) -> Tensor:
    """(N, questions) int64: the index of the right option to every question, `ABSENT` about a group not there."""
    return torch.tensor([_answer(shapes.parse(caption)) for caption in captions])


def _answer(scene: Scene) -> list[int]:
    groups: list[Group | None] = list(scene.groups) if scene.second is not None else [scene.first, None]
    if scene.relation in ("below", "right of"):
        groups.reverse()
    stacked = scene.relation in ("above", "below")
    answer = [0 if scene.relation is None else 1 if stacked else 2]
    for group in groups:
        answer += [
            ABSENT if group is None else options.index(getattr(group, name)) for name, options in ATTRIBUTES.items()
        ]
    return answer


def _mirrored(answers: Tensor) -> Tensor:
    """The answers about the pictures with left and right exchanged: groups side by side change places."""
    first, second = answers[:, 1 : 1 + len(ATTRIBUTES)], answers[:, 1 + len(ATTRIBUTES) :]
    swapped = torch.cat([answers[:, :1], second, first], dim=1)
    return torch.where(answers[:, :1] == ARRANGEMENTS.index("side by side"), swapped, answers)


def _scaled(x: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(x).to(torch.float32) / 255
