"""What a recipe returns: model config, data and budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from training.errors import RunError


@dataclass(frozen=True)
class AdamW:
    """torch.optim.AdamW's settings for one parameter group."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Run:
    """One training run, complete: the same Run on the same machine gives the same weights."""

    family: str  # a module of `models`
    config: Any  # that family's Config
    data: str  # a name that `training.data.load` knows
    steps: int  # iterations of the objective
    batch_size: int  # over all devices
    optimisers: Mapping[str, AdamW] = field(
        default_factory=dict
    )  # by parameter group, the same names as `Model.groups()`
    teacher: str | None = None  # a checkpoint to learn from beside the data: a folder, or the name of one in zoo/
    ema: float = 0.999  # decay of the exponential moving average of the weights, which is what is exported
    clip: float | None = 1.0  # largest gradient norm of a group
    warmup: int = 200  # steps of linear learning-rate warm-up
    decay: Literal["cosine", "constant"] = "cosine"  # to zero at the last step
    restarts: tuple[int, ...] = ()  # steps at which the cosine begins anew, from half the height (arXiv 1608.03983)
    storage: Literal["fp32", "fp16"] = "fp32"  # of the exported weight matrices; computing stays in float32
    precision: Literal["bf16", "fp32"] = "bf16"  # autocast for the objective; weights and optimiser stay in float32
    channels_last: bool = False  # memory format of the convolutions
    seed: int = 0
    checkpoint_every: int = 1000  # steps between resume states

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("batch_size", 1), ("warmup", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise RunError(f"{name}: {getattr(self, name)}; at least {least}")
        if list(self.restarts) != sorted({step for step in self.restarts if self.warmup < step < self.steps}):
            raise RunError(f"restarts: {self.restarts}; rising, after the warm-up and before the last step")
        if not 0 <= self.ema < 1:
            raise RunError(f"ema: {self.ema} is not in [0, 1)")
        if self.clip is not None and not self.clip > 0:
            raise RunError(f"clip: {self.clip}; above 0, or None not to clip")

    def lasting(self, steps: int) -> Run:
        """The same run of another number of steps: its restarts come after the same share of them, or not at all where
        that is in the warm-up."""
        moved = {round(step * steps / self.steps) for step in self.restarts}
        restarts = tuple(step for step in sorted(moved) if self.warmup < step < steps)
        return dataclasses.replace(self, steps=steps, restarts=restarts)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
