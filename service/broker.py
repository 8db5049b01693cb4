"""The port between the API and the workers. Implemented by `broker_local` (one machine, no Redis), and by
`broker_redis` and `claims_redis` (any number of machines that share a Redis).

A job goes one way and its events come back; what is in them (`payload`) is between routes and workers
(`service.messages`). Delivery is at least once: a job whose worker died is given to another. A job's payload
determines its answer, so a rerun tells the same again; receivers drop what they have already seen.

    API side        Broker   submit, cancel, events, status, position, pool
    worker side     Claims   run, announce, claim, cancellations, publish, hand_back, leave
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, TypeAlias

from service.execution import Execution, execution_in
from service.scheduler import Load

Priority: TypeAlias = Literal["interactive", "batch"]


MAX_DEATHS = 3  # workers that may stop while they do this job and no other: after that it is given up
SUSPECT = 2  # deaths, in whatever company, after which a worker does a job alone, to see whether it is to blame
NOBODY: Mapping[str, Sequence[str]] = MappingProxyType({})  # model -> no tenant
CANCELLED = "cancelled"  # why a job was lost that nobody wanted any longer
UNSERVED = "no worker serves"  # its model any longer: how the reason begins where that was removed, or failed


@dataclass(frozen=True)
class Job:
    """A unit of work for one model."""

    id: str
    model: str
    payload: bytes
    rows: int  # chains (images) that it runs
    units: int  # predicted work: rows × steps × network evaluations a step
    kind: Literal["draw", "score", "map"] = "draw"  # what is done with the model
    steps: int = 1  # that a row takes, as a worker's `Load` counts them; about as many of an adaptive solver
    priority: Priority = "interactive"
    timeout: float | None = None  # seconds from submission; after that nobody waits for the answer
    tenant: str = ""  # who asks
    key: str | None = None  # idempotency: a job of the same key and digest stands for this one
    digest: str = ""  # of what was asked
    trace: str = ""  # the request's span, as a W3C traceparent; "": nobody traces it
    about: bytes = b""  # what the API wants to read again in `status`, whichever replica is asked
    attempt: int = 1  # how many workers it has been given to
    deaths: int = 0  # workers that stopped after they had told something of it
    deaths_alone: int = 0  # and of these, workers that had no other job then
    queued_seconds: float = 0.0  # how long it waited for this worker

    @property
    def line(self) -> Line:
        return Line(self.model, self.kind, self.priority, self.tenant)


@dataclass(frozen=True)
class Event:
    """Something that a worker tells of a job. `final` ends the stream."""

    payload: bytes
    final: bool = False
    number: int = 0  # among the job's events, from 1; the broker counts


@dataclass(frozen=True)
class Status:
    """What became of a job so far."""

    job: Job
    state: Literal["queued", "running", "ended"]
    lost: str | None = None  # why it ended without an answer


class Line(NamedTuple):
    """Whose jobs wait in the queue for the same, in the same order."""

    model: str
    kind: str
    priority: str
    tenant: str


@dataclass(frozen=True)
class Waiting:
    """What waits in a line: jobs, and the steps that their rows are to take, summed over rows."""

    jobs: int
    steps: int


@dataclass(frozen=True)
class ModelState:
    """A model in the hands of one worker."""

    status: Literal["ready", "loading", "failed"]  # ready: it was tried and works; it may have to be loaded again first
    sha256: str = ""  # of model.json as it was loaded: tells versions apart
    error: str | None = None  # why it failed, or, of a ready model, why a newer version was refused
    resident: bool = True  # in memory now
    weight: int = 0  # bytes that it takes there, measured
    loads: int = 0  # how often it was loaded by this worker
    unloads: int = 0
    load_seconds: float = 0.0  # all loads together
    execution: Execution | None = None  # how a ready model draws


@dataclass(frozen=True)
class WorkerState:
    """What a worker last announced."""

    name: str
    device: str
    ready: bool  # every model has been tried and those that work are warm
    models: Mapping[str, ModelState] = field(default_factory=dict)
    load: Mapping[str, Load] = field(default_factory=dict)  # by "<model>/draw", "…/score" and "…/map"
    jobs: int = 0  # that it works on
    draining: bool = False  # it takes no more jobs, and ends

    def takes(self, model: str) -> bool:
        """Whether a job for the model is for this worker: of those that it has not tried yet it tries that one next."""
        tried = self.models.get(model)
        return self.ready or (not self.draining and tried is not None and tried.status != "failed")


def state_in(data: Mapping[str, Any]) -> WorkerState:
    """What `dataclasses.asdict` made of a state, back again."""
    models = {
        name: ModelState(**{**state, "execution": execution_in(state["execution"])})
        for name, state in data["models"].items()
    }
    load = {name: Load(**told) for name, told in data["load"].items()}
    return WorkerState(**{**data, "models": models, "load": load})


class QueueFull(Exception):
    """No room: `retry_after` is in how many seconds there should be, by what is predicted of the work queued."""

    def __init__(self, retry_after: float, queued: int, limit: int) -> None:
        super().__init__(f"{queued} step-units are queued, of {limit} at most")
        self.retry_after, self.queued, self.limit = retry_after, queued, limit


class NoWorker(Exception):
    """No worker is connected that could ever take the job."""


class KeyTaken(Exception):
    """The idempotency key stands for a job that was asked for with another body."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key!r} was used for another request")
        self.key = key


