"""The training loop: resume bit for bit, what a step is, what the groups owe each other, several devices."""

from __future__ import annotations

import io
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import toy_training as toy
from hypothesis import given
from hypothesis import strategies as st
from lightning_fabric import Fabric
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from toy_training import Config, Model, toy_run

import models
from models import _checkpoint, _protocol, vae
from models._protocol import Batch, Denoiser, ImageSpace
from training import loop
from training import state as states
from training.config import AdamW, Run
from training.errors import Diverged, RunError
from training.loop import train
from training.progress import Progress
from training.state import State

ROOT = Path(toy.__file__).parents[1]
Objective = Iterator[tuple[str, Tensor, Mapping[str, Tensor]]]


class Stopped(BaseException):
    """The process is stopped: nothing may catch it."""


@pytest.fixture(autouse=True)
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "family", lambda name: toy)


def go(out: Path, run: Run) -> Model:
    precision: Literal["bf16-mixed", "32-true"] = "bf16-mixed" if run.precision == "bf16" else "32-true"
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    progress = Progress(out / "events", Console(file=io.StringIO()), quiet=True)
    model = train(run, toy.dataset(), out, fabric, progress).average
    assert isinstance(model, Model)
    return model


def tensors(out: Path) -> dict[str, Tensor]:
    """The resume state: weights, averaged weights, moments, random generator."""
    return load_file(out / "resume" / "state.safetensors") | load_file(out / "resume" / "random-0.safetensors")


def assert_same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def at_step(step: int, act: Callable[[Model], None]) -> Callable[[Model, Batch], Objective]:
    """The toy's objective, with `act` before it at one step."""

    def objective(model: Model, batch: Batch) -> Objective:
        if batch.step == step:
            act(model)
        yield from toy.two_losses(model, batch)

    return objective


def stop(model: Model) -> None:
    raise Stopped


# --------------------------------------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("stop_at", [0, 3, 10, 19])
def test_an_interrupted_run_ends_bit_for_bit_like_a_straight_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, channels_last: bool, stop_at: int
) -> None:
    run = toy_run(precision=precision, channels_last=channels_last, checkpoint_every=5)
    straight = go(tmp_path / "straight", run)
    with monkeypatch.context() as patch:
        patch.setattr(toy, "objective", at_step(stop_at, stop))
        with pytest.raises(Stopped):
            go(tmp_path / "stopped", run)
    torch.manual_seed(99)  # whatever the process did in between
    again = go(tmp_path / "stopped", run)
    assert_same(again.state_dict(), straight.state_dict())
    state = tensors(tmp_path / "straight")
    assert_same(tensors(tmp_path / "stopped"), state)
    parts = {name.split(".")[0] for name in state}
    assert parts == {"model", "average", "conv", "linear", "cpu"}, "all that a run is was compared"
    assert {"conv.0.step", "conv.0.exp_avg", "conv.0.exp_avg_sq"} <= state.keys()


