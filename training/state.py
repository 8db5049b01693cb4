"""All that a run is at a step, and the folder that it is taken up from after an interruption.

    resume/state.json              the step, the seconds, and which run this is
    resume/state.safetensors       weights, averaged weights, moments of every optimiser
    resume/random-0.safetensors    random generator of the first device, and so on

Safetensors, not pickle: taking up a run executes nothing that the folder holds.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from safetensors.torch import load_file, save_file
from torch import Tensor

from models._protocol import Model
from training.config import Run
from training.errors import RunError
from training.teacher import Teacher

FOLDER = "resume"
_PARTIAL, _PREVIOUS = "resume.partial", "resume.previous"  # beside it, while it is replaced


@dataclass
class State:
    """A run at a step. What it does next follows from this and torch's random generator."""

    model: Model
    average: Model  # the same network with averaged weights: what is exported
    optimisers: dict[str, torch.optim.AdamW]  # by parameter group
    teacher: Teacher | None = None  # not part of the tensors: a run that is taken up loads it again
    step: int = 0  # steps taken
    seconds: float = 0.0  # of wall-clock time, over all the times that the run was taken up

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the state by name: the tensors themselves, so that copying into them restores it."""
        named = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        named |= {f"average.{k}": v for k, v in self.average.state_dict().items()}
        for group, optimiser in self.optimisers.items():
            for i, parameter in enumerate(optimiser.param_groups[0]["params"]):
                named |= {f"{group}.{i}.{k}": v for k, v in optimiser.state.get(parameter, {}).items()}
        return named


def save(state: State, run: Run, out: Path, fabric: Fabric) -> None:
    """Write out/resume, whole or not at all: a stop at any moment leaves the previous state or this one."""
    partial, previous, folder = out / _PARTIAL, out / _PREVIOUS, out / FOLDER
    if fabric.is_global_zero:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        # Clones, because tensors that share memory (tied weights) are refused by safetensors.
        save_file({k: v.contiguous().clone() for k, v in state.tensors().items()}, partial / "state.safetensors")
        about = {"step": state.step, "seconds": state.seconds, "run": _identity(state, run, fabric)}
        (partial / "state.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
    fabric.barrier()
    save_file(_random_state(fabric), partial / _random_file(fabric))
    fabric.barrier()
    if fabric.is_global_zero:
        shutil.rmtree(previous, ignore_errors=True)
        if folder.exists():
            folder.rename(previous)
        partial.rename(folder)
        shutil.rmtree(previous, ignore_errors=True)
    fabric.barrier()


def exists(out: Path, fabric: Fabric) -> bool:
    """Whether `out` holds a state to resume from."""
    folder, previous = out / FOLDER, out / _PREVIOUS
    if fabric.is_global_zero and previous.exists() and not folder.exists():
        previous.rename(folder)  # the last save was stopped between its two renames
    fabric.barrier()
    return folder.exists()


def resume(state: State, run: Run, out: Path, fabric: Fabric) -> None:
    """Put `state` and the random generator where out/resume left off. Raises `RunError` if that is another run's."""
    folder = out / FOLDER
    about = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    here = _identity(state, run, fabric)
    if about["run"] != here:
        changed = sorted(k for k in here.keys() | about["run"].keys() if about["run"].get(k) != here.get(k))
        raise RunError(
            f"{folder}: the state of another run ({', '.join(changed)} differ); remove it or choose another --out"
        )
    saved = load_file(folder / "state.safetensors", device=str(fabric.device))
    for group, optimiser in state.optimisers.items():  # AdamW makes its moments at its first step: make them now
        for i, parameter in enumerate(optimiser.param_groups[0]["params"]):
            if f"{group}.{i}.step" in saved:
                moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                optimiser.state[parameter] = {"step": torch.zeros(()), **moments}
    tensors = state.tensors()
    for name in sorted(tensors.keys() | saved.keys()):
        then, now = (f"{tuple(t[name].shape)}" if name in t else "missing" for t in (saved, tensors))
        if then != now:
            raise RunError(f"{folder}: another version of {run.family} wrote it: {name} is {then} there, {now} here")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(saved[name])
    state.step, state.seconds = about["step"], about["seconds"]
    random = load_file(folder / _random_file(fabric))
    torch.set_rng_state(random["cpu"])
    if fabric.device.type == "cuda":
        torch.cuda.set_rng_state(random["cuda"], fabric.device)


def _random_file(fabric: Fabric) -> str:
    return f"random-{fabric.global_rank}.safetensors"


def _random_state(fabric: Fabric) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(fabric.device)
    return states


def _identity(state: State, run: Run, fabric: Fabric) -> dict[str, Any]:
    """What makes two runs the same, as JSON gives it back: the teacher's weights too, wherever they lie. How often a
    run saves is not part of it."""
    about: dict[str, Any] = json.loads(json.dumps(run.to_json()))
    del about["checkpoint_every"]
    about["teacher"] = state.teacher.sha256 if state.teacher else None
    return {**about, "devices": f"{fabric.world_size} × {fabric.device.type}"}
