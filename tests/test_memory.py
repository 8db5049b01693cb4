"""Models by a budget: the policy over random histories; and with an engine, that jobs get what they get without one."""

from __future__ import annotations

import random
import weakref
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from servers import DDPM, GAN, VAE, write
from toys import Config, Walk

from models._protocol import ImageSpace
from service.broker import Job, ModelState
from service.engine import Engine
from service.loader import Found, Gone, Loaded, Loader, News, Refused, Scanned, weigh
from service.memory import STAY, Memory
from service.messages import Completed, Failed, Generate, ImageDone, Message
from service.residency import Residency

SPACE = ImageSpace(width=3, height=2, channels=1)

# -------------------------------------------------------------------------------------------------------------- policy


@settings(deadline=None)
@given(
    weights=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    budget=st.integers(9, 30),
    rng=st.randoms(use_true_random=False),
)
def test_the_budget_is_kept_and_nobody_goes_in_vain(weights: list[int], budget: int, rng: random.Random) -> None:
    """Over a history of loads, uses and jobs: what is there never takes more than the budget; who leaves was idle, or
    had stayed its time; without any one of those who leave there would be no room; and of two who weigh the same and
    are alike idle, the one used longer ago goes.
    """
    memory, used, since = Memory(budget), dict[str, float](), dict[str, float]()
    busy: set[str] = set()
    for now in range(1, 60):
        name = f"m{rng.randrange(len(weights))}"
        busy = {m for m in used if rng.random() < 0.4}
        if name in memory:
            memory.touch(name, now)
            used[name] = now
            continue
        weight = weights[int(name[1:])]
        before, there = memory.used, {m: weights[int(m[1:])] for m in used}
        going = memory.make_room(weight, busy, set(), now)
        freed = sum(there[m] for m in going)
        if before + weight <= budget:
            assert going == ()
        elif going:
            assert before - freed + weight <= budget
            assert all(before - freed + there[m] + weight > budget for m in going), "one left in vain"
            assert all(m not in busy or now - since[m] >= STAY for m in going)
            for gone in going:
                alike = [
                    m for m in there if there[m] == there[gone] and (m in busy) == (gone in busy) and m not in going
                ]
                assert all(used[m] >= used[gone] for m in alike if m not in busy or now - since[m] >= STAY)
        else:
            may = [m for m in there if m not in busy or now - since[m] >= STAY]
            assert before - sum(there[m] for m in may) + weight > budget, "there could have been room"
            continue
        for m in going:
            del used[m], since[m]
        memory.held(used)
        assert memory.has_room(weight)
        memory.keep(name, weight, 1.0, now)
        used[name] = since[name] = now
        assert memory.used == sum(weights[int(m[1:])] for m in used) <= budget


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), max_size=80))
def test_with_equal_weights_those_used_last_are_there(uses: list[int]) -> None:
    memory, order = Memory(30), list[str]()
    for now, use in enumerate(uses):
        name = f"m{use}"
        order = [m for m in order if m != name] + [name]
        if name in memory:
            memory.touch(name, now)
        else:
            gone = memory.make_room(10, set(), set(), now)
            memory.held([m for m in order if m in memory and m not in gone])
            memory.keep(name, 10, 0.0, now)
        assert [m for m in order if m in memory] == order[-3:]


def test_what_leaves_already_is_counted_once() -> None:
    memory = Memory(20)
    memory.keep("a", 10, 1.0, 0.0)
    memory.keep("b", 10, 1.0, 0.0)
    assert memory.make_room(10, {"a", "b"}, set(), 1.0) == (), "they have work and have not stayed long enough"
    assert memory.make_room(10, {"a", "b"}, set(), 2.0) == ("a",)
    assert memory.make_room(10, {"a", "b"}, set(), 3.0) == (), "a is on its way"
    assert not memory.has_room(10), "but still there"
    memory.held({"b"})
    assert memory.has_room(10)


def test_spared_ones_go_last_and_no_budget_is_no_bound() -> None:
    memory = Memory(20)
    memory.keep("a", 10, 0.0, 0.0)
    memory.keep("b", 10, 0.0, 1.0)
    assert memory.make_room(10, {"b"}, {"a"}, 2.0) == ("b",)
    assert memory.make_room(20, set(), {"a"}, 2.0) == ("a",)
    assert Memory(None).has_room(10**15)
    assert not memory.fits(21)
    with pytest.raises(ValueError, match="budget: 0"):
        Memory(0)