def test_without_the_random_generator_or_the_moments_a_resumed_run_would_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The test above can fail: each part of the state matters to the toy."""
    straight = go(tmp_path / "straight", toy_run())
    with monkeypatch.context() as patch:
        patch.setattr(toy, "objective", at_step(10, stop))
        with pytest.raises(Stopped):
            go(tmp_path / "stopped", toy_run())
    for name, spoil in [("random-0", "cpu"), ("state", "linear.0.exp_avg"), ("state", "average.conv.weight")]:
        shutil.copytree(tmp_path / "stopped", tmp_path / spoil)
        file = tmp_path / spoil / "resume" / f"{name}.safetensors"
        kept = load_file(file)
        kept[spoil] = torch.Generator().manual_seed(1).get_state() if spoil == "cpu" else kept[spoil] + 1
        save_file(kept, file)
        assert not torch.equal(go(tmp_path / spoil, toy_run()).conv.weight, straight.conv.weight), spoil


@pytest.mark.parametrize("operation", ["mkdir", "rename", "rmtree"])
@pytest.mark.parametrize("after", range(3))
def test_a_stop_while_the_state_is_saved_leaves_the_last_state_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, operation: str, after: int
) -> None:
    run = toy_run(checkpoint_every=5)
    straight = go(tmp_path / "straight", run)
    owner = shutil if operation == "rmtree" else Path
    real, left = getattr(owner, operation), [after]

    def stopping(*args: Any, **keywords: Any) -> Any:
        if left[0] == 0:
            raise Stopped
        left[0] -= 1
        return real(*args, **keywords)

    saved: list[int] = []

    def save(state: State, *args: Any) -> None:
        real_save(state, *args)
        saved.append(state.step)

    real_save = states.save
    with monkeypatch.context() as patch:
        patch.setattr(owner, operation, stopping)
        patch.setattr(states, "save", save)
        with pytest.raises(Stopped):
            go(tmp_path / "stopped", run)
    places = [tmp_path / "stopped" / name / "state.json" for name in ("resume", "resume.previous")]
    kept = [json.loads(file.read_text())["step"] for file in places if file.exists()]
    assert max(kept, default=0) >= max(saved, default=0), "what was saved is never lost"
    assert_same(go(tmp_path / "stopped", run).state_dict(), straight.state_dict())
    assert_same(tensors(tmp_path / "stopped"), tensors(tmp_path / "straight"))
    assert {p.name for p in (tmp_path / "stopped").iterdir()} == {"resume"}


def test_a_finished_run_is_not_trained_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = go(tmp_path, toy_run())
    monkeypatch.setattr(toy, "objective", at_step(0, stop))
    assert_same(go(tmp_path, toy_run()).state_dict(), first.state_dict())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"steps": 30}, "steps"),
        ({"config": Config(noise=0.2)}, "config"),
        ({"seed": 1, "batch_size": 4}, "batch_size, seed"),
        ({"optimisers": {"conv": AdamW(1e-3), "linear": AdamW(1e-2)}}, "optimisers"),
    ],
)
def test_another_runs_state_is_refused_by_what_differs(tmp_path: Path, changes: dict[str, Any], named: str) -> None:
    go(tmp_path, toy_run())
    before = tensors(tmp_path)
    with pytest.raises(RunError, match=rf"resume: the state of another run \({named} differ\)"):
        go(tmp_path, toy_run(**changes))
    assert_same(tensors(tmp_path), before)


def test_a_state_of_another_version_of_the_network_is_refused_by_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go(tmp_path, toy_run())
    file = tmp_path / "resume" / "state.safetensors"
    kept = load_file(file)
    for changed, message in [
        (kept | {"model.conv.bias": torch.zeros(1)}, r"model\.conv\.bias is \(1,\) there, \(3,\) here"),
        (kept | {"model.old": torch.zeros(2)}, r"model\.old is \(2,\) there, missing here"),
        ({k: v for k, v in kept.items() if k != "average.chain"}, r"average\.chain is missing there, \(4,\) here"),
    ]:
        save_file(changed, file)
        with pytest.raises(RunError, match=f"another version of toy wrote it: {message}"):
            go(tmp_path, toy_run())


def test_how_often_a_run_saves_is_no_part_of_what_it_is(tmp_path: Path) -> None:
    first = go(tmp_path, toy_run())
    assert_same(go(tmp_path, toy_run(checkpoint_every=3)).state_dict(), first.state_dict())


def test_the_seconds_of_all_parts_of_a_run_add_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds() -> float:
        about: dict[str, float] = json.loads((tmp_path / "resume" / "state.json").read_text())
        return about["seconds"]

    with monkeypatch.context() as patch:
        patch.setattr(toy, "objective", at_step(15, stop))
        with pytest.raises(Stopped):
            go(tmp_path, toy_run())
    before = seconds()
    began = time.perf_counter()
    go(tmp_path, toy_run())
    assert 0 < before < seconds() < before + time.perf_counter() - began


# ---------------------------------------------------------------------------------------------------------------- begin


def test_the_same_run_gives_the_same_weights_and_another_seed_others(tmp_path: Path) -> None:
    a = go(tmp_path / "a", toy_run())
    torch.manual_seed(5)
    b, c = go(tmp_path / "b", toy_run()), go(tmp_path / "c", toy_run(seed=1))
    assert_same(a.state_dict(), b.state_dict())
    assert not torch.equal(a.conv.weight, c.conv.weight)


def test_preparation_sees_the_training_data_once_and_a_resumed_run_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert go(tmp_path, toy_run(batch_size=16)).prepared == toy.SIZE
    monkeypatch.setattr(Model, "prepare", lambda self, batches: stop(self))
    assert go(tmp_path, toy_run(batch_size=16)).prepared == toy.SIZE


@pytest.mark.parametrize("storage", ["fp32", "fp16"])
def test_the_conclusion_sees_the_data_once_and_the_averaged_weights_as_they_are_stored(
    tmp_path: Path, storage: Literal["fp32", "fp16"]
) -> None:
    run = toy_run(batch_size=16, storage=storage)
    first = go(tmp_path, run)
    weight = tensors(tmp_path)["average.conv.weight"].flatten()[0]
    stored = weight.half().float() if storage == "fp16" else weight
    assert first.concluded[:3].tolist() == [toy.SIZE, run.steps, stored]
    assert tensors(tmp_path)["average.concluded"].tolist() == [0, 0, 0, 0], "no resumed run concludes twice"
    torch.manual_seed(7)
    assert_same(go(tmp_path, run).state_dict(), first.state_dict())


def test_what_is_concluded_from_is_what_is_loaded(tmp_path: Path) -> None:
    model = go(tmp_path, toy_run(storage="fp16"))
    _checkpoint.save(tmp_path / "m", model, Config(), {}, half=True)
    assert_same(_checkpoint.load(tmp_path / "m").state_dict(), model.state_dict())


class Student(Model, Denoiser):
    """The toy, as a student and as its own teacher."""

    def begin_from(self, teacher: _protocol.Model) -> None:
        assert self.prepared == 0
        with torch.no_grad():
            self.linear.weight.copy_(teacher.get_parameter("linear.weight"))

    def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
        return x


@pytest.fixture
def teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(toy, "Model", Student)
    torch.manual_seed(11)
    _checkpoint.save(tmp_path / "teacher", Student(Config(), toy.SPACE), Config(), {"metrics": {}})
    return tmp_path / "teacher"


def test_a_student_begins_from_its_teacher_meets_it_with_every_batch_and_never_holds_it(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _checkpoint.load(teacher)
    seen: list[Denoiser | None] = []

    def objective(model: Model, batch: Batch) -> Objective:
        if batch.step == 0:
            assert torch.equal(model.linear.weight, first.get_parameter("linear.weight"))
        seen.append(batch.teacher)
        yield from toy.two_losses(model, batch)

    monkeypatch.setattr(toy, "objective", objective)
    run = toy_run(teacher=str(teacher), checkpoint_every=5)
    straight = go(tmp_path / "straight", run)
    assert straight.state_dict().keys() == first.state_dict().keys()
    assert len(seen) == run.steps
    assert len({id(each) for each in seen}) == 1
    assert isinstance(seen[0], Student)
    assert not seen[0].training
    assert not any(p.requires_grad for p in seen[0].parameters())
    assert_same(seen[0].state_dict(), first.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(toy, "objective", at_step(10, stop))
        with pytest.raises(Stopped):
            go(tmp_path / "stopped", run)
    monkeypatch.setattr(Student, "begin_from", stop)
    assert_same(go(tmp_path / "stopped", run).state_dict(), straight.state_dict())


def test_a_run_is_not_taken_up_with_another_teacher(tmp_path: Path, teacher: Path) -> None:
    run = toy_run(teacher=str(teacher))
    go(tmp_path / "out", run)
    go(tmp_path / "out", toy_run(teacher=str(shutil.copytree(teacher, tmp_path / "moved"))))
    _checkpoint.save(teacher, Student(Config(), toy.SPACE), Config(), {})
    with pytest.raises(RunError, match=r"the state of another run \(teacher differ\)"):
        go(tmp_path / "out", run)


def test_a_teacher_that_cannot_teach_is_refused_by_what_is_wrong(
    tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RunError, match="teacher: 'nobody' is no checkpoint folder, and zoo/ has none of that name"):
        go(tmp_path / "out", toy_run(teacher="nobody"))
    _checkpoint.save(tmp_path / "small", Student(Config(), ImageSpace(4, 4, 2, ("a", "b", "c"))), Config(), {})
    with pytest.raises(RunError, match="small: its images or labels are not those of the data"):
        go(tmp_path / "out", toy_run(teacher=str(tmp_path / "small")))
    monkeypatch.setattr(Student, "begin_from", Model.begin_from)
    with pytest.raises(RunError, match="toy: teacher: this family learns from data alone"):
        go(tmp_path / "out", toy_run(teacher=str(teacher)))
    monkeypatch.setattr(toy, "Model", Model)
    with pytest.raises(RunError, match="teacher: a toy is no denoiser"):
        go(tmp_path / "out", toy_run(teacher=str(teacher)))


def test_a_run_of_no_steps_is_its_preparation(tmp_path: Path) -> None:
    model = go(tmp_path, toy_run(steps=0, batch_size=20))
    assert model.prepared == toy.SIZE, "each image once, though the last batch is not full"
    assert model.seen == 0


def test_a_batch_is_images_in_the_unit_interval_with_their_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Batch] = []

    def objective(model: Model, batch: Batch) -> Objective:
        seen.append(batch)
        yield from toy.two_losses(model, batch)

    monkeypatch.setattr(toy, "objective", objective)
    go(tmp_path, toy_run(steps=6, batch_size=8))  # one epoch
    assert [batch.step for batch in seen] == list(range(6))
    assert {batch.steps for batch in seen} == {6}
    split = toy.dataset().splits["train"]
    x, labels = torch.cat([b.x for b in seen]), torch.cat([b.labels for b in seen])
    assert (x.dtype, labels.dtype) == (torch.float32, torch.int64)
    expected = sorted(zip(split.x.reshape(toy.SIZE, -1).tolist(), split.labels.tolist(), strict=True))
    assert sorted(zip((x * 255).round().flatten(1).tolist(), labels.tolist(), strict=True)) == expected
    assert torch.equal(x, (x * 255).round() / 255)


@pytest.mark.parametrize("names", [[], ["conv"], ["conv", "linear", "critic"], ["conv", "head"]])
def test_optimisers_that_are_not_the_models_groups_are_refused_by_name(tmp_path: Path, names: list[str]) -> None:
    with pytest.raises(RunError, match=r"optimisers: the run has .*, toy has groups \['conv', 'linear'\]"):
        go(tmp_path, toy_run(optimisers={name: AdamW(1e-3) for name in names}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": -1}, "steps: -1"),
        ({"batch_size": 0}, "batch_size: 0"),
        ({"checkpoint_every": 0}, "checkpoint_every: 0"),
        ({"ema": 1.0}, "ema: 1.0"),
        ({"ema": -0.1}, "ema: -0.1"),
        ({"warmup": -1}, "warmup: -1"),
        ({"clip": 0.0}, "clip: 0.0"),
    ],
)
def test_a_run_that_makes_no_sense_is_refused_by_field(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        toy_run(**changes)


def test_a_config_that_its_family_refuses_is_refused_with_the_familys_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    run = toy_run(family="vae", config=vae.Config())
    with pytest.raises(RunError, match="vae: image: 6×5; width and height must be multiples of 4"):
        go(tmp_path, run)


# ------------------------------------------------------------------------------------------------------------- one step


@given(warmup=st.integers(0, 50), steps=st.integers(1, 200))
def test_the_learning_rate_warms_up_in_a_line_and_decays_by_half_a_cosine(warmup: int, steps: int) -> None:
    run = toy_run(warmup=warmup, steps=steps)
    factors = [loop.lr_factor(run, step) for step in range(steps)]
    assert all(0 < f <= 1 for f in factors)
    for step, f in enumerate(factors[:warmup]):
        assert f == pytest.approx((step + 1) / warmup)
    for step, f in enumerate(factors[warmup:]):
        assert f == pytest.approx(math.cos(math.pi / 2 * step / (steps - warmup)) ** 2)
    if warmup < steps:
        assert loop.lr_factor(run, steps) == pytest.approx(0, abs=1e-12)
    constant = toy_run(warmup=warmup, steps=steps, decay="constant")
    assert {loop.lr_factor(constant, step) for step in range(warmup, steps)} <= {1.0}


def test_a_restarted_run_begins_like_the_run_that_ends_there() -> None:
    whole, first = toy_run(warmup=5, steps=60, restarts=(30, 50)), toy_run(warmup=5, steps=30)
    factors = [loop.lr_factor(whole, step) for step in range(60)]
    assert factors[:30] == [loop.lr_factor(first, step) for step in range(30)]
    assert factors[30] == 0.5
    assert factors[50] == 0.25
    assert factors[30:50] == sorted(factors[30:50], reverse=True)
    assert factors[49] < 0.01
    assert loop.lr_factor(whole, 60) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("restarts", [(30, 20), (20, 20), (3,), (60,)])
def test_restarts_lie_in_order_within_the_run(restarts: tuple[int, ...]) -> None:
    with pytest.raises(RunError, match="restarts"):
        toy_run(warmup=5, steps=60, restarts=restarts)


def test_restarts_move_along_with_the_number_of_steps() -> None:
    run = toy_run(warmup=5, steps=60, restarts=(30, 50))
    assert run.lasting(60) == run
    assert run.lasting(120).restarts == (60, 100)
    assert run.lasting(8).restarts == (7,), "after 4, none: it is still warming up"
    assert run.lasting(1).restarts == ()
    assert run.lasting(0).steps == 0


def linear_pull(model: Model, batch: Batch) -> Objective:
    """A loss with gradient 1 on every weight of each group: Adam without memory then steps by the learning rate."""
    yield "conv", model.conv.weight.sum(), {}
    yield "linear", model.linear.weight.sum(), {}


def test_each_group_steps_by_its_own_scheduled_learning_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = toy_run(
        optimisers={"conv": AdamW(0.25, betas=(0.0, 0.0)), "linear": AdamW(0.01, betas=(0.0, 0.0))}, clip=None
    )
    at: list[tuple[float, float]] = []

    def objective(model: Model, batch: Batch) -> Objective:
        at.append((float(model.conv.weight.detach()[0, 0, 0, 0]), float(model.linear.weight.detach()[0, 0])))
        yield from linear_pull(model, batch)

    monkeypatch.setattr(toy, "objective", objective)
    go(tmp_path, run)
    for step in range(run.steps - 1):
        for group, lr in enumerate((0.25, 0.01)):
            moved = at[step][group] - at[step + 1][group]
            assert moved == pytest.approx(lr * loop.lr_factor(run, step), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5, 1e6])
def test_a_groups_gradient_is_clipped_to_its_norm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip: float | None
) -> None:
    monkeypatch.setattr(toy, "objective", linear_pull)
    go(tmp_path, toy_run(steps=1, clip=clip))
    state = tensors(tmp_path)
    for name in ("conv", "linear"):
        weight = state[f"model.{name}.weight"]
        gradient = state[f"{name}.0.exp_avg"] / (1 - 0.9)  # after one step: (1 − β₁) g
        norm = math.sqrt(weight.numel())
        expected = 1.0 if clip is None else min(1.0, clip / norm)
        assert torch.allclose(gradient, torch.full_like(weight, expected), rtol=1e-4)


def test_a_gradient_that_two_parameters_share_is_clipped_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of two weights hands autograd one and the same tensor for both."""

    def objective(model: Model, batch: Batch) -> Objective:
        assert model.conv.bias is not None
        yield "conv", 3 * (model.conv.bias[:2] + model.unused).sum(), {}
        yield "linear", model.linear.weight.sum(), {}

    monkeypatch.setattr(toy, "objective", objective)
    go(tmp_path, toy_run(steps=1, clip=1.0))
    state = tensors(tmp_path)
    gradients = torch.cat([state[f"conv.{i}.exp_avg"].flatten() for i in (1, 2)]) / (1 - 0.9)
    assert gradients.norm() == pytest.approx(1.0, rel=1e-4)
    assert gradients[gradients != 0].tolist() == pytest.approx([0.5] * 4, rel=1e-4)


