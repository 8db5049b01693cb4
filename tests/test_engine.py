"""The engine on toy chains: exactness in any crowd, isolation, cancellation, deadlines, versions."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from toys import Config, Walk, WalkRows

from models._protocol import Draw, ImageSpace
from service.engine import Engine
from service.messages import Completed, Failed, Generate, ImageDone, Message, Progress, Scored, ScoreImages, Started

SPACE = ImageSpace(width=3, height=2, channels=1)
CANCELLED = "the job was cancelled before it finished"


class Desk:
    """An engine with its messages collected by job, on a clock that the test may move."""

    def __init__(self, config: Config = Config(), **engine: Any) -> None:  # noqa: B008 (frozen)
        self.told: dict[str, list[Message]] = defaultdict(list)
        self.finals: dict[str, int] = defaultdict(int)
        self.engine = Engine(self._emit, **engine)
        self.engine.put("walk", "1", Walk(config, SPACE))

    def _emit(self, job: str, message: Message, final: bool) -> None:
        assert not self.finals[job], "told after the final message"
        self.told[job].append(message)
        self.finals[job] += final

    def run(self) -> None:
        while self.engine.step():
            pass

    def images(self, job: str) -> list[np.ndarray]:
        done = {m.sample: m.pixels for m in self.told[job] if isinstance(m, ImageDone)}
        return [done[k] for k in sorted(done)]

    def last(self, job: str) -> Message:
        return self.told[job][-1]


def alone(task: Generate) -> list[np.ndarray]:
    desk = Desk()
    desk.engine.submit("a", "walk", task)
    desk.run()
    return desk.images("a")


def test_a_request_is_drawn_the_same_alone_and_in_any_crowd() -> None:
    rng = random.Random(1)
    for _ in range(20):
        desk = Desk(max_rows=rng.choice([1, 3, 8, 64]))
        tasks = {
            f"job{k}": Generate(
                n=rng.randint(1, 5), seed=rng.getrandbits(64), steps=rng.randint(1, 30), temperature=rng.random()
            )
            for k in range(12)
        }
        waiting = list(tasks)
        while waiting or desk.engine.jobs:
            if waiting and rng.random() < 0.4:
                name = waiting.pop()
                desk.engine.submit(name, "walk", tasks[name])
            desk.engine.step()
        for name, task in tasks.items():
            np.testing.assert_array_equal(desk.images(name), alone(task))
            assert isinstance(desk.last(name), Completed)


def test_image_k_does_not_depend_on_n() -> None:
    one, four = alone(Generate(1, seed=5, steps=7)), alone(Generate(4, seed=5, steps=7))
    np.testing.assert_array_equal(one[0], four[0])
    assert not np.array_equal(four[0], four[1])


def test_a_job_is_told_in_order_started_progress_images_completed() -> None:
    desk = Desk()
    desk.engine.submit("a", "walk", Generate(2, seed=1, steps=10, preview_every=4))
    desk.run()
    kinds = [type(m) for m in desk.told["a"]]
    assert kinds[0] is Started
    assert kinds[-3:] == [ImageDone, ImageDone, Completed]
    progress = [m for m in desk.told["a"] if isinstance(m, Progress)]
    assert {4, 8} <= {m.step for m in progress if m.previews}
    assert [m.step for m in progress] == sorted({m.step for m in progress})
    assert all(len(m.previews) == 2 for m in progress if m.previews)
    done = desk.last("a")
    assert isinstance(done, Completed)
    assert done.network_evaluations == 20
    assert done.compute_seconds > 0


def test_a_row_that_raises_fails_alone() -> None:
    desk = Desk(Config(poison=13))
    good = {f"good{k}": Generate(3, seed=100 + k, steps=6 + k) for k in range(4)}
    for name, task in good.items():
        desk.engine.submit(name, "walk", task)
    desk.engine.submit("bad", "walk", Generate(2, seed=13, steps=9))
    desk.run()
    assert desk.last("bad") == Failed("row", "RuntimeError: poisoned row")
    for name, task in good.items():
        np.testing.assert_array_equal(desk.images(name), alone(task))


def test_a_row_that_turns_nan_fails_alone() -> None:
    desk = Desk(Config(sick=13))
    desk.engine.submit("good", "walk", Generate(3, seed=1, steps=6))
    desk.engine.submit("bad", "walk", Generate(2, seed=13, steps=6))
    desk.run()
    assert isinstance(desk.last("bad"), Failed)
    assert "not finite" in desk.last("bad").detail  # type: ignore[union-attr]
    assert not desk.images("bad")
    np.testing.assert_array_equal(desk.images("good"), alone(Generate(3, seed=1, steps=6)))


class Unshowable(Walk):
    """Whose images raise where a row of seed 13 has taken at least so many steps."""

    def __init__(self, after: int) -> None:
        super().__init__(Config(), SPACE)
        self.after = after

    def image(self, rows: WalkRows) -> Tensor:
        if bool(((rows.seed == 13) & (rows.tick >= self.after)).any()):
            raise RuntimeError("no image of this")
        return super().image(rows)


@pytest.mark.parametrize("after", [1, 6], ids=["preview", "result"])
def test_a_row_whose_image_raises_fails_alone(after: int) -> None:
    desk = Desk()
    desk.engine.put("walk", "2", Unshowable(after))
    good = {f"good{k}": Generate(1 + k, seed=100 + k, steps=6, preview_every=2) for k in range(3)}
    for name, task in good.items():
        desk.engine.submit(name, "walk", task)
    desk.engine.submit("bad", "walk", Generate(2, seed=13, steps=6, preview_every=2))
    desk.run()
    assert desk.last("bad") == Failed("row", "RuntimeError: no image of this")
    shown = [m for m in desk.told["bad"] if isinstance(m, Progress) and m.previews]
    assert bool(shown) == (after == 6), "else it fails at its first preview"
    for name, task in good.items():
        np.testing.assert_array_equal(desk.images(name), alone(task))
        assert isinstance(desk.last(name), Completed)
    assert desk.engine.jobs == 0
    assert desk.engine.held_bytes == 0


class Lost(Walk):
    """Whose device fails for good, in the beginning, step or result of a row of seed 13."""

    def __init__(self, where: str) -> None:
        super().__init__(Config(), SPACE)
        self.where, self.lost = where, False

    def use(self, where: str, bad: bool) -> None:
        self.lost |= bad and where == self.where
        if self.lost:
            raise RuntimeError("CUDA error: device-side assert triggered")

    def init(self, draws: Sequence[Draw]) -> WalkRows:
        self.use("init", any(draw.seed == 13 for draw in draws))
        return super().init(draws)

    def step(self, rows: WalkRows) -> WalkRows:
        self.use("step", bool((rows.seed == 13).any()))
        return super().step(rows)

    def image(self, rows: WalkRows) -> Tensor:
        self.use("image", bool((rows.seed == 13).any()))
        return super().image(rows)


@pytest.mark.parametrize("where", ["init", "step", "image"])
def test_where_the_device_is_lost_no_row_is_blamed(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process ends, and others do its jobs: else every job that came would fail, and soonest here."""
    desk, model = Desk(), Lost(where)
    monkeypatch.setattr("service.engine._answers", lambda device: model.use("any", bad=False))
    desk.engine.put("walk", "2", model)
    desk.engine.submit("good", "walk", Generate(2, seed=1, steps=3))
    desk.engine.submit("bad", "walk", Generate(1, seed=13, steps=3))
    with pytest.raises(RuntimeError, match="CUDA error"):
        desk.run()
    assert not any(isinstance(m, Failed) for told in desk.told.values() for m in told)


