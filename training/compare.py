"""What was measured of many checkpoints, side by side: tables between markers of two pages, and a chart.

Everything comes from the checkpoints' model.json files. A page says where a table goes:

    <!-- NAME: begin … -->
    (written here)
    <!-- NAME: end -->
"""

from __future__ import annotations

import ast
import os
import re
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import _checkpoint
from models._checkpoint import CheckpointError
from training.chart import Point, quality_and_speed
from training.errors import RunError

ROOT = Path(__file__).parents[1]
CHART = "quality-and-speed.png"  # beside the page
NOTHING = "–"
ENERGY = "energy only"


@dataclass(frozen=True)
class Entry:
    """What a checkpoint's model.json says of it."""

    folder: Path
    family: str
    data: str
    spec: Mapping[str, Any]
    metrics: Mapping[str, Mapping[str, Any]]
    weights: int  # bytes

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def short_name(self) -> str:
        """Without the data set's."""
        return self.name.removeprefix(f"{self.data}-")

    @property
    def kind(self) -> str:
        """exact, bound, estimate, energy only; "none" without a likelihood."""
        likelihood = self.spec["likelihood"]
        if likelihood is None:
            return "none"
        return ENERGY if likelihood["kind"] == "unnormalised" else str(likelihood["kind"])

    @property
    def evaluations(self) -> int:
        """Of the network for one sample, at the default steps and solver: a solver's last step is a single one."""
        steps, solver = self.spec["steps"], next(iter(self.spec["solvers"]), "")
        ticks = (steps["default"] - 1) * self.spec["evaluations"].get(solver, 1) + 1
        return int(ticks * steps["network_evaluations_per_step"])

    def value(self, name: str, field: str = "value") -> float | None:
        """Of a metric; None where it was not measured."""
        found = self.metrics.get(name, {}).get(field)
        return None if found is None else float(found)

    @property
    def agreement(self) -> str:
        """The metric that says whether samples show what was asked for."""
        return "caption_agreement" if "caption_agreement" in self.metrics else "label_agreement"


def compare(folders: Sequence[Path], readme: Path = ROOT / "README.md", page: Path | None = None) -> list[Path]:
    """Write the table "families" of `readme`, the table "measured" of `page` (by default docs/families/README.md) and
    the chart beside it, from checkpoint folders or folders of such. Returns the files that were written.

    The readme's table and the chart are of the data set that most of the checkpoints have learnt. Raises `RunError` for
    a folder that is no checkpoint, naming what is wrong with it, and for a page without markers.
    """
    page = page or ROOT / "docs" / "families" / "README.md"
    entries = sorted((entry(folder) for folder in found(folders)), key=_best_first)
    main = Counter(e.data for e in entries).most_common(1)[0][0]
    ours = [e for e in entries if e.data == main]
    texts = {
        readme: between_markers(readme, "families", short_table(ours, readme.parent)),
        page: between_markers(page, "measured", full_tables(entries, page.parent)),
    }
    chart = quality_and_speed(main, [p for e in ours if (p := _point(e)) is not None], _floor(ours, "fd_local"))
    for path, text in texts.items():  # nothing is written unless all can be
        _checkpoint.write_file(path, text.encode())
    _checkpoint.write_file(page.parent / CHART, chart)
    return [*texts, page.parent / CHART]


def found(folders: Sequence[Path]) -> list[Path]:
    """The checkpoint folders among `folders`, and those that lie in them."""
    checkpoints: list[Path] = []
    for folder in folders:
        inside = sorted(path.parent for path in folder.glob(f"*/{_checkpoint.ABOUT}"))
        if not (folder / _checkpoint.ABOUT).exists() and inside:
            checkpoints += inside
        else:
            checkpoints.append(folder)
    return checkpoints


def entry(folder: Path) -> Entry:
    """Raises `RunError` for a folder that is no checkpoint of this version."""
    try:
        about = _checkpoint.read_about(folder)
        weights = (folder / _checkpoint.WEIGHTS).stat().st_size
        spec = {"evaluations": {}, **about["spec"]}
        family, data, metrics = about["family"], about["data"]["name"], dict(about["metrics"])
        if missing := {"steps", "solvers", "likelihood"} - spec.keys():
            raise KeyError(*sorted(missing))
        return Entry(folder.resolve(), family, data, spec, metrics, weights)
    except CheckpointError as e:
        raise RunError(f"{folder}: {e}") from e
    except FileNotFoundError as e:
        raise RunError(f"{folder}: {_checkpoint.WEIGHTS}: missing") from e
    except (KeyError, TypeError) as e:
        raise RunError(
            f"{folder}: {_checkpoint.ABOUT}: describes no checkpoint of this version: {type(e).__name__}: {e}"
        ) from e


