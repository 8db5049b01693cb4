"""The teacher of a run: a checkpoint that a student learns from beside its data."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from models import _checkpoint
from models._protocol import Denoiser, ImageSpace, Model
from training.errors import RunError

ZOO = Path(__file__).parents[1] / "zoo"


@dataclass(frozen=True)
class Teacher:
    """A frozen model, and what model.json will say of it. `model` and `denoiser` are one object, by its two sides."""

    name: str
    sha256: str  # of its weights
    model: Model
    denoiser: Denoiser


def load(name: str, space: ImageSpace, device: torch.device) -> Teacher:
    """The checkpoint in the folder `name`, or of that name in the zoo. Raises `RunError` where it cannot teach a model
    of `space`, and `CheckpointError`."""
    folder = Path(name) if (Path(name) / _checkpoint.ABOUT).exists() else ZOO / name
    if not (folder / _checkpoint.ABOUT).exists():
        raise RunError(f"teacher: {name!r} is no checkpoint folder, and zoo/ has none of that name")
    model = _checkpoint.load(folder, device)
    if not isinstance(model, Denoiser):
        raise RunError(f"teacher: {name}: a {model.spec.family} is no denoiser")
    if model.spec.image != space:
        raise RunError(f"teacher: {name}: its images or labels are not those of the data")
    return Teacher(folder.name, _checkpoint.read_about(folder)["files"][_checkpoint.WEIGHTS], model, model)
