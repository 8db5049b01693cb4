"""What is measured by running a model: its samples, the likelihood of images, its speed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models import _rows
from models._protocol import UNLABELLED, Autoencoder, Density, Draw, Model, Spec, unlabelled
from training.data import Split

Report = Callable[[int, int], None]  # (done, total)


def _silent(done: int, total: int) -> None:
    """Reports nothing."""


def draws(spec: Spec, n: int, seed: int, captions: Sequence[str] = ()) -> list[Draw]:
    """n draws at the Spec's default settings, the classes in turn."""
    return [
        Draw(
            seed=seed,
            sample=i,
            steps=spec.steps.default,
            solver=spec.solvers[0] if spec.solvers else None,
            label=i % spec.image.classes if spec.image.labels else UNLABELLED,
            prompt=captions[i % len(captions)] if spec.image.captions else None,
            guidance_scale=spec.guidance_scale.default if spec.guidance_scale else 1.0,
            temperature=spec.temperature.default if spec.temperature else 1.0,
        )
        for i in range(n)
    ]


def sample(model: Model, asked: Sequence[Draw], batch: int, report: Report = _silent) -> NDArray[np.uint8]:
    """The 8-bit images (N, C, H, W) of the draws, `batch` at a time."""
    images = np.empty((len(asked), *model.spec.image.shape), dtype=np.uint8)
    with torch.inference_mode():
        for start in range(0, len(asked), batch):
            rows = model.init(asked[start : start + batch])
            index = np.arange(start, start + _rows.count(rows))
            while len(index):
                rows = model.step(rows)
                finished = (rows.left == 0).cpu().numpy()
                if finished.any():
                    done = _rows.take(rows, np.flatnonzero(finished).tolist())
                    images[index[finished]] = (model.image(done) * 255).round().to(torch.uint8).cpu().numpy()
                    rows, index = _rows.take(rows, np.flatnonzero(~finished).tolist()), index[~finished]
            report(min(start + batch, len(asked)), len(asked))
    return images


@dataclass(frozen=True)
class LogProbs:
    """Of n images, in nats."""

    values: NDArray[np.float64]  # (n,)
    coarse: NDArray[np.float64] | None = None  # (n,) of an integral, in half the steps
    converged: NDArray[np.float64] | None = None  # (n,) 1.0 where the two are nearly the same, else 0.0
    stderr: NDArray[np.float64] | None = None  # (n,) of each estimate


def log_probs(
    model: Model, split: Split, labelled: bool, limit: int, batch: int = 64, report: Report = _silent
) -> LogProbs:
    """Of the first n = `limit` images, or of all. labelled: given their labels.

    The images of a split stand in the order of a hash: the first are a fair selection.
    """
    assert isinstance(model, Density), "a model whose Spec has a likelihood is a Density"
    limit = min(limit, len(split))
    values: list[Tensor] = []
    integrals: list[Tensor] = []  # (coarse, converged), (2, B)
    errors: list[Tensor] = []
    with torch.inference_mode():
        for start in range(0, limit, batch):
            part = split.take(np.arange(start, min(start + batch, limit)))
            x = torch.from_numpy(part.x).to(model.device).to(torch.float32) / 255
            labels = torch.from_numpy(part.labels).to(model.device) if labelled else None
            score = model.log_prob(x, labels)
            assert score.log_prob is not None, "a likelihood that is not 'unnormalised' has a log_prob"
            values.append(score.log_prob.double().cpu())
            if score.converged is not None:
                integrals.append(torch.stack([score.statistics["coarse_log_prob"], score.converged]).double().cpu())
            if score.stderr is not None:
                errors.append(score.stderr.double().cpu())
            report(start + len(part), limit)
    coarse, converged = torch.cat(integrals, dim=1).numpy() if integrals else (None, None)
    return LogProbs(torch.cat(values).numpy(), coarse, converged, torch.cat(errors).numpy() if errors else None)


def reconstructions(model: Model, split: Split, batch: int) -> NDArray[np.uint8]:
    """The split's images, coded and decoded by the model, as 8-bit images (N, C, H, W)."""
    assert isinstance(model, Autoencoder)
    images = []
    with torch.inference_mode():
        for start in range(0, len(split), batch):
            part = split.take(np.arange(start, min(start + batch, len(split))))
            x = torch.from_numpy(part.x).to(model.device).to(torch.float32) / 255
            labels = torch.from_numpy(part.labels).to(model.device) if model.spec.image.labels else unlabelled(x)
            back = model.reconstruct(x, labels)
            images.append((back * 255).round().to(torch.uint8).cpu().numpy())
    return np.concatenate(images)


def images_per_second(model: Model, asked: Sequence[Draw]) -> tuple[float, int]:
    """Speed of sampling all the draws as one batch: the median of a few runs after one to warm up, and their number."""
    sample(model, asked, len(asked))
    seconds: list[float] = []
    while not seconds or (sum(seconds) < 2.0 and len(seconds) < 20):
        began = time.perf_counter()
        sample(model, asked, len(asked))
        seconds.append(time.perf_counter() - began)
    return len(asked) / statistics.median(seconds), len(seconds)