def between_markers(path: Path, name: str, content: str) -> str:
    """The page's text with `content` between the markers of that name. Raises `RunError` where it has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        raise RunError(f"{path}: missing") from e
    begin = re.search(rf"^<!-- {name}: begin.*-->\n", text, re.MULTILINE)
    end = re.search(rf"^<!-- {name}: end -->$", text, re.MULTILINE)
    if begin is None or end is None or end.start() < begin.end():
        raise RunError(f"{path}: no lines '<!-- {name}: begin -->' and '<!-- {name}: end -->' to write between")
    return text[: begin.end()] + content + text[end.start() :]


# --------------------------------------------------------------------------------------------------------------- tables


def short_table(entries: Sequence[Entry], base: Path) -> str:
    """A row for each checkpoint, and one for real images. Links are relative to `base`."""
    header = (
        "family", "model", "draws in", "bits/dim (lower is better)", "label agreement", "FD-local", "density",
        "coverage", "images/s at batch 1", "at 16",
    )  # fmt: skip
    rows = [
        (
            _family(e, base),
            _card(e, base),
            _draws_in(e),
            _bits(e),
            _number(e.value(e.agreement), 3),
            _number(e.value("fd_local"), 1),
            _number(e.value("density"), 2),
            _number(e.value("coverage"), 2),
            _speed(e.value("images_per_second_batch_1")),
            _speed(e.value("images_per_second_batch_16")),
        )
        for e in entries
    ]
    real = ("*real images*", "", "", "", *_floors(entries), "", "")
    return _markdown(header, [*rows, real])


def full_tables(entries: Sequence[Entry], base: Path) -> str:
    """For each data set all that is compared. Links are relative to `base`."""
    header = (
        "family", "model", "a step is", "default steps", "network evaluations", "likelihood", "bits/dim ↓",
        "FD-local ↓ (real images)", "density ↑", "coverage ↑", "agreement ↑", "images/s ↑ batch 1", "batch 16",
        "weights, MB",
    )  # fmt: skip
    parts = []
    for data in sorted({e.data for e in entries}):
        ours = [e for e in entries if e.data == data]
        rows = [(*_how(e, base), *_measured(e)) for e in ours]
        parts.append(f"\n### {data}\n\n{_markdown(header, rows)}")
    return "".join(parts) + "\n"


def _how(e: Entry, base: Path) -> tuple[str, ...]:
    steps, likelihood = e.spec["steps"], e.spec["likelihood"]
    treated = "" if likelihood is None or e.kind == ENERGY else likelihood["dequantisation"]
    return (
        _family(e, base),
        _card(e, base),
        steps["unit"],
        str(steps["default"]),
        str(e.evaluations),
        e.kind + (f"; dequantisation: {treated}" if treated not in ("", "none") else ""),
    )


def _measured(e: Entry) -> tuple[str, ...]:
    bits, stderr = e.value("bits_per_dim"), e.value("bits_per_dim", "stderr")
    fd, floor = e.value("fd_local"), e.value("fd_local", "real")
    return (
        _number(bits, 3) + (f" ± {stderr:.3f}" if stderr is not None else ""),
        _number(fd, 1) + (f" ({floor:.1f})" if floor is not None else ""),
        _number(e.value("density"), 2),
        _number(e.value("coverage"), 2),
        _number(e.value(e.agreement), 3),
        _speed(e.value("images_per_second_batch_1")),
        _speed(e.value("images_per_second_batch_16")),
        f"{e.weights / 1e6:.1f}",
    )


def _family(e: Entry, base: Path) -> str:
    """A link to the family's page; to its module, by how that calls itself, where there is no page."""
    page, module = ROOT / "docs" / "families" / f"{e.family}.md", ROOT / "models" / f"{e.family}.py"
    if page.exists():
        title = page.read_text(encoding="utf-8").split("\n", 1)[0].removeprefix("# ")
        return f"[{title}]({_link(page, base)})"
    about = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8"))) or e.family
    return f"[{re.split(r' [(]|[:,.]', about)[0]}]({_link(module, base)})"


def _card(e: Entry, base: Path) -> str:
    return f"[{e.short_name}]({_link(e.folder / 'README.md', base)})"


def _link(path: Path, base: Path) -> str:
    return Path(os.path.relpath(path, base.resolve())).as_posix()


def _draws_in(e: Entry) -> str:
    steps = e.spec["steps"]
    if steps["max"] == 1:
        return f"one {steps['unit']}"
    return f"{steps['default']} {steps['unit']}" + ("s" if steps["default"] > 1 else "")


def _bits(e: Entry) -> str:
    value = e.value("bits_per_dim")
    if value is None:
        return e.kind if e.kind in ("none", ENERGY) else f"{NOTHING} {e.kind}"
    treated = e.spec["likelihood"]["dequantisation"]
    return f"{value:.3f} {e.kind}" + (f" (dequantisation: {treated})" if treated != "none" else "")


def _floors(entries: Sequence[Entry]) -> list[str]:
    """What real images reach, of the metrics of the short table: the same for nearly all checkpoints of a data set."""
    digits = {"label_agreement": 3, "fd_local": 1, "density": 2, "coverage": 2}
    return [_number(_floor(entries, name), n) for name, n in digits.items()]


def _floor(entries: Sequence[Entry], name: str) -> float | None:
    values = [v for e in entries if (v := e.value(name, "real")) is not None]
    return statistics.median_low(values) if values else None


def _best_first(e: Entry) -> tuple[str, float, str]:
    fd = e.value("fd_local")
    return e.data, float("inf") if fd is None else fd, e.name


def _number(value: float | None, digits: int) -> str:
    return NOTHING if value is None else f"{value:.{digits}f}"


def _speed(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _point(e: Entry) -> Point | None:
    quality, speed = e.value("fd_local"), e.value("images_per_second_batch_16")
    if quality is None or speed is None:
        return None
    where = str(e.metrics["images_per_second_batch_16"]["data"])
    return Point(e.short_name, speed, quality, e.kind, e.spec["steps"]["default"] == 1, where)