# --------------------------------------------------------------------------------------------------- with an engine


def walk(level: float) -> Walk:
    model = Walk(Config(), SPACE)
    model.weight.data.fill_(level)
    return model.requires_grad_(False)


class Desk:
    """An engine whose models come and go; a loader that takes as long as the test wants."""

    def __init__(self, budget: int | None, weight: int = 100) -> None:
        self.now, self.weight = 0.0, weight
        self.asked: list[str] = []
        self.told: dict[str, list[Message]] = defaultdict(list)
        self.engine = Engine(lambda job, message, final: self.told[job].append(message), clock=lambda: self.now)
        self.residency = Residency(self.engine, self.asked.append, budget, clock=lambda: self.now)
        self.models: list[weakref.ref[Walk]] = []
        self.handed_back: list[Job] = []
        self.broken: set[str] = set()

    def hear(self, news: News) -> None:
        begin, back = self.residency.hear(news)
        self.handed_back += back
        for job in begin:
            self.begin(job)

    def serve(self, *names: str, version: str = "1") -> None:
        """They are found, and tried one after the other."""
        for name in names:
            self.hear(Found(name, version, self.weight))
        self.hear(Scanned())
        self.settle()

    def settle(self) -> None:
        """Until nothing is left to do."""
        while self.step():
            pass

    def load(self, seconds: float = 0.5) -> None:
        """The loader is done with what it was asked for."""
        name = self.asked.pop(0)
        self.now += seconds
        version = self.residency._on_disk.get(name, "1")
        if name in self.broken:
            self.hear(Refused(name, version, "broken"))
            return
        model = walk(0.1 * int(name[-1]) + 0.01 * int(version))
        self.models.append(weakref.ref(model))
        self.hear(Loaded(name, version, self.engine.warm(name, model), self.weight, seconds))

    def step(self) -> bool:
        self.now += 0.01
        self.residency.pump()
        assert len(self.asked) <= 1, "one at a time"
        if self.asked:
            self.load()
            return True
        return self.engine.step()

    def ask(self, job_id: str, model: str, task: Generate, timeout: float | None = None) -> None:
        job = Job(job_id, model, b"", task.n, 1, timeout=timeout)
        self.tasks = {**getattr(self, "tasks", {}), job_id: task}
        if self.residency.admit(job):
            self.begin(job)

    def begin(self, job: Job) -> None:
        self.engine.submit(job.id, job.model, self.tasks[job.id], job.priority, job.timeout, job.queued_seconds)

    def images(self, job: str) -> dict[int, bytes]:
        return {m.sample: m.pixels.tobytes() for m in self.told[job] if isinstance(m, ImageDone)}

    def alive(self) -> int:
        return sum(model() is not None for model in self.models)


NAMES = [f"walk{k}" for k in range(5)]


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_jobs_get_the_same_bytes_with_room_for_two_models_as_with_room_for_all(seed: int) -> None:
    rng = random.Random(seed)
    tight, roomy = Desk(budget=200), Desk(budget=None)
    for desk in (tight, roomy):
        desk.serve(*NAMES)
        assert desk.residency.ready
    assert tight.alive() == 2
    assert roomy.alive() == 5
    for k in range(40):
        task = Generate(rng.randint(1, 3), rng.getrandbits(32), rng.randint(1, 12))
        model = rng.choice(NAMES)
        for desk in (tight, roomy):
            desk.ask(f"job{k}", model, task)
            for _ in range(rng.randrange(4)):
                desk.step()
                assert desk is roomy or desk.alive() <= 2
    for desk in (tight, roomy):
        desk.settle()
        assert all(isinstance(desk.told[f"job{k}"][-1], Completed) for k in range(40))
        assert desk.engine.jobs == 0
        assert desk.residency.waiting() == []
    assert all(tight.images(f"job{k}") == roomy.images(f"job{k}") for k in range(40))
    assert tight.alive() == 2, "what was unloaded is gone, without help of the garbage collector"
    states = tight.residency.states
    assert sum(state.resident for state in states.values()) == 2
    assert sum(state.loads - state.unloads for state in states.values()) == 2
    assert sum(state.load_seconds for state in states.values()) == pytest.approx(
        0.5 * sum(state.loads for state in states.values())
    )
    assert {state.unloads for state in roomy.residency.states.values()} == {0}


