"""The ways in which a model's networks can be run here, by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models import _checkpoint
from models._protocol import Model

WAYS = ("float32",)


class NotApplicable(Exception):
    """A model that cannot be run so; the message says why."""


def prepared(folder: Path, way: str, batch: int) -> Model:
    """The checkpoint's model, on the CPU, ready to draw batches of that size so. Raises `NotApplicable` where it
    cannot."""
    return _checkpoint.load(folder)


def way_of(about: Mapping[str, Any]) -> str:
    """How a server says (`GET /models/{id}`) that it runs a model's networks."""
    execution = about.get("execution") or {"mode": "eager", "precision": "float32"}
    mode = "" if execution["mode"] == "eager" else f" {execution['mode']}"
    return f"{execution['precision']}{mode}"
