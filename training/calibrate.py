"""Turns a checkpoint's scores into p-values: fits a detector on normal images, and scores other ones with it.

Everything is from images that the model has not been trained on. On the model's own data set those are its splits
`fit` and `calibration`; of other data, all of it normal, every distinct image falls into the one half or the other by
its hash.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from anomaly.calibration import Calibration, CalibrationError, calibrate, describe
from models import _checkpoint
from models._protocol import Density, Model
from training import data as datasets
from training.data import Dataset, Split
from training.errors import DataError

FILE = "calibration.safetensors"
BATCH = 64


def run(checkpoint: Path, data: str | None, data_dir: Path | None, console: Console) -> Calibration:
    """Calibrate on the checkpoint's own data set, or on `data`, and write calibration.safetensors into it.

    Raises `CheckpointError`, `DataError`, and `CalibrationError` for too few images or a model without a density.
    """
    about = _checkpoint.read_about(checkpoint)
    own = about.get("data", {})
    dataset = datasets.load(data or own["name"], data_dir)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _checkpoint.load(checkpoint, device)
    if not isinstance(model, Density):
        raise CalibrationError(f"{checkpoint.name}: a {model.spec.family} without a density scores no images")
    if dataset.space.shape != model.spec.image.shape:
        raise DataError(
            f"{dataset.name}: images of (C, H, W) {dataset.space.shape}; the model's {model.spec.image.shape}"
        )
    fit, held_out = parts(dataset, trained_on=dataset.digest == own.get("sha256"))
    console.print(f"scoring {len(fit):,} + {len(held_out):,} images of {dataset.name}", highlight=False)
    told = {
        "data": {"name": dataset.name, "sha256": dataset.digest},
        "weights_sha256": about["files"][_checkpoint.WEIGHTS],
    }
    made = calibrate(described(model, fit.x), described(model, held_out.x), told)
    _checkpoint.update(checkpoint, {}, {FILE: made.pack()})
    console.print(
        f"{made.detector.kind} over {', '.join(made.statistics)}; n = {made.n:,}; "
        f"log acceptance volumes: {', '.join(f'{k} {v:.2f}' for k, v in made.about['volumes'].items())}",
        highlight=False,
        soft_wrap=True,
    )
    return made


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


def described(model: Model, x: np.ndarray) -> Sequence[dict[str, float]]:
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
