"""docs/benchmarks.md is written from benchmarks/results/*.json: tables between markers, the words around by hand."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import _frame
from benchmarks._frame import Results


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def about(results: Results) -> str:
    """A line that says how, when and on what."""
    known, m = results.about, results.about["machine"]
    return (
        f"`{known['command']}`, {known['finished'][:10]}, {known['seconds'] / 60:.0f} minutes. {m['cores']} cores of "
        f"{m['processor']}, {m['memory_gib']:.0f} GiB, {m['system']}, others used {m['busy']:.0%} of them just before; "
        f"Python {m['python']}, torch {m['torch']}, revision {m['revision']}.\n"
    )


def parts(results: Results, module: Any) -> dict[str, str]:
    """{marker: what the page says between}."""
    return {name: f"{about(results)}\n{text}" for name, text in module.page(results).items()}


def show(path: Path, module: Any) -> None:
    print("\n".join(parts(Results.read(path), module).values()))


def update(args: argparse.Namespace, modules: Mapping[str, Any]) -> None:
    """Bring the page up to date, from the files of the benchmarks that there are. Those of the smallest size are left
    out: they measure nothing."""
    page = args.page or (_frame.PAGE if args.results == _frame.RESULTS else None)
    if page is None:
        return
    for name, module in modules.items():
        path = args.results / f"{name}.json"
        if path.exists() and not (results := Results.read(path)).about["smallest"]:
            write(page, parts(results, module))
            print(f"benchmarks: {page}: {name}")


def write(page: Path, texts: Mapping[str, str]) -> None:
    """Put each text between the markers of its name."""
    from training.compare import between_markers  # which brings torch along

    for name, text in texts.items():
        page.write_text(between_markers(page, name, text), encoding="utf-8")