def test_rows_that_run_are_not_thrown_away_and_others_go_on_while_a_model_is_loaded() -> None:
    desk = Desk(budget=200)
    desk.serve("walk0", "walk1", "walk2")
    desk.ask("long", "walk1", Generate(1, 1, 500))
    desk.ask("other", "walk2", Generate(1, 1, 600))
    desk.ask("waits", "walk0", Generate(1, 1, 3))
    for _ in range(300):  # longer than STAY times what loading took
        desk.now += 0.01
        desk.residency.pump()
        assert desk.engine.step()
    assert not desk.residency.states["walk1"].resident, "it takes no more jobs, to make room"
    assert desk.told["long"]
    assert not desk.asked, "but its own one runs on"
    while not desk.asked:
        desk.now += 0.01
        desk.residency.pump()
        desk.engine.step()
    assert isinstance(desk.told["long"][-1], Completed)
    before = len(desk.told["other"])
    for _ in range(60):
        desk.now += 0.01
        assert desk.engine.step(), "while walk0 is read"
    assert len(desk.told["other"]) > before
    desk.settle()
    assert isinstance(desk.told["waits"][-1], Completed)
    assert isinstance(desk.told["other"][-1], Completed)


def test_models_whose_jobs_never_end_coming_take_turns() -> None:
    """Room for one model, and always jobs for three: each gets its turn, and loading takes no more than its part."""
    desk, seconds = Desk(budget=100), 20.0
    desk.serve(*NAMES[:3])
    began, asked = desk.now, dict.fromkeys(NAMES[:3], 0)
    while desk.now - began < seconds:
        for name in asked:
            last = desk.told[f"{name}-{asked[name]}"]
            if not asked[name] or (last and isinstance(last[-1], Completed)):
                asked[name] += 1
                desk.ask(f"{name}-{asked[name]}", name, Generate(1, asked[name], 5))
        desk.step()
    assert min(asked.values()) > 0.5 * max(asked.values()) > 2
    loads = sum(state.loads for state in desk.residency.states.values()) - 3
    assert 3 <= loads <= seconds / (1 + STAY) / 0.5 + 1, "a load takes half a second"


def test_a_model_that_is_too_heavy_alone_is_failed_and_says_so() -> None:
    desk = Desk(budget=3 * 2**20, weight=5 * 2**20)
    desk.serve("walk0")
    assert desk.residency.ready
    state = desk.residency.states["walk0"]
    assert (state.status, state.resident) == ("failed", False)
    assert state.error == "it takes 5.0 MiB, more than model_memory (3.0 MiB) allows"
    desk.hear(Found("walk1", "1", 10))  # its file is small, but what it makes of it is not
    desk.settle()
    assert desk.residency.states["walk1"].error == state.error
    desk.ask("a", "walk1", Generate(1, 1, 1))
    assert isinstance(desk.told["a"][-1], Failed)


def test_a_model_that_cannot_be_loaded_again_hands_its_jobs_back() -> None:
    desk = Desk(budget=100)
    desk.serve("walk0", "walk1")
    desk.broken.add("walk0")
    desk.ask("a", "walk0", Generate(1, 1, 1))
    desk.settle()
    assert [job.id for job in desk.handed_back] == ["a"]
    assert desk.residency.states["walk0"].status == "failed"
    desk.hear(Gone("walk0"))
    assert "walk0" not in desk.residency.states


def test_a_job_that_waits_for_its_model_can_be_cancelled_and_expires() -> None:
    desk = Desk(budget=100)
    desk.serve("walk0", "walk1")
    desk.ask("late", "walk0", Generate(1, 1, 1), timeout=3.0)
    desk.ask("unwanted", "walk0", Generate(1, 1, 1))
    assert desk.residency.forget("unwanted")
    assert not desk.residency.forget("unwanted")
    desk.now += 2.9
    assert desk.residency.expired() == []
    desk.now += 0.2
    assert desk.residency.expired() == ["late"]
    assert desk.residency.forget("late")
    loads = desk.residency.states["walk0"].loads
    desk.settle()
    assert desk.residency.states["walk0"].loads == loads, "nobody wants it any longer"


