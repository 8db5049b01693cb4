"""What the engine does with a model: drawing, scoring where it is a density, and heat maps where it can tell where.
Each is a program of three calls: make rows, take a step, say what came of it.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import _random
from models._modes import example_draws
from models._protocol import UNLABELLED, Density, Draw, Localiser, MapRows, Model, Rows, Score
from service.messages import Generate, ImageDone, MapImages, Mapped, Pixels, Scored, ScoreImages


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
    """Drawing, scoring or localising: the same calls for the engine."""

    name: str

    @abc.abstractmethod
    def rows_of(self, task: Any) -> list[DrawRow] | list[ScoreRow]:
        """What each row of a job is to do."""

    has_plain = False  # whether there are requests without a condition, beside those with one

    @abc.abstractmethod
    def warm(self, rows: int, plain: bool = False, short: bool = False) -> Rows:
        """Some rows at tick 0, to warm up with; plain ones have no condition, short ones as few steps as can be but for
        one."""

    @abc.abstractmethod
    def init(self, tasks: Sequence[Any]) -> Rows: ...

    @abc.abstractmethod
    def step(self, rows: Rows) -> Rows: ...

    @abc.abstractmethod
    def floats(self, rows: Rows) -> Tensor:
        """(B, ...) all that a result is made of."""

    @abc.abstractmethod
    def result(self, rows: Rows) -> list[Any]:
        """The result of each row, as it stands; None where it is not finite."""

    @abc.abstractmethod
    def message(self, index: int, result: Any) -> ImageDone | Scored | Mapped:
        """What is told of the job's row `index`."""


class Drawing(Program):
    name = "draw"

    def __init__(self, model: Model) -> None:
        self._model = model
        self.has_plain = model.spec.guidance_scale is not None

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

    def warm(self, rows: int, plain: bool = False, short: bool = False) -> Rows:
        asked = example_draws(self._model.spec, rows, 2 if short else None)
        if plain:
            asked = [replace(draw, label=UNLABELLED, prompt=None) for draw in asked]
        return self._model.init(asked)

    def init(self, tasks: Sequence[DrawRow]) -> Rows:
        return self._model.init([task.draw for task in tasks])

    def step(self, rows: Rows) -> Rows:
        return self._model.step(rows)

    def floats(self, rows: Rows) -> Tensor:
        return self._model.image(rows)

    def result(self, rows: Rows) -> list[Pixels | None]:
        images = self.floats(rows)
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
        likelihood = self._model.spec.likelihood
        if likelihood is None:
            return _rows_of(self._model, task, 1, 1)
        return _rows_of(self._model, task, likelihood.network_evaluations_per_step, likelihood.steps)

    def warm(self, rows: int, plain: bool = False, short: bool = False) -> Rows:
        return self._density.score_init(*_pictures(self._model, rows))

    def init(self, tasks: Sequence[ScoreRow]) -> Rows:
        return self._density.score_init(*_asked(self._model, tasks))

    def step(self, rows: Rows) -> Rows:
        return self._density.score_step(rows)

    def floats(self, rows: Rows) -> Tensor:
        score = self._density.score(rows)
        return torch.stack([*_columns(score).values(), *score.statistics.values()], dim=1).double()

    def result(self, rows: Rows) -> list[dict[str, Any] | None]:
        score = self._density.score(rows)
        columns = _columns(score)
        names, statistics = list(columns), list(score.statistics)
        table = torch.stack([*columns.values(), *score.statistics.values()], dim=1).double().cpu().tolist()
        features = {name: value.float().cpu().numpy() for name, value in score.features.items()}
        results: list[dict[str, Any] | None] = []
        converged = [None] * len(table) if score.converged is None else score.converged.tolist()
        for k, (line, sure) in enumerate(zip(table, converged, strict=True)):
            numbers = dict(zip(names + statistics, line, strict=True))
            ok = all(math.isfinite(v) for v in line)
            results.append(
                {
                    **{n: numbers[n] if n in columns else None for n in ("log_prob", "energy", "stderr")},
                    "statistics": {n: numbers[n] for n in statistics},
                    "features": {n: vectors[k] for n, vectors in features.items()},
                    "converged": sure,
                }
                if ok
                else None
            )
        return results

    def message(self, index: int, result: dict[str, Any]) -> Scored:
        return Scored(index, **result)


