"""How many calibration images a promise takes, by the Beta law (`anomaly.conformal`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from anomaly import conformal

ALPHAS = (0.1, 0.05, 0.02, 0.01, 0.005, 0.001)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Sizes:
    """Calibration images: of the images of a calibration these are half."""

    alpha: float
    least: int  # with fewer, nothing is ever an anomaly at alpha
    promised: int  # with fewer, nothing ever is where the rate is promised with CONFIDENCE
    within_half: int  # from here on the rate is at most 1.5 α, with CONFIDENCE
    within_fifth: int  # at most 1.2 α


def sizes(alpha: float) -> Sizes:
    return Sizes(
        alpha,
        conformal.needed(alpha),
        conformal.needed_with_confidence(alpha, CONFIDENCE),
        close(alpha, 1.5),
        close(alpha, 1.2),
    )


def close(alpha: float, factor: float, confidence: float = CONFIDENCE) -> int:
    """The n from which on the true rate of false alarms at α is at most factor · α with that confidence, for every n.

    For one rank k the bound falls with n, so the worst n is that at which k is first reached, ⌈k/α⌉ − 1; and there it
    comes nearer to α the larger k is. So it is the largest k that does not hold at its first n that decides. Raises
    `ValueError` for a factor of at most 1: no n does that.
    """
    if factor <= 1:
        raise ValueError(f"factor: {factor:g}; the bound is above alpha for every n, so it takes more than 1")

    def kept(n: int, k: int) -> bool:
        return conformal.upper_bound(n, k, confidence) <= factor * alpha

    beyond = 1
    while not kept(_first(beyond, alpha), beyond):
        beyond *= 2
    k = _least(beyond // 2, beyond, lambda k: kept(_first(k, alpha), k)) - 1
    return _least(_first(k, alpha), _first(k + 1, alpha), lambda n: kept(n, k))


def _least(low: int, high: int, holds: Callable[[int], bool]) -> int:
    """The least number above `low` that holds, where all do from some number up to `high` on."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def _first(k: int, alpha: float) -> int:
    return math.ceil(k / alpha * (1 - 1e-12)) - 1


def table(alphas: Sequence[float] = ALPHAS) -> str:
    """Markdown."""
    lines = [
        '| α | least n | least n with `"confidence": 0.95` | rate ≤ 1.5 α | rate ≤ 1.2 α |',
        "|---|---|---|---|---|",
    ]
    for s in map(sizes, alphas):
        numbers = (s.least, s.promised, s.within_half, s.within_fifth)
        lines.append(f"| {s.alpha:g} | " + " | ".join(f"{n:,}" for n in numbers) + " |")
    return "\n".join(lines)
