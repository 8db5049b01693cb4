"""The calibrations of the models in service, read from their folders when they are first asked for.

One came with the model: its hash stands in model.json. Others were made while serving (`service.calibration_store`),
and one of those may be in use instead.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomaly.calibration import FILE, Calibration, CalibrationError, unpack
from service.calibration_store import CalibrationStore, Fingerprint
from service.catalog import Version

CAME_WITH_THE_MODEL = 0

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Known:
    """A calibration, or why there is none that can be used."""

    calibration: Calibration | None
    sha256: str = ""
    fault: str | None = None


@dataclass(frozen=True)
class _Current:
    """The one that was made while serving and is in use; None: none is."""

    read_at: float  # on the clock
    fingerprint: Fingerprint
    version: int = CAME_WITH_THE_MODEL
    known: Known | None = None

    @property
    def faulty(self) -> bool:
        return self.known is not None and self.known.calibration is None


@dataclass(frozen=True)
class Listed:
    """A calibration of a model, in use or not."""

    version: int
    known: Known
    current: bool


class Calibrations:
    """Keeps what was read: of what came with a model by the hash of the file, of others as long as the folder says the
    same. That is looked at every so many seconds, since another process may have changed it. What could not be read is
    tried again each time: files of a folder come one after another."""

    def __init__(self, folder: Path, poll_seconds: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._poll_seconds, self._clock = folder, poll_seconds, clock
        self.store = CalibrationStore(folder)
        self._came: dict[str, Known] = {}  # with each model, as far as it could be read
        self._warned: dict[str, str] = {}
        self._current: dict[str, _Current] = {}
        self._forgotten: dict[str, int] = {}  # how often

    async def of(self, model: str, version: Version) -> Known:
        """The calibration in use for this version of a model."""
        return (await self._in_use(model, version))[1]

    async def _in_use(self, model: str, version: Version) -> tuple[int, Known]:
        """With its number."""
        current = self._current.get(model)
        if current is None or self._clock() - current.read_at > self._poll_seconds:
            forgotten = self._forgotten.get(model, 0)
            current = await asyncio.to_thread(self._look, model, current)
            if self._forgotten.get(model, 0) == forgotten:  # else it may be of before the change
                self._current[model] = current
        if current.known is None:
            return current.version, await self._that_came_with(model, version)
        return current.version, _fitting(current.known, version, current.version)

    async def listed(self, model: str, version: Version) -> list[Listed]:
        """All of them, the one that came with the model first."""
        self.forget(model)
        current, in_use = await self._in_use(model, version)
        own = await self._that_came_with(model, version)
        found = [Listed(CAME_WITH_THE_MODEL, own, current == CAME_WITH_THE_MODEL)]
        if version.calibration_sha256 is None:
            found = []
        for number in await asyncio.to_thread(self.store.versions, model):
            known = in_use if number == current else await asyncio.to_thread(_read_made, self.store, model, number)
            found.append(Listed(number, _fitting(known, version, number), number == current))
        return found

    def forget(self, model: str) -> None:
        """Look again: something was changed."""
        self._forgotten[model] = self._forgotten.get(model, 0) + 1
        self._current.pop(model, None)

    async def _that_came_with(self, model: str, version: Version) -> Known:
        expected = version.calibration_sha256
        if expected is None:
            return Known(None)
        known = self._came.get(model)
        if known is None or known.sha256 != expected:
            known = await asyncio.to_thread(_read, self._folder / model / FILE, expected)
            if known.calibration is not None:
                self._came[model] = known
            if known.fault is not None and known.fault != self._warned.get(model):
                log.warning("%s: %s", model, known.fault)
                self._warned[model] = known.fault
        return _fitting(known, version, CAME_WITH_THE_MODEL)

    def _look(self, model: str, before: _Current | None) -> _Current:
        now = self._clock()
        try:
            fingerprint = self.store.fingerprint(model)
            if before is not None and before.fingerprint == fingerprint and not before.faulty:
                return _Current(now, fingerprint, before.version, before.known)
            number = self.store.current(model)
        except (OSError, ValueError) as e:
            log.warning("%s: %s", model, e)
            return _Current(now, None, -1, Known(None, fault=str(e)))
        if number == CAME_WITH_THE_MODEL:
            return _Current(now, fingerprint)
        return _Current(now, fingerprint, number, _read_made(self.store, model, number))


def _fitting(known: Known, version: Version, number: int) -> Known:
    """What was made for other weights says nothing of these."""
    if known.calibration is None or known.calibration.about.get("weights_sha256") == version.weights_sha256:
        return known
    whose = FILE if number == CAME_WITH_THE_MODEL else f"version {number}"
    return Known(None, known.sha256, f"{whose} was made for other weights; calibrate again, or use another")


def _read_made(store: CalibrationStore, model: str, number: int) -> Known:
    try:
        packed = store.read(model, number)
        return Known(unpack(packed), hashlib.sha256(packed).hexdigest())
    except FileNotFoundError:
        fault = f"version {number} is missing"
    except (CalibrationError, OSError) as e:
        fault = f"version {number}: {e}"
    log.warning("%s: %s", model, fault)
    return Known(None, fault=fault)


def _read(path: Path, expected: str) -> Known:
    try:
        packed = path.read_bytes()
        if hashlib.sha256(packed).hexdigest() != expected:
            raise CalibrationError(f"{FILE}: its sha256 is not the one in model.json")
        calibration = unpack(packed)
    except (CalibrationError, OSError) as e:
        return Known(None, fault=str(e))
    return Known(calibration, expected)


def smallest_alpha(calibration: Calibration) -> float:
    """Below it no image could be an anomaly: 1/(n + 1), rounded up to four digits."""
    alpha = 1 / (calibration.n + 1)
    scale: float = 10.0 ** (3 - math.floor(math.log10(alpha)))
    return math.ceil(alpha * scale) / scale


def told(calibration: Calibration) -> dict[str, Any]:
    """What a calibration says of itself, for answers."""
    about = calibration.about
    return {
        "n": calibration.n,
        "fit_n": about.get("fit_n"),
        "detector": calibration.kind,
        "statistics": list(calibration.statistics),
        "smallest_alpha": smallest_alpha(calibration),
        "data": about.get("data"),
        "description": about.get("description", ""),
        "created": about.get("created"),
    }
