"""Watches the scores of models that the operator names for drift away from their calibration (`anomaly.drift`).

State is this API process' own: behind a balancer each replica watches its share. It begins anew with another
calibration, and with another process.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from anomaly.calibration import Calibration
from anomaly.drift import Watch

EVERY = "*"


@dataclass(frozen=True)
class Drifting:
    """How a model's watch stands."""

    model: str
    images: int  # seen since the calibration
    evidence: float  # log10 of the gambler's money now
    peak: float  # log10 of the most that it ever was
    alarm: bool


class Drifts:
    """models: ids with commas between, or "*"."""

    def __init__(self, models: str, bound: float) -> None:
        self._models = {name.strip() for name in models.split(",") if name.strip()}
        self._bound = bound
        self._watches: dict[str, tuple[str, Watch]] = {}  # by model: the calibration's sha256

    def watches(self, model: str) -> bool:
        return model in self._models or EVERY in self._models

    def saw(self, model: str, sha256: str, calibration: Calibration, scores: Sequence[float]) -> str | None:
        """Scores of images in the order in which they came; a warning where there is an alarm."""
        if not self.watches(model):
            return None
        known = self._watches.get(model)
        if known is None or known[0] != sha256:
            known = self._watches[model] = (sha256, Watch(calibration.scores))
        watch = known[1]
        watch.saw(scores, self._bound)
        if watch.alarmed_at is None:
            return None
        return (
            f"drift: {model}: since its calibration {watch.seen:,} images were scored here, and after "
            f"{watch.alarmed_at:,} of them the evidence was {self._bound:g} : 1 that they are not like those of the "
            "calibration: either many are anomalies, or what is normal has changed and p-values no longer hold; then "
            "calibrate again"
        )

    def __iter__(self) -> Iterator[Drifting]:
        for model, (_, watch) in sorted(self._watches.items()):
            now, peak = watch.evidence / math.log(10), watch.peak / math.log(10)
            yield Drifting(model, watch.seen, now, peak, watch.alarmed_at is not None)