def test_the_average_follows_its_formula_and_buffers_are_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history: list[dict[str, Tensor]] = []

    def keep(model: Model, batch: Batch) -> Objective:
        history.append({name: p.detach().clone().double() for name, p in model.named_parameters()})
        yield from toy.two_losses(model, batch)

    monkeypatch.setattr(toy, "objective", keep)
    run = toy_run(ema=0.6)
    averaged = go(tmp_path, run)
    state = tensors(tmp_path)
    history.append({name: state[f"model.{name}"].double() for name in history[0]})
    for name, parameter in averaged.named_parameters():
        expected = history[0][name]
        for step in range(run.steps):
            d = min(0.6, (1 + step) / (10 + step))
            expected = d * expected + (1 - d) * history[step + 1][name]
        assert torch.allclose(parameter.double(), expected, atol=1e-6)
    assert not torch.allclose(averaged.conv.weight, state["model.conv.weight"], atol=1e-4)
    for name in ("chain", "seen"):
        assert torch.equal(averaged.get_buffer(name), state[f"model.{name}"])
    assert averaged.seen == run.steps


def test_the_exported_average_is_evaluating_and_frozen(tmp_path: Path) -> None:
    model = go(tmp_path, toy_run(steps=2))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())


# --------------------------------------------------------------------------------------------- two groups, two losses


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_later_loss_sees_the_weights_after_the_earlier_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """As a generator's loss must see the updated critic. Under autocast the layer itself must see it, not only who
    looks at the weights: autocast keeps bfloat16 copies."""
    outputs: list[tuple[Tensor, Tensor, Tensor]] = []

    def objective(model: Model, batch: Batch) -> Objective:
        h = torch.ones(1, model.linear.in_features)
        before = model.linear(h)
        yield "linear", before.float().square().sum() + before.float().sum(), {}
        after = model.linear(h)
        weight, bias = (p.detach().to(before.dtype) for p in model.linear.parameters())
        with torch.autocast("cpu", enabled=False):
            expected = nn.functional.linear(h.to(before.dtype), weight, bias)
        outputs.append((before.detach(), after.detach(), expected))
        yield "conv", model.conv.weight.square().sum(), {}

    monkeypatch.setattr(toy, "objective", objective)
    go(tmp_path, toy_run(steps=3, precision=precision))
    assert len(outputs) == 3
    for before, after, expected in outputs:
        assert before.dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
        assert torch.equal(after, expected)
        assert not torch.equal(before, after)


