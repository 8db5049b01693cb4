"""Runs Samplers and Densities step by step on one device. Knows no family by name, no HTTP, no transport.

A *lane* is one model (one version of it) and what is done with it, drawing or scoring. All rows of a lane step
together in one batch, at whatever ticks they stand. The scheduler says who steps; what happens goes out as messages
of a job.

Exactness: a row's floats must not depend on how many others step with it, but matrix products and convolutions choose
their order of summation by size. So a batch is filled up with copies of its last row, to sizes for which a measurement
at load saw every float agree (`service.warmup`). With `determinism="pixels"` drawing is content with batches whose
8-bit images were the same in that measurement.

Isolation: a step that raises is taken again row by row, and only the jobs of the rows that raise fail; so it is with
their beginnings and results. A row whose result is not finite fails alone. Where the device itself is lost no row is to
blame: then the engine raises, and its process has to end.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from models import _rows
from models._protocol import Model, Rows
from service.execution import Determinism, Execution, Precision
from service.messages import (
    Completed,
    Failed,
    Generate,
    ImageDone,
    MapImages,
    Message,
    Pixels,
    Progress,
    ScoreImages,
    Started,
    Task,
)
from service.programs import DrawRow, Program, ScoreRow, programs
from service.scheduler import Load, Plan, Row, Scheduler, Ticket
from service.warmup import Tried, tried

log = logging.getLogger(__name__)

PROGRESS_EVERY = 0.25  # seconds between progress messages of a job, previews apart

# Task -> what it is called, and why a model cannot do it.
_LANES: dict[type[Task], tuple[str, str]] = {
    Generate: ("draw", "draws no images"),
    ScoreImages: ("score", "has no likelihood"),
    MapImages: ("map", "draws no heat maps"),
}

PLAIN = Execution()

Emit = Callable[[str, Message, bool], None]  # job, message, final


class Engine:
    """One device's models and the jobs that run on them. Not thread-safe: one thread drives it."""

    def __init__(
        self,
        emit: Emit,
        device: torch.device | str = "cpu",
        max_rows: int = 64,
        clock: Callable[[], float] = time.monotonic,
        determinism: Determinism = "exact",
    ) -> None:
        self._emit, self._device, self._clock = emit, torch.device(device), clock
        self._max_rows, self._determinism = max_rows, determinism
        self._scheduler = Scheduler(max_rows)
        self._models: dict[str, _Served] = {}
        self._lanes: dict[str, _Lane] = {}
        self._jobs: dict[str, _Job] = {}

    # --------------------------------------------------------------------------------------------------------------
    # models

    def put(
        self,
        model_id: str,
        version: str,
        model: Model,
        drawing: Model | None = None,
        execution: Execution = PLAIN,
    ) -> None:
        """Serve a model in place of any older version: rows of that one run on to their end. Raises whatever the model
        raises when it draws or scores one image; then the older version stays.
        """
        self.take_in(model_id, version, self.warm(model_id, model, drawing, execution))

    def warm(self, model_id: str, model: Model, drawing: Model | None = None, execution: Execution = PLAIN) -> Warm:
        """The first half of `put`: try a model with a step of everything that it can do. May be called from another
        thread than the one that drives the engine, so that rows of other models step meanwhile.

        drawing: what draws in its place (`models._modes`), and how; scores and maps are always the model's own.
        """
        lanes = []
        for program in programs(model, drawing):
            lanes.append(_Lane(program, tried(program, self._device, self._max_rows, self._determinism, self._clock)))
        draws = lanes[0]
        draws.precision = execution.precision
        told = dataclasses.replace(
            execution,
            determinism=self._determinism,
            filled_to=draws.tried.multiple,
            unfilled=sorted(draws.tried.alike),
            seconds_per_step={str(rows): draws.tried.step_seconds(rows) for rows in sorted({1, draws.tried.max_rows})},
        )
        return Warm(model, tuple(lanes), told)

    def take_in(self, model_id: str, version: str, warm: Warm) -> None:
        """The second half of `put`."""
        self._models[model_id] = _Served(version, warm.model)
        for lane in warm.lanes:
            self._add(model_id, lane)
        self._retire()

    def renew(self, model_id: str, warm: Warm) -> None:
        """Draw from now on as `warm` does, which was made of the model in service; jobs that have come go on as they
        are."""
        self._add(model_id, warm.lanes[0])
        self._retire()

    def serves(self, model_id: str, model: Model) -> bool:
        """Whether this very model takes jobs."""
        served = self._models.get(model_id)
        return served is not None and served.model is model

    def _add(self, model_id: str, lane: _Lane) -> None:
        served, kind = self._models[model_id], lane.program.name
        lane.version = served.version
        name = f"{model_id}@{served.version}/{kind}"
        while name in self._lanes:  # rows of it may still run
            name += "'"
        few, many = lane.tried.multiple, lane.tried.max_rows
        for rows in sorted({few, max(few, many)}):
            self._scheduler.prepare(name, many, rows, lane.tried.step_seconds(rows))
        self._lanes[name] = lane
        served.lanes[kind] = name

    def versions(self) -> dict[str, bool]:
        """What is in memory, as "<model>@<version>", and whether any job runs or waits there."""
        self._retire()
        busy: dict[str, bool] = {}
        for name in self._lanes:
            version = name.rsplit("/", 1)[0]
            busy[version] = busy.get(version, False) or bool(self._scheduler.lane_jobs(name))
        return busy

    def remove(self, model_id: str) -> None:
        """Take no new jobs for a model; those that run go on to their end."""
        self._models.pop(model_id, None)
        self._retire()

    def _retire(self) -> None:
        """Let go of the lanes that take no more jobs, once idle."""
        served = {name for model in self._models.values() for name in model.lanes.values()}
        for name in [n for n in self._lanes if n not in served and not self._scheduler.lane_jobs(n)]:
            del self._lanes[name]
            self._scheduler.forget(name)

    # ----------------------------------------------------------------------------------------------------------------
    # jobs

    def submit(
        self,
        job_id: str,
        model_id: str,
        task: Task,
        priority: str = "interactive",
        timeout: float | None = None,
        queued_seconds: float = 0.0,
        tenant: str = "",
    ) -> None:
        """A new job. One for a model that is not here is answered `Failed`. Raises `ValueError` for a job that is there
        already, and for images of another shape than the model's.
        """
        if model_id not in self._models:
            self._emit(job_id, Failed("unknown-model", f"model: {model_id} is not loaded here"), True)
            return
        kind, what = _LANES[type(task)]
        lane = self._models[model_id].lanes.get(kind)
        if lane is None:
            self._emit(job_id, Failed("unknown-model", f"model: {model_id} {what}"), True)
            return
        submitted = self._clock() - queued_seconds
        rows = task.n if isinstance(task, Generate) else len(task.images)
        expires = None if timeout is None else submitted + timeout
        job = _Job(lane, rows, submitted, self._lanes[lane].program.rows_of(task))
        first = job.rows[0]
        ticks = first.predicted_ticks
        ticket = Ticket(
            *(job_id, lane, rows, "batch" if priority == "batch" else "interactive", expires, tenant),
            work=ticks * first.evaluations_per_tick,
            ticks=ticks,
        )
        self._scheduler.submit(ticket, submitted)
        self._jobs[job_id] = job

    def cancel(self, job_id: str) -> None:
        """Drop a job at the next step; it tells `Failed("cancelled")`."""
        self._scheduler.cancel(job_id)

    def forget(self, job_id: str) -> None:
        """Drop a job without a word: somebody else does it."""
        self._scheduler.drop(job_id)
        self._jobs.pop(job_id, None)
        self._let_go()

    @property
    def jobs(self) -> int:
        """Jobs that have not ended."""
        return len(self._jobs)

    @property
    def held_bytes(self) -> int:
        """Memory that running rows hold on the device."""
        return sum(_rows.nbytes(lane.rows) for lane in self._lanes.values() if lane.rows is not None)

    def load(self) -> dict[str, Load]:
        """What each model's lanes do, by "<model>/draw", "<model>/score" and "<model>/map"."""
        return {
            f"{model_id}/{kind}": self._scheduler.load(lane)
            for model_id, served in self._models.items()
            for kind, lane in served.lanes.items()
        }

    def step(self) -> bool:
        """Take the next step that the scheduler plans. False when there was nothing to do."""
        plan = self._scheduler.plan(self._clock())
        for job_id, reason in plan.leave:
            self._end(job_id, Failed(reason, f"the job was {reason} before it finished"))
        if plan.leave:
            self._let_go()
        if plan.lane is None:
            return bool(plan.leave)
        with torch.inference_mode():
            self._step(plan, self._lanes[plan.lane])
        self._retire()
        return True

    def _let_go(self) -> None:
        """Free what is held of rows whose jobs are gone, in every lane: it may be long until one steps again."""
        for lane in self._lanes.values():
            self._keep(lane, [row for row in lane.ids if row.job in self._jobs])
        self._retire()

    # ------------------------------------------------------------------------------------------------------- one step

    def _step(self, plan: Plan, lane: _Lane) -> None:
        assert plan.lane is not None
        began = self._clock()
        self._join(lane, plan.join, began)
        rows, together = len(lane.ids), True
        if lane.rows is not None:
            try:
                # A copy of the dataclass (not of its tensors), so that a step that raises has not moved on any column.
                lane.rows = lane.program.step(dataclasses.replace(lane.rows))
            except Exception:
                log.exception("%s: a step over %d rows raised; taking it row by row", plan.lane, rows)
                together = False
                self._step_apart(lane)
        lane.left = [left - 1 for left in lane.left]
        finished: list[Row] = []
        if lane.rows is not None and min(lane.left) <= 0:
            left = lane.rows.left.tolist()  # `left` is exact here; for adaptive solvers it is a lower bound
            lane.left = left[: len(lane.ids)]
            finished = [row for row, n in zip(lane.ids, lane.left, strict=True) if n <= 0]
            self._deliver(lane, finished)
        seconds = self._clock() - began
        ended = [row for row in finished if row.job in self._jobs]
        self._scheduler.report(plan.lane, rows, seconds, ended, together=together)
        self._account(lane, finished, seconds)
        self._keep(lane, [row for row in lane.ids if row.job in self._jobs])  # it may be long until it steps again
        self._scheduler.charge(plan.lane, self._clock() - began - seconds)  # previews may cost more than a step

    def _join(self, lane: _Lane, joining: Sequence[Row], now: float) -> None:
        if not joining:
            return
        for row in joining:
            job = self._jobs[row.job]
            if job.began is None:
                job.began = now
                self._emit(row.job, Started(now - job.submitted), False)
        try:
            fresh: list[tuple[list[Row], Rows]] = [
                (list(joining), lane.program.init([self._jobs[r.job].rows[r.item] for r in joining]))
            ]
        except Exception:
            log.exception("%d rows cannot begin together; trying each alone", len(joining))
            _answers(self._device)
            fresh = []
            for row in joining:
                if row.job not in self._jobs:
                    continue
                try:
                    fresh.append(([row], lane.program.init([self._jobs[row.job].rows[row.item]])))
                except Exception as e:
                    self._fail(row.job, e)
        live = [] if lane.rows is None else [_rows.take(lane.rows, range(len(lane.ids)))]
        parts = live + [part for _, part in fresh]
        if parts:
            lane.rows = lane.filled(_rows.cat(parts))
        for ids, part in fresh:
            lane.ids += ids
            lane.left += part.left.tolist()
        self._keep(lane, [row for row in lane.ids if row.job in self._jobs])

    def _keep(self, lane: _Lane, ids: Sequence[Row]) -> None:
        """Let every other row go."""
        if len(ids) == len(lane.ids):
            return
        keep = set(ids)
        at = [i for i, row in enumerate(lane.ids) if row in keep]
        lane.ids, lane.left = [lane.ids[i] for i in at], [lane.left[i] for i in at]
        lane.rows = lane.filled(_rows.take(lane.rows, at)) if at and lane.rows is not None else None

    def _step_apart(self, lane: _Lane) -> None:
        """Take the step that raised for each row alone; fail the jobs of those that raise again."""
        assert lane.rows is not None
        _answers(self._device)
        parts: list[Rows] = []
        ids: list[Row] = []
        left: list[int] = []
        for i, row in enumerate(lane.ids):
            if row.job not in self._jobs:  # another row of its job has failed meanwhile
                continue
            try:
                part = lane.program.step(lane.filled(_rows.take(lane.rows, [i])))
            except Exception as e:
                self._fail(row.job, e)
            else:
                parts.append(_rows.take(part, [0]))
                ids.append(row)
                left.append(lane.left[i])
        lane.rows = lane.filled(_rows.cat(parts)) if parts else None
        lane.ids, lane.left = ids, left
        self._keep(lane, [row for row in lane.ids if row.job in self._jobs])

    def _deliver(self, lane: _Lane, finished: Sequence[Row]) -> None:
        """Tell the results of finished rows and let them go."""
        if not finished:
            return
        assert lane.rows is not None
        done = set(finished)
        at = [i for i, row in enumerate(lane.ids) if row in done]
        ticks = lane.rows.tick[at].tolist()
        for row, result, taken in zip(finished, self._results(lane, at), ticks, strict=True):
            if row.job not in self._jobs:
                continue
            job = self._jobs[row.job]
            job.network_evaluations += taken * job.rows[row.item].evaluations_per_tick
            if result is None:
                result = FloatingPointError("the result is not finite")
            if isinstance(result, Exception):
                self._fail(row.job, result)
                continue
            message = lane.program.message(row.item, result)
            if isinstance(message, ImageDone):
                job.images[row.item] = message.pixels
            self._emit(row.job, message, False)
        self._keep(lane, [row for row in lane.ids if row not in done and row.job in self._jobs])

    def _results(self, lane: _Lane, at: Sequence[int]) -> list[Any]:
        """The result of each of these rows: None where it is not finite, an exception where it raised one."""
        assert lane.rows is not None
        try:
            return lane.program.result(lane.filled(_rows.take(lane.rows, at)))[: len(at)]
        except Exception as e:
            if len(at) == 1:
                _answers(self._device)
                return [e]
            log.exception("the results of %d rows raised together; asking for each alone", len(at))
        _answers(self._device)
        return [result for i in at for result in self._results(lane, [i])]

    def _account(self, lane: _Lane, finished: Sequence[Row], seconds: float) -> None:
        """Keep the jobs' books, tell progress, and end those that are complete."""
        ended = {row.job for row in finished}
        here = {row.job for row in lane.ids}
        now = self._clock()
        for job_id in [j for j in {**dict.fromkeys(ended), **dict.fromkeys(here)} if j in self._jobs]:
            job = self._jobs[job_id]
            job.compute_seconds += seconds
            job.finished += sum(row.job == job_id for row in finished)
            if job.finished == job.total:
                queue = (job.began or now) - job.submitted
                cost = (queue, job.compute_seconds, job.network_evaluations)
                self._end(job_id, Completed(*cost, lane.precision, lane.version))
            else:
                self._progress(job_id, job, lane, now)

    def _progress(self, job_id: str, job: _Job, lane: _Lane, now: float) -> None:
        task = job.rows[0]
        if not isinstance(task, DrawRow) or task.draw.steps == 1 or job.began is None:
            return
        steps, ticks = task.draw.steps, task.ticks
        at = [i for i, row in enumerate(lane.ids) if row.job == job_id]
        if ticks is not None:
            taken = sum(steps * (ticks - max(0, lane.left[i])) for i in at) // ticks
        else:
            taken = 0 if lane.rows is None else sum(int(steps * part) for part in lane.rows.progress()[at].tolist())
        taken += steps * job.finished
        step = taken // job.total
        due = task.preview_every is not None and step // task.preview_every > job.told // task.preview_every
        if step <= job.told or not (due or now - job.told_at >= PROGRESS_EVERY):
            return
        eta = (now - job.began) * (steps * job.total - taken) / taken
        previews: tuple[Pixels | None, ...] = ()
        if due and lane.rows is not None:
            shown: dict[int, Pixels | None] = dict(job.images)
            drawn = self._results(lane, at)
            if (error := next((e for e in drawn if isinstance(e, Exception)), None)) is not None:
                self._fail(job_id, error)
                return
            shown |= {lane.ids[i].item: picture for i, picture in zip(at, drawn, strict=True)}
            previews = tuple(shown.get(k) for k in range(job.total))
        job.told, job.told_at = step, now
        self._emit(job_id, Progress(step, steps, eta, previews), False)

    def _fail(self, job_id: str, error: Exception) -> None:
        log.warning("job %s failed: %s: %s", job_id, type(error).__name__, error)
        self._scheduler.drop(job_id)
        self._end(job_id, Failed("row", f"{type(error).__name__}: {error}"))

    def _end(self, job_id: str, message: Completed | Failed) -> None:
        if self._jobs.pop(job_id, None) is not None:
            self._emit(job_id, message, True)


