"""How good a set of samples is, measured in features: fidelity, diversity, and whether training images were copied.

    FD-local            Fréchet distance (arXiv 1706.08500) in the features of the data's own network; lower is better
    density, coverage   arXiv 2002.09797: are samples where images are, and are all images somewhere near a sample?
    memorisation        are samples much nearer to one training image than to the next ones, more often than images
                        are that the model has never seen?

Each is biased by the number of samples, so each is printed beside what as many real images reach.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import betabinom
from torch import Tensor

NEAREST = 5  # k of density and coverage, the choice of their paper, and of the memorisation ratio
SUSPICIOUS = 0.002  # share of unseen images that stand out as much as a sample that is counted: few, to see few copies
CHUNK = 512  # rows of a distance matrix that are in memory at a time


# ----------------------------------------------------------------------------------------------------- Fréchet distance


def gaussian_frechet(mean1: Tensor, cov1: Tensor, mean2: Tensor, cov2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians, |m1 − m2|² + tr(C1 + C2 − 2 (C1^½ C2 C1^½)^½), in float64.

    The symmetric form has real eigenvalues whatever the rounding, unlike the matrix root of C1 C2.
    """
    mean1, cov1, mean2, cov2 = (t.double() for t in (mean1, cov1, mean2, cov2))
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Squared Fréchet distance of the Gaussians fitted to two sets of features, (N, F) and (M, F)."""
    return gaussian_frechet(a.double().mean(0), a.double().T.cov(), b.double().mean(0), b.double().T.cov())


# ------------------------------------------------------------------------------------------------- density and coverage


@dataclass(frozen=True)
class DensityCoverage:
    density: float  # about 1 where samples are as close to images as images are; above where they crowd
    coverage: float  # share of images that have a sample in their neighbourhood, at most 1


def density_coverage(real: Tensor, fake: Tensor, k: int = NEAREST) -> DensityCoverage:
    """Density and coverage of `fake` (M, F) with respect to `real` (N, F), N > k (arXiv 2002.09797, eq. 3 and 4).

    An image's neighbourhood is the open ball that reaches to its k-th nearest other image.
    """
    if len(real) <= k:
        raise ValueError(f"real: {len(real)} images; more than k = {k} are needed")
    radius = nearest(real, real, k + 1)[0][:, k]  # the nearest of all is the image itself
    inside, covered = 0, 0
    for start in range(0, len(real), CHUNK):
        within = distances(real[start : start + CHUNK], fake) < radius[start : start + CHUNK, None]
        inside += int(within.sum())
        covered += int(within.any(dim=1).sum())
    return DensityCoverage(inside / (k * len(fake)), covered / len(real))


# --------------------------------------------------------------------------------------------------------- memorisation


@dataclass(frozen=True)
class Memorisation:
    """The outcome of the test, and what a picture beside the samples needs."""

    ratio: Tensor  # (M,) distance to the nearest training image, over the mean distance to the next k
    neighbours: Tensor  # (M, k + 1) int64: the nearest training images, nearest first
    threshold: float  # a sample whose ratio is below it stands out
    suspects: int  # samples that do
    expected: float  # share of suspects if samples were as far from the training images as unseen images are
    p_value: float  # chance of so many suspects then

    @property
    def share(self) -> float:
        """Share of samples that stand out."""
        return self.suspects / len(self.ratio)


def memorisation(samples: Tensor, train: Tensor, unseen: Tensor, k: int = NEAREST) -> Memorisation:
    """Are there copies of training images among the samples? All three (N, D), pixels or features.

    A copy is much nearer to one training image than to all others. The ratio of those distances says so for blurred and
    for sharp samples alike, where the distance itself would call every blurred sample a copy. The threshold is a low
    order statistic of the ratios of `unseen` images; if samples and unseen images are exchangeable, the number of
    samples below it is beta-binomial, so the p-value is exact.
    """
    distance, neighbours = nearest(samples, train, k + 1)
    ratio, null = _ratio(distance), _ratio(nearest(unseen, train, k + 1)[0])
    rank = max(1, int(SUSPICIOUS * (len(null) + 1)))
    threshold = float(null.sort().values[rank - 1])
    suspects = int((ratio < threshold).sum())
    p_value = float(betabinom.sf(suspects - 1, len(ratio), rank, len(null) + 1 - rank))
    return Memorisation(ratio, neighbours, threshold, suspects, rank / (len(null) + 1), p_value)


def _ratio(distance: Tensor) -> Tensor:
    """(N, k + 1) sorted distances -> (N,). Where all are zero, training has many copies of the image: 0 then too."""
    return distance[:, 0] / distance[:, 1:].mean(dim=1).clamp(min=1e-12)


# ------------------------------------------------------------------------------------------------------------ distances


def flat(x: NDArray[np.uint8]) -> Tensor:
    """8-bit images (N, C, H, W) -> (N, D) float32 in [0, 1]."""
    return torch.from_numpy(x.reshape(len(x), -1)).to(torch.float32) / 255


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances (N, M) of rows (N, D) and (M, D), exact where rows are equal."""
    near = torch.cdist(a, b)  # by matrix product where that is faster: |a|² + |b|² − 2ab loses the small distances
    scale = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)
    row, column = torch.nonzero(near.square() < 1e-4 * scale, as_tuple=True)
    near[row, column] = (a[row] - b[column]).square().sum(dim=1).sqrt()
    return near


def nearest(a: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """For every row of `a` the distances (N, k), sorted, and the indices (N, k) of the k nearest rows of `b`."""
    parts = [distances(part, b).topk(k, largest=False) for part in a.split(CHUNK)]  # type: ignore[no-untyped-call]
    return torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts])
