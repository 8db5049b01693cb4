"""Measures a checkpoint: likelihood, quality, diversity, memorisation, speed. They go into model.json and its card.

Every metric is a dict {value, unit, direction, data, n, ...}: `direction` says whether higher or lower is better, `n`
how many images it was measured on, `real` what as many real images reach.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor

from models import _checkpoint
from models._protocol import JSON, UNLABELLED, Autoencoder, Draw, Model, Spec, bits_per_dim
from training import data as datasets
from training import pictures, quality
from training.agreement import Judge, describes_scenes, judge
from training.card import card
from training.data import Dataset, Split
from training.errors import DataError
from training.features import FeatureSpace, feature_space
from training.measure import draws, images_per_second, log_probs, reconstructions, sample
from training.progress import Bars

Metric = dict[str, JSON]
Part = Literal["quality", "speed"]  # quality: of samples, so all but likelihood and speed


@dataclass(frozen=True)
class Settings:
    """How much is measured. Numbers are comparable between models where these are equal."""

    samples: int = 1000
    test_images: int = 10_000  # whose likelihood is computed: fewer where one takes many network evaluations
    train_images: int = 2_000  # for the gap between training and test
    evaluations: int = 256_000  # network evaluations that a likelihood may take, over all its images
    products: int = 80_000  # the same where it takes derivatives of the network, each of which counts as one
    unseen: int = 5_000  # held-out images that the memorisation test is calibrated on
    only: Part | None = None  # measured anew, the rest is kept as model.json has it
    batch: int = 64
    seed: int = 0


COLUMNS = 8  # of the sheets
PREFIX = {"likelihood": "bits_per_dim", "speed": "images_per_second"}  # of the names of a part's metrics
FEW = 8  # steps: a model that takes no more is measured at each power of two
FLOORS = 8  # sets of real images whose mean is printed beside the samples' quality


def evaluate(
    checkpoint: Path,
    data_dir: Path | None = None,
    console: Console | None = None,
    settings: Settings | None = None,
    features_dir: Path | None = None,
) -> dict[str, Metric]:
    """Measure the checkpoint on its own data set, write metrics, samples.png, neighbours.png and README.md into it, and
    return the metrics.

    features_dir: where the data set's feature network is cached. Raises `CheckpointError`, and `DataError` where the
    data set is not the one that the model was trained on.
    """
    console, settings = console or Console(), settings or Settings()
    about = _checkpoint.read_about(checkpoint)
    data = datasets.load(about["data"]["name"], data_dir)
    if data.digest != about["data"]["sha256"]:
        raise DataError(f"{data.name}: not the data that {checkpoint.name} was trained on (another sha256)")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _checkpoint.load(checkpoint, device)
    bars = Bars(console)
    parts: dict[str, dict[str, Metric]] = {"likelihood": {}, "quality": {}, "speed": {}}
    for name, entry in about["metrics"].items():
        parts[next((part for part, prefix in PREFIX.items() if name.startswith(prefix)), "quality")][name] = entry
    files: dict[str, bytes] = {}
    if settings.only is None:
        parts["likelihood"] = _likelihood(model, data, settings, bars)
    if settings.only in (None, "quality"):
        parts["quality"], files = _of_samples(model, data, settings, features_dir, bars)
    if settings.only in (None, "speed"):
        with bars.task("speed"):
            parts["speed"] = _speed(model, settings.seed, data.splits["test"].captions)
    metrics = {name: entry for part in parts.values() for name, entry in part.items()}
    measured = {"metrics": metrics, "spec": model.spec.to_json()}  # an older version may have saved another Spec
    about |= measured
    _checkpoint.update(checkpoint, measured, {**files, "README.md": card(checkpoint.name, about).encode()})
    for name, entry in metrics.items():
        console.print(f"{name:28} {entry['value']:.4g} {entry['unit']} (n = {entry['n']})", highlight=False)
    return metrics


# --------------------------------------------------------------------------------------------------- parts of the work


def _of_samples(
    model: Model, data: Dataset, settings: Settings, features_dir: Path | None, bars: Bars
) -> tuple[dict[str, Metric], dict[str, bytes]]:
    """Metrics of samples: how good, how diverse, how much as asked for, how near to copies; and their pictures."""
    with bars.task("feature network") as report:
        space = feature_space(data, folder=features_dir, report=report)
    n = min(settings.samples, _comparable(data.splits["train"], model.spec))
    asked = draws(model.spec, n, settings.seed, data.splits["test"].captions)
    with bars.task("samples") as report:
        samples = sample(model, asked, settings.batch, report)
    metrics = _quality(samples, asked, data, space)
    metrics |= _by_steps(model, asked, data, space, settings.batch, bars)
    if isinstance(model, Autoencoder):
        with bars.task("reconstructions"):
            metrics |= _reconstruction(model, asked, data, space, settings.batch)
    if model.spec.image.captions and describes_scenes(data):
        with bars.task("judge of captions") as report:
            reader = judge(data, folder=features_dir, report=report)
        metrics |= _caption_agreement(samples, asked, reader)
    with bars.task("memorisation"):
        copies = quality.memorisation(
            quality.flat(samples),
            quality.flat(data.splits["train"].x),
            quality.flat(data.splits["test"].x[: settings.unseen]),
        )
    metrics["memorised"] = _memorised(copies, data)
    return metrics, {
        "samples.png": _captioned_sheet(model, asked[:COLUMNS], settings.batch)
        if model.spec.image.captions
        else _samples_sheet(samples, model.spec),
        "neighbours.png": _neighbours_sheet(samples, data.splits["train"], copies),
    }


def _likelihood(model: Model, data: Dataset, settings: Settings, bars: Bars) -> dict[str, Metric]:
    """bits/dim of the test split, without labels and with them, and how much better the training split's are."""
    likelihood = model.spec.likelihood
    if likelihood is None or likelihood.kind == "unnormalised":
        return {}

    def bits(split: str, labelled: bool, limit: int) -> tuple[NDArray[np.float64], Metric]:
        with bars.task(f"likelihood, {split}{' given labels' if labelled else ''}") as report:
            nats = log_probs(model, data.splits[split], labelled, limit, settings.batch, report)
        how: Metric = {"kind": likelihood.kind, "dequantisation": likelihood.dequantisation, "note": likelihood.note}
        if nats.stderr is not None:
            error = -in_bits(nats.stderr).mean()
            how |= {
                "stderr_of_one": _significant(error),
                "note": f"{how['note']}; standard error of one image's {error:.2g} bits/dim",
            }
        if nats.coarse is not None and nats.converged is not None:
            coarse, converged = in_bits(nats.coarse).mean(), nats.converged.mean()
            how |= {
                "coarse": _significant(coarse),
                "converged": _significant(converged),
                "note": f"{how['note']}; half the steps give {coarse:.4g}, {converged:.0%} of the images converged",
            }
        return in_bits(nats.values), how

    def in_bits(nats: NDArray[np.float64]) -> NDArray[np.float64]:
        return bits_per_dim(torch.from_numpy(nats), model.spec.image.dims).numpy()

    each = likelihood.network_evaluations_per_step
    budget = settings.evaluations if each == 1 else settings.products
    affordable = min(settings.test_images, budget // (likelihood.steps * each))
    test, how = bits("test", False, affordable)
    metrics = {"bits_per_dim": _mean(test, "bits/dim", "lower", f"{data.name} test", **how)}
    if model.spec.image.labels:
        given, how = bits("test", True, affordable)
        metrics["bits_per_dim_given_label"] = _mean(given, "bits/dim", "lower", f"{data.name} test", **how)
    train, _ = bits("train", False, min(settings.train_images, len(test)))
    metrics["bits_per_dim_gap"] = metric(
        test.mean() - train.mean(),
        "bits/dim",
        "lower",
        f"{data.name} test minus train",
        len(train),
        stderr=math.hypot(_stderr(test), _stderr(train)),
    )
    return metrics


# ------------------------------------------------------------------------------------------- quality, copies and speed


def _comparable(train: Split, spec: Spec) -> int:
    """The most samples to which two disjoint sets of training images of the same classes can be found."""
    if not spec.image.labels:
        return len(train) // 2
    rarest = int(np.bincount(train.labels, minlength=spec.image.classes).min())
    return spec.image.classes * (rarest // 2)


def matched(split: Split, labels: NDArray[np.int64], most: int) -> list[NDArray[np.intp]]:
    """Indices of disjoint sets of images, each with as many of every class as `labels` (-1: of any class): as many sets
    as there are images for, at most `most`. Samples are compared with sets of the same classes, because by chance alone
    the shares of the classes differ between random sets, which weighs as much as all else in a Fréchet distance."""
    classes, counts = np.unique(labels, return_counts=True)
    pools = [np.flatnonzero(split.labels == c) if c != UNLABELLED else np.arange(len(split)) for c in classes]
    sets = min(most, *(len(pool) // m for pool, m in zip(pools, counts, strict=True)))
    return [
        np.concatenate([pool[i * m : (i + 1) * m] for pool, m in zip(pools, counts, strict=True)]) for i in range(sets)
    ]


def _quality(
    samples: NDArray[np.uint8], asked: Sequence[Draw], data: Dataset, space: FeatureSpace
) -> dict[str, Metric]:
    """FD-local, density and coverage against as many training images of the same classes, and beside it the mean (and
    the spread) of what other such sets of training images reach; how many samples are taken for what was asked, and how
    surely they are taken for something."""
    n, train = len(samples), data.splits["train"]
    labels = np.array([draw.label for draw in asked])
    fake, predicted, confidence = space.describe(samples)
    real, *others = (space.describe(train.x[index]).features for index in matched(train, labels, 1 + FLOORS))
    found, floors = _compare(real, fake), [_compare(real, other) for other in others]
    how: Metric = {"network_sha256": space.sha256[:16], "network_accuracy": round(space.accuracy, 4)}
    metrics: dict[str, Metric] = {}
    for name, unit, direction in (
        ("fd_local", "squared distance", "lower"),
        ("density", "ratio", "higher"),
        ("coverage", "share", "higher"),
    ):
        floor = [values[name] for values in floors]
        metrics[name] = metric(
            found[name],
            unit,
            direction,
            f"{data.name} train",
            n,
            real=_significant(statistics.fmean(floor)),
            real_std=_significant(statistics.pstdev(floor)),
            real_sets=len(floor),
            **how,
        )
    if (labels != UNLABELLED).all():
        agrees = (predicted.numpy() == labels).astype(np.float64)
        metrics["label_agreement"] = _mean(
            agrees, "share", "higher", "samples of each class in turn", real=round(space.accuracy, 4), **how
        )
        metrics["label_confidence"] = _mean(
            confidence.double().numpy(),
            "probability",
            "higher",
            "samples of each class in turn, of whichever class",
            real=_significant(space.describe(data.splits["test"].x).confidence.double().mean().item()),
            **how,
        )
    return metrics


def _by_steps(
    model: Model, asked: Sequence[Draw], data: Dataset, space: FeatureSpace, batch: int, bars: Bars
) -> dict[str, Metric]:
    """FD-local and label agreement at other numbers of steps than the default, where there are few to choose from: at
    1, 2, 4, ... as far as it goes."""
    steps, metrics = model.spec.steps, dict[str, Metric]()
    if steps.max > FEW:
        return metrics
    for count in (2**k for k in range(FEW.bit_length())):
        if steps.min <= count <= steps.max and count != steps.default:
            more = [dataclasses.replace(draw, steps=count) for draw in asked]
            with bars.task(f"samples in {count} steps") as report:
                found = _quality(sample(model, more, batch, report), more, data, space)
            kept = [name for name in ("fd_local", "label_agreement") if name in found]
            metrics |= {f"{name}_{count}_steps": {**found[name], "steps": count} for name in kept}
    return metrics


def _reconstruction(
    model: Model, asked: Sequence[Draw], data: Dataset, space: FeatureSpace, batch: int
) -> dict[str, Metric]:
    """FD-local of training images, as many as the samples and of the same classes, that were coded and decoded: no
    samples can be expected to come nearer. `real`: of the same images as they are."""
    train = data.splits["train"]
    real, others = (train.take(index) for index in matched(train, np.array([draw.label for draw in asked]), 2))
    reference, decoded, plain = (
        space.describe(x).features for x in (real.x, reconstructions(model, others, batch), others.x)
    )
    return {
        "reconstruction_fd_local": metric(
            quality.frechet_distance(reference, decoded),
            "squared distance",
            "lower",
            f"{data.name} train, coded and decoded",
            len(others),
            real=_significant(quality.frechet_distance(reference, plain)),
            network_sha256=space.sha256[:16],
            network_accuracy=round(space.accuracy, 4),
        )
    }


def _compare(real: Tensor, fake: Tensor) -> dict[str, float]:
    found = quality.density_coverage(real, fake)
    return {
        "fd_local": quality.frechet_distance(real, fake),
        "density": found.density,
        "coverage": found.coverage,
    }


def _caption_agreement(samples: NDArray[np.uint8], asked: Sequence[Draw], reader: Judge) -> dict[str, Metric]:
    """The share of samples that show what their captions ask for, as the judge reads them, and of each attribute the
    share where it is right for every group. `real`: what the judge reads right of real pictures that it never saw."""
    found = reader.agreement(samples, [draw.prompt or "" for draw in asked])
    metrics = {}
    for name, right in found.items():
        metrics["caption_agreement" if name == "caption" else f"caption_agreement_{name}"] = _mean(
            right.astype(np.float64),
            "share",
            "higher",
            "samples of held-out captions",
            real=_significant(reader.accuracy[name]),
            network_sha256=reader.sha256[:16],
        )
    return metrics


def _memorised(copies: quality.Memorisation, data: Dataset) -> Metric:
    return metric(
        copies.share,
        "share",
        "lower",
        f"samples against {data.name} train",
        len(copies.ratio),
        real=_significant(copies.expected),
        p_value=_significant(copies.p_value),
        note=f"nearer to one training image, relative to the next {quality.NEAREST}, "
        f"than all but {copies.expected:.1%} of test images are",
    )


def _speed(model: Model, seed: int, captions: Sequence[str]) -> dict[str, Metric]:
    """Images per second at the Spec's default settings, for one image at a time and for sixteen."""
    threads = torch.get_num_threads()
    processor = f"CPU, {threads} thread{'s' if threads > 1 else ''}"
    where = torch.cuda.get_device_name() if model.device.type == "cuda" else processor
    metrics: dict[str, Metric] = {}
    for batch in (1, 16):
        rate, runs = images_per_second(model, draws(model.spec, batch, seed, captions))
        metrics[f"images_per_second_batch_{batch}"] = metric(
            rate, "images/s", "higher", where, batch * runs, steps=model.spec.steps.default, batch=batch
        )
    return metrics


# ------------------------------------------------------------------------------------------------------------- pictures


def _samples_sheet(samples: NDArray[np.uint8], spec: Spec) -> bytes:
    """A row for each class, or eight rows where there are none."""
    if not spec.image.labels:
        return pictures.sheet(samples[: COLUMNS**2], COLUMNS)
    classes = spec.image.classes
    index = np.arange(classes)[:, None] + classes * np.arange(min(COLUMNS, len(samples) // classes))
    return pictures.sheet(samples[index.ravel()], index.shape[1], spec.image.labels)


def _captioned_sheet(model: Model, asked: Sequence[Draw], batch: int) -> bytes:
    """A row of samples for each draw's caption."""
    row = [dataclasses.replace(draw, sample=k) for draw in asked for k in range(COLUMNS)]
    return pictures.sheet(sample(model, row, batch), COLUMNS, [draw.prompt or "" for draw in asked])


def _neighbours_sheet(samples: NDArray[np.uint8], train: Split, copies: quality.Memorisation) -> bytes:
    """The samples most like copies, each at the left of its nearest training images, and its ratio."""
    worst = copies.ratio.argsort()[:COLUMNS].numpy()
    rows = [np.concatenate([samples[i : i + 1], train.x[copies.neighbours[i].numpy()]]) for i in worst]
    return pictures.sheet(np.concatenate(rows), len(rows[0]), [f"{float(copies.ratio[i]):.2f}" for i in worst])


# -------------------------------------------------------------------------------------------------------------- metrics


def metric(value: float, unit: str, direction: str, data: str, n: int, **more: JSON) -> Metric:
    """One entry of model.json's metrics. Raises `ValueError` for a value that is not finite."""
    if not math.isfinite(value):
        raise ValueError(f"metric: {value} {unit} on {data} is not a number to publish")
    return {"value": _significant(value), "unit": unit, "direction": direction, "data": data, "n": n, **more}


def _mean(values: NDArray[np.float64], unit: str, direction: str, data: str, **more: JSON) -> Metric:
    return metric(values.mean(), unit, direction, data, len(values), stderr=_significant(_stderr(values)), **more)


def _stderr(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1)) / math.sqrt(len(values))


def _significant(value: float) -> float:
    return float(f"{value:.5g}")
