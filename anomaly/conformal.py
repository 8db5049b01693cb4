"""Split-conformal p-values, and what they promise.

n scores of normal images, sorted, are the calibration. For a new image of score s (higher: more anomalous)

    p = (1 + #{calibration scores ≥ s}) / (n + 1)

is never 0, and P(p ≤ α) ≤ α if the image is exchangeable with the calibration images (Vovk, Gammerman and Shafer 2005,
ch. 2). That holds on average over calibrations. Given this one, the rate at which normal images have p ≤ α is itself
random, Beta(k, n + 1 − k) with k = ⌊α (n + 1)⌋ (Vovk 2012, arXiv 1209.2673, prop. 2a), if scores have no ties.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

MOST = 1e18  # calibration images that are ever counted: more than these are told as these


def p_values(calibration: Floats, scores: Floats) -> Floats:
    """calibration (n,) sorted, scores (m,) -> (m,) in [1 / (n + 1), 1]. A score that is not a number has the least."""
    n = len(calibration)
    as_large = n - np.searchsorted(calibration, scores, side="left")
    as_large = np.where(np.isnan(scores), 0, as_large)
    return (1.0 + as_large) / (n + 1)


def rank(n: int, alpha: float) -> int:
    """k = ⌊α (n + 1)⌋: an image is an anomaly at α if fewer than k calibration scores are as large as its own. 0: none
    ever is, since n is too small for so small an α."""
    return min(n, math.floor(alpha * (n + 1) * (1 + 1e-12)))  # α < 1, but for what floats make of it


def needed(alpha: float) -> int:
    """The least number of calibration images with which an image can be an anomaly at α; MOST where it is more."""
    return math.ceil(min(1 / alpha, MOST) * (1 - 1e-12)) - 1


def threshold(calibration: Floats, k: int) -> float:
    """The least score that is no anomaly by rank k ≥ 1 in sorted calibration (n,): an anomaly's is larger."""
    return float(calibration[len(calibration) - k])


@lru_cache(maxsize=4096)  # the same few of every request
def upper_bound(n: int, k: int, confidence: float = 0.95) -> float:
    """With that confidence over calibrations, the true false-alarm rate of rank k is at most this: the quantile of
    Beta(k, n + 1 − k)."""
    if k == 0:
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beta_cdf(middle, k, n + 1 - k) < confidence else (low, middle)
    return high


@lru_cache(maxsize=4096)
def rank_with_confidence(n: int, alpha: float, confidence: float) -> int:
    """The largest k whose true false-alarm rate is at most α with that confidence over calibrations; 0: none is."""
    low, high, left = 0, rank(n, alpha), (1 - confidence) * (1 + 1e-9)
    while low < high:  # the bound rises with k; it is ≤ α where the distribution has reached the confidence at α
        k = (low + high + 1) // 2
        low, high = (k, high) if _beyond(alpha, k, n + 1 - k) <= left else (low, k - 1)
    return low


def needed_with_confidence(alpha: float, confidence: float) -> int:
    """The least n for which `rank_with_confidence` is not 0: P(Beta(1, n) ≤ α) = 1 − (1 − α)ⁿ ≥ confidence, and n is at
    least `needed`. MOST where it is more."""
    promised = math.ceil(min(math.log1p(-confidence) / math.log1p(-alpha), MOST) * (1 - 1e-12))
    return max(promised, needed(alpha))


def beta_cdf(x: float, a: int, b: int) -> float:
    """P(Beta(a, b) ≤ x) for whole a, b ≥ 1: that at least a of a + b − 1 uniform numbers are ≤ x."""
    return 1 - _beyond(x, a, b)


def _beyond(x: float, a: int, b: int) -> float:
    """1 − `beta_cdf`, exact also where it is tiny."""
    if x <= 0 or x >= 1:
        return float(x <= 0)
    n = a + b - 1
    fewer, factorials = np.arange(a), _log_factorials(n)
    logs = factorials[n] - factorials[:a] - factorials[n - fewer] + fewer * math.log(x) + (n - fewer) * math.log1p(-x)
    return float(np.exp(logs).sum())


@lru_cache(maxsize=64)  # one for each calibration in use: they are asked for in every request
def _log_factorials(n: int) -> Floats:
    """log j! for j = 0 … n."""
    return np.array([math.lgamma(j + 1) for j in range(n + 1)])


def discoveries(p: Floats, rate: float) -> NDArray[np.bool_]:
    """Which of a batch are anomalies if at most that share of those named is to be false (Benjamini and Hochberg 1995;
    valid for conformal p-values of one calibration: arXiv 2104.08279, thm. 1)."""
    order = np.argsort(p, kind="stable")
    limits = rate * (1 + 1e-12) * (np.arange(len(p)) + 1) / max(1, len(p))
    passing = np.flatnonzero((p[order] <= limits) & (p[order] < 1))
    named = np.zeros(len(p), dtype=bool)
    if len(passing):
        named[order[: passing[-1] + 1]] = True
    return named


def fewest(n: int, images: int, rate: float) -> int:
    """The least number of a batch of so many images that `discoveries` can name, besides none: the least k with
    1 / (n + 1) ≤ rate · k / images, as no p-value is smaller. More than `images`: it never names any."""
    return max(1, math.ceil(min(images / (rate * (n + 1)), MOST) * (1 - 1e-12)))
