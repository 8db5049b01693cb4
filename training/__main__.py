"""python -m training list | run RECIPE | evaluate CHECKPOINT … | calibrate CHECKPOINT … | compare FOLDER …"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from anomaly.calibration import CalibrationError
from models._checkpoint import CheckpointError
from training import data
from training.config import Run
from training.errors import RunError, TrainingError
from training.recipes import recipes

if TYPE_CHECKING:
    from training.state import State


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, or 2 after an error that has a sentence of its own."""
    args = _parser().parse_args(argv)
    console = Console()
    try:
        if args.command == "list":
            _list(console)
        elif args.command == "run":
            _run(args, console)
        elif args.command == "calibrate":
            from training import calibrate

            calibrate.run(args.checkpoints, args.data, args.data_dir, console, args.out, args.work, args.images)
        elif args.command == "export":
            _export(args.checkpoint, console)
        elif args.command == "compare":
            from training.compare import compare

            for path in compare(args.folders):
                console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
        elif args.anomalies:
            if args.only:
                raise RunError("only: not with --anomalies")
            _detect(args, console)
        else:
            _evaluate(args, console)
    except (TrainingError, CheckpointError, CalibrationError) as e:
        Console(stderr=True).print(str(e), style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description="Train, and measure what was trained.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="the recipes")
    run = commands.add_parser("run", help="train by a recipe, or take up where it was interrupted")
    run.add_argument("recipe", metavar="RECIPE")
    run.add_argument("--out", type=Path, help="checkpoint folder (default: runs/RECIPE)")
    run.add_argument("--data", help="another data set than the recipe says, such as fashion-mnist-without:Sandal")
    run.add_argument(
        "--data-dir", type=Path, help="folder with the data set (default: $DRAWWELL_DATA, else downloaded)"
    )
    run.add_argument(
        "--steps",
        type=int,
        help="train for another number of steps than the recipe says; what it does midway moves along",
    )
    run.add_argument("--accelerator", default="auto", choices=("auto", "cpu", "cuda"))
    run.add_argument(
        "--devices",
        type=_positive,
        help="devices of this machine (or processes on the CPU) to share each batch; by default 1. Under torchrun, "
        "which starts the processes itself, what it says",
    )
    run.add_argument("--threads", type=_positive, help="CPU threads a process may use (default: torch's own choice)")
    evaluate = commands.add_parser("evaluate", help="measure a checkpoint; write its metrics, samples and card")
    evaluate.add_argument("checkpoints", type=Path, nargs="+", metavar="CHECKPOINT")
    evaluate.add_argument("--data-dir", type=Path, help="as for run")
    evaluate.add_argument(
        "--only", choices=("quality", "speed"), help="measure all but likelihood and speed, or speed; keep the rest"
    )
    evaluate.add_argument(
        "--anomalies", action="store_true", help="measure how well calibrated checkpoints tell anomalies, instead"
    )
    evaluate.add_argument("--images", type=_positive, help="images of each set of anomalies (10,000)")
    evaluate.add_argument("--pictures", action="store_true", help="also draw ROC curves and heat maps")
    evaluate.add_argument(
        "--normal", type=_positive, help="normal images to count false alarms among (as many as --images)"
    )
    evaluate.add_argument("--work", type=Path, help="where scores are kept to go on from (runs/anomalies)")
    evaluate.add_argument("--page", type=Path, help="the page with the tables (docs/anomalies.md)")
    calibrate = commands.add_parser("calibrate", help="turn a checkpoint's scores into p-values; it must be a density")
    calibrate.add_argument(
        "checkpoints", type=Path, nargs="+", metavar="CHECKPOINT", help="several are calibrated together, an ensemble"
    )
    calibrate.add_argument("--out", type=Path, help="folder of an ensemble, beside its members, to be served with them")
    calibrate.add_argument(
        "--data",
        help="normal images, such as folder:PATH or npz:FILE (default: the model's own data, what it kept apart)",
    )
    calibrate.add_argument("--data-dir", type=Path, help="as for run")
    calibrate.add_argument(
        "--images", type=_positive, help="calibrate on so many images, and fit on as many, where an image takes seconds"
    )
    calibrate.add_argument(
        "--work", type=Path, help="folder to keep what models say of the images, to go on from (default: none)"
    )
    export = commands.add_parser("export", help="write a checkpoint's networks for ONNX Runtime, beside its weights")
    export.add_argument("checkpoint", type=Path, metavar="CHECKPOINT")
    compare = commands.add_parser("compare", help="write what was measured into the tables and the chart of the docs")
    compare.add_argument(
        "folders", type=Path, nargs="+", metavar="FOLDER", help="a checkpoint, or a folder of checkpoints, such as zoo"
    )
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def _list(console: Console) -> None:
    table = Table("recipe", "family", "steps", "batch", "what")
    for name, make in sorted(recipes().items()):
        run = make()
        table.add_row(
            name, run.family, str(run.steps), str(run.batch_size), (make.__doc__ or "").strip().split("\n")[0]
        )
    console.print(table)


def _run(args: argparse.Namespace, console: Console) -> None:
    import torch
    from lightning_fabric import Fabric

    from models import _checkpoint
    from training.loop import train
    from training.progress import Progress

    known = recipes()
    if args.recipe not in known:
        raise RunError(f"recipe: no recipe {args.recipe!r}; there are {', '.join(sorted(known))}")
    run = known[args.recipe]()
    if args.steps is not None:
        run = run.lasting(args.steps)
    if args.data is not None:
        run = dataclasses.replace(run, data=args.data)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    out: Path = args.out or Path("runs") / args.recipe
    dataset = data.load(run.data, args.data_dir)
    devices, machines = _processes(args.devices)
    if args.accelerator == "cuda" and devices > torch.cuda.device_count():
        raise RunError(f"devices: {devices} CUDA devices asked for, {torch.cuda.device_count()} found")
    fabric = Fabric(
        accelerator=args.accelerator,
        devices=devices,
        num_nodes=machines,
        strategy="ddp" if devices * machines > 1 else "auto",
        precision="bf16-mixed" if run.precision == "bf16" else "32-true",
    )
    fabric.launch()
    state = train(run, dataset, out, fabric, Progress(out / "events", console, quiet=not fabric.is_global_zero))
    if fabric.is_global_zero:
        about = _about(args.recipe, run, dataset, state, f"{fabric.world_size} × {fabric.device.type}")
        _checkpoint.save(out, state.average, run.config, about, half=run.storage == "fp16")
        console.print(
            f"checkpoint in {out}; measure it with: python -m training evaluate {out}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )


def _processes(asked: int | None) -> tuple[int, int]:
    """Devices of this machine, and machines: by torchrun's environment where it started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return asked or 1, 1
    here, everywhere = int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["WORLD_SIZE"])
    if asked not in (None, here):
        raise RunError(f"devices: {asked}, but torchrun started {here} processes here; leave it out")
    if everywhere % here:
        raise RunError(f"torchrun: {everywhere} processes, {here} of them here; every machine must have as many")
    return here, everywhere // here


def _evaluate(args: argparse.Namespace, console: Console) -> None:
    from training.evaluate import Settings, evaluate

    for option in ("images", "normal", "pictures", "work", "page"):
        if getattr(args, option):
            raise RunError(f"{option}: only with --anomalies")
    for checkpoint in args.checkpoints:
        evaluate(checkpoint, data_dir=args.data_dir, console=console, settings=Settings(only=args.only))


def _detect(args: argparse.Namespace, console: Console) -> None:
    from models import _checkpoint
    from training import anomaly_page as pages
    from training import detect, detect_pictures

    chosen = {name: value for name in ("images", "normal", "work") if (value := getattr(args, name)) is not None}
    settings = detect.Settings(**chosen)
    page: Path = args.page or pages.PAGE
    pages.write(page, pages.read(page))  # a page that cannot be written is told before the work
    told = {path.resolve().name: path.name if path.is_absolute() else path.as_posix() for path in args.checkpoints}
    for subject, scorer in detect.evaluate(args.checkpoints, settings, args.data_dir, console):
        command = f"python -m training evaluate {told[scorer.name]} --anomalies --images {settings.images}"
        command += f" --normal {settings.normal}" if settings.normal else ""
        found = {**detect.measured(scorer, subject, settings), "command": command}
        drawn = []
        for kind, picture in (detect_pictures.pictures(scorer, subject) if args.pictures else {}).items():
            path = pages.picture_path(page, kind, scorer.name)
            path.parent.mkdir(parents=True, exist_ok=True)
            _checkpoint.write_file(path, picture)
            drawn.append(path)
        results = pages.read(page)
        pages.add(results, subject.dataset.name, detect.compressed(subject), scorer.name, found)
        written = [*pages.write(page, results), *drawn]
        console.print(
            f"{scorer.name}: wrote {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True
        )


def _export(checkpoint: Path, console: Console) -> None:
    from models import _checkpoint, _onnx
    from models._modes import NotApplicable

    try:
        files = _onnx.export(_checkpoint.load(checkpoint))
    except ModuleNotFoundError as e:
        raise RunError(f"export: needs the package {e.name}: pip install -e '.[onnx]'") from e
    except NotApplicable as e:
        raise RunError(f"export: {checkpoint.name} cannot be exported: {e}") from e
    _checkpoint.update(checkpoint, {}, files)
    for name, content in files.items():
        told = f"wrote {checkpoint / name} ({len(content) / 2**20:.1f} MiB)"
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def _about(name: str, run: Run, dataset: data.Dataset, state: State, devices: str) -> dict[str, Any]:
    """What model.json says of the training: data, recipe, teacher, cost, revision."""
    taught = {"teacher": {"name": state.teacher.name, "sha256": state.teacher.sha256}} if state.teacher else {}
    return {
        "data": dataset.description,
        "recipe": {"name": name, **run.to_json()},
        **taught,
        "training": {"seconds": round(state.seconds, 4), "devices": devices},
        "revision": _revision(),
        "metrics": {},
    }


def _revision() -> str | None:
    """The git revision that trained, with "+" where files differ from it; None outside a checkout."""
    try:
        head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changes else "")


def _git(*command: str) -> str:
    return subprocess.run(
        ["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    ).stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
