"""The ways in which a model's networks can be run here, by name."""

from __future__ import annotations

from pathlib import Path

from models import _checkpoint
from models._protocol import Model

WAYS = ("float32",)


class NotApplicable(Exception):
    """A model that cannot be run so; the message says why."""


def prepared(folder: Path, way: str, batch: int) -> Model:
    """The checkpoint's model, on the CPU, ready to draw batches of that size so. Raises `NotApplicable` where it
    cannot."""
    return _checkpoint.load(folder)