def _answers(device: torch.device) -> None:
    """Raises what the device raises, where it is lost, as a GPU is to the process in which a kernel has failed: every
    row would seem to be to blame."""
    if device.type != "cpu":
        torch.zeros(1, device=device).item()


@dataclass(frozen=True)
class Warm:
    """A model whose programs were tried and timed, the one that draws first."""

    model: Model
    lanes: tuple[_Lane, ...]
    execution: Execution


@dataclass
class _Served:
    """A model that takes jobs, and by which lanes."""

    version: str
    model: Model
    lanes: dict[str, str] = field(default_factory=dict)  # what is done with it -> the lane's name


@dataclass
class _Lane:
    program: Program
    tried: Tried
    ids: list[Row] = field(default_factory=list)  # whose rows `rows` begins with; copies of the last fill it up
    rows: Rows | None = None
    precision: Precision = "float32"
    version: str = ""  # of the model, where it is served
    left: list[int] = field(default_factory=list)  # of `ids`: lower bounds of the steps left, kept on the host

    def filled(self, rows: Rows) -> Rows:
        """Filled up with copies of the last row to a size for which floats do not depend on the size."""
        return _rows.pad(rows, self.tried.size(_rows.count(rows)))


@dataclass
class _Job:
    lane: str
    total: int
    submitted: float
    rows: list[DrawRow] | list[ScoreRow]
    began: float | None = None
    finished: int = 0
    compute_seconds: float = 0.0
    network_evaluations: int = 0  # of the rows that are finished
    told: int = 0  # the step of the last progress message
    told_at: float = -math.inf
    images: dict[int, Pixels] = field(default_factory=dict)  # finished ones, for previews
