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
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console

from anomaly import calibration as calibrations
from anomaly import conformal, ensembles
from anomaly.calibration import FILE, Calibration, CalibrationError
from anomaly.ensembles import Ensemble
from models import _checkpoint
from models._checkpoint import CheckpointError
from models._protocol import Localiser, Model
from training import anomalies, scored
from training import data as datasets
from training.calibrate import surprises
from training.data import Dataset, Images
from training.detection import Floats, false_alarms, fisher, pixels, rounded, separation, typicality
from training.errors import DataError
from training.progress import Bars

NORMAL = "test"
CALIBRATED, ONE_SIDED, TWO_SIDED, COMPRESSED = "calibrated", "NLL, one-sided", "NLL, two-sided", "compressed size"
TYPICALITY = "NLL, typicality"
ENSEMBLE = "ensemble"
LIT = 0.05  # α of the masks that are counted

Described = list[calibrations.Described]


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    images: int = 10_000  # of each set, or as many as there are
    normal: int = 0  # normal images among which false alarms are counted, where these are to be more than `images`
    groups: tuple[int, ...] = (5, 10)
    alphas: tuple[float, ...] = (0.01, 0.05)
    confidence: float = 0.95
    maps: int = 1_000  # of each set whose anomalies have a mask, and of normal images
    work: Path = Path("runs/anomalies")


@dataclass(frozen=True)
class Scorer:
    """Scores images by what one checkpoint, or several, say of them."""

    name: str
    family: str
    calibration: Calibration
    described: Mapping[str, Described]  # by set: NORMAL, "fit", and those of anomalies
    surprise: Mapping[str, Sequence[Floats]]  # by set, of each member that draws maps: (n, H, W)
    versions: Mapping[str, str]  # checkpoint -> sha256 of its weights


@dataclass(frozen=True)
class Subject:
    """A data set, with what detectors are measured on."""

    dataset: Dataset
    odd: Sequence[anomalies.Odd]
    complexity: Mapping[str, Floats]  # by set, of anomalies and of normal images
    images: Mapping[str, Images]  # by set
    compared: int  # normal images, the first of theirs, that anomalies are held against


def evaluate(
    checkpoints: Sequence[Path], settings: Settings, data_dir: Path | None, console: Console
) -> Iterator[tuple[Subject, Scorer]]:
    """Everything scored, one checkpoint or ensemble after another, those of one data set together. One without a
    density, or without a calibration, is named and left out. An ensemble's members lie beside it.

    Raises `CheckpointError`, `DataError`, and `CalibrationError` where none is left.
    """
    bars = Bars(console)
    by_data: dict[str, list[Path]] = {}
    for folder in checkpoints:
        abouts = [_checkpoint.read_about(member) for member in members(folder)]
        if reason := _unusable(folder, abouts):
            console.print(f"{folder.name}: left out: {reason}", markup=False, highlight=False, soft_wrap=True)
        else:
            by_data.setdefault(abouts[0]["data"]["name"], []).append(folder)
    if not by_data:
        raise CalibrationError("checkpoints: none is calibrated; `python -m training calibrate CHECKPOINT` does that")
    for name, folders in by_data.items():
        subject = _subject(datasets.load(name, data_dir), settings, data_dir, bars)
        for folder in folders:
            yield subject, _scorer(folder, subject, settings, bars)


def members(folder: Path) -> list[Path]:
    """The checkpoints of an ensemble's folder, in its order; of a checkpoint's, itself. Raises `CheckpointError` for a
    member that does not lie beside it with the weights that it was calibrated with."""
    ensemble = _ensemble(folder)
    if ensemble is None:
        return [folder]
    found = []
    for member in ensemble.members:
        path = folder.resolve().parent / member.name
        if _checkpoint.read_about(path)["files"].get(_checkpoint.WEIGHTS) != member.weights_sha256:
            raise CheckpointError(f"{folder.name}: calibrated with other weights of {member.name}; calibrate it again")
        found.append(path)
    return found


def _ensemble(folder: Path) -> Ensemble | None:
    path = folder / ensembles.ABOUT
    return ensembles.unpack(path.read_bytes()) if path.exists() else None