def test_a_row_that_raises_is_no_measure_of_what_a_step_costs() -> None:
    now = [0.0]

    class Timed(Walk):
        """A step takes 10 ms a row; one with a row that raises ends sooner."""

        def step(self, rows: WalkRows) -> WalkRows:
            after = super().step(rows)
            now[0] += 0.01 * len(rows.tick)
            return after

    desk = Desk(clock=lambda: now[0])
    desk.engine.put("walk", "2", Timed(Config(poison=13), SPACE))
    desk.engine.submit("good", "walk", Generate(8, seed=1, steps=9))
    desk.engine.submit("bad", "walk", Generate(1, seed=13, steps=9))
    desk.run()
    assert isinstance(desk.last("bad"), Failed)
    desk.engine.submit("alone", "walk", Generate(1, seed=13, steps=9))
    desk.run()
    load = desk.engine.load()["walk/draw"]
    assert load.fastest == pytest.approx(0.01), "the moment in which the row raised was no step"
    assert load.row_seconds * 8 + load.step_seconds == pytest.approx(0.08, rel=0.3), "nor were eight steps of a row one"


def test_cancelled_work_is_gone_at_the_next_step_and_changes_nobody() -> None:
    desk = Desk()
    desk.engine.submit("keep", "walk", Generate(2, seed=1, steps=20))
    for k in range(10):
        desk.engine.submit(f"gone{k}", "walk", Generate(3, seed=k, steps=500))
    for _ in range(5):
        desk.engine.step()
    for k in range(10):
        desk.engine.cancel(f"gone{k}")
    desk.engine.step()
    assert all(
        desk.last(f"gone{k}") == Failed("cancelled", "the job was cancelled before it finished") for k in range(10)
    )
    assert desk.engine.jobs == 1
    desk.run()
    np.testing.assert_array_equal(desk.images("keep"), alone(Generate(2, seed=1, steps=20)))


