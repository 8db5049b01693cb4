"""When a job would be done: from what workers tell of themselves and what is queued. Pure: plain data in and out.

A worker tells of each of its lanes (a model, and what is done with it) the fitted seconds of a step over n rows, a·n +
b, how many rows may step together, and in how many steps there is room for another row. With that, a job of n rows that
take T steps each is expected to be done, on the worker where that is soonest, after

    wait   (steps until there is room + steps queued before it / rows of all workers' batches) · seconds of a full step
    run    ⌈n / rows of a batch⌉ · T · seconds of a step with its rows and those that are there

both times the number of lanes that share the device: time is shared evenly between them.

A deadline is refused by `least`, which errs to the other side. It cannot be sooner than that, because it takes every
doubt for the job: other lanes are taken to be idle by the time it runs; of what other tenants have queued it waits for
no more than for its own tenant's, since tenants take turns; `STALE` seconds are taken off its wait, since what workers
told may be as old; its steps are taken at the pace of the fastest step that the lane ever took, however few its rows
were, or at that of the fit, if it is faster. So where the pool is idle, nothing is refused but what could not be done
even at that pace; and nothing at all before a lane has taken `MEASURED` steps for somebody, or where a worker that has
yet to load the model takes such jobs as well. What cannot be known is which of those that wait will be cancelled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from service.broker import Job, Line, Waiting, WorkerState
from service.scheduler import Load

STALE = 2.0  # seconds that what is told of a pool may be old
MEASURED = 10  # steps of a lane that are few enough to tell nothing


@dataclass(frozen=True)
class Forecast:
    """Seconds from now to a job's last row: as expected, and the least that it could take."""

    seconds: float
    least: float


def forecast(
    job: Job, pool: Sequence[WorkerState], waiting: Mapping[Line, Waiting], position: int | None = None
) -> Forecast | None:
    """For a job that is to be queued, or that is queued at `position`. None where no worker has told of its lane.

    A job whose solver is adaptive may take fewer steps than it says: give it one step where `least` matters.
    """
    name = f"{job.model}/{job.kind}"
    takers = [worker for worker in pool if worker.takes(job.model)]
    lanes = [(worker, worker.load[name]) for worker in takers if name in worker.load]
    if not lanes:
        return None
    places = sum(load.max_rows for _, load in lanes)
    before: float
    fair: float
    if position is None:
        before, fair = _before(job, waiting), _fair(job, waiting)
    else:
        before = fair = position * _mean_steps(job, waiting)
    seconds = min(_expected(job, worker, load, before / places) for worker, load in lanes)
    if any(_may_load(worker, job.model) for worker in takers if name not in worker.load):
        return Forecast(seconds, least=0.0)
    return Forecast(seconds, least=min(_least(job, load, fair / places) for _, load in lanes))


def retry_after(units: int, queued: int, pool: Sequence[WorkerState], waiting: Mapping[Line, Waiting]) -> float:
    """Seconds until `units` of the `queued` step-units should be done, 1 … 3600: their part of the time that the pool
    is predicted to take for all that it has and all that waits; of more than are queued, all of it, since a job of any
    size has room where nothing is queued."""
    paces: dict[str, list[float]] = {}
    seconds = 0.0
    ready = [worker for worker in pool if worker.ready]
    for worker in ready:
        for name, load in worker.load.items():
            pace = _full(load) / load.max_rows  # seconds of a row's step
            paces.setdefault(name, []).append(pace)
            seconds += load.left * pace
    for line, there in waiting.items():
        known = paces.get(f"{line.model}/{line.kind}", [])
        seconds += there.steps * (sum(known) / len(known) if known else 0.0)
    return max(1.0, min(seconds / max(1, len(ready)) * min(1.0, units / max(1, queued)), 3600.0))


def _expected(job: Job, worker: WorkerState, load: Load, steps_before: float) -> float:
    name = f"{job.model}/{job.kind}"
    lanes = 1 + sum(bool(other.running or other.waiting) for key, other in worker.load.items() if key != name)
    wait = (_room_in(job, load) + steps_before) * _full(load)
    rows = min(load.max_rows, load.running + load.waiting + job.rows)
    run = -(-job.rows // load.max_rows) * job.steps * (load.row_seconds * rows + load.step_seconds)
    return (wait + run) * lanes


def _may_load(worker: WorkerState, model: str) -> bool:
    """Whether a worker that does not have the model in memory takes jobs for it all the same."""
    state = worker.models.get(model)
    return state is not None and state.status != "failed"


def _least(job: Job, load: Load, steps_before: float) -> float:
    if load.steps < MEASURED:
        return 0.0
    room_in = _room_in(job, load) if set(load.tenants) <= {job.tenant} else load.first_in
    pace = _full(load) if load.step_seconds > 0 else load.fastest  # without b it was fitted to one size, or to noise
    wait = (room_in + steps_before) * pace - STALE
    batches = -(-job.rows // load.max_rows)
    # Of a batch in the mean; there may have never been one of so few rows.
    own = load.row_seconds * job.rows / batches + load.step_seconds
    return max(0.0, wait) + batches * job.steps * min(load.fastest, own)


def _room_in(job: Job, load: Load) -> int:
    return load.urgent_in if job.priority == "interactive" else load.patient_in


def _full(load: Load) -> float:
    """Seconds of a step of a full batch."""
    return load.row_seconds * load.max_rows + load.step_seconds


def _ahead(job: Job, waiting: Mapping[Line, Waiting]) -> dict[Line, Waiting]:
    """What is queued for the job's lane and does not come after it."""
    priorities = ("interactive",) if job.priority == "interactive" else ("interactive", "batch")
    return {
        line: there
        for line, there in waiting.items()
        if line.model == job.model and line.kind == job.kind and line.priority in priorities
    }


def _before(job: Job, waiting: Mapping[Line, Waiting]) -> int:
    return sum(there.steps for there in _ahead(job, waiting).values())


def _fair(job: Job, waiting: Mapping[Line, Waiting]) -> int:
    """Steps that come before the job even where every other tenant is given no more than its own has."""
    by_tenant: dict[str, int] = {}
    for line, there in _ahead(job, waiting).items():
        by_tenant[line.tenant] = by_tenant.get(line.tenant, 0) + there.steps
    own = by_tenant.pop(job.tenant, 0)
    return own + sum(min(steps, own) for steps in by_tenant.values())


def _mean_steps(job: Job, waiting: Mapping[Line, Waiting]) -> float:
    """Of a job that waits for the same."""
    ahead = _ahead(job, waiting).values()
    jobs = sum(there.jobs for there in ahead)
    return sum(there.steps for there in ahead) / jobs if jobs else 0.0
