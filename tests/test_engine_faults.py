"""The engine over random histories in which rows fail in every way, jobs are cancelled, given back and expire, and
models are replaced and removed: each job is answered once, whoever does not fail is drawn as alone, nothing is left.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_engine import SPACE, Desk
from torch import Tensor
from toys import Config, Walk, WalkRows

from models._protocol import Draw
from service.messages import Completed, Failed, Generate, ScoreImages

INIT, STEP, NAN, IMAGE, ADAPTIVE = range(1, 6)  # what seeds are troubled by, modulo 8


class Troubled(Walk):
    """A walk some of whose rows fail, and some do not know how many steps they take."""

    def __init__(self, level: float = 0.5) -> None:
        super().__init__(Config(), SPACE)
        self.weight.data.fill_(level)

    def init(self, draws: Sequence[Draw]) -> WalkRows:
        if any(draw.seed % 8 == INIT for draw in draws):
            raise RuntimeError("cannot begin")
        rows = super().init(draws)
        rows.left = rows.left.where(rows.seed % 8 != ADAPTIVE, 1)
        return rows

    def step(self, rows: WalkRows) -> WalkRows:
        if bool(((rows.seed % 8 == STEP) & (rows.tick >= 2)).any()):
            raise RuntimeError("cannot go on")
        before = rows.left
        rows = super().step(rows)
        rows.x = rows.x.where((rows.seed % 8 != NAN)[:, None, None, None], float("nan"))
        ends = 1 + rows.seed // 8 % 7
        rows.left = rows.left.where(rows.seed % 8 != ADAPTIVE, (rows.tick < ends).long() * before.clamp(max=1))
        return rows

    def image(self, rows: WalkRows) -> Tensor:
        if bool(((rows.seed % 8 == IMAGE) & (rows.tick >= 1)).any()):
            raise RuntimeError("cannot be shown")
        return super().image(rows)


def fails(task: Generate | ScoreImages) -> bool:
    if isinstance(task, ScoreImages):
        return False
    kind = task.seed % 8
    return kind in (INIT, NAN, IMAGE) or (kind == STEP and task.steps >= 3)


def alone(task: Generate, level: float) -> list[np.ndarray]:
    desk = Desk()
    desk.engine.put("walk", "x", Troubled(level))
    desk.engine.submit("a", "walk", task)
    desk.run()
    return desk.images("a")


@settings(max_examples=40, deadline=None)
@example(seed=201, max_rows=1)  # where a preview is the last that is asked for
@given(seed=st.integers(0, 10**9), max_rows=st.integers(1, 9))
def test_each_job_is_answered_once_and_nothing_is_left_whatever_fails(seed: int, max_rows: int) -> None:
    rng, now = random.Random(seed), [0.0]
    desk = Desk(max_rows=max_rows, clock=lambda: now[0])
    levels = [0.5]
    desk.engine.put("walk", "2", Troubled())
    tasks: dict[str, tuple[Generate | ScoreImages, float]] = {}
    forgotten: set[str] = set()
    cancelled: set[str] = set()
    served, version = True, 2
    for k in range(rng.randint(1, 120)):
        now[0] += rng.choice([0.0, 0.01, 0.3])
        what = rng.choice(["submit", "submit", "step", "step", "step", "cancel", "forget", "put", "remove", "twice"])
        name = rng.choice([*tasks, "nobody"])
        if what == "submit":
            n = rng.randint(1, 2 * max_rows)
            task: Generate | ScoreImages = Generate(
                n, rng.getrandbits(62), rng.randint(1, 6), preview_every=rng.choice([None, 1, 2])
            )
            if rng.random() < 0.2:
                task = ScoreImages(np.full((n, 1, 2, 3), k, np.uint8), (-1,) * n)
            desk.engine.submit(
                f"job{k}",
                "walk",
                task,
                rng.choice(["interactive", "batch"]),
                rng.choice([None, 0.5, 5.0]),
                rng.choice([0.0, 0.4, 20.0]),
                rng.choice(["a", "b", "c"]),
            )
            tasks[f"job{k}"] = (task, levels[-1])
            assert served or desk.finals[f"job{k}"] == 1
        elif what == "cancel":
            desk.engine.cancel(name)
            cancelled.add(name)
        elif what == "forget" and not desk.finals[name]:
            desk.engine.forget(name)
            forgotten.add(name)
        elif what == "put":
            version, served = version + 1, True
            levels.append(0.5 + 0.01 * version)
            desk.engine.put("walk", rng.choice(["2", str(version)]), Troubled(levels[-1]))
        elif what == "remove" and rng.random() < 0.3:
            desk.engine.remove("walk")
            served = False
        else:
            desk.engine.step()
        for load in desk.engine.load().values():
            assert 0 <= load.running <= max_rows
            assert load.waiting >= 0
            assert min(load.row_seconds, load.step_seconds, load.first_in, load.left) >= 0
    desk.run()
    assert desk.engine.jobs == desk.engine.held_bytes == 0
    desk.engine.remove("walk")
    assert desk.engine.versions() == {}
    assert not desk.engine._scheduler._lanes
    for name, (task, level) in tasks.items():
        if name in forgotten:
            assert not desk.finals[name]
            continue
        assert desk.finals[name] == 1
        last = desk.last(name)
        if isinstance(last, Completed):
            assert not fails(task)
            if isinstance(task, Generate):
                np.testing.assert_array_equal(desk.images(name), alone(task, level))
        else:
            assert isinstance(last, Failed)
            assert last.kind != "row" or fails(task)
            assert last.kind != "cancelled" or name in cancelled
