"""Turns scores into p-values: fits a detector on normal images, and scores other ones with it; of one checkpoint, or of
several together.

Everything is from images that no model has been trained on. On a model's own data set those are its splits `fit` and
`calibration`, and so they are on one of the same images with another choice of classes; of other data, all of it
normal, every distinct image falls into the one half or the other by its hash.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from anomaly import ensembles, heatmaps
from anomaly.calibration import FILE, Calibration, CalibrationError, Described, calibrate, needed
from anomaly.ensembles import Ensemble, Member
from models import _checkpoint
from models._protocol import Density, Localiser, Model, unlabelled
from training import data as datasets
from training import scored
from training.data import Dataset, Images, Split
from training.errors import DataError
from training.progress import Bars

BATCH = 64


def run(
    checkpoints: Sequence[Path],
    data: str | None,
    data_dir: Path | None,
    console: Console,
    out: Path | None = None,
    work: Path | None = None,
    images: int | None = None,
) -> Calibration:
    """Calibrate on the (first) checkpoint's own data set, or on `data`. Of one checkpoint the calibration.safetensors
    goes into its folder; of several, an ensemble, into the folder `out` with an ensemble.json. In the folder `work` it
    is kept what each model has said of the images, to go on from there, and for an ensemble of the same models.

    images: to calibrate on, and as many to fit on: the first of them, which are any, as splits stand in the order of
    their hashes. For families that take seconds an image; all where it is None.

    Raises `CheckpointError`, `DataError`, and `CalibrationError` for too few images or a model without a density.
    """
    _check(checkpoints, out)
    abouts = [_checkpoint.read_about(folder) for folder in checkpoints]
    own = [about.get("data", {}) for about in abouts]
    dataset = datasets.load(data or own[0]["name"], data_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [_density(folder, device, dataset) for folder in checkpoints]
    own_data = _own(dataset, own)
    if not own_data and dataset.name in [seen.get("name") for seen in own]:
        changed = (
            f"{dataset.name}: not what it was when it was trained on. Images that were there then must not be there "
            "now: they look more normal than any that come, and false alarms would be more than promised"
        )
        if data is None:
            raise DataError(f"{changed}; --data names images that were not trained on")
        console.print(changed, markup=False, highlight=False, soft_wrap=True)
    fit, held_out = parts(dataset, trained_on=own_data)
    _check_count(dataset, len(fit) + len(held_out), own_data, console)
    if images is not None:
        fit, held_out = (_first(split, images) for split in (fit, held_out))
    console.print(f"scoring {len(fit):,} + {len(held_out):,} images of {dataset.name}", highlight=False)
    members = [
        Member(folder.resolve().name, about["files"][_checkpoint.WEIGHTS])
        for folder, about in zip(checkpoints, abouts, strict=True)
    ]
    prefix = "" if dataset.digest in [seen.get("sha256") for seen in own] else f"{dataset.digest[:12]}-"
    splits = {f"{prefix}fit": fit.x, f"{prefix}calibration": held_out.x}
    said = _Said(work, dataset, splits, Bars(console))
    parts_of = [said.by(member, model) for member, model in zip(members, models, strict=True)]
    fit_said, held_out_said = (
        [one[0] if out is None else ensembles.joined([m.name for m in members], one) for one in zip(*each, strict=True)]
        for each in zip(*(described for described, _ in parts_of), strict=True)
    )
    mapped = [surprise for _, surprise in parts_of if surprise]
    maps = heatmaps.fit(*zip(*mapped, strict=True)) if mapped else None
    told: dict[str, Any] = {"data": {"name": dataset.name, "sha256": dataset.digest}}
    if out is None:
        made = calibrate(fit_said, held_out_said, {"weights_sha256": members[0].weights_sha256, **told}, maps)
        _checkpoint.update(checkpoints[0], {"spec": models[0].spec.to_json()}, {FILE: made.pack()})
        _tell_of_another_in_use(checkpoints[0], console)
    else:
        made = calibrate(fit_said, held_out_said, told, maps, [member.name for member in members])
        out.mkdir(parents=True, exist_ok=True)
        _checkpoint.write_file(out / FILE, made.pack())
        _checkpoint.write_file(out / ensembles.ABOUT, Ensemble(tuple(members), made.sha256).pack())
    console.print(
        f"{made.kind}, over {', '.join(made.statistics)}; n = {made.n:,}; "
        f"log acceptance volumes: {', '.join(f'{k} {v:.2f}' for k, v in made.about['volumes'].items())}",
        highlight=False,
        soft_wrap=True,
    )
    return made


def _check(checkpoints: Sequence[Path], out: Path | None) -> None:
    if len(checkpoints) > 1 and out is None:
        raise CalibrationError("--out: an ensemble's calibration goes into a folder of its own: name one")
    if len(checkpoints) == 1 and out is not None:
        raise CalibrationError(f"--out: {out} is for several checkpoints; one keeps its calibration in its own folder")
    if out is not None and (out / _checkpoint.ABOUT).exists():
        raise CalibrationError(f"--out: {out} is a model's folder; an ensemble has one of its own")
    names = [folder.resolve().name for folder in checkpoints]
    if len(set(names)) < len(names):
        raise CalibrationError(f"checkpoints: two of {', '.join(names)} have the same name, by which members are told")


def _own(dataset: Dataset, own: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a model was trained on this data set, or on other classes of its images: these keep their splits."""
    if dataset.digest in [seen.get("sha256") for seen in own]:
        return True
    others = {seen.get("name", "") for seen in own} - {dataset.name}
    return datasets.without(dataset.name)[0] in {datasets.without(name)[0] for name in others}