def test_what_is_asked_for_is_tried_before_what_nobody_asks_for() -> None:
    desk = Desk(budget=None)
    for name in NAMES:
        desk.hear(Found(name, "1", 100))
    desk.hear(Scanned())
    assert desk.residency.here() == []
    assert desk.residency.absent() == NAMES
    desk.residency.pump()
    assert desk.asked == ["walk0"], "the first one is being tried"
    for name in ("walk3", "walk4", "walk3"):
        desk.ask(f"{name}-{len(desk.residency.waiting())}", name, Generate(1, 1, 1))
    assert desk.residency.forget("walk4-1"), "a cancelled one"
    order = []
    while not desk.residency.ready:
        order += desk.asked
        desk.load()
        desk.residency.pump()
    assert order == ["walk0", "walk3", "walk4", "walk1", "walk2"]
    desk.settle()
    assert all(isinstance(desk.told[name][-1], Completed) for name in ("walk3-0", "walk3-2"))
    assert desk.residency.here() == NAMES


def test_a_refused_version_leaves_the_one_that_worked_in_memory_for_as_long_as_there_is_room() -> None:
    desk = Desk(budget=200)
    desk.serve("walk0", "walk1")
    desk.broken.add("walk0")
    desk.serve("walk0", version="2")
    assert desk.residency.states["walk0"].error == "a newer version was refused: broken"
    assert desk.residency.states["walk0"].status == "ready"
    desk.now += 10
    desk.residency.touch("walk1")
    desk.serve("walk2")
    assert {n for n, s in desk.residency.states.items() if s.resident} == {"walk0", "walk2"}, (
        "walk0 was not used for longer, but could not be read again"
    )


def test_a_new_version_takes_the_place_of_the_old_one_with_room_for_one_alone() -> None:
    desk = Desk(budget=100)
    desk.serve("walk3")
    desk.ask("old", "walk3", Generate(1, 1, 400))
    desk.step()
    desk.hear(Found("walk3", "2", 100))
    desk.settle()
    assert isinstance(desk.told["old"][-1], Completed)
    state = desk.residency.states["walk3"]
    assert (state.sha256, state.loads, state.resident) == ("2", 2, True)
    assert desk.alive() == 1


# ------------------------------------------------------------------------------------------------------------- loading


def test_the_loader_tells_what_it_finds_and_what_a_model_weighs(tmp_path: Path) -> None:
    for k, (family, config) in enumerate((("ddpm", DDPM), ("gan", GAN), ("vae", VAE))):
        write(tmp_path, f"m{k}", family, config)
    (tmp_path / "m1" / "weights.safetensors").write_bytes(b"nothing of the kind")
    told: list[News] = []
    loader = Loader(tmp_path, "cpu", Engine(lambda *_: None).warm, told.append)
    loader._scan()
    found = {news.name: news for news in told if isinstance(news, Found)}
    assert sorted(found) == ["m0", "m1", "m2"]
    assert isinstance(told[-1], Scanned)
    for name in ("m0", "m2"):
        loaded = loader._read(name)
        assert isinstance(loaded, Loaded)
        model = loaded.warm.model
        weights = sum(p.nbytes for p in [*model.parameters(), *model.buffers()])
        assert weights <= loaded.weight <= 2 * weights
        assert loaded.version == found[name].version
        alive = weakref.ref(model)
        del model, loaded
        assert alive() is None, "a model that was warmed up can go without the garbage collector"
    refused = loader._read("m1")
    assert isinstance(refused, Refused)
    assert "weights.safetensors" in refused.error
    told.clear()
    loader._scan()
    assert told == [Scanned()], "what was seen is not told again"


def test_what_two_parameters_share_weighs_once() -> None:
    model = walk(0.5)
    alone = weigh(model)
    model.table = torch.zeros(1000)
    model.kept = {"again": [model.table[10:], model.table]}
    assert weigh(model) == alone + 4000


def test_a_state_survives_its_way_over_the_wire() -> None:
    assert ModelState(**{"status": "ready", "resident": False}).resident is False
