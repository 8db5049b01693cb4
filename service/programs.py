"""What the engine does with a model: drawing, and scoring where it is a density. Each is a program of three calls: make
rows, take a step, say what came of it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models._protocol import UNLABELLED, Density, Draw, Model, Rows
from service.messages import Generate, ImageDone, Pixels, Scored, ScoreImages


@dataclass(frozen=True)
class DrawRow:
    draw: Draw
    preview_every: int | None
    evaluations_per_tick: int  # of the network
    ticks: int | None  # that it takes; None: its solver is adaptive

    @property
    def predicted_ticks(self) -> int:
        """Ticks that it takes, with an adaptive solver about."""
        return self.draw.steps if self.ticks is None else self.ticks


@dataclass(frozen=True)
class ScoreRow:
    image: Pixels
    label: int
    evaluations_per_tick: int
    predicted_ticks: int = 1


class Program(abc.ABC):
    """Drawing or scoring: the same three calls for the engine."""

    name: str

    @abc.abstractmethod
    def rows_of(self, task: Any) -> list[DrawRow] | list[ScoreRow]:
        """What each row of a job is to do."""

    @abc.abstractmethod
    def warm(self, rows: int) -> Rows:
        """Some rows at tick 0, to warm up with."""

    @abc.abstractmethod
    def init(self, tasks: Sequence[Any]) -> Rows: ...

    @abc.abstractmethod
    def step(self, rows: Rows) -> Rows: ...

    @abc.abstractmethod
    def result(self, rows: Rows) -> list[Any]:
        """The result of each row, as it stands; None where it is not finite."""

    @abc.abstractmethod
    def message(self, index: int, result: Any) -> ImageDone | Scored:
        """What is told of the job's row `index`."""


class Drawing(Program):
    name = "draw"

    def __init__(self, model: Model) -> None:
        self._model = model

    def rows_of(self, task: Generate) -> list[DrawRow]:
        spec = self._model.spec
        label = UNLABELLED if task.label is None else task.label
        conditioned = label != UNLABELLED or task.prompt is not None
        guided = spec.guidance_scale is not None and task.guidance_scale != 1 and conditioned
        evaluations = spec.steps.network_evaluations_per_step * (2 if guided else 1)
        ticks = None if task.solver in spec.adaptive else spec.ticks(task.steps, task.solver)
        return [
            DrawRow(
                Draw(
                    task.seed,
                    k,
                    task.steps,
                    task.solver,
                    label,
                    task.prompt,
                    task.guidance_scale,
                    task.temperature,
                    task.top_k,
                ),
                task.preview_every,
                evaluations,
                ticks,
            )
            for k in range(task.n)
        ]

    def warm(self, rows: int) -> Rows:
        spec = self._model.spec
        solver = spec.solvers[0] if spec.solvers else None
        guidance = 1.0 if spec.guidance_scale is None else spec.guidance_scale.default
        label = 0 if spec.image.labels else UNLABELLED
        prompt = "a" if spec.image.captions else None
        return self._model.init([Draw(0, k, spec.steps.default, solver, label, prompt, guidance) for k in range(rows)])

    def init(self, tasks: Sequence[DrawRow]) -> Rows:
        return self._model.init([task.draw for task in tasks])

    def step(self, rows: Rows) -> Rows:
        return self._model.step(rows)

    def result(self, rows: Rows) -> list[Pixels | None]:
        images = self._model.image(rows)
        finite = images.isfinite().flatten(1).all(1).tolist()
        pixels = (images.nan_to_num() * 255).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy()
        return [p if ok else None for p, ok in zip(pixels, finite, strict=True)]

    def message(self, index: int, result: Pixels) -> ImageDone:
        return ImageDone(index, result)


class Scoring(Program):
    name = "score"

    def __init__(self, model: Density) -> None:
        assert isinstance(model, Model)
        self._model, self._density = model, model

    def rows_of(self, task: ScoreImages) -> list[ScoreRow]:
        if task.images.shape[1:] != self._model.spec.image.shape:
            raise ValueError(f"images: {task.images.shape[1:]} where the model takes {self._model.spec.image.shape}")
        likelihood = self._model.spec.likelihood
        evaluations = 1 if likelihood is None else likelihood.network_evaluations_per_step
        ticks = 1 if likelihood is None else likelihood.steps
        return [
            ScoreRow(image, label, evaluations, ticks) for image, label in zip(task.images, task.labels, strict=True)
        ]

    def warm(self, rows: int) -> Rows:
        x = torch.zeros(rows, *self._model.spec.image.shape, device=self._model.device)
        return self._density.score_init(x, torch.full((rows,), UNLABELLED, device=x.device))

    def init(self, tasks: Sequence[ScoreRow]) -> Rows:
        device = self._model.device
        x = torch.stack([torch.tensor(task.image) for task in tasks]).to(device).to(torch.float32) / 255
        return self._density.score_init(x, torch.tensor([task.label for task in tasks], device=device))

    def step(self, rows: Rows) -> Rows:
        return self._density.score_step(rows)

    def result(self, rows: Rows) -> list[dict[str, Any] | None]:
        score = self._density.score(rows)
        columns: dict[str, Tensor] = {
            name: value
            for name, value in (("log_prob", score.log_prob), ("energy", score.energy), ("stderr", score.stderr))
            if value is not None
        }
        names, statistics = list(columns), list(score.statistics)
        table = torch.stack([*columns.values(), *score.statistics.values()], dim=1).double().cpu().tolist()
        results: list[dict[str, Any] | None] = []
        converged = [None] * len(table) if score.converged is None else score.converged.tolist()
        for line, sure in zip(table, converged, strict=True):
            numbers = dict(zip(names + statistics, line, strict=True))
            ok = all(math.isfinite(v) for v in line)
            results.append(
                {
                    **{n: numbers[n] if n in columns else None for n in ("log_prob", "energy", "stderr")},
                    "statistics": {n: numbers[n] for n in statistics},
                    "converged": sure,
                }
                if ok
                else None
            )
        return results

    def message(self, index: int, result: dict[str, Any]) -> Scored:
        return Scored(index, **result)


# --------------------------------------------------------------------------------------------------------------- the
# books