def test_a_loss_leaves_no_gradient_on_another_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses depend on both groups; each is to move its own alone."""
    seen: list[list[Tensor]] = []

    def objective(model: Model, batch: Batch) -> Objective:
        losses = toy.two_losses(model, batch)
        weights = [p.detach().clone() for p in model.conv.parameters()]
        yield next(losses)
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(p, q) for p, q in zip(model.conv.parameters(), weights, strict=True))
        between = [p.detach().clone() for p in model.linear.parameters()]
        yield next(losses)
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(p, q) for p, q in zip(model.linear.parameters(), between, strict=True))
        seen.append(between)

    monkeypatch.setattr(toy, "objective", objective)
    go(tmp_path, toy_run(steps=3))
    assert len(seen) == 3
    assert not torch.equal(seen[0][0], seen[1][0]), "and its own it does move"


def test_a_parameter_that_no_loss_uses_stays_as_it_is(tmp_path: Path) -> None:
    """No gradient is not a gradient of zero: not even weight decay applies."""
    model = go(tmp_path, toy_run())
    assert model.unused.tolist() == [1.0, 1.0]
    assert not any(name.startswith("conv.2.") for name in tensors(tmp_path))


def test_a_group_may_be_updated_several_times_a_step_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def objective(model: Model, batch: Batch) -> Objective:
        for _ in range(3):
            yield "linear", model.linear.weight.square().sum(), {}
        if batch.step % 2:
            yield "conv", model.conv.weight.square().sum(), {}

    monkeypatch.setattr(toy, "objective", objective)
    go(tmp_path, toy_run(steps=4))
    state = tensors(tmp_path)
    assert [int(state[f"{name}.0.step"]) for name in ("linear", "conv")] == [12, 2]


# ----------------------------------------------------------------------------------------------------------- divergence


def nan_loss(model: Model, batch: Batch) -> Objective:
    for name, loss, metrics in toy.two_losses(model, batch):
        yield name, loss * float("nan") if batch.step == 12 and name == "linear" else loss, metrics


def infinite_gradient(model: Model, batch: Batch) -> Objective:
    """A finite loss, √0, whose gradient is not."""
    for name, loss, metrics in toy.two_losses(model, batch):
        yield name, loss + (loss - loss.detach()).sqrt() if batch.step == 12 and name == "conv" else loss, metrics


@pytest.mark.parametrize("sick", [nan_loss, infinite_gradient])
@pytest.mark.parametrize("checkpoint_every", [1, 5, 10])
def test_divergence_stops_the_run_and_keeps_the_last_good_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sick: Callable[[Model, Batch], Objective], checkpoint_every: int
) -> None:
    run = toy_run(checkpoint_every=checkpoint_every)
    straight = go(tmp_path / "straight", run)
    with monkeypatch.context() as patch:
        patch.setattr(toy, "objective", sick)
        with pytest.raises(Diverged, match="toy: loss or gradient no longer finite at step"):
            go(tmp_path / "sick", run)
    good = json.loads((tmp_path / "sick" / "resume" / "state.json").read_text())["step"]
    assert good == 12 // checkpoint_every * checkpoint_every
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "sick").values() if tensor.is_floating_point())
    assert_same(go(tmp_path / "sick", run).state_dict(), straight.state_dict())


# ------------------------------------------------------------------------------------------------------ several devices


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the toy's script fills."""
    out = tmp_path_factory.mktemp("two")
    done = subprocess.run(
        [sys.executable, toy.__file__, str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def devices(folder: Path) -> list[dict[str, Tensor]]:
    return [load_file(folder / f"device-{i}.safetensors") for i in (0, 1)]


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="two devices are two forked processes here")


@pytest.mark.slow
@pytest.mark.xdist_group("two devices")
@needs_fork
def test_two_devices_take_the_steps_of_one_with_the_whole_batch(two_devices: Path, tmp_path: Path) -> None:
    """Without noise, the mean of the shares' gradients is the gradient of the batch: so are its moments."""
    go(tmp_path, toy.plain_run())
    one = load_file(tmp_path / "resume" / "state.safetensors")
    first, second = devices(two_devices / "plain")
    assert_same(first, second)
    assert one.keys() == first.keys()
    assert one.pop("average.concluded").eq(0).all(), "the state that is resumed from is not concluded, the devices' is"
    for name, tensor in one.items():
        assert (tensor - first[name]).abs().max() <= 1e-4 * tensor.abs().max(), name


@pytest.mark.slow
@pytest.mark.xdist_group("two devices")
@needs_fork
def test_two_devices_have_noise_of_their_own_and_stay_in_step(two_devices: Path) -> None:
    first, second = devices(two_devices / "straight")
    assert_same(first, second)
    assert first["model.chain"].abs().min() > 0
    random = [load_file(two_devices / "straight" / "resume" / f"random-{i}.safetensors")["cpu"] for i in (0, 1)]
    assert not torch.equal(random[0], random[1])


@pytest.mark.slow
@pytest.mark.xdist_group("two devices")
@needs_fork
def test_two_killed_devices_resume_bit_for_bit(two_devices: Path) -> None:
    assert 0 < json.loads((two_devices / "killed-at.json").read_text())["step"] < 60
    for killed, straight in zip(devices(two_devices / "killed"), devices(two_devices / "straight"), strict=True):
        assert_same(killed, straight)
    for i in (0, 1):
        name = Path("resume") / f"random-{i}.safetensors"
        assert_same(load_file(two_devices / "killed" / name), load_file(two_devices / "straight" / name))


def test_a_batch_that_cannot_be_shared_evenly_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fabric, "world_size", 3)
    with pytest.raises(RunError, match="batch_size: 8 images cannot be shared evenly by 3 devices"):
        go(tmp_path, toy_run())