class Localising(Program):
    name = "map"

    def __init__(self, model: Localiser) -> None:
        assert isinstance(model, Model)
        self._model, self._localiser = model, model

    def rows_of(self, task: MapImages) -> list[ScoreRow]:
        likelihood = self._model.spec.likelihood
        return _rows_of(self._model, task, 1 if likelihood is None else likelihood.heatmap_evaluations, 1)

    def warm(self, rows: int, plain: bool = False, short: bool = False) -> Rows:
        return self._localiser.map_init(*_pictures(self._model, rows))

    def init(self, tasks: Sequence[ScoreRow]) -> Rows:
        return self._localiser.map_init(*_asked(self._model, tasks))

    def step(self, rows: Rows) -> Rows:
        assert isinstance(rows, MapRows)
        return self._localiser.map_step(rows)

    def floats(self, rows: Rows) -> Tensor:
        assert isinstance(rows, MapRows)
        return rows.surprise

    def result(self, rows: Rows) -> list[NDArray[np.float32] | None]:
        assert isinstance(rows, MapRows)
        finite = rows.surprise.isfinite().flatten(1).all(1).tolist()
        return [found if ok else None for found, ok in zip(rows.surprise.cpu().numpy(), finite, strict=True)]

    def message(self, index: int, result: NDArray[np.float32]) -> Mapped:
        return Mapped(index, result)


def programs(model: Model, drawing: Model | None = None) -> list[Program]:
    """All that can be done with a model, drawing first; another may draw in its place. Raises `TypeError` for one that
    is not what its Spec says."""
    found: list[Program] = [Drawing(drawing or model)]
    likelihood = model.spec.likelihood
    if likelihood is not None:
        if not isinstance(model, Density):
            raise TypeError("its Spec has a likelihood, but the family is no Density")
        found.append(Scoring(model))
    if likelihood is not None and likelihood.heatmap_evaluations:
        if not isinstance(model, Localiser):
            raise TypeError("its Spec has heat maps, but the family is no Localiser")
        found.append(Localising(model))
    return found


def _rows_of(model: Model, task: ScoreImages | MapImages, evaluations: int, ticks: int) -> list[ScoreRow]:
    if task.images.shape[1:] != model.spec.image.shape:
        raise ValueError(f"images: {task.images.shape[1:]} where the model takes {model.spec.image.shape}")
    return [ScoreRow(image, label, evaluations, ticks) for image, label in zip(task.images, task.labels, strict=True)]


def _columns(score: Score) -> dict[str, Tensor]:
    """What a density says of an image, besides its statistics, each (B,)."""
    known = (("log_prob", score.log_prob), ("energy", score.energy), ("stderr", score.stderr))
    return {name: value for name, value in known if value is not None}


def _pictures(model: Model, rows: int) -> tuple[Tensor, Tensor]:
    """Noise, the same every time: sums of what is black everywhere would be alike in any order."""
    shape, device = model.spec.image.shape, model.device
    seed = torch.arange(rows, device=device)
    x = (_random.uniform(seed, torch.zeros_like(seed), 0, 0, shape) * 255).round() / 255
    return x, torch.full((rows,), UNLABELLED, device=device)


def _asked(model: Model, tasks: Sequence[ScoreRow]) -> tuple[Tensor, Tensor]:
    x = torch.stack([torch.tensor(task.image) for task in tasks]).to(model.device).to(torch.float32) / 255
    return x, torch.tensor([task.label for task in tasks], device=x.device)
