"""The command line of training, and the recipes that it offers."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy_training as toy
from servers import free_port
from torch import Tensor

import models
import training.__main__ as command
from models import _checkpoint
from models._protocol import Batch, Denoiser, ImageSpace, Model
from training import data
from training.card import card
from training.errors import RunError
from training.recipes import recipes

ROOT = Path(command.__file__).parents[1]
SPACES = {
    "digits": ImageSpace(8, 8, 1, labels=tuple("0123456789")),
    "mnist": ImageSpace(28, 28, 1, labels=tuple("0123456789")),
    "fashion-mnist": ImageSpace(28, 28, 1, labels=data._GARMENTS),
    "shapes": ImageSpace(32, 32, 3, captions=True),
}


# ----------------------------------------------------------------------------------------------------- several machines


def machine(out: Path, port: int) -> subprocess.Popen[str]:
    """torchrun on one of two machines, with one process."""
    rendezvous = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=test"]
    launch = ["-m", "torch.distributed.run", *rendezvous, f"--rdzv-endpoint=127.0.0.1:{port}"]
    run = ["-m", "training", "run", "digits-vae", "--steps", "6", "--accelerator", "cpu", "--threads", "1"]
    return subprocess.Popen(
        [sys.executable, *launch, *run, "--out", str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_two_machines_under_torchrun_share_a_run(tmp_path: Path) -> None:
    port = free_port()
    both = [machine(tmp_path, port) for _ in range(2)]
    for said in [one.communicate(timeout=170)[0] for one in both]:
        assert "Error" not in said, said
    assert [one.returncode for one in both] == [0, 0]
    about = _checkpoint.read_about(tmp_path)
    assert about["training"]["devices"] == "2 × cpu"
    assert about["recipe"]["steps"] == 6
    assert sorted(p.name for p in (tmp_path / "resume").glob("random-*")) == [f"random-{k}.safetensors" for k in (0, 1)]


@pytest.mark.parametrize(
    ("asked", "here", "everywhere", "found"),
    [
        (None, "4", "8", (4, 2)),
        (4, "4", "4", (4, 1)),
        (2, "4", "8", "devices: 2, but torchrun started 4 processes here"),
        (None, "4", "6", "6 processes, 4 of them here"),
    ],
)
def test_torchrun_says_how_many_devices_there_are(
    asked: int | None,
    here: str,
    everywhere: str,
    found: tuple[int, int] | str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert command._processes(asked) == (asked or 1, 1)
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": here, "WORLD_SIZE": everywhere}.items():
        monkeypatch.setenv(name, value)
    if isinstance(found, str):
        with pytest.raises(RunError, match=found):
            command._processes(asked)
    else:
        assert command._processes(asked) == found


# -------------------------------------------------------------------------------------------------------------- recipes


def test_there_are_recipes_named_after_data_set_and_family() -> None:
    assert recipes()
    for name, make in recipes().items():
        run = make()
        assert name.startswith(run.data)
        assert inspect.getdoc(make), f"{name} says what it is"


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_fits_its_family_and_its_data(name: str) -> None:
    run = recipes()[name]()
    family = models.family(run.family)
    assert isinstance(run.config, family.Config)
    model = family.Model(run.config, SPACES[run.data])
    assert model.groups().keys() == run.optimisers.keys()
    listed = [id(p) for group in model.groups().values() for p in group]
    assert len(listed) == len(set(listed)), "no parameter has two optimisers"
    assert json.loads(json.dumps(run.to_json())) == json.loads(json.dumps(run.to_json())), "a recipe is JSON"
    assert run.warmup < max(run.steps, 1)


# --------------------------------------------------------------------------------------------------------- command line


@pytest.fixture
def _toys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "family", lambda name: toy)
    monkeypatch.setattr(
        command, "recipes", lambda: {"toy": toy.toy_run, "toy-bf16": lambda: toy.toy_run(precision="bf16")}
    )
    monkeypatch.setattr(data, "load", lambda name, folder: toy.dataset(name))


def test_list_names_every_recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert command.main(["list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in recipes())


@pytest.mark.usefixtures("_toys")
@pytest.mark.parametrize("recipe", ["toy", "toy-bf16"])
def test_run_trains_exports_and_says_where(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command.main(["run", recipe, "--steps", "12", "--accelerator", "cpu"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("toy 10/12  loss/linear ")
    assert printed[-1] == f"checkpoint in runs/{recipe}; measure it with: python -m training evaluate runs/{recipe}"
    model = _checkpoint.load(tmp_path / "runs" / recipe)
    assert model.seen == 12
    about = _checkpoint.read_about(tmp_path / "runs" / recipe)
    assert about["data"] == {"name": "toy", "sha256": "of toys", "splits": {"train": toy.SIZE}}
    assert about["recipe"] == {"name": recipe, **json.loads(json.dumps(recipes_of(recipe)))}
    assert about["training"]["devices"] == "1 × cpu"
    assert about["training"]["seconds"] > 0
    assert about["metrics"] == {}
    assert list((tmp_path / "runs" / recipe / "events").iterdir())


@pytest.mark.usefixtures("_toys")
def test_model_json_and_the_card_name_the_teacher_and_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Student(toy.Model, Denoiser):
        def begin_from(self, teacher: Model) -> None:
            """Nothing of it."""

        def denoised(self, x: Tensor, sigma: Tensor, labels: Tensor, guidance: Tensor) -> Tensor:
            return x

    monkeypatch.setattr(toy, "Model", Student)
    _checkpoint.save(tmp_path / "wise", Student(toy.Config(), toy.SPACE), toy.Config(), {})
    run = toy.toy_run(teacher=str(tmp_path / "wise"), steps=5)
    monkeypatch.setattr(command, "recipes", lambda: {"toy": lambda: run})
    assert command.main(["run", "toy", "--accelerator", "cpu", "--out", str(tmp_path / "out")]) == 0
    about = _checkpoint.read_about(tmp_path / "out")
    sha256 = _checkpoint.read_about(tmp_path / "wise")["files"]["weights.safetensors"]
    assert about["teacher"] == {"name": "wise", "sha256": sha256}
    assert f"- teacher: wise, weights sha256 `{sha256[:16]}…`" in card("out", about)


def recipes_of(recipe: str) -> object:
    return toy.toy_run(steps=12, precision="bf16" if recipe.endswith("bf16") else "fp32").to_json()


@pytest.mark.usefixtures("_toys")
def test_another_runs_folder_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "toy", "--out", str(tmp_path / "[bold]out[/x]"), "--accelerator", "cpu"]
    assert command.main([*arguments, "--steps", "2"]) == 0
    capsys.readouterr()
    assert command.main([*arguments, "--steps", "3"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error == (
        f"{tmp_path}/[bold]out[/x]/resume: the state of another run (steps differ); remove it or choose another --out\n"
    )


@pytest.mark.usefixtures("_toys")
def test_more_gpus_than_there_are_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = torch.cuda.device_count()
    options = ["--accelerator", "cuda", "--devices", str(there + 1), "--out", str(tmp_path)]
    assert command.main(["run", "toy", *options]) == 2
    assert capsys.readouterr().err == f"devices: {there + 1} CUDA devices asked for, {there} found\n"


@pytest.mark.usefixtures("_toys")
def test_a_setting_that_makes_no_sense_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "toy", "--steps", "-1"]) == 2
    assert capsys.readouterr().err == "steps: -1; at least 0\n"


def test_an_unknown_recipe_is_answered_with_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["run", "fashion-mnist-ddmp"]) == 2
    assert capsys.readouterr().err == (
        f"recipe: no recipe 'fashion-mnist-ddmp'; there are {', '.join(sorted(recipes()))}\n"
    )


def test_a_data_folder_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "nowhere"
    name = next(name for name, make in recipes().items() if make().data == "fashion-mnist")
    assert command.main(["run", name, "--data-dir", str(nowhere), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"{nowhere}: ")
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_toys")
def test_divergence_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def sick(model: toy.Model, batch: Batch) -> object:
        yield "linear", model.linear.weight.sum() * float("nan"), {}

    monkeypatch.setattr(toy, "objective", sick)
    assert command.main(["run", "toy", "--out", str(tmp_path), "--accelerator", "cpu"]) == 2
    assert capsys.readouterr().err == "toy: loss or gradient no longer finite at step 10 of 20\n"
    assert not (tmp_path / "model.json").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["train"], ["run"], ["run", "x", "--accelerator", "abacus"], ["run", "x", "--devices", "0"]]
)
def test_arguments_that_make_no_sense_exit_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2


@pytest.mark.slow
def test_the_module_trains_a_real_recipe_on_two_processes(tmp_path: Path) -> None:
    """As a user starts it. Both processes run the whole command, the second started by the first."""
    name = next(name for name in sorted(recipes()) if name.startswith("digits"))
    options = ["--steps", "2", "--accelerator", "cpu", "--devices", "2", "--threads", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "training", "run", name, *options, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("checkpoint in") == 1
    assert {path.name for path in (tmp_path / "resume").glob("random-*")} == {
        "random-0.safetensors",
        "random-1.safetensors",
    }
    assert _checkpoint.load(tmp_path).spec.image == SPACES["digits"]
