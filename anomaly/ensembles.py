"""Several models that judge an image together: their statistics side by side, calibrated as one.

An ensemble is a folder of its own beside those of its members, with two files:

    ensemble.json               its members, by name and sha256 of their weights, and the sha256 of the other file
    calibration.safetensors     as `anomaly.calibration` has it, over the statistics that `joined` names

It is found by the set of its members' weights, so neither their names nor their order matter to who asks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anomaly.calibration import FILE, CalibrationError, Described, Vector

FORMAT = 1
ABOUT = "ensemble.json"
SHARED = ("complexity_bits",)  # statistics of the image alone, the same for every member


@dataclass(frozen=True)
class Member:
    name: str
    weights_sha256: str


@dataclass(frozen=True)
class Ensemble:
    members: tuple[Member, ...]
    calibration_sha256: str

    def pack(self) -> bytes:
        about: dict[str, Any] = {
            "format": FORMAT,
            "members": [{"name": m.name, "weights_sha256": m.weights_sha256} for m in self.members],
            "files": {FILE: self.calibration_sha256},
        }
        return (json.dumps(about, indent=1, ensure_ascii=False) + "\n").encode()

    def order(self, weights: Sequence[str]) -> tuple[int, ...] | None:
        """Where each member stands among models with these weights; None where they are not the same models."""
        if sorted(weights) != sorted(m.weights_sha256 for m in self.members):
            return None
        return tuple(weights.index(m.weights_sha256) for m in self.members)


def unpack(packed: bytes) -> Ensemble:
    """Raises `CalibrationError` for bytes that are no ensemble.json."""
    try:
        about = json.loads(packed)
        if about["format"] != FORMAT:
            raise CalibrationError(f"{ABOUT}: format {about['format']!r}; this version reads format {FORMAT}")
        members = tuple(Member(str(m["name"]), str(m["weights_sha256"])) for m in about["members"])
        return Ensemble(members, str(about["files"][FILE]))
    except (KeyError, TypeError, ValueError) as e:
        raise CalibrationError(f"{ABOUT}: not one: {type(e).__name__}: {e}") from e


def joined(names: Sequence[str], described: Sequence[Described]) -> dict[str, float | Vector]:
    """What all members say of one image, in one: statistics are called `<member>.<statistic>`, feature vectors
    likewise, and those of the image alone as ever."""
    found: dict[str, float | Vector] = {}
    for name, statistics in zip(names, described, strict=True):
        found |= {key if key in SHARED else f"{name}.{key}": value for key, value in statistics.items()}
    return found
