"""Calibrations that were made while serving: files beside the model, numbered from 1; old ones are kept.

    <models>/<model>/calibrations/
        1.safetensors, 2.safetensors, …     as `anomaly.calibration` packs them; never changed
        current.json                        {"version": 2, "newest": 3}: the one in use; 0, or no such file: the one
                                            that came with the model. newest: the last that there was when that was
                                            written; one above it was made by who then had no time to put it in use

Several API processes may share the folder, and be killed at any moment: a file gets its number and its whole content in
one step (a hard link, which fails where the number is taken), and the pointer is replaced whole. Everything here blocks
on the disk.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

FOLDER = "calibrations"
CURRENT = "current.json"
SUFFIX = ".safetensors"

Fingerprint: TypeAlias = "tuple[int, int, int] | None"


class Unwritable(Exception):
    """The folder cannot be written; the message says which, why, and what would help."""


class CalibrationStore:
    """Of all models of a folder."""

    def __init__(self, models: Path) -> None:
        self._models = models

    def versions(self, model: str) -> list[int]:
        """In ascending order."""
        names = (path.name.removesuffix(SUFFIX) for path in self._folder(model).glob(f"*{SUFFIX}"))
        return sorted(int(name) for name in names if name.isdecimal())

    def current(self, model: str) -> int:
        """0: the one that came with the model. Raises `ValueError` for a file that says something else."""
        version = self._pointer(model).get("version")
        if not isinstance(version, int) or isinstance(version, bool) or version < 0:
            raise ValueError(f"{FOLDER}/{CURRENT}: version {version!r}; it takes a number from 0")
        return version

    def _pointer(self, model: str) -> dict[str, Any]:
        """What current.json says. Raises `ValueError`."""
        try:
            found = json.loads((self._folder(model) / CURRENT).read_bytes())
        except FileNotFoundError:
            return {"version": 0, "newest": 0}
        except ValueError as e:
            raise ValueError(f"{FOLDER}/{CURRENT}: does not say which version is in use") from e
        if not isinstance(found, dict):
            raise ValueError(f"{FOLDER}/{CURRENT}: does not say which version is in use")
        return found

    def fingerprint(self, model: str) -> Fingerprint:
        """Changes whenever `current` may have."""
        try:
            found = (self._folder(model) / CURRENT).stat()
        except FileNotFoundError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def read(self, model: str, version: int) -> bytes:
        """The file of a version ≥ 1. Raises `FileNotFoundError`."""
        return (self._folder(model) / f"{version}{SUFFIX}").read_bytes()

    def check_writable(self, model: str) -> None:
        """Raises `Unwritable`, before anything is computed that could then not be kept."""
        with self._written(model):
            folder = self._folder(model)
            folder.mkdir(exist_ok=True)
            scratch = self._scratch(folder)
            try:
                scratch.touch()
            finally:
                scratch.unlink(missing_ok=True)

    def add(self, model: str, packed: bytes) -> int:
        """Keep a calibration; its number. Raises `Unwritable`."""
        with self._written(model):
            folder = self._folder(model)
            folder.mkdir(exist_ok=True)
            return _in_place(self._scratch(folder), packed, lambda scratch: self._link(model, scratch))

    def adopt(self, model: str, packed: bytes) -> int:
        """Keep a calibration, and use it from now on; its number. Raises `Unwritable`."""
        number = self.add(model, packed)
        self.choose(model, number)
        return number

    def finish(self, model: str, version: int) -> None:
        """`adopt`, where it was ended between its two steps. Nothing where it was not, or another has been put in use
        since, or the pointer is broken, which is for who chooses to mend. Raises `Unwritable`."""
        try:
            newest = self._pointer(model).get("newest")
        except ValueError:
            return
        if isinstance(newest, int) and newest < version:
            self.choose(model, version)

    def choose(self, model: str, version: int) -> None:
        """Use that version from now on. Raises `FileNotFoundError` for one that there is not, and `Unwritable`."""
        folder = self._folder(model)
        if version > 0 and not (folder / f"{version}{SUFFIX}").is_file():
            raise FileNotFoundError(version)
        with self._written(model):
            folder.mkdir(exist_ok=True)
            newest = max(self.versions(model), default=0)
            content = (json.dumps({"version": version, "newest": newest}) + "\n").encode()
            _in_place(self._scratch(folder), content, lambda scratch: scratch.replace(folder / CURRENT))

    def _folder(self, model: str) -> Path:
        return self._models / model / FOLDER

    def _scratch(self, folder: Path) -> Path:
        return folder / f".{uuid.uuid4().hex}.tmp"

    def _link(self, model: str, scratch: Path) -> int:
        """The next number: where another process has just taken it, the one after that."""
        number = max(self.versions(model), default=0) + 1
        while True:
            try:
                os.link(scratch, self._folder(model) / f"{number}{SUFFIX}")
            except FileExistsError:
                number += 1
            else:
                return number

    @contextmanager
    def _written(self, model: str) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise Unwritable(
                f"calibrations are kept in the models folder, under {model}/{FOLDER}, which this server cannot write "
                f"({e.strerror or e}): DRAWWELL_MODELS must name a folder that it may write and that all replicas share"
            ) from e


def _in_place(scratch: Path, content: bytes, move: Callable[[Path], object]) -> int:
    """Write a scratch file to the disk, then move it where it belongs; what `move` returns, where that is a number."""
    try:
        with scratch.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        moved = move(scratch)
        return moved if isinstance(moved, int) else 0
    finally:
        scratch.unlink(missing_ok=True)