def _unusable(folder: Path, abouts: Sequence[Mapping[str, Any]]) -> str | None:
    if any(about["spec"]["likelihood"] is None for about in abouts):
        return f"a {abouts[0]['family']} without a density scores no images"
    calibrated = len(abouts) > 1 or FILE in abouts[0]["files"]
    return None if calibrated else "not calibrated"


def _subject(dataset: Dataset, settings: Settings, data_dir: Path | None, bars: Bars) -> Subject:
    with bars.task(f"anomalies of {dataset.name}"):
        odd = list(anomalies.sets(dataset, settings.images, data_dir))
    images = {
        "fit": dataset.splits["fit"].x[: settings.images],
        NORMAL: dataset.splits["test"].x[: max(settings.images, settings.normal)],
        **{one.name: one.x for one in odd},
    }
    folder = settings.work / f"{scored.slug(dataset.name)}-{dataset.digest[:12]}"
    complexity = {}
    for name, x in images.items():
        with bars.task(f"{dataset.name}: compressed size: {name}") as report:
            complexity[name] = scored.kept(scored.file(folder, name), x, scored.complexities, report)["complexity"]
    return Subject(dataset, odd, complexity, images, min(settings.images, len(images[NORMAL])))


def _scorer(folder: Path, subject: Subject, settings: Settings, bars: Bars) -> Scorer:
    paths = members(folder)
    abouts = [_checkpoint.read_about(path) for path in paths]
    versions = {path.name: about["files"][_checkpoint.WEIGHTS] for path, about in zip(paths, abouts, strict=True)}
    ensemble = _ensemble(folder)
    calibration = _calibration(folder, ensemble, versions)
    if all(about["data"]["sha256"] != subject.dataset.digest for about in abouts):
        raise DataError(f"{subject.dataset.name}: not the data that {folder.name} was trained on (another sha256)")
    parts = [_score(path, subject, calibration.maps is not None, settings, bars) for path in paths]
    if ensemble is None:
        (described, _) = parts[0]
        family = abouts[0]["family"]
    else:
        names, family = [member.name for member in ensemble.members], ENSEMBLE
        described = {
            key: [ensembles.joined(names, of_image) for of_image in zip(*(d[key] for d, _ in parts), strict=True)]
            for key in subject.images
        }
    maps = [surprise for _, surprise in parts if surprise]
    surprise = {key: [one[key] for one in maps] for key in maps[0]} if maps else {}
    return Scorer(folder.resolve().name, family, calibration, described, surprise, versions)


def _calibration(folder: Path, ensemble: Ensemble | None, versions: Mapping[str, str]) -> Calibration:
    if ensemble is None:
        packed = _checkpoint.read_file(folder, FILE)
        found = calibrations.unpack(packed)
        if found.about.get("weights_sha256") != next(iter(versions.values())):
            raise CalibrationError(f"{folder.name}: {FILE} was made for other weights; calibrate again")
        return found
    packed = (folder / FILE).read_bytes()
    if hashlib.sha256(packed).hexdigest() != ensemble.calibration_sha256:
        raise CalibrationError(f"{folder.name}: {FILE}: its sha256 is not the one in {ensembles.ABOUT}")
    return calibrations.unpack(packed)


