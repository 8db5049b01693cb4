"""Turns scores into p-values: fits a detector on normal images, and scores other ones with it; of one checkpoint, or of
several together.

Everything is from images that no model has been trained on. On a model's own data set those are its splits `fit` and
`calibration`; of other data, all of it normal, every distinct image falls into the one half or the other by its hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from anomaly import ensembles, heatmaps
from anomaly.calibration import FILE, Calibration, CalibrationError, calibrate, describe
from anomaly.ensembles import Ensemble, Member
from anomaly.heatmaps import Maps
from models import _checkpoint
from models._protocol import Density, Localiser, Model, unlabelled
from training import data as datasets
from training.data import Dataset, Split
from training.errors import DataError

BATCH = 64


def run(
    checkpoints: Sequence[Path], data: str | None, data_dir: Path | None, console: Console, out: Path | None = None
) -> Calibration:
    """Calibrate on the (first) checkpoint's own data set, or on `data`. Of one checkpoint the calibration.safetensors
    goes into its folder; of several, an ensemble, into the folder `out` with an ensemble.json.

    Raises `CheckpointError`, `DataError`, and `CalibrationError` for too few images or a model without a density.
    """
    _check(checkpoints, out)
    abouts = [_checkpoint.read_about(folder) for folder in checkpoints]
    own = [about.get("data", {}) for about in abouts]
    dataset = datasets.load(data or own[0]["name"], data_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models = [_density(folder, device, dataset) for folder in checkpoints]
    fit, held_out = parts(dataset, trained_on=dataset.digest in [seen.get("sha256") for seen in own])
    console.print(f"scoring {len(fit):,} + {len(held_out):,} images of {dataset.name}", highlight=False)
    members = [
        Member(folder.resolve().name, about["files"][_checkpoint.WEIGHTS])
        for folder, about in zip(checkpoints, abouts, strict=True)
    ]
    told: dict[str, Any] = {"data": {"name": dataset.name, "sha256": dataset.digest}}
    maps = measured_maps(models, fit.x, held_out.x)
    if out is None:
        told["weights_sha256"] = members[0].weights_sha256
        made = calibrate(described(models[0], fit.x), described(models[0], held_out.x), told, maps)
        _checkpoint.update(checkpoints[0], {"spec": models[0].spec.to_json()}, {FILE: made.pack()})
    else:
        names = [member.name for member in members]
        made = calibrate(_together(names, models, fit.x), _together(names, models, held_out.x), told, maps)
        out.mkdir(parents=True, exist_ok=True)
        _checkpoint.write_file(out / FILE, made.pack())
        _checkpoint.write_file(out / ensembles.ABOUT, Ensemble(tuple(members), made.sha256).pack())
    console.print(
        f"{made.detector.kind} over {', '.join(made.statistics)}; n = {made.n:,}; "
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


def described(model: Model, x: NDArray[np.uint8]) -> list[dict[str, float]]:
    """Each image's statistics, by name, without labels. x (N, C, H, W) uint8."""
    assert isinstance(model, Density), "a model whose Spec has a likelihood is a Density"
    found: list[dict[str, float]] = []
    with torch.inference_mode():
        for start in range(0, len(x), BATCH):
            block = x[start : start + BATCH]
            score = model.log_prob(torch.from_numpy(block).to(model.device).float() / 255)
            numbers = {name: value.double().tolist() for name, value in score.statistics.items()}
            log_prob = None if score.log_prob is None else score.log_prob.double().tolist()
            energy = None if score.energy is None else score.energy.double().tolist()
            found += [
                describe(
                    pixels,
                    None if log_prob is None else log_prob[i],
                    None if energy is None else energy[i],
                    {name: values[i] for name, values in numbers.items()},
                )
                for i, pixels in enumerate(block)
            ]
    return found


def _together(names: Sequence[str], models: Sequence[Model], x: NDArray[np.uint8]) -> list[dict[str, float]]:
    by_model = [described(model, x) for model in models]
    return [ensembles.joined(names, of_image) for of_image in zip(*by_model, strict=True)]


def surprises(model: Model, x: NDArray[np.uint8]) -> NDArray[np.float32]:
    """(N, H, W) of a `Localiser`, without labels. x (N, C, H, W) uint8."""
    assert isinstance(model, Localiser), "a model whose Spec has heat maps is a Localiser"
    found = []
    with torch.inference_mode():
        for start in range(0, len(x), BATCH):
            block = torch.from_numpy(x[start : start + BATCH]).to(model.device).float() / 255
            found.append(model.surprise(block, unlabelled(block)).cpu().numpy())
    return np.concatenate(found)


def measured_maps(models: Sequence[Model], fit: NDArray[np.uint8], calibration: NDArray[np.uint8]) -> Maps | None:
    """What the heat maps of those models that draw some are measured by; None where none does."""
    able = [model for model in models if isinstance(model, Localiser)]
    if not able or not len(fit) or not len(calibration):
        return None
    return heatmaps.fit([surprises(model, fit) for model in able], [surprises(model, calibration) for model in able])
