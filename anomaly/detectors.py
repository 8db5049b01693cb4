"""One score from many statistics: how unlike the statistics of normal images they are, in whatever direction.

A detector is fitted on statistics (n, d) of normal images, and scores (m, d) -> (m,); higher is more anomalous. Its
state is arrays, which a file can hold. None is ever shown an anomaly.

    mahalanobis    distance under a Gaussian whose covariance is shrunk (Ledoit and Wolf 2004)
    mixture        −log density of a Gaussian mixture
    neighbours     distance to the K-th nearest normal image (Ramaswamy, Rastogi and Shim 2000)
    ecod           how far in the tails each statistic lies, summed (arXiv 2201.00382)

Statistics are standardised by median and median absolute deviation first, and bent: beyond KNEE deviations they count
by their logarithm, so that a few wild values shape no covariance, and yet a wilder one is still more anomalous.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
State = Mapping[str, Floats]

KNEE = 6.0  # deviations
NEIGHBOURS = 10  # K
COMPONENTS = 8  # of a mixture
FOLDS, SUBSETS, SUBSET = 4, 8, 4  # of the choice between detectors
STORED = {"points": np.float16}  # of a state; all else float32
RIDGE = 1e-3  # added to variances of standardised statistics


def single(values: NDArray[np.floating]) -> Floats:
    """Rounded to single precision, in which a file holds it in half the bytes."""
    return np.asarray(values, dtype=np.float32).astype(np.float64)


def standardise(state: State, statistics: Floats) -> Floats:
    """(m, d) -> (m, d). What is not a number is as far away as can be."""
    z = (statistics - state["median"]) / state["scale"]
    z = np.nan_to_num(z, nan=1e12, posinf=1e12, neginf=-1e12)
    bent = np.sign(z) * (KNEE + KNEE * np.log(np.maximum(np.abs(z), KNEE) / KNEE))
    return np.where(np.abs(z) <= KNEE, z, bent)


def standardisation(statistics: Floats) -> dict[str, Floats]:
    median = np.median(statistics, axis=0)
    scale = 1.4826 * np.median(np.abs(statistics - median), axis=0)
    spread = statistics.std(axis=0)
    return {"median": median, "scale": np.where(scale > 1e-9 * spread, scale, np.where(spread > 0, spread, 1.0))}


# ------------------------------------------------------------------------------------------------------------ detectors


def fit_mahalanobis(z: Floats) -> dict[str, Floats]:
    mean = z.mean(axis=0)
    return {"mean": mean, "precision": np.linalg.inv(shrunk_covariance(z - mean))}


def mahalanobis(state: State, z: Floats) -> Floats:
    centred = z - state["mean"]
    return np.asarray(np.sqrt(np.einsum("md,de,me->m", centred, state["precision"], centred)))


def shrunk_covariance(centred: Floats) -> Floats:
    """Ledoit and Wolf's: the sample covariance, drawn towards a multiple of the identity as far as its error asks."""
    n, d = centred.shape
    sample = centred.T @ centred / n
    level = np.trace(sample) / d
    target = level * np.eye(d)
    spread = np.square(sample - target).sum()
    error = (np.square(np.square(centred).sum(axis=1)).mean() - np.square(sample).sum()) / n
    weight = 1.0 if spread == 0 else min(1.0, max(0.0, error / spread))
    return np.asarray(weight * target + (1 - weight) * sample + RIDGE * np.eye(d))


