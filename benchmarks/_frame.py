"""What all benchmarks share: a budget of time, interleaved rounds, a file of every measurement, the machine's name.

A benchmark is a module with

    WEIGHT                  its part of the whole time, when all of them run
    arguments(parser)       what it takes besides what all take
    run(bench, args)        measures, and calls `bench.record` for every number
    page(results)           {marker: Markdown}: what docs/benchmarks.md says of a results file, between such markers

Whatever is compared is measured in turns, round after round, so that a machine that slows down slows all of it down.
A number on the page is the median over the rounds, with the least and the most. With `--minutes 0` there is one round
of the smallest size: it shows that a benchmark works, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import psutil

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "benchmarks.md"
MOST_ROUNDS = 7
ROUNDS = 3  # that the time is laid out for
PACKAGES = ("torch", "numpy", "httpx", "uvicorn", "fastapi")  # whose versions a result names

T = TypeVar("T")
Case: TypeAlias = Mapping[str, str | int | float | bool]  # what was measured: its settings by name


# ----------------------------------------------------------------------------------------------------------- statistics


@dataclass(frozen=True)
class Spread:
    """Of one number over the rounds."""

    median: float
    least: float
    most: float
    rounds: int

    def __str__(self) -> str:
        return self.text()

    def text(self, scale: float = 1.0) -> str:
        """median (least – most) in three digits, times `scale`; ∞ where the median one never came."""
        middle = digits(scale * self.median)
        if self.rounds == 1 or self.least == self.most:
            return middle
        return f"{middle} ({digits(scale * self.least)} – {digits(scale * self.most)})"


def spread(values: Iterable[float]) -> Spread:
    """Raises `ValueError` for no values at all."""
    known = sorted(values)
    if not known:
        raise ValueError("values: none to take a median of")
    return Spread(statistics.median(known), known[0], known[-1], len(known))


def quotient(above: Sequence[float], below: Sequence[float]) -> str:
    """Of two numbers, round by round, as text; the last round may have only one of them."""
    pairs = [a / b for a, b in zip(above, below, strict=False) if b > 0 and math.isfinite(b)]
    return spread(pairs).text() if pairs else digits(math.nan)


def percentile(values: Sequence[float], q: float) -> float:
    """The least of the values that q per cent of them do not exceed (nearest rank, so that values may be infinite);
    NaN where there are none."""
    if not 0 < q <= 100:
        raise ValueError(f"q: {q} is not in (0, 100]")
    return sorted(values)[math.ceil(q / 100 * len(values)) - 1] if values else math.nan


def digits(value: float) -> str:
    """Three that count, without an exponent."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    if value == 0:
        return "0"
    places = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, places):,.{min(max(places, 0), 6)}f}"


def turned(cases: Sequence[T], by: int) -> list[T]:
    """The cases, begun `by` places further on: no case is always the first."""
    by %= len(cases) or 1
    return [*cases[by:], *cases[:by]]


# -------------------------------------------------------------------------------------------------------- one benchmark


