"""Feature vectors: how unusual is what a model has made of an image, in two numbers.

A model's feature vector has tens or hundreds of numbers (`models._protocol.Score.features`), too many to be statistics.
What is normal for it is learnt from normal images: they lie near a subspace, with a normal density in it and the same
variance in every direction beyond (probabilistic PCA, Tipping and Bishop 1999). Of a vector f that gives the statistics

    f_within     log of the mean square of the coordinates in the subspace, each in its standard deviations
    f_beyond     log of the mean square of what remains, in units of its variance

Logarithms, since all that matters is how many times as much. The dimension of the subspace is the one of DIMENSIONS
under which held-out normal images are likeliest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from anomaly.detectors import Floats, single, standardisation, standardise

DIMENSIONS = (2, 4, 8, 16, 32)  # not more, so that a calibration stays small
DISTANCES = ("within", "beyond")
FOLDS = 4
LEAST = 1e-9  # of a variance, in squared deviations of a number


@dataclass(frozen=True)
class Subspace:
    """What is normal for a feature vector of F numbers: a subspace of K dimensions, with the density in and beyond it.
    Numbers that are stored in half precision are rounded to it from the beginning."""

    median: Floats  # (F,) and scale: standardised, and bent, as statistics are (`anomaly.detectors`)
    scale: Floats  # (F,)
    mean: Floats  # (F,) of standardised vectors
    axes: Floats  # (K, F) orthonormal, but for their rounding
    variances: Floats  # (K,) along the axes
    rest: Floats  # (1,) variance in each of the F − K directions beyond

    def distances(self, features: Floats) -> Floats:
        """(n, F) -> (n, 2), by DISTANCES."""
        within, beyond = self._squares(features)
        found = np.stack([within / len(self.axes), beyond / self._spare], axis=1)
        return np.asarray(np.log(np.maximum(found, LEAST)))

    def log_density(self, features: Floats) -> Floats:
        """(n,) nats of the standardised vectors, up to a constant that is the same for every subspace."""
        within, beyond = self._squares(features)
        volume = np.log(self.variances).sum() + self._spare * np.log(self.rest[0])
        return np.asarray(-0.5 * (within + beyond + volume))

    @property
    def _spare(self) -> int:
        """Dimensions beyond the subspace."""
        return int(self.axes.shape[1]) - len(self.axes)

    def _squares(self, features: Floats) -> tuple[Floats, Floats]:
        """(n,) each, sums of squared standard deviations."""
        centred = standardise({"median": self.median, "scale": self.scale}, features) - self.mean
        coordinates = centred @ self.axes.T
        beyond = np.square(centred - coordinates @ self.axes).sum(axis=1)
        return np.square(coordinates / np.sqrt(self.variances)).sum(axis=1), beyond / self.rest[0]


def fit(features: Floats) -> tuple[Subspace, Floats]:
    """From features (n, F) of normal images: their subspace; and each image's distances (n, 2) to the subspace of the
    others, those of FOLDS − 1 parts that it is not in: to its own any image is too near."""
    standard = standardisation(features)
    standard = {name: single(values) for name, values in standard.items()}
    folds = np.arange(len(features)) % FOLDS
    largest = min(features.shape[1] - 1, int((folds != 0).sum()) // 2)
    dimensions = [k for k in DIMENSIONS if k <= largest] or [max(1, largest)]
    each = [(folds == fold, _spectrum(features[folds != fold], standard)) for fold in range(FOLDS)]

    def likelihood(k: int) -> float:
        return sum(float(spectrum.subspace(k).log_density(features[held]).sum()) for held, spectrum in each)

    best = max(dimensions, key=likelihood)
    found = np.empty((len(features), len(DISTANCES)))
    for held, spectrum in each:
        found[held] = spectrum.subspace(best).distances(features[held])
    return _spectrum(features, standard).subspace(best), found


@dataclass(frozen=True)
class _Spectrum:
    """The principal axes of features, as many as any subspace may have."""

    standard: dict[str, Floats]
    mean: Floats
    axes: Floats  # (K, F)
    variances: Floats  # (K,)
    total: float  # variance of all numbers together

    def subspace(self, k: int) -> Subspace:
        axes, variances = self.axes[:k].astype(np.float16), self.variances[:k].astype(np.float32)
        spare = axes.shape[1] - k
        rest = np.float32(max((self.total - float(self.variances[:k].sum())) / spare, LEAST))
        stored = (self.mean, axes, variances, np.array([rest]))
        return Subspace(self.standard["median"], self.standard["scale"], *(part.astype(np.float64) for part in stored))


def _spectrum(features: Floats, standard: dict[str, Floats]) -> _Spectrum:
    z = standardise(standard, features)
    mean = single(z.mean(axis=0))
    centred = z - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(z))
    most = min(DIMENSIONS[-1], len(values))
    axes, variances = vectors[:, ::-1][:, :most].T, np.maximum(values[::-1][:most], LEAST)
    return _Spectrum(standard, mean, axes, variances, float(values.sum()))