def test_work_past_its_deadline_is_dropped_whether_it_waits_or_runs() -> None:
    now = [0.0]
    desk = Desk(max_rows=2, clock=lambda: now[0])
    desk.engine.submit("runs", "walk", Generate(2, seed=1, steps=100), timeout=5)
    desk.engine.submit("waits", "walk", Generate(2, seed=2, steps=1), timeout=5)
    desk.engine.submit("patient", "walk", Generate(1, seed=3, steps=1), timeout=50)
    desk.engine.step()
    now[0] = 6
    desk.run()
    for job in ("runs", "waits"):
        assert desk.last(job) == Failed("expired", "the job was expired before it finished")
    assert isinstance(desk.last("patient"), Completed)


def test_scores_are_told_by_image_with_statistics() -> None:
    images = np.arange(5 * 6, dtype=np.uint8).reshape(5, 1, 2, 3)
    desk = Desk(max_rows=3)
    desk.engine.submit("s", "walk", ScoreImages(images, (-1,) * 5))
    desk.run()
    scores = {m.index: m for m in desk.told["s"] if isinstance(m, Scored)}
    for k in range(5):
        assert scores[k].log_prob == pytest.approx(-float(images[k].sum()), rel=1e-6)
        assert scores[k].statistics["sum"] == pytest.approx(images[k].sum() / 255, rel=1e-6)


def test_short_jobs_do_not_wait_for_long_ones() -> None:
    desk = Desk()
    desk.engine.submit("long", "walk", Generate(8, seed=1, steps=1000))
    for _ in range(3):
        desk.engine.step()
    desk.engine.submit("short", "walk", Generate(1, seed=2, steps=10))
    for _ in range(10):
        desk.engine.step()
    assert isinstance(desk.last("short"), Completed)
    assert desk.engine.jobs == 1


def test_a_new_version_takes_new_jobs_while_the_old_one_finishes_its_own() -> None:
    desk = Desk()
    desk.engine.submit("old", "walk", Generate(1, seed=1, steps=8))
    desk.engine.step()
    changed = Walk(Config(), SPACE)
    changed.weight.data.fill_(0.25)
    desk.engine.put("walk", "2", changed)
    desk.engine.submit("new", "walk", Generate(1, seed=1, steps=8))
    desk.run()
    np.testing.assert_array_equal(desk.images("old"), alone(Generate(1, seed=1, steps=8)))
    assert not np.array_equal(desk.images("new"), desk.images("old"))
    ends = {name: desk.last(name) for name in ("old", "new")}
    assert {name: end.version for name, end in ends.items() if isinstance(end, Completed)} == {"old": "1", "new": "2"}
    desk.engine.remove("walk")
    desk.engine.submit("late", "walk", Generate(1, seed=1, steps=8))
    assert desk.last("late") == Failed("unknown-model", "model: walk is not loaded here")


def test_the_same_job_twice_is_refused_without_harm_to_the_first() -> None:
    desk = Desk()
    desk.engine.submit("a", "walk", Generate(1, seed=1, steps=3))
    with pytest.raises(ValueError, match="a is there already"):
        desk.engine.submit("a", "walk", Generate(1, seed=1, steps=3))
    desk.run()
    assert isinstance(desk.last("a"), Completed)


