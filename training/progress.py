"""What a training run shows: a progress bar (in a log file: lines) with loss, images/s and ETA; TensorBoard events.

And what an evaluation shows: a bar for each of its parts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.utils.tensorboard import SummaryWriter

from training.config import Run
from training.measure import Report

LINE_EVERY = 30.0  # seconds between lines where the output is a file, not a terminal


class Progress:
    """Where progress goes: a console, a folder of event files; nowhere if `quiet`, as every device but the first is."""

    def __init__(self, events: Path, console: Console, quiet: bool = False) -> None:
        self.events, self.console, self.quiet = events, console, quiet

    def start(self, run: Run, done: int, seconds: float) -> Clock:
        """The progress of a run of which `done` steps were taken before, in so many seconds."""
        return Clock(self, run, done, seconds)


class Clock:
    """The progress of one run, from `with` to the end of its block. Times are wall-clock seconds."""

    def __init__(self, progress: Progress, run: Run, done: int, seconds: float) -> None:
        self._run, self._done, self._before = run, done, seconds
        self._began = self._reported_at = time.perf_counter()
        self._reported, self._line_at = done, -math.inf
        shown = not progress.quiet
        # Steps after the resume state are taken again: their points are purged.
        self._writer = SummaryWriter(str(progress.events), purge_step=done + 1) if shown else None
        self._lines = progress.console if shown and not progress.console.is_terminal else None
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(),
            console=progress.console,
            disable=not shown or not progress.console.is_terminal,
        )
        self._task = self._bar.add_task(run.family, total=run.steps, completed=done, status="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def seconds(self) -> float:
        """Seconds of training so far, earlier parts of the run included."""
        return self._before + time.perf_counter() - self._began

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show and write the values of a step (losses in the family's own unit)."""
        now = time.perf_counter()
        rate = (step - self._reported) * self._run.batch_size / max(now - self._reported_at, 1e-9)
        self._reported, self._reported_at = step, now
        status = "  ".join(f"{name} {value:.4g}" for name, value in values.items()) + f"  {rate:.0f} images/s"
        self._bar.update(self._task, completed=step, status=status)
        if self._writer is not None:
            for name, value in {**values, "images_per_second": rate}.items():
                self._writer.add_scalar(name, value, step)
        if self._lines is not None and (now - self._line_at > LINE_EVERY or step == self._run.steps):
            self._line_at = now
            left = (now - self._began) / (step - self._done) * (self._run.steps - step)
            self._lines.print(
                f"{self._run.family} {step}/{self._run.steps}  {status}  {left:.0f} s left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


class Bars:
    """A progress bar for each part of the work; where the output is no terminal a line each, and more of what lasts."""

    def __init__(self, console: Console) -> None:
        self.console = console

    @contextmanager
    def task(self, name: str) -> Iterator[Report]:
        began = line_at = time.perf_counter()
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Bar(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task = bar.add_task(name, total=None)

            def report(done: int, total: int) -> None:
                nonlocal line_at
                bar.update(task, completed=done, total=total)
                now = time.perf_counter()
                if not self.console.is_terminal and now - line_at > LINE_EVERY and done < total:
                    line_at = now
                    self._print(f"{name}: {done:,}/{total:,}")

            yield report
        self._print(f"{name}: {time.perf_counter() - began:.0f} s")

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)
