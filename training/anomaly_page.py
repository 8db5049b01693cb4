"""The page of what detectors were measured to do: results as JSON, merged by checkpoint, and tables made from them.

docs/anomalies.json     {data set: {"compressed size": …, "scorers": {checkpoint: what `detect.measured` gives}}}
docs/anomalies.md       tables, between markers: a section for each data set, one for all that a class is left out of
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from models._checkpoint import write_file
from training import anomalies
from training import data as datasets
from training.compare import ROOT, between_markers
from training.detect import CALIBRATED, COMPRESSED, ENSEMBLE, ONE_SIDED, TWO_SIDED, TYPICALITY
from training.errors import RunError

PAGE = ROOT / "docs" / "anomalies.md"
MARKERS = "anomalies"
NOTHING = "–"

Results = dict[str, dict[str, Any]]
Table = list[list[str]]


def read(page: Path) -> Results:
    """The results beside a page; none where there is no such file. Raises `RunError` for a file that is not JSON."""
    path = page.with_suffix(".json")
    try:
        found: Results = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as e:
        raise RunError(f"{path}: not JSON: {e}") from e
    return found


def write(page: Path, results: Results) -> list[Path]:
    """Both files. Raises `RunError` for a page that is missing, or has no markers."""
    text = between_markers(page, MARKERS, "\n".join(_sections(results, page)))
    path = page.with_suffix(".json")
    write_file(path, (json.dumps(results, indent=1, ensure_ascii=False) + "\n").encode())
    write_file(page, text.encode())
    return [page, path]


def add(results: Results, data: str, compressed: Mapping[str, Any], name: str, measured: Mapping[str, Any]) -> None:
    """Take the place of what was measured of that scorer before, and of a baseline that is not of more images."""
    entry = results.setdefault(data, {"scorers": {}})
    if _count(compressed) >= _count(entry.get(COMPRESSED, {})):
        entry[COMPRESSED] = dict(compressed)
    entry["scorers"][name] = dict(measured)


def _count(compressed: Mapping[str, Any]) -> int:
    """The most images of any set."""
    return max((cell["n"] for cell in compressed.values()), default=0)


# --------------------------------------------------------------------------------------------------------------- tables


def picture_path(page: Path, kind: str, scorer: str) -> Path:
    return page.with_suffix("") / f"{kind}-{scorer}.png"


def _sections(results: Results, page: Path) -> Iterable[str]:
    whole = {data: entry for data, entry in results.items() if datasets.without(data)[1] is None}
    for data, entry in sorted(whole.items()):
        scorers = dict(sorted(entry["scorers"].items(), key=lambda item: (item[1]["family"] == ENSEMBLE, item[0])))
        short = {name: name.removeprefix(f"{data}-") for name in scorers}
        sets = list(dict.fromkeys(name for s in scorers.values() for name in s["rows"][CALIBRATED]))
        yield f"## Normal: {data}\n"
        yield from _what(scorers, short)
        for title, metric, places in (
            ("AUROC (higher is better)", "auroc", 3),
            ("AUPRC (higher is better)", "auprc", 3),
            ("FPR at 95 % TPR (lower is better)", "fpr95", 3),
        ):
            yield f"### {title}\n"
            yield from _grid(entry, scorers, short, sets, lambda cell, m=metric, p=places: f"{cell[m]:.{p}f}")  # type: ignore[misc]
        yield "### Share of the anomalies that are found at α = 0.01, with calibrated p-values (higher is better)\n"
        yield from _table(["model", *sets], [[short[name], *_found(s, sets, "0.01")] for name, s in scorers.items()])
        yield "### False alarms among normal test images\n"
        yield from _alarms(scorers, short)
        yield "### Groups of images that are all normal, or all anomalies: AUROC (higher is better)\n"
        yield from _groups(scorers, short, sets)
        if any("pixels" in s for s in scorers.values()):
            yield "### Heat maps: AUROC of pixels, of all images together (mean over images) (higher is better)\n"
            yield from _pixels(scorers, short)
            yield "### Masks: share of the images of which a pixel is in the mask at α = 0.05 (one that was changed)\n"
            yield from _masks(scorers, short)
        yield from _pictures(scorers, short, page)
    if apart := {data: entry for data, entry in results.items() if data not in whole}:
        yield "## A class held out of training\n"
        yield from _held_out(apart)


def _held_out(results: Results) -> Iterable[str]:
    """What models that were trained without a class make of it. Of the other sets they say what those of the whole data
    set say, so that they stand in the JSON alone."""
    rows = []
    for data, entry in sorted(results.items()):
        base, label = datasets.without(data)
        assert label is not None, "data sets with a class left out are called so"
        name = anomalies.held_out(label)
        for scorer, s in sorted(entry["scorers"].items()):
            cells = [s["rows"].get(kind, {}).get(name) for kind in (CALIBRATED, ONE_SIDED, TWO_SIDED)]
            alarms = {alarm["alpha"]: alarm for alarm in s["false_alarms"] if alarm["confidence"] is None}
            rows.append(
                [
                    f"{base}, {label}",
                    scorer,
                    *(NOTHING if cell is None else f"{cell['auroc']:.3f}" for cell in cells),
                    f"{entry[COMPRESSED][name]['auroc']:.3f}",
                    *_found(s, [name], "0.01"),
                    *(f"{alarms[alpha]['rate']:.4f}" if alpha in alarms else NOTHING for alpha in (0.01, 0.05)),
                    f"{s['rows'][CALIBRATED][name]['n']:,} : {s['images']:,}",
                    f"`{s['command']}`",
                ]
            )
    head = [
        "class left out",
        "model",
        f"**{CALIBRATED}**: AUROC",
        ONE_SIDED,
        TWO_SIDED,
        COMPRESSED,
        "found at α = 0.01",
        "false alarms at α = 0.01",
        "at α = 0.05",
        "of the class : normal images",
        "command",
    ]
    return _table(head, rows)


def _what(scorers: Mapping[str, Any], short: Mapping[str, str]) -> Iterable[str]:
    rows = []
    for name, s in scorers.items():
        rows.append(
            [
                short[name],
                s["family"],
                f"{s['images']:,}",
                f"{s['calibration_n']:,}",
                s["detector"],
                ", ".join(s["statistics"]) if s["family"] != ENSEMBLE else "those of its members",
                f"`{s['command']}`",
            ]
        )
    return _table(["model", "family", "normal images", "calibration images", "detector", "statistics", "command"], rows)


def _grid(
    entry: Mapping[str, Any],
    scorers: Mapping[str, Any],
    short: Mapping[str, str],
    sets: list[str],
    shown: Callable[[Mapping[str, float]], str],
) -> Iterable[str]:
    def cells(row: Mapping[str, Any]) -> list[str]:
        return [shown(row[name]) if name in row else NOTHING for name in sets]

    rows = [["no model", COMPRESSED, *cells(entry[COMPRESSED])]]
    for name, s in scorers.items():
        kinds = [kind for kind in (CALIBRATED, ONE_SIDED, TWO_SIDED) if kind in s["rows"]]
        rows += [[short[name], f"**{k}**" if k == CALIBRATED else k, *cells(s["rows"][k])] for k in kinds]
    return _table(["model", "score", *sets], rows)


def _found(s: Mapping[str, Any], sets: list[str], alpha: str) -> list[str]:
    shares = s["found"].get(alpha, {})
    return [NOTHING if shares.get(name) is None else f"{shares[name]:.3f}" for name in sets]


def _alarms(scorers: Mapping[str, Any], short: Mapping[str, str]) -> Iterable[str]:
    rows = []
    for name, s in scorers.items():
        for alarm in s["false_alarms"]:
            beta, counted = (f"{low:.4f} … {high:.4f}" for low, high in (alarm["beta"], alarm["counted"]))
            promised = NOTHING if alarm["confidence"] is None else f"{alarm['confidence']:g}"
            realised = f"{alarm['rate']:.4f}"
            if alarm["confidence"] is None:
                kept = "yes" if alarm["counted"][0] <= alarm["rate"] <= alarm["counted"][1] else "**no**"
            else:
                kept = "yes" if alarm["rate"] <= alarm["alpha"] else "**no**"
            rows.append(
                [short[name], f"{alarm['alpha']:g}", promised, realised, beta, counted, kept, f"{alarm['n']:,}"]
            )
    head = [
        "model",
        "α",
        "confidence",
        "realised",
        "95 % by the Beta law",
        "and among so many images",
        "kept",
        "images",
    ]
    return _table(head, rows)


def _groups(scorers: Mapping[str, Any], short: Mapping[str, str], sets: list[str]) -> Iterable[str]:
    rows = [
        [short[name], size, kind, *(f"{row[key]['auroc']:.3f}" if key in row else NOTHING for key in sets)]
        for name, s in scorers.items()
        for size, kinds in s["groups"].items()
        for kind, row in sorted(kinds.items(), key=lambda item: item[0] == TYPICALITY)
    ]
    return _table(["model", "images", "score", *sets], rows)


def _pixels(scorers: Mapping[str, Any], short: Mapping[str, str]) -> Iterable[str]:
    def cell(found: Mapping[str, Any]) -> str:
        return f"{found['auroc']:.3f} ({found['auroc_by_image']:.3f})"

    return _of_maps(scorers, short, "images", lambda found: f"{found['images']:,}", cell)


def _masks(scorers: Mapping[str, Any], short: Mapping[str, str]) -> Iterable[str]:
    def cell(found: Mapping[str, Any]) -> str:
        return NOTHING if found.get("lit") is None else f"{found['lit']:.3f} ({found['hit']:.3f})"

    def normal(found: Mapping[str, Any]) -> str:
        return NOTHING if found["lit"] is None else f"{found['lit']:.4f}"

    return _of_maps(scorers, short, "normal", normal, cell)


def _of_maps(
    scorers: Mapping[str, Any],
    short: Mapping[str, str],
    title: str,
    first: Callable[[Mapping[str, Any]], str],
    cell: Callable[[Mapping[str, Any]], str],
) -> Iterable[str]:
    """A row for each that draws maps: a first column of its own, and a cell for each set that has masks."""
    measured = {name: s["pixels"] for name, s in scorers.items() if "pixels" in s}
    sets = list(dict.fromkeys(key for found in measured.values() for key in found["sets"]))
    rows = [
        [short[name], first(found), *(cell(of) if (of := found["sets"].get(key)) else NOTHING for key in sets)]
        for name, found in measured.items()
    ]
    return _table(["model", title, *sets], rows)


def _pictures(scorers: Mapping[str, Any], short: Mapping[str, str], page: Path) -> Iterable[str]:
    """Those that were drawn."""
    told = {
        "roc": "ROC curves",
        "heatmaps": "heat maps; from the left a normal image and its map, an anomaly, its map, its mask at α = 0.05, "
        "and the pixels that were changed",
    }
    for name in scorers:
        for kind, what in told.items():
            path = picture_path(page, kind, name)
            if path.exists():
                yield f"![{short[name]}: {what}]({path.relative_to(page.parent).as_posix()})\n"
                yield f"*{short[name]}: {what}.*\n"


def _table(head: list[str], rows: Table) -> Iterable[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + "---|" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""