def _tell_of_another_in_use(checkpoint: Path, console: Console) -> None:
    """A calibration that was made while serving stays in use until a request says otherwise."""
    try:
        version = json.loads((checkpoint / "calibrations" / "current.json").read_bytes())["version"]
    except FileNotFoundError:
        return
    except (KeyError, TypeError, ValueError):
        version = None
    if version != 0:
        told = (
            f"{checkpoint.name}: where it is served, calibrations/current.json says that one made there is in use, not "
            f"this; PUT /models/{checkpoint.resolve().name}/calibration with version 0 changes that"
        )
        console.print(told, markup=False, highlight=False, soft_wrap=True)


def _check_count(dataset: Dataset, n: int, own_data: bool, console: Console) -> None:
    """Before anything is scored. Raises `CalibrationError` for too few images."""
    copies = 0 if own_data else sum(len(split) for split in dataset.splits.values()) - n
    if copies:
        told = f"{dataset.name}: {copies:,} images are copies of others; each is taken once, which leaves {n:,}"
        console.print(told, markup=False, highlight=False, soft_wrap=True)
    if n < (least := needed(1)):
        raise CalibrationError(f"{dataset.name}: {n:,} distinct images; a calibration takes at least {least}")


def _first(split: Split, images: int) -> Split:
    """Raises `CalibrationError` for too few images."""
    if 2 * images < (least := needed(1)):
        raise CalibrationError(f"images: {images}; a calibration takes at least {least // 2}, and as many to fit on")
    return split.take(np.arange(min(images, len(split))))


def _density(folder: Path, device: torch.device, dataset: Dataset) -> Model:
    model = _checkpoint.load(folder, device)
    if not isinstance(model, Density):
        raise CalibrationError(f"{folder.name}: a {model.spec.family} without a density scores no images")
    if dataset.space.shape != model.spec.image.shape:
        raise DataError(
            f"{dataset.name}: images of (C, H, W) {dataset.space.shape}; those of {folder.name} are "
            f"{model.spec.image.shape}"
        )
    return model


def parts(dataset: Dataset, trained_on: bool) -> tuple[Split, Split]:
    """(fit, calibration), without an image in common."""
    if trained_on:
        return dataset.splits["fit"], dataset.splits["calibration"]
    x = np.concatenate([split.x for split in dataset.splits.values()])
    labels = np.concatenate([split.labels for split in dataset.splits.values()])
    _, first = np.unique(x.reshape(len(x), -1), axis=0, return_index=True)
    whole, _ = datasets.canonical(Split(x[np.sort(first)], labels[np.sort(first)]))
    half = len(whole) // 2
    return whole.take(np.arange(half)), whole.take(np.arange(half, len(whole)))


class _Said:
    """What models say of images, kept on disk where there is a folder for it: as `training.detect` keeps it."""

    def __init__(self, work: Path | None, dataset: Dataset, splits: Mapping[str, Images], bars: Bars) -> None:
        self._work, self._splits, self._bars = work, splits, bars
        self._complexity = [
            self._of(f"{scored.slug(dataset.name)}-{dataset.digest[:12]}", name, x, scored.complexities)["complexity"]
            for name, x in splits.items()
        ]

    def by(self, member: Member, model: Model) -> tuple[list[list[Described]], list[NDArray[np.float64]]]:
        """Of the images of each split, statistics and feature vectors; and the surprise of their pixels, (n, H, W), or
        nothing where the model is no `Localiser`."""
        folder = f"{member.name}-{member.weights_sha256[:12]}"
        described = [
            scored.described(x, self._of(folder, name, x, lambda block: scored.scores(model, block)), complexity)
            for (name, x), complexity in zip(self._splits.items(), self._complexity, strict=True)
        ]
        if not isinstance(model, Localiser):
            return described, []
        surprise = [
            self._of(folder, f"map of {name}", x, lambda block: {"surprise": surprises(model, block)})["surprise"]
            for name, x in self._splits.items()
        ]
        return described, surprise

    def _of(
        self, folder: str, name: str, x: Images, compute: Callable[[Images], Mapping[str, NDArray[Any]]]
    ) -> Mapping[str, NDArray[np.float64]]:
        with self._bars.task(f"{folder}: {name}") as report:
            if self._work is None:
                return {key: rows.astype(np.float64) for key, rows in compute(x).items()}
            return scored.kept(scored.file(self._work / folder, name), x, compute, report)


def described(model: Model, x: Images) -> list[Described]:
    """Each image's statistics and feature vectors, by name, without labels. x (N, C, H, W) uint8."""
    return scored.described(x, scored.scores(model, x), scored.complexities(x)["complexity"])


def surprises(model: Model, x: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W) of a `Localiser`, without labels. x (N, C, H, W) uint8."""
    assert isinstance(model, Localiser), "a model whose Spec has heat maps is a Localiser"
    found = []
    with torch.inference_mode():
        for start in range(0, len(x), BATCH):
            block = torch.from_numpy(x[start : start + BATCH]).to(model.device).float() / 255
            found.append(model.surprise(block, unlabelled(block)).cpu().numpy())
    return np.concatenate(found)
