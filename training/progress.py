"""What a training run shows: a progress bar with loss, images/s and ETA, and TensorBoard event files."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from torch.utils.tensorboard import SummaryWriter

from training.config import Run

LINE_EVERY = 30.0  # seconds between lines where the output is a file, not a terminal


class Progress:
    """Where progress goes. `quiet` (every device but the first) shows and writes nothing."""

    def __init__(self, events: Path | None, console: Console | None = None, quiet: bool = False) -> None:
        self.events, self.console, self.quiet = events, console or Console(), quiet

    def start(self, run: Run, done: int, seconds: float) -> Clock:
        return Clock(run, done, seconds, self)


class Clock:
    """The progress of one run. Times are wall-clock seconds."""

    def __init__(self, run: Run, done: int, seconds: float, progress: Progress) -> None:
        self._run, self._done, self._before, self._progress = run, done, seconds, progress
        self._began = self._line_at = self._last_at = time.perf_counter()
        self._last_step = done
        self._writer = None if progress.quiet or progress.events is None else SummaryWriter(str(progress.events), purge_step=done)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=progress.console,
            disable=progress.quiet or not progress.console.is_terminal,
        )
        self._task = self._bar.add_task(run.family, total=run.steps, completed=done, status="")
        self._bar.start()

    def seconds(self) -> float:
        """Seconds of training so far, earlier parts of the run included."""
        return self._before + time.perf_counter() - self._began

    def report(self, step: int, values: Mapping[str, float]) -> None:
        """Show and write the values of a step (losses in the family's own unit)."""
        now = time.perf_counter()
        rate = (step - self._last_step) * self._run.batch_size / max(now - self._last_at, 1e-9)
        self._last_step, self._last_at = step, now
        status = "  ".join(f"{name} {value:.4g}" for name, value in values.items()) + f"  {rate:.0f} images/s"
        self._bar.update(self._task, completed=step, status=status)
        if self._writer is not None:
            for name, value in {**values, "images_per_second": rate}.items():
                self._writer.add_scalar(name, value, step)
        if self._bar.disable and not self._progress.quiet and (now - self._line_at > LINE_EVERY or step == self._run.steps):
            self._line_at = now
            left = (now - self._began) / max(step - self._done, 1) * (self._run.steps - step)
            self._progress.console.print(
                f"{self._run.family} {step}/{self._run.steps}  {status}  {left:.0f} s left", highlight=False, soft_wrap=True
            )

    def finish(self) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()
