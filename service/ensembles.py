"""The ensembles that are calibrated: folders with an ensemble.json beside those of the models."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from anomaly.calibration import FILE, Calibration, CalibrationError
from anomaly.calibration import unpack as unpack_calibration
from anomaly.ensembles import ABOUT, Ensemble, unpack
from service.calibrations import Known
from service.catalog import Version

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Together:
    """What is known of some models as an ensemble."""

    known: Known
    names: tuple[str, ...]  # the members', as the calibration calls them, in its order
    order: tuple[int, ...]  # where each of them stands among the models that were asked about


class Ensembles:
    """Looks for them whenever it is asked: there are few, and they come and go like models."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Calibration] = {}  # by the hash of its file

    async def of(self, models: Sequence[str], versions: Sequence[Version]) -> Together:
        """The calibration of these models together, the newest where several folders have one."""
        return await asyncio.to_thread(self._find, models, versions)

    async def members(self, name: str) -> list[str] | None:
        """Whom the ensemble in the folder of that name consists of; None where there is no such ensemble."""
        return await asyncio.to_thread(self._members, name)

    def _members(self, name: str) -> list[str] | None:
        for path, ensemble in self._all():
            if path.parent.name == name:
                return [member.name for member in ensemble.members]
        return None

    def _all(self) -> Iterator[tuple[Path, Ensemble]]:
        """Oldest first."""
        for path in sorted(self._folder.glob(f"*/{ABOUT}"), key=_modified):
            try:
                yield path, unpack(path.read_bytes())
            except (CalibrationError, OSError) as e:
                log.warning("%s: %s", path.parent.name, e)

    def _find(self, models: Sequence[str], versions: Sequence[Version]) -> Together:
        found = Together(Known(None), tuple(models), tuple(range(len(models))))
        weights = [version.weights_sha256 for version in versions]
        for path, ensemble in self._all():
            order = ensemble.order(weights)
            if order is not None:
                found = Together(self._read(path, ensemble), tuple(m.name for m in ensemble.members), order)
        return found

    def _read(self, path: Path, ensemble: Ensemble) -> Known:
        expected = ensemble.calibration_sha256
        try:
            if expected not in self._known:
                packed = (path.parent / FILE).read_bytes()
                if hashlib.sha256(packed).hexdigest() != expected:
                    raise CalibrationError(f"{path.parent.name}/{FILE}: its sha256 is not the one in {ABOUT}")
                self._known[expected] = unpack_calibration(packed)
        except (CalibrationError, OSError) as e:
            log.warning("%s: %s", path.parent.name, e)
            return Known(None, fault=str(e))
        return Known(self._known[expected], expected)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0