class BrokerAway(Exception):
    """The broker cannot be reached."""


class JobLost(Exception):
    """The job ended without an answer: it killed every worker that it was given to."""


class Broker(abc.ABC):
    """The API's side."""

    @abc.abstractmethod
    async def submit(self, job: Job) -> str:
        """Queue a job. Returns the id of the job that stands for it: its own, or that of an earlier one with its key.
        Raises `QueueFull`, `NoWorker` or `KeyTaken`; `BrokerAway`, as all of these methods do.
        """

    @abc.abstractmethod
    async def cancel(self, job_id: str) -> None:
        """Stop a job at its next step; its events end. Cancelling one that has ended, or that never was, does
        nothing.
        """

    @abc.abstractmethod
    def events(self, job_id: str, after: int = 0, wait: bool = True) -> AsyncIterator[Event]:
        """The job's events from number after + 1 on, until the final one; without waiting, those that were told by now.
        Raises `KeyError` for a job that is not known, `JobLost` when it ended without an answer. A rerun may repeat
        events, under new numbers.
        """

    @abc.abstractmethod
    async def status(self, job_id: str) -> Status:
        """Raises `KeyError` for a job that is not known, or no longer."""

    @abc.abstractmethod
    async def position(self, job_id: str) -> int:
        """How many queued jobs come before this one; 0 when it is next, or already with a worker."""

    @abc.abstractmethod
    async def queued_units(self) -> int:
        """Step-units of the jobs that have not ended."""

    @abc.abstractmethod
    async def waiting(self) -> Mapping[Line, Waiting]:
        """What is queued and with no worker yet."""

    @abc.abstractmethod
    async def pool(self) -> Sequence[WorkerState]:
        """The workers that are connected."""


def is_wanted(job: Job, wanted: Mapping[str, Sequence[str]]) -> bool:
    """By a claim for these models, each with the tenants of whom there is enough."""
    return job.model in wanted and job.tenant not in wanted[job.model]


class Claims(abc.ABC):
    """A worker's side."""

    @abc.abstractmethod
    async def run(self) -> None:
        """Keep the connection going; returns when the broker is gone."""

    @abc.abstractmethod
    async def announce(self, state: WorkerState) -> None:
        """Tell what this worker can do, now and whenever that changes."""

    @abc.abstractmethod
    async def claim(
        self, models: Sequence[str], absent: Sequence[str] = (), enough: Mapping[str, Sequence[str]] = NOBODY
    ) -> Job:
        """Wait for a job for one of `models`, which are in memory, or for one of `absent`, which would have to be
        loaded first; take it. Jobs for the latter go rather to a worker that has the model in memory and asks as well.
        `enough` says of whom no more is wanted: model -> tenants.

        Interactive jobs come before batch jobs, unless these came ten seconds earlier. Among the jobs of one priority
        for one model, tenants take turns by the work that each was given.

        Once it is cancelled it wants nothing: a job that is under way goes back, and that counts as no attempt.
        """

    @abc.abstractmethod
    def cancellations(self) -> AsyncIterator[str]:
        """Ids of this worker's jobs that nobody wants any longer, as they come."""

    @abc.abstractmethod
    async def publish(self, job_id: str, events: Sequence[Event]) -> None:
        """Tell events of a job, in order. After a final one the job is no longer this worker's. What is told of a job
        that is another's by now is dropped.
        """

    @abc.abstractmethod
    async def hand_back(self, job_ids: Sequence[str]) -> None:
        """Let other workers do these: they are queued again at once, and this attempt does not count."""

    @abc.abstractmethod
    async def leave(self) -> None:
        """Take nothing more, and hand back what is under way. To be called before `run` is cancelled."""
