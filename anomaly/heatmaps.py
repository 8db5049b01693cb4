"""Where in an image a model is surprised, told so that a normal image stays dark.

A model's surprise has a unit of its own, and pixels differ in what is normal: at the rim of a centred picture nothing
ever happens. So maps are compared with those of normal images, never with their own largest value:

    local         root of the mean square of the surprise around the pixel, weighed by a Gaussian of a tenth of the
                  shorter side: a single pixel is noisy, and a defect is larger. Squares, since what was expected is
                  subtracted already: a patch that says less than it should is as odd as one that says more
    height        (local − centre) / scale of the pixel: centre is its median over the fit images; scale is what the
                  UPPER quantile lies above the median, half the pixel's own and half the mean of all, so that a place
                  where normal images never differ does not glow at a trifle
    maxima        the greatest height anywhere in each calibration image, sorted

A pixel is in the mask where its height is beyond the conformal threshold of the maxima: of normal images a share of at
most α has any pixel in its mask (family-wise; the maximum is the score of `anomaly.conformal`). Of several models the
heights' mean is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from anomaly import conformal
from anomaly.conformal import Floats
from anomaly.detectors import single

Surprises: TypeAlias = NDArray[np.floating]  # (n, H, W) of n images

WIDTH = 1 / 10  # standard deviation of the neighbourhood, of the shorter side
UPPER = 0.95
REFERENCE = 0.01  # share of normal images that anywhere exceed what is shown as MIDDLE
MIDDLE = 128


@dataclass(frozen=True)
class Maps:
    """What heights are measured by; M models, in order."""

    centre: Floats  # (M, H, W)
    scale: Floats  # (M, H, W)
    maxima: Floats  # (n,) sorted

    def heights(self, surprises: Sequence[Surprises]) -> Floats:
        """(n, H, W) of the surprises of each of the M models, rounded to single precision."""
        each = [
            (local(found) - centre) / scale
            for found, centre, scale in zip(surprises, self.centre, self.scale, strict=True)
        ]
        return single(np.mean(each, axis=0))

    def mask(self, heights: Floats, k: int) -> NDArray[np.bool_]:
        """Where heights exceed all but k − 1 of the maxima; nowhere for k = 0."""
        if k == 0:
            return np.zeros(heights.shape, dtype=np.bool_)
        return heights > conformal.threshold(self.maxima, k)

    def rank(self, alpha: float, confidence: float | None) -> int:
        """k of the mask at that level, as for scores; 0 where there are too few maxima."""
        n = len(self.maxima)
        return conformal.rank(n, alpha) if confidence is None else conformal.rank_with_confidence(n, alpha, confidence)

    @property
    def reference(self) -> float:
        """The height that is shown as MIDDLE: the threshold of the mask at α = REFERENCE, or, of too few images for
        that, the largest of the maxima."""
        k = max(1, conformal.rank(len(self.maxima), REFERENCE))
        return max(conformal.threshold(self.maxima, k), 1e-6)

    def picture(self, heights: Floats) -> NDArray[np.uint8]:
        """Levels (…, H, W): 0 at the median of normal images or below, MIDDLE at `reference`, white at twice that."""
        return np.rint(np.clip(heights * (MIDDLE / self.reference), 0, 255)).astype(np.uint8)


def fit(fit_images: Sequence[Surprises], calibration_images: Sequence[Surprises]) -> Maps:
    """From the surprises of each model, at fit and at calibration images, all normal and none in both."""
    around = [local(found) for found in fit_images]
    centre = np.stack([np.median(found, axis=0) for found in around])
    spread = np.stack([np.quantile(found, UPPER, axis=0) for found in around]) - centre
    scale = 0.5 * spread + 0.5 * spread.mean(axis=(1, 2), keepdims=True)
    unsorted = Maps(single(centre), single(np.where(scale > 0, scale, 1.0)), np.zeros(0))
    maxima = unsorted.heights(calibration_images).max(axis=(1, 2))
    return replace(unsorted, maxima=np.sort(maxima))


def local(surprises: Surprises) -> Floats:
    """(…, H, W) roots of mean squares, with mirrored edges."""
    found = np.square(np.asarray(surprises, dtype=np.float64))
    for axis in (-1, -2):
        found = np.moveaxis(_along(np.moveaxis(found, axis, -1), WIDTH * min(surprises.shape[-2:])), -1, axis)
    return np.asarray(np.sqrt(found))


def _along(values: Floats, width: float) -> Floats:
    """Smoothed along the last axis."""
    n = values.shape[-1]
    reach = min(n, math.ceil(3 * width))
    weights = np.exp(-0.5 * np.square(np.arange(-reach, reach + 1) / max(width, 1e-9)))
    weights /= weights.sum()
    padded = np.pad(values, [*[(0, 0)] * (values.ndim - 1), (reach, reach)], mode="symmetric")
    total = np.zeros_like(values)
    for k, weight in enumerate(weights):
        total += weight * padded[..., k : k + n]
    return total
