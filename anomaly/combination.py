"""One score from several sources, none of which sees everything.

A source says of an image one thing, higher for what is more anomalous: the density over a model's statistics, its
`excess_bits`, how far a feature vector is from what is normal. Each is held against normal images that it was not
fitted on, and so has a p-value, the share of these that are higher; beyond the outermost TAIL of them their tail is
taken for an exponential one, so that what lies beyond all normal images is the more odd the farther it lies. Then

    of a vector's two distances, and of the sources of a model, the score is Fisher's −Σ log p: they look at the same
    image through the same network, so that what is odd is a little odd in most of them, and of all ways to combine
    independent p-values this one loses least as evidence grows (Littell and Folks 1971)

    of several models it is log Σ 1/p, which ranks as the harmonic mean does (Wilson 2019, doi 10.1073/pnas.1814092116):
    each family sees what the others are blind to, and one that is sure must not be outvoted by those that see nothing

Both are the same for all families; docs/05 tells what was compared before they were settled. Sources are not
independent, so neither has the distribution that its name promises; it need not, since the score is calibrated like any
other (`anomaly.conformal`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anomaly.detectors import Floats, single

TAIL = 0.05
GRID = np.linspace(TAIL, 1 - TAIL, 91)  # where quantiles are kept
LEAST = 1e-6  # of a mean excess: values of normal images that hardly differ
FARTHEST = 1e30  # −log p of what is no number


@dataclass(frozen=True)
class Tails:
    """What is normal for P numbers."""

    quantiles: Floats  # (P, len(GRID)) not falling
    excess: Floats  # (P, 2) how far beyond the first and the last quantile values lie in the mean, of those that do

    def surprisals(self, values: Floats) -> Floats:
        """(n, P) -> (n, P): −log of the share of normal images whose value is higher, nats. It rises everywhere."""
        found = np.empty(values.shape)
        for j, (quantiles, (low, high)) in enumerate(zip(self.quantiles, self.excess, strict=True)):
            column = values[:, j]
            below = np.exp(-np.maximum(quantiles[0] - column, 0.0) / low) * np.interp(column, quantiles, GRID)
            found[:, j] = np.maximum(column - quantiles[-1], 0.0) / high - np.log1p(-below)
        return np.minimum(np.nan_to_num(found, nan=FARTHEST, posinf=FARTHEST), FARTHEST)


def tails(values: Floats) -> Tails:
    """From values (n, P) of normal images."""
    quantiles = np.quantile(values, GRID, axis=0).T
    low, high = quantiles[:, 0] - values, values - quantiles[:, -1]
    excess = np.stack([_mean_excess(low), _mean_excess(high)], axis=1)
    return Tails(single(quantiles), single(excess))


def _mean_excess(beyond: Floats) -> Floats:
    """(P,) of beyond (n, P), of what is above 0."""
    count = np.maximum((beyond > 0).sum(axis=0), 1)
    return np.asarray(np.maximum(np.maximum(beyond, 0.0).sum(axis=0) / count, LEAST))


@dataclass(frozen=True)
class Combination:
    """Sources: S plain ones, and V feature vectors of two distances each. Of M models."""

    distances: Tails  # 2 V
    sources: Tails  # S + V
    models: Tails  # M
    owners: Floats  # (S + V,) whose each source is: 0 … M − 1

    def score(self, plain: Floats, distances: Floats) -> Floats:
        """plain (n, S), distances (n, V, 2) -> (n,)"""
        sums = by_model(self.sources.surprisals(joined(self.distances, plain, distances)), self.owners)
        return np.asarray(np.logaddexp.reduce(self.models.surprisals(sums), axis=1))


def joined(of_distances: Tails, plain: Floats, distances: Floats) -> Floats:
    """(n, S + V): the two distances of a vector become one source."""
    n, v, _ = distances.shape
    return np.concatenate(
        [plain, of_distances.surprisals(distances.reshape(n, -1)).reshape(n, v, 2).sum(axis=2)], axis=1
    )


def by_model(surprisals: Floats, owners: Floats) -> Floats:
    """(n, S + V) -> (n, M), sums."""
    return np.stack([surprisals[:, owners == model].sum(axis=1) for model in range(int(owners.max()) + 1)], axis=1)


def fit(plain: Floats, distances: Floats, owners: Floats) -> Combination:
    """From plain sources (n, S) and distances (n, V, 2) of normal images, by what was not fitted on each of them."""
    of_distances = tails(distances.reshape(len(distances), -1))
    values = joined(of_distances, plain, distances)
    of_sources = tails(values)
    return Combination(of_distances, of_sources, tails(by_model(of_sources.surprisals(values), owners)), owners)
