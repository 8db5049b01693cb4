"""How well anomalies are told from normal images, and how many normal images are called anomalies: pure numbers.

Scores are higher for what is more anomalous. Of two sets of scores, normal (n,) and odd (m,):

    AUROC              the chance that an anomaly scores higher than a normal image
    AUPRC              the mean precision over recalls, of as many anomalies as there are, n : m as stated
    FPR at 95 % TPR    the share of normal images above the threshold that 95 % of the anomalies reach
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import scipy.stats
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from anomaly import conformal
from anomaly.calibration import Calibration

Floats = NDArray[np.float64]


def finite(normal: Floats, odd: Floats) -> tuple[Floats, Floats]:
    """Both, with what is no number, or infinite, above everything else: the statistic could not be said."""
    both = np.concatenate([normal, odd])
    known = both[np.isfinite(both)]
    top, bottom = known.max(initial=0.0) + 1.0, known.min(initial=0.0) - 1.0
    fixed = np.nan_to_num(both, nan=top, posinf=top, neginf=bottom)
    return fixed[: len(normal)], fixed[len(normal) :]


def separation(normal: Floats, odd: Floats) -> dict[str, float]:
    """AUROC, AUPRC and FPR at 95 % TPR."""
    normal, odd = finite(normal, odd)
    truth, values = np.repeat([0, 1], [len(normal), len(odd)]), np.concatenate([normal, odd])
    fpr, tpr, _ = roc_curve(truth, values, drop_intermediate=False)
    return {
        "auroc": float(roc_auc_score(truth, values)),
        "auprc": float(average_precision_score(truth, values)),
        "fpr95": float(fpr[np.argmax(tpr >= 0.95)]),
        "n": len(odd),
    }


def roc(normal: Floats, odd: Floats) -> tuple[Floats, Floats]:
    """The curve: (rates of false alarms, shares of anomalies found)."""
    normal, odd = finite(normal, odd)
    fpr, tpr, _ = roc_curve(np.repeat([0, 1], [len(normal), len(odd)]), np.concatenate([normal, odd]))
    return np.asarray(fpr), np.asarray(tpr)


# --------------------------------------------------------------------------------------------------------- false alarms


@dataclass(frozen=True)
class FalseAlarms:
    """Among m normal images that no part of the model or the calibration has seen."""

    alpha: float
    confidence: float | None  # with which the rate is promised; None: on average over calibrations
    n: int  # m
    rate: float  # realised
    beta: tuple[float, float]  # central 95 % of the true rate, over calibrations: Beta(k, n + 1 − k)
    counted: tuple[float, float]  # the same of the rate among m images, whose own chance comes on top: beta-binomial


def false_alarms(
    calibration: Calibration, normal: Floats, alpha: float, confidence: float | None = None
) -> FalseAlarms | None:
    """None where the calibration has too few images for the alpha."""
    n, m = calibration.n, len(normal)
    k = conformal.rank(n, alpha) if confidence is None else conformal.rank_with_confidence(n, alpha, confidence)
    if k == 0:
        return None
    named = np.mean([verdict.is_anomaly for verdict in calibration.judge(normal, alpha, confidence)])
    return FalseAlarms(alpha, confidence, m, float(named), *_intervals(n, k, m))


@cache
def _intervals(n: int, k: int, m: int) -> tuple[tuple[float, float], tuple[float, float]]:
    low, high = scipy.stats.beta.ppf([0.025, 0.975], k, n + 1 - k)
    few, many = scipy.stats.betabinom.ppf([0.025, 0.975], m, k, n + 1 - k) / m
    return (float(low), float(high)), (float(few), float(many))


# --------------------------------------------------------------------------------------------------------------- groups


def grouped(values: Floats, size: int) -> Floats:
    """(n,) -> (n // size, size), in the order in which they stand."""
    return values[: len(values) // size * size].reshape(-1, size)


def fisher(p_values: Floats, size: int) -> Floats:
    """Groups' scores by Fisher's method, −Σ log p: high where a group's images are odd together."""
    return np.asarray(-np.log(grouped(p_values, size)).sum(axis=1))


def typicality(nll: Floats, entropy: float, size: int) -> Floats:
    """Groups' scores |mean NLL − entropy| (Nalisnick et al. 2019b, arXiv 1906.02994, eq. 4). entropy: the mean NLL of
    normal images."""
    return np.asarray(np.abs(grouped(nll, size).mean(axis=1) - entropy))


# --------------------------------------------------------------------------------------------------------------- pixels


def pixels(maps: Floats, masks: NDArray[np.bool_]) -> dict[str, float]:
    """AUROC of pixels, maps (n, H, W) against masks (n, H, W): of all pixels of all images together, by one threshold;
    and the mean over images, each by its own. Images whose mask is empty or full have no part in it."""
    use = masks.any(axis=(1, 2)) & ~masks.all(axis=(1, 2))
    most = np.finfo(np.float64).max
    maps, masks = np.nan_to_num(maps[use], nan=most, posinf=most), masks[use]
    each = [roc_auc_score(mask.ravel(), values.ravel()) for values, mask in zip(maps, masks, strict=True)]
    return {
        "auroc": float(roc_auc_score(masks.ravel(), maps.ravel())),
        "auroc_by_image": float(np.mean(each)),
        "n": int(use.sum()),
    }


def rounded(numbers: Mapping[str, float]) -> dict[str, float]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in numbers.items()}
