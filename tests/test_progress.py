"""What a run shows: lines in a log file, a bar on a terminal, points in TensorBoard event files."""

from __future__ import annotations

import io
import time
from pathlib import Path

import pytest
import toy_training as toy
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from training.progress import Progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, set by hand."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def report_all(where: Progress, clock: list[float], first: int, last: int, seconds: float) -> None:
    """A run of 100 steps of 8 images, from one step to another, reported every ten."""
    with where.start(toy.toy_run(steps=100), done=first, seconds=5.0) as shown:
        for step in range(first + 10, last + 1, 10):
            clock[0] += seconds
            shown.report(step, {"loss/linear": 1 / step, "[bits]": 0.5})
        assert shown.seconds() == 5.0 + seconds * (last - first) / 10


def points(events: Path, tag: str) -> list[tuple[int, float]]:
    accumulator = EventAccumulator(str(events))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


def test_a_log_file_gets_the_first_report_one_every_half_minute_and_the_last(
    tmp_path: Path, clock: list[float]
) -> None:
    out = io.StringIO()
    report_all(Progress(tmp_path, Console(file=out, width=20)), clock, 0, 100, seconds=8.0)
    lines = out.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["toy 10/100", "toy 50/100", "toy 90/100", "toy 100/100"]
    assert lines[1] == "toy 50/100  loss/linear 0.02  [bits] 0.5  10 images/s  40 s left"
    assert "\x1b" not in out.getvalue(), "a log file gets no colours"


def test_the_time_left_of_a_resumed_run_counts_the_steps_since(tmp_path: Path, clock: list[float]) -> None:
    out = io.StringIO()
    report_all(Progress(tmp_path, Console(file=out, width=200)), clock, 50, 60, seconds=8.0)
    assert out.getvalue().splitlines() == ["toy 60/100  loss/linear 0.01667  [bits] 0.5  10 images/s  32 s left"]


def test_a_terminal_gets_a_bar(tmp_path: Path, clock: list[float]) -> None:
    out = io.StringIO()
    report_all(Progress(tmp_path, Console(file=out, force_terminal=True, width=160)), clock, 0, 100, seconds=8.0)
    assert "100/100" in out.getvalue()
    assert "[bits] 0.5  10 images/s" in out.getvalue()
    assert out.getvalue().rstrip("\n").endswith("\x1b[?25h"), "the cursor is shown again"


def test_an_error_gives_the_cursor_back_and_keeps_the_points(tmp_path: Path, clock: list[float]) -> None:
    out = io.StringIO()
    where = Progress(tmp_path, Console(file=out, force_terminal=True, width=160))
    shown = where.start(toy.toy_run(), done=0, seconds=0.0)
    shown.__enter__()
    shown.report(10, {"loss": 1.0})
    shown.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert out.getvalue().rstrip("\n").endswith("\x1b[?25h")
    assert points(tmp_path, "loss") == [(10, 1.0)]


def test_other_devices_show_and_write_nothing(tmp_path: Path, clock: list[float]) -> None:
    out = io.StringIO()
    report_all(Progress(tmp_path / "events", Console(file=out), quiet=True), clock, 0, 100, seconds=60.0)
    assert out.getvalue() == ""
    assert not (tmp_path / "events").exists()


def test_event_files_hold_every_report_once_even_after_a_resume(tmp_path: Path, clock: list[float]) -> None:
    where = Progress(tmp_path, Console(file=io.StringIO()))
    report_all(where, clock, 0, 70, seconds=2.0)
    clock[0] += 1000
    report_all(where, clock, 50, 100, seconds=4.0)  # steps 51 to 70 are taken a second time
    steps, values = zip(*points(tmp_path, "loss/linear"), strict=True)
    assert steps == tuple(range(10, 101, 10))
    assert values == pytest.approx([1 / step for step in steps])
    assert points(tmp_path, "images_per_second") == [(s, 40.0 if s <= 50 else 20.0) for s in range(10, 101, 10)]