def _score(
    folder: Path, subject: Subject, mapped: bool, settings: Settings, bars: Bars
) -> tuple[dict[str, Described], dict[str, Floats]]:
    """What one checkpoint says, by set: statistics of all images, and the surprise of pixels in some of them."""
    weights = _checkpoint.read_about(folder)["files"][_checkpoint.WEIGHTS]
    model = _checkpoint.load(folder, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    work = settings.work / f"{folder.name}-{weights[:12]}"
    described, surprise = {}, {}
    for name, x in subject.images.items():
        with bars.task(f"{folder.name}: {name}") as report:
            rows = scored.kept(scored.file(work, name), x, lambda block: scored.scores(model, block), report)
        described[name] = scored.described(x, rows, subject.complexity[name])
    if mapped and isinstance(model, Localiser):
        for name in (NORMAL, *(odd.name for odd in subject.odd if odd.masks is not None)):
            x = subject.images[name][: settings.maps]
            with bars.task(f"{folder.name}: maps: {name}") as report:
                rows = scored.kept(
                    scored.file(work, f"map of {name}"), x, lambda block: _surprise(model, block), report
                )
            surprise[name] = rows["surprise"]
    return described, surprise


def _surprise(model: Model, x: Images) -> dict[str, Floats]:
    return {"surprise": surprises(model, x).astype(np.float64)}


# ------------------------------------------------------------------------------------------------------------- measured


def ranked(scorer: Scorer, subject: Subject) -> dict[str, dict[str, Floats]]:
    """By row, and by set: scores of the images that are compared, higher for what is more anomalous."""
    sets = [NORMAL, *(odd.name for odd in subject.odd)]
    described = {**scorer.described, NORMAL: scorer.described[NORMAL][: subject.compared]}
    rows = {CALIBRATED: {name: scorer.calibration.score(described[name]) for name in sets}}
    if scorer.family != ENSEMBLE:
        nll = {name: surprisal(described[name]) for name in ("fit", *sets)}
        centre = float(np.median(nll["fit"]))
        rows[ONE_SIDED] = {name: nll[name] for name in sets}
        rows[TWO_SIDED] = {name: np.abs(nll[name] - centre) for name in sets}
    return rows


def measured(scorer: Scorer, subject: Subject, settings: Settings) -> dict[str, Any]:
    """JSON: what is measured of one scorer."""
    calibration, sets = scorer.calibration, [odd.name for odd in subject.odd]
    ranks = ranked(scorer, subject)
    score, normal = ranks[CALIBRATED], calibration.score(scorer.described[NORMAL])
    rows = {
        row: {name: rounded(separation(values[NORMAL], values[name])) for name in sets} for row, values in ranks.items()
    }
    alarms = [
        found
        for alpha in settings.alphas
        for confidence in (None, settings.confidence)
        if (found := false_alarms(calibration, normal, alpha, confidence)) is not None
    ]
    return {
        "family": scorer.family,
        "versions": dict(scorer.versions),
        "images": len(score[NORMAL]),
        "detector": calibration.kind,
        "statistics": list(calibration.statistics),
        "calibration_n": calibration.n,
        "calibration_sha256": calibration.sha256,
        "rows": rows,
        "found": {str(alpha): _found(calibration, score, sets, alpha) for alpha in settings.alphas},
        "false_alarms": [dataclasses.asdict(alarm) for alarm in alarms],
        "groups": {str(size): _groups(scorer, ranks, sets, size) for size in settings.groups},
        **({"pixels": _pixels(scorer, subject)} if scorer.surprise else {}),
    }


def heights(scorer: Scorer, name: str) -> Floats:
    """(n, H, W): how far each pixel of a set's images stands out, as heat maps show it."""
    assert scorer.calibration.maps is not None, "surprises are asked for where the calibration has maps"
    return scorer.calibration.maps.heights(scorer.surprise[name])


def _pixels(scorer: Scorer, subject: Subject) -> dict[str, Any]:
    """How well maps tell which pixels are anomalous; and of how many images, normal ones too, any pixel is in the mask
    (`lit`), and one that is anomalous (`hit`)."""
    maps = scorer.calibration.maps
    assert maps is not None
    k = maps.rank(LIT, None)
    found: dict[str, dict[str, float | None]] = {}
    for odd in subject.odd:
        if odd.masks is not None:
            shown = heights(scorer, odd.name)
            changed, mask = odd.masks[: len(shown)], maps.mask(shown, k)
            found[odd.name] = {
                **rounded(pixels(shown, changed)),
                "lit": _share_with_any(mask, k),
                "hit": _share_with_any(mask & changed, k),
            }
    normal = heights(scorer, NORMAL)
    return {"sets": found, "images": len(normal), "alpha": LIT, "lit": _share_with_any(maps.mask(normal, k), k)}


def _share_with_any(mask: NDArray[np.bool_], k: int) -> float | None:
    """Of masks (n, H, W), those that are not empty; None where there are too few calibration images for any."""
    return round(float(mask.any(axis=(1, 2)).mean()), 4) if k else None


def surprisal(images: Described) -> Floats:
    """−log₂ p of each image, or its energy where the model has no more than that."""
    return scored.column(images, "nll_bits" if "nll_bits" in images[0] else "energy")


def compressed(subject: Subject) -> dict[str, dict[str, float]]:
    """The baseline that needs no model, by set."""
    centre = float(np.median(subject.complexity["fit"]))
    far = {name: np.abs(bits - centre) for name, bits in subject.complexity.items()}
    far[NORMAL] = far[NORMAL][: subject.compared]
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