class Watched(Walk):
    """Notes the seeds of the rows of each step."""

    def __init__(self, config: Config, space: ImageSpace) -> None:
        super().__init__(config, space)
        self.steps: list[set[int]] = []

    def step(self, rows: WalkRows) -> WalkRows:
        self.steps.append(set(rows.seed.tolist()))
        return super().step(rows)


def test_a_cancelled_jobs_rows_are_gone_before_the_next_step() -> None:
    desk, watched = Desk(), Watched(Config(), SPACE)
    desk.engine.put("walk", "2", watched)
    desk.engine.submit("stays", "walk", Generate(3, seed=1, steps=50))
    desk.engine.submit("goes", "walk", Generate(5, seed=2, steps=50))
    for _ in range(10):
        desk.engine.step()
    before = len(watched.steps)
    desk.engine.cancel("goes")
    desk.engine.step()
    after = watched.steps[before:]
    assert sum(2 in seeds for seeds in after) <= 1, "steps that its rows still took part in"
    assert after == [{1}], "none, as it is"
    assert desk.engine.load()["walk/draw"].running == 3
    desk.engine.cancel("stays")
    desk.engine.step()
    assert len(watched.steps) == before + 1, "nobody is left, so there is no step"
    assert desk.engine.held_bytes == 0


def test_ten_cancelled_neighbours_change_nobodys_pixels() -> None:
    rng = random.Random(4)
    for _ in range(5):
        desk = Desk(max_rows=rng.choice([4, 16, 64]))
        kept = {f"kept{k}": Generate(rng.randint(1, 4), seed=rng.getrandbits(64), steps=30) for k in range(3)}
        unwanted = [f"unwanted{k}" for k in range(10)]
        jobs = [*kept, *unwanted]
        rng.shuffle(jobs)
        for name in jobs:
            desk.engine.submit(name, "walk", kept.get(name) or Generate(rng.randint(1, 4), rng.getrandbits(64), 30))
            desk.engine.step()
        for name in unwanted:
            desk.engine.cancel(name)
            for _ in range(rng.randint(0, 3)):
                desk.engine.step()
        desk.run()
        assert sum(desk.last(name) == Failed("cancelled", CANCELLED) for name in unwanted) >= 5
        for name, task in kept.items():
            np.testing.assert_array_equal(desk.images(name), alone(task))


def test_a_model_pays_for_its_previews() -> None:
    """While another is asked as well, whose steps take as long."""
    now = [0.0]
    used = Counter[str]()

    class Costly(Walk):
        """10 ms a step, 90 ms to show it."""

        name = ""

        def spend(self, seconds: float) -> None:
            now[0] += seconds
            used[self.name] += seconds  # type: ignore[assignment]

        def step(self, rows: WalkRows) -> WalkRows:
            self.spend(0.01)
            return super().step(rows)

        def image(self, rows: WalkRows) -> Tensor:
            self.spend(0.09)
            return super().image(rows)

    desk = Desk(clock=lambda: now[0])
    for name in ("shown", "unseen"):
        model = Costly(Config(), SPACE)
        model.name = name
        desk.engine.put(name, "1", model)
    used.clear()
    desk.engine.submit("a", "shown", Generate(1, seed=1, steps=1000, preview_every=1))
    desk.engine.submit("b", "unseen", Generate(1, seed=1, steps=1000))
    while desk.engine.jobs == 2:
        desk.engine.step()
    assert used["shown"] == pytest.approx(used["unseen"], rel=0.1)
    assert desk.engine.load()["shown/draw"].seconds == pytest.approx(used["shown"], rel=0.1)


def test_tenants_are_charged_what_their_rows_take() -> None:
    desk = Desk(max_rows=1)
    for k in range(60):
        desk.engine.submit(f"short{k}", "walk", Generate(1, seed=k, steps=2), tenant="short")
    for k in range(20):
        desk.engine.submit(f"long{k}", "walk", Generate(1, seed=k, steps=20), tenant="long")
    for _ in range(80):
        desk.engine.step()
    done = [job for job in desk.told if isinstance(desk.last(job), Completed)]
    steps = {name: sum(job.startswith(name) for job in done) * n for name, n in (("short", 2), ("long", 20))}
    assert steps["short"] == steps["long"] == 40