def fit_mixture(z: Floats, seed: int = 0, iterations: int = 100) -> dict[str, Floats]:
    """Expectation–maximisation from a start among the data."""
    rng = np.random.default_rng(seed)
    n, d = z.shape
    k = max(1, min(COMPONENTS, n // (10 * d)))
    means = z[rng.choice(n, k, replace=False)]
    covariances = np.repeat(shrunk_covariance(z - z.mean(axis=0))[None], k, axis=0)
    weights: Floats = np.full(k, 1 / k, dtype=np.float64)
    for _ in range(iterations):
        logs = _component_logs(weights, means, np.asarray(np.linalg.inv(covariances), dtype=np.float64), z)
        responsibility = np.exp(logs - _logsumexp(logs)[:, None])
        mass = responsibility.sum(axis=0) + 1e-9
        weights, means = np.asarray(mass / n, dtype=np.float64), responsibility.T @ z / mass[:, None]
        for j in range(k):
            centred = z - means[j]
            covariances[j] = (responsibility[:, j, None] * centred).T @ centred / mass[j] + 10 * RIDGE * np.eye(d)
    return {"weights": weights, "means": means, "precisions": np.linalg.inv(covariances)}


def mixture(state: State, z: Floats) -> Floats:
    return -_logsumexp(_component_logs(state["weights"], state["means"], state["precisions"], z))


def _component_logs(weights: Floats, means: Floats, precisions: Floats, z: Floats) -> Floats:
    """(m, k) log of weight times density."""
    centred = z[:, None] - means  # (m, k, d)
    squared = np.einsum("mkd,kde,mke->mk", centred, precisions, centred)
    logdet = np.linalg.slogdet(precisions)[1]
    return np.asarray(np.log(weights) + 0.5 * (logdet - squared - z.shape[1] * np.log(2 * np.pi)))


def _logsumexp(logs: Floats) -> Floats:
    top = logs.max(axis=1)
    return np.asarray(top + np.log(np.exp(logs - top[:, None]).sum(axis=1)))


def fit_neighbours(z: Floats) -> dict[str, Floats]:
    """Whitened, so that statistics which say the same do not count twice."""
    mean = z.mean(axis=0)
    values, vectors = np.linalg.eigh(shrunk_covariance(z - mean))
    whitening = vectors / np.sqrt(values)
    return {"mean": mean, "whitening": whitening, "points": (z - mean) @ whitening}


def neighbours(state: State, z: Floats) -> Floats:
    points = state["points"]
    k = min(NEIGHBOURS, len(points))
    found = np.empty(len(z))
    for start in range(0, len(z), 256):
        block = (z[start : start + 256] - state["mean"]) @ state["whitening"]
        squared = np.square(block).sum(axis=1)[:, None] - 2 * block @ points.T + np.square(points).sum(axis=1)
        found[start : start + 256] = np.sqrt(np.maximum(np.partition(squared, k - 1, axis=1)[:, k - 1], 0.0))
    return found


def fit_ecod(z: Floats) -> dict[str, Floats]:
    skew = np.power(z - z.mean(axis=0), 3).mean(axis=0)
    return {"sorted": np.sort(z, axis=0), "skew": skew}


def ecod(state: State, z: Floats) -> Floats:
    columns, n = state["sorted"], len(state["sorted"])
    below = np.stack([np.searchsorted(columns[:, j], z[:, j], side="right") for j in range(z.shape[1])], axis=1)
    above = np.stack([n - np.searchsorted(columns[:, j], z[:, j], side="left") for j in range(z.shape[1])], axis=1)
    # Beyond the data the tail probability would stand still: the distance to the outermost goes on.
    beyond = np.maximum(z - columns[-1], 0) + np.maximum(columns[0] - z, 0)
    left, right = (-np.log((count + 1) / (n + 2)) for count in (below, above))
    by_skew = np.where(state["skew"] < 0, left, right)
    return np.asarray(np.maximum.reduce([side.sum(axis=1) for side in (left, right, by_skew)]) + beyond.sum(axis=1))


FITS: dict[str, Callable[[Floats], dict[str, Floats]]] = {
    "mahalanobis": fit_mahalanobis,
    "mixture": fit_mixture,
    "neighbours": fit_neighbours,
    "ecod": fit_ecod,
}
SCORES: dict[str, Callable[[State, Floats], Floats]] = {
    "mahalanobis": mahalanobis,
    "mixture": mixture,
    "neighbours": neighbours,
    "ecod": ecod,
}


@dataclass(frozen=True)
class Detector:
    """A fitted detector."""

    kind: str
    state: State  # with the standardisation's

    def score(self, statistics: Floats) -> Floats:
        """(m, d) -> (m,)"""
        return SCORES[self.kind](self.state, standardise(self.state, statistics))


def fit(kind: str, statistics: Floats) -> Detector:
    """Fit on statistics (n, d) of normal images."""
    standard = standardisation(statistics)
    state = {**standard, **FITS[kind](standardise(standard, statistics))}
    return Detector(
        kind, {name: values.astype(STORED.get(name, np.float32)).astype(np.float64) for name, values in state.items()}
    )


def held_out(kind: str, statistics: Floats, folds: int) -> Floats:
    """(n,) scores of normal images, each by a detector fitted on the others: those of folds − 1 parts that it is not
    in. To a detector that has seen it, an image is more normal than to any other."""
    part, found = np.arange(len(statistics)) % folds, np.empty(len(statistics))
    for fold in range(folds):
        found[part == fold] = fit(kind, statistics[part != fold]).score(statistics[part == fold])
    return found


# --------------------------------------------------------------------------------------------------------------- choice


def acceptance_volume(detector: Detector, held_out: Floats, rates: Floats, seed: int = 0, draws: int = 5_000) -> float:
    """Of the statistics' box, the share that the detector accepts when it rejects these rates of held-out normal
    images, in the mean of the logarithm. Small is good, since an anomaly can be anywhere (the mass–volume curve of
    Clémençon and Jakubowicz 2013, as a criterion in arXiv 1607.01152).

    The box is drawn from uniformly, in standardised units, from below the least to above the largest held-out value.
    """
    z = standardise(detector.state, held_out)
    low, high = z.min(axis=0) - 1.0, z.max(axis=0) + 1.0
    box = np.random.default_rng(seed).uniform(low, high, (draws, z.shape[1]))
    inside, normal = (SCORES[detector.kind](detector.state, points) for points in (box, z))
    accepted = [np.mean(inside <= np.quantile(normal, 1 - rate)) for rate in rates]
    return float(np.mean(np.log(np.maximum(accepted, 0.5 / draws))))


def choose(statistics: Floats, seed: int = 0) -> tuple[Detector, dict[str, float]]:
    """The detector whose acceptance volume is least, fitted on all statistics (n, d); and every detector's volume.

    Volumes are means over FOLDS folds of the images and SUBSETS random subsets of SUBSET statistics, on which detectors
    are fitted anew: in many dimensions every region is too small to be measured (1607.01152, §4). Only normal images
    are looked at.
    """
    rng = np.random.default_rng(seed)
    rates = np.array([0.01, 0.02, 0.05, 0.1])
    folds = np.array_split(rng.permutation(len(statistics)), FOLDS)
    d = statistics.shape[1]
    subsets = [rng.choice(d, min(SUBSET, d), replace=False) for _ in range(SUBSETS if d > SUBSET else 1)]
    volumes = dict.fromkeys(FITS, 0.0)
    for k, held_out in enumerate(folds):
        rest = np.concatenate([fold for j, fold in enumerate(folds) if j != k])
        for subset in subsets:
            for kind in FITS:
                fitted = fit(kind, statistics[np.ix_(rest, subset)])
                volume = acceptance_volume(fitted, statistics[np.ix_(held_out, subset)], rates, seed)
                volumes[kind] += volume / (len(folds) * len(subsets))
    best = min(volumes, key=lambda kind: volumes[kind])
    return fit(best, statistics), volumes
