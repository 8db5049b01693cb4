"""What models there are: read from `<folder>/*/model.json`, again on change, merged with what workers announce.

A model.json that cannot be used is `failed` with its reason, while the version that worked stays in service. Which
version is in service is the workers' to say: they announce the sha256 of the model.json that they loaded, and the
catalog describes that one. No weights are read here.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jsonschema import SchemaError
from pydantic import ValidationError

from anomaly.calibration import FILE
from service.accepts import Accepts
from service.broker import ModelState, WorkerState
from service.execution import Execution
from service.schemas import Spec

FORMAT = 1
ABOUT = "model.json"
WEIGHTS = "weights.safetensors"
_VERSIONS_KEPT = 8

log = logging.getLogger(__name__)


class Unusable(Exception):
    """A model.json that does not describe a model; the message says why."""


@dataclass(frozen=True)
class Version:
    """What one model.json says."""

    sha256: str  # of model.json itself
    spec: Spec
    accepts: Accepts
    metrics: dict[str, Any]
    weights_sha256: str
    calibration_sha256: str | None  # of calibration.safetensors, where there is one


@dataclass(frozen=True)
class Entry:
    """A model as the API shows it. `version` is the one in service; None where none ever worked."""

    id: str
    status: Literal["ready", "loading", "failed"]
    version: Version | None
    error: str | None = None
    resident: bool = False  # in some worker's memory; otherwise its next job waits until it is loaded
    execution: Execution | None = None  # how it draws, on a worker that has this version


_Fingerprint: TypeAlias = "tuple[int, int, int]"


@dataclass
class _Folder:
    fingerprint: _Fingerprint
    error: str | None = None  # of the newest model.json
    versions: dict[str, Version] = field(default_factory=dict)  # by sha256, oldest first

    @property
    def newest(self) -> Version | None:
        return next(reversed(self.versions.values()), None)


class Catalog:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._folders: dict[str, _Folder] = {}

    def refresh(self) -> None:
        """Look at the folder, and read what is new or has changed. Blocks on the disk, not long."""
        found = _fingerprints(self.folder)
        known = {name: state for name, state in self._folders.items() if name in found}
        for name, fingerprint in found.items():
            before = known.get(name)
            if before is None or before.fingerprint != fingerprint:
                known[name] = _read_again(self.folder / name, fingerprint, before)
        for name in sorted(self._folders.keys() - known.keys()):
            log.info("model %s: removed", name)
        self._folders = known

    async def watch(self, seconds: float) -> None:
        """Refresh every so many seconds, until cancelled."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:
                log.exception("models folder %s cannot be looked at; what was known stays in service", self.folder)

    def __contains__(self, model: str) -> bool:
        return model in self._folders

    @property
    def ids(self) -> list[str]:
        return sorted(self._folders)

    def weights(self, model: str, sha256: str) -> str | None:
        """The hash of the weights of that version of a model; None for one that is not known, or no longer."""
        folder = self._folders.get(model)
        version = None if folder is None else folder.versions.get(sha256)
        return None if version is None else version.weights_sha256

    def entries(self, pool: Sequence[WorkerState]) -> list[Entry]:
        return [self.entry(model, pool) for model in self.ids]

    def entry(self, model: str, pool: Sequence[WorkerState]) -> Entry:
        """Raises `KeyError` for a model that there is not."""
        folder = self._folders[model]
        states = [worker.models[model] for worker in pool if model in worker.models]
        ready = [state for state in states if state.status == "ready"]
        if ready:
            return _ready_entry(model, folder, ready)
        if folder.newest is None:
            return Entry(model, "failed", None, folder.error)
        failed = [state.error for state in states if state.status == "failed"]
        if failed and len(failed) == len(states):
            return Entry(model, "failed", folder.newest, failed[0] or folder.error)
        return Entry(model, "loading", folder.newest, folder.error)


def _ready_entry(model: str, folder: _Folder, ready: Sequence[ModelState]) -> Entry:
    """The newest version that a worker serves; while workers change over, two may be in service."""
    served = {state.sha256: state for state in ready}
    version = next((v for sha256, v in reversed(folder.versions.items()) if sha256 in served), folder.newest)
    if version is None:
        return Entry(model, "failed", None, folder.error)
    refused = next((state.error for state in ready if state.error), None)
    execution = next((state.execution for state in ready if state.sha256 == version.sha256), None)
    resident = any(state.resident for state in ready)
    return Entry(model, "ready", version, refused or folder.error, resident, execution)


def _fingerprints(folder: Path) -> dict[str, _Fingerprint]:
    """Subfolder that holds a model.json -> what changes whenever that file does. No folder, no models."""
    found = {}
    try:
        subfolders = [path for path in folder.iterdir() if not path.name.startswith(".")]
    except FileNotFoundError:
        return {}
    for path in subfolders:
        try:
            about = (path / ABOUT).stat()
        except (FileNotFoundError, NotADirectoryError):
            continue  # not a checkpoint, or not yet: model.json is written last
        found[path.name] = (about.st_mtime_ns, about.st_size, about.st_ino)
    return found


def _read_again(path: Path, fingerprint: _Fingerprint, before: _Folder | None) -> _Folder:
    versions = dict(before.versions) if before else {}
    try:
        version = read(path / ABOUT)
    except Unusable as e:
        log.warning("model %s: %s%s", path.name, e, "; the version before stays in service" if versions else "")
        return _Folder(fingerprint, str(e), versions)
    log.info("model %s: %s, %s %s", path.name, version.spec.family, ABOUT, version.sha256[:12])
    versions.pop(version.sha256, None)  # an old one that came back is the newest
    versions[version.sha256] = version
    for oldest in list(versions)[:-_VERSIONS_KEPT]:
        del versions[oldest]
    return _Folder(fingerprint, None, versions)


def read(path: Path) -> Version:
    """What a model.json says. Raises `Unusable`."""
    try:
        content = path.read_bytes()
        about = json.loads(content)
    except OSError as e:
        raise Unusable(f"{ABOUT}: cannot be read: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise Unusable(f"{ABOUT}: not JSON: {e}") from e
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else type(about).__name__
        raise Unusable(f"{ABOUT}: format {found!r}; this version reads format {FORMAT}")
    files, metrics = about.get("files"), about.get("metrics", {})
    if not isinstance(files, dict) or not isinstance(files.get(WEIGHTS), str):
        raise Unusable(f"{ABOUT}: lists no sha256 of {WEIGHTS}")
    if not isinstance(metrics, dict):
        raise Unusable(f"{ABOUT}: metrics is no object")
    try:
        spec = Spec.model_validate(about.get("spec"))
        accepts = Accepts(spec.accepts)
    except ValidationError as e:
        first = e.errors()[0]
        raise Unusable(f"{ABOUT}: {'.'.join(map(str, ('spec', *first['loc'])))}: {first['msg']}") from e
    except SchemaError as e:
        raise Unusable(f"{ABOUT}: spec.accepts: {e.message}") from e
    return Version(
        sha256=hashlib.sha256(content).hexdigest(),
        spec=spec,
        accepts=accepts,
        metrics=metrics,
        weights_sha256=files[WEIGHTS],
        calibration_sha256=files.get(FILE),
    )
