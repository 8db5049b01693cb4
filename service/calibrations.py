"""The calibrations of the models in service, read from their folders when they are first asked for."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from anomaly.calibration import Calibration, CalibrationError, unpack
from service.catalog import Version

FILE = "calibration.safetensors"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """A calibration, or why there is none that can be used."""

    calibration: Calibration | None
    sha256: str = ""
    fault: str | None = None


class Calibrations:
    """Keeps what was read, by the hash of the file."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Known] = {}

    async def of(self, model: str, version: Version) -> Known:
        """The calibration that belongs to this version of a model."""
        expected = version.calibration_sha256
        if expected is None:
            return Known(None)
        if expected not in self._known:
            self._known[expected] = await asyncio.to_thread(_read, self._folder / model / FILE, expected, version)
        return self._known[expected]


def _read(path: Path, expected: str, version: Version) -> Known:
    try:
        packed = path.read_bytes()
        if hashlib.sha256(packed).hexdigest() != expected:
            raise CalibrationError(f"{FILE}: its sha256 is not the one in model.json")
        calibration = unpack(packed)
        if calibration.about.get("weights_sha256") != version.weights_sha256:
            raise CalibrationError(f"{FILE}: made for other weights; calibrate again")
    except (CalibrationError, OSError) as e:
        log.warning("%s: %s", path.parent.name, e)
        return Known(None, fault=str(e))
    return Known(calibration, expected)
