"""A tiny family for tests of the engine and the service: a chain that adds noise to a level set by the request,
exactly computable.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import _random
from models._protocol import (
    Batch,
    Draw,
    ImageSpace,
    Likelihood,
    Model,
    OnePassDensity,
    Range,
    Rows,
    Score,
    Spec,
    Steps,
)


@dataclass(frozen=True)
class Config:
    poison: int = -1  # a seed whose rows raise at their second step
    sick: int = -1  # a seed whose rows turn NaN


@dataclass
class WalkRows(Rows):
    seed: Tensor
    sample: Tensor
    x: Tensor  # (B, C, H, W)
    temperature: Tensor  # (B,)


class Walk(Model, OnePassDensity):
    """x ← x / 2 + temperature · noise, `steps` times. Its score is minus the sum of the levels."""

    statistic_names = ("sum",)

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.spec = Spec(
            family="walk",
            image=space,
            steps=Steps("Gibbs sweep", 1, 10, 1000),
            likelihood=Likelihood("exact", "none"),
            temperature=Range(0.0, 1.0, 2.0),
        )

    def init(self, draws: Sequence[Draw]) -> WalkRows:
        b = len(draws)
        return WalkRows(
            tick=torch.zeros(b, dtype=torch.int64),
            left=torch.tensor([d.steps for d in draws]),
            seed=_random.seed_bits([d.seed for d in draws]),
            sample=torch.tensor([d.sample for d in draws]),
            x=torch.zeros(b, *self.spec.image.shape),
            temperature=torch.tensor([d.temperature for d in draws]),
        )

    def step(self, rows: WalkRows) -> WalkRows:
        if bool(((rows.seed == self.config.poison) & (rows.tick >= 1)).any()):
            raise RuntimeError("poisoned row")
        noise = _random.uniform(rows.seed, rows.sample, rows.tick, 0, self.spec.image.shape)
        rows.x = self.weight * rows.x + 0.5 * rows.temperature[:, None, None, None] * noise
        rows.x = torch.where((rows.seed == self.config.sick)[:, None, None, None], torch.nan, rows.x)
        rows.tick, rows.left = rows.tick + 1, rows.left - 1
        return rows

    def image(self, rows: WalkRows) -> Tensor:
        return rows.x.clamp(0, 1)

    def evaluate(self, x: Tensor, labels: Tensor) -> Score:
        total = x.flatten(1).sum(1)
        return Score(log_prob=-255 * total, statistics={"sum": total})

    def groups(self) -> dict[str, list[nn.Parameter]]:
        return {"all": [self.weight]}

    def objective(self, batch: Batch) -> Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]:
        yield "all", self.weight**2, {}
