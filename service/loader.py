"""The thread that reads checkpoints: it looks at the models folder now and then, and loads what it is told to.

What it finds it tells; whether and when a version is loaded, `service.residency` decides. Loading ends with a warm-up,
so that nothing but the taking in is left to the thread that steps.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from models import _checkpoint
from models._protocol import Model
from service.engine import Warm

log = logging.getLogger(__name__)

_OURS = ("models.", "service.")  # modules whose objects are looked into
SCAN_EVERY = 1.0  # seconds between looks at the models folder


@dataclass(frozen=True)
class Found:
    """The folder has this version, new or changed."""

    name: str
    version: str  # the hash of its model.json
    weight: int  # bytes that it will take at least: those of its weights file


@dataclass(frozen=True)
class Gone:
    """The folder has it no longer."""

    name: str


@dataclass(frozen=True)
class Scanned:
    """The folder was looked through once."""


@dataclass(frozen=True)
class Loaded:
    name: str
    version: str
    warm: Warm
    weight: int  # bytes, measured
    seconds: float  # that it took to read and to warm up


@dataclass(frozen=True)
class Refused:
    """It was read, or tried, in vain."""

    name: str
    version: str
    error: str


News: TypeAlias = Found | Gone | Scanned | Loaded | Refused


class Loader:
    """See above. `tell` is called in the thread; `warm` is the engine's."""

    def __init__(
        self, folder: Path, device: str, warm: Callable[[str, Model], Warm], tell: Callable[[News], None]
    ) -> None:
        self._folder, self._device, self._warm, self._tell = folder, device, warm, tell
        self._asked: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._seen: dict[str, str] = {}
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._asked.put(None)
        self._thread.join()

    def load(self, name: str) -> None:
        """Ask for a model. `Loaded` or `Refused` will be told of it."""
        self._asked.put(name)

    def _run(self) -> None:
        scanned = -SCAN_EVERY
        while True:
            if (wait := scanned + SCAN_EVERY - time.monotonic()) <= 0:
                self._scan()
                scanned = time.monotonic()
                continue
            try:
                name = self._asked.get(timeout=wait)
            except queue.Empty:
                continue
            if name is None:
                return
            self._tell(self._read(name))

    def _scan(self) -> None:
        found = {path.parent.name: path for path in sorted(self._folder.glob(f"*/{_checkpoint.ABOUT}"))}
        for name in [name for name in self._seen if name not in found]:
            del self._seen[name]
            self._tell(Gone(name))
        for name, path in found.items():
            try:
                version = _version(path)
            except OSError:
                continue  # going away, or being replaced: the next look tells
            if self._seen.get(name) != version:
                self._seen[name] = version
                self._tell(Found(name, version, _size(path.parent / _checkpoint.WEIGHTS)))
        self._tell(Scanned())

    def _read(self, name: str) -> Loaded | Refused:
        began, version = time.perf_counter(), self._seen.get(name, "")
        try:
            version = _version(self._folder / name / _checkpoint.ABOUT)
            model = _checkpoint.load(self._folder / name, self._device)
            read = time.perf_counter() - began
            warm = self._warm(name, model)
        except Exception as e:  # a checkpoint is input: whatever is wrong with it concerns it alone
            log.warning("%s: refused: %s", name, e, exc_info=not isinstance(e, _checkpoint.CheckpointError | OSError))
            return Refused(name, version, f"{e}" if isinstance(e, _checkpoint.CheckpointError) else _described(e))
        seconds = time.perf_counter() - began
        log.info("%s: read in %.2f s, warmed up in %.2f s", name, read, seconds - read)
        return Loaded(name, version, warm, weigh(warm), seconds)


def weigh(thing: Model | Warm) -> int:
    """Bytes of a model's parameters, buffers, and whatever tensors else it keeps, and of the copies that a faster mode
    made of them; what two share counts once."""
    storages = [tensor.untyped_storage() for tensor in _tensors(thing)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _tensors(thing: object) -> Iterator[Tensor]:
    """All that can be reached from it by way of containers, modules and objects of the models' own classes."""
    seen: set[int] = set()
    stack = [thing]
    while stack:
        thing = stack.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, Tensor):
            yield thing
        elif isinstance(thing, dict):
            stack += thing.values()
        elif isinstance(thing, list | tuple | set):
            stack += thing
        elif isinstance(thing, torch.nn.Module) or type(thing).__module__.startswith(_OURS):
            stack += getattr(thing, "__dict__", {}).values()


def _version(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reading it will tell what is wrong


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
