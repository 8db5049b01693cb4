"""Scores of images under every label at once: the mean of the probabilities, and what each label gives.

    log p(x) = log (1/K) Σ_y p(x | y)

for K labels that are equally likely before the image is seen. Of any family, since a score given a label is all that it
takes; it costs as much as all labels together. Where p(x | y) is a bound or an estimate, so is this.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from service.messages import Scored


@dataclass(frozen=True)
class Marginal:
    """Of one image."""

    scored: Scored
    by_label: tuple[float, ...]  # log p(x | y), nats


def marginal(scored: Sequence[Scored], index: int) -> Marginal:
    """From an image's scores under every label, in order. Its statistics and features are means by the posterior
    p(y | x), and so is, of squares, its standard error; it has converged where all have that matter: whose posterior is
    above 1 %."""
    logs = [s.log_prob for s in scored if s.log_prob is not None]
    if len(logs) < len(scored):
        raise ValueError("log_prob: missing under some label; energies have no mean of probabilities")
    top = max(logs)
    if not math.isfinite(top):  # impossible under every label, or no number: as it is
        return Marginal(dataclasses.replace(scored[0], index=index, log_prob=top), tuple(logs))
    weights = [math.exp(log - top) for log in logs]
    total = math.fsum(weights)
    posterior = [weight / total for weight in weights]

    def mean(values: Sequence[float]) -> float:
        return math.fsum(p * value for p, value in zip(posterior, values, strict=True) if p > 0)

    errors = [s.stderr for s in scored if s.stderr is not None]
    settled = [s.converged for s, p in zip(scored, posterior, strict=True) if s.converged is not None and p > 0.01]
    return Marginal(
        Scored(
            index,
            top + math.log(total / len(logs)),
            stderr=math.sqrt(mean([error**2 for error in errors])) if len(errors) == len(scored) else None,
            statistics={name: mean([s.statistics[name] for s in scored]) for name in scored[0].statistics},
            features={
                name: np.einsum("y,yf->f", posterior, np.stack([s.features[name] for s in scored])).astype(np.float32)
                for name in scored[0].features
            },
            converged=all(settled) if settled else None,
        ),
        tuple(logs),
    )
