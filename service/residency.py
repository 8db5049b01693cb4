"""Which models are in the engine, and which jobs wait for one that is not: carries out what `service.memory` decides.

Driven by the worker's main thread, between steps. The `Loader` reads one model at a time in a thread of its own; jobs
of other models step meanwhile. Models whose jobs wait take turns in the order in which the first of these came.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from models._protocol import Model
from service.broker import Job, ModelState
from service.engine import Engine, Warm
from service.execution import Execution
from service.loader import Found, Gone, Loaded, News, Scanned
from service.memory import Memory

log = logging.getLogger(__name__)

MIB = 2**20


@dataclass(frozen=True)
class Waiting:
    """A job whose model is being loaded, or is to be."""

    job: Job
    since: float  # on the clock

    def expired(self, now: float) -> bool:
        return self.job.timeout is not None and self.job.queued_seconds + now - self.since >= self.job.timeout


class Residency:
    """See above. `load` asks the loader for a model; `budget` is in bytes, None: no bound."""

    def __init__(
        self,
        engine: Engine,
        load: Callable[[str], None],
        budget: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine, self._load, self._budget, self._clock = engine, load, budget, clock
        self._memory = Memory(budget)
        self.states: dict[str, ModelState] = {}
        self.scanned = False  # the folder was looked through once
        self._serving: dict[str, str] = {}  # model -> version that takes jobs
        self._on_disk: dict[str, str] = {}  # model -> version that the folder has
        self._weights: dict[str, int] = {}  # "<model>@<version>" -> bytes: measured, or before that, at least
        self._wanted: dict[str, None] = {}  # models to load, in this order
        self._loading: str | None = None  # what the loader was asked for
        # What was told of the model that is being loaded before it was here.
        self._early: tuple[Model, Warm | None, Execution] | None = None
        self._waiting: dict[str, dict[str, Waiting]] = {}  # model -> job -> ...

    @property
    def ready(self) -> bool:
        """Whether every model has been tried."""
        return self.scanned and all(state.status != "loading" for state in self.states.values())

    def here(self) -> list[str]:
        """The models in memory."""
        return [name for name, state in self.states.items() if state.status == "ready" and state.resident]

    def absent(self) -> list[str]:
        """Those that jobs can be taken for as well, but that have to be loaded first, or to be tried."""
        return [name for name, state in self.states.items() if state.status != "failed" and not state.resident]

    # ------------------------------------------------------------------------------------------------------------ jobs

    def admit(self, job: Job) -> bool:
        """Whether the job can begin. Otherwise it waits here for its model; `hear` will return it."""
        state = self.states.get(job.model)
        if job.model in self._serving or state is None or state.status == "failed":
            self.touch(job.model)
            return True  # one that is not served is the engine's to answer
        if state.status == "loading":
            self._try_sooner(job.model)
        self._waiting.setdefault(job.model, {})[job.id] = Waiting(job, self._clock())
        self._wanted.setdefault(job.model)
        return False

    def forget(self, job_id: str) -> bool:
        """Let go of a job that waits. False where it does not wait here."""
        for model, jobs in self._waiting.items():
            if jobs.pop(job_id, None) is not None:
                if not jobs:
                    del self._waiting[model]
                    state = self.states[model]
                    if state.status == "ready" and state.sha256 == self._on_disk[model]:  # it was wanted for its jobs
                        self._wanted.pop(model, None)
                return True
        return False

    def touch(self, model: str) -> None:
        """It is used now."""
        if model in self._serving:
            self._memory.touch(_key(model, self._serving[model]), self._clock())

    def waiting(self) -> list[Job]:
        return [waiting.job for jobs in self._waiting.values() for waiting in jobs.values()]

    def expired(self) -> list[str]:
        """Jobs that wait and that nobody waits for any longer."""
        now = self._clock()
        return [job_id for jobs in self._waiting.values() for job_id, w in jobs.items() if w.expired(now)]

    # ---------------------------------------------------------------------------------------------------------- models

    def hear(self, news: News) -> tuple[list[Job], list[Job]]:
        """What the loader tells. Returns the jobs that can begin now, and those that are for others to do."""
        if isinstance(news, Scanned):
            self.scanned = True
        elif isinstance(news, Found):
            self._found(news)
        elif isinstance(news, Gone):
            return [], self._gone(news.name)
        else:
            self._loading = None
            self._wanted.pop(news.name, None)
            early, self._early = self._early, None
            if news.name in self._on_disk:
                if isinstance(news, Loaded):
                    heard = self._loaded(news)
                    if early is not None:
                        self.renew(news.name, *early)
                    return heard
                return [], self._refused(news.name, news.version, news.error)
        return [], []

    def pump(self) -> bool:
        """Have models unloaded and loaded, as far as that can be done now. True when some state changed."""
        if self._loading is not None or not self._wanted:
            return False
        held = self._engine.versions()
        self._memory.held(held)
        # One of which another copy is still ending its jobs is loaded after that.
        name = next((n for n in self._wanted if _key(n, self._on_disk[n]) not in held), None)
        if name is None:
            return False
        weight = self._weights[_key(name, self._on_disk[name])]
        changed = self._make_room(name, weight, held)
        self._memory.held(self._engine.versions())
        if self._memory.has_room(weight):
            self._loading = name
            self._load(name)
        return changed

    def renew(self, name: str, model: Model, warm: Warm | None, execution: Execution) -> bool:
        """Draw in another way from now on, or (without `warm`) say why not. False where that model serves no longer, or
        does not yet: what was soon compiled may be told before the loader has told of the model.
        """
        if name not in self._serving or not self._engine.serves(name, model):
            if name == self._loading:
                self._early = model, warm, execution
            return False
        if warm is not None:
            self._engine.renew(name, warm)
        self.states[name] = dataclasses.replace(self.states[name], execution=execution)
        return True

    # ------------------------------------------------------------------------------------------------------ the inside

    def _try_sooner(self, model: str) -> None:
        """Before those that nobody asks for. Once for a model, so that none of them waits for ever."""
        if model in self._wanted and model not in self._waiting:
            others = [name for name in self._wanted if name != model]
            place = next((k for k, name in enumerate(others) if name not in self._waiting), len(others))
            self._wanted = dict.fromkeys([*others[:place], model, *others[place:]])

    def _found(self, found: Found) -> None:
        self._on_disk[found.name] = found.version
        if self._serving.get(found.name) == found.version:
            return
        self._weights[_key(found.name, found.version)] = found.weight
        if not self._memory.fits(found.weight):
            self._wanted.pop(found.name, None)
            self._refused(found.name, found.version, self._too_heavy(found.weight))
            return
        self.states.setdefault(found.name, ModelState("loading", found.version, resident=False))
        if self.states[found.name].status == "failed":
            self.states[found.name] = dataclasses.replace(self.states[found.name], status="loading", error=None)
        self._wanted[found.name] = None

    def _gone(self, name: str) -> list[Job]:
        self._engine.remove(name)
        self._on_disk.pop(name, None)
        self._wanted.pop(name, None)
        self._serving.pop(name, None)
        self.states.pop(name, None)
        return [waiting.job for waiting in self._waiting.pop(name, {}).values()]

    def _loaded(self, new: Loaded) -> tuple[list[Job], list[Job]]:
        key = _key(new.name, new.version)
        self._on_disk[new.name] = new.version  # later than what was found, if it differs
        self._weights[key] = new.weight
        if not self._memory.fits(new.weight):
            return [], self._refused(new.name, new.version, self._too_heavy(new.weight))
        held = self._engine.versions()
        self._memory.held(held)
        if not self._memory.has_room(new.weight):  # it is heavier than its file
            self._make_room(new.name, new.weight, held)
        if (older := self._serving.get(new.name)) is not None:
            self._memory.leave(_key(new.name, older))
        self._engine.take_in(new.name, new.version, new.warm)
        self._memory.keep(key, new.weight, new.seconds, self._clock())
        self._serving[new.name] = new.version
        before = self.states[new.name]
        self.states[new.name] = ModelState(
            *("ready", new.version, None, True, new.weight),
            *(before.loads + 1, before.unloads, before.load_seconds + new.seconds),
            execution=new.warm.execution,
        )
        now = self._clock()
        waiting = self._waiting.pop(new.name, {}).values()
        return [dataclasses.replace(w.job, queued_seconds=w.job.queued_seconds + now - w.since) for w in waiting], []

    def _refused(self, name: str, version: str, error: str) -> list[Job]:
        before = self.states.get(name, ModelState("loading", version))
        if name in self._serving:  # the version that worked stays in service
            self.states[name] = dataclasses.replace(before, error=f"a newer version was refused: {error}")
            return []
        self.states[name] = dataclasses.replace(before, status="failed", sha256=version, error=error, resident=False)
        return [waiting.job for waiting in self._waiting.pop(name, {}).values()]

    def _make_room(self, name: str, weight: int, held: dict[str, bool]) -> bool:
        """Ask others to leave. A version that the folder no longer has could not be read again, so it goes last; but
        that of the very model, where both have no room side by side.
        """
        irreplaceable = {_key(n, v) for n, v in self._serving.items() if self._on_disk[n] != v}
        own = _key(name, self._serving[name]) if name in self._serving else None
        busy = {key for key, has_jobs in held.items() if has_jobs}
        leaving = self._memory.make_room(weight, busy, irreplaceable, self._clock())
        for key in leaving:
            model = key.rsplit("@", 1)[0]
            log.info("%s: %s memory for %s", model, "ends its jobs, to make room in" if key in busy else "leaves", name)
            self._engine.remove(model)
            del self._serving[model]
            state = self.states[model]
            self.states[model] = dataclasses.replace(state, resident=False, unloads=state.unloads + 1)
            if key in irreplaceable and key != own:
                self._wanted[model] = None
        return bool(leaving)

    def _too_heavy(self, weight: int) -> str:
        assert self._budget is not None
        return f"it takes {weight / MIB:,.1f} MiB, more than model_memory ({self._budget / MIB:,.1f} MiB) allows"


def _key(name: str, version: str) -> str:
    return f"{name}@{version}"
