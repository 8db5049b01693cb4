"""DRAWWELL_DETERMINISM=pixels: batches that are filled up no further than 8-bit images need."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from test_engine import SPACE, Desk
from test_families import TINY, draws, make, pixels  # noqa: F401 (a fixture)
from toys import Config, Walk, WalkRows

from models._protocol import UNLABELLED, Model
from service.engine import Engine
from service.messages import Completed, Generate, Message
from service.warmup import CANONICAL_ROWS


@pytest.mark.parametrize("name", sorted(TINY))
def test_8_bit_images_are_the_same_alone_and_in_a_crowd(name: str, make: Callable[[str], Model]) -> None:  # noqa: F811
    model = make(name)
    told: dict[str, list[Message]] = {}
    engine = Engine(
        lambda job, message, final: told.setdefault(job, []).append(message), max_rows=8, determinism="pixels"
    )
    engine.put("m", "1", model)
    tasks = {
        f"job{k}": Generate(
            *(1 + k % 2, d.seed, d.steps, d.solver, None if d.label == UNLABELLED else d.label),
            *(d.prompt, d.guidance_scale, d.temperature, d.top_k),
        )
        for k, d in enumerate(draws(model, 4, seed=7))
    }
    for job, task in tasks.items():
        engine.submit(job, "m", task)
        engine.step()
    while engine.step():
        pass
    for job, task in tasks.items():
        assert isinstance(told[job][-1], Completed)
        engine.submit(f"{job} alone", "m", task)
        while engine.step():
            pass
        np.testing.assert_array_equal(pixels(told[f"{job} alone"]), pixels(told[job]))


class Loose(Walk):
    """Its floats depend on the number of rows: by less than a level, or by more."""

    by = 0.0

    def step(self, rows: WalkRows) -> WalkRows:
        self.seen.append(len(rows.tick))
        rows = super().step(rows)
        rows.x = rows.x + self.by * (len(rows.tick) % 8)
        return rows

    seen: list[int]


@pytest.mark.parametrize(
    ("determinism", "by", "filled_to", "alone"),
    [
        ("exact", 0.0, 4, 1),
        ("exact", 1e-7, CANONICAL_ROWS, CANONICAL_ROWS),
        ("pixels", 0.0, 1, 1),
        ("pixels", 1e-9, 1, 1),
        ("pixels", 0.3, CANONICAL_ROWS, CANONICAL_ROWS),
    ],
)
def test_batches_are_filled_up_as_far_as_was_seen_to_be_needed(
    determinism: str, by: float, filled_to: int, alone: int
) -> None:
    desk = Desk(max_rows=32, determinism=determinism)
    loose = Loose(Config(), SPACE)
    loose.by, loose.seen = by, []
    desk.engine.put("walk", "2", loose)
    warm = desk.engine.warm("walk", loose)
    assert (warm.execution.determinism, warm.execution.filled_to) == (determinism, filled_to)
    loose.seen.clear()
    desk.engine.submit("a", "walk", Generate(1, seed=1, steps=5))
    desk.run()
    assert set(loose.seen) == {alone}


def test_scores_are_exact_whatever_the_setting() -> None:
    desk = Desk(determinism="pixels")
    scoring = desk.engine.warm("walk", Walk(Config(), SPACE)).lanes[1]
    assert scoring.tried.multiple >= 4