@dataclass
class Bench:
    """One benchmark's run: how long it may take, and what it has found."""

    name: str
    seconds: float  # that it may take; 0: one round of the smallest size
    rounds: int = MOST_ROUNDS  # at most
    folder: Path = RESULTS
    command: str = ""
    clock: Callable[[], float] = time.monotonic
    measurements: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.machine = machine()
        self.began = self.clock()

    @property
    def smallest(self) -> bool:
        return self.seconds <= 0

    @property
    def left(self) -> float:
        """Seconds."""
        return self.seconds - (self.clock() - self.began)

    def window(
        self,
        windows: float,
        least: float,
        most: float,
        fixed: float = 0.0,
        good: float = 10.0,
        seconds: float | None = None,
    ) -> float:
        """Seconds of one of so many windows a round, that takes `fixed` seconds besides, so that a few rounds fit into
        the seconds (by default: what is left); fewer where their windows would be shorter than a good one."""
        seconds = self.left if seconds is None else seconds
        for rounds in range(min(ROUNDS, self.rounds), 0, -1):
            window = (seconds / rounds - fixed) / max(windows, 1)
            if window >= min(good, most):
                break
        return min(max(window, least), most)

    def interleaved(self, cases: Sequence[T], seconds: float | None = None) -> Iterator[tuple[int, T]]:
        """(round, case): every case in every round, as many rounds as fit into the seconds (by default: what is left).
        One round is always taken, and no further one begins that would not end in time if it took as long as the
        longest."""
        began, longest, seconds = self.clock(), 0.0, self.left if seconds is None else seconds
        for number in range(self.rounds):
            before = self.clock()
            for case in turned(cases, number):
                yield number, case
            longest = max(longest, self.clock() - before)
            if self.smallest or self.clock() - began + longest > seconds:
                return

    def record(self, case: Case, number: int, unit: str, samples: int = 1, **values: float) -> None:
        """Numbers of one unit that a round found of a case. samples: how many things each is of, or counts."""
        for metric, value in values.items():
            found = value if math.isfinite(value) else None  # JSON knows neither; None is: more than could be seen
            self.measurements.append(
                {**case, "round": number, "metric": metric, "unit": unit, "samples": samples, "value": found}
            )

    def save(self) -> Path:
        """Write what was measured to a file of the benchmark's name: JSON, a measurement a line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {
            "benchmark": self.name,
            "command": self.command,
            "smallest": self.smallest,
            "finished": datetime.now(UTC).isoformat(timespec="minutes"),
            "seconds": round(self.clock() - self.began, 1),
            "machine": self.machine,
        }
        lines = ",\n  ".join(json.dumps(rounded(m), ensure_ascii=False) for m in self.measurements)
        text = json.dumps(about, indent=1, ensure_ascii=False)[:-2] + f',\n "measurements": [\n  {lines}\n ]\n}}\n'
        path = self.folder / f"{self.name}.json"
        path.write_text(text, encoding="utf-8")
        return path


def rounded(measurement: Mapping[str, Any]) -> dict[str, Any]:
    """Floats to five digits: no clock is better, and files stay small."""
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in measurement.items()}


class Results:
    """A file of measurements, read again."""

    def __init__(self, about: Mapping[str, Any]) -> None:
        self.about = about
        self.measurements: list[dict[str, Any]] = list(about["measurements"])

    @classmethod
    def read(cls, path: Path) -> Results:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def values(self, metric: str, **case: Any) -> list[float]:
        """Over the rounds, and over what `case` leaves open; infinite where it took longer than could be seen."""
        return [
            math.inf if m["value"] is None else float(m["value"])
            for m in self.measurements
            if m["metric"] == metric and all(m.get(k) == v for k, v in case.items())
        ]

    def spread(self, metric: str, **case: Any) -> Spread | None:
        """None where it was not measured."""
        values = self.values(metric, **case)
        return spread(values) if values else None

    def text(self, metric: str, scale: float = 1.0, **case: Any) -> str:
        found = self.spread(metric, **case)
        return "–" if found is None else found.text(scale)

    def samples(self, metric: str, **case: Any) -> int:
        """All together, over the rounds."""
        return sum(
            m["samples"]
            for m in self.measurements
            if m["metric"] == metric and all(m.get(k) == v for k, v in case.items())
        )

    def cases(self, *names: str) -> list[tuple[Any, ...]]:
        """The settings of these names that were measured together, in the order in which they first were."""
        found = {tuple(m[n] for n in names): None for m in self.measurements if all(n in m for n in names)}
        return list(found)


# -------------------------------------------------------------------------------------------------------------- machine


def machine() -> dict[str, Any]:
    """What it was measured on, with which versions, and how busy others kept it just before."""
    info = Path("/proc/cpuinfo")
    names = [
        line.partition(":")[2].strip()
        for line in (info.read_text(encoding="utf-8").splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "busy": round(psutil.cpu_percent(interval=0.5) / 100, 2),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES},
        "revision": revision(),
    }


def revision() -> str:
    """Of the code, with a + where files have changed since; "unknown" outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# ---------------------------------------------------------------------------------------------------------------- start


def parser(prog: str, about: str | None) -> argparse.ArgumentParser:
    """Of the arguments that all benchmarks take."""
    made = argparse.ArgumentParser(prog=prog, description=(about or "").split("\n\n")[0])
    made.add_argument("--minutes", type=float, default=10.0, help="it may take; 0: one round of the smallest size")
    made.add_argument("--rounds", type=int, default=MOST_ROUNDS, help="at most, however much time there is")
    made.add_argument("--models", type=Path, default=ROOT / "zoo", help="folder of the checkpoints to measure")
    made.add_argument("--results", type=Path, default=RESULTS, help="folder that measurements are written to")
    made.add_argument(
        "--page", type=Path, help="page to bring up to date (default: docs/benchmarks.md, unless --results)"
    )
    return made


def measure(name: str, module: Any, args: argparse.Namespace, seconds: float, command: str) -> Path:
    """Run one benchmark and write down what it finds, even of one that was interrupted."""
    bench = Bench(name, seconds, args.rounds, args.results, command)
    if bench.machine["busy"] > 0.1:
        busy = f"{bench.machine['busy']:.0%} of the processors' time is used by others"
        print(f"benchmarks: {busy}: what is measured now says little", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that servers that it has started end with it
    try:
        module.run(bench, args)
    finally:
        if bench.measurements:
            bench.save()
    return bench.folder / f"{name}.json"


def alone(name: str, module: Any, path: str | None = None) -> None:
    """`python -m benchmarks.NAME`, or of another path: one benchmark, with all that it takes."""
    from benchmarks import _page

    program = f"python -m {path or f'benchmarks.{name}'}"
    made = parser(program, module.__doc__)
    module.arguments(made)
    args = made.parse_args()
    _page.show(measure(name, module, args, 60 * args.minutes, " ".join([program, *sys.argv[1:]])), module)
    _page.update(args, {name: module})
