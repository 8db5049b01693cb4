"""Measures detectors: how well calibrated checkpoints tell normal images from anomalies of many kinds.

For each checkpoint and each set of anomalies (`training.anomalies`), beside each other:

    calibrated             the score that calibration.safetensors ranks images by: the one setting there is
    NLL, one-sided         −log p (or the energy): what a likelihood alone would do
    NLL, two-sided         how far −log p is from that of the median image of the split `fit`
    compressed size        no model: how far the compressed size is from that of the median image of `fit`

Nothing is fitted here, and nothing chosen by an anomaly. What was scored is kept in a folder, so that an evaluation
that was interrupted goes on, and another checkpoint costs its own scores alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from anomaly import calibration as calibrations
from anomaly import conformal
from anomaly.calibration import Calibration, CalibrationError
from models import _checkpoint
from models._protocol import Density, Model
from training import anomalies, scored
from training import data as datasets
from training.data import Dataset, Images
from training.detection import Floats, false_alarms, fisher, rounded, separation, typicality
from training.errors import DataError
from training.progress import Bars

CALIBRATION = "calibration.safetensors"
NORMAL = "test"
CALIBRATED, ONE_SIDED, TWO_SIDED, COMPRESSED = "calibrated", "NLL, one-sided", "NLL, two-sided", "compressed size"
TYPICALITY = "NLL, typicality"
ENSEMBLE = "ensemble"

Described = list[dict[str, float]]


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    images: int = 10_000  # of each set, or as many as there are
    groups: tuple[int, ...] = (5, 10)
    alphas: tuple[float, ...] = (0.01, 0.05)
    confidence: float = 0.95
    ensemble: bool = False  # all checkpoints of a data set together as one more
    work: Path = Path("runs/anomalies")


@dataclass(frozen=True)
class Scorer:
    """Scores images by what one checkpoint, or several, say of them."""

    name: str
    family: str
    calibration: Calibration
    described: Mapping[str, Described]  # by set: NORMAL, "fit", and those of anomalies
    versions: Mapping[str, str]  # checkpoint -> sha256 of its weights


@dataclass(frozen=True)
class Subject:
    """A data set, with what detectors are measured on."""

    dataset: Dataset
    odd: Sequence[anomalies.Odd]
    complexity: Mapping[str, Floats]  # by set, of anomalies and of normal images
    images: Mapping[str, Images]  # by set


def evaluate(
    checkpoints: Sequence[Path], settings: Settings, data_dir: Path | None, console: Console
) -> Iterator[tuple[Subject, Scorer]]:
    """Everything scored, one checkpoint after another, those of one data set together. A checkpoint without a density,
    or without a calibration, is named and left out.

    Raises `CheckpointError`, `DataError`, and `CalibrationError` where none is left.
    """
    bars = Bars(console)
    by_data: dict[str, list[Path]] = {}
    for folder in checkpoints:
        about = _checkpoint.read_about(folder)
        if reason := _unusable(about):
            console.print(f"{folder.name}: left out: {reason}", markup=False, highlight=False, soft_wrap=True)
        else:
            by_data.setdefault(about["data"]["name"], []).append(folder)
    if not by_data:
        raise CalibrationError("checkpoints: none is calibrated; `python -m training calibrate CHECKPOINT` does that")
    for name, folders in by_data.items():
        dataset = datasets.load(name, data_dir)
        subject = _subject(dataset, settings, data_dir, bars)
        together: list[Scorer] = []
        for folder in folders:
            scorer = _score(folder, subject, settings, bars)
            yield subject, scorer
            if settings.ensemble and len(folders) > 1:
                together.append(scorer)
        if together:
            yield subject, _together(together)


def _unusable(about: Mapping[str, Any]) -> str | None:
    if about["spec"]["likelihood"] is None:
        return f"a {about['family']} without a density scores no images"
    return None if CALIBRATION in about["files"] else "not calibrated"


def _subject(dataset: Dataset, settings: Settings, data_dir: Path | None, bars: Bars) -> Subject:
    with bars.task(f"anomalies of {dataset.name}"):
        odd = list(anomalies.sets(dataset, settings.images, data_dir))
    images = {split: dataset.splits[split].x for split in ("fit", "calibration")}
    if not settings.ensemble:  # only the median of `fit` is needed then
        images = {"fit": images["fit"][: settings.images]}
    images |= {NORMAL: dataset.splits["test"].x[: settings.images], **{one.name: one.x for one in odd}}
    folder = settings.work / f"{_slug(dataset.name)}-{dataset.digest[:12]}"
    complexity = {}
    for name, x in images.items():
        with bars.task(f"{dataset.name}: compressed size: {name}") as report:
            complexity[name] = scored.kept(_file(folder, name), x, scored.complexities, report)["complexity"]
    return Subject(dataset, odd, complexity, images)


def _score(folder: Path, subject: Subject, settings: Settings, bars: Bars) -> Scorer:
    about = _checkpoint.read_about(folder)
    weights = about["files"][_checkpoint.WEIGHTS]
    if about["data"]["sha256"] != subject.dataset.digest:
        raise DataError(f"{subject.dataset.name}: not the data that {folder.name} was trained on (another sha256)")
    calibration = calibrations.unpack(_checkpoint.read_file(folder, CALIBRATION))
    if calibration.about.get("weights_sha256") != weights:
        raise CalibrationError(f"{folder.name}: {CALIBRATION} was made for other weights; calibrate again")
    model = _checkpoint.load(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert isinstance(model, Density), "a model whose Spec has a likelihood is a Density"
    work = settings.work / f"{folder.name}-{weights[:12]}"
    described = {}
    for name, x in subject.images.items():
        with bars.task(f"{folder.name}: {name}") as report:
            rows = scored.kept(_file(work, name), x, lambda block: scored.scores(_model(model), block), report)
        described[name] = scored.described(x, rows, subject.complexity[name])
    return Scorer(folder.name, about["family"], calibration, described, {folder.name: weights})


def _model(model: object) -> Model:
    assert isinstance(model, Model)
    return model


def _together(scorers: Sequence[Scorer]) -> Scorer:
    """One scorer of all their statistics: a detector fitted and calibrated on the same splits as each of them."""
    described = {
        name: [_merged(scorers, images) for images in zip(*(s.described[name] for s in scorers), strict=True)]
        for name in scorers[0].described
    }
    versions = {k: v for s in scorers for k, v in s.versions.items()}
    about = {"weights_sha256": versions}
    made = calibrations.calibrate(described["fit"], described["calibration"], about)
    return Scorer(" + ".join(s.name for s in scorers), ENSEMBLE, made, described, versions)


def _merged(scorers: Sequence[Scorer], images: Sequence[Mapping[str, float]]) -> dict[str, float]:
    found = {f"{s.name}/{k}": v for s, image in zip(scorers, images, strict=True) for k, v in image.items()}
    shared = "complexity_bits"  # the image's own, whoever scores it
    return {k: v for k, v in found.items() if not k.endswith(f"/{shared}")} | {shared: images[0][shared]}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _file(folder: Path, name: str) -> Path:
    return folder / f"{_slug(name)}.safetensors"


# ------------------------------------------------------------------------------------------------------------- measured


def ranked(scorer: Scorer, subject: Subject) -> dict[str, dict[str, Floats]]:
    """By row, and by set: scores of the images, higher for what is more anomalous."""
    sets = [NORMAL, *(odd.name for odd in subject.odd)]
    rows = {CALIBRATED: {name: scorer.calibration.score(scorer.described[name]) for name in sets}}
    if scorer.family != ENSEMBLE:
        nll = {name: surprisal(scorer.described[name]) for name in ("fit", *sets)}
        centre = float(np.median(nll["fit"]))
        rows[ONE_SIDED] = {name: nll[name] for name in sets}
        rows[TWO_SIDED] = {name: np.abs(nll[name] - centre) for name in sets}
    return rows


def measured(scorer: Scorer, subject: Subject, settings: Settings) -> dict[str, Any]:
    """JSON: what is measured of one scorer."""
    calibration, sets = scorer.calibration, [odd.name for odd in subject.odd]
    ranks = ranked(scorer, subject)
    score = ranks[CALIBRATED]
    rows = {
        row: {name: rounded(separation(values[NORMAL], values[name])) for name in sets} for row, values in ranks.items()
    }
    alarms = [
        found
        for alpha in settings.alphas
        for confidence in (None, settings.confidence)
        if (found := false_alarms(calibration, score[NORMAL], alpha, confidence)) is not None
    ]
    return {
        "family": scorer.family,
        "versions": dict(scorer.versions),
        "images": len(score[NORMAL]),
        "detector": calibration.detector.kind,
        "statistics": list(calibration.statistics),
        "calibration_n": calibration.n,
        "calibration_sha256": calibration.sha256,
        "rows": rows,
        "found": {str(alpha): _found(calibration, score, sets, alpha) for alpha in settings.alphas},
        "false_alarms": [dataclasses.asdict(alarm) for alarm in alarms],
        "groups": {str(size): _groups(scorer, ranks, sets, size) for size in settings.groups},
    }


def surprisal(images: Described) -> Floats:
    """−log₂ p of each image, or its energy where the model has no more than that."""
    return scored.column(images, "nll_bits" if "nll_bits" in images[0] else "energy")


def compressed(subject: Subject) -> dict[str, dict[str, float]]:
    """The baseline that needs no model, by set."""
    centre = float(np.median(subject.complexity["fit"]))
    far = {name: np.abs(bits - centre) for name, bits in subject.complexity.items()}
    return {odd.name: rounded(separation(far[NORMAL], far[odd.name])) for odd in subject.odd}


def _found(
    calibration: Calibration, score: Mapping[str, Floats], sets: Sequence[str], alpha: float
) -> dict[str, float | None]:
    """The share of each set that is called an anomaly at α; None where the calibration is too small for it."""
    if conformal.rank(calibration.n, alpha) == 0:
        return dict.fromkeys(sets)
    return {
        name: round(float(np.mean([v.is_anomaly for v in calibration.judge(score[name], alpha)])), 4) for name in sets
    }


def _groups(
    scorer: Scorer, ranks: Mapping[str, Mapping[str, Floats]], sets: Sequence[str], size: int
) -> dict[str, dict[str, dict[str, float]]]:
    """Groups of images that stand together, all normal or all of one set. Sets of less than one group are left out."""
    score = ranks[CALIBRATED]
    whole = [name for name in sets if len(score[name]) >= size <= len(score[NORMAL])]
    known = scorer.calibration.scores
    by_p = {name: fisher(conformal.p_values(known, score[name]), size) for name in (*whole, NORMAL)}
    rows = {CALIBRATED: {name: rounded(separation(by_p[NORMAL], by_p[name])) for name in whole}}
    if ONE_SIDED in ranks:
        nll, entropy = ranks[ONE_SIDED], float(np.mean(surprisal(scorer.described["fit"])))
        far = {name: typicality(nll[name], entropy, size) for name in (*whole, NORMAL)}
        rows[TYPICALITY] = {name: rounded(separation(far[NORMAL], far[name])) for name in whole}
    return rows
