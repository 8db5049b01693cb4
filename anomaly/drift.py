"""Are the images that come still like those of the calibration? A bet against it, that may be read at any time.

p-values hold while new images are exchangeable with the calibration images. Each new score is ranked among the
calibration's *and all those that came before it*, ties broken at random: then, as long as all are exchangeable, the
ranks

    p_t = (#{s_i > s_t} + U_t · #{s_i = s_t}) / t                   i = 1 … t, the new one included; U_t uniform

are independent and uniform on [0, 1] (Vovk, Gammerman and Shafer 2005, ch. 8). Ranked among the calibration alone they
would share its luck, and any test that goes on for ever would find that out.

Against uniform numbers no bet makes money. A gambler who begins with 1 and multiplies a stake by f(p), where f ≥ 0
integrates to 1, has a martingale: the chance that it ever reaches c is at most 1/c (Ville 1939). Reaching 100 is
evidence of 100 : 1 against exchangeability, whenever one looks and however often.

The bets are f_ε(p) = ε p^(ε − 1) and f_ε(1 − p), for several ε in (0, 1) (the power martingales of Vovk, Nouretdinov
and Gammerman 2003): they win when too many images are odd, or too few. Since a drift may begin late, most money sleeps:
at step t the share 1/(t + PATIENCE) of what still sleeps wakes up and is divided among the bets, where it stays.
Whoever begins to bet just when the drift does has then a stake of about PATIENCE/t², so a late drift is found a
logarithm later (cf. Volkhonskiy et al. 2017, arXiv 1706.03415, where betting begins anew instead).

Scores cannot be remembered for ever: after LONGEST of them the game ends, and another begins among the calibration's
alone. With a unit each, sooner or later one of many games would be won by chance. So all of them share the one unit:
game j gets the share w_j, where Σ w_j = 1, and the chance that any ever brings it to c is at most Σ w_j/c = 1/c.
"""

from __future__ import annotations

import bisect
import math
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

POWERS = (0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9)  # ε
PATIENCE = 50.0
LEAST_P = 1e-12  # a rank of 0 would be an infinite win
LONGEST = 200_000  # scores that are remembered, and so the length of a game
RESERVE = 0.1  # of the unit, for all games but the first


def stake(game: int) -> float:
    """The money that a game j = 1, 2, … begins with: w_j."""
    return 1 - RESERVE if game == 1 else RESERVE / (game * (game - 1))


@dataclass
class Bets:
    """The gambler's money in a game, as logarithms and in units of what it began with."""

    asleep: float = 0.0
    low: Floats = field(default_factory=lambda: np.full(len(POWERS), -math.inf))  # on small p, for each power
    high: Floats = field(default_factory=lambda: np.full(len(POWERS), -math.inf))  # on large p
    taken: int = 0  # ranks
    peak: float = 0.0  # the most that there ever was

    def take(self, p: float) -> None:
        """Bet on a rank p in [0, 1]."""
        share = 1 / (self.taken + PATIENCE)
        woken = self.asleep + math.log(share / (2 * len(POWERS)))
        self.low = np.logaddexp(self.low, woken) + log_bet(p)
        self.high = np.logaddexp(self.high, woken) + log_bet(1 - p)
        self.asleep += math.log1p(-share)
        self.taken += 1
        self.peak = max(self.peak, self.wealth)

    @property
    def wealth(self) -> float:
        """log of all the money: the martingale."""
        return float(np.logaddexp.reduce([self.asleep, *self.low, *self.high]))


_EPS = np.array(POWERS)


def log_bet(p: float) -> Floats:
    """log f_ε(p) for each power ε."""
    return np.asarray(np.log(_EPS) + (_EPS - 1) * math.log(max(p, LEAST_P)))


class Watch:
    """Watches one calibration's scores. The ties' U come from a generator of a fixed seed, in a stream of its own."""

    def __init__(self, calibration: Floats, seed: int = 0) -> None:
        self._calibration = calibration
        self._rng = np.random.default_rng(seed)
        self._games, self._before = 0, -math.inf  # log of the most that it was in games before this one
        self._begin()
        self.alarmed_at: int | None = None  # images seen when the bound was first reached
        self.seen = 0

    def _begin(self) -> None:
        self._scores = array("d", self._calibration)  # sorted; a quarter of what a list of floats takes
        self._games += 1
        self.bets = Bets()
        self._log_stake = math.log(stake(self._games))

    @property
    def evidence(self) -> float:
        """log of this game's money now."""
        return self._log_stake + self.bets.wealth

    @property
    def peak(self) -> float:
        """log of the most that it ever was, in any game."""
        return max(self._before, self._log_stake + self.bets.peak)

    def saw(self, scores: Iterable[float], bound: float) -> None:
        """Images in the order in which they came. bound: c, from which on there is an alarm, for good."""
        for score in scores:
            if len(self._scores) - len(self._calibration) >= LONGEST:
                self._before = self.peak
                self._begin()
            self.bets.take(self._rank(math.inf if math.isnan(score) else float(score)))
            self.seen += 1
            if self.alarmed_at is None and self.peak >= math.log(bound):
                self.alarmed_at = self.seen

    def _rank(self, score: float) -> float:
        first, last = bisect.bisect_left(self._scores, score), bisect.bisect_right(self._scores, score)
        self._scores.insert(last, score)
        larger, equal = len(self._scores) - 1 - last, last - first + 1
        return (larger + float(self._rng.random()) * equal) / len(self._scores)
