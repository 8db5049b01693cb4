"""What a step costs by the number of its rows: fitted to the steps that were seen. Pure: plain data in and out."""

from __future__ import annotations

import math

UNKNOWN_COST = 1e-3  # seconds a step is taken to cost before one was measured
SPIKE = 10.0  # times what was predicted, at which a step's seconds are cut off: see `Cost.plausible`


class Cost:
    """seconds = a · rows + b of a step, fitted by least squares over the steps seen, older ones counting less and
    less.
    """

    def __init__(self, forget: float = 0.98) -> None:
        self._forget = forget
        self._n = self._x = self._y = self._xx = self._xy = 0.0

    def observe(self, rows: int, seconds: float) -> None:
        f = self._forget
        self._n, self._x, self._y = f * self._n + 1, f * self._x + rows, f * self._y + seconds
        self._xx, self._xy = f * self._xx + rows * rows, f * self._xy + rows * seconds

    @property
    def coefficients(self) -> tuple[float, float]:
        """(a, b), neither negative. Before anything was seen: (0, UNKNOWN_COST)."""
        if self._n == 0:
            return 0.0, UNKNOWN_COST
        mean_x, mean_y = self._x / self._n, self._y / self._n
        variance = self._xx / self._n - mean_x**2
        if variance > 1e-9 * mean_x**2:
            a = max(0.0, (self._xy / self._n - mean_x * mean_y) / variance)
            b = mean_y - a * mean_x
            if b >= 0:
                return a, b
        return mean_y / mean_x, 0.0  # one batch size seen, or a line that would start below zero: proportional

    def predict(self, rows: int) -> float:
        a, b = self.coefficients
        return a * rows + b

    def plausible(self, rows: int, seconds: float) -> float:
        """As much of a step's seconds as its work may have taken. A process that stood still for a minute in the middle
        of a step would else make that lane's steps seem dear for the next hundred, and have it pay for the minute with
        as many of other lanes' steps. One that has become slower for good is believed after a few dozen steps.
        """
        mean = self._y / self._n if self._n else math.inf
        return min(max(0.0, seconds), SPIKE * max(self.predict(rows), mean, UNKNOWN_COST))
