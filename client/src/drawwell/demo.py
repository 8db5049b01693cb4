"""python -m drawwell.demo: shows every model of a server. Draws a sheet with each, then scores a few pictures.

It uses nothing but the client: what it does, any program can do. Needs the extra `drawwell[demo]`.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from drawwell.client import Client
from drawwell.errors import DrawwellError
from drawwell.events import Completed, Progress
from drawwell.schemas import Images, Model, Score

try:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar
    from rich.table import Column, Table
except ImportError as error:
    raise SystemExit("the demo shows its progress with `rich`: pip install 'drawwell[demo]'") from error

CANDIDATES = ("its own", "upside down", "noise", "grey")
CAPTION = "two small red circles above a blue square"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m drawwell.demo", description="Show every model of a Drawwell server."
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the server is (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("demo-out"), help="folder for the pictures (default: %(default)s)"
    )
    parser.add_argument("--n", type=int, default=16, help="images to draw with each model (default: %(default)s)")
    parser.add_argument(
        "--seed", type=int, default=7, help="the same seed draws the same images (default: %(default)s)"
    )
    parser.add_argument(
        "--wait", type=float, default=300.0, help="seconds to wait for the server (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    console = Console()
    try:
        with Client(arguments.url) as well:
            return show(well, console, arguments.out, arguments.n, arguments.seed, arguments.wait)
    except DrawwellError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130


def show(well: Client, console: Console, out: Path, n: int, seed: int, wait: float) -> int:
    """The whole demo; 1 where nothing could be shown or a model failed. Raises a `DrawwellError`."""
    with console.status("waiting for a worker to load the models"):
        well.wait_until_ready(wait)
    console.print("the server is ready")
    models = well.models()
    for model in models:
        if model.status == "failed":
            console.print(f"{model.id} could not be loaded: {model.error}", style="red", markup=False)
    ready = [model for model in models if model.status == "ready"]
    if not ready:
        console.print("the server has no model that is ready", style="red")
        return 1
    drawn = draw(well, console, ready, out, n, seed)
    score(well, console, ready, drawn, out)
    return int(len(ready) < len(models))


# ------------------------------------------------------------------------------------------------------------- drawing


def draw(well: Client, console: Console, models: Sequence[Model], out: Path, n: int, seed: int) -> dict[str, Images]:
    """A sheet of `n` images by each model, saved in `out`; the images by model."""
    out.mkdir(parents=True, exist_ok=True)
    drawn = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    table = Table(Column("model", no_wrap=True), "steps", "seconds", "images/s")
    with Bar(*columns, console=console, transient=True) as bar:
        for model in models:
            task = bar.add_task(f"{model.id} draws {n} images", total=None)
            started = time.perf_counter()
            for event in well.stream(model.id, n=n, seed=seed, prompt=_prompt(model)):
                match event:
                    case Progress(step=step, steps=steps):
                        bar.update(task, completed=step, total=steps)
                    case Completed(images=images):
                        drawn[model.id] = images
            seconds = time.perf_counter() - started
            bar.remove_task(task)
            images = drawn[model.id]
            images.grid(scale=max(1, 96 // max(images.size))).save(out / f"{model.id}.png")
            steps_taken = _plural(images.steps, model.steps.unit if model.steps else "step")
            table.add_row(model.id, steps_taken, f"{seconds:.2f}", f"{n / seconds:.1f}")
    console.print(f"\n{n} images by each model, seed {seed}; sheets in {out}, <model>.png")
    console.print(table)
    return drawn


def _plural(count: int, unit: str) -> str:
    return f"{count} {unit}" if count == 1 else f"{count} {unit}{'es' if unit.endswith('s') else 's'}"


def _prompt(model: Model) -> str | None:
    return CAPTION if model.conditioning and model.conditioning.captions else None


# ------------------------------------------------------------------------------------------------------------- scoring


def score(well: Client, console: Console, models: Sequence[Model], drawn: dict[str, Images], out: Path) -> None:
    """Every model that has a likelihood scores an image of its own, and three that are none of its kind."""
    scorers = [model for model in models if model.likelihood is not None and model.image is not None]
    if not scorers:
        console.print("no model here has a likelihood, so none can score")
        return
    folder = out / "scored"
    folder.mkdir(exist_ok=True)
    warnings: dict[str, list[str]] = {}
    table = Table(Column("model", no_wrap=True), "kind", *CANDIDATES, box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=len(scorers))
        for scorer in scorers:
            bar.update(task, description=f"{scorer.id} scores {len(CANDIDATES)} pictures")
            pictures = _candidates(drawn[scorer.id])
            for name, picture in zip(CANDIDATES, pictures, strict=True):
                picture.save(folder / f"{scorer.id}-{name.replace(' ', '-')}.png")
            scores = well.score(scorer.id, pictures)
            for warning in scores.warnings:
                same = re.sub(rf"(?<![\w-]){re.escape(scorer.id)}(?![\w-])", "…", warning)
                warnings.setdefault(same, []).append(scorer.id)
            table.add_row(scorer.id, str(scores.kind), *map(_told, scores))
            bar.advance(task)
    console.print(
        "\nbits/dim (lower: likelier); of calibrated models also whether they call it an anomaly (✗) or not (✓)"
    )
    console.print(f"pictures in {folder}")
    console.print(table)
    for warning, of in warnings.items():
        console.print(f"note, of {', '.join(of)}: {warning}", markup=False)


def _candidates(own: Images) -> list[Image.Image]:
    """Pictures of one size, as `CANDIDATES` names them."""
    mode = "L" if own.channels == 1 else "RGB"
    first = own[0]
    noise = Image.effect_noise(own.size, 80).convert(mode)
    return [first, ImageOps.flip(first), noise, Image.new(mode, own.size, "grey")]


def _told(result: Score) -> str:
    verdict = "" if result.anomaly is None else (" ✗" if result.anomaly.is_anomaly else " ✓")
    return _number(result) + verdict


def _number(result: Score) -> str:
    if result.bits_per_dim is not None:
        return f"{result.bits_per_dim:.2f}"
    return "–" if result.energy is None else f"energy {result.energy:.1f}"


if __name__ == "__main__":
    sys.exit(main())
